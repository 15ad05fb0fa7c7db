"""The results that a report is made of: JSON files of verify, bench and evaluate, engine folders and checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pifa_deploy.case_names import case_name_of
from pifa_deploy.checkpoint import is_checkpoint, validate
from pifa_deploy.engine_record import ENGINE_JSON, read_engine_json
from pifa_deploy.errors import InputMissingError, InputRefusedError
from pifa_deploy.json_shape import validate as validate_shape
from pifa_deploy.proof import Proof, ProofDecision, ProofGates, judge_proofs, prove
from pifa_deploy.report_schema import CONTENTS

KINDS = tuple(CONTENTS)
# What a stage writes, and the schema that is read.
_ARTEFACTS = {
    "verify": ("verify", 2),
    "bench": ("bench", 1),
    "evaluate": ("evaluation", 1),
    "tasks": ("compare-tasks", 1),
}
_WRITERS = {**{kind: f"{kind} --json" for kind in ("verify", "bench", "evaluate")}, "tasks": "compare-tasks --json"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one result lies.

    Attributes:
        kind: one of KINDS.
        label: what to call it; the name of the file or folder when None.
        path: a JSON file, an engine folder or a checkpoint.
    """

    kind: str
    label: str | None
    path: Path

    @property
    def name(self) -> str:
        """The label, or what stands for it."""
        if self.label:
            return self.label
        path = self.path.parent if self.path.name == ENGINE_JSON else self.path
        # Not the place that a link leads to: its name was chosen for this.
        return path.stem if path.suffix == ".json" else Path(os.path.abspath(path)).name


def read_sources(sources: Sequence[Source], gates: ProofGates) -> dict[str, list[dict[str, Any]]]:
    """Returns kind -> label and checked content of each result, as they stand in report.json.

    Args:
        sources: where they lie.
        gates: what the engines must contain; other kinds carry decisions of their own.

    Raises:
        InputMissingError: nothing is there.
        InputRefusedError: one is malformed, of another kind or of another schema.
    """
    # Together: what is asked of one engine depends on what the others are.
    proofs = {source.name: prove(source.path) for source in sources if source.kind == "engine"}
    judged = judge_proofs(proofs, gates)
    stages: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for source in sources:
        if source.kind == "engine":
            content = _engine(source.path, proofs[source.name], judged[source.name])
        else:
            content = _checkpoint(source.path) if source.kind == "checkpoint" else _stage_result(source)
        stages[source.kind].append({"label": source.name, "content": content})
    return stages


def _stage_result(source: Source) -> dict[str, Any]:
    content = read_json(source.path, f"give what `pifa-deploy {_WRITERS[source.kind]}` wrote")
    artefact = content.get("artefact")
    expected, schema = _ARTEFACTS[source.kind]
    if artefact != expected:
        raise InputRefusedError(
            f"{source.path}: artefact is {artefact!r}, expected {expected!r}; give what "
            f"`pifa-deploy {_WRITERS[source.kind]}` wrote"
        )
    check_schema(content.get("schema"), schema, source.path)
    validate_shape(content, CONTENTS[source.kind], f"{source.path}: {source.kind}")
    if source.kind == "bench":
        _check_names(content, source.path)
        _check_cases(content, source.path)
    return content


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Returns a JSON file's object; NaN and infinities, which JSON does not have, are refused.

    Raises:
        InputMissingError: no such file; the message ends with `advice`.
        InputRefusedError: it is no JSON object.
    """
    if not path.is_file():
        raise InputMissingError(f"{path}: no such file; {advice}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputRefusedError(f"{path}: not JSON ({error}); {advice}") from None
    if not isinstance(value, dict):
        raise InputRefusedError(f"{path}: holds a {type(value).__name__}, expected a JSON object; {advice}")
    return value


def check_schema(found: object, known: int, path: Path) -> None:
    """Raises InputRefusedError for another version of a file's schema; the message says which program is too old."""
    if found == known and not isinstance(found, bool):
        return
    newer = isinstance(found, int) and found > known
    advice = "update pifa-deploy" if newer else "make it again with this version"
    raise InputRefusedError(f"{path}: schema is {found!r}, this program reads {known}; {advice}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _check_names(bench: Mapping[str, Any], path: Path) -> None:
    """Raises InputRefusedError for a row or baseline that is none of the contenders, or a contender named twice."""
    names = [contender["name"] for contender in bench["contenders"]]
    used = [bench["baseline"], *(row["name"] for case in bench["cases"] for row in case["rows"])]
    strange = [name for name in used if name not in names]
    if strange or len(set(names)) < len(names):
        raise InputRefusedError(
            f"{path}: contenders are {names}, rows or baseline name {strange or 'one of them twice'}; run bench again"
        )


def _check_cases(bench: Mapping[str, Any], path: Path) -> None:
    """Raises InputRefusedError for a profile of no case, or for rounds that contenders do not share."""
    names = [case_name_of(case) for case in bench["cases"]]
    strange = [profile["case"] for profile in bench["layers"] if profile["case"] not in names]
    if strange:
        raise InputRefusedError(
            f"{path}: profiles are of {strange}, which is none of its {len(names)} cases; run bench again"
        )
    for name, case in zip(names, bench["cases"], strict=True):
        rounds = [row["round_ms"] for row in case["rows"]]
        counts = sorted(set(map(len, rounds)))
        if len(counts) != 1 or counts[0] < 2 or min(map(min, rounds)) <= 0:
            raise InputRefusedError(
                f"{path}: rows of {name} have {counts} times of rounds, expected as many in each, 2 or more, all above "
                "0; run bench again"
            )


def _engine(path: Path, proof: Proof, decisions: Sequence[ProofDecision]) -> dict[str, Any]:
    record = read_engine_json(path)
    return {
        "backend": record.backend,
        "version": record.version,
        "bytes": sum(engine.bytes for engine in record.engines),
        "compute_capabilities": list(record.compute_capabilities),
        "proof": proof.to_json(),
        "decisions": [asdict(decision) for decision in decisions],
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputMissingError(f"{path}: no such checkpoint; give a folder written by `pifa-deploy compress`")
    if not is_checkpoint(path):
        raise InputRefusedError(f"{path}: is no factorised checkpoint, it has no ranks to show; leave it out")
    record = validate(path)
    return {
        "modules": {name: asdict(spec) for name, spec in record.modules.items()},
        "density": record.density,
        "source": record.source,
    }
