"""Small real models of many families, with weights whose spectra decay as trained ones do."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cli_fixtures import passage, small_tokenizer
from safetensors.torch import load_file
from torch import nn

from pifa_deploy.calibration import CALIBRATION_TEXT, CalibrationOptions, calibration_set
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


@functools.cache
def _drawn(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
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


def family_model(kind: str) -> Any:
    """Returns a random model; singular values and features of very different sizes, biases not zero."""
    return copy.deepcopy(_drawn(kind))


def decaying(*shape: int) -> torch.Tensor:
    """Returns random matrices [..., m, n] whose singular values fall by a factor of 30."""
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    found: torch.Tensor = left * torch.logspace(0.3, -1.2, min(shape[-2:])) @ right
    return found


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
        # Layers are compared one by one with what they replace, features in their places.
        "layout": "pivoted",
        "calibration": (str(text),),
        "windows": WINDOWS,
        "activations": ActivationOptions(batch_tokens=3 * WINDOWS.sequence_length),
        "device": "cpu",
        **changes,
    }
    return CompressOptions(**chosen)


# What a compression must have seen, by plain forward passes of whole models.


def calibration_ids(text: Path) -> torch.Tensor:
    return calibration_set([str(text)], small_tokenizer(), WINDOWS).windows


def inputs_of(model: Any, names: Collection[str], ids: torch.Tensor) -> dict[str, np.ndarray]:
    """Returns X [n, tokens] float64 of each named module in a pass of the whole model."""
    found: dict[str, np.ndarray] = {}

    def collect(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found[name] = args[0].double().flatten(0, -2).T.numpy()

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(collect(name)) for name in names]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the matrices [m, n] float64 that the tensors of a folder stand for, by module."""
    held = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    found = {name.removesuffix(".weight"): tensor for name, tensor in held.items() if tensor.ndim == 2}
    for name in [name.removesuffix(".pivot_rows") for name in held if name.endswith(".pivot_rows")]:
        rows, pivot_weight = held[f"{name}.pivot_rows"].long(), held[f"{name}.pivot_weight"]
        rest = held[f"{name}.coefficients"] @ pivot_weight
        weight = torch.empty(len(rows) + len(rest), pivot_weight.shape[1], dtype=torch.float64)
        others = [row for row in range(len(weight)) if row not in set(rows.tolist())]
        weight[rows], weight[others] = pivot_weight, rest
        found[name] = weight
    for name in [name.removesuffix(".low_rank_u") for name in held if name.endswith(".low_rank_u")]:
        found[name] = held[f"{name}.low_rank_u"] @ held[f"{name}.low_rank_v"]
    return found


def with_weights(kind: str, weights: Mapping[str, torch.Tensor]) -> Any:
    """Returns the dense model in float64 with some weights in place of its own."""
    model = family_model(kind).double()
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight.double()
    return model


def seen_inputs(
    kind: str, stored: Mapping[str, torch.Tensor], ids: torch.Tensor
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yields (layer, name, X) of each linear of `stored`, in a model where exactly the earlier ones are as stored."""
    family = FAMILIES[kind]
    model = with_weights(kind, {})
    for layer in range(LAYERS):
        for group in family.groups:
            names = [name for name in (f"{family.layers}.{layer}.{inner}" for inner in group) if name in stored]
            for name, x in inputs_of(model, names, ids).items():
                yield layer, name, x
            for name in names:
                model.get_submodule(name).weight.data = stored[name]
