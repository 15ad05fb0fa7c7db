"""The clock: contenders timed side by side in one run."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from pifa_deploy.decoder_step import Step, TimedCall
from pifa_deploy.onnx_runner import OnnxRuntimeRunner

# What a first launch sets up (allocations, plans, captures) is done after so many, however short the warm-up.
_WARM_UP_LAUNCHES = 2
# From this many launches in a turn on, the first is left out: it finds the caches full of another contender's data.
_MANY = 4


@dataclass(frozen=True, kw_only=True)
class ClockOptions:
    """How long to measure; defaults are those of trtexec.

    Attributes:
        warm_up_ms: milliseconds of untimed launches of each contender before the first round.
        iterations: timed launches of each contender at least.
        duration_s: seconds in which each contender is launched at least, over all rounds.
        rounds: turns that each contender has; what is compared is compared within a round.
        seed: of the order within the rounds.
    """

    warm_up_ms: float = 200.0
    iterations: int = 10
    duration_s: float = 3.0
    rounds: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        if self.rounds < 2 or self.iterations < 1:
            raise ValueError(f"rounds is {self.rounds} and iterations {self.iterations}, expected at least 2 and 1")
        for name in ("warm_up_ms", "duration_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")


@dataclass(frozen=True, kw_only=True)
class Lap:
    """One launch in milliseconds.

    Attributes:
        latency_ms: on the host, from the launch to the end of the work.
        enqueue_ms: on the host, until the launch returned; None where it returns with the work done.
        gpu_compute_ms: between events on the GPU; None on a CPU.
    """

    latency_ms: float
    enqueue_ms: float | None = None
    gpu_compute_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class Laps:
    """The launches of one contender, by round."""

    rounds: tuple[tuple[Lap, ...], ...]

    @property
    def latency_ms(self) -> list[float]:
        """Latency of every launch."""
        return [lap.latency_ms for laps in self.rounds for lap in laps]

    @property
    def gpu_compute_ms(self) -> list[float] | None:
        """GPU compute time of every launch, None on a CPU."""
        return _all_or_none([lap.gpu_compute_ms for laps in self.rounds for lap in laps])

    @property
    def enqueue_ms(self) -> list[float] | None:
        """Enqueue time of every launch; None on a CPU and where a launch waits for the GPU."""
        return _all_or_none([lap.enqueue_ms for laps in self.rounds for lap in laps])

    @property
    def round_ms(self) -> list[float]:
        """Median latency of each round."""
        return [statistics.median(lap.latency_ms for lap in laps) for laps in self.rounds]


def _all_or_none(values: list[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def measure(calls: Mapping[str, TimedCall], options: ClockOptions) -> dict[str, Laps]:
    """Times contenders in turn, round after round in random order, so that a slow moment of the machine hits all.

    Args:
        calls: name -> what to time.
        options: see ClockOptions.

    Raises:
        ValueError: there are no contenders.
    """
    if not calls:
        raise ValueError("there are no contenders, expected at least one")
    names, random = list(calls), np.random.default_rng(options.seed)
    found: dict[str, list[tuple[Lap, ...]]] = {name: [] for name in names}
    with _without_collector():
        for call in calls.values():
            _warm_up(call, options.warm_up_ms)
        for _ in tqdm(range(options.rounds), desc="latency", unit="round", disable=None, leave=False):
            for place in random.permutation(len(names)):
                found[names[place]].append(_turn(calls[names[place]], options))
    return {name: Laps(rounds=tuple(rounds)) for name, rounds in found.items()}


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keeps Python's garbage collector out of what is timed."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _warm_up(call: TimedCall, milliseconds: float) -> None:
    launches, started = 0, time.perf_counter()
    while launches < _WARM_UP_LAUNCHES or (time.perf_counter() - started) * 1e3 < milliseconds:
        call.launch()
        call.wait()
        launches += 1


def _turn(call: TimedCall, options: ClockOptions) -> tuple[Lap, ...]:
    least = math.ceil(options.iterations / options.rounds)
    laps: list[Lap] = []
    started = time.perf_counter()
    while len(laps) < least or time.perf_counter() - started < options.duration_s / options.rounds:
        laps.append(_lap(call))
    return tuple(laps[1:] if len(laps) > max(least, _MANY - 1) else laps)


def _lap(call: TimedCall) -> Lap:
    started = time.perf_counter()
    call.launch()
    queued = time.perf_counter()
    call.wait()
    done = time.perf_counter()
    gpu_ms = call.gpu_ms()
    enqueue_ms = None if gpu_ms is None or call.waits else (queued - started) * 1e3
    return Lap(latency_ms=(done - started) * 1e3, enqueue_ms=enqueue_ms, gpu_compute_ms=gpu_ms)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall-clock time of one contender.

    Attributes:
        median_ms: median over the rounds.
        p90_ms: 90th percentile.
        spread: (p90 - p10) / median.
        ratio: median of the per-round time relative to the first contender's in the same round.
        rounds: number of timed rounds.
    """

    median_ms: float
    p90_ms: float
    spread: float
    ratio: float
    rounds: int


class _Plain:
    """A plain function as a timed call: it returns when its work is done."""

    waits = True

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function

    def launch(self) -> None:
        self._function()

    def wait(self) -> None:
        pass

    def gpu_ms(self) -> float | None:
        return None

    def close(self) -> None:
        pass


def side_by_side(contenders: Mapping[str, Callable[[], object]], *, rounds: int = 15) -> dict[str, Timing]:
    """Times plain functions, one call a round; the first one is what ratios refer to.

    Raises:
        ValueError: fewer than 2 rounds, or no contenders.
    """
    options = ClockOptions(warm_up_ms=0, iterations=rounds, duration_s=0, rounds=rounds)
    found = {
        name: laps.round_ms
        for name, laps in measure({name: _Plain(call) for name, call in contenders.items()}, options).items()
    }
    base = next(iter(found.values()))
    return {name: _timing(values, base) for name, values in found.items()}


def _timing(values: list[float], base: list[float]) -> Timing:
    p10, p90 = np.quantile(values, [0.1, 0.9])
    median = statistics.median(values)
    return Timing(
        median_ms=median,
        p90_ms=float(p90),
        spread=float((p90 - p10) / median),
        ratio=statistics.median(value / other for value, other in zip(values, base, strict=True)),
        rounds=len(values),
    )


def prefill_call(runner: OnnxRuntimeRunner, tokens: int) -> Callable[[], object]:
    """Returns a call that runs a prompt of `tokens` tokens on an empty cache."""
    step = _step(tokens, 0)
    cache = runner.empty_cache(1)
    return lambda: runner.step(step, cache)


def decode_call(runner: OnnxRuntimeRunner, past: int) -> Callable[[], object]:
    """Returns a call that runs one token on a cache of `past` tokens."""
    _, cache = runner.step(_step(past, 0), None)
    step = _step(1, past)
    return lambda: runner.step(step, cache)


def _step(tokens: int, past: int) -> Step:
    return Step.after(past, np.full(tokens, 100, np.int64))
