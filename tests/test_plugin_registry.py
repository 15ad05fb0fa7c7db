"""The plugin library inside real TensorRT: the registries of 10, 11 and RTX, and an engine of RTX. No GPU is used."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from pifa_deploy import op_spec
from pifa_deploy.engine import BuildOptions, build_engines
from pifa_deploy.engine_record import EngineRecord, read_engine_json
from pifa_deploy.errors import BuildError
from pifa_deploy.onnx_passes import function_body
from pifa_deploy.plugin_build import PluginBuildOptions, build_library
from pifa_deploy.plugin_library import describe_library

pytest_plugins = ("plugin_fixtures",)

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
CHECK = PLUGINS / "tests" / "registry_check.py"
# Where a registry is, and the major version that its library calls its own.
FLAVOURS = {"lean10": 10, "lean11": 11, "tensorrt_rtx": 1}
# `make` puts the wheels of the lean runtime there, one folder each: both install the same module.
LEAN_ROOT = Path(os.environ.get("PIFA_LEAN_ROOT", sys.prefix))
OPS = tuple(sorted(op_spec.FORMS))


# --- registries -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FLAVOURS)
def said(request: pytest.FixtureRequest, plugin_library: Path) -> dict[str, Any]:
    """What plugins/tests/registry_check.py prints, run in a process of its own."""
    flavour: str = request.param
    environment = dict(os.environ)
    module = "tensorrt_lean_bindings"
    if flavour.startswith("lean"):
        folder = LEAN_ROOT / flavour
        if not folder.is_dir():
            pytest.skip(f"TensorRT {flavour.removeprefix('lean')} lean is not in {folder}: run `make lean-runtimes`")
        environment["PYTHONPATH"] = str(folder)
    else:
        module = flavour
        if importlib.util.find_spec(module) is None:
            pytest.skip("TensorRT-RTX is not installed: pip install 'pifa-deploy[rtx]'")
    command = [sys.executable, str(CHECK), module, str(plugin_library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.partition("RESULT")[2])
    return {**result, "messages": done.stderr, "flavour": flavour}


@pytest.mark.tensorrt
def test_the_registry_is_of_the_version_that_was_asked_for(said: dict[str, Any]) -> None:
    assert said["trt"].startswith(f"{FLAVOURS[said['flavour']]}.")


@pytest.mark.tensorrt
def test_loading_registers_a_creator_for_each_operator_and_unloading_removes_them(said: dict[str, Any]) -> None:
    assert said["before"] == []
    assert said["loaded"] == [[name, op_spec.PLUGIN_VERSION, op_spec.PLUGIN_NAMESPACE] for name in OPS]
    assert said["after"] == []


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", OPS)
def test_a_creator_announces_the_attributes_of_the_contract(said: dict[str, Any], name: str) -> None:
    announced = [[field, "INT32"] for field in op_spec.INT_ATTRIBUTES]
    announced += [[field, "CHAR"] for field in op_spec.STRING_ATTRIBUTES]
    assert said[name]["field_names"] == announced


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", OPS)
def test_a_plugin_is_made_for_building_and_for_running(said: dict[str, Any], name: str) -> None:
    identity = [name, op_spec.PLUGIN_VERSION, op_spec.PLUGIN_NAMESPACE, 1]
    kinds = ["PLUGIN", "PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD", "PLUGIN_V3ONE_RUNTIME"]
    assert said[name]["said"] == 2 * [[*identity, *kinds]]
    assert said[name]["takes_64_bits"]


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", OPS)
def test_bad_fields_give_no_plugin_and_a_message_that_names_the_layer(said: dict[str, Any], name: str) -> None:
    refused = said[name]["refused"]
    assert len(refused) == 12
    assert [case for case, was in refused.items() if not was] == []
    lines = [line for line in said["messages"].splitlines() if line.startswith(f"[E] pifa::{name} ")]
    assert len(lines) == len(refused)
    assert all(line.startswith(f"[E] pifa::{name} layer 'bad layer': ") for line in lines)


@pytest.fixture(scope="module")
def registry_host(plugin_programs: Callable[..., Path]) -> Path:
    return plugin_programs("registry_host") / "registry_host"


def runtime_library(flavour: str) -> Path:
    """The shared library of a TensorRT that has a registry, or a skip that says what to install."""
    if flavour == "tensorrt_rtx":
        spec = importlib.util.find_spec("tensorrt_rtx_libs")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("TensorRT-RTX is not installed: pip install 'pifa-deploy[rtx]'")
        return Path(spec.submodule_search_locations[0]) / "libtensorrt_rtx.so.1"
    major = flavour.removeprefix("lean")
    library = LEAN_ROOT / flavour / "tensorrt_lean_libs" / f"libnvinfer_lean.so.{major}"
    if not library.is_file():
        pytest.skip(f"there is no {library}: run `make lean-runtimes`")
    return library


def check_in_cpp(registry_host: Path, flavour: str, plugin: Path) -> None:
    command = [registry_host, runtime_library(flavour), plugin]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"20 checks with version {FLAVOURS[flavour]}\n"


@pytest.mark.tensorrt
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_fields_come_back_byte_for_byte_through_a_registry(
    registry_host: Path, plugin_library: Path, flavour: str
) -> None:
    # Only a program in C++ reads a plugin's fields.
    check_in_cpp(registry_host, flavour, plugin_library)


@pytest.mark.slow
@pytest.mark.tensorrt
def test_the_library_for_every_gpu_loads_into_every_runtime(registry_host: Path, tmp_path: Path) -> None:
    # The longest of all builds, about four minutes of one core.
    library = build_library(tmp_path / "build", PluginBuildOptions(fetch_headers=True))
    every = (PLUGINS / "cmake" / "architectures.txt").read_text().split()
    found = describe_library(library)
    assert set(found.architectures) <= set(every)
    assert len(found.architectures) >= 8
    for flavour in FLAVOURS:
        check_in_cpp(registry_host, flavour, library)


# --- an engine --------------------------------------------------------------------------------------------------

RANK, FEATURES = 6, 16
NODES = {"layers.0.up": "PifaLinear", "layers.0.down": "PifaOrderedLinear", "layers.1.up": "PifaColumnLinear"}


def _model(dtype: type[np.floating[Any]] = np.float16, **changes: dict[str, Any]) -> onnx.ModelProto:
    """Three layers, one of each operator, the first with a bias; `changes` maps weight or attribute to its value."""
    random = np.random.default_rng(3)
    nodes, weights, x = [], [], "x"
    for name, op_type in NODES.items():
        bias = op_type == op_spec.OP_TYPE
        column = op_spec.FORMS[op_type] == "column"
        values = {
            "pivot_weight": random.standard_normal((FEATURES, RANK) if column else (RANK, FEATURES)).astype(dtype),
            "coefficients": random.standard_normal((RANK, FEATURES - RANK) if column else (FEATURES - RANK, RANK)),
            "output_index": random.permutation(FEATURES).astype(np.int32),
            "bias": random.standard_normal(FEATURES).astype(dtype),
        }
        values["coefficients"] = values["coefficients"].astype(dtype)
        attributes = op_spec.attributes(op_type, rank=RANK, out_features=FEATURES)
        for key, value in changes.get(name, {}).items():
            (values if key in values else attributes)[key] = value
        inputs = op_spec.inputs_of(op_type, bias=bias)[1:]
        weights += [numpy_helper.from_array(values[key], f"{name}.{key}") for key in inputs]
        nodes.append(
            helper.make_node(
                op_type, [x, *(f"{name}.{key}" for key in inputs)], [f"{name}.y"], name, domain="pifa", **attributes
            )
        )
        x = f"{name}.y"
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    shape = ["batch_size", "sequence_length", FEATURES]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Identity", [x], ["y"], "last")],
        "three",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
        weights,
    )
    bodies = [
        ir.to_proto(function_body(op_type, bias=op_type == op_spec.OP_TYPE)) for op_type in sorted(set(NODES.values()))
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(op_spec.DOMAIN, op_spec.OP_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=10)


def _save(model: onnx.ModelProto, folder: Path) -> Path:
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def rtx() -> None:
    for module in ("tensorrt_rtx", "polygraphy"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'pifa-deploy[rtx]'")


def _options(library: Path | None, **changes: Any) -> BuildOptions:
    return BuildOptions(compute_capabilities=("8.6",), max_input_len=64, plugin_library=library, **changes)


@pytest.fixture(scope="module", params=[np.float16, np.float32], ids=["fp16", "fp32"])
def built(
    rtx: None, request: pytest.FixtureRequest, plugin_library: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, EngineRecord]:
    folder = tmp_path_factory.mktemp("engine")
    out = folder / "engine"
    return out, build_engines(_save(_model(request.param), folder / "onnx"), out, _options(plugin_library))


@pytest.mark.tensorrt
def test_every_node_is_a_layer_of_the_plugin(built: tuple[Path, EngineRecord]) -> None:
    _, record = built
    assert [module for layer in record.layers for module in layer.modules] == list(NODES)
    assert not [layer for layer in record.layers if layer.type == "gemm"]


@pytest.mark.tensorrt
def test_the_engine_holds_the_fields_of_each_layer(built: tuple[Path, EngineRecord]) -> None:
    data = (built[0] / "model.engine").read_bytes()
    for name, op_type in NODES.items():
        assert op_type.encode() in data
        assert name.encode() in data
    assert b"layer_name" in data


@pytest.mark.tensorrt
def test_engine_json_says_which_plugin_library_the_engine_needs(
    built: tuple[Path, EngineRecord], plugin_library: Path
) -> None:
    recorded = read_engine_json(built[0]).options["plugin_library"]
    assert recorded == describe_library(plugin_library).to_json()
    assert recorded["file"] == "libpifa_plugin.so"
    assert str(plugin_library.parent) not in (built[0] / "build.log").read_text()


@pytest.mark.tensorrt
def test_without_the_library_the_bodies_are_built(rtx: None, tmp_path: Path) -> None:
    record = build_engines(_save(_model(), tmp_path / "onnx"), tmp_path / "engine", _options(None))
    assert record.options["plugin_library"] is None
    assert [layer for layer in record.layers if layer.type == "gemm"]


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layers.0.up", {"rank": 7}, r"layer 'layers\.0\.up': pivot_weight has shape \[6, 16\], expected \[7, 16\]"),
        ("layers.0.down", {"rank": 0}, r"layer 'layers\.0\.down': rank is 0, expected 1"),
        (
            "layers.1.up",
            {"coefficients": np.ones((RANK, FEATURES - RANK), np.float32)},
            r"layer 'layers\.1\.up': coefficients has data type 0, expected 1, as x has",
        ),
        (
            "layers.0.up",
            {"output_index": np.arange(FEATURES - 1, dtype=np.int32)},
            r"layer 'layers\.0\.up': output_index has shape \[15\], expected \[16\]",
        ),
        (
            "layers.0.down",
            {"coefficients": np.ones((FEATURES, RANK), np.float16)},
            r"layer 'layers\.0\.down': coefficients has shape \[16, 6\], expected \[10, 6\]",
        ),
    ],
)
def test_a_bad_node_is_a_build_error_with_the_name_of_the_layer(
    rtx: None, plugin_library: Path, tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    folder = _save(_model(**{name: change}), tmp_path / "onnx")
    with pytest.raises(BuildError, match=message):
        build_engines(folder, tmp_path / "engine", _options(plugin_library))
    assert not (tmp_path / "engine").exists()
