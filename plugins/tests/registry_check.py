"""Drives the plugin through the registry of one TensorRT: `python registry_check.py MODULE LIBRARY`, prints JSON.

Run alone, with MODULE (tensorrt_lean_bindings, tensorrt_rtx, tensorrt) importable. Only the registry is used: a lean
Runtime without a driver crashes.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import numpy as np

RANK, OUT_FEATURES = 6, 16
OPS = {"PifaLinear": "row", "PifaOrderedLinear": "row", "PifaColumnLinear": "column"}


# A field points at its value and does not own it.
KEPT: list[np.ndarray] = []


def fields_of(trt: Any, own_form: str, /, **changes: Any) -> Any:
    """Returns a field collection; a change to None leaves the field out."""
    values: dict[str, Any] = {
        "rank": np.array([RANK], np.int32),
        "out_features": np.array([OUT_FEATURES], np.int32),
        "form": own_form,
        "plugin_namespace": "pifa",
        "plugin_version": "1",
        **changes,
    }
    types = trt.PluginFieldType
    kinds = {"int32": types.INT32, "int64": types.INT64, "float32": types.FLOAT32, "int8": types.CHAR}
    fields = []
    for name, value in values.items():
        if value is not None:
            KEPT.append(np.frombuffer(value.encode(), np.int8) if isinstance(value, str) else value)
            fields.append(trt.PluginField(name, KEPT[-1], kinds[KEPT[-1].dtype.name]))
    return trt.PluginFieldCollection(fields)


def create(trt: Any, creator: Any, form: str) -> list[list[Any]]:
    """Creates for building, and for running from the fields that an engine holds; returns what the plugins say.

    The bindings neither clone a plugin in C++ nor read its fields (both return None); plugins/tests/host.cpp does.
    """
    kinds = trt.PluginCapabilityType
    built = creator.create_plugin("model.layers.0.up_proj", fields_of(trt, form), trt.TensorRTPhase.BUILD)
    saved = fields_of(trt, form, layer_name="model.layers.0.up_proj\0")
    loaded = creator.create_plugin("", saved, trt.TensorRTPhase.RUNTIME)
    said = []
    for plugin in (built, loaded):
        core = plugin.get_capability_interface(kinds.CORE)
        build = plugin.get_capability_interface(kinds.BUILD)
        runtime = plugin.get_capability_interface(kinds.RUNTIME)
        said.append([core.plugin_name, core.plugin_version, core.plugin_namespace, build.num_outputs])
        said[-1] += [each.interface_info.kind for each in (plugin, core, build, runtime)]
    return said


BAD = {
    "rank 0": {"rank": np.array([0], np.int32)},
    "rank below 0": {"rank": np.array([-1], np.int32)},
    "rank of 64 bits too large": {"rank": np.array([2**31], np.int64)},
    "rank above out_features": {"rank": np.array([OUT_FEATURES + 1], np.int32)},
    "rank is a float": {"rank": np.array([6.0], np.float32)},
    "rank missing": {"rank": None},
    "two ranks": {"rank": np.array([6, 6], np.int32)},
    "form unknown": {"form": "diagonal"},
    "form missing": {"form": None},
    "version unknown": {"plugin_version": "2"},
    "namespace unknown": {"plugin_namespace": "other"},
    "field unknown": {"surprise": np.array([1], np.int32)},
}


def refusals(trt: Any, creator: Any, form: str) -> dict[str, bool]:
    """Returns bad case -> whether the creator refused it."""
    outcome = {}
    for case, change in BAD.items():
        made = creator.create_plugin("bad layer", fields_of(trt, form, **change), trt.TensorRTPhase.BUILD)
        outcome[case] = made is None
    return outcome


def main(module: str, library: str) -> None:
    """Prints what the registry of `module` says of `library`."""
    trt = importlib.import_module(module)
    registry = trt.get_plugin_registry()

    def ours() -> list[list[str]]:
        everyone = registry.all_creators
        return sorted(
            [each.name, each.plugin_version, each.plugin_namespace] for each in everyone if "Pifa" in each.name
        )

    result: dict[str, Any] = {"trt": trt.__version__, "before": ours()}
    handle = registry.load_library(library)
    result["loaded"] = ours()
    for name, form in OPS.items():
        creator = registry.get_creator(name, "1", "pifa")
        fields = [[field.name, str(field.type).rpartition(".")[2]] for field in creator.field_names]
        wide = fields_of(trt, form, rank=np.array([RANK], np.int64))
        result[name] = {
            "field_names": fields,
            "said": create(trt, creator, form),
            "takes_64_bits": creator.create_plugin("wide", wide, trt.TensorRTPhase.BUILD) is not None,
            "refused": refusals(trt, creator, form),
        }
        del creator
    registry.deregister_library(handle)
    result["after"] = ours()
    print("RESULT" + json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
