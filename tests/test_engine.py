"""Building engines: the contract of the engine folder, refused inputs, and a child that dies."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from decoder_fixtures import dense_decoder
from onnx import TensorProto, helper, numpy_helper
from sparse_fixtures import save_sparse

from pifa_deploy import engine, op_spec, targets
from pifa_deploy.engine import BuildOptions, build_engines, input_dimensions, profile_shapes
from pifa_deploy.engine_fit import this_machine
from pifa_deploy.engine_record import (
    EngineRecord,
    read_engine_json,
)
from pifa_deploy.errors import (
    BuildError,
    ExitCode,
    InputMissingError,
    InputRefusedError,
    MisfitError,
    MissingCapabilityError,
    OutputError,
    OutputExistsError,
)
from pifa_deploy.onnx_export import ExportOptions, export_checkpoint
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.targets import LocalGpu

HIDDEN, HEADS, HEAD_DIM, VOCABULARY, RANK = 16, 2, 8, 32, 6
MODULES = tuple(f"model.layers.0.{name}" for name in ("q_proj", "v_proj", "o_proj"))


class _Graph:
    """Collects nodes and random weights of a toy decoder."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(5)

    def add(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def weight(self, name: str, *shape: int) -> str:
        return self.constant(name, self.random.standard_normal(shape).astype(np.float16) * np.float16(0.2))

    def constant(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def pifa(self, x: str, name: str) -> str:
        self.weight(f"{name}.pivot_weight", RANK, HIDDEN)
        self.weight(f"{name}.coefficients", HIDDEN - RANK, RANK)
        self.constant(f"{name}.output_index", self.random.permutation(HIDDEN).astype(np.int32))
        attributes = op_spec.attributes(op_spec.OP_TYPE, rank=RANK, out_features=HIDDEN)
        inputs = [x, *(f"{name}.{suffix}" for suffix in op_spec.INPUTS[1:])]
        self.nodes.append(
            helper.make_node(op_spec.OP_TYPE, inputs, [f"{name}.y"], name=name, domain=op_spec.DOMAIN, **attributes)
        )
        return f"{name}.y"

    def heads(self, x: str) -> str:
        shape = self.constant(f"{x}.shape", np.array([0, 0, HEADS, HEAD_DIM], np.int64))
        return self.add("Transpose", [self.add("Reshape", [x, shape], f"{x}.split")], f"{x}.heads", perm=[0, 2, 1, 3])


def _function_body() -> onnx.FunctionProto:
    nodes = [
        helper.make_node("Transpose", ["pivot_weight"], ["pivot_weight_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "pivot_weight_t"], ["y_p"]),
        helper.make_node("Transpose", ["coefficients"], ["coefficients_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["y_p", "coefficients_t"], ["y_np"]),
        helper.make_node("Concat", ["y_p", "y_np"], ["y_cat"], axis=-1),
        helper.make_node("Gather", ["y_cat", "output_index"], ["y"], axis=-1),
    ]
    return helper.make_function(
        op_spec.DOMAIN,
        op_spec.OP_TYPE,
        list(op_spec.INPUTS),
        [op_spec.OUTPUT],
        nodes,
        [helper.make_opsetid("", 18)],
        attributes=[*op_spec.INT_ATTRIBUTES, *op_spec.STRING_ATTRIBUTES],
    )


def _toy_decoder() -> onnx.ModelProto:
    """One attention layer with a cache and three PifaLinear nodes, float16, no causal mask."""
    g = _Graph()
    tokens = g.add("Gather", [g.weight("embed", VOCABULARY, HIDDEN), "input_ids"], "tokens")
    positions = g.add("Gather", [g.weight("positions", 64, HIDDEN), "position_ids"], "places")
    x = g.add("Add", [tokens, positions], "x")
    q, v = g.heads(g.pifa(x, MODULES[0])), g.heads(g.pifa(x, MODULES[1]))
    key = g.add("Concat", ["past_key_values.0.key", g.heads(x)], "present.0.key", axis=2)
    value = g.add("Concat", ["past_key_values.0.value", v], "present.0.value", axis=2)
    kept = g.add("Cast", ["attention_mask"], "kept", to=TensorProto.FLOAT16)
    hidden = g.add("Sub", [g.constant("one", np.array(1, np.float16)), kept], "hidden")
    mask = g.add("Mul", [hidden, g.constant("low", np.array(-1e4, np.float16))], "low_mask")
    mask = g.add("Unsqueeze", [mask, g.constant("axes", np.array([1, 2], np.int64))], "mask")
    scores = g.add("MatMul", [q, g.add("Transpose", [key], "key_t", perm=[0, 1, 3, 2])], "scores")
    weights = g.add("Softmax", [g.add("Add", [scores, mask], "masked")], "attention", axis=-1)
    context = g.add("Transpose", [g.add("MatMul", [weights, value], "context")], "context_t", perm=[0, 2, 1, 3])
    flat = g.add("Reshape", [context, g.constant("flat", np.array([0, 0, HIDDEN], np.int64))], "merged")
    g.add("MatMul", [g.pifa(flat, MODULES[2]), g.weight("head", HIDDEN, VOCABULARY)], "logits")
    half, long = TensorProto.FLOAT16, TensorProto.INT64
    past = ["batch_size", HEADS, "past_sequence_length", HEAD_DIM]
    present = ["batch_size", HEADS, "total_sequence_length", HEAD_DIM]
    inputs = [
        helper.make_tensor_value_info("input_ids", long, ["batch_size", "sequence_length"]),
        helper.make_tensor_value_info("attention_mask", long, ["batch_size", "total_sequence_length"]),
        helper.make_tensor_value_info("position_ids", long, ["batch_size", "sequence_length"]),
        *(helper.make_tensor_value_info(f"past_key_values.0.{kind}", half, past) for kind in ("key", "value")),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", half, ["batch_size", "sequence_length", VOCABULARY]),
        *(helper.make_tensor_value_info(f"present.0.{kind}", half, present) for kind in ("key", "value")),
    ]
    graph = helper.make_graph(g.nodes, "toy", inputs, outputs, g.weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(op_spec.DOMAIN, op_spec.OP_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=[_function_body()], ir_version=10)


def _save(model: onnx.ModelProto, folder: Path) -> Path:
    folder.mkdir()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=64)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = _save(_toy_decoder(), tmp_path_factory.mktemp("toy") / "onnx")
    onnx.checker.check_model(str(folder / "model.onnx"))
    return folder


@pytest.fixture
def toy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "onnx"))


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'pifa-deploy[rtx]'")
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install 'pifa-deploy[rtx]'")


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`child(code)` makes the build process run this Python code instead of TensorRT."""

    def replace(code: str) -> None:
        monkeypatch.setattr(engine, "_require_builder", lambda backend: None)
        monkeypatch.setattr(engine, "_child_command", lambda spec: [sys.executable, "-c", code, str(spec)])

    return replace


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _edit(toy: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(toy / "model.onnx", load_external_data=False)
    change(model)
    (toy / "model.onnx").write_bytes(model.SerializeToString())


def _external_tensor(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL)


# --- a real build -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineRecord]:
    if importlib.util.find_spec("tensorrt_rtx") is None or importlib.util.find_spec("polygraphy") is None:
        pytest.skip("TensorRT-RTX is not installed: pip install 'pifa-deploy[rtx]'")
    out = tmp_path_factory.mktemp("built") / "engine"
    options = BuildOptions(targets=("rtx4090",), compute_capabilities=("8.6",), max_batch_size=2, max_input_len=16)
    return out, build_engines(saved, out, options)


@pytest.mark.tensorrt
def test_a_built_folder_holds_the_engine_its_record_and_the_log(built: tuple[Path, EngineRecord]) -> None:
    out, record = built
    assert _names(out) == ["build.log", "engine.json", "model.engine"]
    assert _names(out.parent) == ["engine"]
    assert read_engine_json(out) == record == read_engine_json(out / "engine.json")
    assert record.compute_capabilities == ("8.6", "8.9")
    assert record.targets == ("rtx4090",)
    assert record.backend == "tensorrt-rtx"
    assert 0 < record.seconds < 600
    assert 50e6 < record.peak_rss_bytes < 8e9


@pytest.mark.tensorrt
def test_the_record_holds_hashes_and_sizes_of_what_was_read_and_written(
    built: tuple[Path, EngineRecord], saved: Path
) -> None:
    out, record = built
    expected = {name: subprocess.check_output(["sha256sum", saved / name], text=True)[:64] for name in _names(saved)}
    assert record.onnx_sha256 == expected
    assert set(expected) == {"model.onnx", "model.onnx.data"}
    data = (out / "model.engine").read_bytes()
    (file,) = record.engines
    assert (file.file, file.bytes, file.sha256) == ("model.engine", len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.tensorrt
def test_the_layers_lead_back_to_the_modules_and_are_half_precision(built: tuple[Path, EngineRecord]) -> None:
    _, record = built
    products = [module for layer in record.layers if layer.type == "gemm" for module in layer.modules]
    assert sorted(products) == sorted(2 * MODULES)
    assert record.precision_histogram["Half"] == sum(layer.precision == "Half" for layer in record.layers)
    assert "Float" not in record.precision_histogram
    assert sum(record.precision_histogram.values()) == len(record.layers)
    assert record.network["layers"] >= sum(record.network["precision_histogram"].values()) > len(record.layers)
    assert record.memory["weights"] > 0


@pytest.mark.tensorrt
def test_nothing_written_names_a_folder_of_this_machine(built: tuple[Path, EngineRecord], saved: Path) -> None:
    out, _ = built
    for name in ("engine.json", "build.log"):
        text = (out / name).read_text()
        assert str(out.parent) not in text
        assert str(saved) not in text
        assert sys.prefix not in text
    assert "parsed/model.onnx" in (out / "build.log").read_text()


@pytest.mark.tensorrt
def test_an_engine_is_found_for_its_capability_only(built: tuple[Path, EngineRecord]) -> None:
    _, record = built
    assert record.engine_for("8.6").file == "model.engine"
    with pytest.raises(
        MisfitError, match=r"built by tensorrt-rtx .* for compute capability 8\.6, 8\.9, this GPU has 8\.7"
    ):
        record.engine_for("8.7")


@pytest.mark.tensorrt
def test_a_graph_that_tensorrt_does_not_know_is_a_build_error_with_its_words(toy: Path, rtx: None) -> None:
    def rename(model: onnx.ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "NoSuchOp"

    _edit(toy, rename)
    with pytest.raises(BuildError, match=r"ended with status 1 .*\[E\].*NoSuchOp.*Could not parse ONNX") as caught:
        build_engines(toy, toy.parent / "engine", BuildOptions(compute_capabilities=("8.6",)))
    assert caught.value.exit_code is ExitCode.STAGE_FAILED
    assert _names(toy.parent) == ["engine.build.log", "onnx"]


@pytest.mark.tensorrt
def test_the_tensorrt_path_is_the_same_code_with_the_other_module(
    toy: Path, rtx: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorRT itself needs a GPU: TensorRT-RTX under its name drives Polygraphy's other branch.
    stand_in = tmp_path_factory.mktemp("stand-in")
    (stand_in / "tensorrt.py").write_text("from tensorrt_rtx import *\n__version__ = '10.14.1'\n")
    monkeypatch.syspath_prepend(stand_in)
    monkeypatch.setenv("PYTHONPATH", str(stand_in))
    monkeypatch.setattr(engine, "this_gpu", lambda: LocalGpu(name="L4", compute_capability="8.9"))
    options = BuildOptions(backend="tensorrt", targets=("l4",), sparsity="enable")
    record = build_engines(toy, toy.parent / "engine", options)
    assert "SPARSE_WEIGHTS" in _flags(toy.parent / "engine")
    assert (record.backend, record.version, record.compute_capabilities) == ("tensorrt", "10.14.1", ("8.9",))
    assert record.network["layers"] > 0
    if not torch.cuda.is_available():
        # EngineInspector wants the GPU that the engine is for: the engine is there all the same.
        assert "Could not deserialize engine" in (toy.parent / "engine" / "build.log").read_text()
        assert not [name for name in _names(toy.parent / "engine") if name.startswith("inspector.json")]


@pytest.mark.tensorrt
def test_all_that_is_asked_of_the_inspector_is_there() -> None:
    # It runs on a GPU only: names are checked against the installed bindings.
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'pifa-deploy[rtx]'")
    assert hasattr(trt.ICudaEngine, "create_engine_inspector")
    assert hasattr(trt.EngineInspector, "get_engine_information")
    assert hasattr(trt.LayerInformationFormat, "JSON")
    assert hasattr(trt.ProfilingVerbosity, "DETAILED")


def _flags(folder: Path) -> str:
    """Returns what the builder says of its flags."""
    (line,) = (line for line in (folder / "build.log").read_text().splitlines() if line.strip().startswith("Flags "))
    return line


@pytest.fixture(scope="module")
def sparse_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2:4-pruned decoder in float16 whose sizes are multiples of 32, as sparse kernels ask for."""
    folder = tmp_path_factory.mktemp("sparse")
    save_sparse(folder / "model", dense_decoder(hidden_size=64, intermediate_size=96, num_hidden_layers=1))
    export_checkpoint(folder / "model", folder / "onnx", ExportOptions(dtype="fp16"))
    return folder / "onnx"


@pytest.mark.tensorrt
@pytest.mark.parametrize("sparsity", ["auto", "disable"])
def test_a_sparse_model_is_built_with_sparse_weights_unless_they_are_disabled(
    sparse_onnx: Path, tmp_path: Path, rtx: None, sparsity: str
) -> None:
    options = BuildOptions(targets=("rtx4090",), max_input_len=16, max_cache_len=16, sparsity=sparsity)
    record = build_engines(sparse_onnx, tmp_path / "engine", options)
    assert record == read_engine_json(tmp_path / "engine")
    assert (record.sparse_weights, record.options["sparsity"]) == (sparsity == "auto", sparsity)
    assert ("SPARSE_WEIGHTS" in _flags(tmp_path / "engine")) == (sparsity == "auto")
    assert {layer.precision for layer in record.layers if layer.type == "gemm"} == {"Half"}


@pytest.mark.tensorrt
def test_a_model_without_such_a_record_is_built_without(built: tuple[Path, EngineRecord]) -> None:
    out, record = built
    assert (record.sparse_weights, record.options["sparsity"]) == (False, "auto")
    assert "SPARSE_WEIGHTS" not in _flags(out)


# --- a child that fails -----------------------------------------------------------------------------------------


def test_an_aborting_child_is_a_build_error_with_signal_and_last_lines(toy: Path, child: Callable[[str], None]) -> None:
    child("import os; print('weights were read'); print('kernel 7 failed', flush=True); os.abort()")
    out = toy.parent / "engine"
    with pytest.raises(
        BuildError, match=r"died of SIGABRT; last lines: .*kernel 7 failed.*engine\.build\.log"
    ) as caught:
        build_engines(toy, out, BuildOptions())
    assert caught.value.exit_code == 4
    assert _names(toy.parent) == ["engine.build.log", "onnx"]
    assert "weights were read" in (toy.parent / "engine.build.log").read_text()


def test_a_killed_child_points_at_memory(toy: Path, child: Callable[[str], None]) -> None:
    child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(BuildError, match=r"died of SIGKILL \(.*memory runs out.*last lines: none, it said nothing"):
        build_engines(toy, toy.parent / "engine", BuildOptions())


@pytest.mark.parametrize("words", ["OSError: [Errno 28] No space left on device", "Disk quota exceeded"])
def test_a_child_that_meets_a_full_disk_asks_for_space(toy: Path, child: Callable[[str], None], words: str) -> None:
    child(f"print('[V] reading'); raise SystemExit({words!r})")
    with pytest.raises(
        OutputError, match=r"engine could not be written: the disk filled up.*free some space"
    ) as caught:
        build_engines(toy, toy.parent / "engine", BuildOptions())
    assert "\n" not in str(caught.value)
    assert _names(toy.parent) == ["onnx"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_found_when_it_cut_the_log(
    toy: Path, child: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    child("raise SystemExit(1)")
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "probe":
            raise OSError(number, os.strerror(number))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    expected = BuildError if number == errno.EIO else OutputError
    with pytest.raises(expected):
        build_engines(toy, toy.parent / "engine", BuildOptions())
    assert _names(toy.parent) == (["engine.build.log", "onnx"] if expected is BuildError else ["onnx"])


def test_a_child_that_ends_well_but_without_an_engine_is_a_build_error(toy: Path, child: Callable[[str], None]) -> None:
    child("pass")
    with pytest.raises(BuildError, match="ended with status 0 and without an engine"):
        build_engines(toy, toy.parent / "engine", BuildOptions())
    assert not (toy.parent / "engine").exists()


def test_a_failed_build_leaves_the_former_engine_whole(toy: Path, child: Callable[[str], None]) -> None:
    child("raise SystemExit(3)")
    out = toy.parent / "engine"
    out.mkdir()
    (out / "engine.json").write_text('{"schema": 1}')
    with pytest.raises(BuildError, match="ended with status 3"):
        build_engines(toy, out, BuildOptions(force=True))
    assert _names(out) == ["engine.json"]


def test_an_interrupt_kills_the_child_and_leaves_nothing(toy: Path, child: Callable[[str], None]) -> None:
    pid_file = toy.parent / "pid"
    child(f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(300)")

    def interrupt() -> None:
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        build_engines(toy, toy.parent / "engine", BuildOptions())
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert _names(toy.parent) == ["onnx", "pid"]


def test_the_child_does_not_import_from_the_onnx_folder(toy: Path, child: Callable[[str], None]) -> None:
    (toy / "polygraphy.py").write_text("raise SystemExit('hostile code ran')\n")
    child("import os, sys; print(os.listdir('.'), sys.path); raise SystemExit(9)")
    with pytest.raises(BuildError):
        build_engines(toy, toy.parent / "engine", BuildOptions())
    said = (toy.parent / "engine.build.log").read_text()
    assert "polygraphy.py" not in said
    assert "<onnx>" not in said


# --- inputs that are refused ------------------------------------------------------------------------------------


def _refused(toy: Path, message: str, kind: type[Exception] = InputRefusedError) -> None:
    with pytest.raises(kind, match=message):
        build_engines(toy, toy.parent / "engine", BuildOptions())
    assert not list(toy.parent.glob("*engine*"))


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"nothing.*no such file"):
        build_engines(tmp_path / "nothing", tmp_path / "engine", BuildOptions())


def test_an_onnx_file_cut_short_is_refused(toy: Path) -> None:
    data = (toy / "model.onnx").read_bytes()
    (toy / "model.onnx").write_bytes(data[: len(data) // 2])
    _refused(toy, r"model\.onnx")


def test_missing_external_data_is_refused(toy: Path) -> None:
    (toy / "model.onnx.data").unlink()
    _refused(toy, r"model\.onnx\.data.*missing")


def test_external_data_cut_short_is_refused(toy: Path) -> None:
    data = (toy / "model.onnx.data").read_bytes()
    (toy / "model.onnx.data").write_bytes(data[:-5])
    _refused(toy, r"model\.onnx\.data.*cut short")


@pytest.mark.parametrize("location", ["../model.onnx.data", "/etc/hostname"])
def test_external_data_outside_the_folder_is_refused(toy: Path, location: str) -> None:
    shutil.copy(toy / "model.onnx.data", toy.parent / "model.onnx.data")

    def move(model: onnx.ModelProto) -> None:
        next(entry for entry in _external_tensor(model).external_data if entry.key == "location").value = location

    _edit(toy, move)
    _refused(toy, r"expected a file in(side)? the .*folder")


def test_a_link_out_of_the_folder_is_refused(toy: Path) -> None:
    (toy / "model.onnx.data").rename(toy.parent / "elsewhere")
    (toy / "model.onnx.data").symlink_to(toy.parent / "elsewhere")
    _refused(toy, r"model\.onnx\.data")


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("plugin_version", "2", "plugin_version '2', this program knows '1'"),
        ("form", "diagonal", "form is 'diagonal'"),
        ("plugin_namespace", "other", "plugin_namespace is 'other'"),
    ],
)
def test_a_pifa_node_outside_its_contract_is_refused(toy: Path, attribute: str, value: str, message: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.name == MODULES[1])
        next(each for each in node.attribute if each.name == attribute).s = value.encode()

    _edit(toy, change)
    _refused(toy, f"{MODULES[1]}.*{message}")


def test_an_unknown_dynamic_dimension_is_refused(toy: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "frames"

    _edit(toy, rename)
    _refused(toy, "input input_ids has the dynamic dimension 'frames', expected one of batch_size")


def test_a_missing_plugin_library_is_reported(toy: Path) -> None:
    with pytest.raises(InputMissingError, match=r"none\.so: no such plugin library"):
        build_engines(toy, toy.parent / "engine", BuildOptions(plugin_library=toy / "none.so"))


def test_an_existing_output_needs_force(toy: Path, child: Callable[[str], None]) -> None:
    child("raise SystemExit('must not run')")
    out = toy.parent / "engine"
    out.mkdir()
    (out / "engine.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="--force"):
        build_engines(toy, out, BuildOptions())
    assert (out / "engine.json").read_text() == "{}"


# --- options and machine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "recorded", "expected"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("enable", True, True),
        ("enable", False, True),
        ("disable", True, False),
        ("disable", False, False),
    ],
)
def test_sparse_weights_are_asked_for_as_the_option_and_the_onnx_folder_say(
    toy: Path, child: Callable[[str], None], sparsity: str, recorded: bool, expected: bool
) -> None:
    record = {"pattern": "2:4", "method": "wanda", "modules": {}} if recorded else None
    manifest = {"schema": 1, "artefact": "onnx", "dtype": "fp16", "source_sha256": None, "sparsity": record}
    (toy / "pifa.json").write_text(json.dumps(manifest))
    child(f"import shutil, sys; shutil.copy(sys.argv[1], {str(toy.parent / 'spec')!r}); raise SystemExit(1)")
    with pytest.raises(BuildError):
        build_engines(toy, toy.parent / "engine", BuildOptions(sparsity=sparsity))
    assert json.loads((toy.parent / "spec").read_text())["sparse_weights"] is expected


@pytest.mark.parametrize("name", ["max_batch_size", "max_input_len", "max_cache_len"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_a_size_below_one_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}, expected a positive integer"):
        BuildOptions(**{name: value})


def test_options_refuse_unknown_targets_backends_and_words() -> None:
    with pytest.raises(ValueError, match="target 'rtx9999' is unknown"):
        BuildOptions(targets=("rtx9999",))
    with pytest.raises(ValueError, match="backend is 'onnx'"):
        BuildOptions(backend="onnx")
    with pytest.raises(ValueError, match="sparsity is 'force', expected one of auto, enable, disable"):
        BuildOptions(sparsity="force")
    with pytest.raises(MisfitError, match=r"Orin Nano .*tensorrt-rtx does not serve"):
        BuildOptions(targets=("orin-nano",))


def test_without_the_builder_the_machine_is_named_and_the_cure(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine._MODULES, "tensorrt-rtx", ("no_such_module_rtx", "pifa-deploy[rtx]"))
    with pytest.raises(MissingCapabilityError, match=r"not installed.*pip install 'pifa-deploy\[rtx\]'") as caught:
        build_engines(toy, toy.parent / "engine", BuildOptions())
    assert caught.value.exit_code == 3


def test_tensorrt_builds_only_for_the_gpu_that_is_here(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_require_builder", lambda backend: None)
    monkeypatch.setattr(engine, "this_gpu", lambda: None)
    with pytest.raises(MissingCapabilityError, match=r"no NVIDIA GPU.*on the target device"):
        build_engines(toy, toy.parent / "engine", BuildOptions(backend="tensorrt", targets=("orin-nano",)))
    monkeypatch.setattr(engine, "this_gpu", lambda: LocalGpu(name="L4", compute_capability="8.9"))
    with pytest.raises(MisfitError, match=r"has compute capability 8\.9, asked for 8\.7"):
        build_engines(toy, toy.parent / "engine", BuildOptions(backend="tensorrt", targets=("orin-nano",)))


def test_tensorrt_builds_for_the_gpu_that_runs_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = (LocalGpu(name="RTX 3090", compute_capability="8.6"), LocalGpu(name="B200", compute_capability="10.0"))
    monkeypatch.setattr(targets, "local_gpus", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engine._resolve_capabilities(BuildOptions(backend="tensorrt")) == ("8.6",)
    assert engine._resolve_capabilities(BuildOptions(backend="tensorrt", targets=("rtx3090",))) == ("8.6",)
    with pytest.raises(MisfitError, match=r"has compute capability 8\.6, asked for 10\.0"):
        engine._resolve_capabilities(BuildOptions(backend="tensorrt", targets=("b200",)))
    # CUDA_VISIBLE_DEVICES=1: nvidia-smi lists both all the same.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    second = SimpleNamespace(name="B200", major=10, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {0: second}.__getitem__)
    assert engine._resolve_capabilities(BuildOptions(backend="tensorrt")) == ("10.0",)
    assert this_machine().gpu == LocalGpu(name="B200", compute_capability="10.0")


def test_a_gpu_of_unknown_capability_is_told_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "this_gpu", lambda: LocalGpu(name="GRID K1", compute_capability=None))
    with pytest.raises(MissingCapabilityError, match=r"does not tell the compute capability of GRID K1.*update"):
        engine._resolve_capabilities(BuildOptions(backend="tensorrt"))


def test_the_profile_spans_prefill_and_decode(toy: Path) -> None:
    options = BuildOptions(max_batch_size=4, max_input_len=128, max_cache_len=256)
    profile = profile_shapes(input_dimensions(open_folder(toy)), options)
    assert profile["input_ids"] == profile["position_ids"] == {"min": (1, 1), "opt": (1, 1), "max": (4, 128)}
    assert profile["attention_mask"] == {"min": (1, 1), "opt": (1, 129), "max": (4, 384)}
    past = {"min": (1, HEADS, 0, HEAD_DIM), "opt": (1, HEADS, 128, HEAD_DIM), "max": (4, HEADS, 256, HEAD_DIM)}
    assert profile["past_key_values.0.key"] == profile["past_key_values.0.value"] == past
    for point in ("min", "opt", "max"):
        total = profile["input_ids"][point][1] + profile["past_key_values.0.key"][point][2]
        assert profile["attention_mask"][point][1] == total
