"""What a Jetson says about its power: its mode from nvpmodel, its rails from tegrastats.

https://docs.nvidia.com/jetson/archives/r36.3/DeveloperGuide/AT/JetsonLinuxDevelopmentTools/TegrastatsUtility.html
https://docs.nvidia.com/jetson/archives/r36.3/DeveloperGuide/SD/PlatformPowerAndPerformance.html
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Sequence
from types import TracebackType

TEGRASTATS = ("tegrastats", "--interval", "100")
NVPMODEL = ("nvpmodel", "-q")
# "VDD_IN 3024mW/3024mW": now, and the average since tegrastats began. Older releases leave the unit out.
_RAIL = re.compile(r"\b((?:VDD|VIN|POM)_\w+) (\d+)(?:mW)?/\d+(?:mW)?")
# The rail that feeds the whole module, where a board measures one.
_WHOLE = ("VDD_IN", "POM_5V_IN")


def rails_w(line: str) -> dict[str, float]:
    """Returns rail -> watts of one line of tegrastats, empty where it names none."""
    return {name: int(milliwatts) / 1e3 for name, milliwatts in _RAIL.findall(line)}


def module_w(line: str) -> float | None:
    """Returns the watts of the module: its input rail, or the sum of the rails on boards without one; None: unknown."""
    rails = rails_w(line)
    whole = next((rails[name] for name in _WHOLE if name in rails), None)
    return whole if whole is not None else sum(rails.values()) or None


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


class PowerLog:
    """Reads tegrastats while it is entered; afterwards `energy_j` says what was used between two moments."""

    def __init__(self, command: Sequence[str] = TEGRASTATS) -> None:
        """Takes the command that writes the lines; raises OSError on entering where it is not installed."""
        self._command = list(command)
        self._watts: list[tuple[float, float]] = []

    def __enter__(self) -> PowerLog:
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
                watts = module_w(line)
                if watts is not None:
                    self._watts.append((time.perf_counter(), watts))

    def energy_j(self, start: float, end: float) -> float | None:
        """Returns joules between two moments of time.perf_counter: mean of the readings in it; None without one."""
        inside = [watts for moment, watts in self._watts if start <= moment <= end]
        return sum(inside) / len(inside) * (end - start) if inside else None
