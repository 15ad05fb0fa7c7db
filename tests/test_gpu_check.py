"""What perf/gpu_check.sh and perf/check_engine.py do with their time and with what fails; no GPU is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pifa_deploy.decoder_step import Step
from pifa_deploy.errors import MisfitError

PERF = Path(__file__).resolve().parents[1] / "perf"
sys.path.insert(0, str(PERF))

import bundle_models  # noqa: E402
import check_engine  # noqa: E402


def test_engines_are_judged_by_their_logits_and_keep_the_words_of_a_refusal(tmp_path: Path) -> None:
    from pifa_deploy.onnx_folder import open_folder
    from pifa_deploy.onnx_runner import OnnxRuntimeRunner

    kind = bundle_models.config()
    kind.update({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1})
    kind.update({"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16})
    bundle_models.main(tmp_path, kind)

    def opened(folder: Path, library: Path | None) -> OnnxRuntimeRunner:
        if library is not None:
            raise MisfitError("no plugin here\nbut a second line")
        return OnnxRuntimeRunner(open_folder(folder))

    rows = dict(check_engine.measure(tmp_path, tmp_path / "lib.so", opened))
    assert rows["PIFA, plugin"] == {"failed": "MisfitError: no plugin here\nbut a second line"}
    assert check_engine.judge(rows) == 3
    done = {name: row for name, row in rows.items() if name != "PIFA, plugin"}
    assert list(done) == ["dense", "2:4", "PIFA, plain"]
    assert check_engine.judge(done) == 0
    assert all(row["prefill_ms"] > 0 and row["decode_ms"] > 0 for row in done.values())
    lines = check_engine.table("onnxruntime", rows)
    assert lines[-1] == "| onnxruntime | PIFA, plugin | MisfitError: no plugin here |"
    # The models are different ones: an engine of another would be found out.
    for wrong in ("dense", "2-4"):
        ids, exact = np.load(tmp_path / "logits.npz")["input_ids"], np.load(tmp_path / "logits.npz")[wrong]
        prompt, token = check_engine.relative_errors(opened(tmp_path / "pifa", None), ids, exact)
        assert min(prompt, token) > 0.1
        assert check_engine.judge({"x": {"prefill_error": prompt, "decode_error": 0.0}}) == 1
    assert check_engine.judge({"x": {"prefill_error": 0.0, "decode_error": float("nan")}}) == 1


class Untimed:
    """Answers a constant and cannot be timed."""

    def step(self, step: Step, _: object) -> tuple[np.ndarray, object]:
        return np.ones((1, step.position_ids.shape[-1], 4)), None

    def timed(self, _: Step) -> None:
        raise MisfitError("no timing here")


def test_errors_are_kept_where_timing_fails_and_every_contender_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = {folder: np.ones((check_engine.PROMPT + 1, 4)) for folder in ("dense", "2-4", "pifa")}
    written: list[list[str]] = []

    def opener(backend: str, capability: str, _: Path) -> check_engine.Opener:
        assert (backend, capability) == ("tensorrt", "9.0")

        def opened(folder: Path, library: Path | None) -> Untimed:
            report = json.loads((tmp_path / "out.json").read_text())
            written.append(list(report["backends"][backend]))
            return Untimed()

        return opened

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")
    monkeypatch.setattr(check_engine, "BACKENDS", {"tensorrt-rtx": "numpy", "tensorrt": "numpy"})
    monkeypatch.setattr(check_engine, "engine_opener", opener)
    arguments = ["check_engine", str(tmp_path), "--library", "lib.so", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    for wrong, code in ((False, 3), (True, 1)):
        exact["pifa"] *= 2 if wrong else 1
        np.savez(tmp_path / "logits.npz", input_ids=np.arange(check_engine.PROMPT + 1), **exact)
        assert check_engine.main() == code
        lines = capsys.readouterr().out.splitlines()
        assert "| tensorrt-rtx | not served: compute capability 9.0 |" in lines
        assert lines[-1] == "tensorrt: 4 engines; tensorrt-rtx does not serve 9.0"
        error = "5.0e-01" if wrong else "0.0e+00"
        assert f"| tensorrt | PIFA, plugin | {error} | {error} | MisfitError: no timing here |" in lines
    assert written[:4] == [[], ["dense"], ["dense", "2:4"], ["dense", "2:4", "PIFA, plain"]]
    monkeypatch.setattr(check_engine, "BACKENDS", {"tensorrt-rtx": "numpy"})
    assert check_engine.main() == 3
    assert capsys.readouterr().out.endswith("not decided: 0 engines; tensorrt-rtx does not serve 9.0\n")


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_no_stage_takes_the_time_of_the_last_and_a_slow_compiler_is_replaced_by_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "perf").mkdir()
    (tmp_path / "tests").mkdir()
    program = tmp_path / "perf" / "gpu_check.sh"
    script(program, (PERF / "gpu_check.sh").read_text())
    calls = tmp_path / "calls.txt"
    # Everything that Python would do goes well, but the tests of the kernels never end.
    python = script(
        tmp_path / "python", f'echo "$*" >>{calls}\ncase "$*" in *test_kernels_gpu*) sleep 60 ;; esac\nexit 0'
    )
    compiler = script(tmp_path / "nvcc", '[ "$1" = --version ] || sleep 60')
    environment = {**os.environ, "PYTHON": python, "CUDACXX": compiler, "TMPDIR": str(tmp_path)}

    def check() -> tuple[int, str]:
        command = ["bash", str(program), "--out", str(tmp_path / "out"), "--seconds", "10"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, (tmp_path / "out" / "summary.md").read_text()

    code, summary = check()
    assert code == 3
    assert "| build | not decided | its time was over; sm_" in summary
    assert "or bring gpu-bundle |" in summary
    (tmp_path / "gpu-bundle").mkdir()
    (tmp_path / "gpu-bundle" / "libpifa_plugin.so").touch()
    calls.unlink()
    code, summary = check()
    assert code == 3
    assert "the library of gpu-bundle is used |" in summary
    assert "| tests | not decided | its time was over;" in summary
    assert "| whole decoders | not decided | its time was over;" in summary
    assert "| one layer | passed |" in summary
    ran = calls.read_text()
    assert f"perf/bench_linear.py --library {tmp_path}/gpu-bundle/libpifa_plugin.so" in ran
    assert "perf/bench_model.py" not in ran


def test_without_a_gpu_engines_are_not_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = str(tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["check_engine", str(tmp_path), "--library", "lib.so", "--out", out])
    assert check_engine.main() == 3
    assert capsys.readouterr() == ("no GPU: not decided\n", "")
