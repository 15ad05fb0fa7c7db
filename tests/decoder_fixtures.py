"""Tiny decoders whose logits spread as a trained model's do, their factorised twins, and folders of them.

The factors are drawn, and the dense weights are multiplied out of them in float64: what is exported
is held against a dense model that shares no code with it.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from conftest import projections
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config

from pifa_deploy.decoder_step import Step
from pifa_deploy.linear import LowRankLinear, PifaLinear
from pifa_deploy.onnx_export import ExportOptions, ExportSummary, export_checkpoint
from pifa_deploy.transformers_quantizer import attach

FAMILIES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}
SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LOGIT_STD = 3.0
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LETTERS = [chr(code) for code in range(33, 33 + SIZES["vocab_size"] - 1)]

# name, out_features -> (rank, pivot rows)
Layout = Callable[[str, int, int], tuple[int, Iterable[int]]]


def scattered(name: str, m: int, n: int) -> tuple[int, Iterable[int]]:
    """About half of the dense size; every layer has pivots of its own, none the first rows."""
    rank = min(m, n) * 5 // 16 + len(name) % 3
    rows = torch.randperm(m - 1, generator=torch.Generator().manual_seed(len(name) + m))[:rank] + 1
    return rank, sorted(rows.tolist())


def first_rows(name: str, m: int, n: int) -> tuple[int, Iterable[int]]:
    rank, _ = scattered(name, m, n)
    return rank, range(rank)


def mixed(name: str, m: int, n: int) -> tuple[int, Iterable[int]]:
    """First rows, scattered rows, a rank of 1, and every row a pivot so that no coefficient is left."""
    if "k_proj" in name:
        return min(m, n), range(min(m, n))
    if "v_proj" in name:
        return 1, [m - 1]
    return first_rows(name, m, n) if "gate" in name or "o_proj" in name else scattered(name, m, n)


def dense_decoder(kind: str = "llama", *, seed: int = 3, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A dense model: every linear keeps the scale of its input, logits have a standard deviation of about 3."""
    config = FAMILIES[kind](**(SIZES | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.5)
            elif name.endswith("norm.weight"):
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif "embed" in name or "lm_head" in name:
                nn.init.normal_(parameter, std=LOGIT_STD / config.hidden_size**0.5)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.to(dtype).eval()


def factorised_decoder(model: Any, layout: Layout = scattered, *, form: str = "pifa", seed: int = 5) -> tuple[Any, Any]:
    """Returns (factorised model in the dtype of `model`, float64 dense model of the same function)."""
    generator = torch.Generator().manual_seed(seed)
    exact = copy.deepcopy(model).double()
    for name in projections(model):
        dense = model.get_submodule(name)
        m, n = dense.weight.shape
        rank, pivots = layout(name, m, n)
        left = torch.randn(m - rank if form == "pifa" else m, rank, generator=generator, dtype=torch.float64)
        left, right = left * rank**-0.5, torch.randn(rank, n, generator=generator, dtype=torch.float64) * n**-0.5
        left, right = left.to(model.dtype), right.to(model.dtype)
        layer: Any
        if form == "pifa":
            layer = PifaLinear(n, m, rank, bias=dense.bias is not None).to(model.dtype)
            layer.pivot_weight.data, layer.coefficients.data = right, left
            layer.pivot_rows.copy_(torch.tensor(list(pivots)))
            layer.derive_output_index()
            weight = torch.empty(m, n, dtype=torch.float64)
            others = [row for row in range(m) if row not in set(pivots)]
            weight[list(pivots)], weight[others] = right.double(), left.double() @ right.double()
        else:
            layer = LowRankLinear.from_pair(left, right)
            weight = left.double() @ right.double()
        if dense.bias is not None:
            layer.bias = nn.Parameter(dense.bias.detach().clone())
        model.set_submodule(name, layer)
        exact.get_submodule(name).weight.data = weight
    attach(model, source="svd", density=0.5, details={})
    return model.eval(), exact.eval()


def save_decoder(model: Any, folder: Path) -> Path:
    """Writes the model with a tokenizer of one token a letter and a chat template."""
    model.save_pretrained(folder)
    vocabulary = {"?": 0} | {letter: i + 1 for i, letter in enumerate(LETTERS) if letter != "?"}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


def letters(count: int, seed: int = 0) -> str:
    """Random text of `count` tokens."""
    return "".join(np.random.default_rng(seed).choice(LETTERS, count))


def export(checkpoint: Path, target: Path, **options: Any) -> ExportSummary:
    return export_checkpoint(checkpoint, target, ExportOptions(**options))


def edited(folder: Path, target: Path, change: Callable[[ir.Model], None]) -> Path:
    """Copies an ONNX folder and changes the graph of the copy."""
    shutil.copytree(folder, target)
    model = ir.load(folder / "model.onnx")
    change(model)
    for name in ("model.onnx", "model.onnx.data"):
        (target / name).unlink()
    ir.save(model, target / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=1024)
    return target


def plain_step(ids: np.ndarray, past: int = 0) -> Step:
    """`ids` [batch, sequence] behind `past` cached tokens, without padding."""
    batch, count = ids.shape
    positions = np.tile(np.arange(past, past + count, dtype=np.int64), (batch, 1))
    return Step(input_ids=ids, attention_mask=np.ones((batch, past + count), dtype=np.int64), position_ids=positions)


def padded_step(rows: list[np.ndarray]) -> Step:
    """Rows of different lengths, padded on the left with token 0."""
    width = max(map(len, rows))
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=np.int64)
    ids = np.array([[0] * (width - len(row)) + list(row) for row in rows], dtype=np.int64)
    return Step(input_ids=ids, attention_mask=mask, position_ids=np.maximum(mask.cumsum(1) - 1, 0))
