"""Second moments of what flows into linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    moments: dict[str, torch.Tensor] = {}
    sharing: dict[str, str] = {}
    last: list[Any] = [None, ""]

    def hook(name: str) -> Any:
        def collect(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0]
            if x is last[0]:
                sharing[name] = last[1]
                return
            last[:] = [x, name]
            rows = x.detach().flatten(0, -2).float()
            moment = (rows.T @ rows).double()
            moments[name] = moments[name] + moment if name in moments else moment

        return collect

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            batches = torch.split(windows, batch_size)
            for batch in tqdm(batches, desc="calibration", unit="batch", disable=None, leave=False):
                model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)
                last[:] = [None, ""]
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        owner = sharing.get(name, name)
        if owner not in moments:
            raise StageFailedError(f"{name} was never called in calibration; leave it out")
        if not bool(torch.isfinite(moments[owner]).all()):
            raise StageFailedError(f"{name} saw NaN or Inf activations in calibration; check the model")
    return {name: moments[sharing.get(name, name)] for name in layers}
