"""What a GPU says about itself, as far as that can be checked without one, and what a Jetson prints."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pifa_deploy.energy import counter_meter, joules_per_launch, rail_meter
from pifa_deploy.gpu_state import (
    SLOWDOWNS,
    VIOLATIONS,
    GpuState,
    _look,
    board_reader,
    count_others,
    filled,
    gpu_processes,
    gpu_reader,
    held_down,
    slowdowns,
)
from pifa_deploy.jetson import (
    TegrastatsLog,
    gpu_mhz,
    memory_mhz,
    module_w,
    over_current_events,
    power_mode,
    rails_w,
    read_power_mode,
    temperature_c,
)

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
# Lines of a Thor under Jetson Linux 39, busy and idle, as a public test of a tegrastats parser has them.
THOR = (
    "08-08-2026 21:00:39 RAM 8353/125749MB (lfb 31x4MB) CPU [90%@2601,75%@2601,off,7%@2601] EMC_FREQ 34%@4266 "
    "GR3D_FREQ 87%@[1574,1574,1574] NVENC0_FREQ @1691 VIC off cpu@58.25C/61.75C tj@66.625C/66.625C gpu@56.937C/66.625C "
    "VDD_GPU 37939mW/8660mW/37939mW VDD_CPU_SOC_MSS 30059mW/12281mW/30059mW VIN_SYS_5V0 15486mW/7424mW/15486mW "
    "VIN 124486mW/36487mW/124486mW"
)
THOR_IDLE = (
    "RAM 3429/125749MB (lfb 120x4MB) CPU [0%,5%,off]@2601 EMC_FREQ @4266 GR3D_FREQ @[1574,1574,1574] cpu@49.75C/49.75C "
    "tj@51.218C/51.218C VDD_GPU 6330mW/6330mW/6330mW VIN 28906mW/14453mW/28906mW"
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
    names = ("POWER", "THERMAL", "BOARD_LIMIT", "RELIABILITY")
    assert list(VIOLATIONS) == [getattr(nvml, f"NVML_PERF_POLICY_{name}") for name in names]


def test_a_machine_without_a_gpu_has_nothing_to_look_at() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with gpu_reader() as look:
        assert look is None
    assert gpu_processes() is None


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
    assert found.held_down_s is None or found.held_down_s.keys() <= set(VIOLATIONS.values())


@pytest.mark.gpu
def test_this_process_is_not_another_one_on_the_gpu() -> None:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: pip install nvidia-ml-py")
    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")
    program = (
        "import torch\nfrom pifa_deploy.gpu_state import gpu_processes, gpu_reader\nseen = gpu_processes()\n"
        "held = torch.ones(1, device='cuda')\nwith gpu_reader(processes_before=seen) as look:\n"
        "    print(look().other_processes, len(seen))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    others, before = map(int, done.stdout.split())
    assert others <= before


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

    def nvmlDeviceGetViolationStatus(self, handle: object, policy: int) -> Any:
        if policy != 0:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(referenceTime=1, violationTime=2_500_000_000)

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
    assert found.held_down_s == {"power limit": 2.5}
    assert found.to_json()["slowdowns"] == ["software power cap"]


# own, processes now, before (None: not asked), the same numbers -> others
@pytest.mark.parametrize(
    ("own", "now", "before", "same", "others"),
    [
        (7, (7, 9), (9,), True, 1),
        (7, (9,), (9,), True, 1),  # not on the GPU itself
        (7, (4711, 99), (99,), False, 1),  # in a container: 4711 came with this one
        (7, (4711,), (), False, 0),
        (7, (99,), (99,), False, 1),  # the driver does not show this one
        (7, (), (), False, 0),
        (7, (4711, 99), None, False, None),
        (7, (7, 9), None, False, 1),
    ],
)
def test_other_processes_are_told_from_this_one_in_a_container_too(
    own: int, now: tuple[int, ...], before: tuple[int, ...] | None, same: bool, others: int | None
) -> None:
    assert count_others(now, before, own=own, same_numbers=same) == others


def state(**values: Any) -> GpuState:
    return GpuState(name="GPU", **values)


def test_what_held_the_clocks_down_between_two_looks_is_told() -> None:
    before = state(held_down_s={"power limit": 2.5, "thermal limit": 1.0}, over_current_events={"oc1": 0, "oc3": 40})
    after = state(held_down_s={"power limit": 2.81, "thermal limit": 1.0}, over_current_events={"oc1": 0, "oc3": 52})
    assert held_down(before, after) == ("power limit for 0.31 s", "instantaneous over-current 12 times")
    assert held_down(before, before) == ()
    assert held_down(None, after) == held_down(state(), after) == held_down(before, state()) == ()
    assert held_down(state(), state(event_reasons=0x04)) == ("software power cap",)


def test_what_one_source_leaves_open_comes_from_the_other() -> None:
    found = filled(state(sm_mhz=0, power_w=None), GpuState(name="Orin", sm_mhz=306, power_w=5.0, temperature_c=45.1))
    assert found == state(sm_mhz=0, power_w=5.0, temperature_c=45.1)


@pytest.mark.parametrize(
    ("line", "gpu", "memory", "temperature"),
    [
        (ORIN_NX, 305, 2133, 45.1),
        (AGX_ORIN, None, None, 41.9),
        (THOR, 1574, 4266, 56.937),
        (THOR_IDLE, 1574, 4266, 51.218),  # without power the GPU's own sensor is not there
        (NANO, None, None, None),
        ("EMC_FREQ @2133 GR3D_FREQ 0%@1109 APE 245 GPU@30.5C tj@41C", 1109, 2133, 30.5),
        ("GR3D_FREQ @[300,off,600] gpu@-256C tj@44.5C", 600, None, 44.5),
        ("GR3D_FREQ 0%@[0,0] gpu@45C", 0, None, 45.0),
        ("GR3D_FREQ @[off,off] CPU@31.5C", None, None, None),
        ("", None, None, None),
    ],
)
def test_clocks_and_temperature_are_read_from_tegrastats(
    line: str, gpu: int | None, memory: int | None, temperature: float | None
) -> None:
    assert (gpu_mhz(line), memory_mhz(line), temperature_c(line)) == (gpu, memory, temperature)


def test_the_whole_board_of_a_thor_is_its_rail_vin() -> None:
    assert rails_w(THOR) == {"VDD_GPU": 37.939, "VDD_CPU_SOC_MSS": 30.059, "VIN_SYS_5V0": 15.486, "VIN": 124.486}
    assert module_w(THOR) == 124.486
    assert module_w(THOR_IDLE) == 28.906


def test_over_current_events_are_read_from_sysfs(tmp_path: Path) -> None:
    assert over_current_events(tmp_path / "absent") == {}
    files = {"oc1_event_cnt": "0\n", "oc3_event_cnt": "27390\n", "oc2_event_cnt": "", "oc1_throt_en": "1\n"}
    (tmp_path / "hwmon3").mkdir()
    for name, text in files.items():
        (tmp_path / "hwmon3" / name).write_text(text)
    assert over_current_events(tmp_path) == {"oc1": 0, "oc3": 27390}


def test_a_jetson_is_looked_at_through_tegrastats() -> None:
    with board_reader(command=tegrastats(ORIN_NX)) as look:
        assert look is not None
        found = look()
    assert (found.sm_mhz, found.memory_mhz, found.temperature_c, found.power_w) == (305, 2133, 45.1, 5.024)
    with board_reader(command=("no-such-program",)) as look:
        assert look is None


def test_a_tegrastats_that_says_nothing_tells_nothing() -> None:
    with TegrastatsLog((sys.executable, "-c", "")) as log:
        assert log.last_line(threading.TIMEOUT_MAX) == ""  # returns where nothing will come any more


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

    waits = True

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


def test_a_tegrastats_that_starts_slowly_costs_no_joules() -> None:
    slow = (sys.executable, "-c", f"import time\ntime.sleep(1)\n{PRINT}", ORIN_NX)
    assert joules_per_launch(Sleep(), rail_meter(slow), 0.5) is not None


def test_the_reader_of_the_rails_ends_with_its_block() -> None:
    with TegrastatsLog(tegrastats(AGX_ORIN)) as log:
        log.last_line()
        start, before = time.perf_counter(), len(log._watts)
        while len(log._watts) < before + 2:  # the first may have been read before
            time.sleep(0.01)
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
