"""The tables of a report, as text: the same ones for Markdown and HTML."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pifa_deploy.report_numbers import counts, interval, millions, number, percent, plain
from pifa_deploy.report_variants import (
    Variant,
    against_faster,
    cases_of,
    main_cases,
    stated_speed_up,
    texts_of,
    variants_of,
)

NO_GATE = "no gate was asked for"
_MANY_GATES = 20
MARKS = {True: "passed", False: "failed", None: "not decided"}
_URGENCY = {"failed": 0, "not decided": 1, "passed": 2}
_NUMERIC = re.compile(r"[-+×]?[\d.,]+(e[-+]?\d+)?( %)?( \[.*\])?|–|")
Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in rows; the first column names the row.

    Attributes:
        title: what it shows.
        columns: headings.
        rows: cells, as many as columns; "–" for what is not known.
        note: what to know when reading it, "" for nothing.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers."""
        return tuple(i > 0 and all(_NUMERIC.fullmatch(row[i]) for row in self.rows) for i in range(len(self.columns)))


def summary(report: Json) -> str:
    """Returns how many gates there are and what became of them."""
    decided = [gate["passed"] for gate in report["gates"]]
    others = f"{decided.count(False)} failed, {decided.count(None)} not decided"
    return f"{decided.count(True)} of {len(decided)} gates passed, {others}" if decided else NO_GATE


def gates_table(report: Json) -> Table:
    """Returns all decisions."""
    rows = [
        (
            gate["stage"] if gate["label"] == gate["stage"] else f"{gate['stage']} {gate['label']}",
            gate["name"],
            plain(gate["value"]),
            plain(gate["limit"]),
            MARKS[gate["passed"]],
            gate["reason"] or "",
        )
        for gate in report["gates"]
    ]
    columns = ("stage", "gate", "found", "limit", "result", "why")
    used = len(columns) if any(row[-1] for row in rows) else len(columns) - 1
    return Table(title="Gates", columns=columns[:used], rows=tuple(row[:used] for row in rows))


def gates_tables(report: Json) -> list[Table]:
    """Returns all decisions: in one table, or one a stage where they are many, the stages with failures first."""
    table = gates_table(report)
    if len(table.rows) <= _MANY_GATES:
        return [table]
    stages = dict.fromkeys(row[0] for row in table.rows)
    tables = []
    for stage in stages:
        rows = [row for row in table.rows if row[0] == stage]
        results = [row[4] for row in rows]
        others = ", ".join(f"{results.count(mark)} {mark}" for mark in (MARKS[False], MARKS[None]) if mark in results)
        title = f"{stage}: {results.count(MARKS[True])} of {len(rows)} passed{f', {others}' if others else ''}"
        tables.append(Table(title=title, columns=table.columns, rows=tuple(rows)))
    return sorted(tables, key=lambda one: min(_URGENCY[row[4]] for row in one.rows))


def figures_tables(report: Json) -> list[Table]:
    """Returns the main figures, a table for each bench where there are several."""
    parts = one_bench_each(report)
    if len(parts) < 2:
        return [figures_table(report)]
    tables = []
    for title, part in parts.items():
        table = figures_table(part)
        names = {contender["name"] for contender in part["stages"]["bench"][0]["content"]["contenders"]}
        tables.append(replace(table, title=title, rows=tuple(row for row in table.rows if row[0] in names)))
    return tables


def one_bench_each(report: Json) -> dict[str, Json]:
    """Returns label of the bench -> the report with that bench alone, in which no name needs the label."""
    stages = report["stages"]
    return {entry["label"]: {**report, "stages": {**stages, "bench": [entry]}} for entry in stages["bench"]}


def widest_bench(report: Json) -> Json:
    """Returns the report with the bench of the most contenders alone."""
    parts = list(one_bench_each(report).values())
    return max(parts, key=lambda part: len(part["stages"]["bench"][0]["content"]["contenders"]), default=report)


def figures_table(report: Json) -> Table:
    """Returns one row a variant: size, perplexity, the main cases of the benches."""
    stages = report["stages"]
    texts, cases = texts_of(stages), main_cases(stages).values()
    variants = variants_of(stages)
    peaks = [variant.facts.get("memory", {}).get("peak_bytes") for variant in variants]
    columns = ["variant", "kind", "density", "weights MB", *(["peak MB"] if any(peaks) else [])]
    columns += [f"{text} perplexity" for text in texts]
    for case in cases:
        columns += [f"{case} ms", "speed-up"]
    rows = []
    for variant, peak in zip(variants, peaks, strict=True):
        facts = variant.facts
        cells = [variant.name, variant.kind, number(facts.get("density"), 3)]
        cells += [millions(facts.get("weight_bytes")), *([millions(peak)] if any(peaks) else [])]
        cells += [number(_value(variant, text)) for text in texts]
        for case in cases:
            timing = variant.times.get(case)
            cells += [number(timing and timing.median_ms), interval(timing.speed_up) if timing else "–"]
        rows.append(tuple(cells))
    baselines = dict.fromkeys(entry["content"]["baseline"] for entry in stages["bench"])
    note = f"Speed-up over {', '.join(baselines)}: median and 95 % interval." if baselines else ""
    return Table(title="Main figures", columns=tuple(columns), rows=tuple(rows), note=note)


def latency_tables(report: Json) -> list[Table]:
    """Returns one table a case."""
    tables = []
    for name, case in cases_of(report["stages"]).items():
        columns, rows = _latency_rows(case)
        tables.append(Table(title=name, columns=columns, rows=rows, note="; ".join(case["warnings"])))
    return tables


def _latency_rows(case: Json) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Returns the columns that a case has figures for, and its rows."""
    makers: dict[str, Callable[[Json], str]] = {
        "median ms": lambda row: number(row["latency_ms"]["median"]),
        "p90": lambda row: number(row["latency_ms"]["p90"]),
        "p99": lambda row: number(row["latency_ms"]["p99"]),
        "std / mean": lambda row: percent(row["latency_ms"]["cv"]),
        "tokens/s": lambda row: number(row["tokens_per_s"]),
        "speed-up [95 %]": lambda row: interval(stated_speed_up(row)),
        "GPU compute ms": lambda row: number((row["gpu_compute_ms"] or {}).get("median")),
        "enqueue ms": lambda row: number((row["enqueue_ms"] or {}).get("median")),
        "bound ms": lambda row: number(row["bound_ms"]),
        "of bound": lambda row: percent(row["bound_fraction"]),
        "J/token": lambda row: number(row["joules_per_token"]),
    }
    columns = {name: [make(row) for row in case["rows"]] for name, make in makers.items()}
    shown = {name: cells for name, cells in columns.items() if set(cells) - {"–"}}
    names = [row["name"] for row in case["rows"]]
    return ("variant", *shown), tuple(zip(names, *shown.values(), strict=True))


def rivals_table(report: Json) -> Table:
    """Returns PIFA against the faster of dense and 2:4 in every case."""
    variants, rows = variants_of(report["stages"]), []
    for case in cases_of(report["stages"]):
        for variant, rival, gain in against_faster(case, variants):
            named = rival.contender if rival.kind == rival.contender else f"{rival.contender} ({rival.kind})"
            times = (number(each.times[case].median_ms) for each in (rival, variant))
            rows.append((case, variant.contender, named, *times, interval(gain)))
    columns = ("case", "PIFA", "faster of dense and 2:4", "its ms", "PIFA ms", "speed-up [95 %]")
    return Table(title="PIFA against the faster of dense and 2:4", columns=columns, rows=tuple(rows))


def engines_table(report: Json) -> Table:
    """Returns what the engines contain, one column an engine."""
    columns = [_engine_column(entry) for entry in report["stages"]["engine"]]
    if not columns:
        return Table(title="Engines", columns=("engine",), rows=())
    names = tuple(column["engine"] for column in columns)
    facts = [name for name in columns[0] if name != "engine"]
    rows = tuple((fact, *(column[fact] for column in columns)) for fact in facts)
    return Table(title="Engines", columns=("engine", *names), rows=rows)


def _engine_column(entry: Json) -> dict[str, str]:
    content, proof = entry["content"], entry["content"]["proof"]
    label = proof["sparse_label"]
    eligible, picked = (
        "not stated" if proof[key] is None else str(proof[key]) for key in ("sparse_eligible", "sparse_picked")
    )
    modules = "unknown" if proof["modules"] is None else str(proof["modules"])
    return {
        "engine": f"{entry['label']} ({label})" if label else entry["label"],
        "built by": f"{content['backend']} {content['version']}",
        "compute capability": ", ".join(content["compute_capabilities"]),
        "size, MB": millions(content["bytes"]),
        "layers": number(proof["layers"]),
        "precision of all layers": counts(proof["precisions"]),
        "precision of matrix products": counts(proof["matrix_precisions"]),
        "layers that fuse several": number(proof["fused_layers"]),
        "plugin layers": number(proof["plugin_layers"]),
        "PIFA modules computed by the plugin": f"{number(proof['plugin_modules'])} of {modules}",
        "sparse kernels allowed": "yes" if proof["sparse_allowed"] else "no",
        "layers eligible for sparse kernels": eligible,
        "layers run by sparse kernels": picked,
        "read from": proof["source"],
    }


def changes_table(report: Json) -> Table:
    """Returns the figures that the earlier report had too."""
    rows = tuple(
        (
            each["variant"],
            each["figure"],
            number(each["before"]),
            number(each["now"]),
            f"{100 * (each['now'] / each['before'] - 1):+.1f} %" if each["before"] else "–",
        )
        for each in report["changes"]
    )
    foreign = any(not each.get("comparable", True) for each in report["changes"])
    return Table(
        title="Against the earlier report",
        columns=("variant", "figure", "before", "now", "change"),
        rows=rows,
        note="The earlier times are of another machine: no gate judges them." if foreign else "",
    )


def environment_table(entry: Json) -> Table:
    """Returns what a bench ran on, one row a fact; nested facts are named "a.b"."""
    rows = tuple(_flat(entry["content"]["environment"]))
    return Table(title=entry["label"], columns=("what", "found"), rows=rows)


def commands_of(report: Json) -> list[str]:
    """Returns the command lines of the stages that recorded one, and that of the report."""
    told = [entry["content"].get("command") for entries in report["stages"].values() for entry in entries]
    return list(dict.fromkeys(filter(None, [*told, report["command"]])))


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        if name and value and not any(isinstance(each, dict | list) for each in value.values()):
            return [(name, ", ".join(f"{key} {plain(each)}" for key, each in value.items()))]
        return [row for key in value for row in _flat(value[key], f"{name}.{key}" if name else str(key))]
    if isinstance(value, list):
        simple = all(not isinstance(each, dict | list) for each in value)
        return [(name, ", ".join(map(str, value)) or "none" if simple else json.dumps(value))]
    return [(name, "none" if value is None else plain(value))]


def _value(variant: Variant, text: str) -> float | None:
    estimate = variant.perplexity.get(text)
    return estimate.value if estimate else None
