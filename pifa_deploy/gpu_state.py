"""The state of an NVIDIA GPU while it is measured: clocks, temperature, power, why it slows down, who else uses it.

Through NVML (package nvidia-ml-py, module pynvml, from the driver's own library):
https://docs.nvidia.com/deploy/nvml-api/. A Jetson has no NVML for its GPU, see `jetson`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

# NVML's nvmlClocksEventReasons: bit -> what it says. Idle and clocks that were set by somebody are no slowdown.
SLOWDOWNS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """One look at a GPU; None where the driver does not tell.

    Attributes:
        name: product name.
        sm_mhz: clock of the multiprocessors.
        memory_mhz: clock of the memory.
        max_sm_mhz: highest clock of the multiprocessors.
        temperature_c: degrees Celsius.
        power_w: watts now.
        power_limit_w: watts that it may take.
        energy_j: joules since the driver was loaded.
        event_reasons: NVML's bits of what holds the clocks down.
        other_processes: compute processes on it that are not this one.
    """

    name: str
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    max_sm_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None
    event_reasons: int | None = None
    other_processes: int | None = None

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


@contextlib.contextmanager
def gpu_reader(device: int = 0) -> Iterator[Callable[[], GpuState] | None]:
    """Yields a function that looks at the GPU that CUDA numbers `device`; None without a GPU, NVML or nvidia-ml-py."""
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
            look = functools.partial(_look, pynvml, handle)
    try:
        yield look
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _handle(nvml: Any, device: int) -> Any:
    """Returns NVML's handle of a CUDA device: the two number GPUs differently, so that the UUID decides."""
    properties: Any = torch.cuda.get_device_properties(device)
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")


def _look(nvml: Any, handle: Any) -> GpuState:
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
        other_processes=None if processes is None else sum(one.pid != os.getpid() for one in processes),
    )
