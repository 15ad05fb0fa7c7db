"""Where a decoder's graph can be cut in two: the values of its residual stream.

At such a value nothing else that came from the tokens is still to be read, whatever the architecture. The norm whose
weight is read next says which module of the reference takes the same value.
"""

from __future__ import annotations

from dataclasses import dataclass

from pifa_deploy.graph_cut import CutGraph


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """A value of the residual stream.

    Attributes:
        value: its name in the graph.
        norm: path of the module that reads it next.
    """

    value: str
    norm: str


def boundaries(graph: CutGraph) -> list[Boundary]:
    """Returns the values of the residual stream in order, the first behind the embedding, the last before the head."""
    order = _dependent_nodes(graph)
    inside, weights = set(order), _weights_behind(graph, set(order))
    last_use = {name: i for i in order for name in graph.nodes[i].input if name}
    found: list[Boundary] = []
    alive: set[str] = set()
    for place, i in enumerate(order):
        alive |= {name for name in graph.nodes[i].output if last_use.get(name, -1) > i}
        alive -= {name for name in graph.nodes[i].input if last_use.get(name, -1) <= i}
        if len(alive) != 1:
            continue
        (value,) = alive
        norm = _next_norm(graph, order[place + 1 :], weights)
        readers = [graph.nodes[j].op_type for j in inside.intersection(graph.consumers[value])]
        # What a norm of several nodes reads it reads twice; between those nodes there are cuts too.
        is_read = len(readers) > 1 or readers == ["LayerNormalization"]
        if norm and is_read and norm not in {boundary.norm for boundary in found}:
            found.append(Boundary(value=_before_cast(graph, value), norm=norm))
    return found


def _before_cast(graph: CutGraph, value: str) -> str:
    """Returns the value in the graph's own dtype where a norm's cast to fp32 is its only reader."""
    maker = graph.nodes[graph.producers[value]]
    return str(maker.input[0]) if maker.op_type == "Cast" else value


def _dependent_nodes(graph: CutGraph) -> list[int]:
    """Returns, in order, the nodes from the embedding to the logits that depend on what it embeds."""
    tokens, values, found = {"input_ids"}, set[str](), []
    for i in graph.between((), ["logits"]):
        node = graph.nodes[i]
        if node.op_type in ("Shape", "Size"):
            continue
        is_embedding = node.op_type == "Gather" and node.input[0] in graph.initializers and node.input[1] in tokens
        if is_embedding or values & set(node.input):
            values |= set(node.output)
            found.append(i)
        elif tokens & set(node.input):
            tokens |= set(node.output)
    return found


def _weights_behind(graph: CutGraph, dependent: set[int]) -> dict[str, str]:
    """Returns value -> weight of the model, for the weights and what is computed from one of them alone."""
    found = {name: name for name in graph.initializers if name.count(".") > 1 and not name.endswith(".bias")}
    for i, node in enumerate(graph.nodes):
        names = {found[name] for name in node.input if name in found}
        if i not in dependent and len(names) == 1:
            found |= dict.fromkeys(node.output, names.pop())
    return found


def _next_norm(graph: CutGraph, following: list[int], weights: dict[str, str]) -> str | None:
    """Returns the module of the first weight that nodes read, if that is a vector: the weight of a norm."""
    for i in following:
        for name in graph.nodes[i].input:
            if name in weights:
                weight = weights[name]
                return weight.rpartition(".")[0] if len(graph.initializers[weight].dims) == 1 else None
    return None
