"""What a GPU says about itself, as far as that can be checked without one, and what a Jetson prints."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pifa_deploy.energy import counter_meter, joules_per_launch, rail_meter
from pifa_deploy.gpu_state import SLOWDOWNS, GpuState, _look, gpu_reader, slowdowns
from pifa_deploy.jetson import PowerLog, module_w, power_mode, rails_w, read_power_mode

# Samples as NVIDIA documents them: Jetson Linux Developer Guide, Tegrastats Utility; the rails of an Orin NX, of an AGX
# Orin, and of a Jetson Nano in the older format.
ORIN_NX = (
    "01-01-2023 12:00:00 RAM 2448/15817MB (lfb 2x4MB) SWAP 0/7908MB (cached 0MB) CPU [1%@1190,0%@1190,2%@1190,0%@1190] "
    "EMC_FREQ 0%@2133 GR3D_FREQ 0%@[305,0] CPU@46.3C GPU@45.1C VDD_IN 5024mW/4998mW VDD_CPU_GPU_CV 520mW/510mW "
    "VDD_SOC 1441mW/1440mW"
)
AGX_ORIN = (
    "RAM 5391/30697MB (lfb 5x4MB) SWAP 0/15348MB (cached 0MB) CPU [0%@729,0%@729] GR3D_FREQ 0% GPU@41.9C "
    "VDD_GPU_SOC 2400mW/2400mW VDD_CPU_CV 400mW/400mW VIN_SYS_5V0 2817mW/2817mW"
)
NANO = "RAM 1216/3964MB (lfb 330x4MB) CPU [2%@102,0%@102] thermal@33C POM_5V_IN 1532/1532 POM_5V_GPU 0/0"
NVPMODEL = "NV Power Mode: MODE_30W\n2\n"


def test_only_reasons_that_slow_a_gpu_down_are_told() -> None:
    assert slowdowns(0x01 | 0x02) == ()  # idle, clocks set by somebody
    assert slowdowns(0x04 | 0x40) == ("software power cap", "hardware thermal slowdown")
    assert slowdowns(None) == ()


def test_the_bits_are_those_of_nvml() -> None:
    nvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: pip install nvidia-ml-py")
    names = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
    assert list(SLOWDOWNS) == [getattr(nvml, f"nvmlClocksEventReason{name}") for name in names]


def test_a_machine_without_a_gpu_has_nothing_to_look_at() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with gpu_reader() as look:
        assert look is None


@pytest.mark.gpu
def test_a_gpu_is_looked_at() -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: pip install nvidia-ml-py")
    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")
    with gpu_reader() as look:
        assert look is not None
        found = look()
    assert found.name in torch.cuda.get_device_name()
    assert found.sm_mhz


class Nvml:
    """NVML of an old driver on a board that measures no energy: units as in NVML's documentation."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetName(self, handle: object) -> bytes:
        return b"Tesla T4"

    def nvmlDeviceGetClockInfo(self, handle: object, kind: int) -> int:
        return {1: 1590, 2: 5000}[kind]

    def nvmlDeviceGetMaxClockInfo(self, handle: object, kind: int) -> int:
        return 1590

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: object) -> int:
        return 68500

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: object) -> int:
        return 0x04

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[Any]:
        return [SimpleNamespace(pid=os.getpid()), SimpleNamespace(pid=-1)]

    def __getattr__(self, name: str) -> Any:
        def unsupported(handle: object) -> None:
            raise self.NVMLError("Not Supported")

        return unsupported


def test_units_are_turned_and_what_a_driver_does_not_tell_is_none() -> None:
    found = _look(Nvml(), None)
    assert (found.name, found.sm_mhz, found.memory_mhz, found.temperature_c) == ("Tesla T4", 1590, 5000, 61)
    assert found.power_w == 68.5
    assert (found.power_limit_w, found.energy_j) == (None, None)
    assert found.slowdowns == ("software power cap",)
    assert found.other_processes == 1
    assert found.to_json()["slowdowns"] == ["software power cap"]


def test_rails_are_read_and_the_input_rail_is_the_module() -> None:
    assert rails_w(ORIN_NX) == {"VDD_IN": 5.024, "VDD_CPU_GPU_CV": 0.52, "VDD_SOC": 1.441}
    assert module_w(ORIN_NX) == 5.024
    assert module_w(NANO) == 1.532


def test_a_board_without_an_input_rail_is_the_sum_of_its_rails() -> None:
    assert module_w(AGX_ORIN) == pytest.approx(2.4 + 0.4 + 2.817)


@pytest.mark.parametrize("line", ["", "RAM 5391/30697MB (lfb 5x4MB) GPU@41.9C", "Unknown option"])
def test_a_line_without_power_has_none(line: str) -> None:
    assert module_w(line) is None


def test_the_power_mode_is_read() -> None:
    assert power_mode(NVPMODEL) == "MODE_30W"
    assert power_mode("nvpmodel: command failed") is None
    assert read_power_mode((sys.executable, "-c", f"print({NVPMODEL!r})")) == "MODE_30W"
    assert read_power_mode((sys.executable, "-c", "raise SystemExit(1)")) is None
    assert read_power_mode(("no-such-program",)) is None


PRINT = """
import itertools, sys, time
for line in itertools.cycle(sys.argv[1:]):
    print(line, flush=True)
    time.sleep(0.02)
"""


def tegrastats(*lines: str) -> tuple[str, ...]:
    """Returns a command that prints these lines again and again, every 20 ms."""
    return (sys.executable, "-c", PRINT, *lines)


class Sleep:
    """A timed call that sleeps."""

    def __init__(self) -> None:
        self.launches = 0

    def launch(self) -> None:
        self.launches += 1
        time.sleep(0.01)

    def wait(self) -> None: ...

    def gpu_ms(self) -> float | None:
        return None

    def close(self) -> None: ...


def test_joules_of_a_launch_are_mean_power_times_its_time() -> None:
    call = Sleep()
    started = time.perf_counter()
    joules = joules_per_launch(call, rail_meter(tegrastats(ORIN_NX)), 0.8)
    per_launch = (time.perf_counter() - started) / call.launches
    assert joules is not None
    assert 5.024 * 0.01 <= joules <= 5.024 * per_launch


def test_the_reader_of_the_rails_ends_with_its_block() -> None:
    with PowerLog(tegrastats(AGX_ORIN)) as log:
        start = time.perf_counter()
        time.sleep(0.5)
        end = time.perf_counter()
    assert log._process.returncode is not None
    assert log.energy_j(start, end) == pytest.approx(5.617 * (end - start))
    assert log.energy_j(end + 1, end + 2) is None


def test_without_tegrastats_there_are_no_joules() -> None:
    assert joules_per_launch(Sleep(), rail_meter(("no-such-program",)), 0.01) is None


def test_a_gpus_own_counter_is_read_before_and_after() -> None:
    call = Sleep()
    meter = counter_meter(lambda: GpuState(name="GPU", energy_j=1000 + 2.5 * call.launches))
    assert joules_per_launch(call, meter, 0.05) == pytest.approx(2.5)
    assert joules_per_launch(call, counter_meter(lambda: GpuState(name="GPU")), 0.01) is None
