"""Ctrl-C and SIGTERM end a command wherever they hit it."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

# Long enough to leave the finaliser that swallowed an interruption, too short to be noticed.
_AGAIN_AFTER_S = 0.01


class Terminated(KeyboardInterrupt):
    """SIGTERM: a batch system or torchrun ends this process."""


_NUMBERS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


class Interruptions:
    """The signals that came, which raise in one block and change nothing after it."""

    def __init__(self) -> None:
        self._came: list[type[KeyboardInterrupt]] = []
        self._raising, self._over = False, threading.Event()

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Raises KeyboardInterrupt for SIGINT and Terminated for SIGTERM, and for whatever error follows from one.

        An import that a signal cut short fails in other ways. What is caught behind the block is how the command ended,
        whatever signal comes while that is told.
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
        self._came.append(_NUMBERS[signal.Signals(number)])
        if self._raising:
            raise self._came[-1]

    def lost(self, kind: type[BaseException]) -> bool:
        """Returns whether what Python dropped was an interruption, which is then sent once more."""
        number = next((number for number, raised in _NUMBERS.items() if kind is raised), None)
        if number is not None:
            _thread.start_new_thread(self._send_again, (number,))  # threading's locks may be held around a finaliser
        return number is not None

    def _send_again(self, number: int) -> None:
        main = threading.main_thread().ident
        if not self._over.wait(_AGAIN_AFTER_S) and main is not None:
            signal.pthread_kill(main, number)


@contextmanager
def interruptions_noticed() -> Iterator[Interruptions]:
    """Yields what takes SIGINT and SIGTERM meanwhile; where the caller takes or ignores one itself, all stays so.

    Python drops an exception that is raised in a finaliser or in a weak reference's callback, and some extensions print
    the one that their import raised and go on: the signal is then sent once more.
    """
    found = Interruptions()
    dropped, printed = sys.unraisablehook, sys.excepthook
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    ours = threading.current_thread() is threading.main_thread()
    ours = ours and before == {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if ours:
        sys.unraisablehook = lambda what: None if found.lost(what.exc_type) else dropped(what)
        sys.excepthook = lambda kind, error, trace: None if found.lost(kind) else printed(kind, error, trace)
        for number in _NUMBERS:
            signal.signal(number, found.notice)
    try:
        yield found
    finally:
        if ours:
            for number, handler in before.items():
                signal.signal(number, handler)
            sys.unraisablehook, sys.excepthook = dropped, printed
