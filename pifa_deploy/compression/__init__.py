"""From a dense model to a factorised checkpoint, without training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from pifa_deploy.calibration import CalibrationOptions, random_windows, read_texts, token_ids
from pifa_deploy.checkpoint import FORMATS, validate
from pifa_deploy.compression.statistics import input_moments
from pifa_deploy.compression.truncation import truncated_svd, whitened_svd
from pifa_deploy.density import low_rank_rank_for_density, rank_for_density
from pifa_deploy.errors import FactorizationError, InputRefusedError
from pifa_deploy.factorization import factors_from_low_rank
from pifa_deploy.linear import LowRankLinear, PifaLinear
from pifa_deploy.model_folder import check_finite, load_model, load_tokenizer, save_tokenizer, torch_dtype
from pifa_deploy.output_folder import new_folder
from pifa_deploy.transformers_quantizer import attach

METHODS = ("svd", "whitened")


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """How to compress.

    Attributes:
        density: 0 < density < 1, stored numbers of each factorised linear relative to the dense one.
        method: "svd" (plain truncation) or "whitened" (truncation of W chol(X X^T) on calibration text).
        format: "pifa" or "lowrank" (U, V: fewer ranks for the same density).
        dtype: dtype of the stored weights, "fp32", "fp16" or "bf16".
        rank_multiple: round ranks down to a multiple of this; the density reached is reported.
        calibration: UTF-8 text files; "whitened" needs at least one.
        windows: which parts of the text.
        force: replace an existing output folder.
    """

    density: float
    method: str = "whitened"
    format: str = "pifa"
    dtype: str = "fp32"
    rank_multiple: int = 1
    calibration: tuple[Path, ...] = ()
    windows: CalibrationOptions = field(default_factory=CalibrationOptions)
    force: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        if not 0.0 < self.density < 1.0:
            raise ValueError(f"density is {self.density}, expected 0 < density < 1")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, expected one of {METHODS}")
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}, expected one of {FORMATS}")
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple is {self.rank_multiple}, expected at least 1")
        if self.method == "whitened" and not self.calibration:
            raise ValueError("method whitened needs calibration text; pass --calibration FILE")
        torch_dtype(self.dtype)


@dataclass(frozen=True, kw_only=True)
class CompressSummary:
    """What a compression wrote.

    Attributes:
        path: the checkpoint folder.
        modules: factorised linears.
        dense_parameters: parameters of the dense model.
        parameters: parameters of the checkpoint.
        module_density: stored numbers of the factorised linears relative to dense ones.
        max_coefficient: largest |C| of all modules; 0 for the low-rank format.
        seconds: wall time.
    """

    path: str
    modules: int
    dense_parameters: int
    parameters: int
    module_density: float
    max_coefficient: float
    seconds: float


def compress_model(source: Path | str, target: Path | str, options: CompressOptions) -> CompressSummary:
    """Factorises every linear layer of a causal LM but its output head, and writes the checkpoint.

    Args:
        source: dense model as `model_folder.load_model` takes it.
        target: checkpoint folder to write.
        options: see CompressOptions.

    Raises:
        ValueError: the density leaves no rank to a layer; names the layer.
        InputRefusedError: malformed model or text, or a model without linear layers to factorise.
        FactorizationError: a layer has no usable pivot factors; names the layer.
        OutputExistsError, OutputHeldError, OutputError: see `output_folder.new_folder`.
    """
    started = time.monotonic()
    with new_folder(target, force=options.force) as folder:
        model = load_model(source, dtype=torch.float32)
        layers = target_layers(model, str(source))
        dense_parameters = model.num_parameters()
        moments = _moments(source, model, layers, options)
        largest = _replace_all(model, layers, moments, options)
        details = {
            "rank_multiple": options.rank_multiple,
            "calibration": [path.name for path in options.calibration],
            **asdict(options.windows),
        }
        record = attach(model, source=options.method, density=options.density, details=details)
        check_finite(model.to(torch_dtype(options.dtype)), str(source))
        model.save_pretrained(folder)
        save_tokenizer(source, folder)
        validate(folder)
        dense_size = sum(spec.in_features * spec.out_features for spec in record.modules.values())
        return CompressSummary(
            path=str(target),
            modules=len(record.modules),
            dense_parameters=dense_parameters,
            parameters=model.num_parameters(),
            module_density=sum(spec.parameters() for spec in record.modules.values()) / dense_size,
            max_coefficient=largest,
            seconds=time.monotonic() - started,
        )


def target_layers(model: PreTrainedModel, where: str) -> dict[str, nn.Linear]:
    """Returns the linears to factorise: all but the output head.

    Raises:
        InputRefusedError: there are none, or the model is factorised already.
    """
    if any(isinstance(module, (PifaLinear, LowRankLinear)) for module in model.modules()):
        raise InputRefusedError(f"{where}: is factorised already; give the dense model")
    head = model.get_output_embeddings()
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    if not layers:
        raise InputRefusedError(f"{where}: {type(model).__name__} has no nn.Linear layers to factorise")
    return layers


def _moments(
    source: Path | str, model: PreTrainedModel, layers: dict[str, nn.Linear], options: CompressOptions
) -> dict[str, torch.Tensor]:
    if options.method == "svd":
        return {}
    ids = token_ids(read_texts(options.calibration), load_tokenizer(source))
    return input_moments(model, layers, random_windows(ids, options.windows))


def _replace_all(
    model: PreTrainedModel, layers: dict[str, nn.Linear], moments: dict[str, torch.Tensor], options: CompressOptions
) -> float:
    """Puts factorised layers in place of dense ones; returns the largest |C|."""
    largest = 0.0
    items: Sequence[Any] = list(layers.items())
    for name, layer in tqdm(items, desc="factorising", unit="layer", disable=None, leave=False):
        try:
            factorised, coefficient = _factorised(layer, moments.get(name), options)
        except FactorizationError as error:
            raise FactorizationError(f"{name}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        model.set_submodule(name, factorised)
        largest = max(largest, coefficient)
    return largest


def _factorised(
    layer: nn.Linear, moment: torch.Tensor | None, options: CompressOptions
) -> tuple[PifaLinear | LowRankLinear, float]:
    weight = layer.weight.detach()
    rank_of = rank_for_density if options.format == "pifa" else low_rank_rank_for_density
    rank = rank_of(layer.out_features, layer.in_features, options.density, multiple=options.rank_multiple)
    u, v = truncated_svd(weight, rank) if moment is None else whitened_svd(weight, moment, rank)
    dtype = torch_dtype(options.dtype)
    if options.format == "lowrank":
        return LowRankLinear.from_pair(u.to(dtype).contiguous(), v.to(dtype).contiguous(), layer.bias), 0.0
    factors = factors_from_low_rank(u, v, dtype=dtype)
    return PifaLinear.from_factors(factors, layer.bias), factors.conditioning.max_coefficient
