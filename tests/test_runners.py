"""Runners answer decoder steps alike, and say what a machine lacks."""

from __future__ import annotations

import copy
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

from pifa_deploy.decoder_step import filled_cache
from pifa_deploy.errors import ExitCode, MissingCapabilityError, StageFailedError
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner, _session, check_provider
from pifa_deploy.torch_runner import TorchRunner

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


class TestTimedCalls:
    def test_a_launch_on_the_cpu_is_the_step_and_has_no_time_of_a_gpu(self, runner: Any) -> None:
        call = runner.timed(plain_step(tokens(1, 1), 6))
        call.launch()
        call.wait()
        assert call.gpu_ms() is None

    def test_launches_read_the_same_cache_again_and_again(
        self, runner: Any, decoder: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Against `step` on the same drawn cache; what a launch computed is taken from where it leaves it.
        step, logits = plain_step(tokens(2, 3), 4), []
        cache = filled_cache(runner.input_shapes(), step, torch.device("cpu"))
        assert {tuple(tensor.shape) for tensor in cache.values()} == {(2, 2, 4, 8)}
        expected = runner.step(step, runner.load_cache(cache))[0]
        if isinstance(runner, TorchRunner):
            forward = runner._forward
            monkeypatch.setattr(runner, "_forward", lambda *a: logits.append(forward(*a).logits.numpy()))
        else:
            bound = runner._results
            monkeypatch.setattr(runner, "_results", lambda step: logits.append(bound(step)) or logits[-1])
        call = runner.timed(step)
        for _ in range(3):
            call.launch()
        for found in logits:
            np.testing.assert_array_equal(found["logits"].numpy() if isinstance(found, dict) else found, expected)
        assert len(logits) == (3 if isinstance(runner, TorchRunner) else 1)

    @pytest.mark.parametrize("past", [0, 5])
    def test_the_cache_does_not_grow_from_launch_to_launch(self, runner: Any, past: int) -> None:
        step = plain_step(tokens(1, 4), past)
        call = runner.timed(step)
        call.launch()
        call.launch()  # torch's cache would have grown behind the mask of the step
        call.wait()

    def test_a_closed_call_is_refused(self, runner: Any) -> None:
        call = runner.timed(plain_step(tokens(1, 2)))
        call.close()
        with pytest.raises(ValueError, match="the timed call is closed, expected an open one"):
            call.launch()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
class TestWithoutGpu:
    def test_torch_cannot_capture_a_graph(self, decoder: Any) -> None:
        with pytest.raises(MissingCapabilityError, match="a CUDA graph was asked for on the CPU, expected a GPU"):
            TorchRunner(decoder[1]).timed(plain_step(tokens(1, 2)), cuda_graph=True)

    def test_onnx_runtime_does_not_fall_back_to_the_cpu(self, onnx_folder: Path) -> None:
        with pytest.raises(MissingCapabilityError, match="ONNX Runtime was asked for a GPU and torch finds none"):
            OnnxRuntimeRunner(open_folder(onnx_folder), device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
class TestOnGpu:
    def test_torch_answers_as_on_the_cpu_and_launches_take_time(self, decoder: Any) -> None:
        ids = tokens(2, 9)
        on_gpu = TorchRunner(copy.deepcopy(decoder[1]).cuda())
        assert_close(on_gpu.step(plain_step(ids), None)[0], whole(decoder[2], ids))
        call = on_gpu.timed(plain_step(tokens(1, 1), 6))
        call.launch()
        call.wait()
        assert call.gpu_ms() > 0

    def test_onnx_runtime_answers_as_on_the_cpu(self, decoder: Any, onnx_folder: Path) -> None:
        if "CUDAExecutionProvider" not in pytest.importorskip("onnxruntime").get_available_providers():
            pytest.skip("ONNX Runtime has no CUDA here: pip install 'pifa-deploy[gpu]'")
        ids, cache, parts = tokens(2, 9), None, []
        on_gpu = OnnxRuntimeRunner(open_folder(onnx_folder), device="cuda")
        for start, end in ((0, 5), (5, 9)):
            logits, cache = on_gpu.step(plain_step(ids[:, start:end], start), cache)
            parts.append(logits)
        assert all(tensor.is_cuda for tensor in cache.values())
        assert_close(np.concatenate(parts, axis=1), whole(decoder[2], ids))
        call = on_gpu.timed(plain_step(tokens(1, 1), 6))
        call.launch()
        call.wait()
        assert call.gpu_ms() > 0
        assert not call.waits


def test_an_unknown_device_is_refused(onnx_folder: Path) -> None:
    with pytest.raises(ValueError, match="device is 'tpu', expected one of cpu, cuda"):
        OnnxRuntimeRunner(open_folder(onnx_folder), device="tpu")


def test_a_provider_that_onnx_runtime_lacks_is_a_missing_capability(onnx_folder: Path) -> None:
    with pytest.raises(MissingCapabilityError, match=r"has no NoSuchExecutionProvider, only .*CPUExecutionProvider"):
        _session(open_folder(onnx_folder).model_path, 1, ("NoSuchExecutionProvider", {}))


def test_a_session_that_took_another_provider_is_a_missing_capability() -> None:
    check_provider(["CUDAExecutionProvider", "CPUExecutionProvider"], "CUDAExecutionProvider")
    with pytest.raises(MissingCapabilityError, match="took CPUExecutionProvider where CUDAExecutionProvider was asked"):
        check_provider(["CPUExecutionProvider"], "CUDAExecutionProvider")


def test_a_graph_of_another_layout_is_refused_when_it_runs(onnx_folder: Path, tmp_path: Path) -> None:
    def rename(model: Model) -> None:
        next(value for value in model.graph.outputs if value.name == "present.1.key").name = "key"

    renamed = OnnxRuntimeRunner(open_folder(edited(onnx_folder, tmp_path / "renamed", rename)), threads=1)
    with pytest.raises(StageFailedError, match=r"output key has the dimensions .*expected logits of a known vocab"):
        renamed.step(plain_step(tokens(1, 3)), None)


def test_an_empty_cache_has_no_positions(onnx_folder: Path) -> None:
    cache = OnnxRuntimeRunner(open_folder(onnx_folder), threads=1).empty_cache(3)
    assert list(cache) == [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert {(value.shape, value.dtype) for value in cache.values()} == {((3, 2, 0, 8), torch.float32)}


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


def test_a_graph_that_onnx_runtime_cannot_load_is_a_failed_stage(onnx_folder: Path, tmp_path: Path) -> None:
    def break_type(model: Model) -> None:
        next(node for node in model.graph if node.op_type == "Softmax").op_type = "Softmaxx"

    broken = edited(onnx_folder, tmp_path / "broken", break_type)
    with pytest.raises(StageFailedError, match=r"could not load .*model\.onnx.*Softmaxx") as info:
        OnnxRuntimeRunner(open_folder(broken))
    assert info.value.exit_code == ExitCode.STAGE_FAILED
