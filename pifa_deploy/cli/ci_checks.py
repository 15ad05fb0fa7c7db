"""What of a pipeline is refused before its first step: options that no run takes, and files that are not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pifa_deploy.cli import console
from pifa_deploy.cli.bench import bench_options
from pifa_deploy.cli.check import labelled_texts
from pifa_deploy.cli.make import compress_options
from pifa_deploy.errors import InputMissingError, InputRefusedError
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
_NO_OPTIONS = ("places", "checkpoints", "text", "json_path", "plan", "generated")


def check_options(file: PipelineFile, steps: Sequence[Step]) -> None:
    """Raises InputRefusedError for options that compress, evaluate or bench would refuse whatever the model."""
    for step in steps:
        given = _given(step)
        try:
            if step.arguments[0] == "compress":
                compress_options(given)
            elif step.arguments[0] == "evaluate":
                _check_evaluation(given)
            elif step.arguments[0] == "bench":
                _check_bench(given)
        except (ValueError, click.UsageError) as error:
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

    name, *arguments = step.arguments
    # With the group's settings: a command keeps the names of its help option from its first context.
    group = click.Context(cli, **cli.context_settings)
    command = cli.get_command(group, name)
    return {} if command is None else command.make_context(name, arguments, group, resilient_parsing=True).params


def _texts(step: Step, value: Any) -> list[str]:
    if step.arguments[0] == "evaluate":
        return [str(place) for place in labelled_texts(value).values()]
    several = value if isinstance(value, tuple) else () if value is None else (value,)
    return [str(one) for one in several]


def _check_bench(given: dict[str, Any]) -> None:
    options = bench_options(_options(given))
    names = console.named(given["places"], str)
    for name in (options.baseline, *options.gates.speed_up):
        if name is not None and name not in names:
            raise ValueError(f"{name!r} is no contender, expected one of {', '.join(names)}")


def _check_evaluation(given: dict[str, Any]) -> None:
    from pifa_deploy.evaluation import EvaluateOptions

    labelled_texts(given["text"])
    EvaluateOptions(**_options(given))


def _options(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in _NO_OPTIONS}
