"""The tables on what a compressed model still can: perplexity, tasks, parity with PyTorch."""

from __future__ import annotations

import itertools

from pifa_deploy.report_numbers import interval, number, percent, plain
from pifa_deploy.report_tables import MARKS, Json, Table
from pifa_deploy.report_variants import Estimate, variants_of


def perplexity_table(report: Json) -> Table:
    """Returns one row a variant and text: perplexity and its ratio, with intervals."""
    stages = report["stages"]
    # Named as they were evaluated where several benches have them.
    alone = {**stages, "bench": []} if len(stages["bench"]) > 1 else stages
    rows = [
        (variant.name, text, interval(estimate, 4), interval(variant.ratio.get(text)))
        for variant in variants_of(alone)
        for text, estimate in variant.perplexity.items()
    ]
    columns = ("model", "text", "perplexity [95 %]", "× first model [95 %]")
    note = "Windows of a text are taken as independent; the ratio is paired window by window."
    return Table(title="Perplexity", columns=columns, rows=tuple(rows), note=note)


def tasks_tables(report: Json) -> list[Table]:
    """Returns one table a comparison: its tasks, and all of them together where they are several."""
    tables = []
    for entry in report["stages"]["tasks"]:
        content = entry["content"]
        results = {decision["name"]: MARKS[decision["passed"]] for decision in content["decisions"]}
        shown = [*content["tasks"], *([content["overall"]] if len(content["tasks"]) > 1 else [])]
        rows = tuple(
            (
                each["task"],
                each["metric"],
                number(each["examples"]),
                *(percent(each[run]) for run in ("reference", "candidate")),
                *(number(each[way]) for way in ("lost", "won")),
                _points(each),
                number(each["p_value"], 2),
                results.get(f"{each['task']}.{each['metric']}", "–"),
            )
            for each in shown
        )
        options = content["options"]
        change = f"difference, points [{plain(100 * options['confidence'])} %]"
        columns = ("task", "metric", "examples", "reference", "candidate", "lost", "won", change, "p", "result")
        note = (
            "Lost: examples that only the reference has right; won: only the candidate. Passed where the whole "
            f"interval lies above −{plain(100 * options['margin'])} points, failed where all of it lies below."
        )
        tables.append(Table(title=entry["label"], columns=columns, rows=rows, note=note))
    return tables


def _points(paired: Json) -> str:
    value, low, high = (100 * paired[end] for end in ("difference", "low", "high"))
    return f"{value:+.1f} [{low:.1f}, {high:.1f}]"


def parity_tables(report: Json) -> list[Table]:
    """Returns one table a verification: its cases, all of them together, and the low-rank pair beside them."""
    tables = []
    for entry in report["stages"]["verify"]:
        content = entry["content"]
        shown = [*content["cases"], content["overall"], content["low_rank"]]
        names = [each["name"] for each in content["cases"]] + ["overall", "low-rank pair, same dtype"]
        rows = tuple(
            (
                name,
                number(each["positions"]),
                number(each["max_abs"], 3),
                number(each["mean_kl"], 3),
                number(each["p999_kl"], 3),
                percent(each["top1"], 2),
                interval(_with_ends(each, "delta_nll")),
            )
            for name, each in zip(names, shown, strict=True)
            if each
        )
        columns = ("case", "positions", "max |difference|", "mean KL", "p99.9 KL", "same best token", "Δ NLL [95 %]")
        title = f"{entry['label']} ({content['dtype']})"
        tables.append(Table(title=title, columns=columns, rows=_merged(rows), note=_bisected(content)))
    return tables


def _bisected(content: Json) -> str:
    """Returns where a failed verification found the first wrong part."""
    found = content["bisection"]
    return str(found["line"]) if found and content["passed"] is False else ""


def _with_ends(figures: Json, name: str) -> Estimate | None:
    """Returns a figure and, where they are stated, the ends of its interval."""
    if figures[name] is None:
        return None
    return Estimate(value=figures[name], low=figures[f"{name}_low"], high=figures[f"{name}_high"])


def _merged(rows: tuple[tuple[str, ...], ...], most: int = 6) -> tuple[tuple[str, ...], ...]:
    """Leaves out the middle of a long run of cases of one kind, such as decode steps; report.json has them all."""
    found: list[tuple[str, ...]] = []
    for kind, group in itertools.groupby(rows, key=lambda row: row[0].partition(" ")[0]):
        run = list(group)
        if len(run) > most:
            gap = (f"… {len(run) - 4} more of {kind} in report.json", *[""] * (len(run[0]) - 1))
            run = [*run[:2], gap, *run[-2:]]
        found += run
    return tuple(found)
