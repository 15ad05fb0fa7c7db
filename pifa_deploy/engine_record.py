"""engine.json: what stands beside an engine and says what it was built from, for what, and how."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pifa_deploy.checkpoint import read_json_object
from pifa_deploy.digest import sha256_if_there
from pifa_deploy.engine_schema import FILE, LAYER, POINTS, SCHEMA, check_engine_json
from pifa_deploy.errors import InputMissingError, InputRefusedError, MisfitError
from pifa_deploy.onnx_folder import MODEL_FILE, OnnxFolder, external_files

ENGINE_JSON = "engine.json"
_LAYER = re.compile(r"^\s+Name: (?P<name>.+?), LayerType: (?P<type>[^,]+), Inputs: (?P<rest>.*)$")
_NUMBERING = re.compile(r"(_U\d+)?_myl\d+_\d+$")
DATA_TYPES = "FP32|FP16|BF16|FP8|FP4|INT8|INT4|INT32|INT64|UINT8|Float|Half|BFloat16|Bool"
# "Datatype: Half", or in words as "Format/Datatype: Row major linear FP16 format".
DATATYPE = re.compile(rf"Datatype: (?:[^,\]}}]*?\b(?=(?:{DATA_TYPES})\b))?(\w+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """One engine: its file name in the folder, size, hash and the compute capabilities it runs on."""

    file: str
    bytes: int
    sha256: str
    compute_capabilities: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """One layer of a built engine.

    Attributes:
        name: as the builder calls it.
        type: "gemm", "kgen" (a generated kernel), ...
        precision: data type of its first output, "none" if it writes nothing.
        modules: PifaLinear modules whose products it computes; several when the builder merged them.
    """

    name: str
    type: str
    precision: str
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """The content of engine.json.

    Attributes:
        backend: "tensorrt-rtx" or "tensorrt".
        version: of the builder.
        onnx_sha256: file name -> SHA-256 of model.onnx and each of its data files.
        compute_capabilities: what the engines were built for.
        targets: names of the GPUs that were asked for, () when only capabilities were.
        profiles: per profile, input name -> {"min", "opt", "max"} -> dimensions.
        layers: the engine's layers in order of execution, as the build log lists them.
        precision_histogram: output data type -> number of engine layers.
        network: the parsed network before optimisation: "layers", "precision_histogram", "modules", the names of
            all PIFA modules, and "linears", ONNX node -> linear layer of the model.
        memory: bytes that the build log states: "activations", "weights", "scratch".
        engines: the engine files.
        options: the build options, without paths.
        sparse_weights: whether the builder was allowed to use 2:4 sparse kernels.
        tokenizer: names of the tokenizer and configuration files that were copied from the ONNX folder.
        seconds: wall time of the build, parsing included.
        peak_rss_bytes: peak resident memory of the build process.
    """

    backend: str
    version: str
    onnx_sha256: Mapping[str, str]
    compute_capabilities: tuple[str, ...]
    targets: tuple[str, ...] = ()
    profiles: tuple[Mapping[str, Mapping[str, tuple[int, ...]]], ...]
    layers: tuple[EngineLayer, ...] = ()
    precision_histogram: Mapping[str, int] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    engines: tuple[EngineFile, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    sparse_weights: bool = False
    tokenizer: tuple[str, ...] = ()
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object of engine.json."""
        value = asdict(self)
        value["onnx"] = {"sha256": value.pop("onnx_sha256")}
        return {"schema": SCHEMA, **value}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> EngineRecord:
        """Parses and checks an engine.json object; `where` names the file in errors.

        Raises:
            InputRefusedError: a field is missing or has a value outside the contract.
        """
        check_engine_json(value, where)
        return cls(
            backend=value["backend"],
            version=value["version"],
            onnx_sha256=value["onnx"]["sha256"],
            compute_capabilities=tuple(value["compute_capabilities"]),
            targets=tuple(value.get("targets", ())),
            profiles=tuple(
                {name: {point: tuple(points[point]) for point in POINTS} for name, points in profile.items()}
                for profile in value["profiles"]
            ),
            layers=tuple(
                EngineLayer(**{name: layer[name] for name in LAYER}, modules=tuple(layer.get("modules", ())))
                for layer in value.get("layers", ())
            ),
            precision_histogram=value.get("precision_histogram", {}),
            network=value.get("network", {}),
            memory=value.get("memory", {}),
            engines=tuple(
                EngineFile(
                    **{name: engine[name] for name in FILE},
                    compute_capabilities=tuple(engine["compute_capabilities"]),
                )
                for engine in value["engines"]
            ),
            options=value.get("options", {}),
            sparse_weights=value.get("sparse_weights", False),
            tokenizer=tuple(value.get("tokenizer", ())),
            seconds=float(value["seconds"]),
            peak_rss_bytes=value["peak_rss_bytes"],
        )

    def engine_for(self, compute_capability: str) -> EngineFile:
        """Returns the engine that runs on a GPU of this compute capability.

        Raises:
            MisfitError: none does; the message says what the engines were built for.
        """
        for engine in self.engines:
            if compute_capability in engine.compute_capabilities:
                return engine
        raise MisfitError(
            f"the engine was built by {self.backend} {self.version} for compute capability "
            f"{', '.join(self.compute_capabilities)}, this GPU has {compute_capability}; build it again with "
            f"--compute-capabilities {compute_capability}"
        )


def is_engine(path: Path | str) -> bool:
    """Whether a path is an engine folder, or the engine.json in one."""
    return Path(path).name == ENGINE_JSON or (Path(path) / ENGINE_JSON).is_file()


def read_engine_json(path: Path | str) -> EngineRecord:
    """Returns the checked content of an engine folder's engine.json.

    Args:
        path: the folder or the file; engine files are checked for presence and size, not hashed.

    Raises:
        InputMissingError: no such file.
        InputRefusedError: it is malformed, or an engine file is missing or of another size.
    """
    file = Path(path) / ENGINE_JSON if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputMissingError(f"{file}: no such file; give a folder written by `pifa-deploy build`")
    record = EngineRecord.from_json(read_json_object(file), str(file))
    for engine in record.engines:
        found = file.parent / engine.file
        size = found.stat().st_size if found.is_file() else None
        if size != engine.bytes:
            raise InputRefusedError(
                f"{found}: its size is {size}, expected {engine.bytes} bytes as {file.name} says; build the engine "
                "again"
            )
    return record


def layers_in_log(log: str, modules: Mapping[str, str] | None = None) -> tuple[EngineLayer, ...]:
    """Returns the engine layers that a verbose build log lists, () where it lists none.

    Args:
        log: text of the build log.
        modules: layer of the parsed network -> module it belongs to. An engine layer is named after the
            network layers that it computes, joined by "+", and a running number.
    """
    layers = []
    for found in filter(None, map(_LAYER.match, log.splitlines())):
        types = DATATYPE.findall(found["rest"].partition("Outputs: [")[2])
        parts = [_NUMBERING.sub("", part) for part in found["name"].split("+")]
        layers.append(
            EngineLayer(
                name=found["name"],
                type=found["type"],
                precision=types[0] if types else "none",
                modules=tuple(modules[part] for part in parts if part in modules) if modules else (),
            )
        )
    return tuple(layers)


def memory_in_log(log: str) -> dict[str, int]:
    """Returns the byte counts that a verbose build log states; what it does not state is left out."""
    labels = {
        "activations": "Total Activation Memory",
        "weights": "Total Weights Memory",
        "scratch": "Max Scratch Memory",
    }
    found = {name: re.search(rf"{label}: (\d+) bytes", log) for name, label in labels.items()}
    return {name: int(match[1]) for name, match in found.items() if match}


def histogram(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """Returns precision -> number of layers."""
    return dict(sorted(Counter(layer.precision for layer in layers).items()))


def check_origin(record: EngineRecord, engine: Path, folder: OnnxFolder) -> None:
    """Raises InputRefusedError unless an engine folder was built from exactly the files of an ONNX folder.

    Args:
        record: of the engine.
        engine: its folder, whose tokenizer and configuration files are copies of the ONNX folder's.
        folder: the ONNX folder.
    """
    files, named = {MODEL_FILE, *external_files(folder.model)}, set(record.onnx_sha256)
    if named != files:
        raise InputRefusedError(
            f"{engine}: engine.json has the hashes of {', '.join(sorted(named))}, expected those of the graph's files "
            f"{', '.join(sorted(files))} in {folder.path}; name the ONNX folder it came from or build again"
        )
    expected = dict(record.onnx_sha256)
    for name in record.tokenizer:
        copied = sha256_if_there(engine / name)
        if copied is None:
            raise InputRefusedError(f"{engine / name} is not there, engine.json lists it; build the engine again")
        expected[name] = copied
    for name, digest in expected.items():
        file = folder.path / name
        if (found := sha256_if_there(file)) != digest:
            verb = "was built from" if name in record.onnx_sha256 else "has"
            raise InputRefusedError(
                f"{engine}: {verb} a {name} with hash {digest[:12]}…, {file} "
                f"{'has another' if found else 'is not there'}; name the ONNX folder it came from or build again"
            )
