"""The state of an NVIDIA GPU while it is measured: clocks, temperature, power, why it slows down, who else uses it.

Through NVML (package nvidia-ml-py, module pynvml, from the driver's own library):
https://docs.nvidia.com/deploy/nvml-api/. On a Jetson, where NVML tells little or nothing, from `jetson`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from pifa_deploy import jetson

# NVML's nvmlClocksEventReasons: bit -> what it says. Idle and clocks that were set by somebody are no slowdown.
SLOWDOWNS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
# NVML's nvmlPerfPolicyType_t: number -> what held the clocks below those that applications asked for.
VIOLATIONS = {0: "power limit", 1: "thermal limit", 3: "board limit", 5: "reliability limit"}
_EVENTS = {"oc1": "under-voltage", "oc2": "average over-current", "oc3": "instantaneous over-current"}
_LEAST_S = 1e-3
# Slow enough to leave the processors to what is measured: the last line is never older than this.
_TEGRASTATS = ("tegrastats", "--interval", "500")
# The first PID namespace of a system has this number in all kernels (PROC_PID_INIT_INO).
_FIRST_NAMESPACE = "pid:[4026531836]"
Look = Callable[[], "GpuState"]


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """One look at a GPU; None where the driver does not tell.

    Attributes:
        name: product name.
        sm_mhz: clock of the multiprocessors.
        memory_mhz: clock of the memory.
        max_sm_mhz: highest clock of the multiprocessors.
        temperature_c: degrees Celsius.
        power_w: watts now; on a Jetson of the module.
        power_limit_w: watts that it may take.
        energy_j: joules since the driver was loaded.
        event_reasons: NVML's bits of what holds the clocks down.
        other_processes: compute processes on it that are not this one.
        held_down_s: of VIOLATIONS -> seconds since the driver was loaded.
        over_current_events: of a Jetson, see `jetson.over_current_events`.
    """

    name: str
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    max_sm_mhz: int | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    event_reasons: int | None = None
    other_processes: int | None = None
    held_down_s: Mapping[str, float] | None = None
    over_current_events: Mapping[str, int] | None = None

    @property
    def slowdowns(self) -> tuple[str, ...]:
        """What holds the clocks down now, in words."""
        return slowdowns(self.event_reasons)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return {**asdict(self), "slowdowns": list(self.slowdowns)}


def slowdowns(event_reasons: int | None) -> tuple[str, ...]:
    """Returns in words which of NVML's clocks event reasons mean that the GPU is slower than it could be."""
    return tuple(text for bit, text in SLOWDOWNS.items() if (event_reasons or 0) & bit)


def held_down(before: GpuState | None, after: GpuState) -> tuple[str, ...]:
    """Returns in words what holds the clocks down now or did so since an earlier look, however short."""
    found = list(after.slowdowns)
    if before is not None:
        seconds = _increase(before.held_down_s, after.held_down_s)
        found += [f"{reason} for {value:.3g} s" for reason, value in seconds.items() if value >= _LEAST_S]
        events = _increase(before.over_current_events, after.over_current_events)
        found += [f"{_EVENTS.get(name, name)} {value:.0f} times" for name, value in events.items() if value > 0]
    return tuple(found)


def _increase(first: Mapping[str, float] | None, last: Mapping[str, float] | None) -> dict[str, float]:
    return {name: value - first[name] for name, value in (last or {}).items() if first and name in first}


@contextlib.contextmanager
def gpu_reader(device: int = 0, *, processes_before: Collection[int] | None = None) -> Iterator[Look | None]:
    """Yields a function that looks at the GPU that CUDA numbers `device`; None without a GPU, or where nothing tells.

    Args:
        device: number of CUDA's.
        processes_before: see `gpu_processes`.
    """
    with nvml_reader(device, processes_before) as nvml, board_reader(device) as board:
        yield (lambda: filled(nvml(), board())) if nvml and board else nvml or board


def filled(state: GpuState, other: GpuState) -> GpuState:
    """Returns a state with what it leaves open taken from another look at the same GPU."""
    empty = [field.name for field in fields(state) if getattr(state, field.name) is None]
    return replace(state, **{name: getattr(other, name) for name in empty})


@contextlib.contextmanager
def board_reader(device: int = 0, command: Sequence[str] = _TEGRASTATS) -> Iterator[Look | None]:
    """Yields a function that looks at a Jetson's GPU through tegrastats, which runs meanwhile; None without it."""
    if shutil.which(command[0]) is None:
        yield None
        return
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "Jetson"
    with jetson.TegrastatsLog(command) as log:
        yield lambda: _look_at_board(name, log.last_line())


def _look_at_board(name: str, line: str) -> GpuState:
    return GpuState(
        name=name,
        sm_mhz=jetson.gpu_mhz(line),
        memory_mhz=jetson.memory_mhz(line),
        temperature_c=jetson.temperature_c(line),
        power_w=jetson.module_w(line),
        over_current_events=jetson.over_current_events() or None,
    )


def gpu_processes() -> frozenset[int] | None:
    """Returns the numbers of all processes on any GPU; None where NVML does not tell.

    Asked before this process uses a GPU: in a container NVML counts the processes of the host, by the host's numbers,
    so that this one is known only by having come since.
    """
    try:
        import pynvml
    except ImportError:
        return None
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(place) for place in range(pynvml.nvmlDeviceGetCount())]
            found = [pynvml.nvmlDeviceGetComputeRunningProcesses(handle) for handle in handles]
        finally:
            pynvml.nvmlShutdown()
        return frozenset(one.pid for each in found for one in each)
    return None


def count_others(
    processes: Collection[int], before: Collection[int] | None, *, own: int, same_numbers: bool
) -> int | None:
    """Returns how many processes are not this one; None where that cannot be told.

    Args:
        processes: on the GPU now, as NVML numbers them.
        before: those before this one used it, see `gpu_processes`.
        own: number of this one, as it knows it.
        same_numbers: whether NVML numbers processes like this one does: outside containers.
    """
    if own in processes or same_numbers:
        return len(set(processes) - {own})
    return None if before is None else len(processes) - bool(set(processes) - set(before))


def _outside_containers() -> bool:
    try:
        return os.readlink("/proc/self/ns/pid") == _FIRST_NAMESPACE
    except OSError:
        return False


@contextlib.contextmanager
def nvml_reader(device: int = 0, processes_before: Collection[int] | None = None) -> Iterator[Look | None]:
    """Yields a function that looks at a GPU through NVML; None without a GPU, NVML or nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    look = None
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        if torch.cuda.is_available():
            handle = _handle(pynvml, device)
            look = functools.partial(_look, pynvml, handle, processes_before)
    try:
        yield look
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _handle(nvml: Any, device: int) -> Any:
    """Returns NVML's handle of a CUDA device: the two number GPUs differently, so that the UUID decides."""
    properties: Any = torch.cuda.get_device_properties(device)
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")


def _look(nvml: Any, handle: Any, processes_before: Collection[int] | None = None) -> GpuState:
    def ask(function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(handle, *arguments)
        except nvml.NVMLError:
            return None

    milliwatts, limit = ask("nvmlDeviceGetPowerUsage"), ask("nvmlDeviceGetEnforcedPowerLimit")
    millijoules = ask("nvmlDeviceGetTotalEnergyConsumption")
    processes = ask("nvmlDeviceGetComputeRunningProcesses")
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:  # drivers before 535
        reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    statuses = {reason: ask("nvmlDeviceGetViolationStatus", policy) for policy, reason in VIOLATIONS.items()}
    held = {reason: status.violationTime / 1e9 for reason, status in statuses.items() if status is not None}
    name = ask("nvmlDeviceGetName")
    return GpuState(
        name=name.decode() if isinstance(name, bytes) else str(name),
        sm_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        memory_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        max_sm_mhz=ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        temperature_c=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        power_w=None if milliwatts is None else milliwatts / 1e3,
        power_limit_w=None if limit is None else limit / 1e3,
        energy_j=None if millijoules is None else millijoules / 1e3,
        event_reasons=reasons,
        other_processes=None if processes is None else _others([one.pid for one in processes], processes_before),
        held_down_s=held or None,
    )


def _others(processes: Collection[int], before: Collection[int] | None) -> int | None:
    return count_others(processes, before, own=os.getpid(), same_numbers=_outside_containers())
