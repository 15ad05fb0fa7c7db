"""What a verification measured, at which levels, what was decided, and the same read back from its file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pifa_deploy.bisection import Bisection, bisection_from_json
from pifa_deploy.checkpoint import read_json_object
from pifa_deploy.errors import InputMissingError, InputRefusedError
from pifa_deploy.operator_parity import OperatorFigures
from pifa_deploy.parity import (
    Difference,
    GateResult,
    Gates,
    Verdict,
    at_most,
    difference_from_json,
    json_figures,
    judge,
    to_json,
)
from pifa_deploy.source_parity import SourceLayer, SourceWeights
from pifa_deploy.weight_parity import StoredWeights

ARTEFACT = "verify"
SCHEMA = 2
LEVELS = ("weights", "operators", "logits")
# Which level measures what a gate limits.
GATE_LEVELS = {
    "mean_kl": "logits",
    "top1": "logits",
    "p999_kl": "logits",
    "delta_nll": "logits",
    "low_rank_ratio": "logits",
    "rho": "operators",
    "source_ratio": "weights",
    "relative_error": "weights",
}


@dataclass(frozen=True, kw_only=True)
class LogitFigures:
    """Level L2.

    Attributes:
        cases: the candidate's figures, case by case.
        kinds: over all cases of each kind, named by it.
        overall: over all positions.
        farthest: largest position id that was read.
        low_rank: of the low-rank product in the same dtype and runtime; None for a dense model, or when nobody asked;
            why there is none where it could not be had.
    """

    cases: tuple[Difference, ...]
    kinds: tuple[Difference, ...]
    overall: Difference
    farthest: int
    low_rank: Difference | str | None

    @property
    def floor(self) -> Difference | None:
        """The figures of the low-rank product, where there are any."""
        return self.low_rank if isinstance(self.low_rank, Difference) else None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured; a level that was not asked for is None.

    Attributes:
        dtype: of the ONNX folder.
        weights: the folder against its checkpoint.
        source: the checkpoint against what it was made from.
        operators: each PIFA layer alone.
        logits: the model on text.
        bisection: each part of the graph alone.
        device: where the fp32 reference ran for the logits, and ONNX Runtime.
    """

    dtype: str
    weights: StoredWeights | None = None
    source: SourceWeights | None = None
    operators: tuple[OperatorFigures, ...] | None = None
    logits: LogitFigures | None = None
    bisection: Bisection | None = None
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Figures and decisions of one verification; true when every gate passed."""

    measured: Measured
    gates: Gates
    verdict: Verdict

    def __bool__(self) -> bool:
        return bool(self.verdict)

    @property
    def dtype(self) -> str:
        """Weight dtype of the folder."""
        return self.measured.dtype

    @property
    def logits(self) -> LogitFigures:
        """Figures of the logits; raises ValueError where that level was left out."""
        if self.measured.logits is None:
            raise ValueError("the level logits was not measured; verify with it")
        return self.measured.logits

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values; `report_from_json` reads them back."""
        logits = self.measured.logits
        figures = to_json(logits.cases, logits.overall) if logits else {"cases": [], "overall": None}
        bisection = self.measured.bisection
        return {
            "artefact": ARTEFACT,
            "schema": SCHEMA,
            "passed": self.verdict.passed,
            "dtype": self.dtype,
            "device": self.measured.device,
            **figures,
            "kinds": [json_figures(kind) for kind in logits.kinds] if logits else [],
            "farthest_position": logits.farthest if logits else None,
            "low_rank": json_figures(logits.floor) if logits and logits.floor else None,
            "low_rank_missing": logits.low_rank if logits and isinstance(logits.low_rank, str) else None,
            "levels": _levels(self.measured),
            "bisection": bisection.to_json() if bisection else None,
            "gates": asdict(self.gates),
            "decisions": [json_figures(gate) for gate in self.verdict.gates],
        }


def _levels(measured: Measured) -> dict[str, Any]:
    levels: dict[str, Any] = dict.fromkeys(LEVELS)
    if measured.weights:
        source = measured.source
        layers = [json_figures(layer) for layer in source.layers] if source else []
        levels["weights"] = {
            **asdict(measured.weights),
            "source": {**asdict(source), "layers": layers} if source else None,
        }
    if measured.operators is not None:
        levels["operators"] = {"modules": [json_figures(module) for module in measured.operators]}
    if measured.logits:
        low_rank = measured.logits.floor
        overall = json_figures(measured.logits.overall)
        levels["logits"] = {"overall": overall, "low_rank": json_figures(low_rank) if low_rank else None}
    return levels


def judge_levels(measured: Measured, gates: Gates) -> Verdict:
    """Decides about everything that was measured: weights, then operators, logits, and parts of a bisection."""
    results: list[GateResult] = []
    if measured.weights:
        results.append(at_most("weights.stored", float(len(measured.weights.differing)), 0.0))
        results.append(at_most("weights.placed", float(len(measured.weights.misplaced)), 0.0))
        if measured.weights.changed_files is not None:
            results.append(at_most("weights.files", float(len(measured.weights.changed_files)), 0.0))
    if measured.source:
        results += _judge_source(measured.source, gates)
    if measured.operators and gates.rho is not None:
        results.append(at_most("operators.rho", _largest(module.rho for module in measured.operators), gates.rho))
    if measured.logits:
        logits = measured.logits
        results += judge(logits.overall, gates, kinds=logits.kinds, low_rank=logits.low_rank).gates
    if measured.bisection:
        results += _judge_bisection(measured.bisection)
    return Verdict(gates=tuple(results))


def _judge_source(source: SourceWeights, gates: Gates) -> list[GateResult]:
    results = [at_most("weights.source_unchanged", float(len(source.changed)), 0.0)]
    ratios = [layer.bound_ratio for layer in source.layers if layer.bound_ratio is not None]
    if ratios and gates.source_ratio is not None:
        results.append(at_most("weights.source_ratio", _largest(ratios), gates.source_ratio))
    if source.kind == "dense" and source.layers and gates.relative_error is not None:
        # The median: what MPIFA fits to activations may leave a layer's weights farther off than zero would be.
        middle = statistics.median(layer.relative_error for layer in source.layers)
        results.append(at_most("weights.relative_error", middle, gates.relative_error))
    return results


def _judge_bisection(found: Bisection) -> list[GateResult]:
    parts = [at_most("bisection.parts", _largest(part.ratio for part in found.parts), found.limit)]
    rho = [at_most("bisection.rho", _largest(found.operators.values()), found.rho_limit)] if found.operators else []
    return [replace(decision, reason=found.first_bad_module()) for decision in (*parts, *rho)]


def _largest(values: Any) -> float:
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found)


def report_from_json(path: Path | str) -> VerifyReport:
    """Reads what `verify --json` wrote.

    Raises:
        InputMissingError, InputRefusedError: no such file, not JSON, another artefact or schema, or malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputMissingError(f"{path}: no such file; give one that `pifa-deploy verify --json` wrote")
    value = read_json_object(path)
    if value.get("artefact") != ARTEFACT or value.get("schema") != SCHEMA:
        raise InputRefusedError(
            f"{path}: is artefact {value.get('artefact')!r} schema {value.get('schema')!r}, this program judges "
            f"{ARTEFACT!r} schema {SCHEMA}; run `pifa-deploy verify --json` again"
        )
    try:
        measured, gates = _measured(value), Gates(**value["gates"])
        verdict = judge_levels(measured, gates)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputRefusedError(
            f"{path}: not what `pifa-deploy verify --json` writes ({type(error).__name__}: {error}); run it again"
        ) from None
    return VerifyReport(measured=measured, gates=gates, verdict=verdict)


def _measured(value: Mapping[str, Any]) -> Measured:
    levels = value["levels"]
    weights, operators, logits = (levels[name] for name in LEVELS)
    source = weights and weights["source"]
    return Measured(
        dtype=str(value["dtype"]),
        weights=weights and _stored(weights),
        source=source and _source(source),
        operators=None if operators is None else tuple(_operator(module) for module in operators["modules"]),
        logits=logits and _logits(value),
        bisection=value["bisection"] and bisection_from_json(value["bisection"]),
        device=str(value["device"]),
    )


def _stored(value: Mapping[str, Any]) -> StoredWeights:
    lists = {name: tuple(map(str, _list(value[name]))) for name in ("differing", "misplaced")}
    files = None if value["changed_files"] is None else tuple(map(str, _list(value["changed_files"])))
    return StoredWeights(tensors=int(value["tensors"]), **lists, changed_files=files)


def _source(value: Mapping[str, Any]) -> SourceWeights:
    layers = tuple(SourceLayer(**_with_nan(layer, but="bound_ratio")) for layer in _list(value["layers"]))
    changed = tuple(map(str, _list(value["changed"])))
    return SourceWeights(kind=str(value["kind"]), unchanged=int(value["unchanged"]), changed=changed, layers=layers)


def _operator(value: Mapping[str, Any]) -> OperatorFigures:
    return OperatorFigures(**_with_nan(value))


def _logits(value: Mapping[str, Any]) -> LogitFigures:
    return LogitFigures(
        cases=tuple(map(difference_from_json, _list(value["cases"]))),
        kinds=tuple(map(difference_from_json, _list(value["kinds"]))),
        overall=difference_from_json(value["overall"]),
        farthest=int(value["farthest_position"]),
        low_rank=difference_from_json(value["low_rank"]) if value["low_rank"] else value["low_rank_missing"],
    )


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"found {type(value).__name__}, expected a list")
    return value


def _with_nan(value: Mapping[str, Any], *, but: str = "") -> dict[str, Any]:
    """Returns fields in which null, JSON's word for what is not finite, is NaN again."""
    return {name: math.nan if figure is None and name != but else figure for name, figure in value.items()}


def judge_saved(path: Path | str, asked: Mapping[str, float]) -> VerifyReport:
    """Decides about a saved run from its file alone.

    Args:
        path: what `verify --json` wrote.
        asked: gate -> limit, in place of those of the file. A gate whose level the run did not measure is not decided.

    Raises:
        InputMissingError, InputRefusedError: see `report_from_json`.
        ValueError: a limit out of range.
    """
    report = report_from_json(path)
    gates = replace(report.gates, **asked)
    verdict = judge_levels(report.measured, gates)
    missing = [name for name in asked if not _was_measured(report.measured, name)]
    undecided = tuple(GateResult(name=name, value=math.nan, limit=asked[name], passed=None) for name in missing)
    return replace(report, gates=gates, verdict=Verdict(gates=verdict.gates + undecided))


def _was_measured(measured: Measured, gate: str) -> bool:
    source, logits = measured.source, measured.logits
    if gate == "low_rank_ratio":
        return logits is not None and logits.low_rank is not None
    if gate == "source_ratio":
        return source is not None and any(layer.bound_ratio is not None for layer in source.layers)
    if gate == "relative_error":
        return source is not None and source.kind == "dense"
    return bool(measured.operators) if gate == "rho" else logits is not None
