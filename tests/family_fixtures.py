"""Small real models of many families, with weights whose spectra decay as trained ones do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from cli_fixtures import passage, small_tokenizer
from torch import nn

from pifa_deploy.calibration import CALIBRATION_TEXT, CalibrationOptions
from pifa_deploy.compression import ActivationOptions, CompressOptions

HIDDEN, INNER, LAYERS, VOCABULARY = 32, 56, 3, 384
WINDOWS = CalibrationOptions(samples=8, sequence_length=48)
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **SPECIAL,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
# Shorter than a window, so that the masks of the layers differ from each other.
SLIDING = {"sliding_window": 16}

ATTENTION = [tuple(f"self_attn.{name}_proj" for name in "qkv"), ("self_attn.o_proj",)]
GATED = [*ATTENTION, ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A configuration, the path of its decoder layers, and their linears by shared inputs."""

    config: Callable[[], Any]
    groups: list[tuple[str, ...]]
    layers: str = "model.layers"


FAMILIES = {
    "llama": Family(config=lambda: transformers.LlamaConfig(**GROUPED), groups=GATED),
    "qwen2": Family(config=lambda: transformers.Qwen2Config(**GROUPED), groups=GATED),
    "qwen3": Family(config=lambda: transformers.Qwen3Config(**HEADS), groups=GATED),
    "mistral": Family(config=lambda: transformers.MistralConfig(**GROUPED, **SLIDING), groups=GATED),
    "gemma": Family(config=lambda: transformers.GemmaConfig(**HEADS), groups=GATED),
    "gemma2": Family(
        config=lambda: transformers.Gemma2Config(**HEADS, **SLIDING, query_pre_attn_scalar=8), groups=GATED
    ),
    "gemma3": Family(
        config=lambda: transformers.Gemma3TextConfig(
            **HEADS,
            **SLIDING,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        groups=GATED,
    ),
    "phi": Family(
        config=lambda: transformers.PhiConfig(**GROUPED),
        groups=[(*ATTENTION[0], "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",)],
    ),
    "phi3": Family(
        config=lambda: transformers.Phi3Config(**GROUPED),
        groups=[("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    ),
    "opt": Family(
        config=lambda: transformers.OPTConfig(
            **{**SIZES, "pad_token_id": 1}, ffn_dim=INNER, word_embed_proj_dim=HIDDEN
        ),
        groups=[ATTENTION[0], ("self_attn.out_proj",), ("fc1",), ("fc2",)],
        layers="model.decoder.layers",
    ),
    "gpt_neox": Family(
        config=lambda: transformers.GPTNeoXConfig(**SIZES),
        groups=[
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ],
        layers="gpt_neox.layers",
    ),
    # Takes what it needs by position.
    "bloom": Family(
        config=lambda: transformers.BloomConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=4, **SPECIAL
        ),
        groups=[
            ("self_attention.query_key_value",),
            ("self_attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ],
        layers="transformer.h",
    ),
    # Has a linear of its own and adds in place.
    "falcon": Family(
        config=lambda: transformers.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, **SPECIAL
        ),
        groups=[
            ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
            ("self_attention.dense",),
            ("mlp.dense_4h_to_h",),
        ],
        layers="transformer.h",
    ),
}


def family_model(kind: str, *, seed: int = 3) -> Any:
    """Returns a random model; singular values and features of very different sizes, biases not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES[kind].config(), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
            elif parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
            elif parameter.shape[0] == VOCABULARY:
                parameter.data = 0.5 * torch.randn_like(parameter) * torch.logspace(0.5, -1, parameter.shape[1])
            else:
                parameter.data = decaying(*parameter.shape)
    return model.eval()


def decaying(m: int, n: int) -> torch.Tensor:
    """Returns a random [m, n] of singular values that fall by a factor of 30."""
    left, _, right = torch.linalg.svd(torch.randn(m, n), full_matrices=False)
    return left * torch.logspace(0.3, -1.2, min(m, n)) @ right


def save_family(folder: Path, kind: str, *, dtype: torch.dtype = torch.float32) -> Path:
    family_model(kind).to(dtype).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, characters: int = 8000) -> Path:
    path.write_text(passage(CALIBRATION_TEXT, characters), encoding="utf-8")
    return path


def options(text: Path, **changes: Any) -> CompressOptions:
    """Returns MPIFA at density 0.6 on a few windows, in batches of three and a last one of two."""
    chosen: dict[str, Any] = {
        "density": 0.6,
        "calibration": (str(text),),
        "windows": WINDOWS,
        "activations": ActivationOptions(batch_tokens=3 * WINDOWS.sequence_length),
        "device": "cpu",
        **changes,
    }
    return CompressOptions(**chosen)
