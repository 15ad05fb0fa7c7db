"""What an artefact holds, told by its content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pifa_deploy.checkpoint import (
    FactorizationRecord,
    ModuleSpec,
    is_checkpoint,
    read_config,
    tensor_files,
    validate,
)
from pifa_deploy.density import density_for_rank
from pifa_deploy.engine_record import ENGINE_JSON, EngineRecord, read_engine_json
from pifa_deploy.errors import InputMissingError, InputRefusedError
from pifa_deploy.onnx_folder import MANIFEST_FILE, MODEL_FILE, OnnxFolder, open_folder
from pifa_deploy.proof import Proof, prove
from pifa_deploy.sparse_checkpoint import PATTERN, is_sparse, validate_sparsity


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found.

    Attributes:
        kind: "checkpoint", "2:4 model", "dense model", "onnx" or "engine".
        facts: name -> value, in the order to show.
        columns: headings of `rows`.
        rows: one per factorised or pruned module or engine.
    """

    kind: str
    facts: Mapping[str, Any]
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Returns the findings as JSON values."""
        table = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"kind": self.kind, **self.facts, "rows": table}


def inspect_path(path: Path | str) -> Inspection:
    """Tells what a checkpoint, dense or 2:4-pruned model, ONNX folder or engine folder holds.

    Raises:
        InputMissingError: no such path.
        InputRefusedError: none of these kinds, or malformed.
    """
    path = Path(path)
    if not path.exists():
        raise InputMissingError(f"{path}: no such file or folder")
    folder = path if path.is_dir() else path.parent
    if path.name == ENGINE_JSON or (path.is_dir() and (path / ENGINE_JSON).is_file()):
        return _engine(read_engine_json(path), prove(path))
    if path.name == MODEL_FILE or (path.is_dir() and (path / MODEL_FILE).is_file()):
        return _onnx(open_folder(path))
    if not (folder / "config.json").is_file() or not (path.is_dir() or path.name == "config.json"):
        raise InputRefusedError(
            f"{path}: is no checkpoint, ONNX folder or engine folder; expected config.json, model.onnx or engine.json"
        )
    if is_sparse(folder):
        return _sparse(folder)
    return _checkpoint(folder) if is_checkpoint(folder) else _dense(folder)


def _checkpoint(folder: Path) -> Inspection:
    record = validate(folder)
    rows = [_module_row(name, spec) for name, spec in record.modules.items()]
    return Inspection(
        kind="checkpoint",
        facts={
            **_model_facts(folder),
            "source": record.source,
            "requested_density": record.density,
            "module_density": _module_density(record),
            "modules": len(record.modules),
            "details": dict(record.details),
        },
        columns=("module", "format", "rank", "out", "in", "density"),
        rows=tuple(rows),
    )


def _dense(folder: Path) -> Inspection:
    return Inspection(kind="dense model", facts=_model_facts(folder))


def _sparse(folder: Path) -> Inspection:
    record = validate_sparsity(folder)
    zeros = _zeros(folder)
    pruned = [zeros[f"{name}.weight"] for name in record.modules]
    return Inspection(
        kind="2:4 model",
        facts={
            **_model_facts(folder),
            "pattern": PATTERN,
            "method": record.method,
            "modules": len(record.modules),
            "module_zeros": _fraction(pruned),
            "zeros": _fraction(zeros.values()),
            "details": dict(record.details),
        },
        columns=("module", "out", "in", "zeros"),
        rows=tuple(
            (name, spec.out_features, spec.in_features, _fraction([zeros[f"{name}.weight"]]))
            for name, spec in record.modules.items()
        ),
    )


def _zeros(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns tensor name -> (zeros, numbers); reads one tensor at a time."""
    counted = {}
    for name, path in tensor_files(folder).items():
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
        counted[name] = (tensor.numel() - int(tensor.count_nonzero()), tensor.numel())
    return counted


def _fraction(counted: Iterable[tuple[int, int]]) -> float:
    pairs = list(counted)
    return round(sum(zeros for zeros, _ in pairs) / sum(numbers for _, numbers in pairs), 4)


def _onnx(folder: OnnxFolder) -> Inspection:
    nodes = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in folder.model.graph.node
    )
    modules = manifest_modules(folder)
    return Inspection(
        kind="onnx",
        facts={
            "dtype": folder.dtype,
            "plain_ops": folder.manifest.get("plain_ops"),
            "opsets": {opset.domain or "ai.onnx": opset.version for opset in folder.model.opset_import},
            "nodes": sum(nodes.values()),
            "operators": dict(nodes.most_common()),
            "cache_layers": folder.cache_layers,
            "weight_bytes": folder.weight_bytes(),
            "sparsity": _onnx_sparsity(folder),
            "source_sha256": folder.manifest.get("source_sha256"),
            "tools": folder.manifest.get("tools"),
        },
        columns=("module", "format", "rank", "out", "in", "density"),
        rows=tuple(_module_row(name, spec) for name, spec in modules.items()),
    )


def _onnx_sparsity(folder: OnnxFolder) -> dict[str, Any] | None:
    found = folder.sparsity
    if found is None:
        return None
    return {"pattern": found["pattern"], "method": found["method"], "modules": len(found["modules"])}


def manifest_modules(folder: OnnxFolder) -> dict[str, ModuleSpec]:
    """Returns the factorised linears that an ONNX folder records; raises InputRefusedError for a malformed one."""
    where = folder.path / MANIFEST_FILE
    entries = folder.manifest.get("modules") or {}
    if not isinstance(entries, Mapping):
        raise InputRefusedError(f"{where}: modules is {entries!r}, expected an object; export again")
    modules = {}
    for name, entry in entries.items():
        try:
            fields = {field: value for field, value in entry.items() if field != "tensors"}
            modules[name] = ModuleSpec(**fields)
        except (AttributeError, TypeError, ValueError) as error:
            raise InputRefusedError(f"{where}: modules[{name!r}]: {error}; export again") from None
    return modules


def _engine(record: EngineRecord, proof: Proof) -> Inspection:
    facts = record.to_json()
    layers = facts.pop("layers")
    engines = facts.pop("engines")
    facts["layers"] = len(layers)
    contents = proof.to_json()
    facts["layers_read_from"] = contents.pop("source")
    facts |= contents
    return Inspection(
        kind="engine",
        facts=facts,
        columns=("engine", "bytes", "compute capabilities", "sha256"),
        rows=tuple(
            (entry["file"], entry["bytes"], ", ".join(entry["compute_capabilities"]), entry["sha256"])
            for entry in engines
        ),
    )


def _model_facts(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    files = tensor_files(folder)
    names = config.get("architectures")
    dtypes: Counter[str] = Counter()
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            dtypes.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
    return {
        "architecture": str(names[0] if isinstance(names, list) and names else "unknown"),
        "tensors": len(files),
        "dtypes": dict(dtypes),
        "bytes": sum(path.stat().st_size for path in set(files.values())),
    }


def _module_row(name: str, spec: ModuleSpec) -> tuple[Any, ...]:
    rows, columns, rank = spec.out_features, spec.in_features, spec.rank
    low_rank = rank * (rows + columns) / (rows * columns)
    density = low_rank if spec.format == "lowrank" else density_for_rank(rows, columns, rank)
    return name, spec.format, rank, rows, columns, round(density, 4)


def _module_density(record: FactorizationRecord) -> float:
    dense = sum(spec.in_features * spec.out_features for spec in record.modules.values())
    return round(sum(spec.parameters() for spec in record.modules.values()) / dense, 4)
