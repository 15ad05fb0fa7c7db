"""Folders of safetensors whose linear layers are low-rank pairs, W [m, n] = U [m, r] @ V [r, n].

Names say which two tensors belong together and to which layer; shapes say which of them is U:

| written by | names for the layer `a.q_proj` |
|---|---|
| SVD-LLM | `a.q_u_proj.weight`, `a.q_v_proj.weight` |
| ASVD; Dobi-SVD with the two swapped | `a.q_proj.ALinear.weight`, `a.q_proj.BLinear.weight` |
| LoRD, FWSVD, D-Rank and others | `a.q_proj.U`, `a.q_proj.V`, in either case, with or without `.weight` |
| as above, spelled out | `a.q_proj.low_rank_u`, `a.q_proj.low_rank_v`; also `lowrank_` and `svd_` |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from pifa_deploy.checkpoint import is_checkpoint, read_config, tensor_files
from pifa_deploy.conditioning import WARN_COEFFICIENT
from pifa_deploy.errors import FactorizationError, InputRefusedError
from pifa_deploy.factorization import (
    factors_from_low_rank,
)
from pifa_deploy.importers.assembly import ImportedModel, chosen_dtype, fill, linear_at, place, read_finite, skeleton
from pifa_deploy.tokenizer_files import TOKENIZER_FILES

# `layer` is the module path, or all of it but its end `_proj`; the side is only a label to pair by.
_SUFFIXED = re.compile(r"(?P<layer>.+)_(?P<side>u|v)_proj\.(?P<what>weight|bias)")
_CHILD = re.compile(
    r"(?P<layer>.+)\.(?P<side>[AB]Linear|[UVuv]|(?:low_rank|lowrank|svd)_[UVuv]|[UVuv]_proj)(?:\.(?P<what>weight|bias))?"
)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class _FileTensor:
    """One tensor of a safetensors file, not read yet."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """Returns a CPU tensor of its own memory."""
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
        return tensor


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The tensors that names give to one layer, by side label; `biases` likewise."""

    weights: dict[str, _FileTensor] = field(default_factory=dict)
    biases: dict[str, _FileTensor] = field(default_factory=dict)


def read_low_rank(folder: Path, dtype: torch.dtype | None) -> ImportedModel:
    """Reads a model folder with low-rank pairs in one of the namings above.

    Args:
        folder: config.json of the original model and (sharded) safetensors.
        dtype: dtype of the result; that of the files when None.

    Raises:
        InputMissingError: no such folder.
        InputRefusedError: no pairs, a pair that shapes do not decide, or a tensor that is missing, unused or
            not finite; the message names it.
        FactorizationError: a layer has no usable pivot factors in that dtype.
    """
    where, notes = str(folder), list[str]()
    if is_checkpoint(folder):
        raise InputRefusedError(f"{where}: is a PIFA checkpoint already, expected low-rank pairs; use it as it is")
    tensors = dict(_file_tensors(tensor_files(folder)))
    model = skeleton(read_config(folder), where=where, tensors=len(tensors))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    pairs = _pairs(tensors, linears)
    if not pairs:
        raise InputRefusedError(
            f"{where}: no tensor is named as a part of a low-rank pair, expected names such as "
            "<layer>.ALinear.weight, <layer>.U or <attention>.q_u_proj.weight; see `pifa-deploy import --help`"
        )
    chosen = chosen_dtype(tensors.values(), dtype, notes)
    largest = max(_import_pair(model, name, pair, chosen, where) for name, pair in sorted(pairs.items()))
    used = {tensor.name for pair in pairs.values() for tensor in (*pair.weights.values(), *pair.biases.values())}
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    fill(model, rest, dtype=chosen, where=where, notes=notes)
    if largest > WARN_COEFFICIENT:
        notes.append(f"max |C| is {largest:.3g}, above {WARN_COEFFICIENT:g}: expect larger rounding errors")
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & files.keys():
        notes.append("no tokenizer came along; copy the tokenizer files of the original model into the folder")
    return ImportedModel(model=model, dtype=chosen, max_coefficient=largest, notes=notes, files=files)


def _file_tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, _FileTensor]]:
    by_file: dict[Path, list[str]] = {}
    for name, path in files.items():
        by_file.setdefault(path, []).append(name)
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                found = file.get_slice(name)
                kind = found.get_dtype()
                if kind not in _DTYPES:
                    raise InputRefusedError(f"{path}: {name} is {kind}, expected one of {', '.join(_DTYPES)}")
                yield name, _FileTensor(path=path, name=name, shape=tuple(found.get_shape()), dtype=_DTYPES[kind])


def _pairs(tensors: Mapping[str, _FileTensor], linears: set[str]) -> dict[str, _Pair]:
    """Groups tensors whose names follow a pattern above by the linear layer of the model they belong to."""
    pairs: dict[str, _Pair] = {}
    for name, tensor in tensors.items():
        for pattern in (_SUFFIXED, _CHILD):
            match = pattern.fullmatch(name)
            layer = match and next((at for at in (f"{match['layer']}_proj", match["layer"]) if at in linears), None)
            if match and layer:
                pair = pairs.setdefault(layer, _Pair())
                (pair.biases if match["what"] == "bias" else pair.weights)[match["side"]] = tensor
                break
    for layer, pair in pairs.items():
        # A bias beside the pair keeps the name that it has in the dense model.
        if f"{layer}.bias" in tensors:
            pair.biases[""] = tensors[f"{layer}.bias"]
    return pairs


def _import_pair(model: PreTrainedModel, name: str, pair: _Pair, dtype: torch.dtype, where: str) -> float:
    """Puts one layer into the model and returns its largest |C| entry."""
    linear = linear_at(model, name, where)
    u_side, v_side = _sides(pair, linear, name, where)
    stray = sorted(tensor.name for side, tensor in pair.biases.items() if side not in ("", u_side))
    if stray or len(pair.biases) > 1:
        names = ", ".join(sorted(tensor.name for tensor in pair.biases.values()))
        raise InputRefusedError(f"{where}: {name} has the biases {names}, expected at most one, added after U")
    sides = (pair.weights[u_side], pair.weights[v_side])
    u, v = (read_finite(tensor, tensor.name, tensor.dtype, where) for tensor in sides)
    bias = next((read_finite(tensor, tensor.name, dtype, where) for tensor in pair.biases.values()), None)
    try:
        factors = factors_from_low_rank(u, v, dtype=dtype)
    except FactorizationError as error:
        raise FactorizationError(f"{where}: {name}: {error}") from None
    place(model, name, factors, bias, where)
    return factors.conditioning.max_coefficient


def _sides(pair: _Pair, linear: nn.Linear, name: str, where: str) -> tuple[str, str]:
    """Returns the labels of U and V: the one assignment with shapes [m, r] and [r, n]."""
    out_features, in_features = linear.out_features, linear.in_features
    shapes = {side: tensor.shape for side, tensor in pair.weights.items()}
    floats = all(tensor.dtype.is_floating_point for tensor in pair.weights.values())
    found = ", ".join(f"{tensor.name} {tensor.shape}" for tensor in pair.weights.values())
    expected = f"U ({out_features}, r) and V (r, {in_features}) of floating point"
    fitting = [
        (one, other)
        for one in shapes
        for other in shapes
        if one != other
        and len(shapes) == 2
        and floats
        and len(shapes[one]) == len(shapes[other]) == 2
        and (shapes[one][0], shapes[other][1]) == (out_features, in_features)
        and shapes[one][1] == shapes[other][0] > 0
    ]
    if not fitting:
        raise InputRefusedError(f"{where}: {name} has {found or 'no weights'}, expected {expected}")
    if len(fitting) > 1:
        raise InputRefusedError(
            f"{where}: {name} has {found}: either may be U, expected shapes that decide it; "
            "give a rank below the size of the layer"
        )
    return fitting[0]
