"""Level L0: are the weights of an ONNX folder those of its checkpoint, bit for bit, and is each in its place?"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import nn

from pifa_deploy import op_spec
from pifa_deploy.exported_files import changed_files
from pifa_deploy.graph_cut import CutGraph
from pifa_deploy.layer_forms import DENSE, LOW_RANK, STORED
from pifa_deploy.layouts import low_rank_pair
from pifa_deploy.linear import LowRankLinear, PifaLinear
from pifa_deploy.transformers_quantizer import FactorisedLinear, factorised_modules

# Smaller initializers without a name of the model are constants of the graph: shapes, axes, an epsilon.
_CONSTANT_BYTES = 1024
_DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT32: torch.int32,
}


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """The tensors of a folder against those of its checkpoint, rounded to the folder's dtype.

    Attributes:
        tensors: how many were compared.
        differing: "name: why", for each that is missing, has another type or shape, or another bit.
        misplaced: "node: why", for each PIFA node that takes a tensor of another module, or in another place.
        changed_files: "file: why", see `changed_files`; None where nothing says what they were.
    """

    tensors: int
    differing: tuple[str, ...]
    misplaced: tuple[str, ...]
    changed_files: tuple[str, ...] | None = None


def measure_weights(model: nn.Module, graph: CutGraph, *, reference: Path | str | None = None) -> StoredWeights:
    """Compares every tensor of the checkpoint with the initializer of its name, bit for bit.

    Exports keep each tensor as the checkpoint has it, behind a Transpose where a product wants it turned, and so there
    is nothing to undo here. A layer that the exporter wrote dense or as a low-rank pair is held against the product of
    its factors in float64, see `_form_difference`.

    Args:
        model: the fp32 reference; fp16 and bf16 checkpoints lose nothing by it.
        graph: of the folder.
        reference: the checkpoint that the folder was exported from, for the files beside the graph.
    """
    reformed = {path: layer for path, layer in factorised_modules(model).items() if _is_reformed(layer, path, graph)}
    expected = _expected(model, graph, reformed)
    # Tied tensors stand in the file once, under one of their names.
    aliases: dict[int, set[str]] = {}
    for name, tensor in expected.items():
        aliases.setdefault(tensor.data_ptr(), set()).add(name)
    differing, seen = [], set[str]()
    for name, tensor in expected.items():
        there = [each for each in (name, *sorted(aliases[tensor.data_ptr()])) if each in graph.initializers]
        seen |= set(there[:1])
        why = _difference(tensor, there[0], graph) if there else "not in the graph"
        differing += [f"{name}: {why}"] if why else []
    for path, layer in reformed.items():
        why = _form_difference(layer, path, graph)
        differing += [f"{path}: {why}"] if why else []
    names = {name for path in reformed for name in _form_tensors(path, graph)}
    differing += [f"{name}: not in the checkpoint" for name in _unknown(graph, seen | names)]
    compared = len(seen) + len(names)
    return StoredWeights(
        tensors=compared,
        differing=tuple(differing),
        misplaced=tuple(_misplaced(graph)),
        changed_files=changed_files(graph.folder, reference),
    )


def _is_reformed(layer: FactorisedLinear, path: str, graph: CutGraph) -> bool:
    return graph.form(path) != (LOW_RANK if isinstance(layer, LowRankLinear) else STORED)


def _expected(model: nn.Module, graph: CutGraph, reformed: Collection[str]) -> dict[str, torch.Tensor]:
    """Returns the tensors that the graph shall hold, as the reference has them; empty ones are not written."""
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in graph.initializers}
    expected = {**buffers, **{name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}}
    for path, layer in factorised_modules(model).items():
        for name in ("pivot_rows", op_spec.INDEX_INPUT):
            expected.pop(f"{path}.{name}", None)
        if path in reformed:
            factors = [name for name in expected if name.rpartition(".")[0] == path and not name.endswith(".bias")]
            expected = {name: tensor for name, tensor in expected.items() if name not in factors}
        elif isinstance(layer, PifaLinear):
            index = _output_index(layer)
            if not torch.equal(index, torch.arange(layer.out_features, dtype=torch.int32)):
                expected[f"{path}.{op_spec.INDEX_INPUT}"] = index
    return {name: tensor for name, tensor in expected.items() if tensor.numel()}


def _output_index(layer: PifaLinear) -> torch.Tensor:
    """Returns where each output stands among pivots and others, worked out from the pivot rows alone."""
    pivots = layer.pivot_rows.tolist()
    others = sorted(set(range(layer.out_features)) - set(pivots))
    index = [0] * layer.out_features
    for place, row in enumerate(pivots + others):
        index[row] = place
    return torch.tensor(index, dtype=torch.int32)


def _difference(expected: torch.Tensor, name: str, graph: CutGraph) -> str | None:
    tensor = graph.initializers[name]
    dtype = _DTYPES.get(tensor.data_type)
    wanted = getattr(torch, op_spec.DTYPE_FLAGS[graph.folder.dtype]) if expected.is_floating_point() else expected.dtype
    # What a model keeps in fp32 whatever its dtype, such as rotary frequencies, is not rounded.
    if dtype is None or dtype not in (wanted, expected.dtype):
        return f"is {ir.DataType(tensor.data_type).name}, expected {wanted}"
    if tuple(tensor.dims) != tuple(expected.shape):
        return f"is {list(tensor.dims)}, the checkpoint has {list(expected.shape)}"
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    wrong = int((expected.to(dtype).contiguous().view(bits) != _tensor(graph, name).view(bits)).sum())
    return f"{wrong} of {expected.numel()} elements have other bits" if wrong else None


def _tensor(graph: CutGraph, name: str) -> torch.Tensor:
    dtype = _DTYPES[graph.initializers[name].data_type]
    array = graph.array(name)
    # The file is mapped read-only, which torch has no word for; bfloat16 is no dtype of numpy.
    return torch.frombuffer(bytearray(array.tobytes()), dtype=dtype).reshape(array.shape)


def _form_tensors(path: str, graph: CutGraph) -> list[str]:
    names = ["weight"] if graph.form(path) == DENSE else ["low_rank_u", "low_rank_v"]
    return [f"{path}.{name}" for name in names if f"{path}.{name}" in graph.initializers]


def _form_difference(layer: FactorisedLinear, path: str, graph: CutGraph) -> str | None:
    """Says what is wrong with a layer in another form than the checkpoint's.

    A dense weight is its factors' product, rounded once: where that lies between two numbers either is right. A pair
    U, V is off by u (2 sum_k ||U_k||^2 ||V_k||^2)^(1/2) in the Frobenius norm when each of its numbers is rounded once,
    u being half a unit in the last place; twice as much is allowed.
    """
    tensors = [_tensor(graph, name) for name in _form_tensors(path, graph)]
    rounded = copy.deepcopy(layer).to(getattr(torch, op_spec.DTYPE_FLAGS[graph.folder.dtype]))
    left, right = low_rank_pair(rounded)
    if graph.form(path) == DENSE:
        found, size = tensors[0].double(), (left @ right).abs()
        info = torch.finfo(tensors[0].dtype)
        allowed = size * info.eps / 2 * (1 + 1e-6) + info.smallest_normal * info.eps
        if found.shape == size.shape and bool(((found - left @ right).abs() <= allowed).all()):
            return None
        return "its dense weight is not the rounded product of the factors"
    u, v = (tensor.double() for tensor in tensors)
    unit = torch.finfo(tensors[0].dtype).eps / 2
    bound = unit * (2 * u.square().sum(0) @ v.square().sum(1)).sqrt() if u.shape[1] == v.shape[0] else 0.0
    if u.shape[0] == len(left) and v.shape[1] == right.shape[1] and (u @ v - left @ right).norm() <= 2 * bound:
        return None
    return "its low-rank pair is not the rounded product of the factors"


def _unknown(graph: CutGraph, known: set[str]) -> list[str]:
    """Returns the initializers that look like weights and have no name of the checkpoint."""
    found = []
    for name, tensor in graph.initializers.items():
        size = graph.array(name).nbytes
        is_float = tensor.data_type in _DTYPES and tensor.data_type != onnx.TensorProto.INT32
        # The identity beside the coefficients, which a body in plain operators holds as a constant.
        if name in known or not is_float or size < _CONSTANT_BYTES or _is_identity(graph, name):
            continue
        found.append(name)
    return found


def _is_identity(graph: CutGraph, name: str) -> bool:
    tensor = _tensor(graph, name)
    return tensor.dim() == 2 and torch.equal(tensor, torch.eye(len(tensor), dtype=tensor.dtype))


def _misplaced(graph: CutGraph) -> list[str]:
    """Returns what is wrong with the weights that PIFA nodes take: each has those of the module it is named after."""
    found = []
    for node in graph.nodes:
        if node.domain != op_spec.DOMAIN:
            continue
        biased = len(node.input) > len(op_spec.inputs_of(node.op_type, bias=False))
        names = op_spec.inputs_of(node.op_type, bias=biased)[1:]
        for name, taken in zip(names, node.input[1:], strict=False):
            if taken != f"{node.name}.{name}":
                found.append(f"{node.name}: takes {taken} for its {name}")
    return found
