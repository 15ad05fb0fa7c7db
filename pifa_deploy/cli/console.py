"""What a command shows: stages with a running clock, tables, and its result as JSON."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

# How a gate ended; and the keys of proof.PRECISIONS, which --help need not import.
MARKS = {True: "passed", False: "FAILED", None: "not decided"}
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8")
_FRAMES = "|/-\\"


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Shows that something is under way: a running clock on a terminal, a line with the seconds at the end."""
    started = time.monotonic()
    stop = threading.Event()
    live = sys.stderr.isatty()

    def spin() -> None:
        frame = 0
        # The first two seconds stay still, so that tqdm bars of a stage are not overwritten at once.
        while not stop.wait(0.5 if frame else 2.0):
            frame += 1
            elapsed = time.monotonic() - started
            click.echo(f"\r{_FRAMES[frame % 4]} {title} {elapsed:.0f} s ", err=True, nl=False)

    thread = threading.Thread(target=spin, daemon=True)
    if live:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if live:
            thread.join()
            click.echo("\r\033[K", err=True, nl=False)
    click.echo(f"{title}: {time.monotonic() - started:.1f} s", err=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a plain table; columns whose values are all numbers are aligned to the right."""
    cells = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    right = [bool(rows) and all(not isinstance(row[i], str) for row in rows) for i in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def number(value: Any) -> str:
    """Returns a short text for a value in a table."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"


def facts(values: Mapping[str, Any]) -> str:
    """Returns `name  value` lines; values that are objects become compact JSON."""
    width = max(map(len, values), default=0)
    limit = max(shutil.get_terminal_size((120, 24)).columns - width - 2, 40)
    lines = []
    for name, value in values.items():
        text = json.dumps(value) if isinstance(value, (dict, list, tuple)) else number(value)
        lines.append(f"{name.ljust(width)}  {text if len(text) <= limit else text[: limit - 1] + '…'}")
    return "\n".join(lines)


def result(value: Mapping[str, Any], json_path: Path | None) -> bool:
    """Writes a command's result as JSON where that was asked for; "-" is standard output.

    Returns:
        Whether standard output is still free for people to read.
    """
    if str(json_path) == "-":
        click.echo(json.dumps(value, indent=2, sort_keys=True))
        return False
    if json_path is not None:
        from pifa_deploy.output_folder import write_json

        write_json(json_path, value)
    return True


def command_line() -> str:
    """Returns the command that is running as it was given, without --json."""
    context = click.get_current_context()
    words = context.command_path.split()
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if not given or name == "json_path":
            continue
        value = context.params[name]
        if isinstance(parameter, click.Option) and parameter.is_flag:
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
            continue
        several = parameter.multiple if isinstance(parameter, click.Option) else parameter.nargs == -1
        for one in value if several else (value,):
            words += [*([parameter.opts[0]] if isinstance(parameter, click.Option) else []), str(one)]
    return shlex.join(words)


def split_named(given: str, option: str, form: str) -> tuple[str, str]:
    """Returns name and value of a NAME=VALUE argument; the first "=" ends the name.

    Args:
        given: the argument.
        option: what it was given to, for the error.
        form: what is expected there. With "[NAME=]" in front the value is a path whose name may be left out: the
            name is "" then, and a path that exists is taken whole, "=" and all.

    Raises:
        ValueError: an empty name or value.
    """
    name, equals, value = given.partition("=")
    if form.startswith("[") and given and (not equals or Path(given).exists()):
        return "", given
    if not name or not value:
        raise ValueError(f"{option} is {given!r}, expected {form}")
    return name, value


def named(
    places: Sequence[str], default: Callable[[str], str], *, option: str = "PLACE", form: str = "[NAME=]PLACE"
) -> dict[str, str]:
    """Returns name -> place of arguments as `split_named` takes them.

    Args:
        places: the arguments.
        default: place -> its name where none is given.
        option: see `split_named`.
        form: see `split_named`.

    Raises:
        ValueError: an empty name or place, or two of one name.
    """
    found: dict[str, str] = {}
    for given in places:
        name, place = split_named(given, option, form)
        name = name or default(place)
        if not name:
            raise ValueError(f"{option} is {given!r}, which gives no name; name it as NAME={given}")
        if name in found:
            raise ValueError(f"{found[name]} and {place} are both named {name!r}; name one as NAME={place}")
        found[name] = place
    return found


def summary(text: str, json_path: Path | None) -> None:
    """Shows a closing line; on standard error where standard output carries the JSON."""
    click.echo(text, err=str(json_path) == "-")


Handler = Callable[..., Any]


def json_option(command: Handler) -> Handler:
    """Adds `--json PATH` to a command."""
    option = click.option(
        "--json",
        "json_path",
        type=click.Path(path_type=Path),
        callback=writable,
        help="Write the result as JSON (- for stdout).",
    )
    return option(command)


def writable(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Refuses, as an option's callback, a file that could not be written once the work is done."""
    if path is None or str(path) == "-" or context.resilient_parsing:
        return path
    from pifa_deploy.errors import OutputError
    from pifa_deploy.output_folder import check_file

    try:
        check_file(path)
    except OutputError as error:
        raise click.BadParameter(str(error), context, parameter) from error
    return path


def force_option(command: Handler) -> Handler:
    """Adds `--force` to a command."""
    option = click.option("--force", is_flag=True, help="Replace OUT; it stays whole until the new one is.")
    return option(command)
