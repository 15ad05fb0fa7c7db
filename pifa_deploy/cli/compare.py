"""The commands that run lm-eval's tasks and compare two such runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pifa_deploy.cli import console
from pifa_deploy.errors import ExitCode

_COLUMNS = ("task", "metric", "examples", "reference", "candidate", "lost", "won", "difference", "low", "high", "p")


@click.command("tasks")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--task", "tasks", multiple=True, required=True, help="Name of a task, group or tag; repeatable.")
@click.option("--include-path", type=click.Path(path_type=Path), help="Folder with tasks of your own (YAML).")
@click.option("--limit", type=int, help="Examples of each task; all if left out.")
@click.option("--num-fewshot", type=int, help="Solved examples in a prompt; the task's number if left out.")
@click.option("--apply-chat-template", is_flag=True, help="Put prompts into the tokenizer's chat template.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Of a checkpoint; fp32 if left out.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Of a checkpoint.")
@click.option("--batch-size", type=int, default=1, show_default=True, help="Prompts that are run together.")
@console.force_option
@console.json_option
def tasks_command(model: str, out: Path, force: bool, json_path: Path | None, **options: Any) -> int:
    """Run tasks of lm-eval on MODEL, a checkpoint or an ONNX folder; OUT gets every example's answer.

    OUT holds what lm-eval writes with --log_samples, for compare-tasks. Exit code 3 without lm-eval.
    """
    from pifa_deploy.task_run import TaskRunOptions, run_tasks

    run = run_tasks(model, out, TaskRunOptions(**options), force=force)
    if console.result({**run, "command": console.command_line()}, json_path):
        rows = [
            (name, task["examples"], metric, value)
            for name, task in run["tasks"].items()
            for metric, value in task["metrics"].items()
            if "_stderr," not in metric
        ]
        click.echo(console.table(("task", "examples", "metric", "value"), rows))
    console.summary(f"{out}: {len(run['tasks'])} tasks, {run['seconds']:.0f} s", json_path)
    return ExitCode.PASSED


@click.command("compare-tasks")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option("--task", "tasks", multiple=True, help="Name of a task; all that both have if left out.")
@click.option("--metric", help="Field of the samples that is 0 or 1; acc_norm, acc, exact_match or em if left out.")
@click.option("--filter", help="Which of a task's ways to read an answer counts; its first if left out.")
@click.option("--margin", type=float, default=0.01, show_default=True, help="Loss of accuracy that counts as none.")
@click.option("--confidence", type=float, default=0.95, show_default=True, help="Of the difference's interval.")
@click.option("--pooled", is_flag=True, help="Decide about all examples together instead of task by task.")
@console.json_option
def compare_tasks_command(reference: Path, candidate: Path, json_path: Path | None, **options: Any) -> int:
    """Compare lm-eval runs of REFERENCE and CANDIDATE, example by example (folders of --log_samples).

    Exit code 0 when every task's interval of the difference lies above -margin, 1 when one lies below it, 3 when there
    are too few examples to tell. --pooled decides about the examples of all tasks together.
    """
    from pifa_deploy.task_comparison import TaskOptions, compare_tasks

    report = compare_tasks(reference, candidate, TaskOptions(**options))
    if console.result({**report.to_json(), "command": console.command_line()}, json_path):
        rows = []
        for task in (*report.tasks, report.overall) if len(report.tasks) > 1 else report.tasks:
            counts = (task.examples, task.reference, task.candidate, task.lost, task.won)
            rows.append((task.task, task.metric, *counts, task.difference, task.low, task.high, task.p_value))
        click.echo(console.table(_COLUMNS, rows))
    outcome = {True: "no loss beyond", False: "a loss beyond", None: "too few examples to tell a loss of"}[
        report.passed
    ]
    console.summary(f"{candidate} against {reference}: {outcome} {options['margin']:g}", json_path)
    return ExitCode.NOT_DECIDED if report.passed is None else ExitCode.PASSED if report else ExitCode.GATE_FAILED
