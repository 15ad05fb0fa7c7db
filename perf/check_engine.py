"""Whether engines build and run here, are right, and how long they take.

`check_engine.py MODELS --library LIB --out FILE`: MODELS is what perf/bundle_models.py wrote. For each TensorRT that is
installed, an engine is built for this GPU from the dense, the 2:4 and the factorised model, the latter with plain
operators and with the plugin, and runs a prompt and one token behind it. What does not work is kept with its exact
words; results are written after every engine. A TensorRT that does not serve this GPU is named and left out. Exit
codes: 0 all ran and were right, 1 a wrong result, 3 not decided: no GPU, no TensorRT for it, or some did not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pifa_deploy.decoder_step import Step
from pifa_deploy.targets import backends_for

LOGITS = "logits.npz"
PROMPT = 48
BACKENDS = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
# What is run: name, folder, whether with the plugin.
CONTENDERS = (
    ("dense", "dense", False),
    ("2:4", "2-4", False),
    ("PIFA, plain", "pifa", False),
    ("PIFA, plugin", "pifa", True),
)
ERRORS = ("prefill_error", "decode_error")
TOLERANCE = 3e-2  # relative, of fp16 logits
CALLS = 50
Opener = Callable[[Path, Path | None], Any]  # ONNX folder and plugin library to a runner


def relative_errors(runner: Any, ids: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Returns the relative errors of the logits of the prompt and of the token behind it."""
    logits, cache = runner.step(Step.after(0, ids[:PROMPT]), None)
    after, _ = runner.step(Step.after(PROMPT, ids[PROMPT:]), cache)
    pairs = ((logits[0, -1], exact[PROMPT - 1]), (after[0, -1], exact[PROMPT]))
    prompt, token = (float(np.linalg.norm(found - truth) / np.linalg.norm(truth)) for found, truth in pairs)
    return prompt, token


def latency_ms(runner: Any, step: Step) -> float:
    """Returns the median milliseconds of a step, host work included."""
    call = runner.timed(step)
    try:
        times = []
        for turn in range(CALLS + 5):
            began = time.perf_counter()
            call.launch()
            call.wait()
            if turn >= 5:
                times.append((time.perf_counter() - began) * 1e3)
    finally:
        call.close()
    return statistics.median(times)


def measure(models: Path, library: Path | None, opener: Opener) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each contender with its errors and milliseconds, or what there is of them and why it went no further."""
    truth = np.load(models / LOGITS)
    ids = truth["input_ids"]
    for name, folder, with_plugin in CONTENDERS:
        row: dict[str, Any] = {}
        try:
            runner = opener(models / folder, library if with_plugin else None)
            row["prefill_error"], row["decode_error"] = relative_errors(runner, ids, truth[folder])
            row["prefill_ms"] = latency_ms(runner, Step.after(0, ids[:PROMPT]))
            row["decode_ms"] = latency_ms(runner, Step.after(PROMPT, ids[PROMPT:]))
        except Exception as error:  # whatever a builder or runtime throws is the answer that is asked for
            row["failed"] = f"{type(error).__name__}: {error}"
        yield name, row


def judge(rows: dict[str, dict[str, Any]]) -> int:
    """Returns 1 for a wrong result, else 3 where something did not run, else 0."""
    # Those of a row whose timing failed count too. Compared one by one: NaN is not at most anything.
    errors = [row[key] for row in rows.values() for key in ERRORS if key in row]
    if not all(error <= TOLERANCE for error in errors):
        return 1
    return 3 if any("failed" in row for row in rows.values()) else 0


def table(backend: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, row in rows.items():
        cells = [f"{row[key]:.1e}" for key in ERRORS if key in row]
        cells += [f"{row[key]:.3f}" for key in ("prefill_ms", "decode_ms") if key in row]
        cells += [row["failed"].splitlines()[0][:160].replace("|", "/")] if "failed" in row else []
        lines.append("| " + " | ".join([backend, name, *cells]) + " |")
    return lines


def engine_opener(backend: str, capability: str, scratch: Path) -> Opener:
    """Returns what builds an engine for this GPU and loads it."""

    def opened(folder: Path, library: Path | None) -> Any:
        # Here, so that a package which is missing is an answer too.
        from pifa_deploy.engine import BuildOptions, build_engines
        from pifa_deploy.tensorrt_runner import TensorRTRunner

        out = scratch / f"{backend}-{folder.name}-{'plugin' if library else 'plain'}"
        sizes = {"max_input_len": 64, "max_cache_len": 64}
        options = BuildOptions(backend=backend, compute_capabilities=(capability,), plugin_library=library, **sizes)
        build_engines(folder, out, options)
        return TensorRTRunner(out, plugin_library=library)

    return opened


def save(report: dict[str, Any], out: Path) -> None:
    new = out.with_suffix(".new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(new, out)


def run(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Fills in the rows of the report's backends; JSON and table are written after each contender."""
    for backend, rows in report["backends"].items():
        with tempfile.TemporaryDirectory() as scratch:
            opener = engine_opener(backend, report["compute_capability"], Path(scratch))
            for name, row in measure(arguments.models, arguments.library, opener):
                rows[name] = row
                save(report, arguments.out)
                print("\n".join(table(backend, {name: row})), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--library", type=Path, required=True, help="the plugin library")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: not decided")
        return 3
    backends = [name for name, module in BACKENDS.items() if importlib.util.find_spec(module) is not None]
    if not backends or not (arguments.models / LOGITS).is_file():
        print(f"not decided: {f'no {arguments.models / LOGITS}' if backends else 'neither TensorRT nor TensorRT-RTX'}")
        return 3
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    serving = backends_for(capability)
    not_served = [backend for backend in backends if backend not in serving]
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "compute_capability": capability}
    report |= {"not_served": not_served, "backends": {backend: {} for backend in backends if backend in serving}}
    save(report, arguments.out)
    print("| backend | model | prefill error | decode error | prefill ms | decode ms |\n|---|---|---|---|---|---|")
    for backend in not_served:
        print(f"| {backend} | not served: compute capability {capability} |", flush=True)
    run(report, arguments)
    verdicts = [judge(rows) for rows in report["backends"].values()]
    left_out = "".join(f"; {backend} does not serve {capability}" for backend in not_served)
    names = ", ".join(report["backends"]) or "not decided"
    print(f"{names}: {sum(map(len, report['backends'].values()))} engines{left_out}")
    return 1 if 1 in verdicts else max(verdicts, default=3)


if __name__ == "__main__":
    sys.exit(main())
