"""Level L0 one step earlier: a PIFA checkpoint against the low-rank or dense checkpoint it was made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from tqdm import tqdm

from pifa_deploy.column_linear import PifaColumnLinear
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.hidden_features import hidden_features
from pifa_deploy.layouts import low_rank_pair
from pifa_deploy.linear import LowRankLinear, PifaLinear
from pifa_deploy.transformers_quantizer import FactorisedLinear, factorised_modules


@dataclass(frozen=True, kw_only=True)
class SourceLayer:
    """One factorised layer against its source, in float64.

    Attributes:
        module: its path.
        relative_error: ||W - W_source||_F / ||W_source||_F.
        max_error: largest |W - W_source|.
        bound_ratio: ||W - W_source||_F in units of `storing_bound`; None against a dense weight, which was compressed.
    """

    module: str
    relative_error: float
    max_error: float
    bound_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class SourceWeights:
    """A checkpoint against its source.

    Attributes:
        kind: "factorised" (low-rank pairs, or PIFA in another layout) or "dense".
        unchanged: how many other tensors are those of the source, rounded to the dtype they are stored in.
        changed: "name: why", for each that is not.
        layers: the factorised ones.
    """

    kind: str
    unchanged: int
    changed: tuple[str, ...]
    layers: tuple[SourceLayer, ...]


def storing_bound(layer: PifaLinear | PifaColumnLinear) -> float:
    """Returns the Frobenius error that storing the factors of a matrix explains.

    Rounding moves each stored number by at most u of its size, u half a unit in the last place, one up and the next
    down; over the thousands of numbers of a matrix the squares add up. The pivots are off by no more than u ||W_p||_F.
    In the other rows C W_p, the pivots' rounding and that of C bring at most u^2 S each to the square, with
    S = sum_ik C_ik^2 ||(W_p)_k||^2. Coefficients fitted to the pivots as stored (`refit`) minimise the first of these
    plus 2/3 u^2 S, so that they leave no more than the unfitted ones make of it. S is where conditioning comes in:
    pivots that are nearly dependent need large coefficients.

        bound^2 = u^2 (||W_p||_F^2 + 2 S)

    Columns W_c, W_c D the same way, with S = sum_kj D_kj^2 ||(W_c)_k||^2 over the columns k of W_c.
    """
    unit = torch.finfo(layer.pivot_weight.dtype).eps / 2
    pivots, coefficients = layer.pivot_weight.detach().double(), layer.coefficients.detach().double()
    is_column = isinstance(layer, PifaColumnLinear)
    sizes, weights = pivots.square().sum(0 if is_column else 1), coefficients.square().sum(1 if is_column else 0)
    return float(unit * (sizes.sum() + 2 * sizes @ weights).sqrt())


def measure_source(model: nn.Module, source: nn.Module) -> SourceWeights:
    """Compares a PIFA model with what it was made from, both as stored.

    Where a layout renumbered the hidden features of an MLP, they are put back into the source's order first: found by
    the nearest rows of gate, up and columns of down together.

    Raises:
        InputRefusedError: the source is no such model.
    """
    layers, sources = factorised_modules(model), factorised_modules(source)
    pairs = {path: layer for path, layer in sources.items() if path in layers}
    if sources and not pairs:
        raise InputRefusedError("the source is factorised in other modules; name the checkpoint this one came from")
    orders = _orders(model, source)
    found = []
    for path, layer in tqdm(layers.items(), desc="source", unit="layer", disable=None, leave=False):
        found.append(_layer(path, layer, _linear(source, path), order=orders.get(path)))
    unchanged, changed = _others(model, source, orders)
    kind = "factorised" if pairs else "dense"
    return SourceWeights(kind=kind, unchanged=unchanged, changed=tuple(changed), layers=tuple(found))


def _linear(source: nn.Module, path: str) -> nn.Module:
    try:
        return source.get_submodule(path)
    except AttributeError:
        raise InputRefusedError(f"the source has no module {path}; name the checkpoint this one came from") from None


def _matrix(layer: nn.Module) -> torch.Tensor:
    """Returns the float64 matrix of a linear layer of any kind."""
    if isinstance(layer, nn.Linear):
        return layer.weight.detach().double()
    if isinstance(layer, (PifaLinear, PifaColumnLinear, LowRankLinear)):
        left, right = low_rank_pair(layer)
        return left @ right
    raise InputRefusedError(f"the source has {type(layer).__name__} where a linear layer was factorised")


def _layer(path: str, layer: FactorisedLinear, origin: nn.Module, *, order: torch.Tensor | None) -> SourceLayer:
    mine, theirs = _matrix(layer), _matrix(origin)
    if mine.shape != theirs.shape:
        raise InputRefusedError(f"{path} is {list(mine.shape)}, in the source {list(theirs.shape)}; name its source")
    if order is not None:
        theirs = theirs[:, order] if isinstance(layer, PifaColumnLinear) else theirs[order]
    error = mine - theirs
    size = float(error.norm())
    bound = None
    if not isinstance(origin, nn.Linear) and isinstance(layer, (PifaLinear, PifaColumnLinear)):
        bound = storing_bound(layer)
    return SourceLayer(
        module=path,
        relative_error=size / (float(theirs.norm()) or 1.0),
        max_error=float(error.abs().max()),
        bound_ratio=None if bound is None else size / bound if bound else float(size > 0),
    )


def _orders(model: nn.Module, source: nn.Module) -> dict[str, torch.Tensor]:
    """Returns path -> feature of the source that each feature here is, for renumbered MLPs."""
    found = {}
    for group in hidden_features(model):
        paths = group.paths()
        if not isinstance(model.get_submodule(paths[-1]), PifaColumnLinear):
            continue
        mine, theirs = (
            torch.cat(
                [_matrix(_linear(side, path)) for path in paths[:-1]] + [_matrix(_linear(side, paths[-1])).T], dim=1
            ).float()
            for side in (model, source)
        )
        if mine.shape != theirs.shape:
            continue
        # |a - b|^2 without |a|^2, which is the same for all b.
        distances = theirs.square().sum(1) - 2 * mine @ theirs.T
        order = distances.argmin(1)
        if len(set(order.tolist())) < len(order):
            # Strong compression moves some rows nearer to others' places: the cheapest numbering of all of them.
            order = torch.from_numpy(linear_sum_assignment(distances.numpy())[1])
        found.update(dict.fromkeys(paths, order))
    return found


def _others(model: nn.Module, source: nn.Module, orders: dict[str, torch.Tensor]) -> tuple[int, list[str]]:
    """Compares what is not factorised, bit for bit."""
    layers = factorised_modules(model)
    mine = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    theirs, unchanged, changed = source.state_dict(), 0, []
    for name, tensor in mine.items():
        if name not in theirs:
            changed.append(f"{name}: not in the source")
            continue
        path, origin = name.rpartition(".")[0], theirs[name].to(tensor.dtype)
        if path in orders and not isinstance(layers[path], PifaColumnLinear):
            origin = origin[orders[path]]
        if origin.shape != tensor.shape or not torch.equal(origin, tensor):
            changed.append(f"{name}: not what the source has")
        else:
            unchanged += 1
    return unchanged, changed
