"""Is what was measured of logits close enough? A saved measurement can be judged again with other gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pifa_deploy.errors import InputRefusedError
from pifa_deploy.logit_difference import Difference

# Of fewer positions a 99.9th percentile is all but the largest single value, and a ratio of two such is chance.
TAIL_POSITIONS = 8000
# Of an error in units of its bound; a bisection has it too where the gate is off.
RHO_LIMIT = 2.0


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Limits on the difference to the fp32 reference; None switches one off.

    Attributes:
        mean_kl: largest mean KL(reference || candidate) in nats per position, over all and over each kind of case.
        top1: smallest share of positions with the reference's best token, where its lead exceeds TOP1_GAP.
        low_rank_ratio: largest mean KL, 99.9th percentile and |ΔNLL| relative to those of the low-rank product in the
            same dtype and runtime.
        p999_kl: largest 99.9th percentile of KL.
        delta_nll: largest |mean of NLL(candidate) - NLL(reference)| in nats per position.
        kl_floor: a mean KL of the low-rank product below it counts as this much, a 99.9th percentile as eight times it.
        rho: largest error of a PIFA layer in units of its rounding bound.
        source_ratio: largest Frobenius error of a PIFA layer against the low-rank pair it was made from, in units of
            what storing its factors explains.
        relative_error: largest relative Frobenius error of a layer against the dense weight it was made from.
    """

    mean_kl: float | None
    top1: float | None
    low_rank_ratio: float | None = 4.0
    p999_kl: float | None = None
    delta_nll: float | None = None
    kl_floor: float | None = None
    rho: float | None = RHO_LIMIT
    source_ratio: float | None = 2.0
    relative_error: float | None = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for a limit that is not a number or out of range."""
        for name, value in asdict(self).items():
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"gate {name} is {value!r}, expected a number")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"gate {name} is {value}, expected a finite number of at least 0")
        if self.top1 is not None and self.top1 > 1:
            raise ValueError(f"gate top1 is {self.top1}, expected a share of at most 1")


# Honest PIFA shows two to three times the rounding noise of the low-rank product; docs/parity.md says what whole models
# showed per dtype, and how the absolute limits follow from it.
DEFAULT_GATES = {
    "fp32": Gates(mean_kl=1e-8, top1=1.0, p999_kl=1e-7, delta_nll=1e-4, kl_floor=1e-11),
    "fp16": Gates(mean_kl=2e-4, top1=0.993, p999_kl=2e-3, delta_nll=2e-3, kl_floor=1e-7),
    "bf16": Gates(mean_kl=1e-2, top1=0.965, p999_kl=1e-1, delta_nll=2e-2, kl_floor=1e-5),
}


def gates_for(dtype: str) -> Gates:
    """Returns the default gates of a dtype; raises InputRefusedError for a dtype without any."""
    if dtype not in DEFAULT_GATES:
        raise InputRefusedError(f"the graph's dtype is {dtype!r}, expected one of {', '.join(DEFAULT_GATES)}")
    return DEFAULT_GATES[dtype]


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One decision: `value` against `limit`; `passed` is None where the figure was never measured."""

    name: str
    value: float
    limit: float
    passed: bool | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The decisions of one run; true when all passed."""

    gates: tuple[GateResult, ...]

    def __bool__(self) -> bool:
        return self.passed is True

    @property
    def passed(self) -> bool | None:
        """False when a gate failed, else None when one is not decided or there is none, else True."""
        found = {gate.passed for gate in self.gates}
        return False if False in found else None if None in found or not found else True

    def failed(self) -> list[GateResult]:
        """Returns the gates that did not pass."""
        return [gate for gate in self.gates if gate.passed is False]


def judge(
    overall: Difference,
    gates: Gates,
    *,
    kinds: Sequence[Difference] = (),
    low_rank: Difference | str | None = None,
) -> Verdict:
    """Decides whether a measured difference is acceptable.

    Args:
        overall: the candidate's figures.
        gates: the limits.
        kinds: its figures over each kind of case, see `Comparison.by_kind`: a fault of few positions is lost in all.
        low_rank: figures of the low-rank product in the same dtype and runtime; None where there is no such thing
            (a dense model): its gates are then left out; why there are none: its gate is then not decided.
    """
    results = [GateResult(name="finite", value=float(overall.finite), limit=1.0, passed=overall.finite)]
    if gates.mean_kl is not None:
        results.append(at_most("mean_kl", overall.mean_kl, gates.mean_kl))
        if kinds:
            worst = max(kinds, key=lambda kind: math.inf if math.isnan(kind.mean_kl) else kind.mean_kl)
            decision = at_most("mean_kl_worst_kind", worst.mean_kl, gates.mean_kl)
            results.append(replace(decision, reason=f"of {worst.name}"))
    if gates.top1 is not None:
        passed = overall.top1 >= gates.top1
        results.append(GateResult(name="top1", value=overall.top1, limit=gates.top1, passed=passed))
    if gates.p999_kl is not None:
        results.append(at_most("p999_kl", overall.p999_kl, gates.p999_kl))
    if gates.delta_nll is not None and (overall.delta_nll is not None or not overall.finite):
        results.append(at_most("delta_nll", _size(overall), gates.delta_nll))
    if gates.low_rank_ratio is not None and isinstance(low_rank, str):
        limit = gates.low_rank_ratio
        results.append(GateResult(name="low_rank_ratio", value=math.nan, limit=limit, passed=None, reason=low_rank))
    elif gates.low_rank_ratio is not None and isinstance(low_rank, Difference):
        results += _against_low_rank(overall, low_rank, gates.low_rank_ratio, floor=gates.kl_floor or 0.0)
    return Verdict(gates=tuple(results))


def _against_low_rank(found: Difference, twin: Difference, limit: float, *, floor: float) -> list[GateResult]:
    """Returns the gates on ratios; a twin that by chance is all but exact counts as `floor`.

    A mean ΔNLL may come out near zero by chance: what the twin shows is the farther end of its interval.
    """
    pairs = [
        ("low_rank_ratio", found.mean_kl, max(twin.mean_kl, floor)),
    ]
    if found.positions >= TAIL_POSITIONS:
        pairs.append(("low_rank_ratio_p999_kl", found.p999_kl, max(twin.p999_kl, 8 * floor)))
    if found.delta_nll is not None and twin.delta_nll_low is not None and twin.delta_nll_high is not None:
        shown = max(abs(twin.delta_nll_low), abs(twin.delta_nll_high), math.sqrt(floor / max(found.labelled, 1)))
        pairs.append(("low_rank_ratio_delta_nll", _size(found), shown))
    return [at_most(name, _ratio(value, noise), limit) for name, value, noise in pairs]


def _ratio(value: float, noise: float) -> float:
    return value / noise if noise else math.inf if value else 0.0


def _size(found: Difference) -> float:
    return math.nan if found.delta_nll is None else abs(found.delta_nll)


def at_most(name: str, value: float, limit: float) -> GateResult:
    """Returns the decision that a value is no larger than its limit; one that is NaN is not."""
    return GateResult(name=name, value=value, limit=limit, passed=value <= limit)
