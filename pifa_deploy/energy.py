"""Joules of a launch: what the GPU counts, or what a Jetson's rails carry, while one contender runs alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pifa_deploy.decoder_step import TimedCall
from pifa_deploy.gpu_state import GpuState
from pifa_deploy.jetson import TEGRASTATS, TegrastatsLog

# Returns the joules that are used while something runs; None where nothing measures them.
Meter = Callable[[Callable[[], None]], float | None]


def counter_meter(look: Callable[[], GpuState]) -> Meter:
    """Returns a meter that reads the GPU's own energy counter before and after."""

    def joules(work: Callable[[], None]) -> float | None:
        before = look().energy_j
        work()
        after = look().energy_j
        return None if before is None or after is None else after - before

    return joules


def rail_meter(command: Sequence[str] = TEGRASTATS) -> Meter:
    """Returns a meter that reads a Jetson's rails meanwhile."""

    def joules(work: Callable[[], None]) -> float | None:
        try:
            with TegrastatsLog(command) as log:
                log.last_line()  # work shorter than its start would be without a reading
                start = time.perf_counter()
                work()
                return log.energy_j(start, time.perf_counter())
        except FileNotFoundError:
            return None

    return joules


def joules_per_launch(call: TimedCall, meter: Meter, seconds: float) -> float | None:
    """Returns the joules of one launch, launched again and again for `seconds`; None where nothing measures them."""
    launches = 0

    def work() -> None:
        nonlocal launches
        until = time.perf_counter() + seconds
        while launches == 0 or time.perf_counter() < until:
            call.launch()
            call.wait()
            launches += 1

    used = meter(work)
    return None if used is None else used / launches
