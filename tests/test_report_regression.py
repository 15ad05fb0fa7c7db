"""Which figures of two reports are held against each other, and when that is a failure."""

from __future__ import annotations

from typing import Any

import pytest

from pifa_deploy.report_regression import regressions, worsening


def figure(name: str, value: float, unit: str, better: str = "lower") -> dict[str, Any]:
    return {"variant": "pifa", "figure": name, "value": value, "unit": unit, "better": better}


def stages(cpu: str) -> dict[str, Any]:
    return {"bench": [{"label": "b", "content": {"environment": {"cpu": cpu, "gpus": []}}}]}


def decided(
    before: list[dict[str, Any]], now: list[dict[str, Any]], *, cpus: tuple[str, str] = ("a", "a")
) -> dict[str, Any]:
    earlier = {"figures": before, "stages": stages(cpus[0])}
    found = regressions(earlier, now, stages(cpus[1]), 0.05)
    return {decision["name"].split(",")[0].removeprefix("pifa: "): decision["passed"] for decision in found}


def nothing(before: list[dict[str, Any]], now: list[dict[str, Any]], *, cpu: str = "a") -> str:
    """Returns why nothing is decided."""
    (decision,) = regressions({"figures": before, "stages": stages("a")}, now, stages(cpu), 0.05)
    assert decision["passed"] is None
    return str(decision["reason"])


@pytest.mark.parametrize(
    ("before", "now", "better", "expected"),
    [
        (100.0, 104.0, "lower", 0.04),
        (100.0, 90.0, "lower", -0.1),
        (2.0, 1.5, "higher", 0.25),
        (2.0, 3.0, "higher", -0.5),
        (0.0, 1.0, "lower", 1.0),
        (0.0, 0.0, "lower", 0.0),
    ],
)
def test_worse_is_a_share_of_what_was(before: float, now: float, better: str, expected: float) -> None:
    assert worsening(before, now, better=better) == pytest.approx(expected)


def test_figures_pass_up_to_the_limit_in_their_own_direction() -> None:
    before = [figure("weights", 100, "bytes"), figure("perplexity", 20.0, ""), figure("speed-up", 1.5, "x", "higher")]
    now = [figure("weights", 104, "bytes"), figure("perplexity", 22.0, ""), figure("speed-up", 1.3, "x", "higher")]
    assert decided(before, now) == {"weights": True, "perplexity": False, "speed-up": False}


def test_times_are_compared_on_the_same_machine_only() -> None:
    before, now = [figure("prefill", 10.0, "ms")], [figure("prefill", 20.0, "ms")]
    assert decided(before, now) == {"prefill": False}
    reason = "the earlier report has nothing to compare with: times of another machine are not judged"
    assert nothing(before, now, cpu="b") == reason
    weights = figure("weights", 100, "bytes")
    assert decided([*before, weights], [*now, weights], cpus=("a", "b")) == {"weights": True}


def test_rounding_noise_is_not_compared() -> None:
    kl = [[figure("mean KL", value, "nats")] for value in (1e-10, 3e-10)]
    assert nothing(*kl) == "the earlier report has nothing to compare with"


def test_a_report_without_figures_decides_nothing() -> None:
    assert nothing([], [figure("weights", 100, "bytes")]) == "the earlier report has nothing to compare with"


def test_a_figure_that_is_gone_is_not_decided() -> None:
    assert decided([figure("weights", 100, "bytes")], []) == {"weights": None}
