"""What perf/bench_linear.py writes: JSON, a table and plots. Needs no GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PLOTTED_ENTRIES = 6


def write(report: dict[str, Any], out: Path) -> list[str]:
    """Writes bench_linear.json and bench_linear.md, each in one move, and returns the lines of the table."""
    ordered = sorted(report["results"], key=lambda r: (r["name"], r["density"], r["tokens"]))
    lines = _table(ordered, report["ceilings"])
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in report["ceilings"].items())
    lines += ["", f"Measured ceilings: {peaks}. Left out for lack of time: {report['left_out']} of the grid."]
    for name, text in (("bench_linear.json", json.dumps(report, indent=1)), ("bench_linear.md", "\n".join(lines))):
        (out / f"{name}.new").write_text(text + "\n")
        os.replace(out / f"{name}.new", out / name)
    return lines


def _best_of(rows: dict[str, Any], prefix: str) -> dict[str, Any] | None:
    done = [row for name, row in rows.items() if name.startswith(prefix) and "median_us" in row]
    return min(done, key=lambda row: row["median_us"]) if done else None


def _table(results: list[dict[str, Any]], peaks: dict[str, float]) -> list[str]:
    heads = ["layer", "density", "tokens", "dense us", "low-rank x", "2:4 x", "PIFA plain x", "PIFA kernels x"]
    heads += ["% of copy", "% of matmul"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for result in results:
        rows = result["rows"]
        dense = rows.get("dense", {}).get("median_us")
        kernels = min(
            filter(None, (_best_of(rows, "PIFA decode"), _best_of(rows, "PIFA GEMM"))),
            key=lambda row: row["median_us"],
            default=None,
        )
        names = ("low-rank, equal density", "2:4", "PIFA, plain")
        ups = [f"{row['speed_up']:.2f}" if (row := _best_of(rows, name)) and dense else "-" for name in names]
        if kernels and dense:
            share = kernels["gb_per_s"] / peaks["copy_gb_per_s"], kernels["tflop_per_s"] / peaks["matmul_tflop_per_s"]
            ups += [f"{kernels['speed_up']:.2f}", *(f"{value:.0%}" for value in share)]
        else:
            ups += ["-"] * 3
        cells = [result["name"], result["density"], result["tokens"], f"{dense:.1f}" if dense else "-", *ups]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def plot(report: dict[str, Any], path: Path) -> str:
    """Draws speed-up over tokens at the lowest density, and bandwidth over size; says what it did, or why not."""
    try:
        import matplotlib
    except ImportError:
        return "no plots: matplotlib is not installed"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not report["results"]:
        return "no plots: nothing was measured"
    names = list(dict.fromkeys(result["name"] for result in report["results"]))[:PLOTTED_ENTRIES]
    density = min(result["density"] for result in report["results"])
    figure, axes = plt.subplots(2, 4, figsize=(20, 9))
    for axis, name in zip(axes.flat, names, strict=False):
        _speed_ups(axis, name, density, report["results"])
    _bandwidths(axes.flat[-1], report)
    for axis in axes.flat[len(names) : -1]:
        axis.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=6, fontsize=8)
    figure.suptitle(f"{report['environment'].get('gpu', 'CPU')}, {report['environment']['dtype']}, density {density}")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return f"plots: {path.name}"


def _speed_ups(axis: Any, name: str, density: float, results: list[dict[str, Any]]) -> None:
    chosen = sorted((r for r in results if (r["name"], r["density"]) == (name, density)), key=lambda r: r["tokens"])
    # One colour for a contender in all plots, whoever is missing here.
    contenders = dict.fromkeys(each for result in results for each in sorted(result["rows"]))
    for number, contender in enumerate(contenders):
        points = [(r["tokens"], r["rows"].get(contender, {}).get("speed_up")) for r in chosen]
        points = [(tokens, value) for tokens, value in points if value is not None]
        if points:
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                color=f"C{number}",
                ls="-" if number < 10 else "--",
                label=contender,
            )
    axis.axhline(1 / density, color="grey", lw=0.8)
    axis.set(xscale="log", xlabel="tokens", ylabel="speed-up over dense", title=name)


def _bandwidths(axis: Any, report: dict[str, Any]) -> None:
    """Decode of one token: share of the copy bandwidth over the bytes that are read."""
    for kind in ("dense", "PIFA decode"):
        rows = [_best_of(r["rows"], kind) for r in report["results"] if r["tokens"] == 1]
        points = [(row["bytes"] / 1e6, row["gb_per_s"] / report["ceilings"]["copy_gb_per_s"]) for row in rows if row]
        if points:
            axis.plot(*zip(*sorted(points), strict=True), "o", label=kind)
    axis.set(xscale="log", xlabel="MB read, one token", ylabel="share of copy bandwidth", title="decode")
    axis.legend(fontsize=8)
