"""pifa-deploy.toml: which variants of a model are made, checked and measured, and with what options.

    [model]
    dense = "model-folder"                 # what variants are compressed from
    [output]
    folder = "pifa-ci"
    [variants.dense]                       # the model as it is
    [variants.pifa]
    compress = { density = 0.5, calibration = ["mixture"] }
    [variants.theirs]
    import = "research.pt"                 # or: checkpoint = "folder"
    [variants.lowrank]
    relayout = { from = "pifa", layout = "low-rank" }
    [export]                               # these take the options of the commands of the same name
    dtype = "fp16"
    [verify]
    [build]
    target = ["orin-agx"]
    [evaluate]
    text = ["news=news.txt"]
    [bench.equal-density]                  # one table each, over all variants or those named
    contenders = ["dense", "pifa"]
    [bench.equal-density.gpu]              # what holds in one stage only
    [bench.equal-density.cpu]
    [tasks]                                # options of tasks and compare-tasks; the first variant is the reference
    task = ["arc_easy"]
    [report]

A table that is not there leaves its step out; a variant may have its own `export`, `verify` and `build`, whose keys
go before the general ones.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pifa_deploy.errors import InputMissingError, InputRefusedError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = Mapping[str, Any]

_SOURCES = ("checkpoint", "import", "compress", "relayout")
_OF_VARIANTS = ("export", "verify", "build")
_TABLES = ("model", "output", "variants", *_OF_VARIANTS, "evaluate", "bench", "tasks", "report")
_ARTEFACTS = ("checkpoint", "onnx")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_OUTPUT = "pifa-ci"
STAGES = ("cpu", "gpu")
_RESERVED = ("report", "evaluate.json", "steps.json")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One form of the model.

    Attributes:
        name: of the variant, and of its folder.
        source: "dense" (the model itself), "checkpoint", "import", "compress" or "relayout".
        place: the folder or file of "checkpoint" and "import", the other variant of "relayout", else empty.
        options: of the command compress or relayout.
        export, verify, build: options for this variant; None leaves the step out.
    """

    name: str
    source: str
    place: str
    options: Table
    export: Table | None
    verify: Table | None
    build: Table | None


@dataclass(frozen=True, kw_only=True)
class BenchTable:
    """One side-by-side measurement: its name, the variants in it, baseline first, and options.

    Attributes:
        options: of both stages.
        cpu, gpu: of one, which go before the general ones.
    """

    name: str
    contenders: tuple[str, ...]
    options: Table
    cpu: Table
    gpu: Table


@dataclass(frozen=True, kw_only=True)
class TasksTable:
    """Tasks of lm-eval: the variants that solve them, reference first, in which form, and options.

    Attributes:
        contenders: at least two names.
        artefact: "checkpoint" or "onnx", what of a variant solves the tasks.
        options: of the commands tasks and compare-tasks.
    """

    contenders: tuple[str, ...]
    artefact: str
    options: Table


@dataclass(frozen=True, kw_only=True)
class PipelineFile:
    """What a pipeline file asks for; paths in it are relative to its own folder, where the steps run.

    Attributes:
        path: the file.
        dense: the model that variants are compressed from, None without one.
        output: folder of everything that is made.
        variants: in the order of the file.
        evaluate, report: options; None leaves the step out.
        bench: tables of measurements.
        tasks: tasks of lm-eval, None without.
    """

    path: Path
    dense: str | None
    output: Path
    variants: tuple[Variant, ...]
    evaluate: Table | None
    bench: tuple[BenchTable, ...]
    tasks: TasksTable | None
    report: Table | None


def read_pipeline(path: Path | str) -> PipelineFile:
    """Reads and checks a pipeline file; the options of commands are checked by the commands.

    Raises:
        InputMissingError: no such file.
        InputRefusedError: not TOML, or a table, key or value that has no meaning; names it, and the nearest that has.
    """
    path = Path(path)
    if not path.is_file():
        raise InputMissingError(f"{path}: no such file; docs/ci has an example")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputRefusedError(f"{path}: is not TOML ({error}); expected key = value lines under [tables]") from None
    known_keys(content, _TABLES, f"{path}")
    tables = {name: _table(content, name, f"{path}") for name in _TABLES}
    model, output, variants = tables["model"] or {}, tables["output"] or {}, tables["variants"] or {}
    known_keys(model, ("dense",), f"{path}: [model]")
    known_keys(output, ("folder",), f"{path}: [output]")
    if not variants:
        raise InputRefusedError(f"{path}: has no variants; expected at least one [variants.NAME]")
    dense = _text(model, "dense", f"{path}: [model]")
    found = tuple(_variant(path, name, variants, tables, dense) for name in variants)
    for variant in found:
        _check_origin(path, variant, [other.name for other in found])
        _check_export(path, variant)
    return PipelineFile(
        path=path,
        dense=dense,
        output=Path(_text(output, "folder", f"{path}: [output]") or _OUTPUT),
        variants=found,
        evaluate=tables["evaluate"],
        bench=_bench(path, tables["bench"], found),
        tasks=None if tables["tasks"] is None else _tasks(f"{path}: [tasks]", tables["tasks"], found),
        report=tables["report"],
    )


def known_keys(table: Table, known: Iterable[str], where: str) -> None:
    """Raises InputRefusedError for a key that is not among the known ones; suggests the nearest."""
    names = list(known)
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            advice = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
            raise InputRefusedError(f"{where}: unknown key {key!r}; {advice}")


def _table(content: Table, name: str, where: str) -> dict[str, Any] | None:
    found = content.get(name)
    if found is not None and not isinstance(found, dict):
        raise InputRefusedError(f"{where}: {name} is {found!r}, expected a table")
    return found


def _text(table: Table, key: str, where: str) -> str | None:
    found = table.get(key)
    if found is not None and (not isinstance(found, str) or not found):
        raise InputRefusedError(f"{where}: {key} is {found!r}, expected text")
    return found


def _name(name: str, where: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputRefusedError(f"{where}: the name {name!r} is not one of letters, digits, '.', '_' and '-'")
    if name in _RESERVED:
        raise InputRefusedError(f"{where}: the name {name!r} is that of a result in the output folder; take another")
    return name


def _variant(path: Path, name: str, variants: Table, tables: Table, dense: str | None) -> Variant:
    where = f"{path}: [variants.{_name(name, f'{path}: [variants]')}]"
    table = _table(variants, name, f"{path}: [variants]") or {}
    known_keys(table, (*_SOURCES, *_OF_VARIANTS), where)
    given = [key for key in _SOURCES if key in table]
    if len(given) > 1:
        raise InputRefusedError(f"{where}: has {' and '.join(given)}, expected one of {', '.join(_SOURCES)}")
    source, options, place = (given[0] if given else "dense"), {}, ""
    if source in ("checkpoint", "import"):
        place = _text(table, source, where) or ""
    elif source != "dense":
        options = dict(_table(table, source, where) or {})
    if source == "relayout":
        place = _text(options, "from", where) or ""
        options.pop("from", None)
        if not place:
            raise InputRefusedError(f"{where}: relayout has no from, expected the name of another variant")
    if source in ("dense", "compress") and dense is None:
        raise InputRefusedError(f"{where}: needs the dense model; give it as dense in [model]")
    return Variant(
        name=name,
        source=source,
        place=place,
        options=options,
        **{step: _merged(tables[step], _table(table, step, where)) for step in _OF_VARIANTS},
    )


def _merged(general: Table | None, own: Table | None) -> Table | None:
    return None if general is None and own is None else {**(general or {}), **(own or {})}


def _check_origin(path: Path, variant: Variant, names: list[str]) -> None:
    if variant.source == "relayout" and variant.place not in names[: names.index(variant.name)]:
        raise InputRefusedError(
            f"{path}: [variants.{variant.name}]: relayout is from {variant.place!r}, expected a variant above it "
            f"({', '.join(names[: names.index(variant.name)]) or 'there is none'})"
        )


def _check_export(path: Path, variant: Variant) -> None:
    for step in ("verify", "build"):
        if getattr(variant, step) is not None and variant.export is None:
            raise InputRefusedError(f"{path}: [{step}] of {variant.name} works on ONNX; add [export]")


def _bench(path: Path, tables: Table | None, variants: Sequence[Variant]) -> tuple[BenchTable, ...]:
    found = []
    for name in tables or {}:
        where = f"{path}: [bench.{_name(name, f'{path}: [bench]')}]"
        table = dict(_table(tables or {}, name, f"{path}: [bench]") or {})
        contenders = _contenders(where, table, variants)
        _check_exported(f"{where}: {{}} is measured as ONNX", contenders, variants)
        own = {stage: _table(table, stage, where) or {} for stage in STAGES}
        for stage in STAGES:
            if "contenders" in own[stage]:
                raise InputRefusedError(f"{where}: contenders in .{stage} is of both stages; give it in [bench.{name}]")
        options = {key: value for key, value in table.items() if key not in STAGES}
        found.append(BenchTable(name=name, contenders=contenders, options=options, **own))
    return tuple(found)


def _tasks(where: str, given: Table, variants: Sequence[Variant]) -> TasksTable:
    table = dict(given)
    contenders = _contenders(where, table, variants)
    artefact = table.pop("artefact", _ARTEFACTS[0])
    if artefact not in _ARTEFACTS:
        raise InputRefusedError(f"{where}: artefact is {artefact!r}, expected one of {', '.join(_ARTEFACTS)}")
    if not table.get("task"):
        raise InputRefusedError(f"{where}: has no task, expected names of lm-eval tasks")
    if len(contenders) < 2:
        raise InputRefusedError(f"{where}: contenders is {list(contenders)}, expected a reference and one to compare")
    if artefact == "onnx":
        _check_exported(f"{where}: {{}} solves tasks as ONNX", contenders, variants)
    return TasksTable(contenders=contenders, artefact=artefact, options=table)


def _contenders(where: str, table: dict[str, Any], variants: Sequence[Variant]) -> tuple[str, ...]:
    """Takes the names out of a table; all variants where it has none."""
    names = [variant.name for variant in variants]
    found = table.pop("contenders", names)
    if not isinstance(found, list) or not found or not all(one in names for one in found):
        raise InputRefusedError(f"{where}: contenders is {found!r}, expected names out of {', '.join(names)}")
    return tuple(found)


def _check_exported(message: str, contenders: Sequence[str], variants: Sequence[Variant]) -> None:
    for variant in variants:
        if variant.name in contenders and variant.export is None:
            raise InputRefusedError(f"{message.format(variant.name)}; add [export]")
