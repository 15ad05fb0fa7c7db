"""The reconstruction M of MPIFA: low-rank factors that give the right outputs on the inputs they will see.

arXiv 2501.19090, section 5. W is the dense weight [m, n], X the inputs [n, tokens] of the layer in the compressed
model, X_o in the dense one. The outputs to meet are Y = W (a X_o + (1 - a) X) with a the dense share (the paper's
lambda): a = 1 corrects all error that earlier layers made, a = 0 none of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pifa_deploy.compression.statistics import InputMoments
from pifa_deploy.compression.truncation import whitened_svd

SOLVERS = ("closed", "alternating")
RIDGES = ("identity", "diagonal")


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions:
    """How M is found.

    Attributes:
        dense_share: lambda, the part of the targets that comes from the dense model's inputs, 0..1.
        ridge: alpha, weight of staying near the dense weight, relative to the input energy.
        ridge_shape: "diagonal" weighs each input by its energy, "identity" all alike by the mean (as the paper's
            alpha, which is absolute).
        solver: "closed" finds the best rank-r matrix; "alternating" is the paper's: from the whitened truncation,
            U for the V at hand, then V for that U.
        steps: rounds of "alternating".
    """

    dense_share: float = 0.25
    ridge: float = 0.1
    ridge_shape: str = "diagonal"
    solver: str = "closed"
    steps: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        if not 0.0 <= self.dense_share <= 1.0:
            raise ValueError(f"dense_share is {self.dense_share}, expected 0 <= dense_share <= 1")
        if not 0.0 < self.ridge < float("inf"):
            raise ValueError(f"ridge is {self.ridge}, expected a positive number")
        if self.ridge_shape not in RIDGES:
            raise ValueError(f"ridge_shape is {self.ridge_shape!r}, expected one of {RIDGES}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver is {self.solver!r}, expected one of {SOLVERS}")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")


class Reconstruction:
    """The least-squares problem shared by linears that read the same tensor.

    min over Z of rank r of ||Y - Z X||_F^2 + ||(W - Z) P^(1/2)||_F^2, with the ridge P = alpha diag. With
    A = X X^T + P and B = Y X^T + W P its solution without a rank is Z = B A^-1, and the best of rank r is
    Q_r Q_r^T B A^-1, Q_r the leading eigenvectors of B A^-1 B^T (reduced-rank regression: Izenman 1975; with a
    ridge: Mukherjee and Zhu 2011). Y X^T = W (a X_o X^T + (1 - a) X X^T) needs neither targets nor inputs.
    """

    def __init__(self, moments: InputMoments, options: ReconstructionOptions) -> None:
        """Prepares A and its Cholesky factor, float64 [n, n]."""
        self._options = options
        share = options.dense_share if moments.cross is not None else 0.0
        gram = moments.gram
        mixed = gram if moments.cross is None else share * moments.cross + (1.0 - share) * gram
        energy = gram.diagonal()
        scale = energy if options.ridge_shape == "diagonal" else energy.mean().expand_as(energy)
        # An input that was always zero has no energy of its own, and A must be positive definite.
        ridge = options.ridge * scale.clamp_min(1e-6 * float(energy.mean()))
        self._gram = gram
        self._damped = gram.clone()
        self._damped.diagonal().add_(ridge)
        self._target = mixed.clone()
        self._target.diagonal().add_(ridge)
        self._factor = torch.linalg.cholesky(self._damped)

    def solve(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns U [m, r], V [r, n] float64 for a weight [m, n]."""
        matrix = weight.double()
        best = torch.cholesky_solve((matrix @ self._target).T, self._factor).T
        if self._options.solver == "closed":
            return whitened_svd(best, self._damped, rank)
        u, v = whitened_svd(matrix, self._gram, rank)
        for _ in range(self._options.steps):
            # Only the spans count. Orthonormal bases keep a weight whose own rank is lower from being singular here.
            rows = torch.linalg.qr(v.T).Q
            damped = rows.T @ self._damped @ rows
            u = torch.linalg.qr(torch.linalg.solve(damped, rows.T @ (matrix @ self._target).T).T).Q
            v = u.T @ best
        return u, v
