"""Runners answer decoder steps alike, and say what a machine lacks."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_fixtures import (
    SIZES,
    dense_decoder,
    edited,
    export,
    factorised_decoder,
    padded_step,
    plain_step,
    save_decoder,
)
from onnx_ir import Model

from pifa_deploy.errors import ExitCode, MissingCapabilityError, StageFailedError
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.runners import OnnxRuntimeRunner, TorchRunner

# Two layers of about 30 roundings, each amplified by row norms of about 2.
LIMIT = 2 * 30 * 2 * float(torch.finfo(torch.float32).eps)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """(checkpoint, factorised model, float64 dense model)."""
    model, exact = factorised_decoder(dense_decoder("qwen2"))
    return save_decoder(model, tmp_path_factory.mktemp("runners") / "checkpoint"), model, exact


@pytest.fixture(scope="module")
def onnx_folder(decoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("runners") / "onnx"
    export(decoder[0], target, dtype="fp32")
    return target


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def runner(request: pytest.FixtureRequest, decoder: Any, onnx_folder: Path) -> Any:
    return (
        TorchRunner(decoder[1]) if request.param == "torch" else OnnxRuntimeRunner(open_folder(onnx_folder), threads=1)
    )


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, SIZES["vocab_size"], shape)


@torch.no_grad()
def whole(exact: Any, ids: np.ndarray) -> np.ndarray:
    return exact(torch.from_numpy(ids), use_cache=False).logits.numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= LIMIT * np.abs(expected).max()


class TestSteps:
    def test_one_step_is_the_forward_pass(self, runner: Any, decoder: Any) -> None:
        ids = tokens(2, 9)
        assert_close(runner.step(plain_step(ids), None)[0], whole(decoder[2], ids))

    def test_steps_through_the_cache_are_the_forward_pass(self, runner: Any, decoder: Any) -> None:
        ids, cache, parts = tokens(2, 9), None, []
        for start, end in ((0, 5), (5, 6), (6, 9)):
            logits, cache = runner.step(plain_step(ids[:, start:end], start), cache)
            parts.append(logits)
        assert_close(np.concatenate(parts, axis=1), whole(decoder[2], ids))

    def test_padding_on_the_left_changes_nothing(self, runner: Any, decoder: Any) -> None:
        rows = [tokens(3, seed=1), tokens(8, seed=2)]
        logits, _ = runner.step(padded_step(rows), None)
        for i, row in enumerate(rows):
            assert_close(logits[i, -len(row) :], whole(decoder[2], row[None])[0])

    def test_no_cache_starts_anew(self, runner: Any) -> None:
        ids = tokens(1, 4)
        first, _ = runner.step(plain_step(ids), None)
        runner.step(plain_step(tokens(1, 6, seed=5)), None)
        np.testing.assert_array_equal(runner.step(plain_step(ids), None)[0], first)


def test_an_empty_cache_has_no_positions(onnx_folder: Path) -> None:
    cache = OnnxRuntimeRunner(open_folder(onnx_folder), threads=1).empty_cache(3)
    assert list(cache) == [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert {(value.shape, value.dtype.name) for value in cache.values()} == {((3, 2, 0, 8), "float32")}


def test_without_onnx_runtime_the_message_says_what_to_install(
    onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingCapabilityError, match=re.escape("pip install 'pifa-deploy[cpu]'")) as info:
        OnnxRuntimeRunner(open_folder(onnx_folder))
    assert info.value.exit_code == ExitCode.NOT_DECIDED


def test_a_bf16_graph_on_the_cpu_is_a_missing_capability(decoder: Any, tmp_path: Path) -> None:
    export(decoder[0], tmp_path / "bf16", dtype="bf16")
    folder = open_folder(tmp_path / "bf16")
    with pytest.raises(MissingCapabilityError, match="export fp32 or fp16, or verify on a GPU") as info:
        OnnxRuntimeRunner(folder, threads=1)
    assert info.value.exit_code == ExitCode.NOT_DECIDED
    assert str(folder.model_path) in str(info.value)


def test_a_cache_that_numpy_cannot_hold_is_a_missing_capability(
    onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pifa_deploy.runners._NUMPY_DTYPES", {"tensor(float16)": np.float16})
    with pytest.raises(MissingCapabilityError, match=r"past_key_values\.0\.key is tensor\(float\)"):
        OnnxRuntimeRunner(open_folder(onnx_folder))


def test_a_graph_that_onnx_runtime_cannot_load_is_a_failed_stage(onnx_folder: Path, tmp_path: Path) -> None:
    def break_type(model: Model) -> None:
        next(node for node in model.graph if node.op_type == "Softmax").op_type = "Softmaxx"

    broken = edited(onnx_folder, tmp_path / "broken", break_type)
    with pytest.raises(StageFailedError, match=r"could not load .*model\.onnx.*Softmaxx") as info:
        OnnxRuntimeRunner(open_folder(broken))
    assert info.value.exit_code == ExitCode.STAGE_FAILED
