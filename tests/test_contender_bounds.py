"""Bounds of contenders: those of the linears one by one and of `advise`, and why there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sparse_fixtures import save_sparse
from torch import nn

from pifa_deploy.advice import AdviseOptions, advise
from pifa_deploy.bench import BenchOptions, run_bench
from pifa_deploy.cli import console
from pifa_deploy.contender_bounds import BoundOptions, bounds_of
from pifa_deploy.gpu_limits import LimitOptions
from pifa_deploy.latency import ClockOptions
from pifa_deploy.model_folder import load_model
from pifa_deploy.roofline import PIFA_FUSED
from pifa_deploy.targets import TARGETS
from pifa_deploy.timed_contenders import RunOptions, TimedContender, open_timed

pytest_plugins = ("cli_plugin",)

CPU = RunOptions(device="cpu", threads=1)
GIVEN = BoundOptions(bandwidth_gb_s=2, peak_tflops=0.003)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounds") / "sparse"
    save_sparse(folder)
    return folder


def test_the_bound_of_a_dense_model_is_its_linears_one_by_one(dense: Path) -> None:
    found = open_timed("dense", str(dense), CPU)
    bandwidth, peak, tokens = 2e9, 3e9, 7
    seconds = 0.0
    for module in load_model(dense, dtype=None).modules():
        if isinstance(module, nn.Linear):
            m, n = module.weight.shape
            seconds += max(4 * (m * n + tokens * (m + n)) / bandwidth, 2 * tokens * m * n / peak)
    assert list(bounds_of(found, [tokens], GIVEN).ms) == [pytest.approx(seconds * 1e3)]
    assert bounds_of(found, [tokens], GIVEN).reason is None


def test_the_bound_of_a_pifa_model_is_that_of_advise(checkpoint: Path) -> None:
    found = open_timed("pifa", str(checkpoint), CPU)
    target = TARGETS["orin-agx"]
    expected = advise(checkpoint, target, AdviseOptions(tokens=(1, 512), limits=LimitOptions(dtype="fp32")))
    bounds = [expected.bound(PIFA_FUSED, tokens) for tokens in (1, 512)]
    assert bounds_of(found, [1, 512], BoundOptions(target=target)).ms == tuple(
        pytest.approx(bound.seconds * 1e3) for bound in bounds if bound
    )


def test_without_figures_nothing_is_bounded_and_nothing_said(dense: Path) -> None:
    bounds = bounds_of(contender(dense), [1, 2], BoundOptions())
    assert (bounds.ms, bounds.reason) == ((None, None), None)
    with pytest.raises(ValueError, match="a bound needs --target, or both --bandwidth and --peak-tflops"):
        BoundOptions(bandwidth_gb_s=3)


def test_2_4_is_bounded_where_its_rate_is_known(sparse: Path) -> None:
    found = replace(open_timed("sparse", str(sparse), CPU), dtype="fp16")
    options = BoundOptions(target=TARGETS["rtx4090"])
    (mine,), (full,) = (bounds_of(one, [1], options).ms for one in (found, contender(sparse, dtype="fp16")))
    assert mine is not None
    assert full is not None
    assert mine < full


def contender(folder: Path, **changes: Any) -> TimedContender:
    known = {"weight_bytes": None, "loaded_bytes": 0, "parameters": None, "vocabulary": None, "runner": None}
    fields = {"kind": "dense", "runtime": "torch", "device": "cpu", "dtype": "fp32", "modules": {}, **known, **changes}
    return TimedContender(name="a", path=str(folder), **fields)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "lowrank+pifa"}, "its kind is lowrank+pifa, and dense, 2:4, lowrank, pifa are bounded"),
        ({"dtype": "mixed"}, "its dtype is mixed, and fp16, bf16, fp32 have rates"),
        ({"kind": "2:4"}, "nothing beside it says which of its linears are 2:4"),
        ({"kind": "2:4", "pruned": {"q": 10}}, "no rate of 2:4 products in fp32 is known here"),
    ],
)
def test_what_has_no_bound_says_why(dense: Path, changes: dict[str, Any], reason: str) -> None:
    bounds = bounds_of(contender(dense, **changes), [1, 2], GIVEN)
    assert (bounds.ms, bounds.reason) == ((None, None), reason)


def test_a_place_without_a_configuration_is_named(tmp_path: Path) -> None:
    expected = f"there is no config.json in {tmp_path}, which tells the sizes of its linears"
    assert bounds_of(contender(tmp_path), [1], GIVEN).reason == expected


def test_a_bench_warns_of_each_bound_that_was_asked_for_and_is_missing(dense: Path, sparse: Path) -> None:
    clock = ClockOptions(warm_up_ms=0, iterations=10, duration_s=0, rounds=10)
    options = BenchOptions(prefill=(4,), decode=(), run=CPU, clock=clock, bounds=GIVEN)
    places = {"dense": str(dense), "sparse": str(sparse)}
    (case,) = run_bench(places, options, console.stage).to_json()["cases"]
    assert [row["bound_ms"] is None for row in case["rows"]] == [False, True]
    told = [warning for warning in case["warnings"] if "no bound" in warning]
    assert told == ["sparse: no bound, no rate of 2:4 products in fp32 is known here"]
