"""engine.json: what stands beside an engine and says what it was built from, for what, and how."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pifa_deploy.checkpoint import read_json_object
from pifa_deploy.errors import InputMissingError, InputRefusedError, MisfitError
from pifa_deploy.targets import BACKENDS

ENGINE_JSON = "engine.json"
SCHEMA = 1
_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "seconds": ((float, int), "a number"),
    "peak_rss_bytes": (int, "a number"),
    "layers": (list, "a list"),
    "profiles": (list, "a list"),
    "targets": (list, "a list"),
    "tokenizer": (list, "a list"),
    "sparse_weights": (bool, "true or false"),
}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CAPABILITY = re.compile(r"\d{1,2}\.\d")
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
        _expect(value.get("schema") == SCHEMA, where, "schema", value.get("schema"), str(SCHEMA))
        _expect(value.get("backend") in BACKENDS, where, "backend", value.get("backend"), f"one of {BACKENDS}")
        for name in ("version", "onnx", "engines", "profiles", "compute_capabilities", "seconds", "peak_rss_bytes"):
            _expect(name in value, where, name, None, "a value")
        for name, (kind, expected) in _TYPES.items():
            _expect(name not in value or isinstance(value[name], kind), where, name, value.get(name), expected)
        onnx = value["onnx"]
        sha256 = onnx.get("sha256") if isinstance(onnx, Mapping) else None
        _expect(_is_hashes(sha256), where, "onnx.sha256", sha256, "file name -> 64 hexadecimal digits")
        profiles = tuple(_profile(profile, f"{where}: profiles[{i}]") for i, profile in enumerate(value["profiles"]))
        _expect(bool(profiles), where, "profiles", value["profiles"], "at least one")
        return cls(
            backend=value["backend"],
            version=str(value["version"]),
            onnx_sha256=dict(sha256 or {}),
            compute_capabilities=_capabilities(value["compute_capabilities"], where, "compute_capabilities"),
            targets=tuple(map(str, value.get("targets", ()))),
            profiles=profiles,
            layers=tuple(_layer(layer, f"{where}: layers[{i}]") for i, layer in enumerate(value.get("layers", ()))),
            precision_histogram=_object(value, "precision_histogram", where),
            network=_object(value, "network", where),
            memory=_object(value, "memory", where),
            engines=_engines(value["engines"], where),
            options=_object(value, "options", where),
            sparse_weights=value.get("sparse_weights", False),
            tokenizer=tuple(map(str, value.get("tokenizer", ()))),
            seconds=float(value["seconds"]),
            peak_rss_bytes=int(value["peak_rss_bytes"]),
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
        _expect(size == engine.bytes, str(found), "its size", size, f"{engine.bytes} bytes as {file.name} says")
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


def _expect(holds: bool, where: str, name: str, found: object, expected: str) -> None:
    if not holds:
        raise InputRefusedError(f"{where}: {name} is {found!r}, expected {expected}; build the engine again")


def _is_hashes(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(digest, str) and _SHA256.fullmatch(digest) for digest in value.values())
    )


def _object(value: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    found = value.get(name, {})
    _expect(isinstance(found, Mapping), where, name, found, "an object")
    return dict(found)


def _capabilities(value: object, where: str, name: str) -> tuple[str, ...]:
    found = value if isinstance(value, list | tuple) else []
    sound = bool(found) and all(isinstance(each, str) and _CAPABILITY.fullmatch(each) for each in found)
    _expect(sound, where, name, value, 'a list such as ["8.6"]')
    return tuple(found)


def _engines(value: object, where: str) -> tuple[EngineFile, ...]:
    _expect(isinstance(value, list) and bool(value), where, "engines", value, "a list of engine files")
    engines = []
    for i, entry in enumerate(value if isinstance(value, list) else []):
        place = f"{where}: engines[{i}]"
        _expect(isinstance(entry, Mapping), place, "entry", entry, "an object")
        name, size, digest = entry.get("file"), entry.get("bytes"), entry.get("sha256")
        plain = isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name
        _expect(plain, place, "file", name, "a file name inside the folder")
        _expect(isinstance(size, int) and size > 0, place, "bytes", size, "a positive integer")
        _expect(_is_hashes({"sha256": digest}), place, "sha256", digest, "64 hexadecimal digits")
        capabilities = _capabilities(entry.get("compute_capabilities"), place, "compute_capabilities")
        engines.append(EngineFile(file=name, bytes=size, sha256=digest, compute_capabilities=capabilities))
    return tuple(engines)


def _profile(value: object, where: str) -> dict[str, dict[str, tuple[int, ...]]]:
    _expect(isinstance(value, Mapping), where, "profile", value, "input name -> min, opt, max")
    profile: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, points in (value if isinstance(value, Mapping) else {}).items():
        sound = isinstance(points, Mapping) and all(_is_shape(points.get(point)) for point in ("min", "opt", "max"))
        _expect(sound, where, name, points, "min, opt and max, each a list of sizes >= 0")
        profile[str(name)] = {point: tuple(points[point]) for point in ("min", "opt", "max")}
    return profile


def _is_shape(value: object) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in value
    )


def _layer(value: object, where: str) -> EngineLayer:
    sound = isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("name", "type", "precision"))
    _expect(sound, where, "layer", value, "name, type and precision")
    entry = value if isinstance(value, Mapping) else {}
    modules = entry.get("modules", [])
    _expect(isinstance(modules, list), where, "modules", modules, "a list of names")
    return EngineLayer(
        name=entry["name"], type=entry["type"], precision=entry["precision"], modules=tuple(map(str, modules))
    )
