"""How well pivot factors keep their matrix, and when they are refused for it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch

from pifa_deploy.errors import FactorizationError

WARN_COEFFICIENT = 4.0
MAX_COEFFICIENT = 1e3


class ConditioningWarning(UserWarning):
    """Some coefficient is large: rounding errors of the pivot outputs are amplified by about that much."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """How well a factorisation keeps its matrix.

    Attributes:
        max_coefficient: largest |C| entry; 0 when C is empty.
        max_row_norm: largest Euclidean norm of a row of C.
        rms_row_norm: root mean square of those norms; the factor by which rounding noise of y_p grows.
        relative_error: ||W - W'||_F / ||W||_F with W' rebuilt in float64 from the factors as stored.
    """

    max_coefficient: float
    max_row_norm: float
    rms_row_norm: float
    relative_error: float


def checked_largest(pivot_weight: torch.Tensor, coefficients: torch.Tensor) -> float:
    """Returns max |C|, 0 when C is empty.

    Raises:
        FactorizationError: it exceeds `MAX_COEFFICIENT`, or W_p overflowed its dtype.

    Warns:
        ConditioningWarning: it exceeds `WARN_COEFFICIENT`.
    """
    shape = f"a {len(pivot_weight) + len(coefficients)} x {pivot_weight.shape[1]} matrix"
    if not bool(torch.isfinite(pivot_weight).all()):
        raise FactorizationError(f"the pivot rows of {shape} overflow {pivot_weight.dtype}; use a wider dtype")
    largest = float(coefficients.abs().max()) if coefficients.numel() else 0.0
    # `not <=` also catches NaN.
    if not largest <= MAX_COEFFICIENT:
        raise FactorizationError(
            f"{shape} has no usable pivot factors in {pivot_weight.dtype}: max |C| is {largest:.3g}, expected at "
            f"most {MAX_COEFFICIENT:g}; use another rank or a wider dtype"
        )
    if largest > WARN_COEFFICIENT:
        warnings.warn(
            f"max |C| of {shape} is {largest:.3g}, above {WARN_COEFFICIENT:g}: expect larger rounding errors",
            ConditioningWarning,
            stacklevel=4,
        )
    return largest


def relative_error(
    pivot_weight: torch.Tensor,
    coefficients: torch.Tensor,
    pivot_rows: torch.Tensor,
    truth: torch.Tensor,
    basis: torch.Tensor | None,
) -> float:
    """Returns ||W - W'||_F / ||W||_F with W' rebuilt from the stored factors in float64.

    Args:
        pivot_weight: W_p [r, n] as stored.
        coefficients: C [m - r, r] as stored.
        pivot_rows: integers [r], ascending.
        truth: W [m, n]; with `basis` [m, k] such that W = truth @ basis.T.
        basis: [n, k] with orthonormal columns. With it the cost is O((m + n) r^2): W is not formed.
    """
    pivot_weight, coefficients, truth = pivot_weight.double(), coefficients.double(), truth.double()
    is_other = torch.ones(len(truth), dtype=torch.bool)
    is_other[pivot_rows.long()] = False
    # What rounding moved out of the row space is seen through its Gram matrix: [r, r], not [m, n].
    inside = pivot_weight if basis is None else pivot_weight @ basis
    miss = (truth[~is_other] - inside).square().sum() + (truth[is_other] - coefficients @ inside).square().sum()
    if basis is not None:
        outside = pivot_weight - inside @ basis.T
        gram = outside @ outside.T
        miss = miss + gram.trace() + ((coefficients @ gram) * coefficients).sum()
    scale = float(truth.square().sum())
    return math.sqrt(float(miss) / scale) if scale else math.sqrt(float(miss))
