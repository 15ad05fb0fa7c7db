"""Percentiles, and an interval that holds the true ratio as often as it says: simulated against a known truth."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from pifa_deploy.bench_report import FEW_ROUNDS
from pifa_deploy.timing_statistics import speed_up, time_statistics

TRUTH = 1.25


def rounds(seed: int, number: int, *, drift: float = 0.3, noise: float = 0.02) -> tuple[list[float], list[float]]:
    """Returns times of a baseline and of a contender TRUTH times faster; a round's drift hits both alike."""
    random = np.random.default_rng(seed)
    slow = np.exp(random.normal(0, drift, number))
    base = 10 * slow * np.exp(random.normal(0, noise, number))
    other = 10 / TRUTH * slow * np.exp(random.normal(0, noise, number))
    return base.tolist(), other.tolist()


def coverage(number: int, experiments: int = 300) -> float:
    held = 0
    for seed in range(experiments):
        found = speed_up(*rounds(seed, number), resamples=1000)
        held += found.low <= TRUTH <= found.high
    return held / experiments


def test_statistics_are_those_of_the_standard_library() -> None:
    values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0]
    found = time_statistics(values)
    centiles = statistics.quantiles(values, n=100, method="inclusive")
    assert (found.min, found.max, found.median) == (1.0, 9.0, 3.0)
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert [found.p90, found.p95, found.p99] == pytest.approx([centiles[89], centiles[94], centiles[98]])
    assert found.cv == pytest.approx(statistics.pstdev(values) / statistics.fmean(values))


def test_one_time_has_statistics_and_none_has_not() -> None:
    assert time_statistics([2.0]).cv == 0
    with pytest.raises(ValueError, match="there are no times, expected at least one"):
        time_statistics([])


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    # 300 experiments: the standard error of a coverage of 0.95 is 0.013.
    assert 0.91 <= coverage(20) <= 0.99


def test_few_rounds_hold_it_too_seldom_which_is_why_they_are_warned_of() -> None:
    assert coverage(3) < 0.85
    assert coverage(FEW_ROUNDS) > 0.9


def test_without_pairing_a_drifting_machine_drowns_the_difference() -> None:
    base, other = rounds(1, 20)
    paired = speed_up(base, other)
    order = np.random.default_rng(2).permutation(len(other))
    broken = speed_up(base, [other[place] for place in order])
    assert paired.low > 1.2
    assert paired.high < 1.3
    assert broken.high - broken.low > 5 * (paired.high - paired.low)
    assert broken.low < 1.2


def test_a_contender_against_itself_is_exactly_as_fast() -> None:
    base, _ = rounds(3, 12)
    found = speed_up(base, base)
    assert (found.low, found.median, found.high) == (1, 1, 1)


def test_the_same_seed_gives_the_same_interval() -> None:
    base, other = rounds(4, 15)
    assert speed_up(base, other, seed=7) == speed_up(base, other, seed=7)
    assert speed_up(base, other, seed=7) != speed_up(base, other, seed=8)


@pytest.mark.parametrize(
    ("base", "other", "message"),
    [
        ([1.0], [1.0], "there are 1 and 1 rounds, expected as many and at least 2"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "there are 2 and 3 rounds"),
        ([1.0, 2.0], [1.0, 0.0], "a time is not positive"),
    ],
)
def test_rounds_that_cannot_be_compared_are_refused(base: list[float], other: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speed_up(base, other)
