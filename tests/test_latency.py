"""The clock: contenders in turn, ratios within a round, and nothing that warms up counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pifa_deploy import latency
from pifa_deploy.latency import decode_call, prefill_call, side_by_side
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.runners import OnnxRuntimeRunner

pytest_plugins = ("cli_plugin",)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time that passes only when it is told to; `clock(seconds)` lets it pass."""
    now = [100.0]

    def passes(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return passes


def test_a_contender_that_sleeps_twice_as_long_takes_about_twice_the_time() -> None:
    found = side_by_side({"one": lambda: time.sleep(0.01), "two": lambda: time.sleep(0.02)}, rounds=5, warmup=0)
    assert found["one"].ratio == 1.0
    assert 1.4 < found["two"].ratio < 2.6
    assert found["one"].median_ms >= 10  # sleep never returns early
    assert found["two"].median_ms >= 20


def test_contenders_take_turns_and_the_warmup_is_not_timed(clock: Callable[[float], None]) -> None:
    calls: list[str] = []

    def contender(name: str, warm: float, cold: float) -> Callable[[], None]:
        def call() -> None:
            clock(cold if calls.count(name) < 2 else warm)
            calls.append(name)

        return call

    found = side_by_side({"a": contender("a", 0.1, 9.0), "b": contender("b", 0.3, 9.0)}, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert found["a"].median_ms == pytest.approx(100)
    assert found["b"].median_ms == pytest.approx(300)
    assert found["b"].rounds == 3


def test_a_slow_moment_that_hits_a_whole_round_leaves_the_ratio(clock: Callable[[float], None]) -> None:
    slow = iter([1.0, 1.0, 5.0, 7.0, 9.0])
    factor = [1.0]

    def first() -> None:
        factor[0] = next(slow)
        clock(0.1 * factor[0])

    found = side_by_side({"a": first, "b": lambda: clock(0.2 * factor[0])}, rounds=5, warmup=0)
    assert found["b"].ratio == pytest.approx(2.0)


def test_percentiles_and_spread_are_those_of_the_rounds(clock: Callable[[float], None]) -> None:
    times = [0.01, 0.02, 0.03, 0.04, 0.10]
    remaining = iter(times)
    found = side_by_side({"a": lambda: clock(next(remaining))}, rounds=5, warmup=0)["a"]
    p10, p90 = np.percentile(np.array(times) * 1e3, [10, 90])
    assert found.median_ms == pytest.approx(30)
    assert found.p90_ms == pytest.approx(p90)
    assert found.spread == pytest.approx((p90 - p10) / 30)


@pytest.mark.parametrize(("contenders", "rounds"), [({"a": lambda: None}, 1), ({"a": lambda: None}, 0), ({}, 5)])
def test_too_few_rounds_or_contenders_are_refused(contenders: dict[str, Callable[[], None]], rounds: int) -> None:
    with pytest.raises(ValueError, match=rf"rounds is {rounds} with {len(contenders)} contenders, expected at least 2"):
        side_by_side(contenders, rounds=rounds)


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
