"""The ONNX folder: model.onnx, model.onnx.data, pifa.json and the files a tokenizer needs; its contract.

pifa.json: {"schema": 1, "artefact": "onnx", "dtype": "fp16", "plain_ops": false, "op": {...}, "cache": {...},
"source_sha256": "...", "modules": {name: {"rank", "in_features", "out_features", "format", "tensors": [...]}},
"sparsity": null or {"pattern": "2:4", "method": "wanda", "modules": {name: {"in_features", "out_features",
"tensors"}}}, "files": {name: {"bytes", "sha256"}}, "tools": {package: version}}. "files" are all
files of the folder but itself; earlier exports list the graph and its data only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from pifa_deploy import op_spec
from pifa_deploy.checkpoint import read_json_object
from pifa_deploy.errors import InputMissingError, InputRefusedError
from pifa_deploy.json_shape import Fields, Named, One, validate
from pifa_deploy.sparse_checkpoint import PATTERN

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
MANIFEST_FILE = "pifa.json"
SCHEMA = 1
SHA256 = One(type="string", pattern="[0-9a-f]{64}")
_FILES = Named(value=Fields(required={"bytes": One(type="integer", least=0), "sha256": SHA256}))


@dataclass(frozen=True, kw_only=True)
class OnnxFolder:
    """A validated ONNX folder.

    Attributes:
        path: the folder.
        model: the graph, its tensor data left on disk.
        manifest: pifa.json, empty for a foreign file.
    """

    path: Path
    model: onnx.ModelProto
    manifest: Mapping[str, Any]

    @property
    def model_path(self) -> Path:
        """Path of model.onnx."""
        return self.path / MODEL_FILE

    @property
    def dtype(self) -> str:
        """Weight dtype as the export flag says it: "fp32", "fp16" or "bf16"."""
        return str(self.manifest.get("dtype") or cache_dtype(self.model) or "fp32")

    @property
    def sparsity(self) -> Mapping[str, Any] | None:
        """Pattern, method and modules of a 2:4-pruned model, None for another."""
        found: Mapping[str, Any] | None = self.manifest.get("sparsity")
        return found

    @property
    def cache_layers(self) -> int:
        """Number of key-value pairs of the graph's cache."""
        names = [str(value.name) for value in self.model.graph.input]
        return len([name for name in names if name.startswith("past_key_values.")]) // 2

    def weight_bytes(self) -> int:
        """Returns the bytes of all initializers, on disk or inline."""
        data = sum((self.path / name).stat().st_size for name in external_files(self.model))
        return int(data + sum(len(tensor.raw_data) for tensor in self.model.graph.initializer))


def open_folder(path: Path | str) -> OnnxFolder:
    """Reads and checks an ONNX folder (or the model.onnx in it).

    Raises:
        InputMissingError: no such folder or file.
        InputRefusedError: not ONNX, cut short, external data missing, too short or outside the folder, or a
            PIFA node outside its operator's contract.
    """
    path = Path(path)
    folder = path.parent if path.name == MODEL_FILE else path
    file = folder / MODEL_FILE
    if not file.is_file():
        raise InputMissingError(f"{file}: no such file; give a folder written by `pifa-deploy export`")
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:
        raise InputRefusedError(f"{file}: not a readable ONNX file ({error}); export the model again") from None
    if not model.graph.node or not model.opset_import:
        raise InputRefusedError(f"{file}: holds no graph or no opset version; export the model again")
    _check_external_data(model, folder)
    _check_nodes(model, file)
    manifest = _read_manifest(folder / MANIFEST_FILE)
    found = cache_dtype(model)
    if manifest and found and manifest["dtype"] != found:
        raise InputRefusedError(
            f"{folder / MANIFEST_FILE}: dtype is {manifest['dtype']!r}, the graph's cache is {found}; export again"
        )
    return OnnxFolder(path=folder, model=model, manifest=manifest)


def _read_manifest(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    manifest = read_json_object(file)
    if manifest.get("schema") != SCHEMA:
        raise InputRefusedError(
            f"{file}: schema is {manifest.get('schema')!r}, this program reads {SCHEMA}; export again"
        )
    # A dtype chooses the limits of a verification: a missing one must not pass for another.
    if manifest.get("dtype") not in tuple(op_spec.DTYPE_FLAGS):
        raise InputRefusedError(
            f"{file}: dtype is {manifest.get('dtype')!r}, expected one of {', '.join(op_spec.DTYPE_FLAGS)}; "
            "export again"
        )
    if not isinstance(manifest.get("source_sha256"), (str, type(None))):
        raise InputRefusedError(f"{file}: source_sha256 is {manifest['source_sha256']!r}, expected text or null")
    if "files" in manifest:
        validate(manifest["files"], _FILES, f"{file}: files")
    sparsity = manifest.get("sparsity")
    if sparsity is not None:
        _check_sparsity(sparsity, f"{file}: sparsity")
    return manifest


def _check_sparsity(value: Any, where: str) -> None:
    found = value if isinstance(value, dict) else {}
    if found.get("pattern") != PATTERN:
        raise InputRefusedError(
            f"{where} has the pattern {found.get('pattern')!r}, this program reads {PATTERN!r}; export again"
        )
    if not isinstance(found.get("method"), str) or not isinstance(found.get("modules"), dict):
        raise InputRefusedError(f"{where} lacks its method or modules, expected text and an object; export again")


def cache_dtype(model: onnx.ModelProto) -> str | None:
    """Returns the dtype of the graph's key-value cache as the export flag says it, None without a cache."""
    flags = {
        onnx.TensorProto.FLOAT: "fp32",
        onnx.TensorProto.FLOAT16: "fp16",
        onnx.TensorProto.BFLOAT16: "bf16",
    }
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            return flags.get(value.type.tensor_type.elem_type, "unknown")
    return None


def external_files(model: onnx.ModelProto) -> list[str]:
    """Returns the distinct external data file names of a model, sorted."""
    return sorted({ExternalDataInfo(tensor).location for tensor in _external_tensors(model)})


def node_attributes(node: onnx.NodeProto) -> dict[str, object]:
    """Returns a node's attributes as Python values."""
    found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def _external_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yields every tensor with external data: initializers and node attributes, in subgraphs and functions too."""
    pending: list[Any] = [model.graph, *model.functions]
    while pending:
        block = pending.pop()
        tensors, sparse = list(getattr(block, "initializer", ())), list(getattr(block, "sparse_initializer", ()))
        for attribute in (attribute for node in block.node for attribute in node.attribute):
            # An unset field reads as an empty message, which has neither tensors nor nodes.
            tensors += [attribute.t, *attribute.tensors]
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
            pending += [attribute.g, *attribute.graphs]
        tensors += [part for tensor in sparse for part in (tensor.values, tensor.indices)]
        yield from (tensor for tensor in tensors if uses_external_data(tensor))


def _check_external_data(model: onnx.ModelProto, folder: Path) -> None:
    for tensor in _external_tensors(model):
        where = f"{folder / MODEL_FILE}: {tensor.name}"
        try:
            info = ExternalDataInfo(tensor)
            offset, length, needed = info.offset or 0, info.length, _data_bytes(tensor)
        except (ValueError, TypeError) as error:
            raise InputRefusedError(f"{where} has malformed external data ({error}); export the model again") from None
        location = str(info.location)
        if os.path.isabs(location) or os.path.basename(location) != location or location in ("", ".", ".."):
            raise InputRefusedError(f"{where} takes its data from {location!r}, expected a file in the folder")
        file = folder / location
        if not file.is_file() or file.resolve().parent != folder.resolve():
            raise InputRefusedError(
                f"{file}: missing or a link out of the folder, but {tensor.name} takes its data from it; export again"
            )
        if offset < 0 or (length is not None and length != needed):
            raise InputRefusedError(f"{where} claims bytes {offset} + {length} of {location}, its shape needs {needed}")
        if offset + needed > file.stat().st_size:
            raise InputRefusedError(
                f"{file}: has {file.stat().st_size} bytes, {tensor.name} ends at {offset + needed}; "
                "the file is cut short"
            )


def _data_bytes(tensor: onnx.TensorProto) -> int:
    """Returns the bytes of a tensor's data; elements narrower than a byte are packed."""
    if any(size < 0 for size in tensor.dims):
        raise ValueError(f"shape {list(tensor.dims)}")
    bits: int = ir.DataType(tensor.data_type).bitwidth
    return (math.prod(map(int, tensor.dims)) * bits + 7) // 8


def _check_nodes(model: onnx.ModelProto, file: Path) -> None:
    versions = {opset.domain: opset.version for opset in model.opset_import}
    bodies = {(function.domain, function.name) for function in model.functions}
    for node in model.graph.node:
        if node.domain != op_spec.DOMAIN:
            continue
        where = f"{file}: {node.name or node.op_type}"
        if node.op_type not in op_spec.FORMS or versions.get(op_spec.DOMAIN) != op_spec.OP_VERSION:
            raise InputRefusedError(
                f"{where} is {node.domain}::{node.op_type} version {versions.get(op_spec.DOMAIN)}, this program knows "
                f"{', '.join(op_spec.FORMS)} version {op_spec.OP_VERSION}; export again or update pifa-deploy"
            )
        try:
            op_spec.check_attributes(node.op_type, node_attributes(node), where)
        except ValueError as error:
            raise InputRefusedError(str(error)) from None
        if (node.domain, node.op_type) not in bodies:
            raise InputRefusedError(f"{where} has no function body in the file, which is cut short; export again")
