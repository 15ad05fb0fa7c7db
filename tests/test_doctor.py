"""The diagnosis of a machine: packages, GPUs, and what follows from them."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pifa_deploy import doctor
from pifa_deploy.doctor import Capability, diagnose, installed_version, judge, rows
from pifa_deploy.targets import LocalGpu

ALL = dict.fromkeys(doctor._DISTRIBUTIONS, "1.0")
RTX_4090 = LocalGpu(name="RTX 4090", compute_capability="8.9", driver="580.1", memory_mib=24564)
ORIN = LocalGpu(name="Orin", compute_capability="8.7")


def _judged(packages: dict[str, str | None], *gpus: LocalGpu) -> dict[str, Capability]:
    return {each.name: each for each in judge(packages, gpus)}


def test_the_diagnosis_of_this_machine_is_json_and_tables() -> None:
    diagnosis = diagnose()
    value = json.loads(json.dumps(diagnosis.to_json()))
    assert value["packages"]["torch"] == importlib.metadata.version("torch")
    assert value["python"] == ".".join(map(str, sys.version_info[:3]))
    assert [each["name"] for each in value["capabilities"]][:3] == ["compress", "export", "verify"]
    found, able = rows(diagnosis)
    assert ("torch", importlib.metadata.version("torch")) in found
    assert any(name == "GPU" for name, _ in found)
    assert all(state in ("yes", "no") and (state == "yes") == (install == "") for _, state, _, install in able)


def test_with_everything_on_a_served_gpu_all_is_possible() -> None:
    judged = _judged(dict(ALL), RTX_4090)
    assert all(each.available for each in judged.values())
    assert "RTX 4090, compute capability 8.9, driver 580.1, 24564 MiB" in judged["run tensorrt-rtx engine"].reason


@pytest.mark.parametrize(
    ("module", "capability", "install"),
    [
        ("transformers", "compress", "pip install 'pifa-deploy'"),
        ("onnxscript", "export", "pip install 'pifa-deploy'"),
        ("onnxruntime", "verify", "pip install 'pifa-deploy[cpu]'"),
        ("tensorrt_rtx", "build tensorrt-rtx", "pip install 'pifa-deploy[rtx]'"),
        ("polygraphy", "build tensorrt-rtx", "pip install 'pifa-deploy[rtx]'"),
        ("tensorrt", "build tensorrt", "pip install 'pifa-deploy[tensorrt]'"),
        ("tensorrt", "run tensorrt engine", "pip install 'pifa-deploy[tensorrt]'"),
    ],
)
def test_a_missing_package_is_named_with_its_cure(module: str, capability: str, install: str) -> None:
    judged = _judged({**ALL, module: None}, RTX_4090)[capability]
    assert (judged.available, judged.reason, judged.install) == (False, f"{module} missing", install)


def test_without_a_gpu_rtx_builds_and_nothing_runs() -> None:
    judged = _judged(dict(ALL))
    assert judged["build tensorrt-rtx"].available
    for name in ("build tensorrt", "run tensorrt engine", "run tensorrt-rtx engine"):
        assert not judged[name].available
        assert judged[name].reason == "no NVIDIA GPU found"


def test_an_orin_runs_tensorrt_and_not_rtx() -> None:
    judged = _judged(dict(ALL), ORIN)
    assert judged["run tensorrt engine"].available
    rtx = judged["run tensorrt-rtx engine"]
    assert not rtx.available
    assert rtx.reason == "tensorrt-rtx does not serve Orin, compute capability 8.7"
    assert "--backend tensorrt" in rtx.install


def test_a_torch_without_cuda_does_not_run_engines() -> None:
    judged = _judged({**ALL, "torch": "2.13.0+cpu"}, RTX_4090)["run tensorrt-rtx engine"]
    assert (judged.available, judged.reason) == (False, "torch 2.13.0+cpu has no CUDA")


def test_a_folder_named_like_a_package_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_library").mkdir()
    (tmp_path / "without_metadata.py").write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert installed_version("no_such_library", ("no-such-library",)) is None
    assert installed_version("without_metadata", ("without-metadata",)) == "unknown"


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, pifa_deploy.doctor as d; d.diagnose(); heavy = {'torch', 'transformers', 'onnx', 'polygraphy'}; "
        "print(sorted((heavy | {'tensorrt_rtx', 'tensorrt'}) & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
