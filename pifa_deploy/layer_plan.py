"""The plan: in which form each factorised layer of one checkpoint runs fastest; what `export --plan` obeys.

plan.json: {"artefact": "plan", "schema": 1, "source_sha256": "...", "dtype": "fp16", "runtime": "onnxruntime 1.31.1",
"device": "...", "workload": {"prompt": 512, "generated": 128}, "layers": {module: {"form": "stored", "fastest": {"1":
"stored", "512": "dense"}, "shape": "..."}}, "measurements": {shape: {form: {"error": ..., "us": {"1": ...}}}}}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pifa_deploy.checkpoint import read_json_object
from pifa_deploy.errors import InputMissingError, InputRefusedError, MisfitError
from pifa_deploy.layer_forms import DENSE, FORMS, LOW_RANK, STORED, as_form
from pifa_deploy.output_folder import write_json
from pifa_deploy.transformers_quantizer import factorised_modules

SCHEMA = 1
# As they are stored, and computed by the plugin or, where it is slower, by plain operators though a plugin is there.
PLUGIN = "plugin"
PLANNED = (PLUGIN, *FORMS)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What was found for one layer.

    Attributes:
        form: "stored" (plain operators), "plugin" (the same factors in the plugin), "lowrank" or "dense".
        fastest: tokens in one pass -> the fastest form there.
        shape: key of the measurement that it comes from.
    """

    form: str
    fastest: Mapping[str, str]
    shape: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which form every factorised layer of a checkpoint takes.

    Attributes:
        source_sha256: hash of the checkpoint.
        dtype: that the layers were measured in.
        runtime: and its version.
        device: name of the processor or GPU.
        workload: "prompt" and "generated" tokens that the forms were weighed for.
        layers: module -> plan.
        measurements: shape -> form -> "error" (relative to float64), "us" (tokens -> median microseconds).
    """

    source_sha256: str
    dtype: str
    runtime: str
    device: str
    workload: Mapping[str, int]
    layers: Mapping[str, LayerPlan]
    measurements: Mapping[str, Any]

    def counts(self) -> dict[str, int]:
        """Returns form -> number of layers."""
        return dict(sorted(Counter(layer.form for layer in self.layers.values()).items()))

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON values."""
        return {"artefact": "plan", "schema": SCHEMA, **asdict(self)}


def write_plan(path: Path, plan: Plan) -> None:
    """Writes a plan; raises OutputError where it cannot."""
    write_json(path, plan.to_json())


def read_plan(path: Path) -> Plan:
    """Reads and checks a plan.

    Raises:
        InputMissingError: no such file.
        InputRefusedError: not a plan of this version, or a layer without a known form.
    """
    if not path.is_file():
        raise InputMissingError(f"{path}: no such file; write a plan with `pifa-deploy bench --choose`")
    content = read_json_object(path)
    if content.get("artefact") != "plan" or content.get("schema") != SCHEMA:
        raise InputRefusedError(
            f"{path}: is {content.get('artefact')!r} of schema {content.get('schema')!r}, expected a plan of schema "
            f"{SCHEMA}; write it with `pifa-deploy bench --choose`"
        )
    layers = content.get("layers")
    if not isinstance(layers, dict) or not isinstance(content.get("source_sha256"), str):
        raise InputRefusedError(f"{path}: lacks layers or source_sha256; write it with `pifa-deploy bench --choose`")
    found = {name: _layer(path, name, value) for name, value in layers.items()}
    rest = {name: content.get(name) for name in ("dtype", "runtime", "device", "workload", "measurements")}
    return Plan(source_sha256=content["source_sha256"], layers=found, **rest)  # type: ignore[arg-type]


def _layer(path: Path, name: str, value: Any) -> LayerPlan:
    form = value.get("form") if isinstance(value, dict) else None
    if form not in PLANNED:
        raise InputRefusedError(f"{path}: layers: {name} has the form {form!r}, expected one of {', '.join(PLANNED)}")
    return LayerPlan(form=form, fastest=value.get("fastest", {}), shape=value.get("shape", ""))


def apply_plan(model: nn.Module, plan: Plan, source_sha256: str | None, where: str) -> dict[str, list[str]]:
    """Gives each factorised layer of a model, in place, the form that a plan has for it.

    Args:
        model: loaded from the plan's checkpoint.
        plan: see Plan.
        source_sha256: hash of the model's checkpoint; None (a model of the hub) is not compared.
        where: the plan's file, for messages.

    Returns:
        Form -> modules.

    Raises:
        MisfitError: the plan is of another checkpoint, or has not the same factorised layers.
    """
    if source_sha256 is not None and source_sha256 != plan.source_sha256:
        raise MisfitError(
            f"{where}: was made for a checkpoint with hash {plan.source_sha256[:12]}…, this one has "
            f"{source_sha256[:12]}…; make a plan of this one with `pifa-deploy bench --choose`"
        )
    layers = factorised_modules(model)
    if layers.keys() != plan.layers.keys():
        other = sorted(layers.keys() ^ plan.layers.keys())[0]
        raise MisfitError(f"{where}: {other} is in the plan or the checkpoint, not in both; make the plan again")
    taken: dict[str, list[str]] = {form: [] for form in PLANNED}
    for name, layer in layers.items():
        form = plan.layers[name].form
        taken[form].append(name)
        if form in (LOW_RANK, DENSE):
            model.set_submodule(name, as_form(layer, form))
    return {form: names for form, names in taken.items() if names or form == STORED}
