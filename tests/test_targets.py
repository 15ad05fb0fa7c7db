"""GPUs by name, the backends that serve them, and the GPUs of this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from pifa_deploy import targets
from pifa_deploy.datasheets import DATASHEETS, Datasheet
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


def test_every_target_has_a_datasheet_and_every_figure_a_document() -> None:
    assert set(DATASHEETS) == set(TARGETS)
    for target in TARGETS.values():
        figures = [figure for figure in vars(target.datasheet).values() if figure is not None]
        assert target.datasheet.memory_gb
        assert all(figure.value > 0 and figure.source.startswith("NVIDIA ") for figure in figures), target.name
        assert not any(word in figure.source for figure in figures for word in ("/work", "http", "~"))


def test_a_datasheet_says_where_its_figures_stand() -> None:
    found = TARGETS["rtx4090"].datasheet.to_json()
    assert found["bandwidth_gb_s"] == {
        "value": 1008,
        "source": "NVIDIA Ada GPU Architecture whitepaper v2.1, appendix A",
    }
    assert Datasheet().to_json()["memory_gb"] is None


# Streaming multiprocessors, boost clock in GHz and tensor FLOPs of one in a clock, from the same documents.
@pytest.mark.parametrize(
    ("name", "units", "clock", "rate", "cores"),
    [
        ("xavier-agx", 8, 1.377, 1024, 64),
        ("orin-nano", 8, 1.02, 2048, 128),
        ("orin-nx", 8, 0.918, 2048, 128),
        ("orin-nx-super", 8, 1.173, 2048, 128),
        ("orin-agx", 16, 1.3, 2048, 128),
        ("thor", 20, 1.575, 8192, 128),
        ("rtx2080ti", 68, 1.545, 512, 64),
        ("rtx3060", 28, 1.777, 512, 128),
        ("rtx3080", 68, 1.71, 512, 128),
        ("rtx3090", 82, 1.695, 512, 128),
        ("rtx4060", 24, 2.46, 512, 128),
        ("rtx4070", 46, 2.475, 512, 128),
        ("rtx4090", 128, 2.52, 512, 128),
        ("rtx5070", 48, 2.512, 512, 128),
        ("rtx5080", 84, 2.617, 512, 128),
        ("rtx5090", 170, 2.407, 512, 128),
        ("rtx3060-laptop", 30, 1.703, 512, 128),
        ("rtx3080-laptop", 48, 1.71, 512, 128),
        ("rtx4060-laptop", 24, 2.37, 512, 128),
        ("rtx4070-laptop", 36, 2.175, 512, 128),
        ("a2", 10, 1.77, 1024, 128),
        ("l4", 58, 2.04, 1024, 128),
        ("a6000", 84, 1.8, 1024, 128),
        ("a100", 108, 1.41, 2048, 64),
    ],
)
def test_published_rates_are_those_of_the_units_and_their_clock(
    name: str, units: int, clock: float, rate: int, cores: int
) -> None:
    sheet = TARGETS[name].datasheet
    assert sheet.tensor_tflops
    assert sheet.fp32_tflops
    assert sheet.tensor_tflops.value == pytest.approx(units * clock * rate / 1e3, rel=0.025)
    assert sheet.fp32_tflops.value == pytest.approx(2 * units * clock * cores / 1e3, rel=0.015)


# Width of the memory bus in bits and Gbit/s of each pin.
@pytest.mark.parametrize(
    ("name", "bits", "gbit_s"),
    [
        ("xavier-nx", 128, 3.733),
        ("xavier-agx", 256, 4.267),
        ("orin-nano", 128, 6.4),
        ("orin-nx", 128, 6.4),
        ("orin-nx-super", 128, 6.4),
        ("orin-agx", 256, 6.4),
        ("thor", 256, 8.533),
        ("dgx-spark", 256, 8.533),
        ("rtx2080ti", 352, 14),
        ("rtx3060", 192, 15),
        ("rtx3080", 320, 19),
        ("rtx3090", 384, 19.5),
        ("rtx4060", 128, 17),
        ("rtx4070", 192, 21),
        ("rtx4090", 384, 21),
        ("rtx5070", 192, 28),
        ("rtx5080", 256, 30),
        ("rtx5090", 512, 28),
        ("rtx2080-laptop", 256, 14),
        ("a2", 128, 12.5),
        ("l4", 192, 12.5),
        ("a6000", 384, 16),
    ],
)
def test_published_bandwidths_are_those_of_the_bus_and_its_clock(name: str, bits: int, gbit_s: float) -> None:
    bandwidth = TARGETS[name].datasheet.bandwidth_gb_s
    assert bandwidth
    assert bandwidth.value == pytest.approx(bits * gbit_s / 8, rel=0.005)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_sparse_rates_are_twice_dense_ones_and_start_with_ampere(name: str) -> None:
    sheet, capability = TARGETS[name].datasheet, float(TARGETS[name].compute_capability)
    assert (sheet.sparse_tflops is None) == (sheet.tensor_tflops is None or capability < 8)
    if sheet.sparse_tflops and sheet.tensor_tflops:
        assert sheet.sparse_tflops.value == pytest.approx(2 * sheet.tensor_tflops.value, rel=0.005)


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
