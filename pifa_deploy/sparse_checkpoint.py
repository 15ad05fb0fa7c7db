"""A 2:4-pruned model on disk: a plain dense model folder that any loader takes, and the record of its zeros.

sparsity.json: {"schema": 1, "artefact": "2:4", "version": "<of pifa-deploy>", "pattern": "2:4", "method": "wanda",
"modules": {name: {"in_features", "out_features"}}, "details": {...}}.
sparsity_masks.safetensors: for each of these modules `<name>.mask`, uint8 [m, ceil(n / 8)]: bit j % 8 (1, 2, 4, ...)
of byte j // 8 is set where `<name>.weight` [m, n] kept its input j. Two of each four neighbouring bits are set, and
the weights of all others are exactly zero in the model's own files. transformers reads neither file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pifa_deploy import __version__
from pifa_deploy.checkpoint import FLOATS, read_config, read_json_object, tensor_files, tensor_names
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.output_folder import write_json

SPARSITY_FILE = "sparsity.json"
MASKS_FILE = "sparsity_masks.safetensors"
SCHEMA = 1
PATTERN = "2:4"
KEPT, GROUP = 2, 4
# Weights read at a time by the check: 32 MB in float32.
_BLOCK_NUMBERS = 1 << 23


@dataclass(frozen=True, kw_only=True)
class SparseModule:
    """One pruned linear: the shape of its weight W [out_features, in_features]."""

    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        """Raises ValueError for a shape that no 2:4 weight can have."""
        for name in ("in_features", "out_features"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer")
        if self.in_features % GROUP:
            raise ValueError(f"in_features is {self.in_features}, expected a multiple of {GROUP}")

    @property
    def mask_shape(self) -> tuple[int, int]:
        """Shape of the packed mask."""
        return self.out_features, -(-self.in_features // 8)


@dataclass(frozen=True, kw_only=True)
class SparsityRecord:
    """What sparsity.json says about the pruned modules of a model.

    Attributes:
        modules: module path -> shape of its weight.
        method: how the zeros were chosen ("magnitude", "wanda", "ria", "sparsegpt").
        details: options of the program that made them, JSON values.
    """

    modules: Mapping[str, SparseModule]
    method: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the object of sparsity.json."""
        return {
            "schema": SCHEMA,
            "artefact": PATTERN,
            "version": __version__,
            "pattern": PATTERN,
            "method": self.method,
            "modules": {name: asdict(module) for name, module in sorted(self.modules.items())},
            "details": dict(self.details),
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> SparsityRecord:
        """Parses the object of sparsity.json; `where` names the file in errors.

        Raises:
            InputRefusedError: a field is missing or has a value outside the contract.
        """
        found = value if isinstance(value, Mapping) else {}
        for name, expected in (("schema", SCHEMA), ("artefact", PATTERN), ("pattern", PATTERN)):
            if found.get(name) != expected or isinstance(found.get(name), bool):
                raise InputRefusedError(
                    f"{where}: {name} is {found.get(name)!r}, this program reads {expected!r}; update pifa-deploy, "
                    "or remove the file where another program wrote it"
                )
        method, details, entries = found.get("method"), found.get("details", {}), found.get("modules")
        if not isinstance(method, str) or not method:
            raise InputRefusedError(f"{where}: method is {method!r}, expected the name of a pruning method")
        if not isinstance(details, Mapping):
            raise InputRefusedError(f"{where}: details is {details!r}, expected an object")
        if not isinstance(entries, Mapping) or not entries:
            raise InputRefusedError(f"{where}: modules is empty or missing; prune the model again")
        modules = {}
        for name, entry in entries.items():
            try:
                modules[str(name)] = SparseModule(**entry)
            except (TypeError, ValueError) as error:
                raise InputRefusedError(f"{where}: modules[{name!r}]: {error}; prune the model again") from None
        return cls(modules=modules, method=method, details=details)


def is_sparse(folder: Path | str) -> bool:
    """Tells whether a model folder has a record of pruned modules, sound or not."""
    return (Path(folder) / SPARSITY_FILE).is_file()


def read_sparsity(folder: Path | str) -> SparsityRecord:
    """Returns the record of a folder for which `is_sparse` holds; masks and weights are not looked at.

    Raises:
        InputRefusedError: it is malformed.
    """
    file = Path(folder) / SPARSITY_FILE
    return SparsityRecord.from_json(read_json_object(file), str(file))


def write_sparsity(folder: Path | str, record: SparsityRecord, masks: Mapping[str, torch.Tensor]) -> None:
    """Writes sparsity.json and the masks into a model folder; `validate_sparsity` compares them with its weights.

    Args:
        folder: the folder that holds the pruned model.
        record: what was pruned.
        masks: module path -> bool [m, n], True where the weight is kept, for exactly the modules of `record`.

    Raises:
        ValueError: masks for other modules, or one that is not a 2:4 mask of its module's shape.
    """
    if masks.keys() != record.modules.keys():
        odd = sorted(masks.keys() ^ record.modules.keys())
        raise ValueError(f"{odd[0]} has a mask or a record but not both; expected masks for the recorded modules")
    packed = {}
    for name, module in record.modules.items():
        mask = masks[name].detach().cpu()
        shape = (module.out_features, module.in_features)
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(f"mask of {name} is {mask.dtype} {tuple(mask.shape)}, expected torch.bool {shape}")
        if (row := _first_wrong_row(mask)) is not None:
            raise ValueError(f"mask of {name} does not keep {KEPT} of each {GROUP} inputs in row {row}; prune it again")
        packed[f"{name}.mask"] = torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    save_file(packed, Path(folder) / MASKS_FILE, metadata={"format": "pt"})
    write_json(Path(folder) / SPARSITY_FILE, record.to_json())


def validate_sparsity(folder: Path | str) -> SparsityRecord:
    """Checks a 2:4-pruned model folder against its contract and returns its record.

    Reads some million weights at a time.

    Raises:
        InputMissingError: no such folder.
        InputRefusedError: names the file and tensor, what was found and what was expected.
    """
    folder = Path(folder)
    if "quantization_config" in read_config(folder):
        raise InputRefusedError(
            f"{folder / 'config.json'}: has a quantization_config beside {SPARSITY_FILE}; expected a dense model"
        )
    record = read_sparsity(folder)
    files, masks = tensor_files(folder), folder / MASKS_FILE
    if not masks.is_file():
        raise InputRefusedError(f"{masks}: missing, but {SPARSITY_FILE} lists pruned modules; prune the model again")
    odd = sorted(set(tensor_names(masks)) ^ {f"{name}.mask" for name in record.modules})
    if odd:
        raise InputRefusedError(
            f"{masks}: {odd[0]} is missing or left over ({len(odd)} in all); expected one mask for each module of "
            f"{SPARSITY_FILE}"
        )
    for name, module in record.modules.items():
        weight = f"{name}.weight"
        if weight not in files:
            raise InputRefusedError(f"{folder}: {weight} is missing; {SPARSITY_FILE} lists {name} as pruned")
        shape = (module.out_features, module.in_features)
        _check_tensor(masks, f"{name}.mask", {"U8"}, module.mask_shape)
        _check_tensor(files[weight], weight, FLOATS, shape)
        _check_zeros(name, module, masks, files[weight])
    return record


def _check_tensor(path: Path, tensor: str, dtypes: set[str], shape: tuple[int, ...]) -> None:
    with safe_open(path, framework="pt") as file:
        found = file.get_slice(tensor)
        if found.get_dtype() not in dtypes or tuple(found.get_shape()) != shape:
            raise InputRefusedError(
                f"{path}: {tensor} is {found.get_dtype()} {tuple(found.get_shape())}, "
                f"expected {'/'.join(sorted(dtypes))} {shape}"
            )


def _check_zeros(name: str, module: SparseModule, masks: Path, weights: Path) -> None:
    """Raises InputRefusedError for a mask that is not 2:4, or a weight outside it that is not zero."""
    with safe_open(masks, framework="pt") as mask_file, safe_open(weights, framework="pt") as weight_file:
        packed, values = mask_file.get_slice(f"{name}.mask"), weight_file.get_slice(f"{name}.weight")
        for rows in _row_blocks(module):
            bits = torch.from_numpy(np.unpackbits(packed[rows].numpy(), axis=1, bitorder="little")).bool()
            mask, padding = bits[:, : module.in_features], bits[:, module.in_features :]
            if (row := _first_wrong_row(mask)) is not None or bool(padding.any()):
                found = "padding bits that are set" if row is None else f"not {KEPT} of each {GROUP} bits set"
                at = int(padding.any(1).nonzero()[0]) if row is None else row
                raise InputRefusedError(
                    f"{masks}: {name}.mask has {found} in row {rows.start + at}; prune the model again"
                )
            outside = (values[rows] != 0) & ~mask
            if bool(outside.any()):
                row, column = (int(index) for index in outside.nonzero()[0])
                raise InputRefusedError(
                    f"{weights}: {name}.weight is {float(values[rows][row, column]):.3g} at row {rows.start + row}, "
                    f"input {column}, expected 0 outside {name}.mask; prune the model again, or remove {SPARSITY_FILE} "
                    "to use it as a dense model"
                )


def _row_blocks(module: SparseModule) -> Iterator[slice]:
    step = max(1, _BLOCK_NUMBERS // module.in_features)
    for start in range(0, module.out_features, step):
        yield slice(start, min(start + step, module.out_features))


def _first_wrong_row(mask: torch.Tensor) -> int | None:
    """Returns the first row of a bool [m, n] in which a group of four does not keep exactly two."""
    wrong = (mask.reshape(len(mask), -1, GROUP).sum(-1) != KEPT).any(1)
    return int(wrong.nonzero()[0]) if bool(wrong.any()) else None
