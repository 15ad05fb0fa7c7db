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


@contextmanager
def interruptions_noticed() -> Iterator[None]:
    """Raises KeyboardInterrupt for SIGINT and Terminated for SIGTERM, and for whatever error follows from one.

    An import that a signal cut short fails in other ways. Python drops an exception that is raised in a finaliser or
    in a weak reference's callback, and some extensions print the one that their import raised and go on: the signal
    is then sent once more. Where the caller has taken the signals itself, or ignores them, they stay so.
    """
    came: list[type[KeyboardInterrupt]] = []
    numbers = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    main_thread, over = threading.main_thread(), threading.Event()
    dropped, printed = sys.unraisablehook, sys.excepthook

    def notice(number: int, frame: FrameType | None) -> None:
        came.append(numbers[signal.Signals(number)])
        raise came[-1]

    def lost(kind: type[BaseException]) -> bool:
        number = next((number for number, raised in numbers.items() if kind is raised), None)
        if number is not None:
            _thread.start_new_thread(send_again, (number,))  # threading's locks may be held around a finaliser
        return number is not None

    def send_again(number: int) -> None:
        if not over.wait(_AGAIN_AFTER_S) and main_thread.ident is not None:
            signal.pthread_kill(main_thread.ident, number)

    before = {number: signal.getsignal(number) for number in numbers}
    ours = threading.current_thread() is main_thread
    ours = ours and before == {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if ours:
        sys.unraisablehook = lambda what: None if lost(what.exc_type) else dropped(what)
        sys.excepthook = lambda kind, error, trace: None if lost(kind) else printed(kind, error, trace)
        for number in numbers:
            signal.signal(number, notice)
    try:
        yield
    except Exception as error:
        # What was made of the interruption on purpose stays: torchrun ends a process when another one has failed.
        if came and (isinstance(error, click.Abort) or not isinstance(error.__cause__, KeyboardInterrupt)):
            raise came[0] from error
        raise
    finally:
        over.set()
        if ours:
            for number, handler in before.items():
                signal.signal(number, handler)
            sys.unraisablehook, sys.excepthook = dropped, printed
