"""Stage results -> one report: report.json for programs, report.md, report.xml (JUnit) and report.html for people.

Nothing is measured here. The decisions of the stages are collected, with those about an earlier report where a limit is
given. The verdict is "failed" where one failed, "not decided" where there is none at all or one could not be taken,
"passed" otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pifa_deploy import __version__
from pifa_deploy.json_shape import validate
from pifa_deploy.output_folder import new_folder, write_json, write_text
from pifa_deploy.proof import ProofGates
from pifa_deploy.report_html import html_page
from pifa_deploy.report_junit import junit_xml
from pifa_deploy.report_markdown import markdown
from pifa_deploy.report_regression import changes, regressions
from pifa_deploy.report_schema import REPORT, SCHEMA
from pifa_deploy.report_stages import KINDS, Source, check_schema, read_json, read_sources
from pifa_deploy.report_variants import figures_of

REPORT_JSON = "report.json"
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What a report is made of.

    Attributes:
        sources: the stage results, in the order to show.
        title: heading.
        command: the command line that makes it, shown as it is.
        gates: what the engines must contain.
        baseline: report.json of an earlier report, whose figures stand beside those of this one.
        max_regression: largest relative worsening of such a figure that passes; None judges none.
        undecided: (title, reason) of what was to be decided and left no result.
    """

    sources: tuple[Source, ...]
    title: str = "Deployment report"
    command: str | None = None
    gates: ProofGates = field(default_factory=ProofGates)
    baseline: Path | None = None
    max_regression: float | None = None
    undecided: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for no source at all, two of one kind with the same name, or a limit on nothing."""
        if self.max_regression is not None and (self.baseline is None or not 0 <= self.max_regression < math.inf):
            raise ValueError(
                f"max_regression is {self.max_regression} with {self.baseline or 'no baseline'}, expected a share of at"
                " least 0 and an earlier report"
            )
        if not self.sources and not self.undecided:
            *some, last = (f"--{kind}" for kind in KINDS)
            raise ValueError(f"there is nothing to report; give {', '.join(some)} or {last}")
        seen: dict[tuple[str, str], Path] = {}
        for source in self.sources:
            other = seen.setdefault((source.kind, source.name), source.path)
            if other is not source.path:
                raise ValueError(
                    f"{other} and {source.path} are both called {source.name!r}; name one as --{source.kind} NAME=PATH"
                )


def make_report(options: ReportOptions) -> Json:
    """Returns report.json.

    Raises:
        InputMissingError, InputRefusedError: as `read_sources` and `read_report`.
    """
    stages = read_sources(options.sources, options.gates)
    gates, figures = gates_of(stages), figures_of(stages)
    before = read_report(options.baseline) if options.baseline else None
    if before and options.max_regression is not None:
        decisions = regressions(before, figures, stages, options.max_regression)
        gates += [{"stage": "baseline", "label": before["title"], **decision} for decision in decisions]
    for title, reason in options.undecided:
        gate = {"name": "result", "value": None, "limit": None, "passed": None, "reason": reason}
        gates.append({"stage": "ci", "label": title, **gate})
    report = {
        "artefact": "report",
        "schema": SCHEMA,
        "title": options.title,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "command": options.command,
        "verdict": verdict_of(gates),
        "gates": gates,
        "figures": figures,
        "changes": changes(before, figures, stages) if before else [],
        "stages": stages,
    }
    validate(report, REPORT, "report")
    return report


def write_report(report: Json, out: Path | str, *, force: bool = False) -> None:
    """Writes the folder `out`: report.json, report.md, report.xml and report.html.

    Raises:
        OutputExistsError, OutputHeldError, OutputError: as `new_folder`.
    """
    with new_folder(out, force=force) as folder:
        write_json(folder / REPORT_JSON, report)
        write_text(folder / "report.md", markdown(report))
        write_text(folder / "report.xml", junit_xml(report))
        write_text(folder / "report.html", html_page(report))


def read_report(path: Path | str) -> Json:
    """Returns the checked content of report.json; `path` is the file or the folder it lies in.

    Raises:
        InputMissingError: no such file.
        InputRefusedError: it is malformed or of another schema; the message names the field.
    """
    file = Path(path) / REPORT_JSON if Path(path).is_dir() else Path(path)
    report = read_json(file, "give a report.json written by `pifa-deploy report`")
    if report.get("artefact") == "report":
        check_schema(report.get("schema"), SCHEMA, file)
    validate(report, REPORT, f"{file}: report")
    return report


def gates_of(stages: Mapping[str, Sequence[Json]]) -> list[Json]:
    """Returns the decisions of all stages with where they come from."""
    gates = []
    for kind, entries in stages.items():
        for entry in entries:
            content = entry["content"]
            decisions = [dict(decision) for decision in content.get("decisions", ())]
            decisions += _unexplained(kind, content, decisions)
            for decision in decisions:
                decided = {key: decision.get(key) for key in ("name", "value", "limit", "passed", "reason")}
                gates.append({"stage": kind, "label": entry["label"], **decided})
    return gates


def _unexplained(kind: str, content: Json, decisions: Sequence[Json]) -> list[Json]:
    """Returns what a stage says of itself that its decisions do not: a failure, or a verification without a verdict."""
    told = [decision["passed"] for decision in decisions]
    verdict = content.get("passed", True)
    if verdict is False and False not in told:
        reason = "the stage says that it failed"
    elif verdict is None and kind == "verify" and None not in told:
        reason = "the stage decided nothing"
    else:
        return []
    return [{"name": kind, "value": None, "limit": None, "passed": verdict, "reason": reason}]


def verdict_of(gates: Sequence[Json]) -> str:
    """Returns "passed", "failed" or "not decided"."""
    results = [gate["passed"] for gate in gates]
    if False in results:
        return "failed"
    return "passed" if results and None not in results else "not decided"
