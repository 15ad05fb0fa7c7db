"""Coefficients that allow for rounding: the ones that fit the pivots as stored and do not amplify their noise."""

from __future__ import annotations

import math

import torch


def refitted_coefficients(
    pivot_weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, root: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns C that rebuilds the other rows from pivot rows which have been rounded.

    C minimises ||(left right - C W_p) L||^2 + sum_ij C_ij^2 sigma_j^2, with L L^T the second moments of the inputs
    and sigma_j^2 the noise that rounding y_p = W_p x and C itself to the stored dtype brings to the j-th term: each
    rounds to within a unit u of its size, evenly, so that sigma_j^2 = 2 u^2 / 3 ||(W_p L)_j||^2. Large entries then
    stand only where they buy accuracy. Solved by QR, without squaring the condition.

    Args:
        pivot_weight: W_p [r, n] in the dtype that is stored.
        left: [m - r, k] float64; with `right` the exact other rows.
        right: [k, n] float64.
        root: L [n, n] float64, of full rank: what the inputs never showed counts too; the identity when None.

    Returns:
        C [m - r, r] float64.
    """
    unit = torch.finfo(pivot_weight.dtype).eps / 2
    pivots = pivot_weight.double()
    seen = pivots if root is None else pivots @ root
    target = right if root is None else right @ root
    norms = seen.norm(dim=1)
    # A pivot beyond the numerical rank is rounding error of float64: it must not be built upon.
    empty = norms <= torch.finfo(torch.float64).eps * max(seen.shape) * norms.max()
    noise = torch.where(empty, norms.max().clamp_min(1.0), unit * math.sqrt(2 / 3) * norms)
    basis, triangle = torch.linalg.qr(torch.cat([seen.T, noise.diag()]))
    sides = (basis[: target.shape[1]].T @ target.T) @ left.T
    coefficients: torch.Tensor = torch.linalg.solve_triangular(triangle, sides, upper=True).T.contiguous()
    return coefficients
