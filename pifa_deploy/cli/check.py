"""Commands that measure and judge: verify, evaluate, generate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pifa_deploy.cli import console
from pifa_deploy.errors import ExitCode

if TYPE_CHECKING:
    from pifa_deploy.evaluation_report import EvaluateReport
    from pifa_deploy.verification import VerifyReport

_COLUMNS = ("case", "positions", "max abs", "1 - cosine", "mean KL", "p99.9 KL", "top-1")


@click.command("verify")
@click.argument("onnx", type=click.Path(path_type=Path))
@click.option("--reference", required=True, help="The checkpoint that ONNX was exported from.")
@click.option("--text", multiple=True, type=click.Path(path_type=Path), help="UTF-8 text; a packaged one if left out.")
@click.option("--decode-steps", type=int, default=32, show_default=True)
@click.option("--gate-mean-kl", type=float, help="Largest mean KL; by dtype if left out.")
@click.option("--gate-top1", type=float, help="Smallest top-1 agreement; by dtype if left out.")
@click.option("--gate-low-rank-ratio", type=float, help="Largest mean KL relative to low-rank; 4 if left out.")
@console.json_option
def verify_command(
    onnx: Path,
    reference: str,
    text: tuple[Path, ...],
    decode_steps: int,
    gate_mean_kl: float | None,
    gate_top1: float | None,
    gate_low_rank_ratio: float | None,
    json_path: Path | None,
) -> int:
    """Compare the ONNX folder in ONNX Runtime with its fp32 PyTorch checkpoint, on real text.

    Prefills of several lengths, a padded batch, then teacher-forced decode steps through the cache.
    Exit code 1 when a gate fails, 3 when the installed ONNX Runtime cannot run the graph.
    """
    from pifa_deploy.onnx_folder import open_folder
    from pifa_deploy.parity import gates_for
    from pifa_deploy.verification import VerifyOptions, verify_folder

    asked = {"mean_kl": gate_mean_kl, "top1": gate_top1, "low_rank_ratio": gate_low_rank_ratio}
    given = {name: value for name, value in asked.items() if value is not None}
    gates = replace(gates_for(open_folder(onnx).dtype), **given)
    with console.stage(f"verify {onnx}"):
        report = verify_folder(onnx, reference, VerifyOptions(text=text, decode_steps=decode_steps, gates=gates))
    if console.result(report.to_json(), json_path):
        click.echo(_parity_table(report))
    for gate in report.verdict.gates:
        mark = "passed" if gate.passed else "FAILED"
        click.echo(f"{mark} {gate.name}: {console.number(gate.value)}, limit {console.number(gate.limit)}", err=True)
    console.summary(f"{onnx}: {report.dtype} {'equals' if report else 'does NOT equal'} {reference}", json_path)
    return ExitCode.PASSED if report else ExitCode.GATE_FAILED


def _parity_table(report: VerifyReport) -> str:
    shown = [*report.cases, report.overall]
    if report.low_rank:
        shown.append(replace(report.low_rank, name="low-rank, same dtype"))
    rows = [
        (case.name, case.positions, case.max_abs, 1 - case.cosine, case.mean_kl, case.p999_kl, case.top1)
        for case in shown
    ]
    return console.table(_COLUMNS, rows)


@click.command("evaluate")
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--text", multiple=True, required=True, help="UTF-8 text, or LABEL=FILE; each is a column of its own.")
@click.option("--context", type=int, default=512, show_default=True, help="Tokens a window.")
@click.option("--stride", type=int, help="Below the context: overlapping windows that score their last N tokens.")
@click.option(
    "--max-windows", type=int, help="20 spread evenly if left out; with a smaller stride the first N, or all."
)
@click.option("--batch-size", type=int, default=4, show_default=True, help="Windows a forward pass.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@console.json_option
def evaluate_command(
    checkpoints: tuple[str, ...], text: tuple[str, ...], json_path: Path | None, **options: Any
) -> None:
    """Perplexity and speed of CHECKPOINTS on texts, side by side.

    Takes dense, PIFA, low-rank and 2:4 checkpoints, which run in fp32 PyTorch, and ONNX folders, which run in ONNX
    Runtime on the CPU. The first one is what the others are held against.
    """
    from pifa_deploy.evaluation import EvaluateOptions
    from pifa_deploy.evaluation_report import evaluate_all

    report = evaluate_all(checkpoints, _labelled(text), EvaluateOptions(**options), stage=console.stage)
    if not console.result(report.to_json(), json_path):
        return
    click.echo(_evaluation_table(report))
    if len(report.rows) > 1:
        click.echo()
        click.echo(_difference_table(report))
    click.echo()
    for line in _evaluation_remarks(report):
        click.echo(line)


def _labelled(texts: tuple[str, ...]) -> dict[str, Path]:
    """Returns label -> file of FILE and LABEL=FILE arguments; raises ValueError for a label that is empty or twice."""
    found: dict[str, Path] = {}
    for text in texts:
        label, equals, file = text.partition("=")
        path = Path(file if equals else text)
        label = label if equals else path.stem
        if not label or not path.name:
            raise ValueError(f"--text is {text!r}, expected FILE or LABEL=FILE")
        if label in found:
            raise ValueError(f"{found[label]} and {path} are both labelled {label!r}; name one as --text LABEL=FILE")
        found[label] = path
    return found


def _evaluation_table(report: EvaluateReport) -> str:
    columns = ["checkpoint", "kind", "runtime", "parameters", "weight MB", "tokens/s"]
    for label in report.texts:
        columns += [f"{label} ppl", "s.e. NLL"]
    rows = []
    for row in report.rows:
        entry = row.entry
        megabytes = None if entry.weight_bytes is None else entry.weight_bytes / 1e6
        cells = [entry.checkpoint, entry.kind, f"{entry.runtime} {entry.dtype}", entry.parameters, megabytes]
        figures = [number for score in row.scores.values() for number in (score.perplexity, score.standard_error)]
        rows.append([*cells, row.tokens_per_second, *figures])
    return console.table(columns, rows)


def _difference_table(report: EvaluateReport) -> str:
    first = report.rows[0]
    rows = []
    for row in report.rows[1:]:
        rows += [(row.entry.checkpoint, label, *row.against(first, label).values()) for label in report.texts]
    columns = (f"against {first.entry.checkpoint}", "text", "x perplexity", "NLL difference", "s.e.")
    return console.table(columns, rows)


def _evaluation_remarks(report: EvaluateReport) -> list[str]:
    options, first = report.options, report.rows[0]
    stride = options.stride or options.context
    windows = [
        f"{label}: {len(score.tokens)} windows of {options.context} tokens, stride {stride}, "
        f"{sum(score.tokens):,} scored tokens"
        for label, score in first.scores.items()
    ]
    speed = f"batches of {options.batch_size}, device {options.device}, CPU threads: {first.entry.threads}"
    return [*windows, f"tokens/s: forward passes only, {speed}"]


@click.command("generate")
@click.argument("onnx", type=click.Path(path_type=Path))
@click.option("--prompt", required=True)
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--chat/--no-chat", default=True, show_default=True, help="Use the chat template, where there is one.")
@console.json_option
def generate_command(onnx: Path, prompt: str, max_new_tokens: int, chat: bool, json_path: Path | None) -> None:
    """Answer or continue a prompt greedily with an ONNX folder in ONNX Runtime."""
    from pifa_deploy.generation import generate
    from pifa_deploy.model_folder import load_tokenizer
    from pifa_deploy.onnx_folder import open_folder
    from pifa_deploy.runners import OnnxRuntimeRunner

    folder = open_folder(onnx)
    with console.stage(f"generate with {onnx}"):
        text = generate(
            OnnxRuntimeRunner(folder), load_tokenizer(folder.path), prompt, max_new_tokens=max_new_tokens, chat=chat
        )
    if console.result({"prompt": prompt, "text": text}, json_path):
        click.echo(text)
