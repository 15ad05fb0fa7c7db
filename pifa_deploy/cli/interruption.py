"""Ctrl-C and SIGTERM end a command wherever they hit it."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import click

# Long enough to leave what swallowed an interruption, too short to be noticed.
_AGAIN_AFTER_S = 0.01


class Interrupted(KeyboardInterrupt):
    """SIGINT. It tells when it is gone: while it is on its way out, or kept as a cause, it is not.

    Where another error is being handled that one ends the command, and a signal may be swallowed on purpose.
    """

    number = signal.SIGINT
    tell: Callable[[int], None] | None = None

    def __del__(self) -> None:
        if self.tell is not None and sys.exc_info()[0] is None:
            self.tell(self.number)


class Terminated(Interrupted):
    """SIGTERM: a batch system or torchrun ends this process."""

    number = signal.SIGTERM


_KINDS: dict[int, type[Interrupted]] = {kind.number: kind for kind in (Interrupted, Terminated)}


class Interruptions:
    """The signals that came, which raise in one block and change nothing after it."""

    def __init__(self) -> None:
        self._came: list[type[Interrupted]] = []
        self._raising, self._over = False, threading.Event()

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raises Interrupted for SIGINT and Terminated for SIGTERM, and for whatever error follows from one.

        An import that a signal cut short fails in other ways, or goes on: Python drops what is raised in a finaliser or
        in a weak reference's callback, extensions print or clear it, libraries catch everything around an import. The
        signal of an exception that is gone before the block has ended is sent once more. What is caught behind the
        block is how the command ended, whatever signal comes while that is told.
        """
        try:
            self._raising = True
            if self._came:
                raise self._came[0]
            yield
        except Exception as error:
            # What was made of the interruption on purpose stays: torchrun ends a process when another one has failed.
            if self._came and (isinstance(error, click.Abort) or not isinstance(error.__cause__, KeyboardInterrupt)):
                raise self._came[0] from error
            raise
        finally:
            self._raising = False
            self._over.set()

    def notice(self, number: int, frame: FrameType | None) -> None:
        """Is the handler of both signals."""
        self._came.append(_KINDS[number])
        if self._raising:
            raise self._made(number)  # kept in no variable: its traceback would keep it for ever

    def _made(self, number: int) -> Interrupted:
        made = _KINDS[number]()
        made.tell = self.lost
        return made

    def lost(self, number: int) -> None:
        """Has a signal sent once more where nothing has come of it."""
        if not self._over.is_set():
            _thread.start_new_thread(self._send_again, (number,))  # threading's locks may be held around a finaliser

    def _send_again(self, number: int) -> None:
        main = threading.main_thread().ident
        if not self._over.wait(_AGAIN_AFTER_S) and main is not None:
            signal.pthread_kill(main, number)


@contextmanager
def interruptions_noticed() -> Iterator[Interruptions]:
    """Yields what takes SIGINT and SIGTERM meanwhile; where the caller takes or ignores one itself, all stays so."""
    found = Interruptions()
    dropped, printed = sys.unraisablehook, sys.excepthook
    before = {number: signal.getsignal(number) for number in _KINDS}
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and before == {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def print_others(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, Interrupted):
            found.lost(error.number)
            error.tell = None  # Python keeps what was printed, as sys.last_value
        else:
            printed(kind, error, trace)

    if ours:
        sys.unraisablehook = lambda what: None if issubclass(what.exc_type, Interrupted) else dropped(what)
        sys.excepthook = print_others
        for number in _KINDS:
            signal.signal(number, found.notice)
    try:
        yield found
    finally:
        if ours:
            for number, handler in before.items():
                signal.signal(number, handler)
            sys.unraisablehook, sys.excepthook = dropped, printed
