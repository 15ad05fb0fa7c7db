"""What a verification measured, at which levels, and what was decided about it."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

from pifa_deploy.bisection import Bisection
from pifa_deploy.logit_difference import Difference, json_figures, to_json
from pifa_deploy.operator_parity import OperatorFigures
from pifa_deploy.parity import GateResult, Gates, Verdict, at_most, judge
from pifa_deploy.source_parity import SourceWeights
from pifa_deploy.weight_parity import StoredWeights

ARTEFACT = "verify"
SCHEMA = 2
LEVELS = ("weights", "operators", "logits")


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
        results += _judge_bisection(measured.bisection, gates)
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


def _judge_bisection(found: Bisection, gates: Gates) -> list[GateResult]:
    limit = found.rho_limit if gates.rho is None else gates.rho
    parts = [at_most("bisection.parts", _largest(part.ratio for part in found.parts), found.limit)]
    rho = [at_most("bisection.rho", _largest(found.operators.values()), limit)] if found.operators else []
    return [replace(decision, reason=found.first_bad_module()) for decision in (*parts, *rho)]


def _largest(values: Any) -> float:
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found)
