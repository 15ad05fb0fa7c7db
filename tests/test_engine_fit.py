"""An engine that does not fit the machine, or a step the engine, is refused before TensorRT sees it.

The engines are real ones; machines are described, because none here has a GPU.
"""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from cli_fixtures import Outcome

from pifa_deploy import engine_fit, tensorrt_runner
from pifa_deploy.cli import plugin
from pifa_deploy.cli.main import cli
from pifa_deploy.cli.make import build_command
from pifa_deploy.decoder_step import Step, StepLimits
from pifa_deploy.engine_fit import (
    Machine,
    _has_code,
    check_fit,
    check_shapes,
    rebuild_command,
    step_limits,
    this_machine,
)
from pifa_deploy.engine_record import EngineRecord, check_origin, read_engine_json
from pifa_deploy.errors import ExitCode, InputMissingError, InputRefusedError, MisfitError, MissingCapabilityError
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner
from pifa_deploy.plugin_library import LIBRARY_VARIABLE
from pifa_deploy.runners import open_runner
from pifa_deploy.targets import RTX, TENSORRT, LocalGpu
from pifa_deploy.tensorrt_runner import TensorRTRunner, error_log, loaded_engine, profile_dimensions

pytest_plugins = ("cli_plugin",)

pytestmark = pytest.mark.tensorrt


@pytest.fixture(scope="module")
def record(engine_folder: Path) -> EngineRecord:
    return read_engine_json(engine_folder)


@pytest.fixture
def folder(engine_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine_folder, tmp_path / "engine"))


@pytest.fixture
def fitting(record: EngineRecord) -> Machine:
    """A machine that runs the engine."""
    return machine("8.9", **{RTX: record.version})


def machine(capability: str | None, **versions: str) -> Machine:
    return Machine(gpu=LocalGpu(name="GeForce", compute_capability=capability), versions=versions)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((folder / "engine.json").read_text())
    change(value)
    (folder / "engine.json").write_text(json.dumps(value))


def parsed(command: str) -> dict[str, Any]:
    """Returns what the command line makes of a command, so that a wrong flag is an error."""
    program, *arguments = shlex.split(command)
    assert program == "pifa-deploy"
    nested = arguments[:2] == ["plugin", "build"]
    assert nested or arguments[0] == "build"
    parser = plugin.build_command if nested else build_command
    # A command keeps the names of its help option from its first context.
    group = click.Context(cli, **cli.context_settings)
    return dict(parser.make_context("build", arguments[1 + nested :], group).params)


def advised(error: pytest.ExceptionInfo[MisfitError]) -> dict[str, Any]:
    assert error.value.exit_code is ExitCode.MISFIT
    return parsed(str(error.value).partition("run: ")[2])


class TestMachines:
    def test_an_engine_fits_the_machine_that_it_was_built_for(
        self, engine_folder: Path, fitting: Machine, record: EngineRecord
    ) -> None:
        assert check_fit(engine_folder, fitting) == record

    @pytest.mark.parametrize("version", ["1.7.0.1", "1.8.0.0", "2.0", "1.7.1.117"])
    def test_another_version_of_tensorrt(self, engine_folder: Path, version: str, record: EngineRecord) -> None:
        with pytest.raises(MisfitError, match=rf"built by tensorrt-rtx {record.version}, installed is {version}") as e:
            check_fit(engine_folder, machine("8.6", **{RTX: version}))
        asked = advised(e)
        assert asked["backend"] == RTX
        assert asked["compute_capabilities"] == "8.6"
        assert (asked["out"], asked["force"]) == (engine_folder, True)

    def test_another_gpu_that_the_backend_serves(self, engine_folder: Path, record: EngineRecord) -> None:
        with pytest.raises(MisfitError, match=r"for compute capability 8\.6, 8\.9, this GPU has 12\.0") as error:
            check_fit(engine_folder, machine("12.0", **{RTX: record.version}))
        asked = advised(error)
        assert (asked["backend"], asked["compute_capabilities"]) == (RTX, "12.0")
        sizes = {name: asked[name] for name in ("max_batch_size", "max_input_len", "max_cache_len", "sparsity")}
        assert sizes == {"max_batch_size": 2, "max_input_len": 16, "max_cache_len": 32, "sparsity": "disable"}

    def test_another_gpu_that_only_the_other_backend_serves(self, engine_folder: Path, record: EngineRecord) -> None:
        with pytest.raises(MisfitError, match=r"this GPU has 8\.7") as error:
            check_fit(engine_folder, machine("8.7", **{RTX: record.version}))
        asked = advised(error)
        assert (asked["backend"], asked["compute_capabilities"]) == (TENSORRT, "")

    def test_another_gpu_that_no_backend_serves(self, engine_folder: Path, record: EngineRecord) -> None:
        with pytest.raises(MisfitError, match=r"no backend of this program serves compute capability 6\.1"):
            check_fit(engine_folder, machine("6.1", **{RTX: record.version}))

    def test_without_that_flavour_of_tensorrt(self, engine_folder: Path) -> None:
        with pytest.raises(MissingCapabilityError, match=r"tensorrt_rtx is not installed; run: pip install") as error:
            check_fit(engine_folder, machine("8.6", **{TENSORRT: "10.14.1"}))
        assert error.value.exit_code is ExitCode.NOT_DECIDED

    def test_without_a_gpu(self, engine_folder: Path, record: EngineRecord) -> None:
        with pytest.raises(MissingCapabilityError, match=r"has no NVIDIA GPU, and .* runs on compute capability 8\.6"):
            check_fit(engine_folder, Machine(versions={RTX: record.version}))

    def test_a_gpu_that_does_not_tell_its_capability(self, engine_folder: Path, record: EngineRecord) -> None:
        with pytest.raises(MissingCapabilityError, match="does not tell the compute capability of GeForce"):
            check_fit(engine_folder, machine(None, **{RTX: record.version}))

    def test_this_machine_is_described_as_it_is(self) -> None:
        import tensorrt_rtx

        found = this_machine()
        assert found.versions[RTX] == tensorrt_rtx.__version__
        assert (found.gpu is None) == (shutil.which("nvidia-smi") is None and not torch.cuda.is_available())

    def test_a_library_that_does_not_load_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "broken_trt.py").write_text("raise OSError('libnvinfer.so.10: cannot open')")
        (tmp_path / "empty_trt").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(MissingCapabilityError, match=r"broken_trt is installed and does not load .*libnvinfer"):
            engine_fit._installed("broken_trt")
        assert engine_fit._installed("empty_trt") is None  # a folder of that name
        assert engine_fit._installed("no_such_trt") is None


class TestFiles:
    def test_a_truncated_engine_is_refused_with_both_sizes(self, folder: Path, fitting: Machine) -> None:
        data = (folder / "model.engine").read_bytes()
        (folder / "model.engine").write_bytes(data[:1000])
        with pytest.raises(InputRefusedError, match=rf"its size is 1000, expected {len(data)} bytes") as error:
            check_fit(folder, fitting)
        assert error.value.exit_code is ExitCode.INPUT_REFUSED

    def test_an_engine_with_one_other_byte_is_refused(self, folder: Path, fitting: Machine) -> None:
        data = bytearray((folder / "model.engine").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "model.engine").write_bytes(data)
        with pytest.raises(InputRefusedError, match=r"model\.engine: its SHA-256 is \w{64}, expected \w{64}"):
            check_fit(folder, fitting)

    def test_a_missing_engine_and_a_missing_folder(self, folder: Path, fitting: Machine) -> None:
        (folder / "model.engine").unlink()
        with pytest.raises(InputRefusedError, match=r"model\.engine: its size is None, expected"):
            check_fit(folder, fitting)
        with pytest.raises(InputMissingError, match="no such file; give a folder written by `pifa-deploy build`"):
            check_fit(folder / "nowhere", fitting)

    def test_the_tokenizer_came_along(self, engine_folder: Path, onnx_folder: Path, record: EngineRecord) -> None:
        assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(record.tokenizer)
        for name in record.tokenizer:
            assert (engine_folder / name).read_bytes() == (onnx_folder / name).read_bytes()

    def test_an_engine_whose_record_contradicts_itself_is_refused(self, folder: Path, fitting: Machine) -> None:
        edit(folder, lambda value: value["engines"][0].update(compute_capabilities=["9.0"]))
        message = r"engines\[0\]\.compute_capabilities is \['9\.0'\], expected some of \['8\.6', '8\.9'\], the record's"
        with pytest.raises(InputRefusedError, match=message):
            check_fit(folder, fitting)

    def test_sizes_that_are_no_numbers_are_refused_before_a_command_is_made_of_them(self, folder: Path) -> None:
        edit(folder, lambda value: value["options"].update(max_cache_len="many"))
        with pytest.raises(
            InputRefusedError, match=r"engine\.json: engine\.options\.max_cache_len is 'many', expected"
        ):
            check_fit(folder, machine("8.6", **{RTX: "1.8"}))


class TestOrigin:
    @pytest.fixture
    def onnx(self, onnx_folder: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(onnx_folder, tmp_path / "onnx"))

    def test_the_folder_that_an_engine_was_built_from_is_its_origin(self, folder: Path, onnx_folder: Path) -> None:
        check_origin(read_engine_json(folder), folder, open_folder(onnx_folder))

    def test_a_record_without_the_weights_is_refused(self, folder: Path, onnx_folder: Path) -> None:
        edit(folder, lambda value: value["onnx"]["sha256"].pop("model.onnx.data"))
        message = r"engine\.json has the hashes of model\.onnx, expected .* model\.onnx, model\.onnx\.data in"
        with pytest.raises(InputRefusedError, match=message):
            check_origin(read_engine_json(folder), folder, open_folder(onnx_folder))

    def test_a_record_of_another_file_is_refused(self, folder: Path, onnx_folder: Path) -> None:
        edit(folder, lambda value: value["onnx"]["sha256"].update({"../../etc/hostname": "0" * 64}))
        with pytest.raises(InputRefusedError, match=r"has the hashes of \.\./\.\./etc/hostname, model\.onnx, "):
            check_origin(read_engine_json(folder), folder, open_folder(onnx_folder))

    @pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json"])
    def test_another_onnx_folder_is_refused(self, name: str, folder: Path, onnx: Path) -> None:
        data = bytearray((onnx / name).read_bytes())
        data[-1] ^= 1
        (onnx / name).write_bytes(data)
        with pytest.raises(
            InputRefusedError,
            match=rf"engine: (was built from|has) a {name} with hash \w{{12}}…, .*onnx/{name} has another",
        ):
            check_origin(read_engine_json(folder), folder, open_folder(onnx))

    def test_a_tokenizer_that_was_changed_in_or_taken_from_the_engine_folder(self, folder: Path, onnx: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(InputRefusedError, match=r"engine: has a tokenizer\.json with hash \w{12}…, .* has another"):
            check_origin(read_engine_json(folder), folder, open_folder(onnx))
        (folder / "tokenizer.json").unlink()
        with pytest.raises(InputRefusedError, match=r"engine/tokenizer\.json is not there"):
            check_origin(read_engine_json(folder), folder, open_folder(onnx))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared library that says of itself what a plugin library says; it holds no kernel."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("library")
    about = {"architectures": "80,86,90", "cuda": 13000, "tensorrt_headers": "", "compiler": ""}
    info = json.dumps(about).replace('"', '\\"')
    code = f'const char* pifaPluginBuildInfo(void) {{ return "{info}"; }} int pifaLinearOpVersion(void) {{ return 1; }}'
    (folder / "plugin.c").write_text(code)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libpifa_plugin.so", folder / "plugin.c"], check=True)
    return folder / "libpifa_plugin.so"


class TestPlugins:
    @pytest.fixture(autouse=True)
    def built_with_a_plugin(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        needed = {"file": "libpifa_plugin.so", "op_version": 1}
        edit(folder, lambda value: value["options"].update(plugin_library=needed))
        monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
        monkeypatch.setattr("pifa_deploy.plugin_library.SOURCE", folder)  # no build of the checkout

    def test_the_plugin_is_not_there(self, folder: Path, fitting: Machine) -> None:
        with pytest.raises(MissingCapabilityError, match=r"engine needs the plugin libpifa_plugin\.so and there is no"):
            check_fit(folder, fitting)

    def test_the_plugin_is_there(self, folder: Path, fitting: Machine, library: Path) -> None:
        assert check_fit(folder, fitting, plugin_library=library).options["plugin_library"]

    def test_the_plugin_is_of_another_version(self, folder: Path, fitting: Machine, library: Path) -> None:
        edit(folder, lambda value: value["options"]["plugin_library"].update(op_version=7))
        with pytest.raises(MisfitError, match=r"version 7 of the plugin's operators, .* has version 1") as error:
            check_fit(folder, fitting, plugin_library=library)
        assert str(advised(error)["plugin"]) == "auto"

    def test_the_plugin_has_no_code_for_the_gpu(self, folder: Path, record: EngineRecord, library: Path) -> None:
        for_old = {"compute_capabilities": ["7.5"]}
        edit(folder, lambda value: (value.update(for_old), value["engines"][0].update(for_old)))
        with pytest.raises(MisfitError, match=r"holds code for 80, 86, 90, this GPU has .*7\.5; run: ") as error:
            check_fit(folder, machine("7.5", **{RTX: record.version}), plugin_library=library)
        asked = advised(error)
        assert (asked["out"], asked["archs"]) == (library.parent, "75")


@pytest.mark.parametrize(
    ("capability", "runs"),
    [("8.6", True), ("8.7", False), ("8.9", True), ("9.0", True), ("12.0", True), ("7.5", False), ("8.0", True)],
)
def test_code_runs_on_its_own_major_version_and_the_newest_on_later_gpus(capability: str, runs: bool) -> None:
    assert _has_code(("80", "86", "90"), capability) == runs
    assert not _has_code(("86", "90"), "8.0")
    assert not _has_code(("90", "120"), "10.0")
    assert not _has_code((), "8.0")


@pytest.mark.parametrize(
    ("compiled", "capability", "runs"),
    [
        (("80", "87", "90"), "8.7", True),
        (("80", "86"), "8.7", True),  # PTX of the newest
        (("87", "90"), "8.9", False),  # nor does the desktop run a Tegra's
        (("80", "87"), "8.9", True),
        (("72", "80"), "7.5", False),
        (("110", "120"), "11.0", True),
        (("100", "120"), "11.0", False),
        (("120",), "12.1", True),
    ],
)
def test_a_tegra_runs_its_own_code_or_ptx_only(compiled: tuple[str, ...], capability: str, runs: bool) -> None:
    assert _has_code(compiled, capability) == runs


def shapes_of(record: EngineRecord, *, batch: int = 1, tokens: int = 1, past: int = 0) -> dict[str, tuple[int, ...]]:
    heads, size = (record.profiles[0]["past_key_values.0.key"]["max"][axis] for axis in (1, 3))
    ids = {"input_ids": (batch, tokens), "attention_mask": (batch, past + tokens), "position_ids": (batch, tokens)}
    return ids | {
        f"past_key_values.{i}.{part}": (batch, heads, past, size) for i in (0, 1) for part in ("key", "value")
    }


class TestShapes:
    @pytest.mark.parametrize("step", [{}, {"batch": 2, "tokens": 16, "past": 32}, {"tokens": 5, "past": 31}])
    def test_a_step_within_the_profile_is_taken(self, record: EngineRecord, step: dict[str, int]) -> None:
        check_shapes(record, Path("engine"), shapes_of(record, **step))

    @pytest.mark.parametrize(
        ("step", "message", "flags"),
        [
            ({"tokens": 17}, r"input_ids has the size \[1, 17\], the engine takes 1 to 16", {"max_input_len": 17}),
            ({"batch": 3}, r"input_ids has the size \[3, 1\], the engine takes 1 to 2", {"max_batch_size": 3}),
            ({"past": 33}, r"key_values\.0\.key .*takes 0 to 32 at dimension 2", {"max_cache_len": 33}),
            ({"batch": 4, "past": 99}, "input_ids has", {"max_batch_size": 4, "max_cache_len": 99}),
        ],
    )
    def test_a_step_outside_names_input_limits_and_the_command_that_mends_it(
        self, record: EngineRecord, step: dict[str, int], message: str, flags: dict[str, int]
    ) -> None:
        with pytest.raises(MisfitError, match=message) as error:
            check_shapes(record, Path("my engine"), shapes_of(record, **step))
        asked = advised(error)
        kept = {"max_batch_size": 2, "max_input_len": 16, "max_cache_len": 32}
        assert {name: asked[name] for name in kept} == kept | flags
        assert (asked["out"], asked["compute_capabilities"]) == (Path("my engine"), "8.6,8.9")

    def test_a_cache_of_another_model_is_refused(self, record: EngineRecord) -> None:
        other = shapes_of(record) | {"past_key_values.0.key": (1, 99, 0, 8)}
        with pytest.raises(MisfitError, match=r"past_key_values\.0\.key has the size \[1, 99, 0, 8\]"):
            check_shapes(record, Path("engine"), other)
        with pytest.raises(MisfitError, match=r"input pixels has the size .*the engine takes no such input"):
            check_shapes(record, Path("engine"), shapes_of(record) | {"pixels": (1,)})

    def test_the_limits_are_those_of_the_build(self, record: EngineRecord) -> None:
        assert step_limits(record) == StepLimits(tokens=16, past=32)

    def test_the_inputs_are_those_of_the_graph(self, record: EngineRecord, onnx_folder: Path) -> None:
        runner = open_runner(onnx_folder)
        assert isinstance(runner, OnnxRuntimeRunner)
        assert profile_dimensions(record) == {name: shape for name, (_, shape) in runner.input_shapes().items()}


def test_the_command_builds_an_engine_that_takes_the_step(
    record: EngineRecord, onnx_folder: Path, tmp_path: Path
) -> None:
    from pifa_deploy.engine import BuildOptions, build_engines

    asked = parsed(rebuild_command(record, tmp_path / "engine", sizes={"max_input_len": 40}))
    names = ("max_batch_size", "max_input_len", "max_cache_len", "sparsity", "backend", "force")
    options = BuildOptions(compute_capabilities=("8.6",), **{name: asked[name] for name in names})
    built = build_engines(onnx_folder, asked["out"], options)
    check_shapes(built, tmp_path, shapes_of(record, tokens=40))
    with pytest.raises(MisfitError):
        check_shapes(built, tmp_path, shapes_of(record, tokens=41))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
class TestWithoutGpu:
    def test_the_runner_says_that_there_is_none(self, engine_folder: Path) -> None:
        with pytest.raises(MissingCapabilityError, match="this machine has no NVIDIA GPU"):
            TensorRTRunner(engine_folder)

    def test_a_gpu_that_torch_does_not_see_is_not_enough(self, engine_folder: Path, fitting: Machine) -> None:
        with pytest.raises(MissingCapabilityError, match=r"finds no GPU, and .* is fed through it"):
            TensorRTRunner(engine_folder, machine=fitting)

    def test_what_tensorrt_says_of_an_engine_is_one_line(self, engine_folder: Path) -> None:
        import tensorrt_rtx

        from pifa_deploy.errors import StageFailedError

        log = error_log(tensorrt_rtx)
        with pytest.raises(StageFailedError, match=r"did not load the engine \(.*CUDA driver") as error:
            loaded_engine(tensorrt_rtx, log, engine_folder / "model.engine")
        assert "\n" not in str(error.value)
        assert log.take() == "it said nothing"

    def test_generate_ends_with_exit_code_3(self, engine_folder: Path, pifa_deploy: Callable[..., Outcome]) -> None:
        pifa_deploy("generate", engine_folder, "Emma").failed(ExitCode.NOT_DECIDED, "this machine has no NVIDIA GPU")


def test_all_that_is_asked_of_tensorrt_is_there() -> None:
    # The engine itself runs on a GPU only: names are checked against the installed bindings.
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'pifa-deploy[rtx]'")
    classes = {
        "context": trt.IExecutionContext,
        "self._engine": trt.ICudaEngine,
        "runtime": trt.Runtime,
        "config": trt.IRuntimeConfig,
        "strategies": trt.DynamicShapesKernelSpecializationStrategy,
        "trt": trt,
        "self._trt": trt,
    }
    tree = ast.parse(Path(tensorrt_runner.__file__).read_text(encoding="utf-8"))
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) in classes]
    assert {ast.unparse(node.value) for node in uses} == set(classes)
    missing = [ast.unparse(node) for node in uses if not hasattr(classes[ast.unparse(node.value)], node.attr)]
    assert missing == []


def test_the_log_keeps_errors_and_forgets_them_once_told() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'pifa-deploy[rtx]'")
    log, levels = error_log(trt), trt.ILogger.Severity
    log.take()
    assert error_log(trt) is log  # TensorRT tells the first one what concerns the engines of others too
    log.log(levels.INFO, "working")
    log.log(levels.WARNING, "slow")
    log.log(levels.ERROR, "out of\n memory")
    log.log(levels.INTERNAL_ERROR, "broken")
    assert log.take() == "out of memory; broken"
    assert log.take() == "it said nothing"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
class TestOnGpu:
    def test_an_engine_answers_as_onnx_runtime_does(self, onnx_folder: Path, tmp_path: Path) -> None:
        from pifa_deploy.engine import BuildOptions, build_engines

        here = this_machine()
        capability = here.gpu.compute_capability if here.gpu else None
        if capability is None or RTX not in here.versions:
            pytest.skip("no TensorRT-RTX for this GPU")
        options = BuildOptions(compute_capabilities=(capability,), max_input_len=16, max_cache_len=32)
        build_engines(onnx_folder, tmp_path / "engine", options)
        engine, reference = TensorRTRunner(tmp_path / "engine"), open_runner(onnx_folder)
        ids, caches = np.arange(3, 13), [None, None]
        for start, end in ((0, 7), (7, 8), (8, 10)):
            step = Step.after(start, ids[start:end])
            (found, caches[0]), (expected, caches[1]) = engine.step(step, caches[0]), reference.step(step, caches[1])
            assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
        for graph in (False, True):
            call = engine.timed(Step.after(9, ids[9:]), cuda_graph=graph)
            call.launch()
            call.wait()
            assert call.gpu_ms() > 0


def test_a_plugin_of_the_record_is_found_again(record: EngineRecord) -> None:
    with_plugin = replace(record, options={**record.options, "plugin_library": {"file": "x.so"}})
    assert str(parsed(rebuild_command(with_plugin, Path("engine")))["plugin"]) == "auto"
    assert parsed(rebuild_command(record, Path("engine")))["plugin"] is None
