"""Commands that measure and judge: verify, evaluate, generate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pifa_deploy.cli import console
from pifa_deploy.errors import ExitCode

if TYPE_CHECKING:
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
@click.option("--text", multiple=True, required=True, type=click.Path(path_type=Path), help="UTF-8 text.")
@click.option("--context", type=int, default=512, show_default=True, help="Tokens a window.")
@click.option("--max-windows", type=int, default=20, show_default=True, help="Windows, spread evenly over the text.")
@console.json_option
def evaluate_command(
    checkpoints: tuple[str, ...], text: tuple[Path, ...], context: int, max_windows: int, json_path: Path | None
) -> None:
    """Perplexity of CHECKPOINTS (dense or PIFA) on a text, side by side."""
    import torch

    from pifa_deploy.calibration import even_windows, read_texts, token_ids
    from pifa_deploy.evaluation import perplexity
    from pifa_deploy.model_folder import load_model, load_tokenizer

    content = read_texts(text)
    rows = []
    for checkpoint in checkpoints:
        with console.stage(f"evaluate {checkpoint}"):
            windows = even_windows(token_ids(content, load_tokenizer(checkpoint)), context, max_windows)
            model = load_model(checkpoint, dtype=torch.float32)
            rows.append((checkpoint, model.num_parameters(), len(windows), perplexity(model, windows)))
    columns = ("checkpoint", "parameters", "windows", "perplexity")
    if console.result({"rows": [dict(zip(columns, row, strict=True)) for row in rows]}, json_path):
        click.echo(console.table(columns, rows))


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
