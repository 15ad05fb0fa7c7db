"""verify on engines: which engine belongs to which ONNX folder, and what can be asked of it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from cli_fixtures import Outcome

from pifa_deploy import engine, verification
from pifa_deploy.decoder_step import Step
from pifa_deploy.engine_fit import this_machine
from pifa_deploy.engine_record import check_origin, read_engine_json
from pifa_deploy.errors import ExitCode, StageFailedError
from pifa_deploy.logit_cases import CaseOptions, cases
from pifa_deploy.low_rank_twin import build_twin_engine, low_rank_twin
from pifa_deploy.model_folder import load_model
from pifa_deploy.onnx_export import ExportOptions, export_checkpoint
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner
from pifa_deploy.parity import gates_for, judge
from pifa_deploy.saved_verification import judge_saved
from pifa_deploy.targets import RTX
from pifa_deploy.torch_runner import TorchRunner
from pifa_deploy.verification import VerifyOptions, measure, open_twin, verify_folder

pytest_plugins = ("cli_plugin",)


def test_an_engine_of_another_onnx_folder_is_refused_before_the_machine_is_asked(
    engine_folder: Path, onnx_folder: Path, checkpoint: Path, tmp_path: Path, pifa_deploy: Callable[..., Outcome]
) -> None:
    other = shutil.copytree(onnx_folder, tmp_path / "other")
    with (other / "model.onnx.data").open("ab") as data:
        data.write(b"x")
    outcome = pifa_deploy("verify", other, "--reference", checkpoint, "--engine", engine_folder)
    outcome.failed(
        ExitCode.INPUT_REFUSED, r"engine: was built from a model\.onnx\.data with hash \w{12}…, .*\.data has another"
    )


def test_an_engine_without_a_gpu_is_not_decided(
    engine_folder: Path, onnx_folder: Path, checkpoint: Path, pifa_deploy: Callable[..., Outcome]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    pifa_deploy("verify", onnx_folder, "--reference", checkpoint, "--engine", engine_folder).failed(
        ExitCode.NOT_DECIDED, r"GPU"
    )


def test_lengths_that_an_engine_was_not_built_for_are_left_out_or_cut() -> None:
    options = VerifyOptions(prefill_lengths=(1, 17, 128), padded_lengths=(5, 9), decode_prompt=64, decode_steps=32)
    assert options.within(batch=2, tokens=16, past=32) == {
        "prefill_lengths": (1,),
        "padded_lengths": (5, 9),
        "padded_steps": (7, 1, 1),
        "decode_prompt": 16,
        "decode_steps": 17,
        "window": 16,
        "context": 48,
    }
    assert options.within(batch=1, tokens=512, past=512) == {
        "prefill_lengths": (1, 17, 128),
        "padded_lengths": (),
        "padded_steps": (),
        "decode_prompt": 64,
        "decode_steps": 32,
        "window": 512,
        "context": 1024,
    }
    for step in cases(np.arange(4000), replace(options, **options.within(batch=2, tokens=16, past=32))):
        assert step.step.input_ids.shape[1] <= 16
        assert step.step.attention_mask.shape[1] <= 16 + 32
        assert step.step.past <= 32


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return load_model(checkpoint, dtype=torch.float32)


class TestTwin:
    """The floor of an engine is the low-rank twin in an engine of its own; here there is none to run it."""

    def test_its_engine_is_built_as_the_other_was(
        self, model: Any, checkpoint: Path, engine_folder: Path, tmp_path: Path
    ) -> None:
        # ONNX Runtime has no bf16 on a CPU: such an engine had no floor at all.
        export_checkpoint(checkpoint, tmp_path / "bf16", ExportOptions(dtype="bf16"))
        record = read_engine_json(engine_folder)
        # As if it had been built with the plugin, which a twin has no use for.
        asked = replace(record, options={**record.options, "plugin_library": {"file": "x.so"}}, sparse_weights=True)
        with low_rank_twin(model, open_folder(tmp_path / "bf16")) as twin:
            assert twin is not None
            place = build_twin_engine(twin, asked)
            built = read_engine_json(place)
            assert place.parent == twin.path
            check_origin(built, place, open_folder(twin.path))
        assert not place.exists()
        for name in ("backend", "version", "compute_capabilities"):
            assert getattr(built, name) == getattr(record, name)
        sizes = {name: list(map(list, limits.values())) for name, limits in built.profiles[0].items()}
        assert sizes == {name: list(map(list, limits.values())) for name, limits in record.profiles[0].items()}
        assert built.sparse_weights
        assert (built.options["tf32"], built.options["plugin_library"]) == (False, None)
        assert (record.network["modules"] != [], built.network["modules"]) == (True, [])
        products = [layer for layer in built.layers if layer.type == "gemm"]
        assert len(products) > len(record.network["modules"])
        assert {layer.precision for layer in products} == {"BFloat16"}

    def test_where_it_cannot_be_built_or_run_the_reason_is_kept(
        self, model: Any, onnx_folder: Path, engine_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, options = open_folder(onnx_folder), VerifyOptions(engine=engine_folder, levels=("logits",))
        if not torch.cuda.is_available():
            with ExitStack() as during:
                found = open_twin(during, model, folder, options=options)
            assert re.fullmatch(r"there is no low-rank twin: .*this machine has no NVIDIA GPU, and .*", str(found))
        monkeypatch.setitem(engine._MODULES, "tensorrt-rtx", ("no_such_module_rtx", "pifa-deploy[rtx]"))
        with ExitStack() as during:
            found = open_twin(during, model, folder, options=options)
        assert re.fullmatch(r"there is no low-rank twin: .*no_such_module_rtx is not installed, .*", str(found))
        monkeypatch.undo()
        monkeypatch.setattr(engine, "_child_command", lambda spec: [sys.executable, "-c", "print('no'); exit(7)"])
        with ExitStack() as during:
            found = open_twin(during, model, folder, options=options)
        assert re.fullmatch(r"there is no low-rank twin: BuildError: .*last lines: no", str(found))

    def test_a_twin_that_fails_on_the_way_costs_its_own_gates_only(self, model: Any, onnx_folder: Path) -> None:
        class Failing(OnnxRuntimeRunner):
            def step(self, inputs: Step, cache: Any) -> Any:
                if inputs.past == 3:
                    raise StageFailedError("TensorRT could not run the step (out of memory)")
                return super().step(inputs, cache)

        folder = open_folder(onnx_folder)
        options = CaseOptions(prefill_lengths=(9,), padded_lengths=(), decode_prompt=2, decode_steps=4, positions=0)
        steps = list(cases(np.arange(3, 40), options))
        found, why = measure(TorchRunner(model), OnnxRuntimeRunner(folder), Failing(folder), steps)
        alone, nothing = measure(TorchRunner(model), OnnxRuntimeRunner(folder), None, steps)
        assert found.cases == alone.cases
        assert (len(found.cases), nothing) == (6, None)
        assert why == (
            "the low-rank twin failed at decode at 3: StageFailedError: TensorRT could not run the step (out of memory)"
        )
        verdict = judge(found.overall(), gates_for("fp32"), low_rank=why)
        undecided = [gate for gate in verdict.gates if gate.passed is None]
        assert [(gate.name, gate.limit, gate.reason) for gate in undecided] == [("low_rank_ratio", 4.0, why)]
        assert {gate.passed for gate in verdict.gates if gate not in undecided} == {True}
        assert verdict.passed is None
        assert judge(found.overall(), replace(gates_for("fp32"), mean_kl=0.0), low_rank=why).passed is False

    def test_without_room_for_it_the_run_is_saved_and_not_decided(
        self,
        onnx_folder: Path,
        checkpoint: Path,
        text: Path,
        full_disk: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        pifa_deploy: Callable[..., Outcome],
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(full_disk))
        options = ("--text", text, "--positions", 0, "--level", "logits", "--json", tmp_path / "run.json")
        outcome = pifa_deploy("verify", onnx_folder, "--reference", checkpoint, *options)
        assert outcome.code == ExitCode.NOT_DECIDED
        assert re.search(
            r"not decided low_rank_ratio: .*\(the low-rank twin could not be written .*TMPDIR", outcome.err
        )
        assert "passed mean_kl" in outcome.err
        assert "is not decided against" in outcome.out
        run = json.loads((tmp_path / "run.json").read_text())
        assert (run["passed"], run["low_rank"], run["device"]) == (None, None, "cpu")
        assert run["low_rank_missing"].startswith("the low-rank twin could not be written (OSError: ")
        again = judge_saved(tmp_path / "run.json", {"low_rank_ratio": 4.0})
        assert json.loads(json.dumps(again.to_json())) == {key: run[key] for key in run if key != "command"}


class TestDevice:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
    def test_without_a_gpu_nothing_is_decided(
        self, onnx_folder: Path, checkpoint: Path, pifa_deploy: Callable[..., Outcome]
    ) -> None:
        pifa_deploy("verify", onnx_folder, "--reference", checkpoint, "--device", "cuda").failed(
            ExitCode.NOT_DECIDED, r"torch \S+ finds no CUDA device; use --device cpu"
        )
        with pytest.raises(ValueError, match=r"device is 'tpu', expected one of cpu, cuda"):
            VerifyOptions(device="tpu")

    def test_the_reference_multiplies_in_full_float32(self, checkpoint: Path) -> None:
        model = load_model(checkpoint, dtype=torch.float32)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            with verification._on_device(model, "cpu"):
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
    def test_on_a_gpu_the_figures_are_those_of_the_cpu(self, onnx_folder: Path, checkpoint: Path, text: Path) -> None:
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("ONNX Runtime has no CUDAExecutionProvider: pip install 'pifa-deploy[gpu]'")
        options = VerifyOptions(text=(text,), positions=0)
        found, expected = (
            verify_folder(onnx_folder, checkpoint, replace(options, device=device)) for device in ("cuda", "cpu")
        )
        assert found
        assert expected
        assert found.logits.overall.positions == expected.logits.overall.positions
        assert found.to_json()["device"] == "cuda"

    @pytest.mark.gpu
    @pytest.mark.tensorrt
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
    def test_on_a_gpu_an_engine_is_held_against_an_engine(
        self, onnx_folder: Path, checkpoint: Path, text: Path, tmp_path: Path
    ) -> None:
        here = this_machine()
        capability = here.gpu.compute_capability if here.gpu else None
        if capability is None or RTX not in here.versions:
            pytest.skip("no TensorRT-RTX for this GPU")
        built = engine.BuildOptions(compute_capabilities=(capability,), max_input_len=64, max_cache_len=64)
        engine.build_engines(onnx_folder, tmp_path / "engine", built)
        options = VerifyOptions(text=(text,), positions=0, engine=tmp_path / "engine", levels=("logits",))
        report = verify_folder(onnx_folder, checkpoint, options)
        assert report
        assert report.logits.floor is not None


def test_a_plugin_without_an_engine_is_wrong_usage() -> None:
    with pytest.raises(ValueError, match=r"plugin_library is p\.so without an engine"):
        VerifyOptions(plugin_library=Path("p.so"))
