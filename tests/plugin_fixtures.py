"""The plugin library, built once a run for one architecture, whichever workers ask. It needs nvcc, no GPU."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pifa_deploy.errors import MissingCapabilityError
from pifa_deploy.output_folder import write_text
from pifa_deploy.plugin_build import PluginBuildOptions, build_library

ARCHITECTURE = "86"


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Waits until no other process holds this lock; the kernel frees it when its holder dies."""
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def build_lock(build: Path) -> Path:
    """The file to hold while one works in the build that all workers share."""
    return build.with_name("build.lock")


@pytest.fixture(scope="session")
def plugin_build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CMake build of the plugin, which belongs to all workers: hold `build_lock` to build in it."""
    common = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # each worker of pytest-xdist has a folder of its own in this one
        common = common.parent
    made = common / "plugin-build"
    with held(common / "plugin-build.lock"):
        # A folder of its own for each attempt: the compilers of a worker that was killed may still write to theirs.
        if not made.exists():
            folder = tmp_path_factory.mktemp("plugin") / "build"
            try:
                build_library(folder, PluginBuildOptions(architectures=(ARCHITECTURE,), fetch_headers=True))
            except MissingCapabilityError as error:
                pytest.skip(f"the plugin cannot be built here: {error}")
            write_text(made, str(folder))
        return Path(made.read_text(encoding="utf-8"))


@pytest.fixture
def alone_in_build(plugin_build: Path) -> Iterator[None]:
    """Keeps other workers from building in `plugin_build` during a test."""
    with held(build_lock(plugin_build)):
        yield


@pytest.fixture(scope="session")
def plugin_programs(plugin_build: Path) -> Callable[..., Path]:
    """`plugin_programs("host", ...)` builds these targets of plugins/tests and returns the folder they are in."""

    def build(*targets: str) -> Path:
        command = ["cmake", "--build", str(plugin_build), "--target", *targets]
        with held(build_lock(plugin_build)):
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return plugin_build / "tests"

    return build


@pytest.fixture(scope="session")
def plugin_library(plugin_build: Path) -> Path:
    return plugin_build / "libpifa_plugin.so"


@pytest.fixture(scope="session")
def tensorrt_headers(plugin_build: Path) -> Path:
    """The folder of NvInferRuntime.h that the build used."""
    with held(build_lock(plugin_build)):
        cache = (plugin_build / "CMakeCache.txt").read_text(encoding="utf-8")
    for line in cache.splitlines():
        if line.startswith("TENSORRT_HEADERS:"):
            return Path(line.partition("=")[2])
    raise AssertionError("the CMake cache names no TensorRT headers")
