"""Second moments of what flows into linear layers."""

from __future__ import annotations

import torch

from pifa_deploy.compression.distributed import Processes
from pifa_deploy.errors import StageFailedError

# As the reconstruction's ridge: without it, factors would be free wherever the calibration text never went.
_DAMPING = 0.1


def damped_root(gram: torch.Tensor) -> torch.Tensor:
    """Returns L [n, n] float64 on the CPU with L L^T = gram + 0.1 diag(gram), and every input counting a little."""
    energy = gram.diagonal()
    damped = gram.clone()
    damped.diagonal().add_(_DAMPING * energy.clamp_min(1e-6 * float(energy.mean())))
    root: torch.Tensor = torch.linalg.cholesky(damped)
    return root.cpu()


class InputMoments:
    """Sums over calibration tokens: X X^T of the inputs, and X_o X^T with the dense model's inputs X_o.

    Products are float32 a batch and summed in float64. Y X^T of any target Y = W (a X_o + b X) follows from the
    two, so neither targets nor weights are needed here.

    Attributes:
        gram: X X^T, float64 [n, n].
        cross: X_o X^T, float64 [n, n], or None.
    """

    def __init__(self, features: int, device: torch.device, *, cross: bool) -> None:
        """Starts at zero."""
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.gram) if cross else None

    def add(self, inputs: torch.Tensor, dense_inputs: torch.Tensor | None = None) -> None:
        """Adds float32 inputs [..., n], and those of the dense model for the same tokens."""
        rows = inputs.flatten(0, -2)
        self.gram += rows.T @ rows
        if self.cross is not None:
            assert dense_inputs is not None
            self.cross += dense_inputs.flatten(0, -2).T @ rows

    def reduce(self, group: Processes, where: str) -> None:
        """Sums over processes and checks the result; `where` names the linear in the error.

        Raises:
            StageFailedError: NaN or Inf among the inputs, or nothing but zeros.
        """
        for moment in (self.gram, self.cross):
            if moment is not None and not bool(torch.isfinite(group.sum(moment)).all()):
                raise StageFailedError(f"{where} saw NaN or Inf activations in calibration; check the model")
        if not bool(self.gram.diagonal().any()):
            raise StageFailedError(
                f"{where} saw only zeros in calibration, its statistics are singular; leave it out with --exclude"
            )
