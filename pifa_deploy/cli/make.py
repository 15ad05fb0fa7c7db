"""Commands that make an artefact: compress, import, export, build."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pifa_deploy.cli import console

_DTYPES = click.Choice(["fp32", "fp16", "bf16"])


@click.command("compress")
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--density", type=float, required=True, help="Size of each factorised linear relative to dense, 0..1.")
@click.option("--method", type=click.Choice(["svd", "whitened"]), default="whitened", show_default=True)
@click.option("--format", "format_", type=click.Choice(["pifa", "lowrank"]), default="pifa", show_default=True)
@click.option("--calibration", multiple=True, type=click.Path(path_type=Path), help="UTF-8 text; may be repeated.")
@click.option("--calibration-samples", type=int, default=64, show_default=True)
@click.option("--sequence-length", type=int, default=512, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--rank-multiple", type=int, default=1, show_default=True, help="Round ranks down to a multiple.")
@click.option("--dtype", type=_DTYPES, default="fp32", show_default=True, help="Dtype of the stored weights.")
@console.force_option
@console.json_option
def compress_command(
    model: str,
    out: Path,
    format_: str,
    calibration: tuple[Path, ...],
    calibration_samples: int,
    sequence_length: int,
    seed: int,
    json_path: Path | None,
    **options: Any,
) -> None:
    """Factorise MODEL (a folder, a .gguf file or hf:ORG/NAME) into the PIFA checkpoint OUT.

    Method whitened needs --calibration text; svd needs none and loses far more.
    """
    from pifa_deploy.calibration import CalibrationOptions
    from pifa_deploy.compression import CompressOptions, compress_model

    windows = CalibrationOptions(samples=calibration_samples, sequence_length=sequence_length, seed=seed)
    chosen = CompressOptions(format=format_, calibration=calibration, windows=windows, **options)
    with console.stage(f"compress {model}"):
        summary = compress_model(model, out, chosen)
    console.result(asdict(summary), json_path)
    console.summary(
        f"{out}: {summary.modules} linears at density {summary.module_density:.4f}, "
        f"{summary.dense_parameters:,} -> {summary.parameters:,} parameters, max |C| {summary.max_coefficient:.3g}",
        json_path,
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


@click.command("export")
@click.argument("checkpoint")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=_DTYPES, default="fp16", show_default=True)
@click.option("--plain-ops", is_flag=True, help="Expand PifaLinear into MatMul, Concat and Gather.")
@console.force_option
@console.json_option
def export_command(checkpoint: str, out: Path, json_path: Path | None, **options: Any) -> None:
    """Write CHECKPOINT (PIFA or dense) as the ONNX folder OUT: one graph for prefill and decode."""
    from pifa_deploy.onnx_export import ExportOptions, export_checkpoint

    with console.stage(f"export {checkpoint}"):
        summary = export_checkpoint(checkpoint, out, ExportOptions(**options))
    console.result(asdict(summary), json_path)
    console.summary(
        f"{out}: {summary.dtype}, {summary.nodes} nodes, {summary.pifa_nodes} of them PifaLinear, "
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
@console.force_option
@console.json_option
def build_command(onnx: Path, out: Path, compute_capabilities: str, json_path: Path | None, **options: Any) -> None:
    """Build the engine folder OUT from the ONNX folder ONNX, in a child process."""
    from pifa_deploy.engine import BuildOptions, build_engines

    explicit = tuple(part.strip() for part in compute_capabilities.split(",") if part.strip())
    chosen = BuildOptions(compute_capabilities=explicit, **options)
    with console.stage(f"build {onnx}"):
        record = build_engines(onnx, out, chosen)
    console.result(record.to_json(), json_path)
    size = sum(engine.bytes for engine in record.engines)
    console.summary(
        f"{out}: {record.backend} {record.version} for {', '.join(record.compute_capabilities)}, {size / 1e6:.1f} MB, "
        f"{len(record.layers)} layers, {record.seconds:.1f} s, peak {record.peak_rss_bytes / 1e6:.0f} MB",
        json_path,
    )
