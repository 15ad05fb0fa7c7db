"""The end of a child process, by itself or with its parent's wait."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pifa_deploy.child_process import exit_status


def run(code: str, folder: Path) -> int:
    with (folder / "printed").open("wb") as stream:
        return exit_status([sys.executable, "-c", code], cwd=folder, env=dict(os.environ), output=stream)


def test_its_status_and_both_outputs_are_kept(tmp_path: Path) -> None:
    assert run("import sys; print('one', flush=True); print('two', file=sys.stderr); sys.exit(7)", tmp_path) == 7
    assert (tmp_path / "printed").read_text() == "one\ntwo\n"


def test_a_signal_that_ends_it_is_a_negative_status(tmp_path: Path) -> None:
    assert run("import os; os.kill(os.getpid(), 9)", tmp_path) == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_is_being_started_ends_it_too(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []

    class Interrupted(subprocess.Popen[bytes]):
        """Is struck after the child has been made and before its maker knows it."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            children.append(self)
            os.kill(os.getpid(), number)

    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    before = signal.signal(number, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run("import time; time.sleep(60)", tmp_path)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert children[0].returncode == -signal.SIGKILL


def test_a_signal_while_its_start_fails_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(subprocess, "Popen", failing)
    with pytest.raises(KeyboardInterrupt):
        run("", tmp_path)


CLEANS_UP = """
import pathlib, signal, sys, time
here = pathlib.Path("half-written")
def stop(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.3)
    here.unlink()
    sys.exit(9)
signal.signal(signal.SIGTERM, stop)
here.touch()
time.sleep(60)
"""
WAITS = """
import subprocess, sys
from pifa_deploy.child_process import exit_status
exit_status([sys.executable, "-c", sys.argv[1]], output=sys.stderr, grace_s=float(sys.argv[2]))
"""


def waiting(code: str, folder: Path, grace_s: float) -> subprocess.Popen[bytes]:
    """Starts a process that waits for a child; returns when the child has written its file."""
    command = [sys.executable, "-c", WAITS, code, str(grace_s)]
    parent = subprocess.Popen(command, cwd=folder, start_new_session=True, stderr=subprocess.DEVNULL)
    until(lambda: (folder / "half-written").exists() or parent.poll() is not None)
    assert parent.poll() is None
    return parent


def until(holds: Callable[[], bool]) -> None:
    """Returns when something holds; what goes on too long ends by pytest's own timeout."""
    while not holds():
        time.sleep(0.02)


def test_with_grace_it_cleans_up_after_ctrl_c_at_a_terminal(tmp_path: Path) -> None:
    parent = waiting(CLEANS_UP, tmp_path, grace_s=20)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to the whole group
    parent.wait()
    assert not (tmp_path / "half-written").exists()


def test_without_grace_it_is_killed_at_once(tmp_path: Path) -> None:
    parent = waiting(CLEANS_UP, tmp_path, grace_s=0)
    parent.send_signal(signal.SIGINT)
    parent.wait()
    assert (tmp_path / "half-written").exists()


def test_grace_has_an_end(tmp_path: Path) -> None:
    stubborn = "import signal, pathlib, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    stubborn += "pathlib.Path('half-written').touch(); time.sleep(60)"
    parent = waiting(stubborn, tmp_path, grace_s=0.2)
    start = time.monotonic()
    parent.send_signal(signal.SIGINT)
    parent.wait()
    assert 0.2 <= time.monotonic() - start < 20


def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    ends = "import signal; from pifa_deploy.child_process import end_with_parent; end_with_parent(signal.SIGTERM)\n"
    parent = waiting(ends + CLEANS_UP, tmp_path, grace_s=20)
    parent.kill()
    parent.wait()
    until(lambda: not (tmp_path / "half-written").exists())


def test_it_ends_where_its_parent_was_killed_before_it_asked_for_that(tmp_path: Path) -> None:
    late = """
while os.getppid() == parent:
    time.sleep(0.02)
end_with_parent(signal.SIGTERM)
time.sleep(60)
"""
    # Its parent's number before the file says that the parent may be killed.
    first = "import os; from pifa_deploy.child_process import end_with_parent; parent = os.getppid()\n"
    parent = waiting(first + CLEANS_UP.replace("time.sleep(60)\n", late), tmp_path, grace_s=20)
    parent.kill()
    parent.wait()
    until(lambda: not (tmp_path / "half-written").exists())


def test_it_lives_while_its_parent_does(tmp_path: Path) -> None:
    ends = "import signal; from pifa_deploy.child_process import end_with_parent; end_with_parent(signal.SIGKILL)"
    assert run(f"{ends}; import sys; sys.exit(5)", tmp_path) == 5
    # Its own child does not inherit who its parent is.
    below = f"subprocess.call([sys.executable, '-c', {f'{ends}; exit(6)'!r}])"
    assert run(f"import subprocess, sys; {ends}; sys.exit({below})", tmp_path) == 6


def test_a_wait_that_is_too_long_ends_it(tmp_path: Path) -> None:
    with (tmp_path / "printed").open("wb") as stream, pytest.raises(subprocess.TimeoutExpired):
        exit_status([sys.executable, "-c", "import time; time.sleep(60)"], output=stream, timeout_s=0.2)
