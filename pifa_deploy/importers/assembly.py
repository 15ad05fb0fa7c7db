"""A transformers model put together from stored tensors: skeleton, factorised layers, then all the rest by name."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pifa_deploy.checkpoint import check_names
from pifa_deploy.errors import InputRefusedError, StageFailedError
from pifa_deploy.factorization import PivotFactors
from pifa_deploy.linear import PifaLinear

# What a configuration says about the process that wrote it, or would make transformers fetch or run something.
_NOT_TAKEN = {"model_type", "transformers_version", "dtype", "torch_dtype", "name_or_path", "auto_map"}
_NOT_TAKEN |= {"attn_implementation", "experts_implementation", "kernel_config"}
# Tables of class labels, which a causal language model does not have; their size is a number in the file.
_NOT_TAKEN |= {"num_labels", "id2label", "label2id"}
_LAYER_COUNT = re.compile(r"(n|num)_(.*_)?layers?")
# Older transformers stored these tables; current ones compute them from the configuration.
_DERIVED = re.compile(r"(^|\.)rotary_emb\.")


class StoredTensor(Protocol):
    """A tensor of the input whose shape and dtype are known before its data is read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of each dimension."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""

    def read(self) -> torch.Tensor:
        """Returns a contiguous CPU tensor of its own memory."""


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """What an importer read.

    Attributes:
        model: causal language model with `PifaLinear` layers; its derived buffers may be on the meta device.
        dtype: dtype of all its floating-point tensors.
        biases_added: layers whose bias the program that wrote the input does not apply.
        max_coefficient: largest |C| entry of any layer.
        notes: what a reader of the summary should know.
        details: JSON values for the record in config.json.
        files: tokenizer files, name -> content.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    biases_added: int = 0
    max_coefficient: float
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


def skeleton(values: Mapping[str, Any], *, where: str, tensors: int) -> PreTrainedModel:
    """Builds the model that a configuration describes, on the meta device.

    Args:
        values: plain configuration values with `model_type`.
        where: file or folder, for messages.
        tensors: how many tensors the input has; no model has more layers.

    Raises:
        InputRefusedError: unknown model type, another quantization, or values that describe no model.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputRefusedError(f"{where}: model_type is {kind!r}, expected one that transformers knows")
    if values.get("quantization_config"):
        raise InputRefusedError(f"{where}: quantization_config is set, expected a model that is not quantized")
    taken = {key: value for key, value in values.items() if key not in _NOT_TAKEN and not key.startswith("_")}
    for key, value in taken.items():
        if _LAYER_COUNT.fullmatch(key) and isinstance(value, int) and value > tensors:
            raise InputRefusedError(f"{where}: {key} is {value}, expected at most the {tensors} tensors of the input")
    try:
        config = AutoConfig.for_model(kind, **taken)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # transformers raises anything from KeyError to ZeroDivisionError here; the cause is the configuration.
    except Exception as error:
        raise InputRefusedError(
            f"{where}: the configuration describes no causal language model of type {kind!r} "
            f"({type(error).__name__}: {error}); give the configuration of the model that was compressed"
        ) from None
    return model


def linear_at(model: PreTrainedModel, name: str, where: str) -> nn.Linear:
    """Returns the linear layer of the skeleton at a module path.

    Raises:
        InputRefusedError: there is none, or its weight is tied to another tensor.
    """
    try:
        found = model.get_submodule(name)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        raise InputRefusedError(f"{where}: {name} is factorised, but the model has no linear layer there")
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if f"{name}.weight" in {*tied, *tied.values()}:
        raise InputRefusedError(f"{where}: {name} is factorised, but its weight is tied to another; untie it first")
    return found


def place(model: PreTrainedModel, name: str, factors: PivotFactors, bias: torch.Tensor | None, where: str) -> None:
    """Puts a `PifaLinear` in the place of the skeleton's linear layer.

    Raises:
        InputRefusedError: a bias too many, missing, or of another length.
    """
    expected = linear_at(model, name, where)
    if (expected.bias is None) != (bias is None):
        found, wanted = ("no bias", "one") if bias is None else ("a bias", "none")
        raise InputRefusedError(f"{where}: {name} has {found}, expected {wanted} as the configuration says")
    if bias is not None and tuple(bias.shape) != (expected.out_features,):
        raise InputRefusedError(f"{where}: {name}.bias is {tuple(bias.shape)}, expected ({expected.out_features},)")
    model.set_submodule(name, PifaLinear.from_factors(factors, bias))


def read_finite(tensor: StoredTensor, name: str, dtype: torch.dtype, where: str) -> torch.Tensor:
    """Reads a tensor and casts floating point to `dtype`.

    Raises:
        InputRefusedError: NaN or Inf in the input.
        StageFailedError: an entry that `dtype` cannot hold.
    """
    value = tensor.read()
    if not value.is_floating_point():
        return value
    cast = value.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        if bool(torch.isfinite(value).all()):
            raise StageFailedError(f"{where}: {name} overflows {dtype}; import with a wider dtype")
        raise InputRefusedError(f"{where}: {name} has NaN or Inf entries; expected finite weights")
    return cast


def chosen_dtype(tensors: Iterable[StoredTensor], asked: torch.dtype | None, notes: list[str]) -> torch.dtype:
    """Returns the dtype of the imported model: `asked`, or the narrowest that holds all stored tensors.

    Args:
        tensors: all tensors of the input.
        asked: what the user wants, None for what the input has.
        notes: gets a line when the input mixes dtypes.
    """
    stored = sorted({tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point}, key=str)
    if asked is not None or not stored:
        return asked or torch.float32
    widest = functools.reduce(torch.promote_types, stored)
    if len(stored) > 1:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in stored)
        notes.append(
            f"the input mixes {names}: stored as {str(widest).removeprefix('torch.')} without loss; "
            "pass --dtype for a narrower one"
        )
    return widest


def fill(
    model: PreTrainedModel, tensors: Mapping[str, StoredTensor], *, dtype: torch.dtype, where: str, notes: list[str]
) -> None:
    """Loads everything that is not factorised; nothing stays uninitialised and nothing is left over.

    Args:
        model: skeleton with its factorised layers in place; changed.
        tensors: name -> stored tensor, without those of factorised layers.
        dtype: dtype of the loaded floating-point tensors.
        where: file or folder, for messages.
        notes: gets a line when weights that the configuration ties differ in the input.

    Raises:
        InputRefusedError: names a tensor that is missing, unused, of another shape, or not finite.
    """
    expected = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_meta}
    left = {name: tensor for name, tensor in tensors.items() if name in expected or not _DERIVED.search(name)}
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    check_names(left, expected, _absent_ties(left, tied), where)
    for name, tensor in left.items():
        if tuple(tensor.shape) != tuple(expected[name].shape):
            raise InputRefusedError(
                f"{where}: {name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)} "
                "as the configuration says"
            )
    state = {name: read_finite(tensor, name, dtype, where) for name, tensor in left.items()}
    _settle_ties(model, state, tied, notes)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    unset = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if unset:
        raise InputRefusedError(f"{where}: {unset[0]} is missing ({len(unset)} in all); it would stay uninitialised")


def _absent_ties(found: Iterable[str], tied: Mapping[str, str]) -> set[str]:
    """Returns tied names that may be missing because the other of the pair is there."""
    names = set(found)
    return {target for target, source in tied.items() if source in names} | {
        source for target, source in tied.items() if target in names
    }


def _settle_ties(
    model: PreTrainedModel, state: dict[str, torch.Tensor], tied: Mapping[str, str], notes: list[str]
) -> None:
    for target, source in tied.items():
        if target not in state:
            continue
        if source not in state:
            state[source] = state[target]
        if torch.equal(state[target], state[source]):
            del state[target]
            continue
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
        notes.append(f"{target} differs from {source}, to which the configuration ties it: both are kept")
