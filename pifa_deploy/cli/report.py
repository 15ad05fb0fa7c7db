"""The command that puts stage results together: report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pifa_deploy.cli import console
from pifa_deploy.errors import ExitCode

if TYPE_CHECKING:
    from pifa_deploy.report import ReportOptions
    from pifa_deploy.report_stages import Source

_EXIT = {"passed": ExitCode.PASSED, "failed": ExitCode.GATE_FAILED, "not decided": ExitCode.NOT_DECIDED}


@click.command("report")
@click.option("--verify", multiple=True, metavar="[NAME=]FILE", help="What verify --json wrote; repeatable.")
@click.option("--bench", multiple=True, metavar="[NAME=]FILE", help="What bench --json wrote; repeatable.")
@click.option("--evaluate", multiple=True, metavar="[NAME=]FILE", help="What evaluate --json wrote; repeatable.")
@click.option("--tasks", multiple=True, metavar="[NAME=]FILE", help="What compare-tasks --json wrote; repeatable.")
@click.option("--engine", multiple=True, metavar="[NAME=]DIR", help="An engine folder; repeatable.")
@click.option("--checkpoint", multiple=True, metavar="[NAME=]DIR", help="A checkpoint, for its ranks; repeatable.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--title", default="Deployment report", show_default=True)
@click.option("--baseline-report", type=click.Path(path_type=Path), help="An earlier report.json to compare with.")
@click.option("--max-regression", type=float, metavar="SHARE", help="Fail where a figure is worse than there by more.")
@click.option(
    "--require-precision", type=click.Choice(console.PRECISIONS), help="Widest precision of any matrix product."
)
@click.option("--require-plugin", is_flag=True, help="Every PIFA module must be computed by a plugin layer.")
@click.option("--require-sparse", is_flag=True, help="The build log must show that sparse kernels were picked.")
@click.option("--undecided", multiple=True, metavar="TITLE=REASON", hidden=True, help="What left no result; for ci.")
@console.force_option
@console.json_option
def report_command(out: Path, force: bool, json_path: Path | None, **flags: Any) -> int:
    """Put the results of verify, bench, evaluate and compare-tasks and the contents of engines into one report.

    OUT gets report.json (docs/report.schema.json), report.md for a pull request, report.xml (JUnit) and report.html,
    one file that loads nothing. The report collects the stages' decisions and measures nothing. NAME is what a result
    is called; a 2:4 engine whose NAME, or folder, is that of a bench's contender also names that contender.
    The --require options are gates on the engines.

    Exit code 1 when a gate failed, 3 when there is none or one could not be decided; the report is written anyway.
    """
    from pifa_deploy.report import make_report, write_report

    report = make_report(replace(report_options(flags), command=console.command_line()))
    write_report(report, out, force=force)
    if console.result(report, json_path):
        click.echo(_gates(report["gates"]))
    console.summary(f"{out}: {report['verdict']}", json_path)
    return _EXIT[report["verdict"]]


def report_options(flags: dict[str, Any]) -> ReportOptions:
    """Returns what the command line asks for, without the command line itself."""
    from pifa_deploy.proof import ProofGates
    from pifa_deploy.report import ReportOptions
    from pifa_deploy.report_stages import KINDS

    gates = ProofGates(**{name: flags[f"require_{name}"] for name in ("precision", "plugin", "sparse")})
    if gates.asked and not flags["engine"]:
        raise ValueError("--require-precision, --require-plugin and --require-sparse ask about engines; give --engine")
    return ReportOptions(
        sources=tuple(_source(kind, place) for kind in KINDS for place in flags[kind]),
        title=flags["title"],
        gates=gates,
        baseline=flags["baseline_report"],
        max_regression=flags["max_regression"],
        undecided=tuple(console.split_named(one, "--undecided", "TITLE=REASON") for one in flags["undecided"]),
    )


def _gates(gates: Sequence[Mapping[str, Any]]) -> str:
    columns = ("stage", "label", "name", "value", "limit")
    rows = [(*(gate[column] for column in columns), console.MARKS[gate["passed"]]) for gate in gates]
    return console.table((*columns, "result"), rows)


def _source(kind: str, given: str) -> Source:
    from pifa_deploy.report_stages import Source

    label, path = console.split_named(given, f"--{kind}", "[NAME=]PATH")
    return Source(kind=kind, label=label or None, path=Path(path))
