"""Where the pivots of a model's layers lie: which outputs have to be moved behind the products, and which need not.

`pivoted` takes for each layer the pivots that QR finds, anywhere among its rows: the smallest coefficients, and an
index that moves every output. `shared-mlp` renumbers the hidden features of each MLP, which nobody else sees, so that
one set of them comes first and serves gate and up (as rows) and down (as columns, see `column_linear`): nothing
moves in the MLP, two thirds of a decoder's weights, for row norms of coefficients nearly twice as large. All layouts
hold the same function at the same ranks; docs/layouts.md has what they cost and which others were tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from pifa_deploy.column_linear import PifaColumnLinear
from pifa_deploy.errors import FactorizationError
from pifa_deploy.factorization import factors_from_low_rank
from pifa_deploy.hidden_features import HiddenFeatures, hidden_features
from pifa_deploy.linear import LowRankLinear, PifaLinear
from pifa_deploy.refit import refitted_coefficients
from pifa_deploy.shared_pivots import shared_pivots
from pifa_deploy.transformers_quantizer import FactorisedLinear, factorised_modules

LAYOUTS = ("auto", "pivoted", "shared-mlp")
# Above this root mean square of coefficient row norms, by which rounding noise grows, `auto` keeps an MLP pivoted.
AUTO_ROW_NORM = 8.0
# What is refused when it was asked for by name: float16 would keep two digits.
MAX_ROW_NORM = 50.0


@dataclass(frozen=True, kw_only=True)
class LayoutSummary:
    """What a layout did to a model.

    Attributes:
        modules: "pivoted" (outputs are moved by an index), "ordered" (pivots are the first rows), "column", "lowrank"
            -> number of layers.
        max_coefficient: largest |C| or |D| entry.
        rms_row_norm: the largest root mean square of coefficient row norms of a layer.
        kept: module -> why it was left pivoted although another layout was asked for.
    """

    modules: dict[str, int]
    max_coefficient: float
    rms_row_norm: float
    kept: dict[str, str]


def check_layout(layout: str) -> None:
    """Raises ValueError for an unknown layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, expected one of {LAYOUTS}")


def layout_of(layer: FactorisedLinear) -> str:
    """Returns where a layer's pivots lie, a key of `LayoutSummary.modules`."""
    if isinstance(layer, LowRankLinear):
        return "lowrank"
    if isinstance(layer, PifaColumnLinear):
        return "column"
    return "pivoted" if layer.output_index is not None and len(layer.output_index) else "ordered"


def low_rank_pair(layer: FactorisedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns U [m, r], V [r, n] float64 with the matrix of the stored factors as their product."""
    if isinstance(layer, LowRankLinear):
        return layer.low_rank_u.detach().double(), layer.low_rank_v.detach().double()
    pivots, coefficients = layer.pivot_weight.detach().double(), layer.coefficients.detach().double()
    identity = torch.eye(layer.rank, dtype=torch.float64)
    if isinstance(layer, PifaColumnLinear):
        return pivots, torch.cat([identity, coefficients], dim=1)
    left = torch.cat([identity, coefficients])
    index = layer.output_index
    return left[index.long()] if index is not None and len(index) else left, pivots


def apply_layout(
    model: nn.Module, layout: str, *, made: Callable[[str, nn.Module], None] = lambda path, layer: None
) -> LayoutSummary:
    """Puts the pivots of a model's PIFA layers where a layout wants them, in place; low-rank pairs stay as they are.

    Args:
        model: on the CPU, with factorised layers in the dtype they are stored in.
        layout: "pivoted"; "shared-mlp" in every MLP; or "auto": in each MLP whose coefficients stay small with it.
        made: called with the path of each new layer, when it is in its place.

    Raises:
        ValueError: an unknown layout.
        FactorizationError: a layer has no usable pivots, or "shared-mlp" is not possible; names the module.
    """
    check_layout(layout)
    kept: dict[str, str] = {}
    groups = [] if layout == "pivoted" else hidden_features(model)
    if layout == "shared-mlp" and not groups:
        raise FactorizationError("no module has features that may be renumbered; use --layout auto or pivoted")
    shared: set[str] = set()
    for group in tqdm(groups, desc="layout", unit="MLP", disable=None, leave=False):
        reason = _share(model, group, limit=AUTO_ROW_NORM if layout == "auto" else MAX_ROW_NORM)
        if reason is None:
            shared |= set(group.paths())
            for path in group.paths():
                made(path, model.get_submodule(path))
        elif layout == "shared-mlp":
            raise FactorizationError(f"{group.module}: {reason}; use --layout auto or pivoted")
        else:
            kept[group.module] = reason
    for path, layer in factorised_modules(model).items():
        if path not in shared and not isinstance(layer, LowRankLinear) and layout_of(layer) != "pivoted":
            model.set_submodule(path, _pivoted(layer))
            made(path, model.get_submodule(path))
    return describe_layout(model, kept)


def describe_layout(model: nn.Module, kept: dict[str, str] | None = None) -> LayoutSummary:
    """Returns where the pivots of a model's layers lie."""
    layers = factorised_modules(model).values()
    coefficients = [layer.coefficients.detach().float() for layer in layers if not isinstance(layer, LowRankLinear)]
    filled = [matrix for matrix in coefficients if matrix.numel()]
    return LayoutSummary(
        modules=dict(sorted(Counter(map(layout_of, layers)).items())),
        max_coefficient=max((float(matrix.abs().max()) for matrix in filled), default=0.0),
        rms_row_norm=max((_rms(layer) for layer in layers if not isinstance(layer, LowRankLinear)), default=0.0),
        kept=kept or {},
    )


def _rms(layer: PifaLinear | PifaColumnLinear) -> float:
    """Returns the root mean square of the norms of the coefficients that make one output or input each."""
    coefficients = layer.coefficients.detach().float()
    if not coefficients.numel():
        return 0.0
    made = coefficients.shape[1 if isinstance(layer, PifaColumnLinear) else 0]
    return float(coefficients.norm() / made**0.5)


def _pivoted(layer: PifaLinear | PifaColumnLinear) -> PifaLinear:
    factors = factors_from_low_rank(*low_rank_pair(layer), dtype=layer.pivot_weight.dtype)
    return PifaLinear.from_factors(factors, layer.bias)


def _share(model: nn.Module, group: HiddenFeatures, *, limit: float) -> str | None:
    """Gives an MLP one set of pivots if no row norm gets above `limit`. Returns None, or why it stays as it is."""
    layers: list[PifaLinear | PifaColumnLinear] = []
    for path in group.paths():
        layer = model.get_submodule(path)
        if not isinstance(layer, (PifaLinear, PifaColumnLinear)):
            return "not all of its linears are PIFA layers"
        layers.append(layer)
    ranks = sorted({layer.rank for layer in layers})
    if len(ranks) > 1:
        return f"ranks {', '.join(map(str, ranks))} differ"
    pairs = [low_rank_pair(layer) for layer in layers]
    order, rank = _order(pairs, ranks[0]), ranks[0]
    found: list[PifaLinear | PifaColumnLinear] = [_first_columns(layers[-1], pairs[-1], order)]
    found[:0] = [_ordered_rows(layer, pair, order) for layer, pair in zip(layers[:-1], pairs[:-1], strict=True)]
    worst = max(_rms(layer) for layer in found)
    # `not <=` also catches NaN.
    if not worst <= limit:
        return f"one set of {rank} pivots has coefficients with a row norm of {worst:.3g}, above {limit:g}"
    for path, replaced in zip(group.paths(), found, strict=True):
        model.set_submodule(path, replaced)
    return None


def _order(pairs: list[tuple[torch.Tensor, torch.Tensor]], rank: int) -> torch.Tensor:
    """Returns the order of the hidden features, the shared pivots first; both parts ascending."""
    features = [u for u, _ in pairs[:-1]] + [pairs[-1][1].T]
    pivots = shared_pivots([torch.linalg.qr(matrix).Q for matrix in features], rank)
    is_other = torch.ones(len(features[0]), dtype=torch.bool)
    is_other[pivots] = False
    return torch.cat([pivots, is_other.nonzero()[:, 0]])


def _ordered_rows(
    layer: PifaLinear | PifaColumnLinear, pair: tuple[torch.Tensor, torch.Tensor], order: torch.Tensor
) -> PifaLinear:
    """Returns the layer with its outputs in another order, the first of them as pivots."""
    (u, v), dtype, rank = pair, layer.pivot_weight.dtype, layer.rank
    pivot_weight = (u[order[:rank]] @ v).to(dtype)
    found = PifaLinear(layer.in_features, layer.out_features, rank, bias=layer.bias is not None)
    found.pivot_weight = nn.Parameter(pivot_weight)
    found.coefficients = nn.Parameter(refitted_coefficients(pivot_weight, u[order[rank:]], v).to(dtype))
    if layer.bias is not None:
        found.bias = nn.Parameter(layer.bias.detach()[order])
    found.pivot_rows = torch.arange(rank, dtype=torch.int32)
    found.derive_output_index()
    return found


def _first_columns(
    layer: PifaLinear | PifaColumnLinear, pair: tuple[torch.Tensor, torch.Tensor], order: torch.Tensor
) -> PifaColumnLinear:
    """Returns the layer with its inputs in another order, the first of them as pivots."""
    (u, v), dtype, rank = pair, layer.pivot_weight.dtype, layer.rank
    pivot_weight = (u @ v[:, order[:rank]]).to(dtype)
    # The columns of W are the rows of its transpose.
    coefficients = refitted_coefficients(pivot_weight.T, v[:, order[rank:]].T, u.T).T
    return PifaColumnLinear.from_factors(pivot_weight, coefficients.to(dtype).contiguous(), layer.bias)
