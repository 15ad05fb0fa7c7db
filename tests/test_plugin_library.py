"""The plugin library as a file: how it is found, built, described, and what it needs of the machine that loads it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from cli_fixtures import Outcome

from pifa_deploy import op_spec, plugin_build, plugin_library
from pifa_deploy.errors import (
    BuildError,
    InputMissingError,
    InputRefusedError,
    MisfitError,
    MissingCapabilityError,
)
from pifa_deploy.plugin_build import LIBRARY, SOURCE, BuildTools, PluginBuildOptions, build_library, build_tools
from pifa_deploy.plugin_library import (
    LIBRARY_VARIABLE,
    describe_library,
    find_library,
    load_library,
    messages_in_log,
    rtx_library_path,
)

pytest_plugins = ("cli_plugin", "plugin_fixtures")

ARCHITECTURE = "86"  # as in plugin_fixtures.py
FAKE_KERNELS = SOURCE / "tests" / "fakeKernels.cpp"


@pytest.fixture(name="library")
def built_library(plugin_library: Path) -> Path:
    return plugin_library


@pytest.fixture
def no_cmake(monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **rest: None if name == "cmake" else which(name, **rest))


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine whose only programs are cmake and a C++ compiler."""
    for name in ("cmake", "c++", "g++", "as", "ld", "ninja", "make"):
        if found := shutil.which(name):
            (tmp_path / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(plugin_build, "_NVCC_PLACES", ())
    for name in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)


# --- the file ---------------------------------------------------------------------------------------------------


def test_a_library_says_what_it_was_built_for_and_from(library: Path) -> None:
    found = describe_library(library)
    assert (found.file, found.bytes, found.op_version) == (LIBRARY, library.stat().st_size, op_spec.OP_VERSION)
    assert found.architectures == (ARCHITECTURE,)
    assert found.cuda >= 12000
    assert re.fullmatch(r"1\d\.\d+\.\d+", found.tensorrt_headers)
    assert json.loads(json.dumps(found.to_json()))["architectures"] == [ARCHITECTURE]


def test_a_library_exports_what_is_called_from_outside_and_nothing_else(library: Path) -> None:
    listed = subprocess.check_output(["nm", "-D", "--defined-only", str(library)], text=True)
    names = {line.split()[-1] for line in listed.splitlines()}
    assert {"getCreators", "setLoggerFinder", "pifaPluginSetLogSink", "pifaLinearEnqueue"} <= names
    assert all(name.startswith(("pifaLinear", "pifaPlugin")) for name in names - {"getCreators", "setLoggerFinder"})


def test_a_library_needs_neither_tensorrt_nor_cuda_libraries_to_load(library: Path) -> None:
    listed = subprocess.check_output(["readelf", "-d", str(library)], text=True)
    needed = {name.partition(".so")[0] for name in re.findall(r"NEEDED.*\[(.+)\]", listed)}
    loader = {"ld-linux-x86-64", "ld-linux-aarch64"}
    assert needed <= {"libstdc++", "libm", "libgcc_s", "libc", "libdl", "libpthread", "librt", *loader}


def test_a_library_holds_code_for_the_architecture_that_was_asked_for(library: Path) -> None:
    if shutil.which("cuobjdump") is None:
        pytest.skip("cuobjdump is not installed")
    listed = subprocess.check_output(["cuobjdump", "--list-elf", "--list-ptx", str(library)], text=True)
    assert set(re.findall(r"sm_\d+", listed)) == {f"sm_{ARCHITECTURE}"}
    assert ".ptx" in listed


def test_another_library_or_no_library_is_refused(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputMissingError, match=r"none\.so: no such plugin library"):
        describe_library(tmp_path / "none.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(InputRefusedError, match=r"text\.so is not a PifaLinear plugin that loads here"):
        describe_library(tmp_path / "text.so")
    monkeypatch.setattr(op_spec, "OP_VERSION", 2)
    with pytest.raises(MisfitError, match=r"implements version 1 of pifa::PifaLinear, this program writes version 2"):
        describe_library(library)


# --- finding ----------------------------------------------------------------------------------------------------


def test_what_is_named_is_found_before_the_variable_and_that_before_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_library, "SOURCE", tmp_path)
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    with pytest.raises(MissingCapabilityError, match=rf"{LIBRARY_VARIABLE} is not set; run `pifa-deploy plugin build`"):
        find_library()
    files = [tmp_path / "build" / LIBRARY, tmp_path / "variable.so", tmp_path / "named.so"]
    files[0].parent.mkdir()
    for file in files:
        file.touch()
    assert find_library() == files[0]
    monkeypatch.setenv(LIBRARY_VARIABLE, str(files[1]))
    assert find_library() == files[1]
    assert find_library(files[2]) == files[2]
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "gone.so"))
    with pytest.raises(InputMissingError, match=rf"gone\.so \(from {LIBRARY_VARIABLE}\): no such plugin library"):
        find_library()


# --- building ---------------------------------------------------------------------------------------------------


def test_without_nvcc_the_machine_is_named_and_the_cure(no_nvcc: None, tmp_path: Path) -> None:
    with pytest.raises(MissingCapabilityError, match=r"nvcc was not found.*install the CUDA toolkit"):
        build_library(tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_cmake_without_nvcc_says_so(no_nvcc: None, tmp_path: Path) -> None:
    # Defined and empty: otherwise CMake would look in places that this test cannot hide.
    command = ["cmake", "-S", str(SOURCE), "-B", str(tmp_path / "build"), "-DPIFA_NVCC="]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "nvcc was not found. Install the CUDA toolkit" in " ".join(done.stderr.split())


def test_without_cmake_nvcc_alone_builds_the_same_library(
    no_cmake: None, tmp_path: Path, tensorrt_headers: Path
) -> None:
    options = PluginBuildOptions(architectures=(ARCHITECTURE,), tensorrt_root=tensorrt_headers, kernels=(FAKE_KERNELS,))
    built = build_library(tmp_path / "build", options)
    assert built == tmp_path / "build" / LIBRARY
    found = describe_library(built)
    assert (found.architectures, found.op_version) == ((ARCHITECTURE,), op_spec.OP_VERSION)


def test_a_compiler_error_is_a_build_error_with_its_last_lines(
    no_cmake: None, tmp_path: Path, tensorrt_headers: Path
) -> None:
    broken = tmp_path / "broken.cu"
    broken.write_text('#include "no_such_header.h"\n')
    options = PluginBuildOptions(architectures=(ARCHITECTURE,), tensorrt_root=tensorrt_headers, kernels=(broken,))
    with pytest.raises(BuildError, match=r"no_such_header\.h.*the whole log is .*plugin\.log"):
        build_library(tmp_path / "build", options)
    assert not (tmp_path / "build" / LIBRARY).exists()


def test_without_headers_the_two_ways_to_them_are_named(
    no_cmake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_build, "_HEADER_FOLDERS", ())
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    with pytest.raises(
        MissingCapabilityError, match=r"NvInferRuntime\.h was not found.*--tensorrt-root.*--fetch-headers"
    ):
        build_library(tmp_path / "build", PluginBuildOptions(architectures=(ARCHITECTURE,)))


def test_the_tools_of_a_build_are_looked_for_where_a_build_takes_them(
    no_nvcc: None, no_cmake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_build, "_HEADER_FOLDERS", ())
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    assert build_tools() == BuildTools(nvcc=None, cmake=False, headers=False, source=True)
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    include = tmp_path / "trt" / "include"
    include.mkdir(parents=True)
    (include / "NvInferRuntime.h").touch()
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "trt"))
    monkeypatch.setattr(plugin_build, "SOURCE", tmp_path)
    assert build_tools() == BuildTools(nvcc=str(compiler), cmake=False, headers=True, source=False)


@pytest.mark.parametrize("cmake", [True, False])
def test_an_architecture_that_nvcc_does_not_know_is_refused(
    cmake: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not cmake:
        request.getfixturevalue("no_cmake")
    expected = "PIFA_ARCHS names 999, this nvcc knows" if cmake else "architecture 999 is not one that .* knows"
    with pytest.raises((BuildError, ValueError), match=expected):
        build_library(tmp_path / "build", PluginBuildOptions(architectures=("999",)))


def test_options_refuse_what_is_no_architecture_and_no_job(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"architecture is '8\.6', expected a compute capability without dot"):
        PluginBuildOptions(architectures=("8.6",))
    with pytest.raises(ValueError, match="jobs is 0"):
        PluginBuildOptions(jobs=0)
    with pytest.raises(InputMissingError, match="holds no plugin sources; clone the repository"):
        build_library(tmp_path / "build", PluginBuildOptions(source=tmp_path))


# --- headers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """plugins/cmake/fetch_headers.py, whose pip writes a small wheel."""
    spec = importlib.util.spec_from_file_location("fetch_headers", SOURCE / "cmake" / "fetch_headers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def pip(command: list[str], **rest: Any) -> SimpleNamespace:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some.whl", "w") as archive:
            archive.writestr(module.HEADERS + "NvInferRuntime.h", "// header")
            archive.writestr("kernel_lens/other.py", "")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=pip))
    return module


def test_headers_are_taken_out_of_the_wheel_and_nothing_else(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.hashlib, "sha256", lambda data: SimpleNamespace(hexdigest=lambda: fetch.SHA256))
    fetch.main(tmp_path / "headers")
    assert sorted(path.name for path in (tmp_path / "headers").iterdir()) == ["NvInferRuntime.h"]
    assert [path.name for path in tmp_path.iterdir()] == ["headers"]


def test_a_wheel_of_another_content_is_refused(fetch: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"some\.whl has SHA-256 [0-9a-f]{64}, expected"):
        fetch.main(tmp_path / "headers")
    assert list(tmp_path.iterdir()) == []


# --- loading ----------------------------------------------------------------------------------------------------


def test_a_library_that_tensorrt_does_not_take_is_a_build_error() -> None:
    registry = SimpleNamespace(load_library=lambda path: None, get_creator=lambda *names: None)
    trt = SimpleNamespace(__name__="tensorrt", __version__="10.16", get_plugin_registry=lambda: registry)
    with pytest.raises(BuildError, match=r"tensorrt 10\.16 has no pifa::PifaLinear version 1 after loading some\.so"):
        load_library(trt, "/folder/some.so")


def test_the_link_for_tensorrt_rtx_lives_in_a_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("tensorrt_rtx_libs") is None:
        pytest.skip("TensorRT-RTX is not installed: pip install 'pifa-deploy[rtx]'")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    with rtx_library_path() as value:
        folder, before = value.split(os.pathsep)
        link = Path(folder) / "libtensorrt_rtx.so"
        assert before == "/before"
        assert link.is_symlink()
        assert link.resolve().name.startswith("libtensorrt_rtx.so.")
    assert not Path(folder).exists()


def test_the_plugins_own_errors_are_found_in_a_build_log(tmp_path: Path) -> None:
    log = tmp_path / "build.log"
    lines = ["[V] parsing", *(f"[E] pifa::PifaLinear layer '{i}': rank is 0" for i in range(5)), "[E] TensorRT's own"]
    log.write_text("\n".join(lines))
    assert messages_in_log(log) == lines[1:4]


# --- command line -----------------------------------------------------------------------------------------------


def test_info_tells_what_a_library_is(pifa_deploy: Callable[..., Outcome], library: Path) -> None:
    outcome = pifa_deploy("plugin", "info", library, "--json", "-")
    assert outcome.code == 0
    assert json.loads(outcome.out) == {"library": str(library), **describe_library(library).to_json()}
    outcome = pifa_deploy("plugin", "info", library)
    assert f"compute capabilities {ARCHITECTURE}" in outcome.out


def test_info_of_nothing_built_is_a_machine_that_lacks_something(
    pifa_deploy: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_library, "SOURCE", tmp_path)
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    outcome = pifa_deploy("plugin", "info")
    assert outcome.code == 3
    assert "run `pifa-deploy plugin build`" in outcome.err


def test_build_reuses_what_was_compiled(
    pifa_deploy: Callable[..., Outcome], library: Path, alone_in_build: None
) -> None:
    before = library.stat().st_mtime_ns
    arguments = ("--archs", ARCHITECTURE, "--fetch-headers", "--jobs", "1", "--json", "-")
    outcome = pifa_deploy("plugin", "build", library.parent, *arguments)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["architectures"] == [ARCHITECTURE]
    assert library.stat().st_mtime_ns == before


def test_an_engine_build_with_a_missing_plugin_is_wrong_usage(
    pifa_deploy: Callable[..., Outcome], tmp_path: Path
) -> None:
    outcome = pifa_deploy("build", tmp_path, tmp_path / "engine", "--plugin", tmp_path / "none.so")
    assert outcome.code == 2
    assert "none.so: no such plugin library; build it or leave it out" in outcome.err
