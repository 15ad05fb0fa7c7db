"""How far a runner's logits are from a reference's, gathered over cases without keeping them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pifa_deploy.logit_rows import FloatRows, blocks, bootstrap_interval, row_figures

# Positions that the bootstrap draws together.
BLOCK = 64


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


def to_json(cases: Sequence[Difference], overall: Difference) -> dict[str, Any]:
    """Returns the figures as JSON values; a figure that is NaN or infinite, which JSON lacks, is null."""
    return {"cases": [json_figures(case) for case in cases], "overall": json_figures(overall)}


def json_figures(record: Any) -> dict[str, Any]:
    """Returns the fields of one dataclass as JSON values, as `to_json` does."""
    fields = asdict(record)
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in fields.items()}
