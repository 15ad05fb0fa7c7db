"""How far a runner's logits are from a reference's, and whether that is close enough.

Measuring and judging are apart: `Comparison` gathers, `judge` decides, and a saved measurement can be judged
again with other gates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pifa_deploy.errors import InputRefusedError
from pifa_deploy.logit_rows import FloatRows, blocks, bootstrap_interval, row_figures

# Positions that the bootstrap draws together.
BLOCK = 64
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
class Difference:
    """Logits of a candidate against a reference over some positions.

    Attributes:
        name: of the case.
        positions: number of logit rows.
        finite: whether every logit, of both, is finite; with one that is not, the other figures are NaN.
        max_abs: largest absolute difference of a logit.
        cosine: smallest cosine between two rows.
        mean_kl: mean KL(reference || candidate), nats.
        p999_kl: 99.9th percentile of it.
        top1: share of decided positions with the same best token; 1 without decided positions.
        decided: positions where the reference's lead exceeds TOP1_GAP.
        labelled: positions whose next token is known.
        delta_nll: mean over those of NLL(candidate) - NLL(reference), nats; None without any.
        delta_nll_low: lower end of its 95 % bootstrap interval; None without a position, and for a single case.
        delta_nll_high: upper end of it.
    """

    name: str
    positions: int
    finite: bool
    max_abs: float
    cosine: float
    mean_kl: float
    p999_kl: float
    top1: float
    decided: int
    labelled: int = 0
    delta_nll: float | None = None
    delta_nll_low: float | None = None
    delta_nll_high: float | None = None


def difference_from_json(value: Mapping[str, Any]) -> Difference:
    """Returns saved figures, so that `judge` can decide again with other gates; null stands for NaN.

    Raises:
        TypeError: a field is missing, or none of Difference.
    """
    broken = not value.get("finite")
    fields: dict[str, Any] = {
        name: math.nan if figure is None and (broken or not name.startswith("delta_nll")) else figure
        for name, figure in value.items()
    }
    return Difference(**fields)


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


class Comparison:
    """Gathers per-position figures over cases, and sums them up without keeping logits."""

    def __init__(self) -> None:
        """Starts empty."""
        self.cases: list[Difference] = []
        self._rows: list[dict[str, FloatRows]] = []
        self._kinds: list[str] = []

    def add(
        self,
        name: str,
        reference: npt.NDArray[Any],
        candidate: npt.NDArray[Any],
        labels: npt.NDArray[np.int64] | None = None,
        *,
        kind: str = "",
    ) -> Difference:
        """Compares logits [positions, vocabulary]; float64 inside. `labels` [positions]: see `row_figures`."""
        rows = row_figures(reference, candidate, labels)
        self._rows.append(rows)
        self._kinds.append(kind)
        self.cases.append(_summed_up(name, rows))
        return self.cases[-1]

    def overall(self) -> Difference:
        """Returns the figures over all cases; the interval draws blocks of at most BLOCK positions of one case."""
        found = _summed_up("overall", _joined(self._rows))
        parts = np.concatenate([blocks(rows["nll"], BLOCK) for rows in self._rows])
        if not found.finite or not len(parts):
            return found
        low, high = bootstrap_interval(parts)
        return Difference(**{**asdict(found), "delta_nll_low": low, "delta_nll_high": high})

    def by_kind(self) -> tuple[Difference, ...]:
        """Returns the figures over all cases of each kind, named by it."""
        pairs = list(zip(self._kinds, self._rows, strict=True))
        kinds = dict.fromkeys(self._kinds)
        return tuple(_summed_up(kind, _joined([rows for of, rows in pairs if of == kind])) for kind in kinds)


def _joined(rows: Sequence[dict[str, FloatRows]]) -> dict[str, FloatRows]:
    return {key: np.concatenate([part[key] for part in rows]) for key in rows[0]}


def _summed_up(name: str, rows: dict[str, FloatRows]) -> Difference:
    finite = bool(rows["finite"].all())
    if not finite:
        rows = {key: np.full_like(values, math.nan) for key, values in rows.items()}
    decided = rows["decided"] > 0
    top1 = float(rows["agree"][decided].mean()) if decided.any() else 1.0
    deltas = rows["nll"][~np.isnan(rows["nll"])]
    return Difference(
        name=name,
        positions=len(decided),
        finite=finite,
        max_abs=float(rows["max_abs"].max()),
        cosine=float(rows["cosine"].min()),
        mean_kl=float(rows["kl"].mean()),
        p999_kl=float(np.quantile(rows["kl"], 0.999)),
        top1=top1 if finite else math.nan,
        decided=int(decided.sum()),
        labelled=len(deltas),
        delta_nll=float(deltas.mean()) if len(deltas) else None,
    )


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


def to_json(cases: Sequence[Difference], overall: Difference) -> dict[str, Any]:
    """Returns the figures as JSON values; a figure that is NaN or infinite, which JSON lacks, is null."""
    return {"cases": [json_figures(case) for case in cases], "overall": json_figures(overall)}


def json_figures(record: Any) -> dict[str, Any]:
    """Returns the fields of one dataclass as JSON values, as `to_json` does."""
    fields = asdict(record)
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in fields.items()}
