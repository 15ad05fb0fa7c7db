"""The clock: contenders timed side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from pifa_deploy.runners import OnnxRuntimeRunner, Step


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


def side_by_side(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 2
) -> dict[str, Timing]:
    """Times callables in turn, round after round, so that a slow moment of the machine hits all of them.

    Args:
        contenders: name -> what to time; the first one is what ratios refer to.
        rounds: timed rounds, at least 2.
        warmup: untimed rounds before.
    """
    if rounds < 2 or not contenders:
        raise ValueError(f"rounds is {rounds} with {len(contenders)} contenders, expected at least 2 and 1")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in tqdm(range(warmup + rounds), desc="latency", unit="round", disable=None, leave=False):
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            if number >= warmup:
                times[name].append((time.perf_counter() - started) * 1e3)
    base = next(iter(times.values()))
    return {name: _timing(values, base) for name, values in times.items()}


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
