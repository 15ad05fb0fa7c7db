"""What a compression leaves: the checkpoint folder and a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pifa_deploy.calibration import CalibrationSet
from pifa_deploy.checkpoint import validate
from pifa_deploy.compression.allocation import Allocation
from pifa_deploy.compression.clock import StepClock
from pifa_deploy.compression.linear_shape import LinearShape
from pifa_deploy.compression.options import CompressOptions
from pifa_deploy.compression.resume import ResumeFolder
from pifa_deploy.layouts import LayoutSummary, apply_layout
from pifa_deploy.model_folder import check_finite, save_tokenizer, torch_dtype
from pifa_deploy.sparse_checkpoint import SparseModule, SparsityRecord, validate_sparsity, write_sparsity
from pifa_deploy.transformers_quantizer import attach


@dataclass(frozen=True, kw_only=True)
class CompressSummary:
    """What a compression wrote.

    Attributes:
        path: the checkpoint folder.
        modules: replaced linears.
        dense: linears that were to be factorised and stayed dense -> why.
        dense_parameters: parameters of the dense model.
        parameters: parameters of the checkpoint; of a 2:4 model without the pruned ones.
        module_density: stored numbers of the linears asked for relative to dense ones.
        layout: where the pivots lie; None for a 2:4 model.
        error: mean relative output error of the replaced linears.
        seconds: wall time.
        shares: step -> share of the wall time.
        activation_bytes: most bytes of activations that this process kept at once.
    """

    path: str
    modules: int
    dense: Mapping[str, str]
    dense_parameters: int
    parameters: int
    module_density: float
    layout: LayoutSummary | None
    error: float
    seconds: float
    shares: Mapping[str, float]
    activation_bytes: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished compression before it is written.

    Attributes:
        source: where the dense model came from.
        model: the dense model; writing puts the replacements into it.
        layers: path of its decoder layers.
        resume: all replacements; only the first process has it.
        options: how it was done.
        calibration: the text; None without.
        shapes: the linears asked for.
        allocation: their ranks; None for 2:4 pruning.
        dense_parameters: parameters of the dense model.
        clock: where the time went.
        activation_bytes: most bytes of activations that this process kept at once.
    """

    source: Path | str
    model: PreTrainedModel
    layers: str
    resume: ResumeFolder | None
    options: CompressOptions
    calibration: CalibrationSet | None
    shapes: Sequence[LinearShape]
    allocation: Allocation | None
    dense_parameters: int
    clock: StepClock
    activation_bytes: int


def write_result(folder: Path, name: str, result: Result) -> CompressSummary:
    """Writes the checkpoint into an empty folder; `name` is what the summary calls it.

    Raises:
        InputRefusedError: a weight is not finite in the dtype to store.
    """
    model, options = result.model, result.options
    errors, masks = _put_in_place(result)
    with result.clock.step("layout"):
        assert result.resume is not None
        layout = None if options.is_pruning else apply_layout(model, options.layout, made=result.resume.settle)
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    if not options.is_pruning:
        attach(model, source=options.method, density=options.density, details=_details(result, layout))
    check_finite(model.to(torch_dtype(options.dtype)), str(result.source))
    # A factorised model under the names of its modules, which the record uses; the older names that transformers
    # writes for some families (GPT-NeoX) are for other readers, and those a 2:4 model has.
    model.save_pretrained(folder, save_original_format=options.is_pruning)
    save_tokenizer(result.source, folder)
    if options.is_pruning:
        _write_masks(folder, masks, result)
    else:
        validate(folder)
    parameters = model.num_parameters() - pruned
    asked = sum(shape.out_features * shape.in_features for shape in result.shapes)
    return CompressSummary(
        path=name,
        modules=len(errors),
        dense=result.allocation.dense if result.allocation else {},
        dense_parameters=result.dense_parameters,
        parameters=parameters,
        module_density=result.allocation.density if result.allocation else 1.0 - pruned / asked,
        layout=layout,
        error=sum(errors) / len(errors),
        seconds=result.clock.total(),
        shares=result.clock.shares(),
        activation_bytes=result.activation_bytes,
    )


def _put_in_place(result: Result) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Puts the replacements, views of their mapped files, into the model; returns their errors, and masks by path."""
    assert result.resume is not None
    errors, masks = [], {}
    layers = result.model.get_submodule(result.layers)
    assert isinstance(layers, nn.ModuleList)
    for number, layer in enumerate(layers):
        for name, entry in result.resume.load(number).items():
            dense = layer.get_submodule(name)
            assert isinstance(dense, nn.Linear)
            layer.set_submodule(name, entry.module(dense))
            errors.append(entry.error)
            if "mask" in entry.tensors:
                masks[f"{result.layers}.{number}.{name}"] = entry.tensors["mask"]
    return errors, masks


def _details(result: Result, layout: LayoutSummary | None) -> dict[str, Any]:
    """Returns what config.json says about how the factors were made."""
    options = result.options
    details: dict[str, Any] = {
        "calibration": [dict(entry) for entry in result.calibration.record] if result.calibration else [],
        **asdict(options.windows),
    }
    if options.method == "mpifa":
        details["reconstruction"] = asdict(options.reconstruction)
    if result.allocation is not None:
        details["format"] = options.format
        details["layout"] = {"asked": options.layout, **(asdict(layout) if layout else {})}
        details["rank_multiple"] = options.rank_multiple
        details["attention_density"] = options.attention_density
        details["layer_density"] = options.layer_density
        details["left_dense"] = dict(result.allocation.dense)
    return details


def _write_masks(folder: Path, masks: Mapping[str, torch.Tensor], result: Result) -> None:
    modules = {name: SparseModule(out_features=len(mask), in_features=mask.shape[1]) for name, mask in masks.items()}
    details = _details(result, None)
    write_sparsity(folder, SparsityRecord(modules=modules, method=result.options.method, details=details), masks)
    validate_sparsity(folder)
