"""GPUs by name, the backends that serve them, and the GPUs of this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from pifa_deploy import targets
from pifa_deploy.errors import ExitCode, MisfitError
from pifa_deploy.targets import RTX, TARGETS, TENSORRT, LocalGpu, capabilities, local_gpus, targets_named


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("xavier-agx", "7.2"),
        ("orin-nano", "8.7"),
        ("thor", "11.0"),
        ("dgx-spark", "12.1"),
        ("rtx2080ti", "7.5"),
        ("rtx3060", "8.6"),
        ("rtx4090", "8.9"),
        ("rtx5090", "12.0"),
        ("l4", "8.9"),
        ("a2", "8.6"),
        ("a100", "8.0"),
        ("h200", "9.0"),
        ("b200", "10.0"),
    ],
)
def test_a_target_has_its_compute_capability(name: str, capability: str) -> None:
    assert TARGETS[name].compute_capability == capability
    assert TARGETS[name].name == name


def test_names_are_found_whatever_their_case_and_hyphens() -> None:
    found = targets_named(["RTX 4090", "Orin_Nano", "orinagx"])
    assert [target.name for target in found] == ["rtx4090", "orin-nano", "orin-agx"]


def test_an_unknown_name_lists_near_matches() -> None:
    with pytest.raises(ValueError, match=r"target 'rtx4900' is unknown; did you mean .*rtx4090"):
        targets_named(["rtx4900"])
    with pytest.raises(ValueError, match=r"known targets: xavier-nx, .*--compute-capabilities"):
        targets_named(["zzzzzz"])


def test_capabilities_are_ascending_numbers_without_repetition() -> None:
    assert capabilities(["rtx5090", "rtx4090", "l4"], ["8.6", "8.9"]) == ("8.6", "8.9", "12.0")
    assert capabilities() == ()


@pytest.mark.parametrize("written", ["sm86", "86", "8.66", "8", "8.6 ", "-8.6"])
def test_a_capability_written_otherwise_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r"compute capability is .*, expected major\.minor"):
        capabilities((), [written])


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'trt', expected one of tensorrt-rtx, tensorrt"):
        capabilities(["l4"], backend="trt")


@pytest.mark.parametrize("name", ["orin-nano", "orin-nx", "orin-agx", "thor", "h100", "h200", "b200"])
def test_rtx_refuses_what_it_does_not_serve_and_names_who_does(name: str) -> None:
    with pytest.raises(
        MisfitError, match=r"which tensorrt-rtx does not serve .* --backend tensorrt on the device"
    ) as e:
        capabilities([name])
    assert TARGETS[name].title in str(e.value)
    assert e.value.exit_code is ExitCode.MISFIT
    assert capabilities([name], backend=TENSORRT) == (TARGETS[name].compute_capability,)
    assert TARGETS[name].flavours == (TENSORRT,)


def test_a_target_that_nobody_serves_is_refused_by_both() -> None:
    for backend in (RTX, TENSORRT):
        with pytest.raises(MisfitError, match=r"7\.2, which .* does not serve .*no backend of this program does"):
            capabilities(["xavier-agx"], backend=backend)


def test_a_capability_nobody_has_heard_of_is_a_misfit() -> None:
    with pytest.raises(MisfitError, match=r"^compute capability 8\.8, which tensorrt-rtx does not serve"):
        capabilities((), ["8.8"])


def _smi(monkeypatch: pytest.MonkeyPatch, answer: str | Exception) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, 0, stdout=answer, stderr="")

    monkeypatch.setattr(subprocess, "run", run)


def test_nvidia_smi_names_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    _smi(monkeypatch, "NVIDIA GeForce RTX 4090, 8.9, 580.65.06, 24564\nNVIDIA L4, 8.9, 580.65.06, 23034\n")
    first, second = local_gpus()
    assert first == LocalGpu(
        name="NVIDIA GeForce RTX 4090", compute_capability="8.9", driver="580.65.06", memory_mib=24564
    )
    assert second.name == "NVIDIA L4"


def test_a_jetson_is_known_from_its_device_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    monkeypatch.setattr(targets, "_DEVICE_TREE_MODEL", model)
    for answer in (FileNotFoundError("nvidia-smi"), "Orin (nvgpu), [N/A], [N/A], [N/A]\n"):
        _smi(monkeypatch, answer)
        assert local_gpus() == (LocalGpu(name="NVIDIA Jetson Orin Nano Developer Kit", compute_capability="8.7"),)


@pytest.mark.parametrize(
    "answer", [FileNotFoundError("no"), subprocess.TimeoutExpired("nvidia-smi", 20), "No devices\n"]
)
def test_a_machine_without_a_gpu_has_none(
    answer: str | Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(targets, "_DEVICE_TREE_MODEL", tmp_path / "nothing")
    _smi(monkeypatch, answer)
    assert local_gpus() == ()
