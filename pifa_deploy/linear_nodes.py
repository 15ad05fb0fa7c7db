"""Which nodes of an ONNX graph compute which linear layer of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx

from pifa_deploy import op_spec

# A path with the number of a decoder layer in it: the head, which has none, is no linear layer here.
_IN_A_LAYER = re.compile(r"(?:^|\.)\d+\.")
_FACTORS = ("pivot_weight", "low_rank_u")
_BODIES = tuple(f"{op_type}_" for op_type in op_spec.FORMS)
# A profile of one run: (module, a part of it) -> microseconds; "" is the module of what is in no linear layer.
Launch = dict[tuple[str, str], float]


def in_a_layer(module: str) -> bool:
    """Whether a path leads into a numbered decoder layer: "model.layers.3.mlp.up_proj"."""
    return bool(_IN_A_LAYER.search(module))


def linear_nodes(model: onnx.ModelProto) -> dict[int, str]:
    """Returns number of a node in the graph -> module, for all nodes of linear layers.

    A module is found by its matrices, which are initializers under its name: every factorised linear, and the dense
    ones inside decoder layers. To it belong the nodes that only turn its weights, those that take a weight beside
    something else (products, the addition of a bias, calls of an operator), and those of an operator's body that stands
    in the graph in plain operators, which keep their names ("PifaLinear_y_cat").

    Args:
        model: as `pifa-deploy export` writes it, nodes in an order of execution.
    """
    nodes, constants = list(model.graph.node), {tensor.name for tensor in model.graph.initializer}
    owners = _weights(model.graph.initializer)
    made: dict[str, str] = {}
    found: dict[int, str] = {}
    waiting = []
    for i, node in enumerate(nodes):
        inputs = set(filter(None, node.input))
        given = {owners[name] for name in inputs if name in owners}
        inside = {made[name] for name in inputs if name in made} if str(node.name).startswith(_BODIES) else set()
        if len(given | inside) == 1:
            (found[i],) = given | inside
            turned = bool(given) and inputs <= owners.keys() | constants
            (owners if turned else made).update(dict.fromkeys(node.output, found[i]))
        elif str(node.name).startswith(_BODIES):
            waiting.append(i)
    # What a body does to its input before the first weight: the module is that of the reader.
    readers = {name: module for i, module in found.items() for name in nodes[i].input}
    for i in reversed(waiting):
        modules = [readers[name] for name in nodes[i].output if name in readers]
        if modules:
            found[i] = modules[0]
            readers.update(dict.fromkeys(nodes[i].input, modules[0]))
    return dict(sorted(found.items()))


def named_linears(model: onnx.ModelProto) -> dict[str, str]:
    """Returns name of a node -> module, as `linear_nodes`."""
    nodes = model.graph.node
    return {nodes[i].name: module for i, module in linear_nodes(model).items() if nodes[i].name}


def _weights(tensors: Iterable[onnx.TensorProto]) -> dict[str, str]:
    """Returns initializer -> linear module that it belongs to."""
    parts = [(tensor.name, *tensor.name.rpartition(".")[::2], len(tensor.dims)) for tensor in tensors]
    linears = {module for _, module, part, rank in parts if rank == 2 and (in_a_layer(module) or part in _FACTORS)}
    return {name: module for name, module, _, _ in parts if module in linears}
