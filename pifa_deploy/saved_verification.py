"""What `verify --json` wrote, read back and judged again without running anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pifa_deploy.bisection import bisection_from_json
from pifa_deploy.checkpoint import read_json_object
from pifa_deploy.errors import InputMissingError, InputRefusedError
from pifa_deploy.logit_difference import difference_from_json
from pifa_deploy.operator_parity import OperatorFigures
from pifa_deploy.parity import GateResult, Gates, Verdict
from pifa_deploy.source_parity import SourceLayer, SourceWeights
from pifa_deploy.verification_report import ARTEFACT, LEVELS, SCHEMA, LogitFigures, Measured, VerifyReport, judge_levels
from pifa_deploy.weight_parity import StoredWeights


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
