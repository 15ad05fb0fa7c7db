"""Pivot factors of a low-rank matrix: r of its own rows and the coefficients that give all the others.

Source: Pivoting Factorization, arXiv 2501.19090, section 3. A matrix W [m, n] of rank r is stored as
W_p = W[pivot_rows] [r, n] and C [m - r, r] with W[other rows] = C @ W_p: r (m + n) - r^2 numbers
(the paper's count, without the r integers of the pivot rows) where U [m, r], V [r, n] need r (m + n).

The pivot rows come from a QR factorisation with column pivoting of W^T. Pivoting sees only inner
products of rows, so W may be replaced by any W @ Q whose columns of Q span the row space orthonormally:
this is how (U, V) is pivoted in O(m r^2) without forming U @ V.
"""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass

import torch

from pifa_deploy.conditioning import Conditioning, checked_largest, relative_error
from pifa_deploy.refit import refitted_coefficients

_OVERSAMPLING = 16
# What sums over thousands of float64 terms leave behind; rounding to a narrower dtype hides it.
_ARITHMETIC_ERROR = 1e-12


class RankRoundingWarning(UserWarning):
    """The factors have another rank than was asked for, because of a rank multiple."""


class LossyFactorizationWarning(UserWarning):
    """The matrix has a higher numerical rank than the factors, so they only approximate it."""


@dataclass(frozen=True, kw_only=True)
class PivotFactors:
    """The stored form of one matrix W [m, n].

    Attributes:
        pivot_weight: W_p [r, n], any float dtype.
        coefficients: C [m - r, r], dtype of `pivot_weight`; its rows belong to the non-pivot rows in
            ascending order.
        pivot_rows: int32 [r], strictly ascending; row i of W_p is row pivot_rows[i] of W.
        conditioning: figures about the factors as stored.
    """

    pivot_weight: torch.Tensor
    coefficients: torch.Tensor
    pivot_rows: torch.Tensor
    conditioning: Conditioning

    @property
    def rank(self) -> int:
        """Number of pivot rows r."""
        return self.pivot_weight.shape[0]

    def dense(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Returns W [m, n] rebuilt from the stored factors, computed in `dtype`."""
        pivot_weight = self.pivot_weight.to(dtype)
        rest = self.coefficients.to(dtype) @ pivot_weight
        return torch.cat([pivot_weight, rest])[output_index(self.pivot_rows, len(pivot_weight) + len(rest)).long()]


def output_index(pivot_rows: torch.Tensor, out_features: int) -> torch.Tensor:
    """Returns the int32 index [m] with y[..., j] = concat(y_p, y_np)[..., index[j]].

    Args:
        pivot_rows: int [r], strictly ascending, within 0 .. out_features - 1.
        out_features: m.
    """
    rank = len(pivot_rows)
    rows = pivot_rows.to("cpu", torch.int64)
    is_other = torch.ones(out_features, dtype=torch.bool)
    is_other[rows] = False
    index = torch.empty(out_features, dtype=torch.int32)
    index[rows] = torch.arange(rank, dtype=torch.int32)
    index[is_other] = torch.arange(rank, out_features, dtype=torch.int32)
    return index


def factors_from_weight(
    weight: torch.Tensor, rank: int, *, dtype: torch.dtype | None = None, rank_multiple: int = 1
) -> PivotFactors:
    """Factorises a matrix of numerical rank at most `rank`.

    Args:
        weight: W [m, n], float, any device; not changed.
        rank: 1 <= rank <= min(m, n).
        dtype: dtype of the stored factors; that of `weight` when None.
        rank_multiple: raise `rank` to a multiple of this, never above min(m, n).

    Returns:
        Factors on the CPU. Computation is in float64.

    Raises:
        ValueError: not a matrix, not floating point, NaN or Inf, or `rank` out of range.
        FactorizationError: some |C| exceeds `MAX_COEFFICIENT`.

    Warns:
        RankRoundingWarning: `rank_multiple` changed the rank.
        LossyFactorizationWarning: `weight` is not of that rank; `conditioning.relative_error` says by how much.
        ConditioningWarning: some |C| exceeds `WARN_COEFFICIENT`.
    """
    stored = dtype or weight.dtype
    matrix = _checked_matrix(weight, "weight")
    rank = rounded_rank(rank, rank_multiple, matrix.shape)
    sketch = _row_space(matrix, rank)
    pivots, others = _pivot(matrix if sketch is None else matrix @ sketch, rank)
    pivot_weight = matrix[pivots].to(stored)
    span = torch.eye(matrix.shape[1], dtype=torch.float64) if sketch is None else sketch
    left = matrix[others] if sketch is None else matrix[others] @ sketch
    coefficients = refitted_coefficients(pivot_weight, left, span.T)
    factors = assembled_factors(pivot_weight, coefficients.to(stored), pivots.int(), matrix)
    # A matrix that was itself rounded to its dtype is only that close to low rank.
    if _is_lossy(factors.conditioning, max(torch.finfo(weight.dtype).eps, torch.finfo(stored).eps)):
        warnings.warn(
            f"a {matrix.shape[0]} x {matrix.shape[1]} weight is not of rank {rank}: its factors are off by "
            f"{factors.conditioning.relative_error:.2e} (relative Frobenius); truncate it with an SVD first",
            LossyFactorizationWarning,
            stacklevel=2,
        )
    return factors


def factors_from_low_rank(
    u: torch.Tensor,
    v: torch.Tensor,
    rank: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    rank_multiple: int = 1,
    root: torch.Tensor | None = None,
) -> PivotFactors:
    """Factorises U @ V at cost O((m + n) k^2); of the product only the r pivot rows are formed.

    Args:
        u: U [m, k], float.
        v: V [k, n], float.
        rank: rank of the factors; min(k, m, n) when None. A smaller rank approximates and warns.
        dtype: dtype of the stored factors; that of `u` when None.
        rank_multiple: raise `rank` to a multiple of this, never above min(m, n).
        root: L [n, n] float64 with L L^T the second moments of the inputs, for which the coefficients are then best
            (see `refit`); costs O(n^2 k).

    Raises:
        ValueError: shapes that do not fit, not floating point, NaN or Inf, or `rank` out of range.
        FactorizationError: some |C| exceeds `MAX_COEFFICIENT`.
    """
    stored = dtype or u.dtype
    left, right = _checked_matrix(u, "u"), _checked_matrix(v, "v")
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"u is {tuple(u.shape)} and v is {tuple(v.shape)}; expected [m, k] and [k, n]")
    shape = torch.Size((left.shape[0], right.shape[1]))
    inner = min(left.shape[1], *shape)
    rank = rounded_rank(inner if rank is None else rank, rank_multiple, shape)
    # V^T = Q T with orthonormal Q, so U V = (U T^T) Q^T and pivoting U T^T chooses as pivoting U V does.
    basis, triangle = torch.linalg.qr(right.T)
    reduced = left @ triangle.T
    pivots, others = _pivot(reduced, rank)
    pivot_weight = (left[pivots] @ right).to(stored)
    coefficients = refitted_coefficients(pivot_weight, left[others], right, root=root)
    factors = assembled_factors(pivot_weight, coefficients.to(stored), pivots.int(), reduced, basis)
    if rank < inner and _is_lossy(factors.conditioning, torch.finfo(stored).eps):
        warnings.warn(
            f"rank {rank} is below the rank {inner} of (u, v): the factors are off by "
            f"{factors.conditioning.relative_error:.2e} (relative Frobenius); truncate with an SVD first",
            LossyFactorizationWarning,
            stacklevel=2,
        )
    return factors


def rounded_rank(rank: int, multiple: int, shape: torch.Size) -> int:
    """Returns `rank` raised to a multiple of `multiple`, at most min(shape), and warns when that changes it.

    Raises:
        ValueError: `rank` is not within 1 .. min(shape) or `multiple` is below 1.
        TypeError: `rank` is not an integer.
    """
    limit = min(shape)
    rank = operator.index(rank)
    if not 1 <= rank <= limit:
        raise ValueError(f"rank is {rank}, expected 1 <= rank <= {limit} for a {shape[0]} x {shape[1]} matrix")
    if multiple < 1:
        raise ValueError(f"rank multiple is {multiple}, expected at least 1")
    rounded = min(-(-rank // multiple) * multiple, limit)
    if rounded != rank:
        warnings.warn(f"rank {rank} became {rounded}, multiple {multiple}", RankRoundingWarning, stacklevel=3)
    return rounded


def _is_lossy(conditioning: Conditioning, eps: float) -> bool:
    """Tells truncation from rounding, whose size is eps times the row norms of C."""
    return conditioning.relative_error > max(4 * eps * (1 + conditioning.rms_row_norm), _ARITHMETIC_ERROR)


def _checked_matrix(matrix: torch.Tensor, name: str) -> torch.Tensor:
    if matrix.ndim != 2 or 0 in matrix.shape or not matrix.is_floating_point():
        raise ValueError(f"{name} is {matrix.dtype} {tuple(matrix.shape)}, expected a non-empty floating-point matrix")
    finite = torch.isfinite(matrix)
    if not bool(finite.all()):
        row, column = (int(at) for at in (~finite).nonzero()[0])
        raise ValueError(
            f"{name} has NaN or Inf entries ({float(matrix[row, column])} at [{row}, {column}]); expected finite values"
        )
    return matrix.detach().to("cpu", torch.float64)


def _row_space(matrix: torch.Tensor, rank: int) -> torch.Tensor | None:
    """Returns orthonormal columns [n, k] that span the leading row space, or None where it would save nothing.

    A randomised range finder with one power iteration (Halko, Martinsson, Tropp, arXiv 0909.4061): exact
    for a matrix of rank <= k, and it spares LAPACK's pivoted QR, half of it level-2 BLAS, n - k columns.
    """
    columns = rank + _OVERSAMPLING
    if columns >= min(matrix.shape):
        return None
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[0], columns, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(matrix.T @ probe).Q
    space: torch.Tensor = torch.linalg.qr(matrix.T @ (matrix @ basis)).Q
    return space


def _pivot(reduced: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses pivot rows of W by any `reduced` [m, k] float64 with the row inner products of W.

    Returns:
        Pivot rows int64 [r] and the others int64 [m - r], both ascending.
    """
    from scipy.linalg import qr

    _, order = qr(reduced.numpy().T, mode="r", pivoting=True, check_finite=False)
    pivots, others = torch.from_numpy(order[:rank].copy()).long(), torch.from_numpy(order[rank:].copy()).long()
    return pivots.sort().values, others.sort().values


def assembled_factors(
    pivot_weight: torch.Tensor,
    coefficients: torch.Tensor,
    pivot_rows: torch.Tensor,
    truth: torch.Tensor,
    basis: torch.Tensor | None = None,
) -> PivotFactors:
    """Judges stored factors against W and returns them with their conditioning.

    Args:
        pivot_weight: W_p [r, n] as stored.
        coefficients: C [m - r, r] as stored.
        pivot_rows: int32 [r], ascending.
        truth: W [m, n]; with `basis` [m, k] such that W = truth @ basis.T.
        basis: [n, k] with orthonormal columns.

    Raises:
        FactorizationError: some |C| exceeds `MAX_COEFFICIENT`, or a factor overflowed its dtype.
    """
    largest = checked_largest(pivot_weight, coefficients)
    norms = coefficients.double().norm(dim=1) if coefficients.numel() else torch.zeros(1, dtype=torch.float64)
    return PivotFactors(
        pivot_weight=pivot_weight,
        coefficients=coefficients,
        pivot_rows=pivot_rows,
        conditioning=Conditioning(
            max_coefficient=largest,
            max_row_norm=float(norms.max()),
            rms_row_norm=float(norms.square().mean().sqrt()),
            relative_error=relative_error(pivot_weight, coefficients, pivot_rows, truth, basis),
        ),
    )
