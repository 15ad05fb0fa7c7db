"""The plugin library, built once a session for one architecture. It needs nvcc, no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from pifa_deploy.errors import MissingCapabilityError
from pifa_deploy.plugin_build import PluginBuildOptions, build_library

ARCHITECTURE = "86"


@pytest.fixture(scope="session")
def plugin_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CMake build of the plugin."""
    folder = tmp_path_factory.mktemp("plugin") / "build"
    try:
        build_library(folder, PluginBuildOptions(architectures=(ARCHITECTURE,), fetch_headers=True))
    except MissingCapabilityError as error:
        pytest.skip(f"the plugin cannot be built here: {error}")
    return folder


@pytest.fixture(scope="session")
def plugin_library(plugin_build: Path) -> Path:
    return plugin_build / "libpifa_plugin.so"


@pytest.fixture(scope="session")
def tensorrt_headers(plugin_build: Path) -> Path:
    """The folder of NvInferRuntime.h that the build used."""
    for line in (plugin_build / "CMakeCache.txt").read_text().splitlines():
        if line.startswith("TENSORRT_HEADERS:"):
            return Path(line.partition("=")[2])
    raise AssertionError("the CMake cache names no TensorRT headers")
