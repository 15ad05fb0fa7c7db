"""The diagnosis of a machine: packages, GPUs, and what follows from them."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pifa_deploy import doctor
from pifa_deploy.doctor import Capability, diagnose, installed_version, judge, judge_plugin, rows
from pifa_deploy.plugin_build import BuildTools
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
    assert "RTX 4090, compute capability 8.9, driver 580.1, 24564 MiB" in judged["build tensorrt"].reason


@pytest.mark.parametrize(
    ("packages", "gpus", "available", "told"),
    [
        ({}, (), False, ("no NVIDIA GPU found", "use a machine with one and its driver")),
        ({}, (RTX_4090,), True, (f"tensorrt-rtx {ALL['tensorrt_rtx']}, tensorrt {ALL['tensorrt']}; RTX 4090", "")),
        ({}, (ORIN,), True, (f"tensorrt {ALL['tensorrt']}; Orin", "")),
        ({"tensorrt": None}, (ORIN,), False, ("tensorrt missing", "pip install 'pifa-deploy[tensorrt]'")),
        (
            {"tensorrt": None, "tensorrt_rtx": None},
            (RTX_4090,),
            False,
            ("tensorrt_rtx and tensorrt missing", "pip install 'pifa-deploy[rtx]' or 'pifa-deploy[tensorrt]'"),
        ),
        ({}, (LocalGpu(name="old", compute_capability="5.2"),), False, ("no TensorRT serves old", "use a machine")),
    ],
)
def test_an_engine_runs_on_a_gpu_that_an_installed_tensorrt_serves(
    packages: dict[str, None], gpus: tuple[LocalGpu, ...], available: bool, told: tuple[str, str]
) -> None:
    judged = _judged({**ALL, **packages}, *gpus)["run engine"]
    assert judged.available == available
    assert judged.reason.startswith(told[0])
    assert judged.install.startswith(told[1])
    assert bool(judged.install) != available


@pytest.mark.parametrize(
    ("module", "capability", "install"),
    [
        ("transformers", "compress", "pip install 'pifa-deploy'"),
        ("onnxscript", "export", "pip install 'pifa-deploy'"),
        ("onnxruntime", "verify", "pip install 'pifa-deploy[cpu]'"),
        ("tensorrt_rtx", "build tensorrt-rtx", "pip install 'pifa-deploy[rtx]'"),
        ("polygraphy", "build tensorrt-rtx", "pip install 'pifa-deploy[rtx]'"),
        ("tensorrt", "build tensorrt", "pip install 'pifa-deploy[tensorrt]'"),
    ],
)
def test_a_missing_package_is_named_with_its_cure(module: str, capability: str, install: str) -> None:
    judged = _judged({**ALL, module: None}, RTX_4090)[capability]
    assert (judged.available, judged.reason, judged.install) == (False, f"{module} missing", install)


def test_without_a_gpu_rtx_builds_and_tensorrt_does_not() -> None:
    judged = _judged(dict(ALL))
    assert judged["build tensorrt-rtx"].available
    assert not judged["build tensorrt"].available
    assert judged["build tensorrt"].reason == "no NVIDIA GPU found"


@pytest.mark.parametrize(
    ("capability", "reason", "install"),
    [
        ("7.2", "tensorrt does not serve Xavier, compute capability 7.2", "use a machine with a GPU that it serves"),
        (None, "the driver does not tell the capability of Xavier, compute capability unknown", "update the driver"),
    ],
)
def test_a_first_gpu_that_tensorrt_cannot_build_for_is_named(capability: str | None, reason: str, install: str) -> None:
    judged = _judged(dict(ALL), LocalGpu(name="Xavier", compute_capability=capability), RTX_4090)["build tensorrt"]
    assert (judged.available, judged.reason) == (False, reason)
    assert judged.install.startswith(install)


def test_an_orin_builds_with_tensorrt() -> None:
    assert _judged(dict(ALL), ORIN)["build tensorrt"].available


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


@pytest.mark.parametrize(
    ("tools", "available", "words"),
    [
        ({}, True, "/cuda/bin/nvcc, CMake, TensorRT's headers found"),
        ({"headers": False}, True, "CMake, TensorRT's headers by --fetch-headers (1 MB) or --tensorrt-root"),
        ({"cmake": False}, True, "without CMake, TensorRT's headers found"),
        ({"nvcc": None}, False, "nvcc missing; install the CUDA toolkit (12.0 or newer) or set CUDA_HOME"),
        ({"source": False}, False, "its sources are not here; clone the repository and run `pip install -e .` in it"),
    ],
)
def test_building_the_plugin_wants_its_sources_and_nvcc(tools: dict[str, Any], available: bool, words: str) -> None:
    everything = {"nvcc": "/cuda/bin/nvcc", "cmake": True, "headers": True, "source": True}
    found = judge_plugin(BuildTools(**{**everything, **tools}))
    assert (found.name, found.available) == ("build plugin", available)
    assert "; ".join(filter(None, [found.reason, found.install])).endswith(words)


def test_the_plugins_row_stands_behind_the_others() -> None:
    assert diagnose().capabilities[-1].name == "build plugin"
