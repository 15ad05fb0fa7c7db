"""Whether engines build and run here, are right, and how long they take.

`check_engine.py MODELS --library LIB --out FILE`: MODELS is what perf/bundle_models.py wrote. For each TensorRT that is
installed, an engine is built for this GPU from the dense, the 2:4 and the factorised model, the latter with plain
operators and with the plugin, and runs a prompt and one token behind it. What does not work is kept with its exact
words. Exit codes: 0 all ran and were right, 1 a wrong result, 3 not decided: no GPU, no TensorRT, or some did not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pifa_deploy.decoder_step import Step

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


def measure(models: Path, library: Path | None, opener: Opener) -> dict[str, dict[str, Any]]:
    """Returns by contender its errors and milliseconds, or the words with which it did not run."""
    truth = np.load(models / LOGITS)
    ids = truth["input_ids"]
    rows: dict[str, dict[str, Any]] = {}
    for name, folder, with_plugin in CONTENDERS:
        try:
            runner = opener(models / folder, library if with_plugin else None)
            prompt, token = relative_errors(runner, ids, truth[folder])
            prefill, decode = Step.after(0, ids[:PROMPT]), Step.after(PROMPT, ids[PROMPT:])
            rows[name] = {
                "prefill_error": prompt,
                "decode_error": token,
                "prefill_ms": latency_ms(runner, prefill),
                "decode_ms": latency_ms(runner, decode),
            }
        except Exception as error:  # whatever a builder or runtime throws is the answer that is asked for
            rows[name] = {"failed": f"{type(error).__name__}: {error}"}
    return rows


def judge(rows: dict[str, dict[str, Any]]) -> int:
    """Returns 1 for a wrong result, else 3 where something did not run, else 0."""
    ran = [row for row in rows.values() if "failed" not in row]
    # Compared one by one: NaN is not at most anything.
    right = all(row[step] <= TOLERANCE for row in ran for step in ("prefill_error", "decode_error"))
    return 1 if not right else 0 if len(ran) == len(rows) else 3


def table(backend: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, row in rows.items():
        cells = [row["failed"].splitlines()[0][:160].replace("|", "/")] if "failed" in row else []
        if not cells:
            cells = [f"{row[key]:.1e}" for key in ("prefill_error", "decode_error")]
            cells += [f"{row[key]:.3f}" for key in ("prefill_ms", "decode_ms")]
        lines.append("| " + " | ".join([backend, name, *cells]) + " |")
    return lines


def engine_opener(backend: str, scratch: Path) -> Opener:
    """Returns what builds an engine for this GPU and loads it."""
    capability = "{}.{}".format(*torch.cuda.get_device_capability())

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
    report: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "backends": {}}
    print("| backend | model | prefill error | decode error | prefill ms | decode ms |\n|---|---|---|---|---|---|")
    for backend in backends:
        with tempfile.TemporaryDirectory() as scratch:
            rows = measure(arguments.models, arguments.library, engine_opener(backend, Path(scratch)))
        report["backends"][backend] = rows
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print("\n".join(table(backend, rows)), flush=True)
    verdicts = [judge(rows) for rows in report["backends"].values()]
    print(f"{', '.join(backends)}: {sum(map(len, report['backends'].values()))} engines")
    return 1 if 1 in verdicts else max(verdicts)


if __name__ == "__main__":
    sys.exit(main())
