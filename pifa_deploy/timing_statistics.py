"""What measured times say: percentiles in trtexec's words, and the ratio of two contenders with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True)
class TimeStatistics:
    """Times of one contender in milliseconds; `cv` is the standard deviation relative to the mean."""

    min: float
    max: float
    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    cv: float

    def to_json(self) -> dict[str, float]:
        """Returns the fields as JSON values."""
        return asdict(self)


def time_statistics(samples_ms: Sequence[float]) -> TimeStatistics:
    """Returns the statistics of at least one time; raises ValueError for none."""
    if not samples_ms:
        raise ValueError("there are no times, expected at least one")
    values = np.asarray(samples_ms, np.float64)
    median, p90, p95, p99 = (float(value) for value in np.quantile(values, [0.5, 0.9, 0.95, 0.99]))
    mean = float(values.mean())
    return TimeStatistics(
        min=float(values.min()),
        max=float(values.max()),
        mean=mean,
        median=median,
        p90=p90,
        p95=p95,
        p99=p99,
        cv=float(values.std()) / mean if mean else 0.0,
    )


@dataclass(frozen=True, kw_only=True)
class SpeedUp:
    """How many times faster than the baseline: median over the rounds, and the interval that holds it."""

    median: float
    low: float
    high: float
    confidence: float = CONFIDENCE

    def to_json(self) -> dict[str, float]:
        """Returns the fields as JSON values."""
        return asdict(self)


def speed_up(
    baseline_ms: Sequence[float], times_ms: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> SpeedUp:
    """Returns baseline time / time with a paired percentile bootstrap interval.

    Both sequences hold one time a round. A round is drawn with both of its times, so that a slow moment of the
    machine, which hits both, widens nothing. (Efron and Tibshirani, An Introduction to the Bootstrap, 13.3; the
    bias-corrected interval is not taken, its correction is undefined for a median of few rounds.)

    Args:
        baseline_ms: of the baseline, [rounds].
        times_ms: of the contender in the same rounds.
        resamples: drawn sets of rounds.
        seed: of the draw.

    Raises:
        ValueError: fewer than 2 rounds, different numbers of rounds, or a time that is not positive.
    """
    if len(baseline_ms) != len(times_ms) or len(times_ms) < 2:
        raise ValueError(f"there are {len(baseline_ms)} and {len(times_ms)} rounds, expected as many and at least 2")
    base, other = np.asarray(baseline_ms, np.float64), np.asarray(times_ms, np.float64)
    if not (base > 0).all() or not (other > 0).all():
        raise ValueError("a time is not positive, expected milliseconds above 0")
    ratios = base / other
    drawn = np.random.default_rng(seed).integers(0, len(ratios), size=(resamples, len(ratios)))
    medians = np.median(ratios[drawn], axis=1)
    low, high = np.quantile(medians, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return SpeedUp(median=float(np.median(ratios)), low=float(low), high=float(high))
