"""Checkpoints of the research code of arXiv 2501.19090: whole pickled models, read as data.

Two forms exist. Reconstructed: a factorised layer has children `BLinear` (V [r, n]) and `ALinear` (U [m, r],
bias inside). Factorised: `BLinear` is W_p [r, n], `ALinear` is C [m - r, r], the buffer `false_idx` [r] lists
the pivot rows and `true_idx` [m - r] the others, and `bias` lies beside them; the research forward of that
form leaves the bias out, so a model with biases answers differently there and here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from pifa_deploy.conditioning import MAX_COEFFICIENT, WARN_COEFFICIENT, Conditioning
from pifa_deploy.errors import FactorizationError, InputRefusedError
from pifa_deploy.factorization import (
    PivotFactors,
    factors_from_low_rank,
)
from pifa_deploy.importers.assembly import ImportedModel, chosen_dtype, fill, linear_at, place, read_finite, skeleton
from pifa_deploy.importers.pickled_tokenizer import PlainCopier, tokenizer_files
from pifa_deploy.importers.restricted_pickle import InertRecord, load
from pifa_deploy.importers.torch_archive import PickledTensor, TorchArchive

_MAX_MODULES = 100_000
_MAX_DEPTH = 32


@dataclass(frozen=True, kw_only=True)
class _Factorised:
    """The unread tensors of one factorised layer; without `pivots` they are U and V."""

    inner: PickledTensor
    outer: PickledTensor
    pivots: PickledTensor | None
    others: PickledTensor | None
    bias: PickledTensor | None

    def tensors(self) -> Iterator[PickledTensor]:
        """Yields the floating-point tensors."""
        yield from (tensor for tensor in (self.inner, self.outer, self.bias) if tensor is not None)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What stands in the pickled module tree, by module path."""

    tensors: dict[str, PickledTensor] = field(default_factory=dict)
    layers: dict[str, _Factorised] = field(default_factory=dict)


def read_research(path: Path, dtype: torch.dtype | None) -> ImportedModel:
    """Reads a file that the research code saved.

    Args:
        path: result of `torch.save({"model": model, "tokenizer": tokenizer}, path)`.
        dtype: dtype of the result; that of the file when None.

    Raises:
        InputRefusedError: hostile, damaged, or not such a file; the message names the tensor or the global.
        FactorizationError: a layer has no usable pivot factors in that dtype.
    """
    where, notes = str(path), list[str]()
    with TorchArchive(path) as archive:
        graph = load(archive)
        root = _model_record(graph, where)
        found = _walk(root, where)
        if not found.layers:
            raise InputRefusedError(f"{where}: the model has no factorised layer, expected at least one; compress it")
        model = skeleton(_config_values(root, where), where=where, tensors=len(found.tensors) + 2 * len(found.layers))
        stored = [*found.tensors.values(), *(tensor for layer in found.layers.values() for tensor in layer.tensors())]
        chosen = chosen_dtype(stored, dtype, notes)
        largest = [_import_layer(model, name, layer, chosen, where) for name, layer in sorted(found.layers.items())]
        fill(model, found.tensors, dtype=chosen, where=where, notes=notes)
    files = tokenizer_files(graph.get("tokenizer") if isinstance(graph, dict) else None, notes)
    return _summed_up(model, found, chosen, max(largest), notes, files)


def _summed_up(
    model: PreTrainedModel,
    found: _Found,
    dtype: torch.dtype,
    largest: float,
    notes: list[str],
    files: dict[str, bytes],
) -> ImportedModel:
    pivoted = [layer for layer in found.layers.values() if layer.pivots is not None]
    added = sum(layer.bias is not None for layer in pivoted)
    if added:
        notes.append(f"{added} layers have a bias that the research forward leaves out; it is applied here")
    if pivoted and largest > WARN_COEFFICIENT:
        notes.append(f"max |C| is {largest:.3g}, above {WARN_COEFFICIENT:g}: expect larger rounding errors")
    forms = ["factorised"] * bool(pivoted) + ["reconstructed"] * (len(pivoted) < len(found.layers))
    return ImportedModel(
        model=model,
        dtype=dtype,
        biases_added=added,
        max_coefficient=largest,
        notes=notes,
        details={"form": "+".join(forms), "biases_added": added},
        files=files,
    )


def _model_record(graph: Any, where: str) -> InertRecord:
    root = graph.get("model") if isinstance(graph, dict) else graph
    if isinstance(root, InertRecord) and isinstance(root.attributes.get("config"), InertRecord):
        return root
    found = type(root).__name__ if root is not None else "no entry 'model'"
    raise InputRefusedError(
        f"{where}: holds {found}, expected a whole transformers model with its configuration, "
        'as torch.save({"model": model, "tokenizer": tokenizer}) writes'
    )


def _config_values(root: InertRecord, where: str) -> dict[str, Any]:
    """Returns the plain public values of the pickled configuration, with its model type."""
    config = root.attributes["config"]
    values: dict[str, Any] = {}
    # One copier: its limit on what shared references expand to holds for the whole configuration.
    copier = PlainCopier()
    for key, value in config.attributes.items():
        if not isinstance(key, str) or key.startswith("_"):
            continue
        try:
            values[key] = copier.plain(value)
        except TypeError as error:
            raise InputRefusedError(
                f"{where}: config.{key} is no plain value ({error}); expected JSON values"
            ) from None
    if not isinstance(values.get("model_type"), str):
        # The class says it where the instance does not; only the name is looked up.
        class_name = config.origin.rpartition(".")[2]
        types = [kind for kind, name in CONFIG_MAPPING_NAMES.items() if name == class_name]
        values["model_type"] = types[0] if types else class_name
    return values


def _walk(root: InertRecord, where: str) -> _Found:
    """Collects tensors and factorised layers of a pickled module tree by path."""
    found, stack, visited = _Found(), [("", root)], 0
    while stack:
        path, record = stack.pop()
        visited += 1
        if visited > _MAX_MODULES or path.count(".") > _MAX_DEPTH:
            raise InputRefusedError(f"{where}: the module tree has no end near {path[:120]!r}, expected a model")
        children = _mapping(record, "_modules", where)
        if {"ALinear", "BLinear"} <= children.keys():
            found.layers[path] = _factorised(record, path, where)
            continue
        for name, tensor in _own_tensors(record, path, where).items():
            found.tensors[f"{path}.{name}".lstrip(".")] = tensor
        for name, child in children.items():
            if isinstance(child, InertRecord):
                stack.append((f"{path}.{name}".lstrip("."), child))
            elif child is not None:
                raise InputRefusedError(f"{where}: module {path}.{name} is a {type(child).__name__}, expected a module")
    return found


def _mapping(record: InertRecord, name: str, where: str) -> dict[str, Any]:
    value = record.attributes.get(name, {})
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputRefusedError(f"{where}: {name} of a {record.origin} is no dictionary by name, expected a module")
    return value


def _own_tensors(record: InertRecord, path: str, where: str) -> dict[str, PickledTensor]:
    """Returns the parameters and persistent buffers of one module."""
    left_out = record.attributes.get("_non_persistent_buffers_set", set())
    tensors = {}
    for group in ("_parameters", "_buffers"):
        for name, value in _mapping(record, group, where).items():
            if value is None or (group == "_buffers" and isinstance(left_out, set) and name in left_out):
                continue
            if not isinstance(value, PickledTensor):
                raise InputRefusedError(f"{where}: {path}.{name} is a {type(value).__name__}, expected a tensor")
            tensors[name] = value
    return tensors


def _factorised(record: InertRecord, path: str, where: str) -> _Factorised:
    own = _own_tensors(record, path, where)
    children = _mapping(record, "_modules", where)
    sides = {}
    for side in ("ALinear", "BLinear"):
        if not isinstance(children[side], InertRecord):
            raise InputRefusedError(f"{where}: {path}.{side} is a {type(children[side]).__name__}, expected a module")
        sides[side] = _own_tensors(children[side], f"{path}.{side}", where)
        if "weight" not in sides[side]:
            raise InputRefusedError(f"{where}: {path}.{side}.weight is missing, expected a matrix")
    outer_bias = sides["ALinear"].pop("bias", None)
    layer = _Factorised(
        inner=sides["BLinear"].pop("weight"),
        outer=sides["ALinear"].pop("weight"),
        pivots=own.pop("false_idx", None),
        others=own.pop("true_idx", None),
        bias=own.pop("bias", None) or outer_bias,
    )
    unused = [*own, *(f"{side}.{name}" for side, names in sides.items() for name in names)]
    if unused or (layer.pivots is None) != (layer.others is None) or (layer.pivots is not None and outer_bias):
        raise InputRefusedError(
            f"{where}: {path} holds {', '.join(unused) or 'parts of both forms'}, expected ALinear, BLinear, a bias, "
            "and both or neither of true_idx and false_idx"
        )
    return layer


def _import_layer(model: PreTrainedModel, name: str, layer: _Factorised, dtype: torch.dtype, where: str) -> float:
    """Puts one layer into the model and returns its largest |C| entry."""
    linear = linear_at(model, name, where)
    _check_shapes(name, layer, linear.out_features, linear.in_features, where)
    inner = read_finite(layer.inner, f"{name}.BLinear.weight", dtype if layer.pivots else layer.inner.dtype, where)
    outer = read_finite(layer.outer, f"{name}.ALinear.weight", dtype if layer.pivots else layer.outer.dtype, where)
    bias = None if layer.bias is None else read_finite(layer.bias, f"{name}.bias", dtype, where)
    try:
        if layer.pivots is None or layer.others is None:
            factors = factors_from_low_rank(outer, inner, dtype=dtype)
        else:
            pivots, others = layer.pivots.read(), layer.others.read()
            _check_rows(name, pivots, others, linear.out_features, where)
            factors = _kept_factors(inner, outer, pivots, others)
    except FactorizationError as error:
        raise FactorizationError(f"{where}: {name}: {error}") from None
    place(model, name, factors, bias, where)
    return factors.conditioning.max_coefficient


def _check_shapes(name: str, layer: _Factorised, out_features: int, in_features: int, where: str) -> None:
    rank = layer.inner.shape[0] if layer.inner.shape else 0
    rows = out_features if layer.pivots is None else out_features - rank
    lists = () if layer.pivots is None or layer.others is None else (layer.pivots.shape, layer.others.shape)
    fits = (
        1 <= rank <= in_features
        and layer.inner.shape == (rank, in_features)
        and layer.outer.shape == (rows, rank)
        and lists in ((), ((rank,), (rows,)))
        and all(tensor.dtype.is_floating_point for tensor in layer.tensors())
    )
    if not fits:
        raise InputRefusedError(
            f"{where}: {name} has BLinear.weight {layer.inner.shape}, ALinear.weight {layer.outer.shape}"
            + (f", false_idx {lists[0]}, true_idx {lists[1]}" if lists else "")
            + f"; they do not make up the {out_features} x {in_features} floating-point matrix of the configuration"
        )


def _check_rows(name: str, pivots: torch.Tensor, others: torch.Tensor, out_features: int, where: str) -> None:
    """Raises InputRefusedError unless the two lists name each row once."""
    if pivots.is_floating_point() or others.is_floating_point():
        raise InputRefusedError(
            f"{where}: {name}.false_idx is {pivots.dtype}, true_idx {others.dtype}; expected integers"
        )
    together = torch.cat([pivots.long(), others.long()])
    if not torch.equal(together.sort().values, torch.arange(out_features)):
        raise InputRefusedError(
            f"{where}: {name}.false_idx and {name}.true_idx do not name each of {out_features} rows once "
            f"(found {int(together.min())} .. {int(together.max())}); expected 0 .. {out_features - 1}"
        )


def _kept_factors(
    pivot_weight: torch.Tensor, coefficients: torch.Tensor, pivots: torch.Tensor, others: torch.Tensor
) -> PivotFactors:
    """Keeps factors as stored; only brings pivot rows and other rows into ascending order."""
    by_pivot, by_other = torch.argsort(pivots), torch.argsort(others)
    ordered = coefficients[by_other][:, by_pivot].contiguous()
    norms = ordered.double().norm(dim=1) if ordered.numel() else torch.zeros(1, dtype=torch.float64)
    largest = float(ordered.abs().max()) if ordered.numel() else 0.0
    if largest > MAX_COEFFICIENT:
        raise FactorizationError(
            f"max |C| is {largest:.3g}, expected at most {MAX_COEFFICIENT:g}; factorise the reconstructed model anew"
        )
    return PivotFactors(
        pivot_weight=pivot_weight[by_pivot].contiguous(),
        coefficients=ordered,
        pivot_rows=pivots[by_pivot].to(torch.int32),
        conditioning=Conditioning(
            max_coefficient=largest,
            max_row_norm=float(norms.max()),
            rms_row_norm=float(norms.square().mean().sqrt()),
            relative_error=0.0,
        ),
    )
