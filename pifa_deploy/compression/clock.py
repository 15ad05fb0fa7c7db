"""Where the time of a compression goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepClock:
    """Adds up wall time by step; steps do not nest.

    Attributes:
        seconds: step -> seconds so far.
    """

    def __init__(self, device: torch.device) -> None:
        """Starts at zero; `device` is waited for at the end of a step, if it works on its own."""
        self._device = device
        self._started = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Counts the block's time to a step."""
        started = time.monotonic()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def total(self) -> float:
        """Returns the seconds since the start."""
        return time.monotonic() - self._started

    def shares(self) -> dict[str, float]:
        """Returns step -> share of the total; what no step took is "other"."""
        total = self.total()
        shares = {name: seconds / total for name, seconds in self.seconds.items()}
        return {**shares, "other": max(0.0, 1.0 - sum(shares.values()))}
