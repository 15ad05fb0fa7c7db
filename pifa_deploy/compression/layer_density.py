"""The density that a decoder layer deserves, from a score of its activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

_OWL_LEAST = 0.1
_EFFECTIVE_RANGE = (0.5, 1.5)
_Key = TypeVar("_Key", int, str)


def owl_densities(
    scores: Mapping[int, float], sizes: Mapping[int, int], *, density: float, spread: float
) -> dict[int, float]:
    """Returns layer -> d_l = clip(c + 2 lambda (s_l - min s) / (max s - min s), density / 10, 1).

    OWL (arXiv 2310.05175, section 3.2): sparsities in an interval of width 2 lambda around the overall one, the
    higher the score the lower. As in its published code the whole interval is shifted to meet the mean, so that it
    need not be centred; here c makes the mean over parameters right where that code takes the mean over layers.

    Args:
        scores: layer -> finite score.
        sizes: layer -> dense numbers of its linears; only these layers are read.
        density: the mean over parameters to meet.
        spread: lambda.
    """
    low, high = (extreme(scores[layer] for layer in sizes) for extreme in (min, max))
    lifts = {layer: 2.0 * spread * (scores[layer] - low) / (high - low or 1.0) for layer in sizes}

    def at(c: float) -> dict[int, float]:
        return {layer: min(1.0, max(_OWL_LEAST * density, c + lift)) for layer, lift in lifts.items()}

    return at(largest(lambda c: spent(at(c), sizes), density * sum(sizes.values()), (-2.0, 1.0)))


def effective_rank_densities(
    scores: Mapping[int, float], sizes: Mapping[int, int], *, density: float
) -> dict[int, float]:
    """Returns layer -> d_l = clip(c s_l, density / 2, min(1, 1.5 density)), the mean over parameters being `density`.

    A matrix of effective rank e (Roy and Vetterli, EUSIPCO 2007) needs a rank in proportion to e, so densities are
    proportional to scores; the clipping keeps an estimate from starving a layer.

    Args:
        scores: layer -> positive score.
        sizes: layer -> dense numbers of its linears; only these layers are read.
        density: the mean over parameters to meet.
    """
    least, most = (min(1.0, share * density) for share in _EFFECTIVE_RANGE)

    def at(c: float) -> dict[int, float]:
        return {layer: min(most, max(least, c * scores[layer])) for layer in sizes}

    bracket = (0.0, most / min(scores[layer] for layer in sizes))
    return at(largest(lambda c: spent(at(c), sizes), density * sum(sizes.values()), bracket))


def outlier_ratio(weight: torch.Tensor, moment_diagonal: torch.Tensor, *, multiple: float = 5.0) -> float:
    """Returns the share of outliers in one linear; see pooled_outlier_ratio."""
    return pooled_outlier_ratio([(weight, moment_diagonal)], multiple=multiple)


def pooled_outlier_ratio(linears: Sequence[tuple[torch.Tensor, torch.Tensor]], *, multiple: float = 5.0) -> float:
    """Returns the share of entries with |W_ij| ||x_j||_2 above `multiple` times the mean over all the linears.

    The layer-wise outlier distribution of OWL (arXiv 2310.05175, section 3.2), with mean and count over all
    linears of a decoder layer together as in its published code. The mean is exact in closed form, so that scores
    are formed only to be counted, a block of rows at a time, in float64.

    Args:
        linears: (W [m, n], diagonal [n] of the inputs' X X^T) of each linear of a layer, over the same tokens.
        multiple: M.

    Raises:
        ValueError: a diagonal that does not fit, or an entry that is negative, NaN or Inf.
    """
    norms = []
    for weight, diagonal in linears:
        if diagonal.shape != weight.shape[1:] or not bool((torch.isfinite(diagonal) & (diagonal >= 0)).all()):
            raise ValueError(
                f"the moment diagonal of a {tuple(weight.shape)} weight is {tuple(diagonal.shape)}, with entries down "
                f"to {float(diagonal.min())}; expected one finite number >= 0 for each of its inputs"
            )
        norms.append(diagonal.double().sqrt())
    total = sum(
        float(weight.abs().sum(0, dtype=torch.float64) @ norm) for (weight, _), norm in zip(linears, norms, strict=True)
    )
    entries = sum(weight.numel() for weight, _ in linears)
    limit = multiple * total / entries
    above = sum(
        int(torch.count_nonzero(rows.double().abs() * norm > limit))
        for (weight, _), norm in zip(linears, norms, strict=True)
        for rows in torch.split(weight, 1024)
    )
    return above / entries


def effective_rank(weight: torch.Tensor, moment: torch.Tensor) -> float:
    """Returns exp(-sum p log p), p = sigma / sum(sigma), of the singular values sigma of W S with S S^T = moment.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007. sigma^2 are the eigenvalues of W moment W^T, for m > n of
    T moment T^T with W = Q T. It lies between 1 and min(m, n), and is 0 where W S is. To compare linears of
    different shapes, divide it by min(m, n).

    Args:
        weight: W [m, n].
        moment: X X^T [n, n] summed over calibration tokens.

    Raises:
        ValueError: NaN or Inf entries.
    """
    matrix, inputs = weight.double(), moment.double()
    core = torch.linalg.qr(matrix, mode="r").R if matrix.shape[0] > matrix.shape[1] else matrix
    product = core @ inputs @ core.T
    if not bool(torch.isfinite(product).all()):
        raise ValueError("W moment W^T has NaN or Inf entries; expected a finite weight and moment")
    squares = torch.linalg.eigvalsh((product + product.T) / 2)
    # Eigenvalues below this are rounding, and their square roots would not be small.
    floor = float(squares[-1]) * len(squares) * torch.finfo(torch.float64).eps
    sigma = squares[squares > max(floor, 0.0)].sqrt()
    if not len(sigma):
        return 0.0
    share = sigma / sigma.sum()
    return math.exp(-float((share * share.log()).sum()))


def spent(shares: Mapping[_Key, float], sizes: Mapping[_Key, int]) -> float:
    """Returns the sum of sizes times shares."""
    return math.fsum(size * shares[key] for key, size in sizes.items())


def largest(cost: Callable[[float], float], budget: float, bracket: tuple[float, float]) -> float:
    """Returns the largest c of the bracket with cost(c) <= budget, for a cost that never falls."""
    low, high = bracket
    if cost(high) <= budget:
        return high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low
