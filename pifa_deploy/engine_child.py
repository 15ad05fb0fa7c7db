"""The build process: `python -m pifa_deploy.engine_child SPEC.json [inspect]`, the only code that builds with TensorRT.

It runs alone because a failed assertion in TensorRT aborts the process. Everything that TensorRT says
goes to standard output at the verbosity that lists the layers of the engine. It writes the engine and a
JSON result into the working directory; `pifa_deploy.engine` reads them.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from pifa_deploy import op_spec
from pifa_deploy.child_process import end_with_parent
from pifa_deploy.engine_layers import layers_in_inspector
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.onnx_folder import external_files
from pifa_deploy.onnx_passes import take_tensorrt_bodies
from pifa_deploy.plugin_library import load_library
from pifa_deploy.proof import INSPECTOR_JSON
from pifa_deploy.targets import RTX

INSPECT = "inspect"
_PARSED = Path("parsed")  # in the working directory, gone when the engine is there
_FUNCTION_NODE = re.compile(rf"\| ([^|\]]+) \((?:{'|'.join(op_spec.FORMS)})\)\]")


def main(spec_path: str, task: str = "") -> None:
    """Builds the engine that a specification describes, or inspects it.

    Args:
        spec_path: JSON object with "backend", "onnx" (path), "profile" (input -> min, opt, max),
            "compute_capabilities" (RTX only), "tf32", "sparse_weights", "plugin_library" (path or null),
            "engine" and "result" (files to write).
        task: INSPECT for the latter.
    """
    end_with_parent(signal.SIGKILL)
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    # Polygraphy reads this once, when it is imported.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if spec["backend"] == RTX else "0"
    if task == INSPECT:
        return inspect(spec)
    result = build(spec)
    Path(spec["result"]).write_text(json.dumps(result), encoding="utf-8")


def inspect(spec: dict[str, Any]) -> None:
    """Writes inspector.json: what EngineInspector tells of a built engine, for which its GPU has to be there.

    https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-tools.html
    """
    from polygraphy.backend.trt import EngineFromBytes

    trt = importlib.import_module("tensorrt_rtx" if spec["backend"] == RTX else "tensorrt")
    if spec["plugin_library"]:
        load_library(trt, spec["plugin_library"])
    engine = EngineFromBytes(Path(spec["engine"]).read_bytes())()
    keep_inspected(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON), Path.cwd())


def keep_inspected(told: str, folder: Path) -> None:
    """Writes inspector.json, which is read before build.log, and so only where it tells of layers.

    Raises:
        InputRefusedError: it tells of none; nothing is written.
    """
    # The process may die of what the engine takes in memory: half a file must not bear the name.
    partial = folder / f"{INSPECTOR_JSON}.partial"
    try:
        partial.write_text(told, encoding="utf-8")
        if not layers_in_inspector(partial, {}):
            raise InputRefusedError("TensorRT's EngineInspector told of no layer; build.log says what there is")
        partial.replace(folder / INSPECTOR_JSON)
    finally:
        partial.unlink(missing_ok=True)


def build(spec: dict[str, Any]) -> dict[str, Any]:
    """Writes the engine and returns "version", "network", "modules", "seconds" and "peak_rss_bytes"."""
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.EXTRA_VERBOSE
    trt = importlib.import_module("tensorrt_rtx" if spec["backend"] == RTX else "tensorrt")
    start = time.perf_counter()
    if spec["plugin_library"]:
        load_library(trt, spec["plugin_library"])
    builder, network, parser = NetworkFromOnnxPath(prepared(Path(spec["onnx"]), _PARSED), strongly_typed=True)()
    described, modules = describe(network), modules_of(network)
    # Parser and builder have to outlive the build: the network refers to their memory.
    with builder, network, parser:
        engine = EngineBytesFromNetwork((builder, network), _config(spec, trt))()
        with open(spec["engine"], "wb") as file:
            file.write(engine)
    shutil.rmtree(_PARSED)
    return {
        "version": trt.__version__,
        "network": described,
        "modules": modules,
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def prepared(source: Path, folder: Path) -> str:
    """Writes the graph with the bodies that suit TensorRT into a new folder; returns the file.

    Its weights are links to the files of the source: the parser reads them from beside the graph.
    """
    model = onnx.load(source, load_external_data=False)
    take_tensorrt_bodies(model)
    folder.mkdir()
    for data in external_files(model):
        os.symlink(source.resolve().parent / data, folder / data)
    target = folder / source.name
    target.write_bytes(model.SerializeToString())
    return str(target)


def describe(network: Any) -> dict[str, Any]:
    """Returns the layer count of a parsed network and output data type -> number of its layers."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    types = Counter(layer.get_output(0).dtype.name for layer in layers if layer.num_outputs)
    return {"layers": len(layers), "precision_histogram": dict(sorted(types.items()))}


def modules_of(network: Any) -> dict[str, str]:
    """Returns network layer -> PIFA node that it comes from, for layers of the plugin and of function bodies.

    A layer of the plugin is named after its node. The parser numbers the layers of a body; only their metadata,
    "[ONNX Layer: node | function node (type)]", leads back to the module.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = {layer.name: _FUNCTION_NODE.search(layer.metadata) for layer in layers}
    bodies = {name: match[1] for name, match in found.items() if match}
    return bodies | {layer.name: layer.name for layer in layers if layer.type.name == "PLUGIN_V3"}


def _config(spec: dict[str, Any], trt: Any) -> Any:
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile

    profile = Profile()
    for name, points in spec["profile"].items():
        profile.add(name, min=tuple(points["min"]), opt=tuple(points["opt"]), max=tuple(points["max"]))
    if spec["backend"] != RTX:
        return CreateConfig(
            profiles=[profile],
            tf32=spec["tf32"],
            sparse_weights=spec["sparse_weights"],
            # Without it EngineInspector knows the names of layers only.
            profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
        )
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    pairs = [tuple(map(int, capability.split("."))) for capability in spec["compute_capabilities"]]
    create = CreateConfigRTX(profiles=[profile], compute_capabilities=pairs, sparse_weights=spec["sparse_weights"])

    def set_tf32(builder: Any, network: Any, config: Any) -> None:
        # On by default, and CreateConfigRTX has no option for it.
        (config.set_flag if spec["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)

    return PostprocessConfig(create, set_tf32)


if __name__ == "__main__":
    main(*sys.argv[1:])
