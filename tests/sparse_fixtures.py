"""A small 2:4-pruned model and its folder, made without the code that prunes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cli_fixtures import small_model, small_tokenizer
from torch import nn

from pifa_deploy.sparse_checkpoint import SparseModule, SparsityRecord, write_sparsity

UP_PROJ = "model.layers.1.mlp.up_proj"
# down_proj has 84 inputs: its packed rows end in the middle of a byte.
INTERMEDIATE = 84


def prune(model: Any) -> dict[str, torch.Tensor]:
    """Zeroes two weights of each four in the decoder layers in place; returns module -> mask."""
    masks = {}
    generator = torch.Generator().manual_seed(8)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            m, n = module.weight.shape
            kept = torch.rand(m, n // 4, 4, generator=generator).topk(2, dim=-1).indices
            masks[name] = torch.zeros(m, n // 4, 4, dtype=torch.bool).scatter_(2, kept, True).reshape(m, n)
            module.weight.data[~masks[name]] = 0
    return masks


def record_of(masks: dict[str, torch.Tensor], **changes: Any) -> SparsityRecord:
    modules = {
        name: SparseModule(out_features=mask.shape[0], in_features=mask.shape[1]) for name, mask in masks.items()
    }
    return SparsityRecord(**{"modules": modules, "method": "wanda", "details": {"samples": 8}, **changes})


def save_sparse(
    folder: Path, model: Any = None, *, max_shard_size: str = "1GB", dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Writes a 2:4-pruned model folder with a tokenizer; returns module -> mask."""
    model = small_model(intermediate_size=INTERMEDIATE) if model is None else model
    masks = prune(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    small_tokenizer().save_pretrained(folder)
    write_sparsity(folder, record_of(masks), masks)
    return masks
