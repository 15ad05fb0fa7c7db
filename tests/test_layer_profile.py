"""Where the time goes, layer by layer: what is attributed to which linear, held against another way to know it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_fixtures import Outcome
from test_engine_record import RECORD, _write
from torch import nn

from pifa_deploy import layer_profile, op_spec
from pifa_deploy.decoder_step import Step
from pifa_deploy.engine_layers import layers_in_build_log, modules_of_layers
from pifa_deploy.engine_profile import modules_of_engine, times_of_modules
from pifa_deploy.engine_record import read_engine_json
from pifa_deploy.errors import ExitCode, InputRefusedError, MissingCapabilityError, StageFailedError
from pifa_deploy.graph_cut import CutGraph
from pifa_deploy.layer_profile import LayerTimes, layer_times, medians_of, profile_torch
from pifa_deploy.linear_nodes import linear_nodes, named_linears
from pifa_deploy.model_folder import load_model
from pifa_deploy.onnx_export import ExportOptions, export_checkpoint
from pifa_deploy.onnx_folder import OnnxFolder, open_folder
from pifa_deploy.onnx_profile import check_profilable, labelled_graph, launches_in_trace, profile_onnx
from pifa_deploy.onnx_runner import OnnxRuntimeRunner
from pifa_deploy.operator_parity import operator_ends
from pifa_deploy.timed_contenders import drawn_step
from pifa_deploy.torch_runner import TorchRunner

pytest_plugins = ("cli_plugin",)

QUICK = ("--warm-up", "0", "--iterations", "4", "--duration", "0", "--rounds", "2", "--device", "cpu", "--threads", "1")
FORMS = ("dense", "biased", "lowrank", "shared", "plain")


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    pifa_checkpoint: Callable[..., Path],
    tiny_model: Callable[..., Any],
    checkpoint: Path,
    onnx_folder: Path,
) -> dict[str, OnnxFolder]:
    """Exports in every form; ranks differ from module to module."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'pifa-deploy[cpu]'")
    root = tmp_path_factory.mktemp("profile")
    densities = (0.4, 0.5, 0.6, 0.7)
    tiny_model("llama").save_pretrained(root / "model")
    sources = {
        "dense": root / "model",
        "biased": pifa_checkpoint("qwen2", densities=densities),
        "lowrank": pifa_checkpoint("llama", form="lowrank", densities=densities),
        "plain": checkpoint,
    }
    found = {"shared": open_folder(onnx_folder)}
    assert {node.op_type for node in found["shared"].model.graph.node} >= set(op_spec.FORMS)
    for form, source in sources.items():
        export_checkpoint(source, root / form, ExportOptions(dtype="fp32", plain_ops=form == "plain"))
        found[form] = open_folder(root / form)
    return found


def expected_modules(folder: OnnxFolder) -> set[str]:
    """The modules of the manifest; of a dense model every matrix in a decoder layer."""
    dense = {
        tensor.name.removesuffix(".weight")
        for tensor in folder.model.graph.initializer
        if ".layers." in tensor.name and tensor.name.endswith("_proj.weight")
    }
    return set(folder.manifest["modules"]) or dense


@pytest.mark.parametrize("form", FORMS)
def test_nodes_belong_to_the_linear_between_whose_ends_they_lie(folders: dict[str, OnnxFolder], form: str) -> None:
    folder = folders[form]
    graph = CutGraph(folder)
    found = linear_nodes(folder.model)
    assert set(found.values()) == expected_modules(folder)
    for module in expected_modules(folder):
        ends = operator_ends(graph, module, biased=f"{module}.bias" in graph.initializers)
        assert ends is not None
        between = {i for i in graph.between({ends[0]}, [ends[1]]) if graph.nodes[i].op_type != "Shape"}
        # Nodes that several bodies share, after equal ones were merged, are of one of them.
        assert {i for i in between if i not in found} == set()
        assert {i for i, owner in found.items() if owner == module} - between == set()
        own = {i for i in between if found[i] == module}
        assert any(graph.nodes[i].op_type in ("MatMul", "Gemm") or graph.nodes[i].domain for i in own)


def traced(folder: OnnxFolder, place: Path, step: Step, *, launches: int) -> list[dict[str, Any]]:
    """Returns what ONNX Runtime writes down of the folder's graph."""
    runner = OnnxRuntimeRunner(folder, threads=1, trace=str(place / "trace"))
    call = runner.timed(step)
    for _ in range(launches):
        call.launch()
    events: list[dict[str, Any]] = json.loads(Path(runner.session.end_profiling()).read_text())
    return events


def work(event: dict[str, Any]) -> tuple[str, str]:
    """What a node did: operator and the shapes of its inputs and outputs."""
    arguments = event["args"]
    return arguments["op_name"], json.dumps([arguments["input_type_shape"], arguments["output_type_shape"]])


def kernels(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["cat"] == "Node"]


@pytest.mark.parametrize("form", ["biased", "lowrank", "shared", "plain"])
def test_the_graph_that_is_profiled_runs_the_same_kernels(
    folders: dict[str, OnnxFolder], form: str, tmp_path: Path
) -> None:
    folder, step = folders[form], drawn_step(5, 3, batch=2, vocabulary=60)
    labelled, _ = labelled_graph(folder.model)
    copy = OnnxFolder(path=folder.path, model=labelled, manifest=folder.manifest)
    whole, named = (kernels(traced(each, tmp_path, step, launches=1)) for each in (folder, copy))
    assert Counter(map(work, named)) == Counter(map(work, whole))
    runners = [OnnxRuntimeRunner(each, threads=1, trace=str(tmp_path / "t")) for each in (folder, copy)]
    one, other = (runner.step(first(), None)[0] for runner in runners)
    assert np.array_equal(one, other)


def first() -> Step:
    return drawn_step(5, 0, batch=2, vocabulary=60)


@pytest.mark.parametrize("form", FORMS)
def test_every_product_of_a_trace_is_counted_for_the_linear_of_its_shape(
    folders: dict[str, OnnxFolder], form: str, tmp_path: Path
) -> None:
    folder, step = folders[form], drawn_step(5, 3, batch=1, vocabulary=60)
    labelled, modules = labelled_graph(folder.model)
    copy = OnnxFolder(path=folder.path, model=labelled, manifest=folder.manifest)
    events = traced(copy, tmp_path, step, launches=3)
    found = launches_in_trace(events, modules)
    assert len(found) == 3
    assert all(by_module(launch).keys() == {*modules, ""} for launch in found)
    # Nothing is lost and nothing counted twice.
    assert sum(sum(launch.values()) for launch in found) == sum(event["dur"] for event in kernels(events))
    for module in modules:
        own = [event for event in kernels(events) if event["name"].startswith(f"{module}#")]
        assert sum(by_module(launch)[module] for launch in found) == sum(event["dur"] for event in own)
        products = [event for event in own if event["args"]["op_name"] in ("MatMul", "Gemm")]
        # Of a weight that it keeps in a form of its own, ONNX Runtime says nothing.
        read = [(features(event, "input_type_shape"), features(event, "output_type_shape")) for event in products]
        assert Counter(read) == Counter(3 * factors(folder, module))


def by_module(launch: dict[tuple[str, str], float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for (module, _), us in launch.items():
        found[module] = found.get(module, 0.0) + us
    return found


def features(event: dict[str, Any], side: str) -> int:
    (shape,) = event["args"][side][0].values()
    return int(shape[-1])


def factors(folder: OnnxFolder, module: str) -> list[tuple[int, int]]:
    """Returns the shapes of the matrices that a linear multiplies by, from pifa.json."""
    if module not in folder.manifest["modules"]:
        (dims,) = (each.dims for each in folder.model.graph.initializer if each.name == f"{module}.weight")
        return [(dims[1], dims[0])]
    spec = folder.manifest["modules"][module]
    n, r, m = spec["in_features"], spec["rank"], spec["out_features"]
    if spec["format"] == "pifa-column":
        return [(n - r, r), (r, m)]
    moved = f"{module}.output_index" in spec["tensors"]  # then the unit rows of the pivots are multiplied too
    return [(n, r), (r, m if moved or spec["format"] == "lowrank" else m - r)]


def test_a_profile_has_all_launches_of_all_steps(folders: dict[str, OnnxFolder]) -> None:
    steps = [drawn_step(40, 0, batch=1, vocabulary=60), drawn_step(1, 20, batch=1, vocabulary=60)]
    prefill, decode = profile_onnx(folders["shared"], steps, threads=1, launches=4)
    assert len(prefill) == len(decode) == 4
    assert all(min(launch.values()) >= 0 for launch in prefill + decode)
    assert all(sum(launch.values()) > by_module(launch)[""] > 0 for launch in prefill + decode)


def test_a_node_outside_of_any_run_is_refused() -> None:
    node = {"cat": "Node", "name": "a#0.0_kernel_time", "ts": 50, "dur": 3}
    run = {"cat": "Session", "name": "model_run", "ts": 0, "dur": 10}
    inside = {**node, "ts": 5}
    assert launches_in_trace([run, inside, {**inside, "name": "b_kernel_time"}], ["a"]) == [
        {("a", "a#0.0_kernel_time"): 3, ("", "b_kernel_time"): 3}
    ]
    with pytest.raises(StageFailedError, match=r"trace has a#0\.0_kernel_time outside of any run, expected inside"):
        launches_in_trace([run, node], ["a"])


def test_a_gpu_and_a_foreign_graph_are_refused(folders: dict[str, OnnxFolder]) -> None:
    with pytest.raises(MissingCapabilityError, match="ONNX Runtime's profiler has no times of a GPU, and"):
        check_profilable(folders["dense"], "cuda")
    anonymous = onnx.ModelProto()
    anonymous.CopyFrom(folders["dense"].model)
    for i, tensor in enumerate(anonymous.graph.initializer):
        tensor.name = f"onnx::MatMul_{i}"
    folder = OnnxFolder(path=folders["dense"].path, model=anonymous, manifest={})
    with pytest.raises(InputRefusedError, match="no initializer is named after a linear layer, expected such as model"):
        check_profilable(folder, "cpu")


# PyTorch.


def test_the_time_of_a_forward_is_that_of_its_module(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(layer_profile, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(module: nn.Module, seconds: float) -> None:
        """Has a module's forward take this time and none besides."""
        forward = module.forward

        def slow(*args: Any, **options: Any) -> Any:
            now[0] += seconds
            return forward(*args, **options)

        module.forward = slow

    model = load_model(checkpoint, dtype=torch.float32)
    linears = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    seconds = {name: (i + 1) / 1024 for i, name in enumerate(linears)}  # powers of two: all sums are exact
    for name, one in seconds.items():
        takes(model.get_submodule(name), one)
    takes(model.get_submodule("model.layers.0.input_layernorm"), 0.25)
    takes(model.lm_head, 0.5)
    launches = profile_torch(TorchRunner(model), drawn_step(6, 2, batch=1, vocabulary=60), launches=3)
    assert len(seconds) == 14
    assert launches == [{("", ""): 750_000.0, **{(name, ""): one * 1e6 for name, one in seconds.items()}}] * 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_head_is_no_linear_layer_in_either_runtime(
    folders: dict[str, OnnxFolder], tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("llama")
    assert isinstance(model.lm_head, nn.Linear)
    launch = by_module(profile_torch(TorchRunner(model), first(), launches=1)[0])
    assert set(linear_nodes(folders["dense"].model).values()) == launch.keys() - {""}


def test_an_interruption_of_a_launch_changes_no_median() -> None:
    quiet = {("a", "x"): 2.0, ("a", "y"): 3.0, ("", "z"): 1.0, ("", "w"): 4.0}
    disturbed = [{**quiet, part: 900.0} for part in quiet]
    assert medians_of([quiet, *disturbed]) == LayerTimes(modules_us={"a": 5.0}, rest_us=5.0)


def test_the_rest_is_a_share_of_everything() -> None:
    found = LayerTimes(modules_us={"a": 1.0, "b": 2.0}, rest_us=1.0)
    assert (found.linears_us, found.rest_share) == (3.0, 0.25)


# TensorRT, as far as it can be known without a GPU.


@pytest.mark.tensorrt
def test_the_layers_of_a_built_engine_lead_to_all_linears(engine_folder: Path, onnx_folder: Path) -> None:
    record, log = read_engine_json(engine_folder), (engine_folder / "build.log").read_text()
    assert record.network["linears"] == named_linears(open_folder(onnx_folder).model)
    found = modules_of_engine(record, engine_folder)
    assert {module for modules in found.values() for module in modules} == set(record.network["modules"])
    # The products that the builder's own numbering of layers leads back to.
    for layer in record.layers:
        if layer.modules:
            assert set(layer.modules) == set(found[layer.name])
    kinds = {layer.name: layer for layer in layers_in_build_log(log, {})}
    attention = [layer for name, layer in kinds.items() if "mha" in name]
    assert all(layer.name not in found for layer in attention)
    head = [name for name in kinds if name.startswith("node_linear")]
    assert not set(head) & found.keys()


@pytest.mark.tensorrt
def test_the_layers_of_a_dense_engine_lead_to_its_linears(folders: dict[str, OnnxFolder], tmp_path: Path) -> None:
    for module in ("tensorrt_rtx", "polygraphy"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'pifa-deploy[rtx]'")
    from pifa_deploy.engine import BuildOptions, build_engines

    options = BuildOptions(compute_capabilities=("8.6",), max_input_len=16, max_cache_len=32)
    record = build_engines(folders["dense"].path, tmp_path / "engine", options)
    found = modules_of_engine(record, tmp_path / "engine")
    assert {module for modules in found.values() for module in modules} == expected_modules(folders["dense"])


def log_line(name: str, kind: str, *sources: str) -> str:
    origin = "".join(f"[ONNX Layer: {source}]" for source in sources)
    return (
        f"    Name: {name}, LayerType: {kind}, Inputs: [], Outputs: [], TacticName: , StreamId: 0, Metadata: {origin}"
    )


def test_a_kernel_counts_where_it_multiplies_or_does_nothing_else() -> None:
    body = "PifaLinear_{} | layers.0.{} (PifaLinear)"
    log = "\n".join(
        [
            log_line("q+k", "gemm", body.format("y_p", "q"), body.format("y_p", "k"), body.format("y_p", "q")),
            log_line("__myl_FcAdd_myl1_7", "kgen", body.format("y_np", "q"), "node_add_3"),
            log_line("__myl_Move_myl1_8", "kgen", body.format("y_cat", "q")),
            log_line("__myl_ConcTran_myl1_9", "kgen", body.format("y_cat", "q"), "node_transpose"),
            log_line("gemm_up", "gemm", "node_linear_4"),
            log_line("head", "gemm", "node_linear_9"),
        ]
    )
    nodes = {"layers.0.q": "layers.0.q", "layers.0.k": "layers.0.k", "node_linear_4": "layers.0.up"}
    found = modules_of_layers(log, nodes)
    assert found == {
        "q+k": ("layers.0.q", "layers.0.k"),
        "__myl_FcAdd_myl1_7": ("layers.0.q",),
        "__myl_Move_myl1_8": ("layers.0.q",),
        "gemm_up": ("layers.0.up",),
    }
    layers_ms = {"q+k": 2.0, "__myl_FcAdd_myl1_7": 0.5, "__myl_ConcTran_myl1_9": 0.25, "head": 4.0, "gemm_up": 1.0}
    times = times_of_modules(layers_ms, found)
    assert by_module(times) == {"layers.0.q": 1500, "layers.0.k": 1000, "layers.0.up": 1000, "": 4250}
    assert sum(times.values()) == sum(layers_ms.values()) * 1e3


def test_names_that_the_log_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StageFailedError, match="profiler names 1 layers such as kernel_7, expected those of the build"):
        times_of_modules({"kernel_7": 1.0}, {"gemm": ("layers.0.q",)})
    _write(tmp_path, {**RECORD, "network": {}})
    with pytest.raises(InputRefusedError, match=r"build\.log and engine\.json do not say which of its layers compute"):
        modules_of_engine(read_engine_json(tmp_path), tmp_path)


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_an_engine_reports_the_time_of_its_layers(engine_folder: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("an engine runs on a GPU, and this machine has none")
    from pifa_deploy.tensorrt_runner import TensorRTRunner

    runner = TensorRTRunner(engine_folder)
    launches = runner.layer_times(drawn_step(4, 3, batch=1, vocabulary=60), 3)
    modules = modules_of_engine(runner.record, engine_folder)
    for layers_ms in launches:
        times = by_module(times_of_modules(layers_ms, modules))
        assert sum(times.values()) == pytest.approx(sum(layers_ms.values()) * 1e3)
        assert all(times[module] > 0 for module in runner.record.network["modules"])


# The command.


def test_bench_writes_the_times_of_all_linears_of_all_contenders(
    pifa_deploy: Callable[..., Outcome], dense: Path, checkpoint: Path, onnx_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'pifa-deploy[cpu]'")
    places = (f"dense={dense}", f"pifa={checkpoint}", f"onnx={onnx_folder}")
    sizes = ("--prefill", 16, "--decode", 8, "--layers", "--json", tmp_path / "x.json")
    found = pifa_deploy("bench", *places, *QUICK, *sizes)
    assert found.code == 0, found.err
    value = json.loads((tmp_path / "x.json").read_text())
    assert value["options"]["layers"] is True
    assert [case["case"] for case in value["layers"]] == ["prefill 16", "decode at 8"]
    modules = set(open_folder(onnx_folder).manifest["modules"])
    for case in value["layers"]:
        assert case["rest_us"].keys() == {"dense", "pifa", "onnx"}
        assert {each["name"] for each in case["modules"]} == modules
        assert all(each["times_us"].keys() == {"dense", "pifa", "onnx"} for each in case["modules"])
        assert all(us > 0 for each in case["modules"] for us in each["times_us"].values())
    assert "\nlayers, prefill 16 (profiled)\n" in found.out
    onnx_us = sum(each["times_us"]["onnx"] for each in value["layers"][0]["modules"])
    assert f"{onnx_us / 1e3:.3f}"[:4] in found.out.rpartition("layers, prefill 16")[2]


def test_a_profile_that_fails_costs_nothing_but_itself(
    pifa_deploy: Callable[..., Outcome],
    dense: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def times(contender: Any, *arguments: Any, **options: Any) -> list[LayerTimes]:
        if contender.name != "pifa":
            return layer_times(contender, *arguments, **options)
        # What an engine says whose layers have other names here than in its build log.
        times_of_modules({"other_1": 1.0}, {"gemm_up": ("layers.0.up",)})
        raise AssertionError

    monkeypatch.setattr(layer_profile, "layer_times", times)
    sizes = ("--prefill", 4, "--decode", 4, "--layers", "--json", tmp_path / "x.json")
    found = pifa_deploy("bench", f"dense={dense}", f"pifa={checkpoint}", *QUICK, *sizes)
    assert found.code == 0, found.err
    assert "warning: pifa was not profiled: " in found.out
    value = json.loads((tmp_path / "x.json").read_text())
    assert [[row["name"] for row in case["rows"]] for case in value["cases"]] == [["dense", "pifa"]] * 2
    for case in value["layers"]:
        assert case["rest_us"].keys() == {"dense"}
        assert {name for each in case["modules"] for name in each["times_us"]} == {"dense"}
        assert case["warnings"][0].startswith("pifa was not profiled: ")
    done = pifa_deploy("report", "--bench", tmp_path / "x.json", "--out", tmp_path / "report")
    assert done.code in (ExitCode.PASSED, ExitCode.NOT_DECIDED), done.err
    assert "pifa was not profiled: " in (tmp_path / "report" / "report.html").read_text()


def test_layers_mean_nothing_to_a_plan(pifa_deploy: Callable[..., Outcome], dense: Path, tmp_path: Path) -> None:
    outcome = pifa_deploy("bench", dense, "--choose", tmp_path / "plan.json", "--layers")
    outcome.failed(ExitCode.USAGE, "--layers has no meaning with --choose, which times layers; leave it out")


def test_layers_of_a_folder_on_a_gpu_are_refused_before_anything_is_timed(onnx_folder: Path) -> None:
    from pifa_deploy.layer_profile import check_layers

    found: Any = SimpleNamespace(runtime="onnxruntime", device="cuda", path=str(onnx_folder), runner=None)
    with pytest.raises(MissingCapabilityError, match="leave out --layers, or measure checkpoints or engines"):
        check_layers(found)
