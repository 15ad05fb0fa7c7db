"""What an engine really contains: precisions, plugin layers, fused layers, sparse kernels.

The sources, best first: inspector.json in the engine folder (what TensorRT's EngineInspector or `trtexec
--exportLayerInfo` writes on a GPU machine), the layer list of build.log, and the layers in engine.json.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pifa_deploy.build_log import BUILD_LOG
from pifa_deploy.engine_layers import (
    ProvenLayer,
    SparseTactics,
    bits_of,
    layers_in_build_log,
    layers_in_inspector,
    layers_in_record,
    sparse_tactics,
)
from pifa_deploy.engine_record import read_engine_json

INSPECTOR_JSON = "inspector.json"
PRECISIONS = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8}


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What an engine contains.

    Attributes:
        source: file that the layers were read from.
        layers: in order of execution.
        modules: PIFA modules of the ONNX folder; None: the engine's record does not list them.
        sparsity: see SparseTactics.
    """

    source: str
    layers: tuple[ProvenLayer, ...]
    modules: tuple[str, ...] | None
    sparsity: SparseTactics

    @property
    def products(self) -> tuple[ProvenLayer, ...]:
        """The layers that multiply matrices."""
        return tuple(layer for layer in self.layers if layer.multiplies)

    @property
    def plugin_modules(self) -> tuple[str, ...]:
        """PIFA modules that a plugin layer computes."""
        return tuple(sorted({module for layer in self.layers if layer.plugin for module in layer.modules}))

    def to_json(self) -> dict[str, Any]:
        """Returns the findings as JSON values."""
        sparsity = self.sparsity
        return {
            "source": self.source,
            "layers": len(self.layers),
            "types": _counted(layer.type for layer in self.layers),
            "precisions": _counted(layer.precision or "unknown" for layer in self.layers),
            "matrix_layers": len(self.products),
            "matrix_precisions": _counted(layer.precision or "unknown" for layer in self.products),
            "plugin_layers": sum(layer.plugin for layer in self.layers),
            "fused_layers": sum(layer.sources > 1 for layer in self.layers),
            "modules": None if self.modules is None else len(self.modules),
            "plugin_modules": len(self.plugin_modules),
            "sparse_allowed": sparsity.allowed,
            "sparse_eligible": sparsity.eligible,
            "sparse_picked": sparsity.picked,
            "sparse_layers": list(sparsity.picked_layers),
            "sparse_label": sparsity.label,
        }


@dataclass(frozen=True, kw_only=True)
class ProofGates:
    """What an engine must contain; nothing is asked for by default.

    Attributes:
        precision: widest allowed precision of a layer that multiplies matrices, a key of PRECISIONS.
        plugin: every PIFA module is computed by a plugin layer.
        sparse: at least one layer runs in a sparse kernel.
    """

    precision: str | None = None
    plugin: bool = False
    sparse: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown precision."""
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ValueError(f"required precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}")

    @property
    def asked(self) -> bool:
        """Whether anything must be there."""
        return self.precision is not None or self.plugin or self.sparse


@dataclass(frozen=True, kw_only=True)
class ProofDecision:
    """One decision; `passed` is None where the sources do not say enough, and `reason` what is missing."""

    name: str
    value: str
    limit: str
    passed: bool | None
    reason: str = ""


def prove(folder: Path | str) -> Proof:
    """Reads what an engine folder says of its engine.

    Raises:
        InputMissingError, InputRefusedError: as `read_engine_json`; the latter also for a malformed inspector.json.
    """
    record = read_engine_json(folder)
    place = Path(folder) if Path(folder).is_dir() else Path(folder).parent
    log_file, inspector = place / BUILD_LOG, place / INSPECTOR_JSON
    log = log_file.read_text(encoding="utf-8", errors="replace") if log_file.is_file() else ""
    told = {layer.name: layer.modules for layer in record.layers}
    source, layers = "engine.json", layers_in_record(record)
    if inspector.is_file():
        source, layers = INSPECTOR_JSON, layers_in_inspector(inspector, told)
    elif found := layers_in_build_log(log, told):
        source, layers = BUILD_LOG, found
    modules = record.network.get("modules")
    return Proof(
        source=source,
        layers=layers,
        modules=tuple(map(str, modules)) if isinstance(modules, list | tuple) else None,
        sparsity=sparse_tactics(log, allowed=record.sparse_weights),
    )


def judge_proof(proof: Proof, gates: ProofGates) -> tuple[ProofDecision, ...]:
    """Decides whether an engine contains what it must."""
    decisions = []
    if gates.precision is not None:
        decisions.append(_judge_precision(proof, gates.precision))
    if gates.plugin:
        decisions.append(_judge_plugin(proof))
    if gates.sparse:
        decisions.append(_judge_sparse(proof.sparsity))
    return tuple(decisions)


def judge_proofs(proofs: Mapping[str, Proof], gates: ProofGates) -> dict[str, tuple[ProofDecision, ...]]:
    """Decides about several engines, each under its name.

    The plugin is asked of those with PIFA modules, sparse kernels of those built with leave to use them; each of all
    engines where there is none of these.
    """
    factorised = {name for name, proof in proofs.items() if proof.modules != ()} or set(proofs)
    sparse = {name for name, proof in proofs.items() if proof.sparsity.allowed} or set(proofs)
    found = {}
    for name, proof in proofs.items():
        asked = replace(gates, plugin=gates.plugin and name in factorised, sparse=gates.sparse and name in sparse)
        found[name] = judge_proof(proof, asked)
    return found


def _judge_precision(proof: Proof, limit: str) -> ProofDecision:
    products, bits = proof.products, PRECISIONS[limit]
    wide = [layer for layer in products if bits_of(layer.precision) > bits]
    hidden = [
        layer.name for layer in proof.layers if layer.opaque or (layer.multiplies and not bits_of(layer.precision))
    ]
    found = ", ".join(f"{count} {name}" for name, count in _counted(layer.precision for layer in products).items())
    reason = ""
    if wide:
        reason = f"wider: {_some(layer.name for layer in wide)}"
    elif hidden:
        reason = f"{proof.source} does not say what these compute in: {_some(hidden)}"
    elif not products:
        reason = f"{proof.source} lists no layer that multiplies matrices"
    passed = False if wide else None if reason else True
    return ProofDecision(name="precision", value=found or "no layers", limit=limit, passed=passed, reason=reason)


def _judge_plugin(proof: Proof) -> ProofDecision:
    limit = "every PIFA module in a plugin layer"
    if proof.modules is None:
        reason = "engine.json does not list the PIFA modules; build the engine again"
        value = f"{len(proof.plugin_modules)} modules"
        return ProofDecision(name="plugin", value=value, limit=limit, passed=None, reason=reason)
    value = f"{len(proof.plugin_modules)} of {len(proof.modules)} modules"
    if not proof.modules:
        return ProofDecision(
            name="plugin", value=value, limit=limit, passed=None, reason="the model has no PIFA module"
        )
    missing = sorted(set(proof.modules) - set(proof.plugin_modules))
    reason = f"without: {_some(missing)}" if missing else ""
    return ProofDecision(name="plugin", value=value, limit=limit, passed=not missing, reason=reason)


def _judge_sparse(sparsity: SparseTactics) -> ProofDecision:
    value = "not stated" if sparsity.picked is None else f"{sparsity.picked} layers"
    passed: bool | None = bool(sparsity.picked)
    reason = ""
    if not sparsity.allowed:
        reason = "the engine was built without leave to use sparse kernels; build with --sparsity enable"
    elif sparsity.picked is None:
        passed, reason = None, "the build log says nothing of sparse tactics"
    elif not passed:
        reason = f"{sparsity.eligible or 0} layers were eligible, a dense kernel was faster for each"
    return ProofDecision(name="sparse", value=value, limit="at least 1 layer", passed=passed, reason=reason)


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
