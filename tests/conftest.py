"""Tiny real models of the supported families, and PIFA checkpoints made from them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pifa_deploy  # noqa: F401 - registers the checkpoint format with transformers
from pifa_deploy.density import rank_for_density
from pifa_deploy.factorization import factors_from_weight
from pifa_deploy.linear import LowRankLinear, PifaLinear

# Who is started by nohup or with & in a script ignores Ctrl-C, and so would all that a test starts and sends it to.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """`tiny_config(kind="llama" | "qwen2", tie=False)` gives a real configuration of that family."""
    from transformers import LlamaConfig, Qwen2Config

    def make(kind: str = "llama", *, tie: bool = False) -> Any:
        family = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind]
        return family(**TINY, tie_word_embeddings=tie)

    return make


def truncated(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns float64 U [m, r], V [r, n] of the best rank-r approximation."""
    u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def projections(model: nn.Module) -> list[str]:
    """Returns the names of the linears inside the decoder layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """`tiny_model(kind, tie=False, dtype=torch.float32)` gives a dense random model, biases not zero, in eval mode."""
    from transformers import AutoModelForCausalLM

    def make(kind: str = "llama", *, tie: bool = False, dtype: torch.dtype = torch.float32) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            model = AutoModelForCausalLM.from_config(tiny_config(kind, tie=tie), dtype=dtype)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(parameter, std=0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def pifa_model(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """`pifa_model(kind, tie=, dtype=, form="pifa" | "lowrank", densities=(...))` gives a factorised model.

    The i-th projection has density densities[i % len(densities)]; `model.truncated` maps its name to
    the float64 low-rank weight that its factors stand for.
    """
    from pifa_deploy.transformers_quantizer import attach

    def make(
        kind: str = "llama",
        *,
        tie: bool = False,
        dtype: torch.dtype = torch.float32,
        form: str = "pifa",
        densities: tuple[float, ...] = (0.5,),
    ) -> Any:
        model = tiny_model(kind, tie=tie, dtype=dtype)
        exact = {}
        for i, name in enumerate(projections(model)):
            dense = model.get_submodule(name)
            rank = rank_for_density(dense.out_features, dense.in_features, densities[i % len(densities)])
            u, v = truncated(dense.weight, rank)
            exact[name] = u @ v
            if form == "pifa":
                layer: nn.Module = PifaLinear.from_factors(factors_from_weight(u @ v, rank, dtype=dtype), dense.bias)
            else:
                layer = LowRankLinear.from_pair(u.to(dtype), v.to(dtype).contiguous(), dense.bias)
            model.set_submodule(name, layer)
        attach(model, source="svd", density=densities[0], details={"seed": 11})
        model.truncated = exact
        return model.eval()

    return make


@pytest.fixture(scope="session")
def pifa_checkpoint(pifa_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`pifa_checkpoint(kind, max_shard_size=..., **as pifa_model)` gives a saved folder; do not change it."""
    made: dict[str, Path] = {}

    def make(kind: str = "llama", *, max_shard_size: str = "1GB", **options: Any) -> Path:
        key = repr((kind, max_shard_size, sorted(options.items(), key=str)))
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            pifa_model(kind, **options).save_pretrained(folder, max_shard_size=max_shard_size)
            made[key] = folder
        return made[key]

    return make
