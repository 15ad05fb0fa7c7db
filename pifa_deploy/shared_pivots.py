"""One set of pivots for several matrices whose rows are numbered alike.

The rows J carry a matrix with orthonormal columns U [m, k] through U_rest U_J^+, and the squared norms of these
coefficients sum to ||U_J^+||_F^2 - k. So the best set for several matrices minimises the sum of ||U_J^+||_F^2 over
them (A-optimal design). Rows are taken away from the full set, the cheapest first, which stays within
(m - k + 1) / (|J| - k + 1) of the full set's norm (Avron and Boutsidis, arXiv 1201.0127, for one matrix); then single
rows are exchanged while that pays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Of the rows still to take away, as many at once: what is cheapest hardly changes from one to the next.
_AT_ONCE = 0.05
_EXCHANGES = 200
_GAIN = 1e-3
# An exchange over a smaller determinant ratio would lose digits.
_LEAST_RATIO = 0.2


def shared_pivots(spaces: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """Returns `count` rows, int64 ascending, that carry all others of every matrix with small coefficients.

    Args:
        spaces: for each matrix [m, n_i] an orthonormal basis [m, k_i] float64 of its columns.
        count: at least the largest k_i, at most m.

    Raises:
        ValueError: `count` out of range.
    """
    rows, widest = spaces[0].shape[0], max(space.shape[1] for space in spaces)
    if not widest <= count <= rows:
        raise ValueError(f"count is {count}, expected {widest} <= count <= {rows}")
    kept = torch.arange(rows)
    while len(kept) > count:
        cost = torch.stack([removal_cost(space[kept]) for space in spaces]).sum(dim=0)
        number = max(1, int(_AT_ONCE * (len(kept) - count)))
        mask = torch.ones(len(kept), dtype=torch.bool)
        mask[torch.argsort(cost)[:number]] = False
        kept = kept[mask]
    # An exchange formula needs square systems.
    if all(space.shape[1] == count for space in spaces):
        kept = _exchanged(spaces, kept)
    ascending: torch.Tensor = kept.sort().values
    return ascending


def removal_cost(rows: torch.Tensor) -> torch.Tensor:
    """Returns by how much ||rows^+||_F^2 grows when a row is taken away, for each row."""
    solved = torch.linalg.solve(rows.T @ rows, rows.T).T
    leverage = (solved * rows).sum(dim=1)
    growth: torch.Tensor = solved.square().sum(dim=1) / (1.0 - leverage).clamp_min(1e-12)
    return growth


def _exchanged(spaces: Sequence[torch.Tensor], kept: torch.Tensor) -> torch.Tensor:
    """Exchanges single rows while the best exchange lowers the sum of norms by more than `_GAIN` of it."""
    kept = kept.clone()
    for _ in range(_EXCHANGES):
        is_other = torch.ones(spaces[0].shape[0], dtype=torch.bool)
        is_other[kept] = False
        others = is_other.nonzero()[:, 0]
        change, norm = torch.zeros(len(others), len(kept), dtype=torch.float64), 0.0
        for space in spaces:
            inverse = torch.linalg.inv(space[kept])
            change += _exchange_cost(space[others] @ inverse, inverse)
            norm += float(inverse.square().sum())
        best = int(change.argmin())
        if float(change.flatten()[best]) > -_GAIN * norm:
            break
        kept[best % len(kept)] = others[best // len(kept)]
    return kept


def _exchange_cost(coefficients: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Returns the change of ||U_J^-1||_F^2 when pivot i is replaced by other row j, at [j, i] (Sherman-Morrison)."""
    gram = inverse.T @ inverse
    own = gram.diagonal()
    ratio = torch.where(coefficients.abs() < _LEAST_RATIO, torch.nan, coefficients)
    length = coefficients.square().sum(dim=1, keepdim=True) - 2 * coefficients + 1
    change = own * length / ratio.square() - 2 * (coefficients @ gram - own) / ratio
    return torch.nan_to_num(change, nan=torch.inf)
