"""The clock: contenders in turn, ratios within a round, and nothing that warms up counted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pifa_deploy import latency
from pifa_deploy.latency import ClockOptions, decode_call, measure, prefill_call, side_by_side
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner

pytest_plugins = ("cli_plugin",)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time that passes only when it is told to; `clock(seconds)` lets it pass."""
    now = [100.0]

    def passes(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return passes


def test_a_contender_that_takes_twice_the_time_has_the_ratio_two(clock: Callable[[float], None]) -> None:
    found = side_by_side({"one": lambda: clock(0.01), "two": lambda: clock(0.02)}, rounds=5)
    assert found["one"].ratio == 1.0
    assert found["two"].ratio == pytest.approx(2.0)
    assert found["one"].median_ms == pytest.approx(10)
    assert found["two"].median_ms == pytest.approx(20)


def test_contenders_take_turns_and_the_warmup_is_not_timed(clock: Callable[[float], None]) -> None:
    calls: list[str] = []

    def contender(name: str, warm: float, cold: float) -> Callable[[], None]:
        def call() -> None:
            clock(cold if calls.count(name) < 2 else warm)
            calls.append(name)

        return call

    found = side_by_side({"a": contender("a", 0.1, 9.0), "b": contender("b", 0.3, 9.0)}, rounds=3)
    assert calls[:4] == ["a", "a", "b", "b"]
    assert [sorted(calls[start : start + 2]) for start in (4, 6, 8)] == [["a", "b"]] * 3
    assert found["a"].median_ms == pytest.approx(100)
    assert found["b"].median_ms == pytest.approx(300)
    assert found["b"].rounds == 3


def test_a_slow_moment_that_hits_a_whole_round_leaves_the_ratio(clock: Callable[[float], None]) -> None:
    # Two launches warm up, then each round is as slow for both, whoever comes first in it.
    factors = {name: iter([1.0, 1.0, 1.0, 1.0, 5.0, 7.0, 9.0]) for name in "ab"}
    found = side_by_side(
        {"a": lambda: clock(0.1 * next(factors["a"])), "b": lambda: clock(0.2 * next(factors["b"]))}, rounds=5
    )
    assert found["b"].ratio == pytest.approx(2.0)


def test_percentiles_and_spread_are_those_of_the_rounds(clock: Callable[[float], None]) -> None:
    times = [0.01, 0.02, 0.03, 0.04, 0.10]
    remaining = iter([9.0, 9.0, *times])
    found = side_by_side({"a": lambda: clock(next(remaining))}, rounds=5)["a"]
    p10, p90 = np.percentile(np.array(times) * 1e3, [10, 90])
    assert found.median_ms == pytest.approx(30)
    assert found.p90_ms == pytest.approx(p90)
    assert found.spread == pytest.approx((p90 - p10) / 30)


@pytest.mark.parametrize("rounds", [0, 1])
def test_too_few_rounds_are_refused(rounds: int) -> None:
    with pytest.raises(ValueError, match=rf"rounds is {rounds} and iterations {rounds}, expected at least 2 and 1"):
        side_by_side({"a": lambda: None}, rounds=rounds)


def test_no_contenders_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no contenders, expected at least one"):
        measure({}, ClockOptions())


@pytest.mark.parametrize(("option", "value"), [("warm_up_ms", -1.0), ("duration_s", float("nan"))])
def test_times_out_of_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{option} is {value}, expected at least 0"):
        ClockOptions(**{option: value})  # type: ignore[arg-type]


class Gpu:
    """A timed call on a GPU that exists on paper: launching takes `enqueue` seconds, the work `compute`."""

    def __init__(self, clock: Callable[[float], None], enqueue: float, compute: float) -> None:
        self.clock, self.enqueue, self.compute = clock, enqueue, compute
        self.waiting = self.waits = False
        self.launches = 0

    def launch(self) -> None:
        assert not self.waiting
        self.waiting = True
        self.launches += 1
        self.clock(self.enqueue)

    def wait(self) -> None:
        self.waiting = False
        self.clock(max(self.compute - self.enqueue, 0))

    def gpu_ms(self) -> float | None:
        assert not self.waiting
        return self.compute * 1e3

    def close(self) -> None: ...


def test_latency_enqueue_and_gpu_time_are_told_apart(clock: Callable[[float], None]) -> None:
    laps = measure({"a": Gpu(clock, 0.001, 0.004)}, ClockOptions(rounds=2, iterations=6, duration_s=0))["a"]
    assert laps.latency_ms == pytest.approx([4.0] * 6)
    assert laps.enqueue_ms == pytest.approx([1.0] * 6)
    assert laps.gpu_compute_ms == pytest.approx([4.0] * 6)


def test_a_launch_that_waits_for_the_gpu_has_no_enqueue_time(clock: Callable[[float], None]) -> None:
    call = Gpu(clock, 0.004, 0.004)
    call.waits = True
    laps = measure({"a": call}, ClockOptions(rounds=2, iterations=2, duration_s=0))["a"]
    assert laps.enqueue_ms is None
    assert laps.gpu_compute_ms == pytest.approx([4.0] * 2)


def test_on_a_cpu_there_is_no_enqueue_and_no_gpu_time(clock: Callable[[float], None]) -> None:
    call = Gpu(clock, 0.004, 0.004)
    call.gpu_ms = lambda: None  # type: ignore[method-assign]
    laps = measure({"a": call}, ClockOptions(rounds=2, iterations=2, duration_s=0))["a"]
    assert (laps.enqueue_ms, laps.gpu_compute_ms) == (None, None)


@pytest.mark.parametrize(
    ("iterations", "duration_s", "expected"),
    [
        (10, 0.0, 5),  # so many a round at least
        (10, 1.0, 7),  # eight fit into half a second, the first finds other data in the caches
        (2, 0.2, 2),  # two alone: none is left out
        (1, 0.0, 1),
    ],
)
def test_a_turn_lasts_until_both_time_and_launches_are_reached(
    clock: Callable[[float], None], iterations: int, duration_s: float, expected: int
) -> None:
    options = ClockOptions(rounds=2, iterations=iterations, duration_s=duration_s, warm_up_ms=0)
    laps = measure({"a": Gpu(clock, 0.0625, 0.0625)}, options)["a"]
    assert [len(turn) for turn in laps.rounds] == [expected] * 2


def test_the_warm_up_lasts_as_long_as_asked(clock: Callable[[float], None]) -> None:
    call = Gpu(clock, 0.0625, 0.0625)
    measure({"a": call}, ClockOptions(rounds=2, iterations=2, duration_s=0, warm_up_ms=500))
    assert call.launches == 8 + 2


def test_the_order_within_rounds_varies_and_the_seed_repeats_it() -> None:
    def order(seed: int) -> list[str]:
        seen: list[str] = []
        side_by_side_calls = {name: Noted(name, seen) for name in "abc"}
        measure(side_by_side_calls, ClockOptions(rounds=8, iterations=8, duration_s=0, warm_up_ms=0, seed=seed))
        return seen[6:]

    found = order(0)
    turns = [tuple(found[start : start + 3]) for start in range(0, 24, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 2
    assert found == order(0)
    assert found != order(1)


class Noted(Gpu):
    """Writes down who was launched."""

    def __init__(self, name: str, seen: list[str]) -> None:
        super().__init__(lambda seconds: None, 0.0, 0.0)
        self.name, self.seen = name, seen

    def launch(self) -> None:
        self.seen.append(self.name)


def test_the_garbage_collector_rests_while_times_are_taken_and_works_again_after_a_failure() -> None:
    class Failing(Gpu):
        def launch(self) -> None:
            assert not gc.isenabled()
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure({"a": Failing(lambda seconds: None, 0.0, 0.0)}, ClockOptions())
    assert gc.isenabled()


def test_prefill_and_decode_run_what_they_say(onnx_folder: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'pifa-deploy[cpu]'")
    runner = OnnxRuntimeRunner(open_folder(onnx_folder))
    logits, cache = prefill_call(runner, 9)()
    assert logits.shape == (1, 9, 384)
    assert {value.shape[2] for value in cache.values()} == {9}
    call = decode_call(runner, 9)
    for _ in range(2):  # each call starts from the same cache
        logits, cache = call()
        assert logits.shape == (1, 1, 384)
        assert {value.shape[2] for value in cache.values()} == {10}
