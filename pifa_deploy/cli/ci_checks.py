"""What of a pipeline is refused before its first step: options that no run takes, and files that are not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pifa_deploy.cli import console
from pifa_deploy.cli.bench import bench_options
from pifa_deploy.cli.check import labelled_texts, taken_gates, verify_options
from pifa_deploy.cli.make import build_options, compress_options
from pifa_deploy.cli.report import report_options
from pifa_deploy.errors import InputMissingError, InputRefusedError, MisfitError
from pifa_deploy.pipeline_file import PipelineFile
from pifa_deploy.pipeline_step import Step, within

# Parameters of commands that name files or folders to read, and values of theirs that name none.
_READ = {
    "compress": ("calibration",),
    "export": ("plan",),
    "verify": ("text", "source", "plugin_library"),
    "build": ("plugin",),
    "evaluate": ("text",),
    "tasks": ("include_path",),
}
_NO_FILES = ("mixture", "auto")


def check_options(file: PipelineFile, steps: Sequence[Step]) -> None:
    """Raises InputRefusedError for options that a step's command would refuse whatever the model."""
    for step in steps:
        try:
            _check(step.arguments[0], _given(step))
        except (ValueError, click.UsageError, MisfitError) as error:
            raise InputRefusedError(f"{file.path}: {step.title}: {error}") from None


def check_files(file: PipelineFile, steps: Sequence[Step]) -> None:
    """Raises InputMissingError for a file that an option names, that is not there and that no step before makes.

    InputRefusedError for an earlier report that is there and cannot be read.
    """
    root = file.path.resolve().parent
    made: set[Path] = set()
    for step in steps:
        given = _given(step)
        for parameter in _READ.get(step.arguments[0], ()):
            for text in _texts(step, given[parameter]):
                known = text in _NO_FILES or ":" in text or within(Path(text), made)
                if not known and not (root / text).exists():
                    raise InputMissingError(f"{text}: is not there, {step.title} reads it; make it or correct it")
        for option, _, place in step.reads_too:
            if option == "--baseline-report" and (root / place).exists():
                from pifa_deploy.report import read_report

                read_report(root / place)
        made.add(step.output)


def _given(step: Step) -> dict[str, Any]:
    """Returns the parameters of a step's command as that would get them; files that it would write are not tried."""
    from pifa_deploy.cli.main import cli

    name, *arguments = step.command(lambda place: True)
    # With the group's settings: a command keeps the names of its help option from its first context.
    group = click.Context(cli, **cli.context_settings)
    command = cli.get_command(group, name)
    assert command is not None
    given = command.make_context(name, arguments, group, resilient_parsing=True).params
    lacking = [parameter.name for parameter in command.params if parameter.required and not given[str(parameter.name)]]
    if lacking:
        raise ValueError(f"{lacking[0]} is missing, {name} needs it")
    return given


def _texts(step: Step, value: Any) -> list[str]:
    if step.arguments[0] == "evaluate":
        return [str(place) for place in labelled_texts(value).values()]
    several = value if isinstance(value, tuple) else () if value is None else (value,)
    return [str(one) for one in several]


def _check(command: str, given: dict[str, Any]) -> None:
    """Makes a command's options as that would."""
    if command == "compress":
        compress_options(given)
    elif command == "export":
        from pifa_deploy.onnx_export import ExportOptions

        ExportOptions(**_but(given, "checkpoint", "out"))
    elif command == "build":
        build_options({**_but(given, "onnx", "out", "plugin"), "plugin_library": None})
    elif command == "verify":
        asked = taken_gates(given)
        # What the limits of a dtype are does not count: they are those that were not given.
        verify_options(_but(given, "onnx", "saved"), asked, "fp32")
    elif command == "evaluate":
        from pifa_deploy.evaluation import EvaluateOptions

        labelled_texts(given["text"])
        EvaluateOptions(**_but(given, "checkpoints", "text"))
    elif command == "tasks":
        from pifa_deploy.task_run import TaskRunOptions

        TaskRunOptions(**_but(given, "model", "out", "force"))
    elif command == "compare-tasks":
        from pifa_deploy.task_comparison import TaskOptions

        TaskOptions(**_but(given, "reference", "candidate"))
    elif command == "bench":
        _check_bench(given)
    elif command == "report":
        report_options(given)


def _check_bench(given: dict[str, Any]) -> None:
    options = bench_options(given)
    from pifa_deploy.bench import baseline_of

    baseline_of(tuple(console.named(given["places"], str)), options)


def _but(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in (*names, "json_path")}
