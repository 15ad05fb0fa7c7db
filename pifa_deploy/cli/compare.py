"""The command that compares two runs of lm-eval."""

from __future__ import annotations

from pathlib import Path

import click

from pifa_deploy.cli import console
from pifa_deploy.errors import ExitCode

_COLUMNS = ("task", "metric", "examples", "reference", "candidate", "lost", "won", "difference", "low", "high", "p")


@click.command("compare-tasks")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option("--task", "tasks", multiple=True, help="Name of a task; all that both have if left out.")
@click.option("--metric", help="Field of the samples that is 0 or 1; acc_norm, acc, exact_match or em if left out.")
@click.option("--margin", type=float, default=0.01, show_default=True, help="Loss of accuracy that counts as none.")
@click.option("--confidence", type=float, default=0.95, show_default=True, help="Of the difference's interval.")
@console.json_option
def compare_tasks_command(
    reference: Path,
    candidate: Path,
    tasks: tuple[str, ...],
    metric: str | None,
    margin: float,
    confidence: float,
    json_path: Path | None,
) -> int:
    """Compare lm-eval runs of REFERENCE and CANDIDATE, example by example (folders of --log_samples).

    Exit code 0 when every task's interval of the difference lies above -margin, 1 when one lies below it, 3 when there
    are too few examples to tell.
    """
    from pifa_deploy.task_comparison import TaskOptions, compare_tasks

    options = TaskOptions(tasks=tasks, metric=metric, margin=margin, confidence=confidence)
    report = compare_tasks(reference, candidate, options)
    if console.result({**report.to_json(), "command": console.command_line()}, json_path):
        rows = []
        for task in report.tasks:
            counts = (task.examples, task.reference, task.candidate, task.lost, task.won)
            rows.append((task.task, task.metric, *counts, task.difference, task.low, task.high, task.p_value))
        click.echo(console.table(_COLUMNS, rows))
    outcome = {True: "no loss beyond", False: "a loss beyond", None: "too few examples to tell a loss of"}[
        report.passed
    ]
    console.summary(f"{candidate} against {reference}: {outcome} {margin:g}", json_path)
    return ExitCode.NOT_DECIDED if report.passed is None else ExitCode.PASSED if report else ExitCode.GATE_FAILED
