"""What a Jetson says about itself: power mode (nvpmodel), rails, clocks, temperatures (tegrastats), throttling (sysfs).

https://docs.nvidia.com/jetson/archives/r36.3/DeveloperGuide/AT/JetsonLinuxDevelopmentTools/TegrastatsUtility.html
https://docs.nvidia.com/jetson/archives/r36.3/DeveloperGuide/SD/PlatformPowerAndPerformance.html
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

TEGRASTATS = ("tegrastats", "--interval", "100")
NVPMODEL = ("nvpmodel", "-q")
# "VDD_IN 3024mW/3024mW": now, and the average since tegrastats began. Older releases leave the unit out, those of Thor
# add the highest.
_RAIL = re.compile(r"\b((?:VDD|POM)_\w+|VIN(?:_\w+)?) (\d+)(?:mW)?/\d+(?:mW)?")
# The rail that feeds everything else, where a board measures one.
_WHOLE = ("VDD_IN", "POM_5V_IN", "VIN")
# "GR3D_FREQ 45%@[1300,1300]", a clock of each cluster; "45%@318" before Orin; "@[314,314,314]" on Thor; "45%" without
# the right to read clocks.
_GPU_CLOCK = re.compile(r"\bGR3D_FREQ (?:\d+%)?@(\d+|\[[^]]*\])")
_MEMORY_CLOCK = re.compile(r"\bEMC_FREQ (?:\d+%)?@(\d+)")
# "gpu@45.3C", "GPU@45C"; "tj@66.6C/66.6C" on Thor, now and the highest.
_TEMPERATURE = re.compile(r"\b(\w+)@(-?\d+(?:\.\d+)?)C\b")
_OFF_C = -100  # a sensor of a part without power says -256
_HWMON = Path("/sys/class/hwmon")


def rails_w(line: str) -> dict[str, float]:
    """Returns rail -> watts of one line of tegrastats, empty where it names none."""
    return {name: int(milliwatts) / 1e3 for name, milliwatts in _RAIL.findall(line)}


def module_w(line: str) -> float | None:
    """Returns the watts of the module: its input rail, or the sum of the rails on boards without one; None: unknown."""
    rails = rails_w(line)
    whole = next((rails[name] for name in _WHOLE if name in rails), None)
    return whole if whole is not None else sum(rails.values()) or None


def gpu_mhz(line: str) -> int | None:
    """Returns the clock of the GPU's fastest cluster in one line of tegrastats; 0 without power, None: unknown."""
    found = _GPU_CLOCK.search(line)
    return max(map(int, re.findall(r"\d+", found[1])), default=None) if found else None


def memory_mhz(line: str) -> int | None:
    """Returns the clock of the memory controller in one line of tegrastats, None where it names none."""
    found = _MEMORY_CLOCK.search(line)
    return int(found[1]) if found else None


def temperature_c(line: str) -> float | None:
    """Returns the GPU's temperature in one line of tegrastats, without it the chip's highest (tj); None: neither."""
    found = {name.lower(): float(degrees) for name, degrees in _TEMPERATURE.findall(line)}
    return next((found[name] for name in ("gpu", "tj") if found.get(name, _OFF_C) > _OFF_C), None)


def over_current_events(hwmon: Path = _HWMON) -> dict[str, int]:
    """Returns "oc1" and so on -> times since the start that the board throttled for it; empty where nothing counts.

    On Orin oc1 is under-voltage, oc2 average and oc3 instantaneous over-current (Jetson Linux Developer Guide, Platform
    Power and Performance, over-current throttling).
    """
    found = {}
    for file in sorted(hwmon.glob("*/oc*_event_cnt")):
        with contextlib.suppress(OSError, ValueError):  # its driver may fail to ask the firmware
            found[file.name.removesuffix("_event_cnt")] = int(file.read_text())
    return found


def power_mode(text: str) -> str | None:
    """Returns the mode in the output of `nvpmodel -q`, such as "MAXN"; None where there is none."""
    found = re.search(r"NV Power Mode:\s*(\S+)", text)
    return found[1] if found else None


def read_power_mode(command: Sequence[str] = NVPMODEL) -> str | None:
    """Returns the power mode of this machine, None where nvpmodel is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return power_mode(done.stdout)


class TegrastatsLog:
    """Reads tegrastats while it is entered: its last line, and what was used between two moments."""

    def __init__(self, command: Sequence[str] = TEGRASTATS) -> None:
        """Takes the command that writes the lines; raises OSError on entering where it is not installed."""
        self._command = list(command)
        self._watts: list[tuple[float, float]] = []
        self._last, self._came = "", threading.Event()

    def __enter__(self) -> TegrastatsLog:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._last = line
                self._came.set()
                watts = module_w(line)
                if watts is not None:
                    self._watts.append((time.perf_counter(), watts))
        self._came.set()  # nothing will come any more

    def last_line(self, timeout_s: float = 5.0) -> str:
        """Returns the last line, waiting for the first; "" where none comes in time."""
        self._came.wait(timeout_s)
        return self._last

    def energy_j(self, start: float, end: float) -> float | None:
        """Returns joules between two moments of time.perf_counter: mean of the readings in it; None without one."""
        inside = [watts for moment, watts in self._watts if start <= moment <= end]
        return sum(inside) / len(inside) * (end - start) if inside else None
