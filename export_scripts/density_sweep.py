"""Perplexity over density, all methods side by side: a table and a plot.

Compresses a model by every method at every density, evaluates each checkpoint on every text, and writes
sweep.json, sweep.md and sweep.png. What is there already is not made again, so that an interrupted sweep goes on.

    python export_scripts/density_sweep.py MODEL OUT --calibration novels.txt --calibration manual.txt \
        --text novels=held-out.txt --text manual=held-out-manual.txt --text other=of-another-domain.txt
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

from pifa_deploy.calibration import CalibrationOptions
from pifa_deploy.compression import CompressOptions, compress_model
from pifa_deploy.evaluation import EvaluateOptions
from pifa_deploy.evaluation_report import evaluate_all
from pifa_deploy.output_folder import write_json, write_text

LOW_RANK = (("mpifa", "pifa"), ("whitened", "pifa"), ("whitened", "lowrank"), ("svd", "pifa"))
PRUNING = ("magnitude", "wanda", "ria", "sparsegpt")


def variants(densities: tuple[float, ...]) -> list[tuple[str, str, float]]:
    """Returns (method, format, density); the 2:4 methods have one density."""
    low_rank = [(method, kind, density) for method, kind in LOW_RANK for density in densities]
    return [*((method, "2:4", 0.5) for method in PRUNING), *low_rank]


def score(place: Path | str, texts: dict[str, Path], options: EvaluateOptions) -> dict[str, float]:
    """Returns text -> perplexity of one model."""
    report = evaluate_all([str(place)], texts, options)
    return {label: found.perplexity for label, found in report.rows[0].scores.items()}


def make(model: str, out: Path, variant: tuple[str, str, float], *, calibration: dict[str, Any]) -> dict[str, Any]:
    """Returns what one variant's checkpoint is like; the checkpoint stands in `out` afterwards."""
    method, kind, density = variant
    options = CompressOptions(
        method=method,
        density=density,
        format="lowrank" if kind == "lowrank" else "pifa",
        dtype="fp16",
        force=True,
        **calibration,
    )
    summary = compress_model(model, out, options)
    return {"seconds": summary.seconds, "error": summary.error, "density": summary.module_density}


def table(results: list[dict[str, Any]], texts: list[str]) -> str:
    """Returns the results as a Markdown table."""
    lines = ["| method | format | density | " + " | ".join(texts) + " |", "|---" * (3 + len(texts)) + "|"]
    for row in results:
        figures = " | ".join(f"{row['perplexity'][text]:.4g}" for text in texts)
        lines.append(f"| {row['method']} | {row['format']} | {row['asked']} | {figures} |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], texts: list[str], path: Path) -> None:
    """Draws perplexity over density, one panel a text."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(texts), figsize=(4.2 * len(texts), 4.2), squeeze=False)
    curves = [curve for curve in LOW_RANK if curve[0] != "svd"]
    for panel, text in zip(panels[0], texts, strict=True):
        for method, kind in curves:
            rows = [row for row in results if (row["method"], row["format"]) == (method, kind)]
            points = sorted((row["asked"], row["perplexity"][text]) for row in rows)
            panel.plot(*zip(*points, strict=True), marker="o", label=f"{method}, {kind}")
        for marker, method in zip("sv^D", PRUNING, strict=True):
            for row in results:
                if row["method"] == method:
                    panel.plot(0.5, row["perplexity"][text], marker, color="gray", label=f"2:4 {method}")
        dense = next(row["perplexity"][text] for row in results if row["method"] == "dense")
        panel.axhline(dense, color="black", linestyle=":", label="dense")
        panel.set(title=text, xlabel="density", yscale="log")
        panel.invert_xaxis()
        panel.grid(visible=True, which="both", alpha=0.3)
    panels[0][0].set_ylabel("perplexity")
    panels[0][-1].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--calibration", multiple=True, default=("mixture",), show_default=True)
@click.option("--calibration-samples", type=int, default=32, show_default=True)
@click.option("--sequence-length", type=int, default=512, show_default=True)
@click.option("--text", "texts", multiple=True, required=True, help="LABEL=FILE; may be repeated.")
@click.option("--max-windows", type=int, default=10, show_default=True)
@click.option("--density", "densities", type=float, multiple=True, default=(0.9, 0.8, 0.7, 0.6, 0.5), show_default=True)
@click.option("--keep", is_flag=True, help="Keep the checkpoints.")
def sweep(
    model: str,
    out: Path,
    calibration: tuple[str, ...],
    calibration_samples: int,
    sequence_length: int,
    texts: tuple[str, ...],
    max_windows: int,
    densities: tuple[float, ...],
    keep: bool,
) -> None:
    """Compress MODEL by all methods at all densities and write sweep.json, .md and .png into OUT."""
    places = {label: Path(file) for label, _, file in (text.partition("=") for text in texts)}
    scoring = EvaluateOptions(context=512, max_windows=max_windows)
    chosen = {
        "calibration": calibration,
        "windows": CalibrationOptions(samples=calibration_samples, sequence_length=sequence_length),
    }
    path = out / "sweep.json"
    settings = {
        "model": Path(model).name,
        "calibration": [Path(source).name for source in calibration],
        "calibration_samples": calibration_samples,
        "sequence_length": sequence_length,
        "texts": {label: file.name for label, file in places.items()},
        "max_windows": max_windows,
    }
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"settings": settings, "results": []}
    if found["settings"] != settings:
        raise click.UsageError(f"{path} is of {found['settings']}, not {settings}; name another OUT")
    results = found["results"]
    if not results:
        dense = {"method": "dense", "format": "dense", "asked": 1.0, "density": 1.0}
        results.append({**dense, "perplexity": score(model, places, scoring)})
    for variant in variants(densities):
        if any((row["method"], row["format"], row["asked"]) == variant for row in results):
            continue
        folder = out / "-".join(map(str, variant)).replace(":", "")
        about = make(model, folder, variant, calibration=chosen)
        named = dict(zip(("method", "format", "asked"), variant, strict=True))
        results.append({**named, **about, "perplexity": score(folder, places, scoring)})
        click.echo(json.dumps(results[-1]))
        if not keep:
            shutil.rmtree(folder)
        write_json(path, {"schema": 1, "settings": settings, "results": results})
    results.sort(key=lambda row: (-row["asked"], row["format"], row["method"]))
    write_text(out / "sweep.md", table(results, list(places)))
    plot(results, list(places), out / "sweep.png")


if __name__ == "__main__":
    sweep()
