"""From a dense model to a compressed checkpoint, without training."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from pifa_deploy import __version__
from pifa_deploy.calibration import CalibrationSet, calibration_set
from pifa_deploy.compression.allocation import Allocation, allocate
from pifa_deploy.compression.clock import StepClock
from pifa_deploy.compression.decoder import check_prunable, decoder_layers, linear_shapes
from pifa_deploy.compression.distributed import Processes, processes
from pifa_deploy.compression.flow import Flows, open_flows
from pifa_deploy.compression.linear_shape import LinearShape
from pifa_deploy.compression.options import METHODS, ActivationOptions, CompressOptions
from pifa_deploy.compression.pipeline import LayerReport, Pipeline
from pifa_deploy.compression.reconstruction import ReconstructionOptions
from pifa_deploy.compression.result import CompressSummary, Result, write_result
from pifa_deploy.compression.resume import ResumeFolder
from pifa_deploy.compression.scores import layer_scores
from pifa_deploy.digest import model_sha256
from pifa_deploy.model_folder import check_finite, hub_commit, load_model, load_tokenizer, torch_dtype
from pifa_deploy.output_folder import new_folder

__all__ = [
    "METHODS",
    "ActivationOptions",
    "CompressOptions",
    "CompressSummary",
    "LayerReport",
    "ReconstructionOptions",
    "compress_model",
]

# Where and how the work is done decides nothing of the layers' results, and the layout comes after them;
# `calibration` is told by its texts.
_NOT_DECISIVE = ("calibration", "layout", "force", "restart", "device")


def compress_model(
    source: Path | str,
    target: Path | str,
    options: CompressOptions,
    *,
    report: Callable[[LayerReport], None] = lambda _: None,
) -> CompressSummary:
    """Compresses the linear layers of a causal LM's decoder layers, one decoder layer at a time.

    Under `torchrun` the calibration batches and the solves are shared by all processes; the first one writes.
    After every layer the state is on disk, in `.NAME.resume` beside the output NAME: the same call goes on where an
    earlier one ended, and its result is the same to the bit on the same number of threads.

    Args:
        source: dense model as `model_folder.load_model` takes it; a folder is memory-mapped.
        target: checkpoint folder to write.
        options: see CompressOptions.
        report: called after each layer, in the first process.

    Raises:
        ValueError: the density leaves no rank to a linear, or no linear is left to compress; names it.
        InputRefusedError: malformed model or text, or a model without linear layers to factorise.
        MisfitError: an unfinished run of another model or with other options stands beside the output.
        FactorizationError: a linear has no usable pivot factors; names it.
        StageFailedError: NaN or Inf activations or singular statistics; names the linear. A process of the same
            torchrun died.
        OutputExistsError, OutputHeldError, OutputError: see `output_folder.new_folder`.
    """
    with processes(options.device) as group:
        # Only the first process touches the output.
        output = new_folder(target, force=options.force) if group.is_main else contextlib.nullcontext()
        with output as folder:
            resume, result = _compressed(source, target, options, group=group, report=report)
            summary = write_result(folder, str(target), result) if folder else None
            final: CompressSummary = group.from_main(summary)
        if resume:
            resume.remove()
        return final


def _compressed(
    source: Path | str,
    target: Path | str,
    options: CompressOptions,
    *,
    group: Processes,
    report: Callable[[LayerReport], None],
) -> tuple[ResumeFolder | None, Result]:
    """Brings all layers into the resume folder, which only the first process has."""
    clock = StepClock(group.device)
    model = load_model(source, dtype=None)
    dense_parameters = model.num_parameters()
    path, layers = decoder_layers(model, str(source))
    check_finite(model, str(source), dtype=torch_dtype(options.dtype))
    shapes = linear_shapes(path, layers, include=options.include, exclude=options.exclude)
    if options.is_pruning:
        check_prunable(shapes)
    calibration = _calibration(source, options)
    resume = None
    if group.is_main:
        resume = ResumeFolder(target, _identity(source, options, calibration), restart=options.restart)
    with _flows(model, options, group, calibration=calibration) as flows:
        with clock.step("layer scores"):
            # The first process' ranks count: another number of processes, or a GPU, may round scores otherwise.
            allocation = group.from_main(resume.allocation if resume else None)
            if allocation is None:
                allocation = group.from_main(_allocation(layers, shapes, options, group=group, flows=flows))
        if resume and options.layer_density != "uniform":
            resume.allocation = allocation
        pipeline = Pipeline(
            path=path,
            layers=layers,
            ranks=allocation.ranks if allocation else {shape.name: 0 for shape in shapes},
            options=options,
            group=group,
            flows=flows,
            clock=clock,
        )
        pipeline.run(resume, report)
    result = Result(
        source=source,
        model=model,
        layers=path,
        resume=resume,
        options=options,
        calibration=calibration,
        shapes=shapes,
        allocation=allocation,
        dense_parameters=dense_parameters,
        clock=clock,
        activation_bytes=flows.store.peak_bytes if flows else 0,
    )
    return resume, result


def _calibration(source: Path | str, options: CompressOptions) -> CalibrationSet | None:
    if not options.needs_text:
        return None
    return calibration_set(options.calibration, load_tokenizer(source), options.windows)


def _identity(source: Path | str, options: CompressOptions, calibration: CalibrationSet | None) -> dict[str, Any]:
    """Returns all that decides the result of a compression, as JSON values."""
    kept = {name: value for name, value in asdict(options).items() if name not in _NOT_DECISIVE}
    del kept["activations"]["folder"]
    place = Path(source)
    known: dict[str, Any] = {
        "schema": 1,
        "pifa-deploy": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": model_sha256(place) if place.exists() else f"{source} at {hub_commit(source)}",
        **kept,
    }
    if calibration is not None:
        known["calibration text"] = [{name: entry[name] for name in ("name", "sha256")} for entry in calibration.record]
        # Last, for what nothing above tells: another tokenizer.
        known["calibration tokens"] = hashlib.sha256(calibration.windows.numpy().tobytes()).hexdigest()
    return known


@contextmanager
def _flows(
    model: Any, options: CompressOptions, group: Processes, *, calibration: CalibrationSet | None
) -> Iterator[Flows | None]:
    if calibration is None:
        yield None
        return
    with open_flows(model, calibration.windows, options, group=group) as flows:
        yield flows


def _allocation(
    layers: nn.ModuleList,
    shapes: list[LinearShape],
    options: CompressOptions,
    *,
    group: Processes,
    flows: Flows | None,
) -> Allocation | None:
    """Returns the ranks; None for 2:4 pruning."""
    if options.is_pruning:
        return None
    scores = None
    if options.layer_density != "uniform":
        assert flows is not None
        scores = layer_scores(layers, shapes, options, group=group, flows=flows)
    return allocate(shapes, options.allocation, scores=scores)
