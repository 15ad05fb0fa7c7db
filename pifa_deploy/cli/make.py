"""Commands that make an artefact: compress, import, export, build."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from pifa_deploy.cli import console
from pifa_deploy.errors import OutputError

if TYPE_CHECKING:
    from pifa_deploy.compression import CompressOptions, LayerReport
    from pifa_deploy.engine import BuildOptions
    from pifa_deploy.layouts import LayoutSummary

# As in pifa_deploy.compression, which a `--help` must not wait for; a test compares the two.
_METHODS = ["mpifa", "whitened", "svd", "magnitude", "wanda", "ria", "sparsegpt"]
_LAYOUTS = ["auto", "pivoted", "shared-mlp"]
_DTYPES = click.Choice(["fp32", "fp16", "bf16"])


@click.command("compress")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--density", type=float, help="Size of the factorised linears relative to dense, 0..1; 2:4 is 0.5.")
@click.option("--method", type=click.Choice(_METHODS), default="mpifa", show_default=True)
@click.option("--format", type=click.Choice(["pifa", "lowrank"]), default="pifa", show_default=True)
@click.option(
    "--layout", type=click.Choice(_LAYOUTS), default="auto", show_default=True, help="Where the pivots lie (pifa)."
)
@click.option("--calibration", multiple=True, help="Text file, folder, datasets:NAME or mixture; may be repeated.")
@click.option("--calibration-samples", "samples", type=int, default=128, show_default=True, help="Windows of text.")
@click.option("--sequence-length", type=int, default=2048, show_default=True, help="Tokens a window.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the places of the windows.")
@click.option("--include", multiple=True, help="Pattern of linears to compress; all in the decoder layers if left out.")
@click.option("--exclude", multiple=True, help="Pattern of linears to leave dense.")
@click.option("--attention-density", type=float, help="Density of attention; the MLP has what the budget leaves.")
@click.option(
    "--layer-density",
    type=click.Choice(["uniform", "owl", "effective-rank"]),
    default="uniform",
    show_default=True,
    help="What decides how dense each layer is.",
)
@click.option("--rank-multiple", type=int, default=1, show_default=True, help="Round ranks down to a multiple.")
@click.option("--dense-share", type=float, help="mpifa: lambda, share of dense inputs in the targets; 0.25.")
@click.option("--ridge", type=float, help="mpifa: alpha, pull towards dense weights relative to input energy; 0.1.")
@click.option(
    "--ridge-shape", type=click.Choice(["diagonal", "identity"]), help="mpifa: energy of each input, or mean."
)
@click.option("--solver", type=click.Choice(["closed", "alternating"]), help="mpifa: best in one step, or the paper's.")
@click.option("--steps", type=int, help="mpifa: rounds of the alternating solver; 1.")
@click.option("--dtype", type=_DTYPES, default="fp32", show_default=True, help="Dtype of the stored weights.")
@click.option("--activation-dtype", type=_DTYPES, default="fp32", show_default=True, help="16 bits halve the memory.")
@click.option("--activation-folder", type=click.Path(path_type=Path), help="Keep activations in files here.")
@click.option("--batch-tokens", type=int, default=4096, show_default=True, help="Tokens computed at once.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="The GPU when there is one if left out.")
@click.option("--restart", is_flag=True, help="Forget what an interrupted run has done.")
@console.force_option
@console.json_option
def compress_command(model: str, out: Path, json_path: Path | None, **flags: Any) -> None:
    """Compress MODEL (a folder, a .gguf file or hf:ORG/NAME) into the checkpoint OUT, without training.

    Methods mpifa, whitened and svd factorise; magnitude, wanda, ria and sparsegpt prune 2:4. All but svd and
    magnitude need --calibration text. Interrupted, the same command goes on where it was. Under torchrun all
    processes share the work.
    """
    from pifa_deploy.compression import compress_model

    chosen = compress_options(flags)
    main = os.environ.get("RANK", "0") == "0"
    with _resumable(out), console.stage(f"compress {model}") if main else contextlib.nullcontext():
        summary = compress_model(model, out, chosen, report=_show_layer)
    if not main:
        return
    console.result(asdict(summary), json_path)
    for name, reason in summary.dense.items():
        console.summary(f"note: {name} stays dense: {reason}", json_path)
    shares = ", ".join(f"{step} {share:.0%}" for step, share in summary.shares.items())
    console.summary(f"time: {shares}", json_path)
    console.summary(
        f"{out}: {summary.modules} linears at density {summary.module_density:.4f}, "
        f"{summary.dense_parameters:,} -> {summary.parameters:,} parameters, mean output error {summary.error:.4f}"
        + ("" if summary.layout is None else f"; {_pivots(summary.layout)}"),
        json_path,
    )


def _pivots(layout: LayoutSummary) -> str:
    """Returns in one phrase where the pivots lie."""
    places = ", ".join(f"{number} {kind}" for kind, number in layout.modules.items())
    return f"{places}, max |C| {layout.max_coefficient:.3g}"


def compress_options(flags: dict[str, Any]) -> CompressOptions:
    """Returns the options that the command line asks for; what was not given keeps its default."""
    from pifa_deploy.calibration import CalibrationOptions
    from pifa_deploy.compression import ActivationOptions, CompressOptions, ReconstructionOptions

    def given(kind: type[Any], renamed: Mapping[str, str] = MappingProxyType({})) -> Any:
        names = {field.name: renamed.get(field.name, field.name) for field in fields(kind)}
        return kind(**{name: flags[flag] for name, flag in names.items() if flags.get(flag) is not None})

    windows = given(CalibrationOptions)
    activations = given(
        ActivationOptions, {"dtype": "activation_dtype", "folder": "activation_folder", "batch_tokens": "batch_tokens"}
    )
    chosen: CompressOptions = replace(
        given(CompressOptions), windows=windows, activations=activations, reconstruction=given(ReconstructionOptions)
    )
    if flags["density"] is None and not chosen.is_pruning:
        raise click.UsageError(f"method {chosen.method} needs --density")
    return chosen


@contextlib.contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Says after an interruption what need not be done again; processes that the first one speaks for say nothing."""
    from pifa_deploy.compression.distributed import PeerError
    from pifa_deploy.compression.resume import finished_layers

    try:
        yield
    except PeerError as error:
        raise click.exceptions.Exit(error.exit_code) from error
    except (KeyboardInterrupt, OutputError):
        if done := finished_layers(out):
            click.echo(f"note: the same command, without --restart, goes on after layer {done}", err=True)
        raise


def _show_layer(report: LayerReport) -> None:
    drift = "" if report.drift is None else f", drift {report.drift:.4f}"
    # The running clock of a terminal is written over.
    start = "\r" if sys.stderr.isatty() else ""
    click.echo(
        f"{start}layer {report.layer + 1}/{report.layers}: error {report.error:.4f}{drift}, {report.seconds:.1f} s, "
        f"{report.seconds_left:.0f} s left",
        err=True,
    )


@click.command("import")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=_DTYPES, help="Dtype of the stored weights; as found when left out.")
@console.force_option
@console.json_option
def import_command(checkpoint: Path, out: Path, dtype: str | None, force: bool, json_path: Path | None) -> None:
    """Turn CHECKPOINT, a research pickle or a folder with low-rank pairs, into the PIFA checkpoint OUT.

    A pickle is read without importing or running anything from it.
    """
    from pifa_deploy.importers import ImportOptions, import_checkpoint

    with console.stage(f"import {checkpoint}"):
        summary = import_checkpoint(checkpoint, out, options=ImportOptions(dtype=dtype, force=force))
    console.result(summary.to_json(), json_path)
    for note in summary.notes:
        console.summary(f"note: {note}", json_path)
    console.summary(
        f"{out}: {summary.kind}, {summary.modules} factorised and {summary.dense_linears} dense linears, "
        f"{summary.biases_added} biases added, {summary.dtype}, max |C| {summary.max_coefficient:.3g}",
        json_path,
    )


@click.command("relayout")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--layout",
    type=click.Choice([*_LAYOUTS, "low-rank"]),
    default="auto",
    show_default=True,
    help="Where the pivots go; low-rank: no pivots, U and V of the same ranks.",
)
@console.force_option
@console.json_option
def relayout_command(checkpoint: Path, out: Path, json_path: Path | None, **options: Any) -> None:
    """Write the PIFA checkpoint CHECKPOINT as OUT, the same model with its pivots elsewhere or as a low-rank pair."""
    from pifa_deploy.relayout import RelayoutOptions, relayout_checkpoint

    with console.stage(f"relayout {checkpoint}"):
        summary = relayout_checkpoint(checkpoint, out, RelayoutOptions(**options))
    console.result(asdict(summary), json_path)
    for name, reason in summary.kept.items():
        console.summary(f"note: {name} stays pivoted: {reason}", json_path)
    console.summary(f"{out}: {_pivots(summary)}", json_path)


@click.command("export")
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=_DTYPES, default="fp16", show_default=True)
@click.option(
    "--format",
    type=click.Choice(["pifa", "auto"]),
    default="pifa",
    show_default=True,
    help="auto: dense where factors take no fewer multiplications.",
)
@click.option("--plain-ops", is_flag=True, help="Expand PIFA nodes into MatMul, Concat and the like.")
@click.option("--plan", type=click.Path(path_type=Path), help="Forms of the layers, a file of bench --choose.")
@console.force_option
@console.json_option
def export_command(checkpoint: str, out: Path, json_path: Path | None, **options: Any) -> None:
    """Write CHECKPOINT (PIFA or dense) as the ONNX folder OUT: one graph for prefill and decode."""
    from pifa_deploy.onnx_export import ExportOptions, export_checkpoint

    with console.stage(f"export {checkpoint}"):
        summary = export_checkpoint(checkpoint, out, ExportOptions(**options))
    console.result(asdict(summary), json_path)
    console.summary(
        f"{out}: {summary.dtype}, {summary.nodes} nodes, {summary.pifa_nodes} of them PIFA, "
        f"{f'{len(summary.left_dense)} layers left dense, ' if summary.left_dense else ''}"
        f"{summary.bytes / 1e6:.1f} MB{'' if summary.tokenizer else ', no tokenizer found'}",
        json_path,
    )


@click.command("build")
@click.argument("onnx", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--backend", type=click.Choice(["tensorrt-rtx", "tensorrt"]), default="tensorrt-rtx", show_default=True)
@click.option("--target", "targets", multiple=True, help="GPU by name (rtx4090, orin-agx, ...); may be repeated.")
@click.option("--compute-capabilities", default="", help="Comma-separated, e.g. 8.6,8.9,12.0.")
@click.option("--max-batch-size", type=int, default=1, show_default=True)
@click.option("--max-input-len", type=int, default=512, show_default=True, help="Most tokens in one call.")
@click.option("--max-cache-len", type=int, default=512, show_default=True, help="Most tokens in the cache.")
@click.option(
    "--sparsity",
    type=click.Choice(["auto", "enable", "disable"]),
    default="auto",
    show_default=True,
    help="2:4 sparse kernels; auto: where ONNX records 2:4-pruned weights.",
)
@click.option("--plugin", type=click.Path(path_type=Path), help="Plugin library that computes the PIFA nodes, or auto.")
@console.force_option
@console.json_option
def build_command(
    onnx: Path, out: Path, compute_capabilities: str, plugin: Path | None, json_path: Path | None, **options: Any
) -> None:
    """Build the engine folder OUT from the ONNX folder ONNX, in a child process.

    Without --plugin the nodes become plain operations; with it the engine needs that library wherever it runs. auto is
    the library of PIFA_PLUGIN_LIBRARY or of this checkout.
    """
    from pifa_deploy.engine import build_engines
    from pifa_deploy.plugin_library import find_library

    library = find_library(None if str(plugin) == "auto" else plugin) if plugin else None
    chosen = build_options({**options, "compute_capabilities": compute_capabilities, "plugin_library": library})
    with console.stage(f"build {onnx}"):
        record = build_engines(onnx, out, chosen)
    console.result(record.to_json(), json_path)
    size = sum(engine.bytes for engine in record.engines)
    console.summary(
        f"{out}: {record.backend} {record.version} for {', '.join(record.compute_capabilities)}, {size / 1e6:.1f} MB, "
        f"{len(record.layers)} layers, {record.seconds:.1f} s, peak {record.peak_rss_bytes / 1e6:.0f} MB",
        json_path,
    )


def build_options(flags: dict[str, Any]) -> BuildOptions:
    """Returns the options that the command line asks for."""
    from pifa_deploy.engine import BuildOptions

    explicit = tuple(part.strip() for part in flags["compute_capabilities"].split(",") if part.strip())
    return BuildOptions(**{**flags, "compute_capabilities": explicit})
