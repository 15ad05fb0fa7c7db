"""Is an ONNX folder, or its engine, the model it came from? Weights, operators and logits against fp32 PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from pifa_deploy.bisection import BISECTION_TOKENS, bisect
from pifa_deploy.decoder_step import IntArray, Runner
from pifa_deploy.digest import model_sha256
from pifa_deploy.engine_fit import step_limits
from pifa_deploy.engine_record import EngineRecord, check_origin, read_engine_json
from pifa_deploy.errors import InputRefusedError, MissingCapabilityError, PifaDeployError, first_line
from pifa_deploy.graph_cut import CutGraph
from pifa_deploy.logit_cases import Case, CaseOptions, cases, text_tokens
from pifa_deploy.logit_difference import Comparison
from pifa_deploy.low_rank_twin import build_twin_engine, low_rank_twin
from pifa_deploy.model_folder import load_model
from pifa_deploy.onnx_folder import OnnxFolder, open_folder
from pifa_deploy.onnx_runner import DEVICES, OnnxRuntimeRunner
from pifa_deploy.operator_parity import measure_operators
from pifa_deploy.parity import RHO_LIMIT, Gates, gates_for
from pifa_deploy.source_parity import SourceWeights, measure_source
from pifa_deploy.tensorrt_runner import TensorRTRunner
from pifa_deploy.torch_runner import TorchRunner
from pifa_deploy.verification_report import LEVELS, LogitFigures, Measured, VerifyReport, judge_levels
from pifa_deploy.weight_parity import measure_weights

# What makes a twin impossible, and nothing else: a full disk, no memory, a builder or runtime that fails.
_TWIN_ERRORS = (PifaDeployError, OSError, torch.cuda.OutOfMemoryError)


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(CaseOptions):
    """What to compare and how strictly; see CaseOptions for the positions.

    Attributes:
        levels: some of LEVELS.
        source: the checkpoint that the reference was made from, for the weights; not looked at when None.
        bisect: replay each part of the graph on the reference's inputs, and name the first bad one.
        operator_positions: tokens that each PIFA layer is run on.
        engine: engine folder built from the ONNX folder, whose logits are then compared in place of ONNX Runtime's;
            lengths that it was not built for are left out or cut.
        plugin_library: for an engine with plugin layers, see `engine_fit.check_fit`.
        device: "cpu" or "cuda": where the fp32 reference runs for the logits, and ONNX Runtime. On the CPU machines
            with and without a GPU measure against the same reference; a GPU adds up in an order of its own.
        gates: limits; those of the ONNX folder's dtype when None.
    """

    levels: tuple[str, ...] = LEVELS
    source: Path | str | None = None
    bisect: bool = False
    operator_positions: int = 128
    engine: Path | None = None
    plugin_library: Path | None = None
    device: str = "cpu"
    gates: Gates | None = None

    def tokens_needed(self) -> int:
        """Returns how long the text must be."""
        return max(super().tokens_needed(), BISECTION_TOKENS if self.bisect else 0)

    def __post_init__(self) -> None:
        """Raises ValueError for lengths below 1 and unknown levels."""
        super().__post_init__()
        if not self.levels or set(self.levels) - set(LEVELS):
            raise ValueError(f"levels are {self.levels}, expected some of {', '.join(LEVELS)}")
        if self.operator_positions < 1:
            raise ValueError(f"operator_positions is {self.operator_positions}, expected at least 1")
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}, expected one of {', '.join(DEVICES)}")
        if self.engine is not None and "logits" not in self.levels:
            raise ValueError(
                f"levels are {', '.join(self.levels)} of an engine, which answers with logits; add that level"
            )
        if self.plugin_library is not None and self.engine is None:
            raise ValueError(f"plugin_library is {self.plugin_library} without an engine, which is what it is for")
        if self.source is not None and "weights" not in self.levels:
            raise ValueError("a source was given without the level weights, which is what it is for; add the level")


def verify_folder(onnx: Path | str, reference: Path | str, options: VerifyOptions) -> VerifyReport:
    """Compares an ONNX folder in ONNX Runtime, or its engine, with the fp32 PyTorch model of a checkpoint.

    Args:
        onnx: the ONNX folder.
        reference: the checkpoint it was exported from.
        options: see VerifyOptions.

    Raises:
        InputRefusedError: a malformed input, a text that is too short, or a checkpoint that is not the
            ONNX folder's source.
        MissingCapabilityError: the installed ONNX Runtime cannot run the graph, this machine the engine, or there is no
            such device or not enough of its memory: nothing was decided.
        MisfitError: the engine was built for another machine, see `engine_fit.check_fit`.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise MissingCapabilityError(f"torch {torch.__version__} finds no CUDA device; use --device cpu")
    folder = open_folder(onnx)
    _check_source(folder, Path(reference))
    gates = options.gates or gates_for(folder.dtype)
    if options.engine is not None:
        record = read_engine_json(options.engine)
        check_origin(record, options.engine, folder)
        options = replace(options, **options.within(**_limits(record)))
    candidate = _candidate(folder, options) if "logits" in options.levels else None
    model = load_model(reference, dtype=torch.float32)
    options = _within_reach(options, model)
    graph = CutGraph(folder)
    runs = options.bisect or {"operators", "logits"} & set(options.levels)
    ids = text_tokens(reference, options) if runs else None
    weights = measure_weights(model, graph, reference=reference) if "weights" in options.levels else None
    source = _measure_source(reference, options.source) if options.source is not None else None
    operators = None
    if ids is not None and "operators" in options.levels:
        operators = tuple(measure_operators(model, graph, ids[: options.operator_positions]))
    logits = (
        _measure_logits(model, candidate, ids, settings=(folder, gates, options))
        if candidate and ids is not None
        else None
    )
    rho_limit = RHO_LIMIT if gates.rho is None else gates.rho
    measured = Measured(
        dtype=folder.dtype,
        weights=weights,
        source=source,
        operators=operators,
        logits=logits,
        bisection=bisect(model, graph, ids, rho_limit=rho_limit) if options.bisect and ids is not None else None,
        device=options.device,
    )
    return VerifyReport(measured=measured, gates=gates, verdict=judge_levels(measured, gates))


def _within_reach(options: VerifyOptions, model: PreTrainedModel) -> VerifyOptions:
    """Returns the options with no sequence longer than the positions that the model has."""
    reach = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if reach is None:
        return options
    lengths = options.within(batch=len(options.padded_lengths), tokens=reach, past=reach - 1)
    return replace(options, **{**lengths, "context": min(options.context, reach)})


def _limits(record: EngineRecord) -> dict[str, int]:
    limits = step_limits(record)
    batch = record.profiles[0]["input_ids"]["max"][0]
    return {"batch": batch, "tokens": limits.tokens or 1, "past": limits.past or 0}


def _candidate(folder: OnnxFolder, options: VerifyOptions) -> Runner:
    if options.engine is None:
        return OnnxRuntimeRunner(folder, device=options.device)
    return TensorRTRunner(options.engine, plugin_library=options.plugin_library)


def _measure_source(reference: Path | str, source: Path | str) -> SourceWeights:
    return measure_source(load_model(reference, dtype=None), load_model(source, dtype=None))


def _measure_logits(
    model: PreTrainedModel,
    candidate: Runner,
    ids: IntArray,
    *,
    settings: tuple[OnnxFolder, Gates, VerifyOptions],
) -> LogitFigures:
    folder, gates, options = settings
    steps = list(cases(ids, options))
    with ExitStack() as during:
        twin = open_twin(during, model, folder, options=options) if gates.low_rank_ratio is not None else None
        reference = during.enter_context(_on_device(model, options.device))
        found, floor = measure(reference, candidate, twin, steps)
    return LogitFigures(
        cases=tuple(found.cases),
        kinds=found.by_kind(),
        overall=found.overall(),
        farthest=max(int(case.step.position_ids.max()) for case in steps),
        low_rank=floor.overall() if isinstance(floor, Comparison) else floor,
    )


def open_twin(
    during: ExitStack, model: PreTrainedModel, folder: OnnxFolder, *, options: VerifyOptions
) -> Runner | str | None:
    """Returns the low-rank twin in the runtime of what is verified, for an engine as an engine of its own.

    Args:
        during: how long the twin is kept.
        model: the fp32 reference, on the CPU.
        folder: what is verified, or what its engine was built from.
        options: which engine, which device.

    Returns:
        None for a model without PIFA layers; why there is no twin where one could not be made or loaded: what is
        verified is measured all the same.
    """
    try:
        twin = during.enter_context(low_rank_twin(model, folder))
        if twin is None:
            return None
        if options.engine is None:
            return OnnxRuntimeRunner(twin, device=options.device)
        return TensorRTRunner(build_twin_engine(twin, read_engine_json(options.engine)))
    except OSError as error:
        return f"the low-rank twin could not be written ({first_line(error)}); free some space in TMPDIR"
    except _TWIN_ERRORS as error:
        # The build log goes with the temporary folder.
        return f"there is no low-rank twin: {first_line(error).partition('; the whole log is')[0]}"


@contextmanager
def _on_device(model: PreTrainedModel, device: str) -> Iterator[TorchRunner]:
    """Yields the reference on a device, in full float32; afterwards it is on the CPU, where its parts are looked at."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # else a GPU may round inputs to TF32
    try:
        yield TorchRunner(model.to(device))
    except torch.cuda.OutOfMemoryError as error:
        if device == "cpu":
            raise
        raise MissingCapabilityError(
            f"the GPU's memory does not hold the fp32 reference ({model.get_memory_footprint() / 1e9:.1f} GB of "
            "weights) beside what it is compared with; use --device cpu"
        ) from error
    finally:
        model.to("cpu")
        torch.set_float32_matmul_precision(before)


def measure(
    reference: Runner, candidate: Runner, twin: Runner | str | None, steps: list[Case]
) -> tuple[Comparison, Comparison | str | None]:
    """Runs every case through all runners.

    Returns:
        the candidate's figures, and the low-rank twin's; in their place why there are none, where the twin is such a
        reason or fails on the way.
    """
    found, floor = Comparison(), Comparison()
    caches: list[Any] = [None, None, None]
    for case in tqdm(steps, desc="logits", unit="step", disable=None, leave=False):
        inputs, labels = case.step, case.visible_labels()
        if inputs.starts:
            caches = [None, None, None]
        expected, caches[0] = reference.step(inputs, caches[0])
        rows = case.visible(expected)
        logits, caches[1] = candidate.step(inputs, caches[1])
        found.add(case.name, rows, case.visible(logits), labels, kind=case.kind)
        if twin is None or isinstance(twin, str):
            continue
        try:
            logits, caches[2] = twin.step(inputs, caches[2])
        except _TWIN_ERRORS as error:
            twin = f"the low-rank twin failed at {case.name}: {first_line(error)}"
        else:
            floor.add(case.name, rows, case.visible(logits), labels)
    return found, twin if twin is None or isinstance(twin, str) else floor


def _check_source(folder: OnnxFolder, reference: Path) -> None:
    expected = folder.manifest.get("source_sha256")
    if expected and reference.exists() and model_sha256(reference) != expected:
        raise InputRefusedError(
            f"{folder.path / 'pifa.json'}: was exported from a checkpoint with hash {expected[:12]}…, "
            f"{reference} has another; name the checkpoint it came from or export again"
        )
