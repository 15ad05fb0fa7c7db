"""The figures against scipy's, and the decisions made from them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import cosine
from scipy.special import log_softmax, rel_entr, softmax

from pifa_deploy.logit_difference import Comparison, Difference, difference_from_json, json_figures, to_json
from pifa_deploy.logit_rows import TOP1_GAP, blocks, bootstrap_interval
from pifa_deploy.parity import DEFAULT_GATES, GateResult, Gates, Verdict, judge

SOUND = Difference(
    name="overall",
    positions=8192,
    finite=True,
    max_abs=1e-2,
    cosine=0.9999,
    mean_kl=1e-4,
    p999_kl=1e-3,
    top1=0.995,
    decided=8000,
)
GATES = Gates(mean_kl=2e-4, top1=0.99, low_rank_ratio=4.0)


def logits(positions: int, noise: float, *, seed: int = 0, vocabulary: int = 50) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    reference = random.normal(size=(positions, vocabulary)) * 3
    return reference.astype(np.float32), (reference + noise * random.normal(size=reference.shape)).astype(np.float32)


def kl(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    p, q = softmax(reference.astype(np.float64), axis=-1), softmax(candidate.astype(np.float64), axis=-1)
    return rel_entr(p, q).sum(-1)


@pytest.mark.parametrize("noise", [1.0, 1e-1, 1e-3])
def test_figures_are_those_of_scipy(noise: float) -> None:
    reference, candidate = logits(2000, noise)
    found = Comparison().add("case", reference, candidate)
    expected = kl(reference, candidate)
    assert found.mean_kl == pytest.approx(expected.mean(), rel=1e-6)
    assert found.p999_kl == pytest.approx(np.percentile(expected, 99.9), rel=1e-6)
    distances = [cosine(*pair) for pair in zip(reference.astype(float), candidate.astype(float), strict=True)]
    assert found.cosine == pytest.approx(1 - max(distances), abs=1e-12)
    assert found.max_abs == np.abs(reference.astype(float) - candidate.astype(float)).max()
    assert (found.positions, found.finite, found.name) == (2000, True, "case")


def test_kl_counts_from_the_reference() -> None:
    reference, candidate = logits(20, 2.0)
    there, back = Comparison().add("", reference, candidate), Comparison().add("", candidate, reference)
    assert there.mean_kl == pytest.approx(kl(reference, candidate).mean())
    assert there.mean_kl != pytest.approx(back.mean_kl, rel=1e-2)


def test_differences_of_float32_rounding_are_resolved() -> None:
    reference, candidate = logits(200, 0.0)
    candidate = np.nextafter(reference, np.inf, dtype=np.float32)
    found = Comparison().add("", reference, candidate).mean_kl
    # For a small difference d the divergence is half the variance of d under the reference.
    p, d = softmax(reference.astype(float), axis=-1), candidate.astype(float) - reference
    expected = ((p * d**2).sum(-1) - (p * d).sum(-1) ** 2).mean() / 2
    assert found == pytest.approx(expected, rel=1e-2, abs=0)


def test_top1_counts_only_where_the_reference_has_a_winner() -> None:
    rows = [
        ([3.0, 1.0, 0.0], [3.0, 1.0, 0.0]),  # the winner is found
        ([3.0, 1.0, 0.0], [1.0, 3.0, 0.0]),  # another one
        ([3.0, 3.0 - TOP1_GAP / 2, 0.0], [0.0, 3.0, 0.0]),  # nobody wins
        ([3.0, 3.0 - TOP1_GAP * 2, 0.0], [3.0, 3.0 - TOP1_GAP, 0.0]),  # by little, and found
    ]
    reference, candidate = (np.array(part) for part in zip(*rows, strict=True))
    found = Comparison().add("", reference, candidate)
    assert found.decided == 3
    assert found.top1 == pytest.approx(2 / 3)


def test_without_a_winner_anywhere_top1_is_one() -> None:
    flat = np.zeros((4, 9))
    found = Comparison().add("", flat + 1, flat + 1)
    assert (found.decided, found.top1) == (0, 1.0)


def test_equal_logits_have_no_difference() -> None:
    reference, _ = logits(30, 0.0)
    found = Comparison().add("", reference, reference)
    assert (found.max_abs, found.mean_kl, found.p999_kl, found.top1) == (0.0, 0.0, 0.0, 1.0)
    assert found.cosine == pytest.approx(1, abs=1e-15)


def test_huge_logits_do_not_overflow() -> None:
    reference, candidate = logits(30, 1e-3)
    found = Comparison().add("", reference * 1e4, candidate * 1e4)
    assert found.mean_kl == pytest.approx(kl(reference * 1e4, candidate * 1e4).mean())
    assert math.isfinite(found.p999_kl)


def test_a_shifted_row_is_the_same_distribution() -> None:
    reference, _ = logits(30, 0.0)
    assert Comparison().add("", reference.astype(float), reference.astype(float) + 7).mean_kl < 1e-28


def test_overall_weighs_positions_and_not_cases() -> None:
    comparison = Comparison()
    cases = [logits(count, noise, seed=count) for count, noise in ((1, 1.0), (300, 1e-2), (40, 0.3))]
    for i, (reference, candidate) in enumerate(cases):
        comparison.add(f"case {i}", reference, candidate)
    whole = Comparison().add("overall", *(np.concatenate(part) for part in zip(*cases, strict=True)))
    overall = asdict(comparison.overall())
    assert overall == {key: pytest.approx(value) for key, value in asdict(whole).items()}
    assert [case.name for case in comparison.cases] == ["case 0", "case 1", "case 2"]


def test_another_number_of_positions_is_an_error() -> None:
    reference, candidate = logits(5, 0.1)
    with pytest.raises(ValueError, match=r"logits are \[5, 50\] and \[4, 50\]; expected as many"):
        Comparison().add("", reference, candidate[:4])


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_one_value_that_is_not_finite_fails_every_gate(side: str, bad: float) -> None:
    reference, candidate = logits(10, 1e-6)
    (reference if side == "reference" else candidate)[3, 4] = bad
    comparison = Comparison()
    comparison.add("good", *logits(10, 1e-6))
    comparison.add("bad", reference, candidate)
    overall = comparison.overall()
    assert not overall.finite
    verdict = judge(overall, GATES, low_rank=SOUND)
    assert not verdict
    assert [gate.name for gate in verdict.failed()] == [
        "finite",
        "mean_kl",
        "top1",
        "low_rank_ratio",
    ]
    assert not judge(overall, Gates(mean_kl=None, top1=None, low_rank_ratio=None))
    written = json.dumps(to_json(comparison.cases, overall), allow_nan=False)
    figures = json.loads(written)
    assert figures["cases"][0]["mean_kl"] == comparison.cases[0].mean_kl
    for record in (figures["cases"][1], figures["overall"]):
        assert record["finite"] is False
        assert {record[key] for key in ("max_abs", "cosine", "mean_kl", "p999_kl", "top1")} == {None}


class TestJudging:
    def test_a_sound_difference_passes_and_is_true(self) -> None:
        verdict = judge(SOUND, GATES, low_rank=replace(SOUND, mean_kl=5e-5))
        assert verdict
        assert not verdict.failed()
        names = ["finite", "mean_kl", "top1", "low_rank_ratio", "low_rank_ratio_p999_kl"]
        assert [gate.name for gate in verdict.gates] == names

    @pytest.mark.parametrize(
        ("change", "gate", "value", "limit"),
        [
            ({"mean_kl": 2.1e-4}, "mean_kl", 2.1e-4, 2e-4),
            ({"top1": 0.989}, "top1", 0.989, 0.99),
        ],
    )
    def test_one_figure_beyond_its_limit_fails(
        self, change: dict[str, Any], gate: str, value: float, limit: float
    ) -> None:
        verdict = judge(replace(SOUND, **change), GATES)
        assert not verdict
        assert verdict.failed() == [GateResult(name=gate, value=value, limit=limit, passed=False)]

    def test_a_figure_at_its_limit_passes(self) -> None:
        assert judge(replace(SOUND, mean_kl=2e-4, top1=0.99), GATES, low_rank=replace(SOUND, mean_kl=5e-5))

    def test_none_switches_a_gate_off(self) -> None:
        bad = replace(SOUND, mean_kl=9.0, top1=0.0)
        assert judge(bad, Gates(mean_kl=None, top1=None, low_rank_ratio=None), low_rank=SOUND)
        assert not judge(bad, Gates(mean_kl=None, top1=0.1))
        assert not judge(bad, Gates(mean_kl=1.0, top1=None))

    def test_the_same_figures_are_judged_again_with_other_gates(self) -> None:
        assert not judge(SOUND, replace(GATES, mean_kl=1e-5))
        assert judge(SOUND, replace(GATES, mean_kl=1e-3))

    @pytest.mark.parametrize(("noise", "passes"), [(2.6e-5, True), (2.4e-5, False), (0.0, False)])
    def test_at_most_four_times_the_noise_of_low_rank_is_allowed(self, noise: float, passes: bool) -> None:
        verdict = judge(SOUND, GATES, low_rank=replace(SOUND, mean_kl=noise))
        assert bool(verdict) is passes
        assert verdict.gates[3].value == (SOUND.mean_kl / noise if noise else math.inf)
        json.dumps([json_figures(gate) for gate in verdict.gates], allow_nan=False)

    def test_no_noise_on_both_sides_is_no_ratio(self) -> None:
        verdict = judge(replace(SOUND, mean_kl=0.0), GATES, low_rank=replace(SOUND, mean_kl=0.0))
        assert verdict
        assert verdict.gates[3].value == 0.0

    def test_a_model_without_low_rank_layers_has_no_ratio(self) -> None:
        assert "low_rank_ratio" not in [gate.name for gate in judge(SOUND, GATES).gates]

    def test_without_any_gate_nothing_is_decided(self) -> None:
        assert Verdict(gates=()).passed is None
        assert not Verdict(gates=())

    @pytest.mark.parametrize(("positions", "judged"), [(7999, False), (8000, True)])
    def test_a_ratio_of_percentiles_takes_thousands_of_positions(self, positions: int, judged: bool) -> None:
        few, twin = replace(SOUND, positions=positions, p999_kl=1e-2), replace(SOUND, p999_kl=1e-3)
        verdict = judge(few, GATES, low_rank=twin)
        assert ("low_rank_ratio_p999_kl" in [gate.name for gate in verdict.failed()]) == judged

    @pytest.mark.parametrize("worst", [3e-4, math.nan])
    def test_a_kind_of_case_has_the_limit_of_all(self, worst: float) -> None:
        kinds = [replace(SOUND, name="prefill"), replace(SOUND, name="decode", mean_kl=worst)]
        (failed,) = judge(SOUND, GATES, kinds=kinds).failed()
        assert (failed.name, failed.reason, failed.limit) == ("mean_kl_worst_kind", "of decode", 2e-4)
        assert judge(SOUND, GATES, kinds=[replace(kind, mean_kl=2e-4) for kind in kinds])


def test_kinds_are_summed_up_apart() -> None:
    comparison, parts = Comparison(), [logits(50, 10.0**-power, seed=power) for power in (1, 2, 3)]
    for kind, part in zip(("a", "b", "a"), parts, strict=True):
        comparison.add("case", *part, kind=kind)
    found = {kind.name: kind for kind in comparison.by_kind()}
    assert {name: kind.positions for name, kind in found.items()} == {"a": 100, "b": 50}
    values = [kl(*part) for part in parts]
    assert found["a"].mean_kl == pytest.approx(np.concatenate([values[0], values[2]]).mean(), rel=1e-6)
    assert found["b"].mean_kl == pytest.approx(values[1].mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean_kl", -1e-9, "gate mean_kl is -1e-09, expected a finite number of at least 0"),
        ("mean_kl", math.nan, "gate mean_kl is nan"),
        ("low_rank_ratio", math.inf, "gate low_rank_ratio is inf"),
        ("top1", 1.01, "gate top1 is 1.01, expected a share of at most 1"),
    ],
)
def test_a_limit_that_cannot_be_one_is_an_error(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GATES, **{name: value})


def test_every_dtype_has_limits_and_narrower_ones_wider_limits() -> None:
    assert set(DEFAULT_GATES) == {"fp32", "fp16", "bf16"}
    ordered = [DEFAULT_GATES[name] for name in ("fp32", "fp16", "bf16")]
    assert sorted(ordered, key=lambda gates: gates.mean_kl) == ordered
    assert sorted(ordered, key=lambda gates: -gates.top1) == ordered


def test_saved_figures_are_judged_again_with_other_gates() -> None:
    random = np.random.default_rng(3)
    comparison = Comparison()
    logits = random.normal(size=(6, 50))
    measured = comparison.add("noisy", logits, logits + 1e-2 * random.normal(size=(6, 50)))
    loaded = difference_from_json(json.loads(json.dumps(json_figures(measured))))
    assert loaded == measured
    assert judge(loaded, Gates(mean_kl=1.0, top1=None))
    assert not judge(loaded, Gates(mean_kl=measured.mean_kl / 2, top1=None))


def test_saved_figures_of_a_broken_run_fail_again() -> None:
    logits = np.zeros((2, 5))
    broken = Comparison()
    broken.add("broken", logits, logits * np.nan)
    loaded = difference_from_json(json.loads(json.dumps(json_figures(broken.overall()))))
    assert math.isnan(loaded.mean_kl)
    assert not judge(loaded, Gates(mean_kl=1.0, top1=None))


class TestNllDifference:
    def test_is_that_of_scipy_at_the_labels(self) -> None:
        reference, candidate = logits(400, 0.3)
        labels = np.random.default_rng(1).integers(0, 50, 400)
        labels[::7] = -1
        comparison = Comparison()
        comparison.add("case", reference, candidate, labels)
        found = comparison.overall()
        known = labels >= 0
        p, q = (log_softmax(side.astype(float), axis=-1)[known, labels[known]] for side in (reference, candidate))
        assert found.labelled == known.sum()
        assert found.delta_nll == pytest.approx((p - q).mean(), rel=1e-9)
        assert found.delta_nll_low < found.delta_nll < found.delta_nll_high

    def test_without_labels_there_is_none_and_no_gate(self) -> None:
        comparison = Comparison()
        comparison.add("case", *logits(20, 0.1))
        found = comparison.overall()
        assert (found.delta_nll, found.delta_nll_low, found.labelled) == (None, None, 0)
        assert "delta_nll" not in [gate.name for gate in judge(found, replace(GATES, delta_nll=1e-9)).gates]

    def test_the_interval_holds_the_mean_nineteen_times_in_twenty_and_widens_with_dependence(self) -> None:
        """Neighbours that move together, as positions of one text do: drawn one by one they would seem certain."""
        random = np.random.default_rng(2)
        inside, widths = 0, []
        for trial in range(300):
            series = np.repeat(random.normal(size=40), 16) + 0.1 * random.normal(size=640)
            low, high = bootstrap_interval(blocks(series, 64), seed=trial)
            inside += low <= 0 <= high
            widths.append(high - low)
            if not trial:
                alone = bootstrap_interval(blocks(series, 1))
                assert alone[1] - alone[0] < 0.5 * (high - low)
        assert 0.85 < inside / 300 <= 1.0
        assert np.mean(widths) == pytest.approx(2 * 1.96 / 40**0.5, rel=0.25)

    def test_blocks_leave_out_what_is_unknown(self) -> None:
        values = np.array([1.0, math.nan, 3.0, math.nan, math.nan, math.nan, 5.0])
        assert blocks(values, 3).tolist() == [[4.0, 2.0], [5.0, 1.0]]

    def test_the_twin_counts_by_the_farther_end_of_its_interval(self) -> None:
        found = replace(SOUND, delta_nll=3e-4, labelled=100)
        twin = replace(SOUND, mean_kl=1e-4, delta_nll=1e-9, delta_nll_low=-1e-4, delta_nll_high=5e-5)
        gate = judge(found, GATES, low_rank=twin).gates[-1]
        assert (gate.name, gate.passed) == ("low_rank_ratio_delta_nll", True)
        assert gate.value == pytest.approx(3.0)
        assert not judge(replace(found, delta_nll=-5e-4), GATES, low_rank=twin)


def test_a_twin_below_the_floor_counts_as_the_floor() -> None:
    twin, found = replace(SOUND, mean_kl=1e-14, p999_kl=1e-13), replace(SOUND, mean_kl=3e-11, p999_kl=2e-10)
    gates = Gates(mean_kl=None, top1=None)
    assert not judge(found, gates, low_rank=twin)
    assert judge(found, replace(gates, kl_floor=1e-11), low_rank=twin)
    assert not judge(replace(found, p999_kl=4e-10), replace(gates, kl_floor=1e-11), low_rank=twin)


@pytest.mark.parametrize(
    ("change", "gate"),
    [({"p999_kl": 2e-3}, "p999_kl"), ({"delta_nll": -2e-3}, "delta_nll"), ({"delta_nll": 2e-3}, "delta_nll")],
)
def test_tail_and_likelihood_have_ceilings(change: dict[str, Any], gate: str) -> None:
    gates = replace(GATES, p999_kl=1.5e-3, delta_nll=1.5e-3)
    assert judge(replace(SOUND, delta_nll=1e-4), gates)
    assert [each.name for each in judge(replace(SOUND, **change), gates).failed()] == [gate]


def test_a_gate_that_is_not_decided_is_neither_passed_nor_failed() -> None:
    open_gate = GateResult(name="rho", value=math.nan, limit=2.0, passed=None)
    passed, failed = (GateResult(name="x", value=1.0, limit=1.0, passed=value) for value in (True, False))
    assert (Verdict(gates=(passed, open_gate)).passed, bool(Verdict(gates=(passed, open_gate)))) == (None, False)
    assert Verdict(gates=(failed, open_gate)).passed is False
    assert Verdict(gates=(passed,)).passed is True


def test_chunks_do_not_show() -> None:
    """A vocabulary so large that a chunk holds a few rows only."""
    reference, candidate = logits(11, 0.1, vocabulary=70_000)
    found = Comparison().add("", reference, candidate)
    assert found.mean_kl == pytest.approx(kl(reference, candidate).mean(), rel=1e-6)
    assert found.positions == 11
