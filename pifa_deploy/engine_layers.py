"""The layers of an engine and its sparse kernels, as the builder's log and TensorRT's EngineInspector tell them.

TensorRT states its sparse kernels once for each selection of tactics; the last statement belongs to the engine:

    (Sparsity) Found N layer(s) eligible to use sparse tactics: a, b    eligible: the weights are 2:4
    (Sparsity) Chose M layer(s) using sparse tactics: a                 picked: and the sparse kernel was the faster

Older versions say "Layers eligible for sparse math:" and "TRT inference plan picked sparse implementation for layers:".
TensorRT-RTX says neither: it picks kernels on the device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pifa_deploy.checkpoint import read_json_object
from pifa_deploy.engine_record import DATA_TYPES, DATATYPE, EngineRecord
from pifa_deploy.errors import InputRefusedError

NOT_PICKED = "2:4, not picked"
_BITS = {
    **dict.fromkeys(("float", "fp32", "float32", "tf32"), 32),
    **dict.fromkeys(("half", "fp16", "float16", "bf16", "bfloat16"), 16),
    **dict.fromkeys(("fp8", "int8"), 8),
    **dict.fromkeys(("fp4", "int4"), 4),
}
_PLUGIN = re.compile(r"plugin|custom_layer", re.IGNORECASE)
_MULTIPLIES = re.compile(r"gemm|matmul|matrix_?multiply|conv|fully_?connected|fusion|mha|attention", re.IGNORECASE)
# A generated layer is named after what it computes: __myl_FcAdd_myl1_7. Conc and Cast are no convolutions.
_GENERATED = re.compile(r"^__myl_(?:[A-Z][a-z]*)*?(?:Fc|Matm|Gemm|Conv|Dot|Mha)(?![a-z])")
_OPAQUE = re.compile(r"ForeignNode|myelin$|trainstation", re.IGNORECASE)
_LOG_LAYER = re.compile(
    r"^\s+Name: (?P<name>.+?), LayerType: (?P<type>[^,]+), Inputs: (?P<inputs>.*?)(?:, Constants: |, Outputs: )"
)
# "node_linear_3", or "node of a function body | node that calls it (type)".
_SOURCE = re.compile(r"\[ONNX Layer: (?:[^\]|]* \| )*([^\]|]+?)(?: \([^()\]]*\))?\]")
_WORD = re.compile(rf"\b({DATA_TYPES})\b", re.IGNORECASE)
_ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Found (\d+) layer\(s\) eligible to use sparse tactics|Layers eligible for sparse math)(.*)"
)
_PICKED = re.compile(
    r"\(Sparsity\) (?:Chose (\d+) layer\(s\) using sparse tactics|"
    r"TRT inference plan picked sparse implementation for layers)(.*)"
)


@dataclass(frozen=True, kw_only=True)
class ProvenLayer:
    """One layer of an engine.

    Attributes:
        name: as the builder calls it.
        type: "gemm", "kgen", "custom_layer", "PluginV3", ...
        precision: the widest data type among its floating-point inputs, where the source lists inputs; otherwise of its
            first output; "" where neither is known.
        sources: ONNX nodes or network layers that it computes.
        modules: PIFA modules whose products it computes.
    """

    name: str
    type: str
    precision: str
    sources: int = 1
    modules: tuple[str, ...] = ()

    @property
    def plugin(self) -> bool:
        """Whether a plugin computes it."""
        return bool(_PLUGIN.search(self.type))

    @property
    def opaque(self) -> bool:
        """Whether it is a subgraph whose layers the source does not list."""
        return not self.type or bool(_OPAQUE.search(self.type) or self.name.startswith("{ForeignNode"))

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies matrices."""
        named = _MULTIPLIES.search(self.type) or _GENERATED.search(self.name)
        return bool(self.modules) or self.plugin or bool(named)


@dataclass(frozen=True, kw_only=True)
class SparseTactics:
    """What the builder said of 2:4 kernels.

    Attributes:
        allowed: whether it was allowed to use them.
        eligible: number of layers whose weights are 2:4; None: the log does not say.
        picked: number of layers that run in a sparse kernel; None: the log does not say.
        picked_layers: their names, where the log lists them.
    """

    allowed: bool
    eligible: int | None = None
    picked: int | None = None
    picked_layers: tuple[str, ...] = ()

    @property
    def label(self) -> str | None:
        """How an engine with leave to use sparse kernels has to be called; None without leave."""
        if not self.allowed:
            return None
        return "2:4" if self.picked else NOT_PICKED


def sparse_tactics(log: str, *, allowed: bool) -> SparseTactics:
    """Returns what a build log says of sparse kernels."""
    eligible, picked = list(_ELIGIBLE.finditer(log)), list(_PICKED.finditer(log))
    return SparseTactics(
        allowed=allowed,
        eligible=_stated(eligible[-1])[0] if eligible else None,
        picked=_stated(picked[-1])[0] if picked else None,
        picked_layers=_stated(picked[-1])[1] if picked else (),
    )


def layers_in_record(record: EngineRecord) -> tuple[ProvenLayer, ...]:
    """Returns the layers of engine.json, which has the data type of each layer's first output only."""
    return tuple(
        ProvenLayer(name=layer.name, type=layer.type, precision=layer.precision, modules=layer.modules)
        for layer in record.layers
    )


def layers_in_build_log(log: str, modules: Mapping[str, tuple[str, ...]]) -> tuple[ProvenLayer, ...]:
    """Returns the layers that a verbose build log lists; `modules`: layer -> its PIFA modules."""
    layers = []
    for line in log.splitlines():
        found = _LOG_LAYER.match(line)
        if not found:
            continue
        name, outputs = found["name"], line.partition(", Outputs: ")[2].partition(", TacticName:")[0]
        layers.append(
            ProvenLayer(
                name=name,
                type=found["type"],
                precision=_widest(DATATYPE.findall(found["inputs"]), DATATYPE.findall(outputs)),
                sources=max(line.count("[ONNX Layer: "), 1),
                modules=modules.get(name, ()),
            )
        )
    return tuple(layers)


def modules_of_layers(log: str, nodes: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Returns layer -> the linears whose time it is, by what a verbose build log says of its origin.

    These are the linears of its ONNX nodes where it multiplies matrices or computes nothing else: a kernel that only
    moves a linear's outputs on their way through attention is attention's.

    Args:
        log: text of the build log.
        nodes: node of the ONNX graph -> linear; a call of a PIFA operator is named after its module.
    """
    found = {}
    kinds = {layer.name: layer for layer in layers_in_build_log(log, {})}
    for match in filter(None, map(_LOG_LAYER.match, log.splitlines())):
        owners = [nodes.get(source) for source in _SOURCE.findall(match.string)]
        modules = tuple(dict.fromkeys(owner for owner in owners if owner))
        if modules and (kinds[match["name"]].multiplies or None not in owners):
            found[match["name"]] = modules
    return found


def layers_in_inspector(file: Path, modules: Mapping[str, tuple[str, ...]]) -> tuple[ProvenLayer, ...]:
    """Returns the layers that EngineInspector wrote as JSON; raises InputRefusedError for another file."""
    entries = read_json_object(file).get("Layers")
    if not isinstance(entries, list) or not all(isinstance(entry, str | dict) for entry in entries):
        raise InputRefusedError(f"{file}: Layers is no list of layers; write it again with TensorRT's EngineInspector")
    layers = []
    for entry in entries:
        # An engine built without detailed profiling verbosity gives names only.
        fields = {"Name": entry} if isinstance(entry, str) else entry
        name = str(fields.get("Name", ""))
        layers.append(
            ProvenLayer(
                name=name,
                type=str(fields.get("LayerType", "")),
                precision=_widest(_inspected(fields.get("Inputs")), _inspected(fields.get("Outputs"))),
                sources=max(str(fields.get("Metadata", "")).count("[ONNX Layer: "), 1),
                modules=modules.get(name, ()),
            )
        )
    return tuple(layers)


def _inspected(tensors: object) -> list[str]:
    """Returns the data types of a layer's tensors: "Half", or found in words as "Row major linear FP16 format"."""
    words = []
    for tensor in tensors if isinstance(tensors, list) else []:
        if isinstance(tensor, dict):
            words += _WORD.findall(str(tensor.get("Datatype") or tensor.get("Format/Datatype") or ""))[:1]
    return words


def _widest(inputs: Sequence[str], outputs: Sequence[str]) -> str:
    known = [name for name in inputs if bits_of(name)] or [name for name in outputs[:1] if bits_of(name)]
    return max(known, key=bits_of) if known else (outputs[0] if outputs else "")


def bits_of(name: str) -> int:
    """Returns the bits of a floating-point or quantised data type, 0 for any other."""
    return _BITS.get(name.lower(), 0)


def _stated(match: re.Match[str]) -> tuple[int, tuple[str, ...]]:
    names = tuple(name for name in (each.strip() for each in match[2].lstrip(": ").split(",")) if name)
    return (int(match[1]) if match[1] else len(names)), names
