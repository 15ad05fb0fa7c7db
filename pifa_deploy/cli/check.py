"""Commands that measure and judge: verify, evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pifa_deploy.cli import console
from pifa_deploy.errors import ExitCode

if TYPE_CHECKING:
    from pifa_deploy.evaluation_report import EvaluateReport
    from pifa_deploy.verification import VerifyOptions
    from pifa_deploy.verification_report import LogitFigures, VerifyReport

_COLUMNS = ("cases", "positions", "max abs", "1 - cosine", "mean KL", "p99.9 KL", "top-1")
_REASONS = 5


@click.command("verify")
@click.argument("onnx", required=False, type=click.Path(path_type=Path))
@click.option("--reference", help="The checkpoint that ONNX was exported from.")
@click.option("--source", help="What that checkpoint was made from, low-rank or dense: compare their weights too.")
@click.option("--engine", type=click.Path(path_type=Path), help="Compare the logits of this engine, built from ONNX.")
@click.option(
    "--plugin", "plugin_library", type=click.Path(path_type=Path), help="Library of the engine's plugin layers."
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Of the fp32 reference's logits, and of ONNX Runtime; an engine runs on its GPU.",
)
@click.option(
    "--level",
    "levels",
    multiple=True,
    type=click.Choice(["weights", "operators", "logits"]),
    help="All; of an engine logits.",
)
@click.option("--bisect", is_flag=True, help="Replay each layer on reference inputs; name the first bad one.")
@click.option(
    "--judge", "saved", type=click.Path(path_type=Path), help="Decide about a saved --json file; run nothing."
)
@click.option("--text", multiple=True, type=click.Path(path_type=Path), help="UTF-8 text; a packaged one if left out.")
@click.option("--positions", type=int, default=8192, show_default=True, help="Least number of compared positions.")
@click.option("--decode-steps", type=int, default=32, show_default=True)
@click.option("--gate-mean-kl", type=float, help="Largest mean KL; by dtype if left out.")
@click.option("--gate-p999-kl", type=float, help="Largest 99.9th percentile of KL; by dtype if left out.")
@click.option("--gate-top1", type=float, help="Smallest top-1 agreement; by dtype if left out.")
@click.option("--gate-delta-nll", type=float, help="Largest |mean NLL difference|; by dtype if left out.")
@click.option(
    "--gate-low-rank-ratio", type=float, help="Largest KL and |NLL difference| over low-rank's; 4 if left out."
)
@click.option("--gate-rho", type=float, help="Largest error of a PIFA layer over its rounding bound; 2 if left out.")
@click.option("--gate-source-ratio", type=float, help="Largest error of a layer against --source over its bound; 2.")
@click.option("--gate-relative-error", type=float, help="Largest median error of layers against a dense --source; 1.")
@console.json_option
def verify_command(onnx: Path | None, saved: Path | None, json_path: Path | None, **options: Any) -> int:
    """Compare the ONNX folder in ONNX Runtime, or its engine, with its fp32 PyTorch checkpoint, on real text.

    Weights bit for bit, each PIFA layer against its rounding bound, then logits: prefills of several lengths, a padded
    batch and steps behind it, teacher-forced decode steps, long sequences through the cache. Exit code 1 when a gate
    fails, 3 when the installed ONNX Runtime cannot run the graph, a saved run did not measure what a gate asks for, or
    no gate applies.
    """
    asked = taken_gates(options)
    if saved is not None:
        return _judge(saved, asked, (onnx, json_path), options)
    if onnx is None or options["reference"] is None:
        raise ValueError("verify needs an ONNX folder and --reference, or --judge and a saved run")
    return _verify(onnx, asked, json_path, options)


def taken_gates(flags: dict[str, Any]) -> dict[str, float]:
    """Takes the limits out of flags; returns those that were given."""
    gates = {name.removeprefix("gate_"): flags.pop(name) for name in list(flags) if name.startswith("gate_")}
    return {name: value for name, value in gates.items() if value is not None}


def verify_options(flags: dict[str, Any], asked: dict[str, float], dtype: str) -> VerifyOptions:
    """Returns the options that the command line asks for; limits that were not given are those of the dtype."""
    from pifa_deploy.parity import gates_for
    from pifa_deploy.verification import VerifyOptions
    from pifa_deploy.verification_report import LEVELS

    usual = LEVELS if flags["engine"] is None else ("logits",)
    others = {name: value for name, value in flags.items() if name not in ("reference", "levels")}
    return VerifyOptions(levels=tuple(flags["levels"]) or usual, gates=replace(gates_for(dtype), **asked), **others)


def _judge(saved: Path, asked: dict[str, float], rest: tuple[Path | None, Path | None], options: dict[str, Any]) -> int:
    from pifa_deploy.saved_verification import judge_saved

    onnx, json_path = rest
    if onnx is not None or options["reference"] is not None or options["bisect"]:
        raise ValueError("--judge decides about a saved run; leave the ONNX folder, --reference and --bisect out")
    report = judge_saved(saved, asked)
    outcome = {True: "passes", False: "does NOT pass", None: "is not decided"}[report.verdict.passed]
    return _shown(report, f"{saved}: {report.dtype} {outcome}", json_path)


def _verify(onnx: Path, asked: dict[str, float], json_path: Path | None, options: dict[str, Any]) -> int:
    from pifa_deploy.onnx_folder import open_folder
    from pifa_deploy.verification import verify_folder

    reference, chosen = options["reference"], verify_options(options, asked, open_folder(onnx).dtype)
    judged = chosen.engine or onnx
    with console.stage(f"verify {judged}"):
        report = verify_folder(onnx, reference, chosen)
    outcome = {True: "equals", False: "does NOT equal", None: "is not decided against"}[report.verdict.passed]
    return _shown(report, f"{judged}: {report.dtype} {outcome} {reference}", json_path)


def _shown(report: VerifyReport, closing: str, json_path: Path | None) -> int:
    if console.result({**report.to_json(), "command": console.command_line()}, json_path):
        for text in _parity_tables(report):
            click.echo(text)
    for gate in report.verdict.gates:
        mark = {True: "passed", False: "FAILED", None: "not decided"}[gate.passed]
        why = f" ({gate.reason})" if gate.reason else ""
        found = f"{console.number(gate.value)}, limit {console.number(gate.limit)}"
        click.echo(f"{mark} {gate.name}: {found}{why}", err=True)
    for reason in _reasons(report):
        click.echo(reason, err=True)
    console.summary(closing, json_path)
    passed = report.verdict.passed
    return ExitCode.NOT_DECIDED if passed is None else ExitCode.PASSED if passed else ExitCode.GATE_FAILED


def _parity_tables(report: VerifyReport) -> Iterator[str]:
    measured = report.measured
    if measured.logits:
        yield _logit_table(measured.logits)
        overall = measured.logits.overall
        yield f"positions 0 to {measured.logits.farthest} of a sequence; of each case: --json"
        if overall.delta_nll is not None and overall.delta_nll_low is not None:
            interval = f"{console.number(overall.delta_nll_low)} to {console.number(overall.delta_nll_high)}"
            yield f"NLL difference a position: {console.number(overall.delta_nll)}, 95 % interval {interval}"
    if measured.weights:
        yield f"weights: {measured.weights.tensors} tensors compared bit for bit"
    if measured.source and measured.source.layers:
        worst = max(measured.source.layers, key=lambda layer: layer.relative_error)
        yield f"source: {measured.source.kind}, largest relative error {worst.relative_error:.3g} in {worst.module}"
    if measured.operators:
        largest = max(measured.operators, key=lambda module: module.rho)
        yield f"operators: {len(measured.operators)} run alone, largest rho {largest.rho:.3g} in {largest.module}"
    if measured.bisection:
        rows = [(part.part, part.ratio, part.worst) for part in measured.bisection.parts]
        yield console.table(("part", "error / rounding noise", "worst output"), rows)
        yield measured.bisection.line()


def _reasons(report: VerifyReport) -> list[str]:
    """Returns what is wrong with weights and files, a few of them; or why nothing was decided."""
    weights, source = report.measured.weights, report.measured.source
    if not report.verdict.gates:
        return ["nothing was decided: no gate is about what these levels found in this model"]
    lines = [*weights.differing, *weights.misplaced, *(weights.changed_files or ())] if weights else []
    lines += list(source.changed) if source else []
    return lines[:_REASONS] + ([f"and {len(lines) - _REASONS} more"] if len(lines) > _REASONS else [])


def _logit_table(logits: LogitFigures) -> str:
    shown = [*logits.kinds, logits.overall]
    if logits.floor:
        shown.append(replace(logits.floor, name="low-rank, same dtype"))
    rows = [
        (case.name, case.positions, case.max_abs, 1 - case.cosine, case.mean_kl, case.p999_kl, case.top1)
        for case in shown
    ]
    return console.table(_COLUMNS, rows)


@click.command("evaluate")
@click.argument("checkpoints", nargs=-1, required=True, metavar="[NAME=]CHECKPOINT...")
@click.option(
    "--text", multiple=True, required=True, metavar="[NAME=]FILE", help="UTF-8 text; each is a column of its own."
)
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
    Runtime. The first one is what the others are held against.
    """
    from pifa_deploy.evaluation import EvaluateOptions
    from pifa_deploy.evaluation_report import evaluate_all

    models = console.named(checkpoints, str, option="CHECKPOINT", form="[NAME=]CHECKPOINT")
    report = evaluate_all(models, labelled_texts(text), EvaluateOptions(**options), stage=console.stage)
    if not console.result({**report.to_json(), "command": console.command_line()}, json_path):
        return
    click.echo(_evaluation_table(report))
    if len(report.rows) > 1:
        click.echo()
        click.echo(_difference_table(report))
    click.echo()
    for line in _evaluation_remarks(report):
        click.echo(line)


def labelled_texts(texts: tuple[str, ...]) -> dict[str, Path]:
    """Returns name -> file of [NAME=]FILE arguments; raises as `console.named`."""
    named = console.named(texts, lambda text: Path(text).stem, option="--text", form="[NAME=]FILE")
    return {name: Path(file) for name, file in named.items()}


def _evaluation_table(report: EvaluateReport) -> str:
    columns = ["checkpoint", "kind", "runtime", "parameters", "weight MB", "tokens/s"]
    for label in report.texts:
        columns += [f"{label} ppl", "s.e. NLL"]
    rows = []
    for row in report.rows:
        entry = row.entry
        megabytes = None if entry.weight_bytes is None else entry.weight_bytes / 1e6
        cells = [row.name, entry.kind, f"{entry.runtime} {entry.dtype}", entry.parameters, megabytes]
        figures = [number for score in row.scores.values() for number in (score.perplexity, score.standard_error)]
        rows.append([*cells, row.tokens_per_second, *figures])
    return console.table(columns, rows)


def _difference_table(report: EvaluateReport) -> str:
    first = report.rows[0]
    rows = []
    for row in report.rows[1:]:
        rows += [(row.name, label, *row.against(first, label).values()) for label in report.texts]
    columns = (f"against {first.name}", "text", "x perplexity", "NLL difference", "s.e.")
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
