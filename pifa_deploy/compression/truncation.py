"""The best rank-r product for a weight: plain, or on the inputs it will see."""

from __future__ import annotations

import torch

_RIDGE = 1e-10


def truncated_svd(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns U [m, r], V [r, n] float64 that minimise ||W - U V||_F."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def whitened_svd(weight: torch.Tensor, moment: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns U [m, r], V [r, n] float64 that minimise ||(W - U V) X||_F over inputs with X X^T = moment.

    With S S^T = moment, the truncated SVD of W S is Q_r Sigma_r R_r^T and U V = Q_r Sigma_r R_r^T S^-1
    = Q_r Q_r^T W (SVD-LLM, arXiv 2403.07378; PIFA, arXiv 2501.19090, section 4). Q_r are the leading
    eigenvectors of W moment W^T, so neither a Cholesky factor nor an inverse is formed. A ridge of 1e-10 of the
    mean input energy, above rounding and below everything else, lets the plain SVD decide about directions
    that no calibration token had.
    For m > n the eigenproblem is reduced to n x n by W = Q T.

    Args:
        weight: W [m, n].
        moment: X X^T [n, n] summed over calibration tokens.
        rank: 1 <= r <= min(m, n).
    """
    matrix = weight.double()
    basis = None
    core = matrix
    if matrix.shape[0] > matrix.shape[1]:
        basis, core = torch.linalg.qr(matrix)
    inputs = moment.double()
    ridge = _RIDGE * inputs.diagonal().mean() or 1.0
    product = core @ inputs @ core.T + ridge * (core @ core.T)
    vectors = torch.linalg.eigh((product + product.T) / 2).eigenvectors[:, -rank:]
    u = vectors if basis is None else basis @ vectors
    return u, u.T @ matrix
