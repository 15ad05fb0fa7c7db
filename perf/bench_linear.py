"""Times linear layers: dense, low-rank, 2:4 and PIFA: perf/bench_linear.py --library LIB --out DIR.

Every contender is checked first, then all are captured in CUDA graphs and replayed in turns, in random order. Weights
are copied until they are three times the L2, and a graph goes through all copies, so each call finds its weights in
memory and launch gaps count as they do in a decoder. What the figures mean is in perf/README.md. Exit codes: 0 our
kernels were measured and nobody was wrong, 1 a wrong result, 3 not decided: no GPU, nothing measured, or our kernels
did not run.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from linear_contenders import CONTENDERS, Instance, Setting, contenders_for
from linear_report import plot, write
from verdict import judge

from pifa_deploy.cuda_kernels import Kernels

SHAPES = Path(__file__).with_name("shapes.json")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
L2_MULTIPLE = 3
MAX_COPIES = 64
OUR_KERNELS = ("PIFA decode", "PIFA GEMM")  # beginnings of their names
CPU_L2_BYTES = 0  # a run on the CPU shows only that the program works


@dataclass(frozen=True, kw_only=True)
class Options:
    device: str
    dtype: torch.dtype
    rounds: int
    seconds: float
    entries: int
    kernels: Kernels | None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A contender ready to be replayed; `bytes` and `flops` are those of one pass over the entry's layers."""

    replay: Callable[[], None]
    is_graph: bool
    copies: int
    bytes: int
    flops: int


def l2_bytes(device: str) -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size) if device == "cuda" else CPU_L2_BYTES


def check(instance: Instance, x: torch.Tensor) -> None:
    """Raises RuntimeError unless the output is close to float64; at most 64 tokens are looked at."""
    some = x[:: max(1, x.shape[0] // 64)]
    result = instance.call(x)
    y = torch.cat(result, dim=-1) if isinstance(result, list) else result
    found, expected = y[:: max(1, x.shape[0] // 64)].double(), instance.exact(some)
    error = float((found - expected).norm() / expected.norm())
    if not error <= TOLERANCE[x.dtype]:
        raise RuntimeError(f"wrong result: relative error {error:.2e}")


def captured(work: Callable[[], None], device: str) -> tuple[Callable[[], None], bool]:
    """Returns what repeats `work`, and whether that is a graph: not everybody's kernels can be captured."""
    if device != "cuda":
        work()
        return work, False
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
        graph.replay()
    except RuntimeError:
        torch.cuda.synchronize()
        return work, False
    return graph.replay, True


def prepare(name: str, layers: list[list[int]], tokens: int, density: float, options: Options) -> Prepared:
    settings = [
        Setting(
            out_features=m,
            in_features=n,
            density=density,
            dtype=options.dtype,
            device=options.device,
            kernels=options.kernels,
        )
        for m, n in layers
    ]
    xs = [torch.randn(tokens, s.in_features, device=options.device, dtype=options.dtype) for s in settings]
    first = [CONTENDERS[name](s) for s in settings]
    for instance, x in zip(first, xs, strict=True):
        check(instance, x)
    size = sum(instance.weight_bytes for instance in first)
    copies = min(MAX_COPIES, max(2, -(-L2_MULTIPLE * l2_bytes(options.device) // size)))
    instances = [first, *([CONTENDERS[name](s) for s in settings] for _ in range(copies - 1))]
    element = xs[0].element_size()
    # x and y move once; what lies between two products stays in the L2 in the ideal case.
    moved = sum(tokens * (s.in_features + s.out_features) * element for s in settings)

    def work() -> None:
        for copy in instances:
            for instance, x in zip(copy, xs, strict=True):
                instance.call(x)

    flops = sum(2 * tokens * instance.weights for instance in first)
    replay, is_graph = captured(work, options.device)
    return Prepared(replay=replay, is_graph=is_graph, copies=copies, bytes=size + moved, flops=flops)


def time_once(prepared: Prepared, device: str) -> float:
    """Returns microseconds of one pass over the entry's layers."""
    if device != "cuda":
        started = time.perf_counter()
        prepared.replay()
        return (time.perf_counter() - started) * 1e6 / prepared.copies
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    prepared.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / prepared.copies


def measure(layers: list[list[int]], tokens: int, density: float, options: Options) -> dict[str, Any]:
    """Returns the figures of every contender, or why it did not run, by name."""
    ready: dict[str, Prepared] = {}
    rows: dict[str, Any] = {}
    for name in contenders_for(tokens, density, layers):
        try:
            ready[name] = prepare(name, layers, tokens, density, options)
        except Exception as error:
            rows[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(options.rounds + 2):
        for name in random.sample(list(ready), len(ready)):
            microseconds = time_once(ready[name], options.device)
            if turn >= 2:
                times[name].append(microseconds)
    for name, prepared in ready.items():
        median = statistics.median(times[name])
        tenths = statistics.quantiles(times[name], n=10) if len(times[name]) > 1 else [median] * 9
        rows[name] = {
            "median_us": median,
            "p10_us": tenths[0],
            "p90_us": tenths[-1],
            "spread": (tenths[-1] - tenths[0]) / median,
            "gb_per_s": prepared.bytes / median / 1e3,
            "tflop_per_s": prepared.flops / median / 1e6,
            "copies": prepared.copies,
            "cuda_graph": prepared.is_graph,
            "bytes": prepared.bytes,
        }
    for name, row in rows.items():
        if "median_us" in row and "median_us" in rows.get("dense", {}):
            row["speed_up"] = rows["dense"]["median_us"] / rows[name]["median_us"]
    return rows


def median_microseconds(work: Callable[[], object], device: str) -> float:
    def several() -> None:
        for _ in range(5):
            work()

    replay, is_graph = captured(several, device)
    prepared = Prepared(replay=replay, is_graph=is_graph, copies=5, bytes=0, flops=0)
    return statistics.median(time_once(prepared, device) for _ in range(5))


def ceilings(options: Options) -> dict[str, float]:
    """Measures what memory and matrix units give here, on random data."""
    big = options.device == "cuda"
    source = torch.randn((1 << 30) if big else (1 << 16), device=options.device, dtype=options.dtype)
    target = torch.empty_like(source)
    copy = median_microseconds(lambda: target.copy_(source), options.device)
    side = 8192 if big else 128
    a, b = (torch.randn(side, side, device=options.device, dtype=options.dtype) for _ in range(2))
    product = median_microseconds(lambda: a @ b, options.device)
    return {
        "copy_gb_per_s": 2 * source.numel() * source.element_size() / copy / 1e3,
        "matmul_tflop_per_s": 2 * side**3 / product / 1e6,
    }


def environment(options: Options) -> dict[str, Any]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "dtype": str(options.dtype)}
    if options.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["l2_bytes"] = properties.L2_cache_size
        found["cuda"] = torch.version.cuda
    return found


def grid(shapes: dict[str, Any], entries: int) -> list[tuple[dict[str, Any], int, float]]:
    """Returns what to measure, the most telling points of the first entries first."""
    points = [
        (t + 3 * d + (e // 2 if t > 1 or d else 0), e, t, d)
        for e in range(min(entries, len(shapes["entries"])))
        for t in range(len(shapes["tokens"]))
        for d in range(len(shapes["densities"]))
    ]
    return [(shapes["entries"][e], shapes["tokens"][t], shapes["densities"][d]) for _, e, t, d in sorted(points)]


def run(options: Options, shapes: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Returns the report; `save` gets what there is of it after every point, so that a killed run leaves it."""
    started = time.monotonic()
    report = {"environment": environment(options), "ceilings": ceilings(options), "left_out": 0, "results": []}
    for entry, tokens, density in grid(shapes, options.entries):
        if time.monotonic() - started > options.seconds:
            report["left_out"] += 1
            continue
        rows = measure(entry["layers"], tokens, density, options)
        report["results"].append({"name": entry["name"], "tokens": tokens, "density": density, "rows": rows})
        save(report)
    return report


def verdict(report: dict[str, Any]) -> tuple[int, str]:
    """Returns the exit code and why."""
    return judge(
        [
            (
                f"{result['name']} at {result['density']}, {result['tokens']} tokens",
                result["rows"],
                [name for name in result["rows"] if name.startswith(OUR_KERNELS)],
            )
            for result in report["results"]
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", type=Path, help="library with the kernels; without it they do not run")
    parser.add_argument("--out", type=Path, required=True, help="folder for bench_linear.json and .md")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu shows only that the program runs"
    )
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--shapes", type=Path, default=SHAPES)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=240, help="start no further measurement after this time")
    parser.add_argument("--entries", type=int, default=1000, help="only the first entries of the shapes")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: not decided")
        return 3
    options = Options(
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype),
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        entries=arguments.entries,
        kernels=Kernels(arguments.library) if arguments.library else None,
    )
    random.seed(0)
    torch.manual_seed(0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        report = run(options, json.loads(arguments.shapes.read_text()), lambda each: write(each, arguments.out))
    print("\n".join(write(report, arguments.out)))
    print(plot(report, arguments.out / "bench_linear.png"))
    code, why = verdict(report)
    print(why)
    return code


if __name__ == "__main__":
    sys.exit(main())
