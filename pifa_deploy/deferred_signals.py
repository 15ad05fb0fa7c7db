"""Work that neither Ctrl-C nor SIGTERM cuts short: they take effect at its end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Has the handlers of SIGINT and SIGTERM called at the end of the block, also where it fails.

    For short work that must not be left half done. Signals that are ignored or end the process stay so, in child
    processes too; outside the main thread, which Python gives no signals, nothing is changed.
    """
    came: list[tuple[int, FrameType | None]] = []
    main = threading.current_thread() is threading.main_thread()
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    before = {number: handler for number, handler in found.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for struck, frame in came:
            before[signal.Signals(struck)](struck, frame)
