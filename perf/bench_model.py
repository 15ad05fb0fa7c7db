"""Times whole decoders, prefill and decode, dense, 2:4, low-rank and PIFA: bench_model.py --library LIB --out FILE.

All contenders of a shape lie in memory at once, each as two CUDA graphs (2048 tokens, and one token behind them), which
are replayed in turns, in random order. Weights are random and made on the device. Exit codes: 0 our kernels were
measured and nobody was wrong, 1 a wrong result, 3 not decided: no GPU, nothing measured, or our kernels did not run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_linear import captured
from model_decoder import KINDS, Decoder, Shape
from verdict import judge

from pifa_deploy.cuda_kernels import Kernels

LLAMA_7B = Shape(
    name="LLaMA-7B",
    hidden=4096,
    intermediate=11008,
    heads=32,
    kv_heads=32,
    layers=4,
    whole_layers=32,
    head_dim=128,
)
LLAMA_3_8B = Shape(
    name="LLaMA-3-8B",
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    layers=4,
    whole_layers=32,
    head_dim=128,
)
SMOLLM2 = Shape(
    name="SmolLM2-135M",
    hidden=576,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    layers=30,
    whole_layers=30,
    head_dim=64,
)
SHAPES = (LLAMA_7B, SMOLLM2, LLAMA_3_8B)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
STEPS = ("prefill", "decode")
PLAIN = "PIFA, plain operators"
# Both are compared with PLAIN, so they mean nothing without it.
OUR_KERNELS = ("PIFA, our kernels", "PIFA, our kernels, a launch each")


@dataclass(frozen=True, kw_only=True)
class Options:
    device: str
    dtype: torch.dtype
    density: float
    prompt: int
    rounds: int
    kernels: Kernels | None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    decoder: Decoder
    replays: dict[str, Callable[[], None]]
    is_graph: bool
    bytes: int
    peak_bytes: int


def _allocated(device: str) -> tuple[int, int]:
    return (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if device == "cuda" else (0, 0)


def prepare(shape: Shape, kind: str, options: Options) -> Prepared:
    """Makes a decoder, runs both of its steps once and captures them."""
    before, _ = _allocated(options.device)
    decoder = Decoder(shape=shape, length=options.prompt + 1, dtype=options.dtype, device=options.device)
    decoder.fill(kind, density=options.density, kernels=options.kernels)
    held, _ = _allocated(options.device)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    prompt, token = inputs(shape, options)
    steps = {"prefill": lambda: decoder.forward(prompt, 0), "decode": lambda: decoder.forward(token, options.prompt)}
    for step in steps.values():
        if not bool(step().isfinite().all()):
            raise RuntimeError("NaN or Inf in the output")
    _, peak = _allocated(options.device)
    found = {name: captured(step, options.device) for name, step in steps.items()}
    return Prepared(
        decoder=decoder,
        replays={name: replay for name, (replay, _) in found.items()},
        is_graph=all(is_graph for _, is_graph in found.values()),
        bytes=held - before,
        peak_bytes=peak - before,
    )


def inputs(shape: Shape, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns hidden states of a prompt and of the token behind it, the same for every contender."""
    generator = torch.Generator(options.device).manual_seed(1)
    x = torch.randn(options.prompt + 1, shape.hidden, generator=generator, device=options.device).to(options.dtype)
    return x[:-1], x[-1:]


def difference(a: Decoder, b: Decoder, shape: Shape, options: Options) -> float:
    """Returns the larger relative difference of prefill and decode; the decoders have the same weights."""
    prompt, token = inputs(shape, options)
    worst = 0.0
    for x, past in ((prompt, 0), (token, options.prompt)):
        first, second = a.forward(x, past).double(), b.forward(x, past).double()
        worst = max(worst, float((first - second).norm() / first.norm()))
    return worst


def time_once(replay: Callable[[], None], device: str) -> float:
    """Returns milliseconds."""
    if device != "cuda":
        started = time.perf_counter()
        replay()
        return (time.perf_counter() - started) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def measure(shape: Shape, options: Options) -> dict[str, Any]:
    """Returns by contender its figures, or why it did not run."""
    ready: dict[str, Prepared] = {}
    rows: dict[str, Any] = {}
    for kind in KINDS:
        try:
            ready[kind] = prepare(shape, kind, options)
        except Exception as error:
            rows[kind] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    for ours in [kind for kind in OUR_KERNELS if kind in ready and PLAIN in ready]:
        found = difference(ready[PLAIN].decoder, ready[ours].decoder, shape, options)
        if not found <= TOLERANCE[options.dtype]:
            rows[ours] = {"failed": f"wrong result: differs from plain operators by {found:.2e}"}
            del ready[ours]
    times: dict[tuple[str, str], list[float]] = {(kind, step): [] for kind in ready for step in STEPS}
    for turn in range(options.rounds + 2):
        for kind, step in random.sample(list(times), len(times)):
            milliseconds = time_once(ready[kind].replays[step], options.device)
            if turn >= 2:
                times[kind, step].append(milliseconds)
    for kind, prepared in ready.items():
        rows[kind] = figures(shape, prepared, {step: times[kind, step] for step in STEPS}, options)
    for row in rows.values():
        for step in STEPS:
            if "failed" not in row and "failed" not in rows.get("dense", {"failed": ""}):
                row[f"{step}_speed_up"] = rows["dense"][f"{step}_ms"] / row[f"{step}_ms"]
    return rows


def figures(shape: Shape, prepared: Prepared, times: dict[str, list[float]], options: Options) -> dict[str, Any]:
    """Milliseconds of the layers that were measured; tokens/s as if the model had all of its layers and no head."""
    row: dict[str, Any] = {"cuda_graph": prepared.is_graph, "bytes": prepared.bytes, "peak_bytes": prepared.peak_bytes}
    for step, tokens in (("prefill", options.prompt), ("decode", 1)):
        ordered = sorted(times[step])
        median = statistics.median(ordered)
        row[f"{step}_ms"] = median
        row[f"{step}_spread"] = (ordered[len(ordered) * 9 // 10] - ordered[len(ordered) // 10]) / median
        row[f"{step}_tokens_per_s"] = tokens * 1e3 / (median * shape.whole_layers / shape.layers)
    return row


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    heads = [
        "layers of",
        "kind",
        "prefill tok/s",
        "x dense",
        "decode tok/s",
        "x dense",
        "weights + cache MB",
        "peak MB",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, rows in results.items():
        for kind, row in rows.items():
            cells = [name, kind, row.get("failed", "")]
            if "failed" not in row:
                ups = [f"{row[key]:.2f}" if (key := f"{step}_speed_up") in row else "-" for step in STEPS]
                rates = [f"{row[f'{step}_tokens_per_s']:.0f}" for step in STEPS]
                sizes = [f"{row[key] / 1e6:.0f}" for key in ("bytes", "peak_bytes")]
                cells = [name, kind, rates[0], ups[0], rates[1], ups[1], *sizes]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def run(options: Options, *, seconds: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures one shape after the other; none is begun after `seconds`."""
    started = time.monotonic()
    results: dict[str, Any] = {}
    for shape in SHAPES:
        if time.monotonic() - started > seconds:
            break
        results[shape.name] = measure(shape, options)
        save(results)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", type=Path, help="library with the kernels; without it they do not run")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60, help="begin no further shape after this time")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: not decided")
        return 3
    options = Options(
        device="cuda",
        dtype=getattr(torch, arguments.dtype),
        density=arguments.density,
        prompt=arguments.prompt,
        rounds=arguments.rounds,
        kernels=Kernels(arguments.library) if arguments.library else None,
    )
    random.seed(0)

    def save(results: dict[str, Any]) -> None:
        settings = {"gpu": torch.cuda.get_device_name(), "dtype": arguments.dtype, "density": arguments.density}
        new = arguments.out.with_suffix(".new")
        new.write_text(json.dumps({**settings, "prompt": arguments.prompt, "results": results}, indent=1) + "\n")
        os.replace(new, arguments.out)

    with torch.no_grad():
        results = run(options, seconds=arguments.seconds, save=save)
    print("\n".join(table(results)))
    code, why = judge([(name, rows, (PLAIN, *OUR_KERNELS)) for name, rows in results.items()])
    print(why, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
