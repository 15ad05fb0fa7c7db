"""Second moments of what flows into linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from pifa_deploy.calibration import check_vocabulary
from pifa_deploy.errors import StageFailedError


def input_moments(
    model: PreTrainedModel, layers: Mapping[str, nn.Linear], windows: torch.Tensor, *, batch_size: int = 4
) -> dict[str, torch.Tensor]:
    """Returns X^T X of each layer's inputs over all tokens, float64 [n, n].

    Layers that are called with the same tensor (q, k, v; gate, up) share one matrix.

    Args:
        model: causal LM in eval mode.
        layers: module path -> module of `model`.
        windows: int64 [samples, sequence_length].
        batch_size: windows a forward pass.

    Raises:
        InputRefusedError: a token that the model does not know.
        StageFailedError: a layer saw NaN or Inf, or was never called.
    """
    check_vocabulary(windows, model.get_input_embeddings().num_embeddings)
    collector = _Collector()
    handles = [layer.register_forward_pre_hook(collector.hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            batches = torch.split(windows, batch_size)
            for batch in tqdm(batches, desc="calibration", unit="batch", disable=None, leave=False):
                model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)
                collector.forget_last()
    finally:
        for handle in handles:
            handle.remove()
    return {name: collector.moment(name) for name in layers}


class _Collector:
    """Sums X^T X per layer; a layer called with the very tensor of the one before it shares that one's sum."""

    def __init__(self) -> None:
        self._moments: dict[str, torch.Tensor] = {}
        self._owners: dict[str, str] = {}
        self._last: torch.Tensor | None = None
        self._last_owner = ""

    def hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def collect(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if inputs[0] is self._last:
                self._owners[name] = self._last_owner
                return
            self._last, self._last_owner = inputs[0], name
            rows = inputs[0].detach().flatten(0, -2).float()
            moment = (rows.T @ rows).double()
            self._moments[name] = self._moments[name] + moment if name in self._moments else moment

        return collect

    def forget_last(self) -> None:
        """Lets go of the last input, whose identity means nothing beyond one forward pass."""
        self._last = None

    def moment(self, name: str) -> torch.Tensor:
        found = self._moments.get(self._owners.get(name, name))
        if found is None:
            raise StageFailedError(f"{name} was never called in calibration; leave it out")
        if not bool(torch.isfinite(found).all()):
            raise StageFailedError(f"{name} saw NaN or Inf activations in calibration; check the model")
        return found
