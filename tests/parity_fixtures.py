"""A small checkpoint and its exports, made once for all tests of parity. Do not change them, copy them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from decoder_fixtures import SIZES, dense_decoder, export, factorised_decoder, save_decoder, scattered

# Every key and query head has a key of its own, so that the factors of q and k have the same shapes.
HEADS = {"num_key_value_heads": SIZES["num_attention_heads"]}


def layout(name: str, m: int, n: int) -> tuple[int, Iterable[int]]:
    """As `scattered`, but o_proj has as many other rows as pivots: its coefficients are square."""
    return (16, range(1, 32, 2)) if "o_proj" in name else scattered(name, m, n)


@pytest.fixture(scope="session")
def parity_decoder() -> tuple[Any, Any]:
    """The factorised Qwen2 with biases on q, k, v, and the float64 dense model of the same function."""
    return factorised_decoder(dense_decoder("qwen2", **HEADS), layout)


@pytest.fixture(scope="session")
def parity_checkpoint(parity_decoder: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The factorised model, whose logits have the spread of a trained model's."""
    return save_decoder(parity_decoder[0], tmp_path_factory.mktemp("parity") / "checkpoint")


@pytest.fixture(scope="session")
def parity_export(parity_checkpoint: Path) -> Callable[[str], Path]:
    """`parity_export("fp32" | "fp16" | "plain")` gives its ONNX folder; "plain" is fp16 without PIFA nodes."""

    def make(flag: str) -> Path:
        folder = parity_checkpoint.parent / flag
        if not folder.exists():
            export(parity_checkpoint, folder, dtype=flag.replace("plain", "fp16"), plain_ops=flag == "plain")
        return folder

    return make
