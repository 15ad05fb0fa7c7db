"""Commands that only look: inspect, doctor."""

from __future__ import annotations

from pathlib import Path

import click

from pifa_deploy.cli import console


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@console.json_option
def inspect_command(path: Path, json_path: Path | None) -> None:
    """Show what PATH holds: a checkpoint, dense model, ONNX folder or engine folder, told by its content."""
    from pifa_deploy.inspection import inspect_path

    found = inspect_path(path)
    if not console.result(found.to_json(), json_path):
        return
    click.echo(f"{path}: {found.kind}")
    click.echo(console.facts(found.facts))
    if found.rows:
        click.echo()
        click.echo(console.table(found.columns, found.rows))


@click.command("doctor")
@console.json_option
def doctor_command(json_path: Path | None) -> None:
    """Say what is installed, what this machine can build and run, and what to install for the rest."""
    from pifa_deploy.doctor import diagnose, rows

    diagnosis = diagnose()
    if not console.result(diagnosis.to_json(), json_path):
        return
    found, able = rows(diagnosis)
    click.echo(console.table(("what", "found"), found))
    click.echo()
    click.echo(console.table(("can", "here", "because", "to do"), able))
