"""The command ci: a pipeline file from checkpoints to the report, with one exit code."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pifa_deploy.cli import console
from pifa_deploy.errors import ExitCode, InputRefusedError
from pifa_deploy.pipeline_file import STAGES, known_keys, read_pipeline

if TYPE_CHECKING:
    from pifa_deploy.pipeline import Outcome

# What ci itself gives to the commands, and what is no part of a pipeline.
_OWN_FLAGS = ("json_path", "force", "out", "reference", "undecided")
_OWN_FLAGS_OF = {
    "verify": ("engine", "saved"),
    "bench": ("plan", "generated", "device"),
    "compare-tasks": ("tasks",),
}
# Keys of a table that are no options, and the other command whose options stand in the same table.
_OWN_KEYS = {"bench": ("contenders",), "tasks": ("contenders", "artefact")}
_BESIDE = {"tasks": "compare-tasks", "compare-tasks": "tasks"}
_RESULTS = {ExitCode.PASSED: "passed", ExitCode.GATE_FAILED: "FAILED", ExitCode.NOT_DECIDED: "not decided"}
_NOTHING = "nothing was gated"


@click.command("ci")
@click.argument("file", type=click.Path(path_type=Path), default=Path("pifa-deploy.toml"))
@click.option("--stage", type=click.Choice(STAGES), default="cpu", show_default=True, help="gpu: what needs a GPU.")
@click.option("--dry-run", is_flag=True, help="Show the commands and end.")
@click.option("--show-folder", is_flag=True, help="Show the folder of all that is made and end.")
@click.option("--force", is_flag=True, help="Run every step again.")
@console.json_option
def ci_command(file: Path, stage: str, dry_run: bool, show_folder: bool, force: bool, json_path: Path | None) -> int:
    """Compress or import, export, verify, build, evaluate, run tasks, bench and report what FILE asks for.

    A step whose output stands for the same inputs is kept. Exit code 1 when a gate of any step failed, 3 when nothing
    failed but something was not decided or nothing had a gate, 7 while another run has the output folder. A run that
    ends otherwise leaves no report.
    """
    pipeline = read_pipeline(file)
    if show_folder:
        click.echo(os.path.relpath(pipeline.path.parent / pipeline.output))
        return ExitCode.PASSED
    from pifa_deploy.cli.ci_checks import check_files, check_options
    from pifa_deploy.pipeline import held_output, remove_report, require_gpu, run_steps
    from pifa_deploy.pipeline_steps import steps_of

    # Both stages, so that a mistake in the other one is not found on the other machine.
    stages = {name: steps_of(pipeline, name, arguments_of) for name in STAGES}
    steps, others = stages.pop(stage), [step for step in next(iter(stages.values())) if not step.reports]
    check_options(pipeline, [*steps, *others])
    if dry_run:
        for step in steps:
            click.echo(shlex.join(("pifa-deploy", *step.command(lambda place: True))))
        return ExitCode.PASSED
    with held_output(pipeline):
        if pipeline.report is not None:
            remove_report(pipeline)
        if stage == "gpu":
            require_gpu()
        check_files(pipeline, steps)
        outcomes = run_steps(
            pipeline, steps, others=others, force=force, say=lambda line: click.echo(f"== {line}", err=True)
        )
    return _shown(outcomes, f"{file}, stage {stage}", json_path)


def _shown(outcomes: list[Outcome], what: str, json_path: Path | None) -> int:
    """Shows what came of the steps; returns the exit code."""
    from pifa_deploy.pipeline import verdict

    found = verdict(outcomes)
    code = ExitCode.NOT_DECIDED if found is None else found
    console.result({"artefact": "ci", "schema": 1, "verdict": _RESULTS[code], "steps": _listed(outcomes)}, json_path)
    for outcome in outcomes:
        if outcome.step.judges:
            click.echo(f"{_result(outcome)}: {outcome.step.title}", err=True)
    console.summary(f"{what}: {_RESULTS[code]}{f', {_NOTHING}' if found is None else ''}", json_path)
    return code


def _result(outcome: Outcome) -> str:
    """Returns what is said of a step: "passed" only where something was judged."""
    if outcome.ungated:
        return f"{_RESULTS[ExitCode.NOT_DECIDED]}, {_NOTHING}" if outcome.step.reports else "measured"
    judged = outcome.step.judges or outcome.exit_code
    return _RESULTS[ExitCode(outcome.exit_code)] if judged else "made"


def arguments_of(name: str, table: Mapping[str, Any], where: str) -> list[str]:
    """Returns a table's keys as arguments of a command: text = ["a", "b"] becomes --text a --text b.

    Raises:
        InputRefusedError: a key that is no option of the command, or a value that it does not take.
    """
    options = _options(name)
    others = _options(_BESIDE[name]) if name in _BESIDE else {}
    known = (*_OWN_KEYS.get(name, ()), *options, *others)
    known_keys({key.replace("_", "-"): value for key, value in table.items()}, known, where)
    arguments: list[str] = []
    for key, value in table.items():
        if key.replace("_", "-") not in options:
            continue
        option = options[key.replace("_", "-")]
        if value == []:
            raise InputRefusedError(f"{where}: {key} is [], expected a value; leave the key out for the default")
        if isinstance(value, list) and not option.multiple:
            raise InputRefusedError(f"{where}: {key} is {value!r}, expected one value")
        for one in value if isinstance(value, list) else [value]:
            arguments += _argument(option, one, f"{where}: {key}")
    return arguments


def _options(name: str) -> dict[str, click.Option]:
    """Returns the options of a command that a table may give."""
    from pifa_deploy.cli.main import cli

    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return {
        max(option.opts, key=len).lstrip("-"): option
        for option in command.params
        if isinstance(option, click.Option) and option.name not in (*_OWN_FLAGS, *_OWN_FLAGS_OF.get(name, ()))
    }


def _argument(option: click.Option, value: Any, where: str) -> list[str]:
    flag = max(option.opts, key=len)
    if option.is_flag:
        if not isinstance(value, bool):
            raise InputRefusedError(f"{where} is {value!r}, expected true or false")
        off = [max(option.secondary_opts, key=len)] if option.secondary_opts else []
        return [flag] if value else off
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputRefusedError(f"{where} is {value!r}, expected text or a number")
    try:
        option.type.convert(str(value), option, None)
    except click.UsageError as error:
        raise InputRefusedError(f"{where} is {value!r}: {error.message}") from None
    return [flag, str(value)]


def _listed(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    return [
        {
            "title": one.step.title,
            "output": str(one.step.output),
            "exit_code": one.exit_code,
            "kept": one.kept,
            "result": _result(one),
        }
        for one in outcomes
    ]
