"""What a measurement ran on: processor, memory, GPUs, versions, and how busy the machine was meanwhile."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pifa_deploy import __version__
from pifa_deploy.doctor import diagnose
from pifa_deploy.jetson import read_power_mode

_CPUINFO = Path("/proc/cpuinfo")
_STAT = Path("/proc/stat")
_MEMINFO = Path("/proc/meminfo")
# Of the first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal (proc(5)).
_BUSY = (0, 1, 2, 5, 6)
_STEAL = 7
# Processors that others may keep busy before a measurement on a CPU is called disturbed.
BUSY_CPUS = 0.1


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A machine; nothing in it names the machine itself or its user.

    Attributes:
        machine: operating system and architecture.
        cpu: model name of the processor, "unknown" where the system does not tell.
        cores: processors of the machine.
        usable_cores: those that this process may use.
        memory_bytes: of the machine, None where the system does not tell.
        gpus: name, compute capability, driver and memory of each NVIDIA GPU.
        driver: of the first GPU.
        power_mode: nvpmodel's on a Jetson.
        packages: module -> version of what is installed.
    """

    machine: str
    cpu: str
    cores: int
    usable_cores: int
    memory_bytes: int | None
    gpus: tuple[Mapping[str, Any], ...]
    driver: str | None
    power_mode: str | None
    packages: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


def this_environment() -> Environment:
    """Looks at this machine; what it does not tell is None or "unknown"."""
    found = diagnose()
    versions = {name: version for name, version in found.packages.items() if version is not None}
    return Environment(
        machine=found.platform,
        cpu=cpu_name(_text(_CPUINFO)) or platform.processor() or "unknown",
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        memory_bytes=memory_bytes(_text(_MEMINFO)),
        gpus=tuple(asdict(gpu) for gpu in found.gpus),
        driver=found.gpus[0].driver if found.gpus else None,
        power_mode=read_power_mode(),
        packages={"pifa_deploy": __version__, "python": found.python, **versions},
    )


def usable_cores() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name(cpuinfo: str) -> str | None:
    """Returns the processor in the text of /proc/cpuinfo; Arm kernels give "Model" or nothing at all."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model") and value.strip():
            return value.strip()
    return None


def memory_bytes(meminfo: str) -> int | None:
    """Returns the memory in the text of /proc/meminfo."""
    fields = [line.split() for line in meminfo.splitlines() if line.startswith("MemTotal:")]
    return int(fields[0][1]) * 1024 if fields else None


@dataclass(frozen=True, kw_only=True)
class Load:
    """How busy the machine was.

    Attributes:
        load_average: of the last minute, at the start; None where the system does not tell.
        other_cpus: processors that other processes kept busy on average, None where the system does not tell.
        stolen_cpus: processors that the hypervisor took away on average.
    """

    load_average: float | None
    other_cpus: float | None
    stolen_cpus: float | None

    def disturbances(self, *, on_gpu: bool = False) -> list[str]:
        """Returns what makes times that were measured meanwhile doubtful; busy processors do not disturb a GPU."""
        found = []
        if not on_gpu and (self.other_cpus or 0) > BUSY_CPUS:
            found.append(f"busy machine: other processes used {self.other_cpus:.2f} CPUs meanwhile")
        if (self.stolen_cpus or 0) > BUSY_CPUS:
            found.append(f"the hypervisor took {self.stolen_cpus:.2f} CPUs away meanwhile")
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


class LoadMeter:
    """Counts from its making on what this process and all others have used of the processors."""

    def __init__(self) -> None:
        """Starts counting."""
        self._average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self._start = self._now()

    def read(self) -> Load:
        """Returns the load since the meter was made."""
        (moment, own, first), (later, own_later, last) = self._start, self._now()
        seconds = later - moment
        if first is None or last is None or seconds <= 0:
            return Load(load_average=self._average, other_cpus=None, stolen_cpus=None)
        busy, stolen = (end - start for start, end in zip(first, last, strict=True))
        # Ticks are counted per processor and own times exactly: the difference may be a little below nothing.
        others = max(0.0, (busy - (own_later - own)) / seconds)
        return Load(load_average=self._average, other_cpus=others, stolen_cpus=stolen / seconds)

    @staticmethod
    def _now() -> tuple[float, float, tuple[float, float] | None]:
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return time.monotonic(), own, busy_seconds(_text(_STAT))


def busy_seconds(stat: str, ticks: int | None = None) -> tuple[float, float] | None:
    """Returns the busy and the stolen seconds of all processors in the text of /proc/stat.

    Args:
        stat: the text, "" where there is none.
        ticks: a second; those of this system when None.
    """
    line = next((line.split() for line in stat.splitlines() if line.startswith("cpu ")), None)
    if line is None or len(line) <= _STEAL + 1:
        return None
    ticks = ticks or os.sysconf("SC_CLK_TCK")
    counts = [int(count) for count in line[1:]]
    return sum(counts[place] for place in _BUSY) / ticks, counts[_STEAL] / ticks


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
