"""How good a language model is on a text."""

from __future__ import annotations

import math

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from pifa_deploy.calibration import check_vocabulary


def perplexity(model: PreTrainedModel, windows: torch.Tensor, *, batch_size: int = 4) -> float:
    """Returns exp(mean negative log-likelihood) of every token but each window's first.

    Args:
        model: causal LM in eval mode.
        windows: int64 [windows, sequence_length].
        batch_size: windows a forward pass.

    Raises:
        InputRefusedError: a token that the model does not know.
    """
    check_vocabulary(windows, model.get_input_embeddings().num_embeddings)
    total, count = 0.0, 0
    batches = torch.split(windows, batch_size)
    with torch.no_grad():
        for batch in tqdm(batches, desc="perplexity", unit="batch", disable=None, leave=False):
            logits = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1].float()
            targets = batch[:, 1:].to(model.device)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            total += float(loss)
            count += targets.numel()
    return math.exp(total / count)
