"""Level L1: each PIFA layer alone, in the runtime, against float64, in units of the rounding that is to be expected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn
from tqdm import tqdm

from pifa_deploy import op_spec
from pifa_deploy.column_linear import PifaColumnLinear
from pifa_deploy.decoder_step import IntArray
from pifa_deploy.graph_cut import CutGraph, numpy_dtype
from pifa_deploy.layer_forms import STORED
from pifa_deploy.linear import LowRankLinear, PifaLinear
from pifa_deploy.transformers_quantizer import factorised_modules

PivotLinear = PifaLinear | PifaColumnLinear
_ACCUMULATOR_UNIT = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class OperatorFigures:
    """One PIFA layer in the runtime.

    Attributes:
        module: its path, "model.layers.3.mlp.up_proj".
        rho: largest error in units of its rounding bound, see `expected_and_bound`; infinite where the layer is not in
            the graph.
        max_error: largest absolute error.
        positions: rows of input it was run on.
    """

    module: str
    rho: float
    max_error: float
    positions: int


def expected_and_bound(layer: PivotLinear, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y in float64 and the error of each element that one rounding of each stored result explains.

    With u half a unit in the last place of the dtype and gamma = K 2^-24 for sums of K terms in fp32 (K is the longest
    sum of the layer), the intermediate y_p = W_p x is off by at most u |y_p| + gamma |W_p| |x|, whether or not the
    runtime rounds it to the dtype; the second product passes that on and adds gamma |C| |y_p|, which is no more than
    what gamma |C| |W_p| |x| already allows:

        row form     b = u |y| + |C| (u |y_p| + gamma |W_p| |x|), without the first rounding for the pivots themselves
        column form  b = u |y| + |W_c| (u |z| + gamma (|x_p| + |D| |x_np|)), z = x_p + D x_np

    and u |bias| where a bias is added behind a rounding; the last term is the spacing of subnormal numbers. A runtime
    may do better: ONNX Runtime's CPU has no fp16 product, it casts to fp32 and may leave y_p there. Sums in fp16 are
    what the bound excludes.

    Args:
        layer: its weights are rounded to `dtype` first: the function that the file stores.
        x: [positions, n], already rounded to `dtype`.
        dtype: of the file.
    """
    weight, coefficients = (part.detach().to(dtype).double() for part in (layer.pivot_weight, layer.coefficients))
    unit, x = torch.finfo(dtype).eps / 2, x.double()
    gamma = max(*weight.shape, *coefficients.shape) * _ACCUMULATOR_UNIT
    if isinstance(layer, PifaColumnLinear):
        rank = layer.rank
        z = x[:, :rank] + x[:, rank:] @ coefficients.T
        size = x[:, :rank].abs() + x[:, rank:].abs() @ coefficients.abs().T
        y, bound = z @ weight.T, (unit * z.abs() + gamma * size) @ weight.abs().T
    else:
        y_p, inner = x @ weight.T, gamma * (x.abs() @ weight.abs().T)
        y = torch.cat([y_p, y_p @ coefficients.T], dim=-1)
        bound = torch.cat([inner, (unit * y_p.abs() + inner) @ coefficients.abs().T], dim=-1)
        order = _order(layer)
        y, bound = y[:, order], bound[:, order]
    if layer.bias is not None:
        bias = layer.bias.detach().to(dtype).double()
        y, bound = y + bias, bound + unit * bias.abs()
    return y, bound + unit * y.abs() + torch.finfo(dtype).smallest_normal * unit


def _order(layer: PifaLinear) -> torch.Tensor:
    """Returns where output j stands in concat(y_p, y_np), int64 [m]; from the pivot rows, not the derived index."""
    is_pivot = torch.zeros(layer.out_features, dtype=torch.bool)
    is_pivot[layer.pivot_rows.long()] = True
    return torch.cat([layer.pivot_rows.long(), (~is_pivot).nonzero()[:, 0]]).argsort()


def pivot_layers(model: nn.Module) -> dict[str, PivotLinear]:
    """Returns path -> layer of every PIFA layer."""
    return {name: layer for name, layer in factorised_modules(model).items() if not isinstance(layer, LowRankLinear)}


def measure_operators(
    model: nn.Module, graph: CutGraph, ids: IntArray, *, only: Callable[[str], bool] = lambda module: True
) -> list[OperatorFigures]:
    """Runs each PIFA layer of a graph on the inputs that it meets in the fp32 reference.

    Args:
        model: the fp32 reference; hooked while this runs.
        graph: of the folder.
        ids: int64 [positions], a real text.
        only: which modules; those that the exporter wrote dense or as a low-rank pair are left out anyway.

    Returns:
        One record a layer, in the order in which the model runs them.
    """
    stored = [path for path in pivot_layers(model) if graph.form(path) == STORED and only(path)]
    layers = {path: layer for path, layer in pivot_layers(model).items() if path in stored}
    dtype = getattr(torch, op_spec.DTYPE_FLAGS[graph.folder.dtype])
    found: list[OperatorFigures] = []
    bar = tqdm(total=len(layers), desc="operators", unit="layer", disable=None, leave=False)

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def replay(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].reshape(-1, arguments[0].shape[-1]).to(dtype)
            found.append(_figures(path, layers[path], x, graph=graph))
            bar.update()

        return replay

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        with torch.no_grad(), bar:
            model(input_ids=torch.from_numpy(ids[None]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _figures(path: str, layer: PivotLinear, x: torch.Tensor, *, graph: CutGraph) -> OperatorFigures:
    ends = operator_ends(graph, path, biased=layer.bias is not None)
    if ends is None:
        return OperatorFigures(module=path, rho=float("inf"), max_error=float("inf"), positions=len(x))
    feed = x.float().numpy().astype(numpy_dtype(graph.folder.dtype))
    (found,) = graph.run({ends[0]: feed}, [ends[1]])
    y, bound = expected_and_bound(layer, x, x.dtype)
    if found.shape != tuple(y.shape):
        return OperatorFigures(module=path, rho=float("inf"), max_error=float("inf"), positions=len(x))
    error = np.abs(found.astype(np.float64) - y.numpy())
    rho = float((error / bound.numpy()).max())
    return OperatorFigures(module=path, rho=rho, max_error=float(error.max()), positions=len(x))


def operator_ends(graph: CutGraph, module: str, *, biased: bool = False) -> tuple[str, str] | None:
    """Returns the values that a PIFA layer reads and makes, None where the graph has no such layer.

    Args:
        graph: of a folder, with PIFA nodes or with their bodies in plain operators.
        module: path of the layer; nodes bear it as their name, its tensors as their prefix.
        biased: whether the layer has a bias: where that is not among the node's inputs it is added behind it.
    """
    for node in graph.nodes:
        if node.name == module and node.domain == op_spec.DOMAIN:
            ends = node.input[0], node.output[0]
            break
    else:
        plain = _plain_ends(graph, module)
        if plain is None:
            return None
        ends = plain
    for i in graph.consumers[ends[1]] if biased else ():
        node = graph.nodes[i]
        if node.op_type == "Add" and any(name in graph.initializers for name in node.input):
            return ends[0], node.output[0]
    return ends


def _plain_ends(graph: CutGraph, module: str) -> tuple[str, str] | None:
    """Finds a body by the layer's tensors and by the names that its nodes keep, `PifaLinear_y_p` and the like."""
    weights = {name for name in graph.initializers if name.rpartition(".")[0] == module}
    uses: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if not weights & set(node.input):
            continue
        if all(name in weights or name in graph.initializers for name in node.input):
            weights |= set(node.output)
        else:
            uses.append(node)
    if not uses:
        return None
    first = next(name for name in uses[0].input if name not in weights)
    while first in graph.producers and _of_body(graph.nodes[graph.producers[first]]):
        first = graph.nodes[graph.producers[first]].input[0]
    last = uses[-1].output[0]
    while following := [node for i in graph.consumers[last] if _of_body(node := graph.nodes[i])]:
        last = following[0].output[0]
    return first, last


def _of_body(node: onnx.NodeProto) -> bool:
    return str(node.name).startswith(tuple(f"{op_type}_" for op_type in op_spec.FORMS))
