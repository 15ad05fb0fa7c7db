"""The PIFA checkpoint folder: what `save_pretrained` writes, its contract, and one check for writer and reader.

config.json holds `quantization_config` = {"quant_method": "pifa", "version": 1, "modules": {name: {...}}, ...}.
In place of `<name>.weight` each listed module has `<name>.pivot_weight` [r, n], `<name>.coefficients` [m - r, r] and
`<name>.pivot_rows` int32 [r] (ascending); with "format": "pifa-column" `<name>.pivot_weight` [m, r] and
`<name>.coefficients` [r, n - r]; with "format": "lowrank" `<name>.low_rank_u` [m, r] and `<name>.low_rank_v` [r, n].
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pifa_deploy import op_spec
from pifa_deploy.errors import InputMissingError, InputRefusedError

QUANT_METHOD = op_spec.QUANT_METHOD
VERSION = 1
FORMATS = ("pifa", "pifa-column", "lowrank")
FLOATS = {"F64", "F32", "F16", "BF16"}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class ModuleSpec:
    """One factorised linear: its shape W [out_features, in_features], rank and storage format."""

    rank: int
    in_features: int
    out_features: int
    format: str = "pifa"

    def __post_init__(self) -> None:
        """Raises ValueError for a rank or format that no layer can have."""
        for name in ("rank", "in_features", "out_features"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer")
        if self.rank > min(self.in_features, self.out_features):
            raise ValueError(
                f"rank is {self.rank}, expected at most {min(self.in_features, self.out_features)} "
                f"(min of {self.out_features} x {self.in_features})"
            )
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}, expected one of {FORMATS}")

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns tensor suffix -> shape as stored, without the optional bias."""
        if self.format == "lowrank":
            return {"low_rank_u": (self.out_features, self.rank), "low_rank_v": (self.rank, self.in_features)}
        if self.format == "pifa-column":
            return {
                "pivot_weight": (self.out_features, self.rank),
                "coefficients": (self.rank, self.in_features - self.rank),
            }
        return {
            "pivot_weight": (self.rank, self.in_features),
            "coefficients": (self.out_features - self.rank, self.rank),
            "pivot_rows": (self.rank,),
        }

    def parameters(self) -> int:
        """Returns the stored numbers, without pivot rows and bias."""
        saved = 0 if self.format == "lowrank" else self.rank
        return self.rank * (self.out_features + self.in_features - saved)


@dataclass(frozen=True, kw_only=True)
class FactorizationRecord:
    """What config.json says about the factorised modules of a checkpoint.

    Attributes:
        modules: module path -> its spec.
        source: where the factors came from, without paths ("svd", "whitened", "import:pifa-research", ...).
        density: requested density of the factorised modules, None when imported.
        details: options of the program that made them, JSON values.
    """

    modules: Mapping[str, ModuleSpec]
    source: str
    density: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the `quantization_config` object."""
        return {
            "quant_method": QUANT_METHOD,
            "version": VERSION,
            "source": self.source,
            "density": self.density,
            "details": dict(self.details),
            "modules": {name: asdict(spec) for name, spec in sorted(self.modules.items())},
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> FactorizationRecord:
        """Parses a `quantization_config` object; `where` names the file in errors.

        Raises:
            InputRefusedError: a field is missing or has a value outside the contract.
        """
        if not isinstance(value, Mapping) or value.get("quant_method") != QUANT_METHOD:
            raise InputRefusedError(
                f"{where}: quantization_config is not a PIFA record; give a folder written by "
                "`pifa-deploy compress` or `pifa-deploy import`"
            )
        if value.get("version") != VERSION:
            raise InputRefusedError(
                f"{where}: quantization_config.version is {value.get('version')!r}, this program reads {VERSION}; "
                "update pifa-deploy"
            )
        entries = value.get("modules")
        if not isinstance(entries, Mapping) or not entries:
            raise InputRefusedError(
                f"{where}: quantization_config.modules is empty or missing; compress the model again"
            )
        modules = {}
        for name, entry in entries.items():
            try:
                modules[str(name)] = ModuleSpec(**entry)
            except (TypeError, ValueError) as error:
                raise InputRefusedError(
                    f"{where}: quantization_config.modules[{name!r}]: {error}; compress again"
                ) from None
        density, details = value.get("density"), value.get("details") or {}
        if isinstance(density, bool) or not isinstance(density, (int, float, type(None))):
            raise InputRefusedError(f"{where}: quantization_config.density is {density!r}, expected a number or null")
        if not isinstance(details, Mapping):
            raise InputRefusedError(f"{where}: quantization_config.details is {details!r}, expected an object")
        return cls(modules=modules, source=str(value.get("source", "unknown")), density=density, details=details)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns config.json of a model folder.

    Raises:
        InputMissingError: the folder or the file is not there.
        InputRefusedError: it is not a JSON object.
    """
    if not folder.is_dir():
        raise InputMissingError(f"{folder}: no such folder; give a model folder")
    path = folder / "config.json"
    if not path.is_file():
        raise InputRefusedError(f"{folder}: has no config.json; give a Hugging Face model folder")
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns a JSON file's object; raises InputRefusedError when it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputRefusedError(f"{path}: not JSON ({error}); expected a JSON object") from None
    if not isinstance(value, dict):
        raise InputRefusedError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def is_checkpoint(folder: Path) -> bool:
    """Tells whether config.json says that the folder holds factorised modules."""
    if not (folder / "config.json").is_file():
        return False
    found = read_config(folder).get("quantization_config")
    return isinstance(found, Mapping) and found.get("quant_method") == QUANT_METHOD


def tensor_files(folder: Path) -> dict[str, Path]:
    """Returns tensor name -> safetensors file of a (sharded) model folder; every header is parsed.

    Raises:
        InputRefusedError: no weights, a file cut short, a shard outside the folder, a tensor not where the index says.
    """
    index = folder / _INDEX
    # Where both stand, transformers loads the single file: what is checked must be what is loaded.
    if (folder / _SINGLE).is_file():
        return dict.fromkeys(tensor_names(folder / _SINGLE), folder / _SINGLE)
    if not index.is_file():
        raise InputRefusedError(f"{folder}: has neither {_SINGLE} nor {_INDEX}; the checkpoint is incomplete")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputRefusedError(f"{index}: weight_map is missing; the checkpoint is incomplete")
    shards = {str(shard): _inside(folder, shard, index) for shard in weight_map.values()}
    headers = {shard: tensor_names(path) for shard, path in shards.items()}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise InputRefusedError(f"{index}: {name} should be in {shard}, which does not hold it")
    for shard, names in headers.items():
        for name in names:
            if weight_map.get(name) != shard:
                raise InputRefusedError(f"{shards[shard]}: holds {name}, which {index.name} does not list there")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _inside(folder: Path, shard: Any, index: Path) -> Path:
    if not isinstance(shard, str) or os.path.basename(shard) != shard or shard in ("", ".", "..") or "\0" in shard:
        raise InputRefusedError(f"{index}: weight_map names {shard!r}, expected a file name inside the folder")
    path = folder / shard
    if not path.is_file():
        raise InputRefusedError(f"{index}: weight_map names {shard}, which is missing; the checkpoint is incomplete")
    return path


def tensor_names(path: Path) -> list[str]:
    """Returns the names in a safetensors file; raises InputRefusedError when its header cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise InputRefusedError(f"{path}: not a readable safetensors file ({error}); expected a complete one") from None


def validate(folder: Path | str, *, values: bool = True) -> FactorizationRecord:
    """Checks a PIFA checkpoint folder against its contract and returns its record.

    Args:
        folder: the checkpoint.
        values: also read every tensor and refuse NaN or Inf.

    Raises:
        InputMissingError: no such folder.
        InputRefusedError: names the file and tensor, what was found and what was expected.
    """
    folder = Path(folder)
    record = FactorizationRecord.from_json(read_config(folder).get("quantization_config"), str(folder / "config.json"))
    files = tensor_files(folder)
    for name, spec in record.modules.items():
        if f"{name}.weight" in files:
            raise InputRefusedError(
                f"{files[f'{name}.weight']}: holds {name}.weight beside its factors; expected one form"
            )
        _check_module(name, spec, files)
    if values:
        for file in sorted(set(files.values())):
            _check_finite(file)
    return record


def _check_module(name: str, spec: ModuleSpec, files: Mapping[str, Path]) -> None:
    expected = spec.tensors()
    if f"{name}.bias" in files:
        expected["bias"] = (spec.out_features,)
    for suffix, shape in expected.items():
        tensor = f"{name}.{suffix}"
        if tensor not in files:
            raise InputRefusedError(f"{tensor} is missing; config.json lists {name} as factorised")
        with safe_open(files[tensor], framework="pt") as file:
            found = file.get_slice(tensor)
            dtypes = {"I32"} if suffix == "pivot_rows" else FLOATS
            if tuple(found.get_shape()) != shape or found.get_dtype() not in dtypes:
                raise InputRefusedError(
                    f"{files[tensor]}: {tensor} is {found.get_dtype()} {tuple(found.get_shape())}, "
                    f"expected {'/'.join(sorted(dtypes))} {shape}"
                )
            if suffix == "pivot_rows":
                check_pivot_rows(file.get_tensor(tensor), spec.out_features, f"{files[tensor]}: {tensor}")


def check_pivot_rows(rows: torch.Tensor, out_features: int, where: str) -> None:
    """Raises InputRefusedError unless `rows` are strictly ascending and within 0 .. out_features - 1."""
    if int(rows.min()) < 0 or int(rows.max()) >= out_features:
        raise InputRefusedError(
            f"{where} has a row {int(rows.max()) if int(rows.min()) >= 0 else int(rows.min())}, "
            f"expected 0 <= row < {out_features}"
        )
    steps = rows[1:] - rows[:-1]
    if bool((steps <= 0).any()):
        at = int((steps <= 0).nonzero()[0])
        kind = "duplicate" if int(steps[at]) == 0 else "unsorted"
        raise InputRefusedError(f"{where} has {kind} rows at {at}, expected strictly ascending rows")


def _check_finite(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputRefusedError(f"{path}: {name} has NaN or Inf entries; expected finite weights")


def check_names(found: Iterable[str], expected: Iterable[str], optional: Iterable[str], where: str) -> None:
    """Raises InputRefusedError naming a tensor that a load would leave uninitialised or unused.

    Args:
        found: tensor names in the files.
        expected: names in the model's state dict.
        optional: expected names that may be absent (tied weights).
        where: the folder, for the message.
    """
    found, expected = set(found), set(expected)
    missing = sorted(expected - found - set(optional))
    if missing:
        raise InputRefusedError(
            f"{where}: {missing[0]} is missing ({len(missing)} in all); it would stay uninitialised"
        )
    unused = sorted(found - expected)
    if unused:
        raise InputRefusedError(f"{where}: {unused[0]} fits no module of the model ({len(unused)} in all)")
