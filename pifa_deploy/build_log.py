"""build.log: what the builder said, and what can be told of a build that failed."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Mapping
from pathlib import Path

BUILD_LOG = "build.log"
_LAST_LINES = 8
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def met_full_disk(log: Path) -> bool:
    """Tells whether a build that failed met a full disk or quota; writes a file beside the log to find out."""
    try:
        # A full disk may have cut the log before the builder's words about it.
        log.with_name("probe").write_bytes(bytes(1 << 16))
    except OSError as error:
        return error.errno in _NO_SPACE
    said = log.read_text(encoding="utf-8", errors="replace")
    return any(os.strerror(number) in said for number in _NO_SPACE)


def last_lines(log: Path) -> str:
    """Returns the builder's last error lines, or its last lines where it marked none as errors."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("[E]", "[!]"))]
    return " | ".join(line[:300] for line in (errors or lines)[-_LAST_LINES:]) or "none, it said nothing"


def cause(status: int) -> str:
    """Returns what ended a build process that left no engine; a negative status is a signal."""
    if status >= 0:
        return f"the build process ended with status {status} and without an engine"
    name = f"signal {-status}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
    out_of_memory = name == "SIGKILL"
    advice = " (the system kills so when memory runs out: free some, or lower --max-cache-len)" if out_of_memory else ""
    return f"the build process died of {name}{advice}"


def remove_paths(log: Path, names: Mapping[str, str]) -> None:
    """Writes `names` (folder -> what to call it) into the log in place of the folders of this machine."""
    text = log.read_bytes()
    for path, name in names.items():
        # With its separator, so that neither "/" nor a folder of a longer name is taken for it.
        text = text.replace(os.fsencode(path + os.sep), f"{name}/".encode())
    log.write_bytes(text)
