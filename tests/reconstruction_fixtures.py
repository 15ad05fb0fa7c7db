"""The problem of the reconstruction with its inputs written out, and its optimum by another way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pifa_deploy.compression.reconstruction import Reconstruction, ReconstructionOptions
from pifa_deploy.compression.statistics import InputMoments


@dataclass
class Problem:
    """W [m, n], the inputs X [n, tokens] of the compressed model and X_o of the dense one."""

    weight: np.ndarray
    x: np.ndarray
    x_dense: np.ndarray

    @property
    def moments(self) -> InputMoments:
        found = InputMoments(len(self.x), torch.device("cpu"), cross=True)
        found.gram = torch.from_numpy(self.x @ self.x.T)
        found.cross = torch.from_numpy(self.x_dense @ self.x.T)
        return found

    def rows(self, options: ReconstructionOptions) -> tuple[np.ndarray, np.ndarray]:
        """Returns inputs and targets of a least-squares problem without a ridge: its root stands as more tokens."""
        energy = np.square(self.x).sum(1)
        spread = energy if options.ridge_shape == "diagonal" else np.full(len(energy), energy.mean())
        root = np.diag(np.sqrt(options.ridge * spread))
        mixed = options.dense_share * self.x_dense + (1 - options.dense_share) * self.x
        return np.hstack([self.x, root]), np.hstack([self.weight @ mixed, self.weight @ root])

    def objective(self, found: np.ndarray, options: ReconstructionOptions) -> float:
        x, y = self.rows(options)
        return float(np.square(y - found @ x).sum())

    def optimum(self, rank: int, options: ReconstructionOptions) -> np.ndarray:
        """Returns the best matrix of a rank: the least-squares solution, projected where its outputs are largest."""
        x, y = self.rows(options)
        free = np.linalg.lstsq(x.T, y.T, rcond=None)[0].T
        leading = np.linalg.svd(free @ x, full_matrices=False)[0][:, :rank]
        return np.asarray(leading @ leading.T @ free)

    def solved(self, rank: int, options: ReconstructionOptions) -> np.ndarray:
        u, v = Reconstruction(self.moments, options).solve(torch.from_numpy(self.weight), rank)
        assert u.shape == (len(self.weight), rank)
        assert v.shape == (rank, len(self.x))
        return np.asarray((u @ v).numpy())

    def scale(self, options: ReconstructionOptions) -> float:
        return float(np.square(self.rows(options)[1]).sum())
