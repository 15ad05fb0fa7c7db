"""Stage results as the commands write them, with made-up figures: for the report's code, never for its readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"dense": "dense", "sparse": "2:4", "lowrank": "lowrank", "pifa": "pifa"}
SPEED = {"dense": 1.0, "sparse": 1.3, "lowrank": 1.5, "pifa": 1.45}
PERPLEXITY = {"dense": 12.0, "sparse": 21.0, "lowrank": 40.0, "pifa": 18.0}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
MODULES = [f"model.layers.{layer}.{name}" for layer in range(4) for name in LINEARS]


def statistics(samples: np.ndarray) -> dict[str, float]:
    quantiles = {f"p{q}": float(np.quantile(samples, q / 100)) for q in (90, 95, 99)}
    return {
        "min": float(samples.min()),
        "max": float(samples.max()),
        "mean": float(samples.mean()),
        "median": float(np.median(samples)),
        **quantiles,
        "cv": float(samples.std() / samples.mean()),
    }


def bench(*, runtime: str = "tensorrt", names: dict[str, str] | None = None, **fields: Any) -> dict[str, Any]:
    """A bench of four contenders; `names` renames some of them, `fields` replace top-level fields."""
    names = {name: (names or {}).get(name, name) for name in KINDS}
    random = np.random.default_rng(3)
    cases = []
    for phase, tokens, past, base in (("prefill", 128, 0, 20.0), ("prefill", 512, 0, 70.0), ("decode", 1, 128, 9.0)):
        rows = []
        for name, speed in SPEED.items():
            samples = base / speed * random.normal(1, 0.01, 20)
            gain = {"median": speed, "low": speed * 0.99, "high": speed * 1.01, "confidence": 0.95}
            row = {
                "name": names[name],
                "latency_ms": statistics(samples),
                "gpu_compute_ms": statistics(samples * 0.9),
                "enqueue_ms": None,
                "joules_per_token": None,
                "tokens_per_s": tokens / float(np.median(samples)) * 1000,
                "speed_up": gain,
                "bound_ms": base / speed * 0.6,
                "bound_fraction": 0.6,
                "samples_ms": samples.tolist(),
                "round_ms": samples.tolist(),
            }
            rows.append(row)
        cases.append({"phase": phase, "batch": 1, "tokens": tokens, "past": past, "rows": rows, "warnings": []})
    contenders = [
        {
            "name": names[name],
            "path": f"engines/{names[name]}",
            "kind": kind,
            "runtime": runtime,
            "device": "gpu",
            "dtype": "fp16",
            "weight_bytes": int(1e8 / SPEED[name]),
            "parameters": int(5e7 / SPEED[name]),
            "density": None if kind == "dense" else 0.5,
            "memory": {"weights_bytes": 1, "activations_bytes": None, "peak_bytes": 3_000_000},
            "proof": None,
        }
        for name, kind in KINDS.items()
    ]
    return {
        "artefact": "bench",
        "schema": 1,
        "environment": {"cpu": "a CPU", "cores": 2, "gpus": [], "packages": {"torch": "2.13.0"}},
        "options": {},
        "command": "pifa-deploy bench dense pifa",
        "contenders": contenders,
        "baseline": names["dense"],
        "fixed": "density",
        "cases": cases,
        "layers": [profile(case, names) for case in ("prefill 128", "prefill 512", "decode at 128")],
        "decisions": [{"name": "speed_up pifa", "value": 1.45, "limit": 1.2, "passed": True}],
        "passed": True,
        **fields,
    }


def profile(case: str, names: dict[str, str]) -> dict[str, Any]:
    """A case of a bench, profiled: dense and 2:4 take 5 us in every linear, the others less, and PIFA more in some."""
    modules = [
        {
            "name": name,
            "times_us": {
                names["dense"]: 5.0,
                names["sparse"]: 5.0,
                names["lowrank"]: 3.0 + i / 20,
                names["pifa"]: 3.0 + i / 4,
            },
        }
        for i, name in enumerate(MODULES)
    ]
    return {"case": case, "rest_us": dict.fromkeys(names.values(), 20.0), "modules": modules, "warnings": []}


def evaluation(texts: tuple[str, ...] = ("novel", "manual"), **places: str) -> dict[str, Any]:
    """An evaluation of the same four models; `places` gives other paths."""
    rows = []
    for name, kind in KINDS.items():
        scores = {}
        for i, text in enumerate(texts):
            nll, base = (float(np.log(PERPLEXITY[each] * (1 + i))) for each in (name, "dense"))
            scores[text] = {
                "perplexity": float(np.exp(nll)),
                "mean_nll": nll,
                "standard_error": 0.05,
                "windows": 8,
                "scored_tokens": 4088,
                "ratio": float(np.exp(nll - base)),
                "nll_difference": nll - base,
                "nll_difference_standard_error": 0.0 if name == "dense" else 0.01,
            }
        place = places.get(name, f"checkpoints/{name}")
        known = {"runtime": "torch", "device": "cpu", "dtype": "fp32", "parameters": 1, "weight_bytes": None}
        row = {"name": place, "checkpoint": place, "kind": kind, **known, "tokens_per_second": 9.0, "texts": scores}
        rows.append(row)
    return {"artefact": "evaluation", "schema": 1, "texts": dict.fromkeys(texts, "x.txt"), "options": {}, "rows": rows}


def verification(*, passed: bool | None = True, **fields: Any) -> dict[str, Any]:
    """A verification of fp16 whose mean KL gate is decided as asked for."""
    figures: dict[str, Any] = {
        "positions": 17,
        "finite": True,
        "max_abs": 0.02,
        "cosine": 0.9999,
        "mean_kl": 6e-6,
        "p999_kl": 1e-5,
    }
    figures |= dict.fromkeys(("delta_nll", "delta_nll_low", "delta_nll_high"))
    cases = [{"name": name, **figures, "top1": 1.0, "decided": 17} for name in ("prefill 17", "decode at 64")]
    limit = 2e-4 if passed else 1e-6
    decisions = [
        {"name": "finite", "value": 1.0, "limit": 1.0, "passed": True},
        {"name": "mean_kl", "value": None if passed is None else 6e-6, "limit": limit, "passed": passed},
    ]
    modules = [{"module": name, "rho": 0.1 * (i + 1)} for i, name in enumerate(MODULES)]
    return {
        "artefact": "verify",
        "schema": 2,
        "passed": passed,
        "dtype": "fp16",
        "cases": cases,
        "kinds": [{**cases[0], "name": "prefill"}, {**cases[1], "name": "decode"}],
        "overall": {**cases[0], "name": "overall", "delta_nll": 1e-4, "delta_nll_low": -5e-5, "delta_nll_high": 2e-4},
        "low_rank": {**cases[0], "name": "overall", "mean_kl": 2e-5},
        "gates": {"mean_kl": limit},
        "decisions": decisions,
        "levels": {"weights": None, "operators": {"modules": modules}, "logits": {}},
        "bisection": None,
        **fields,
    }


def tasks(*, passed: bool | None = True, **fields: Any) -> dict[str, Any]:
    """A comparison on two tasks, the second of which is decided as asked for."""
    one = {"metric": "acc", "examples": 1000, "reference": 0.8, "candidate": 0.798, "lost": 5, "won": 3}
    one |= {"difference": -0.002, "low": -0.008, "high": 0.004, "p_value": 0.73}
    other = {**one, "metric": "acc_norm"}
    if passed is None:
        other |= {"low": -0.02}
    elif not passed:
        other |= {"candidate": 0.7, "difference": -0.1, "low": -0.12, "high": -0.08}
    found = [{"task": "arc_easy", **one}, {"task": "piqa", **other}]
    names = [f"{each['task']}.{each['metric']}" for each in found]
    why = "too few examples" if passed is None else None
    decisions = [
        {"name": names[0], "value": -0.008, "limit": -0.01, "passed": True, "reason": None},
        {"name": names[1], "value": other["low"], "limit": -0.01, "passed": passed, "reason": why},
    ]
    return {
        "artefact": "compare-tasks",
        "schema": 1,
        "passed": passed,
        "options": {"tasks": [], "metric": None, "margin": 0.01, "confidence": 0.95, "pooled": False},
        "tasks": found,
        "overall": {**one, "task": "all tasks", "metric": "acc/acc_norm", "examples": 2000},
        "decisions": decisions,
        **fields,
    }


def write(folder: Path, **results: dict[str, Any]) -> dict[str, Path]:
    """Writes each result as a file; returns name -> file."""
    files = {name: folder / f"{name}.json" for name in results}
    for name, file in files.items():
        file.write_text(json.dumps(results[name]))
    return files
