"""The step of a pipeline that puts the results of the others into one report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pifa_deploy.compression.sparsity import PRUNING_METHODS
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.pipeline_file import PipelineFile, Variant
from pifa_deploy.pipeline_step import Arguments, OnlyWith, Step, backend_of, checkpoint_of, engines_of, place_of
from pifa_deploy.targets import RTX

REPORT = "report"  # folder in the output folder
_ABOUT_ENGINES = ("require-precision", "require-plugin", "require-sparse")
_BASELINE, _LIMIT = "baseline-report", "max-regression"
_STAGE = "{stage}"  # in the path of the baseline


def report_step(file: PipelineFile, stage: str, arguments: Arguments) -> Step:
    """Returns the step report of a stage.

    An earlier report that is not there leaves the gate on regressions undecided. Gates on engines are asked in a stage
    that has any.

    Raises:
        InputRefusedError: gates on engines and no engine in the file, an earlier report that is no text or that this
            run replaces, or as `arguments`.
    """
    where = f"{file.path}: [report]"
    table = {key.replace("_", "-"): value for key, value in (file.report or {}).items()}
    baseline = _baseline(file, stage, table.pop(_BASELINE, None), where)
    gates = []
    if baseline and _LIMIT in table:
        asked = arguments("report", {_LIMIT: table.pop(_LIMIT)}, where)
        reason = f"{baseline} is not there; make it from the report.json of a good run"
        gates.append(OnlyWith(option=f"--{_BASELINE}", arguments=tuple(asked), otherwise=reason))
    engines = {key: table.pop(key) for key in _ABOUT_ENGINES if key in table}
    if engines and not any(variant.build is not None for variant in file.variants):
        raise InputRefusedError(f"{where}: {next(iter(engines))} asks about engines and none is built; add [build]")
    if stage == "gpu" or any(variant.build is not None and backend_of(variant) == RTX for variant in file.variants):
        asked = arguments("report", engines, where)
        if asked:
            gates.append(OnlyWith(option="--engine", arguments=tuple(asked), otherwise="no engine is up to date"))
    output = file.output / REPORT
    earlier = [(f"--{_BASELINE}", "", baseline)] if baseline else []
    return Step(
        title="report",
        arguments=("report", "--out", str(output), "--force", *arguments("report", table, where)),
        output=output,
        reads_too=(*_inputs(file), *earlier),
        only_with=tuple(gates),
        judges=True,
        reports=True,
    )


def _baseline(file: PipelineFile, stage: str, given: object, where: str) -> Path | None:
    if given is None:
        return None
    if not isinstance(given, str) or not given:
        raise InputRefusedError(f"{where}: {_BASELINE} is {given!r}, expected text")
    path = Path(given.replace(_STAGE, stage))
    if file.output / REPORT in (path, *path.parents):
        raise InputRefusedError(f"{where}: {_BASELINE} is {given!r}, which this run replaces; copy it elsewhere")
    return path


def _inputs(file: PipelineFile) -> Iterator[tuple[str, str, Path]]:
    for variant in file.variants:
        name = variant.name
        if variant.verify is not None:
            yield "--verify", name, place_of(file, name, "verify-onnx.json")
        if variant.build is not None:
            yield "--engine", name, place_of(file, name, "engine")
            if variant.verify is not None:
                yield "--verify", f"{name} engine", place_of(file, name, "verify-engine.json")
        if _has_ranks(variant):
            yield "--checkpoint", name, checkpoint_of(file, variant)
    if file.evaluate is not None:
        yield "--evaluate", "", file.output / "evaluate.json"
    for name in file.tasks.contenders[1:] if file.tasks else ():
        yield "--tasks", name, place_of(file, name, "tasks.json")
    for table in file.bench:
        yield "--bench", table.name, file.output / f"bench-{table.name}-onnx.json"
        if engines_of(file, table):
            yield "--bench", f"{table.name} engines", file.output / f"bench-{table.name}-engine.json"


def _has_ranks(variant: Variant) -> bool:
    return variant.source in ("import", "relayout") or (
        variant.source == "compress" and variant.options.get("method") not in PRUNING_METHODS
    )
