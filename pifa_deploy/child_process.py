"""A child process that does not outlive its parent's wait for it, whatever ends the wait."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pifa_deploy.deferred_signals import signals_deferred

_PR_SET_PDEATHSIG = 1
_PARENT = "PIFA_DEPLOY_PARENT"  # in the child's environment: the process that waits for it


def exit_status(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    output: IO[Any],
    errors: IO[Any] | int = subprocess.STDOUT,
    timeout_s: float | None = None,
    grace_s: float = 0.0,
) -> int:
    """Runs a command to its end and returns its exit status; negative is the signal that ended it.

    Args:
        command: program and arguments.
        cwd: working directory; this process' own when None.
        env: the whole environment; this process' own when None.
        output: takes what it prints.
        errors: takes what it prints to standard error; `output` does if left out.
        timeout_s: longest wait.
        grace_s: where something ends the wait, seconds that the child has from SIGTERM to SIGKILL; without any it is
            killed at once. With grace the child has a session of its own: Ctrl-C at a terminal would reach it
            besides, a second signal that ends its clean-up.

    Raises:
        OSError: the program cannot be started.
        subprocess.TimeoutExpired: the wait was too long.
    """
    child = None
    try:
        with signals_deferred():  # one that cuts `Popen` short leaves a child nobody knows of
            child = subprocess.Popen(
                command,
                cwd=cwd,
                env={**(os.environ if env is None else env), _PARENT: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=grace_s > 0,
            )
        return child.wait(timeout_s)
    finally:
        if child is not None:
            _end(child, grace_s)


def end_with_parent(number: signal.Signals) -> None:
    """Has this process sent a signal when the thread that started it ends, in whatever way (prctl(2); Linux).

    At once where `exit_status` started it and the process that called that has ended already.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    # Of a death before this call the kernel tells nothing; the orphan has another parent by then.
    parent = os.environ.pop(_PARENT, None)
    if parent is not None and parent != str(os.getppid()):
        os.kill(os.getpid(), number)


def _end(child: subprocess.Popen[Any], grace_s: float) -> None:
    try:
        if grace_s > 0 and child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(grace_s)
    finally:  # also where a second signal cuts the grace short
        if child.poll() is None:
            child.kill()
            child.wait()
