"""How far a runner's logits are from a reference's, and whether that is close enough.

Measuring and judging are apart: `compare` gathers, `judge` decides, and a saved measurement can be judged
again with other gates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pifa_deploy.errors import InputRefusedError

# A reference whose two best tokens are closer than this has no winner to agree with.
TOP1_GAP = 1e-3


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Limits on the difference to the fp32 reference; None switches one off.

    Attributes:
        mean_kl: largest mean KL(reference || candidate) in nats per position.
        top1: smallest share of positions with the reference's best token, where its lead exceeds TOP1_GAP.
        low_rank_ratio: largest mean KL relative to that of the low-rank product in the same dtype.
    """

    mean_kl: float | None
    top1: float | None
    low_rank_ratio: float | None = 4.0

    def __post_init__(self) -> None:
        """Raises ValueError for a limit that is not a number or out of range."""
        for name, value in asdict(self).items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"gate {name} is {value}, expected a finite number of at least 0")
        if self.top1 is not None and self.top1 > 1:
            raise ValueError(f"gate top1 is {self.top1}, expected a share of at most 1")


# Honest PIFA shows two to three times the rounding noise of the low-rank product; the absolute limits
# are four times what whole models showed per dtype.
DEFAULT_GATES = {
    "fp32": Gates(mean_kl=1e-8, top1=1.0),
    "fp16": Gates(mean_kl=2e-4, top1=0.993),
    "bf16": Gates(mean_kl=1e-2, top1=0.965),
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


def difference_from_json(value: Mapping[str, Any]) -> Difference:
    """Returns saved figures, so that `judge` can decide again with other gates; null stands for NaN."""
    fields: dict[str, Any] = {name: math.nan if figure is None else figure for name, figure in value.items()}
    return Difference(**fields)


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One decision: `value` against `limit`."""

    name: str
    value: float
    limit: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The decisions of one run; true when all passed."""

    gates: tuple[GateResult, ...]

    def __bool__(self) -> bool:
        return all(gate.passed for gate in self.gates)

    def failed(self) -> list[GateResult]:
        """Returns the gates that did not pass."""
        return [gate for gate in self.gates if not gate.passed]


class Comparison:
    """Gathers per-position figures over cases, and sums them up without keeping logits."""

    def __init__(self) -> None:
        """Starts empty."""
        self.cases: list[Difference] = []
        self._rows: list[dict[str, npt.NDArray[np.float64]]] = []

    def add(self, name: str, reference: npt.NDArray[Any], candidate: npt.NDArray[Any]) -> Difference:
        """Compares logits [positions, vocabulary]; float64 inside."""
        rows = _row_figures(reference, candidate)
        self._rows.append(rows)
        self.cases.append(_summed_up(name, rows))
        return self.cases[-1]

    def overall(self) -> Difference:
        """Returns the figures over all cases."""
        keys = self._rows[0]
        return _summed_up("overall", {key: np.concatenate([rows[key] for rows in self._rows]) for key in keys})


def _row_figures(reference: npt.NDArray[Any], candidate: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.float64]]:
    columns: dict[str, list[float]] = {key: [] for key in ("finite", "max_abs", "cosine", "kl", "agree", "decided")}
    for expected, found in zip(reference.astype(np.float64), candidate.astype(np.float64), strict=True):
        finite = np.isfinite(expected).all() and np.isfinite(found).all()
        columns["finite"].append(float(finite))
        if not finite:
            for key in columns.keys() - {"finite"}:
                columns[key].append(math.nan)
            continue
        log_p, log_q = _log_softmax(expected), _log_softmax(found)
        best, second = np.partition(expected, -2)[[-1, -2]]
        columns["max_abs"].append(float(np.abs(expected - found).max()))
        columns["cosine"].append(float(expected @ found / (np.linalg.norm(expected) * np.linalg.norm(found))))
        columns["kl"].append(max(float(np.exp(log_p) @ (log_p - log_q)), 0.0))
        columns["agree"].append(float(expected.argmax() == found.argmax()))
        columns["decided"].append(float(best - second > TOP1_GAP))
    return {key: np.array(values) for key, values in columns.items()}


def _log_softmax(row: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = row - row.max()
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def _summed_up(name: str, rows: dict[str, npt.NDArray[np.float64]]) -> Difference:
    finite = bool(rows["finite"].all())
    if not finite:
        rows = {key: np.full_like(values, math.nan) for key, values in rows.items()}
    decided = rows["decided"] > 0
    top1 = float(rows["agree"][decided].mean()) if decided.any() else 1.0
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
    )


def judge(overall: Difference, gates: Gates, *, low_rank: Difference | None = None) -> Verdict:
    """Decides whether a measured difference is acceptable.

    Args:
        overall: the candidate's figures.
        gates: the limits.
        low_rank: figures of the low-rank product in the same dtype, None where there is no such thing
            (a dense model); its gate is then left out.
    """
    results = [GateResult(name="finite", value=float(overall.finite), limit=1.0, passed=overall.finite)]
    if gates.mean_kl is not None:
        results.append(_at_most("mean_kl", overall.mean_kl, gates.mean_kl))
    if gates.top1 is not None:
        passed = overall.top1 >= gates.top1
        results.append(GateResult(name="top1", value=overall.top1, limit=gates.top1, passed=passed))
    if gates.low_rank_ratio is not None and low_rank is not None:
        ratio = overall.mean_kl / low_rank.mean_kl if low_rank.mean_kl else math.inf if overall.mean_kl else 0.0
        results.append(_at_most("low_rank_ratio", ratio, gates.low_rank_ratio))
    return Verdict(gates=tuple(results))


def _at_most(name: str, value: float, limit: float) -> GateResult:
    # NaN compares false and so fails.
    return GateResult(name=name, value=value, limit=limit, passed=value <= limit)


def to_json(cases: Sequence[Difference], overall: Difference) -> dict[str, Any]:
    """Returns the figures as JSON values; a figure that is NaN or infinite, which JSON lacks, is null."""
    return {"cases": [json_figures(case) for case in cases], "overall": json_figures(overall)}


def json_figures(record: Difference | GateResult) -> dict[str, Any]:
    """Returns the fields of one record as JSON values, as `to_json` does."""
    fields = asdict(record)
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in fields.items()}
