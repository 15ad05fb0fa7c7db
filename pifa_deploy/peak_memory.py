"""The memory of one contender, measured in a process of its own: contenders of one process share what they hold."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from pifa_deploy import errors
from pifa_deploy.child_process import end_with_parent, exit_status
from pifa_deploy.errors import PifaDeployError, StageFailedError
from pifa_deploy.timed_contenders import RunOptions, drawn_step, open_timed

_STATUS = Path("/proc/self/status")
_RESULT = "PEAK_MEMORY "
_REFUSED = "PEAK_MEMORY_REFUSED "


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes at the largest case.

    Attributes:
        peak_bytes: resident memory of the process at its peak; on a GPU what the process took of the GPU's memory.
        host_bytes: resident memory of the process at its peak.
        libraries_bytes: resident memory before the model was loaded: Python and its libraries.
        activations_bytes: peak beyond the weights as PyTorch's allocator on the GPU counts it; None elsewhere.
    """

    peak_bytes: int
    host_bytes: int
    libraries_bytes: int
    activations_bytes: int | None


def measure_memory(
    place: str, steps: Sequence[tuple[int, int, int]], options: RunOptions, *, timeout_s: float = 3600
) -> PeakMemory:
    """Runs every step once in a new process and returns the peaks.

    Args:
        place: as `open_timed`.
        steps: (batch, tokens, past) of each.
        options: on what to run.
        timeout_s: after which the process is ended.

    Raises:
        StageFailedError: the process failed, died or took too long.
        As `open_timed`, `TimedContender.check_sizes` and `TimedContender.timed`, which it calls.
    """
    request = json.dumps({"place": place, "steps": list(steps), "options": asdict(options)})
    command = [sys.executable, "-m", "pifa_deploy.peak_memory", request]
    with _new_file() as printed, _new_file() as complained:
        try:
            status = exit_status(command, output=printed, errors=complained, timeout_s=timeout_s)
        except subprocess.TimeoutExpired:
            raise StageFailedError(
                f"{place}: measuring its memory took more than {timeout_s:g} s, and was ended"
            ) from None
        said, complaints = (_whole(stream) for stream in (printed, complained))
    for line in said.splitlines():
        if line.startswith(_REFUSED):
            name, message = json.loads(line.removeprefix(_REFUSED))
            raise (ValueError if name == ValueError.__name__ else getattr(errors, name))(message)
    lines = [line for line in said.splitlines() if line.startswith(_RESULT)]
    if status != 0 or not lines:
        last = (complaints.strip().splitlines() or ["no message"])[-1]
        raise StageFailedError(
            f"{place}: the process that measures its memory ended with status {status}: {last[:300]}; "
            "it may need more memory than there is: give smaller lengths, or time it on a machine that has more"
        )
    return PeakMemory(**json.loads(lines[-1].removeprefix(_RESULT)))


def status_bytes(status: str, field: str) -> int:
    """Returns a figure of /proc/PID/status, such as VmHWM; 0 where there is none."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _new_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _whole(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()


def _main(request: dict[str, Any]) -> PeakMemory:
    options = RunOptions(**request["options"])
    on_gpu = options.chosen_device == "cuda" and torch.cuda.is_available()
    libraries, free = _resident("VmRSS"), [torch.cuda.mem_get_info()[0]] if on_gpu else []
    contender = open_timed("child", request["place"], options)
    contender.check_sizes(
        [tokens for _, tokens, past in request["steps"] if not past], [past for *_, past in request["steps"] if past]
    )
    loaded = torch.cuda.memory_allocated() if on_gpu else 0
    for batch, tokens, past in request["steps"]:
        call = contender.timed(drawn_step(tokens, past, batch=batch, vocabulary=contender.vocabulary or 1))
        call.launch()
        call.wait()
        if on_gpu:  # while the call still holds what it needs
            free.append(torch.cuda.mem_get_info()[0])
        call.close()
    host = _resident("VmHWM")
    by_torch = torch.cuda.max_memory_allocated() - loaded if on_gpu and contender.runtime == "torch" else None
    return PeakMemory(
        peak_bytes=free[0] - min(free) if on_gpu else host,
        host_bytes=host,
        libraries_bytes=libraries,
        activations_bytes=by_torch,
    )


def _resident(field: str) -> int:
    # Not getrusage: its peak starts with that of the process that made this one.
    return status_bytes(_STATUS.read_text(encoding="utf-8"), field) if _STATUS.exists() else 0


def _known(error: PifaDeployError | ValueError) -> str:
    """Returns the name of the nearest class of an error that the process which asked knows too."""
    return next(
        kind.__name__ for kind in type(error).__mro__ if kind is ValueError or kind.__module__ == errors.__name__
    )


if __name__ == "__main__":
    end_with_parent(signal.SIGKILL)  # it writes nothing that a clean-up would have to remove
    try:
        said = f"{_RESULT}{json.dumps(asdict(_main(json.loads(sys.argv[1]))))}"
    except (PifaDeployError, ValueError) as error:
        said = f"{_REFUSED}{json.dumps([_known(error), str(error)])}"
    sys.stdout.write(f"{said}\n")
