"""Rank and density of a factorised matrix: how much a rank costs, and what rank a budget allows."""

from __future__ import annotations

import math


def parameter_count(out_features: int, in_features: int, rank: int) -> int:
    """Returns r (m + n) - r^2, the numbers that PIFA stores."""
    return rank * (out_features + in_features) - rank * rank


def density_for_rank(out_features: int, in_features: int, rank: int) -> float:
    """Returns the numbers in PIFA factors of this rank relative to those of the dense matrix."""
    return parameter_count(out_features, in_features, rank) / (out_features * in_features)


def rank_for_density(out_features: int, in_features: int, density: float, *, multiple: int = 1) -> int:
    """Returns the largest rank whose PIFA factors and pivot rows take at most `density` of the dense size.

    The paper's formula (Eq. 6): it budgets one number for each pivot row index too, which `density_for_rank`
    does not count, so that rank_for_density(density_for_rank(r)) can be r - 1.

    Args:
        out_features: m.
        in_features: n.
        density: 0 < density <= 1.
        multiple: round the rank down to a multiple of this, within the budget (1: no rounding).

    Raises:
        ValueError: `density` or `multiple` out of range, or not even the smallest rank fits.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is {density}, expected 0 < density <= 1")
    # The r pivot row indices are the + 1.
    total = out_features + in_features + 1
    discriminant = total * total - 4 * math.floor(density * out_features * in_features)
    # floor((total - sqrt(discriminant)) / 2) in integers: a float square root is off by one near squares.
    root = math.isqrt(discriminant - 1) + 1
    rank = (total - root) // 2
    return _whole_multiple(min(rank, out_features, in_features), multiple, out_features, in_features, density)


def low_rank_rank_for_density(out_features: int, in_features: int, density: float, *, multiple: int = 1) -> int:
    """Returns the largest rank whose U [m, r], V [r, n] take at most `density` of the dense size."""
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density is {density}, expected 0 < density <= 1")
    rank = math.floor(density * out_features * in_features) // (out_features + in_features)
    return _whole_multiple(min(rank, out_features, in_features), multiple, out_features, in_features, density)


def _whole_multiple(rank: int, multiple: int, out_features: int, in_features: int, density: float) -> int:
    if multiple < 1:
        raise ValueError(f"rank multiple is {multiple}, expected at least 1")
    rounded = rank // multiple * multiple
    if rounded < 1:
        raise ValueError(
            f"density {density} of a {out_features} x {in_features} matrix allows rank {rank}, which holds no "
            f"positive multiple of {multiple}; raise the density or lower the rank multiple"
        )
    return rounded
