"""What is said of measured times: warnings in trtexec's words, decisions on the lower end, and the JSON of it all."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pifa_deploy.bench_report import BenchGates, Case, Row, Size, judge, warnings_of
from pifa_deploy.environment import Load
from pifa_deploy.gpu_state import GpuState
from pifa_deploy.latency import Lap, Laps
from pifa_deploy.proof import ProofGates
from pifa_deploy.report_variants import cases_of
from pifa_deploy.timing_statistics import SpeedUp

QUIET = Load(load_average=0.1, other_cpus=0.02, stolen_cpus=0.0)
SIZE = Size(phase="decode", batch=1, tokens=1, past=128)
STEADY = (4.0, 4.02, 3.98)


def laps(times: tuple[float, ...] = STEADY, *, rounds: int = 20, **gpu: float) -> Laps:
    """Returns rounds of the same launches; `gpu` is enqueue_ms and gpu_compute_ms of each."""
    turn = tuple(Lap(latency_ms=time, **gpu) for time in times)
    return Laps(rounds=(turn,) * rounds)


def row(name: str = "pifa", found: Laps | None = None, *, low: float = 1.3, **more: Any) -> Row:
    gain = SpeedUp(median=low + 0.1, low=low, high=low + 0.2)
    return Row(name=name, laps=found or laps(), tokens=1, speed_up=gain, **more)


def case(*rows: Row, load: Load = QUIET, **more: Any) -> Case:
    return Case(size=SIZE, rows=rows or (row(),), load=load, **more)


def test_a_steady_case_on_a_quiet_machine_has_no_warning() -> None:
    assert warnings_of(case(), None) == ()
    gpu = GpuState(name="GPU", event_reasons=0, other_processes=0)
    steady = row(found=laps(enqueue_ms=1.0, gpu_compute_ms=3.9))
    assert warnings_of(case(steady, before=gpu, after=gpu), None) == ()


def test_enqueue_bound_is_warned_of() -> None:
    (found,) = warnings_of(case(row(found=laps(enqueue_ms=3.9, gpu_compute_ms=3.5))), None)
    assert found == "pifa: enqueue-bound, enqueue time 3.9 ms, GPU compute time 3.5 ms; --cuda-graph may help"


def test_a_spread_above_the_limit_is_warned_of() -> None:
    unsteady = row(found=laps((4.0, 4.4, 3.6)))
    (found,) = warnings_of(case(unsteady), None)
    assert found == "pifa: unstable, coefficient of variation 8.2%, above 2.5%"
    assert warnings_of(case(unsteady), 0.1) == ()
    assert "above 5.0%" in warnings_of(case(unsteady), 0.05)[0]


def test_on_a_gpu_its_own_time_decides_what_is_steady() -> None:
    turn = tuple(Lap(latency_ms=time, enqueue_ms=0.5, gpu_compute_ms=3.0) for time in (4.0, 6.0, 5.0))
    assert warnings_of(case(row(found=Laps(rounds=(turn,) * 20))), None) == ()


def test_few_rounds_are_warned_of() -> None:
    (found,) = warnings_of(case(row(found=laps(rounds=9))), None)
    assert found == "9 rounds: intervals are too narrow below 10"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load": Load(load_average=1, other_cpus=0.8, stolen_cpus=0)}, "busy machine: other processes used 0.80 CPUs"),
        ({"load": Load(load_average=1, other_cpus=0, stolen_cpus=0.4)}, "the hypervisor took 0.40 CPUs away meanwhile"),
        ({"after": GpuState(name="GPU", event_reasons=0x44)}, "held its clocks down: software power cap, hardware"),
        (
            {
                "before": GpuState(name="GPU", held_down_s={"thermal limit": 7.0}),
                "after": GpuState(name="GPU", event_reasons=0, held_down_s={"thermal limit": 9.5}),
            },
            "held its clocks down: thermal limit for 2.5 s",
        ),
        ({"before": GpuState(name="GPU", other_processes=2)}, "2 other processes use the GPU"),
    ],
)
def test_what_disturbed_a_case_is_warned_of(changes: dict[str, Any], message: str) -> None:
    (found,) = warnings_of(case(**changes), None)
    assert message in found


def test_busy_processors_do_not_disturb_a_gpu() -> None:
    load, gpu = Load(load_average=9, other_cpus=3, stolen_cpus=None), GpuState(name="GPU")
    assert warnings_of(case(load=load, after=gpu), None) == ()


def test_a_gate_is_decided_on_the_lower_end() -> None:
    (passed,) = judge((case(row(low=1.21)),), BenchGates(speed_up={"pifa": 1.2}))
    (failed,) = judge((case(row(low=1.19)),), BenchGates(speed_up={"pifa": 1.2}))
    assert (passed.passed, failed.passed) == (True, False)
    assert failed.name == "decode at 128: speed-up of pifa, lower end"
    assert (failed.value, failed.limit) == (1.19, 1.2)


def test_the_spread_decides_only_beside_another_gate() -> None:
    unsteady = case(row(found=laps((4.0, 4.4, 3.6))))
    assert judge((unsteady,), BenchGates(max_spread=0.05)) == ()
    found = judge((unsteady,), BenchGates(speed_up={"pifa": 1.2}, max_spread=0.05))
    assert [one.passed for one in found] == [True, False]
    assert found[1].name == "decode at 128: largest coefficient of variation"
    assert judge((unsteady,), BenchGates(proof=ProofGates(plugin=True), max_spread=0.05)) == found[1:]


def test_a_bound_that_is_missing_is_warned_of() -> None:
    (found,) = warnings_of(case(row(unbounded="its dtype is mixed")), None)
    assert found == "pifa: no bound, its dtype is mixed"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(("batch", "tokens", "past"), [(1, 128, 0), (4, 16, 0), (1, 1, 96), (2, 8, 64)])
def test_a_report_calls_a_case_as_the_bench_does(phase: str, batch: int, tokens: int, past: int) -> None:
    size = Size(phase=phase, batch=batch, tokens=tokens, past=past)
    written = replace(case(), size=size).to_json(None)
    assert list(cases_of({"bench": [{"content": {"cases": [written]}}]})) == [size.label]


@pytest.mark.parametrize("gates", [{"speed_up": {"pifa": 0.0}}, {"max_spread": -1.0}, {"max_spread": float("nan")}])
def test_a_limit_that_is_not_positive_is_refused(gates: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"the limit for \w+ is .*, expected a positive number"):
        BenchGates(**gates)


def test_figures_of_a_row_follow_from_its_times() -> None:
    found = Row(
        name="pifa",
        laps=laps((8.0, 8.0, 8.0), enqueue_ms=1.0, gpu_compute_ms=5.0),
        tokens=512,
        speed_up=SpeedUp(median=1, low=1, high=1),
        joules=2.048,
        bound_ms=4.0,
    )
    value = json.loads(json.dumps(found.to_json()))
    assert value["tokens_per_s"] == 64_000
    assert value["joules_per_token"] == 0.004
    assert value["bound_fraction"] == 0.8  # of the GPU's time, the bound knows no host
    assert len(value["samples_ms"]) == 60
    assert value["round_ms"] == [8.0] * 20
    assert set(value["latency_ms"]) == {"min", "max", "mean", "median", "p90", "p95", "p99", "cv"}
    assert not any(name.startswith(("h2d", "d2h")) for name in value)  # nothing is copied, and so nothing is timed
