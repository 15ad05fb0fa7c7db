"""The CUDA plugin for TensorRT: where the library is, what it says about itself, how it is loaded."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pifa_deploy import op_spec
from pifa_deploy.digest import file_sha256
from pifa_deploy.errors import BuildError, InputMissingError, InputRefusedError, MisfitError, MissingCapabilityError
from pifa_deploy.plugin_build import LIBRARY, SOURCE

LIBRARY_VARIABLE = "PIFA_PLUGIN_LIBRARY"


@dataclass(frozen=True, kw_only=True)
class PluginLibrary:
    """What a plugin library is.

    Attributes:
        file: its file name.
        bytes: its size.
        sha256: its hash.
        op_version: version of the operators that it implements.
        architectures: compute capabilities without dot that it holds code for.
        cuda: version of the CUDA toolkit it was built with, e.g. 13000.
        tensorrt_headers: version of the TensorRT headers it was built with; it loads into others too.
        compiler: version of the host compiler.
    """

    file: str
    bytes: int
    sha256: str
    op_version: int
    architectures: tuple[str, ...]
    cuda: int
    tensorrt_headers: str
    compiler: str

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {**asdict(self), "architectures": list(self.architectures)}


def find_library(path: Path | None = None) -> Path:
    """Returns the plugin library: `path`, else what PIFA_PLUGIN_LIBRARY names, else the checkout's own build.

    Raises:
        InputMissingError: `path` or the variable names no file.
        MissingCapabilityError: nothing was named and nothing built.
    """
    variable = os.environ.get(LIBRARY_VARIABLE)
    for named, origin in ((path, ""), (Path(variable) if variable else None, f" (from {LIBRARY_VARIABLE})")):
        if named is not None:
            if not named.is_file():
                raise InputMissingError(f"{named}{origin}: no such plugin library; build it or leave it out")
            return named.resolve()
    built = SOURCE / "build" / LIBRARY
    if not built.is_file():
        raise MissingCapabilityError(
            f"there is no {built} and {LIBRARY_VARIABLE} is not set; run `pifa-deploy plugin build` in a checkout"
        )
    return built


def describe_library(path: Path) -> PluginLibrary:
    """Returns what a plugin library says about itself; loads it into this process, which needs no GPU.

    Raises:
        InputMissingError: no such file.
        InputRefusedError: it does not load, or is another library.
        MisfitError: it implements another version of the operators.
    """
    if not path.is_file():
        raise InputMissingError(f"{path}: no such plugin library; build it or leave it out")
    try:
        library = ctypes.CDLL(str(path.resolve()))
        library.pifaPluginBuildInfo.restype = ctypes.c_char_p
        info = json.loads(library.pifaPluginBuildInfo())
        version = int(library.pifaLinearOpVersion())
    except (OSError, AttributeError) as error:
        raise InputRefusedError(f"{path} is not a PifaLinear plugin that loads here: {error}; build it here") from error
    if version != op_spec.OP_VERSION:
        raise MisfitError(
            f"{path} implements version {version} of {op_spec.DOMAIN}::{op_spec.OP_TYPE}, this program writes version "
            f"{op_spec.OP_VERSION}; build the plugin of this checkout"
        )
    return PluginLibrary(
        file=path.name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        op_version=version,
        architectures=tuple(filter(None, info["architectures"].split(","))),
        cuda=int(info["cuda"]),
        tensorrt_headers=info["tensorrt_headers"],
        compiler=info["compiler"],
    )


def load_library(trt: Any, path: Path | str) -> None:
    """Registers the plugin library with a TensorRT of any flavour, for the rest of the process.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        path: the library.

    Raises:
        BuildError: TensorRT did not take it.
    """
    registry = trt.get_plugin_registry()
    registry.load_library(str(path))
    # load_library returns None for a file that it cannot load and, in some versions, for one that is loaded already.
    if registry.get_creator(op_spec.OP_TYPE, op_spec.PLUGIN_VERSION, op_spec.PLUGIN_NAMESPACE) is None:
        raise BuildError(
            f"{trt.__name__} {trt.__version__} has no {op_spec.DOMAIN}::{op_spec.OP_TYPE} version "
            f"{op_spec.PLUGIN_VERSION} after loading {Path(path).name}; see `pifa-deploy plugin info` for the library"
        )


def messages_in_log(log: Path, limit: int = 3) -> list[str]:
    """Returns the first errors that the plugin wrote into a build log; what TensorRT makes of them comes after."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line[:300] for line in lines if line.startswith(f"[E] {op_spec.DOMAIN}::")][:limit]


@contextlib.contextmanager
def rtx_library_path() -> Iterator[str]:
    """Yields a value of LD_LIBRARY_PATH with which TensorRT-RTX parses a plugin node.

    The parser opens libtensorrt_rtx.so and aborts when there is none; the wheel holds libtensorrt_rtx.so.1 only. The
    link lives in a temporary folder, and must be there when the process starts.
    """
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found = sorted(file for folder in folders for file in folder.glob("libtensorrt_rtx.so.*"))
    before = os.environ.get("LD_LIBRARY_PATH")
    with tempfile.TemporaryDirectory(prefix="pifa-rtx-") as folder:
        if found:
            (Path(folder) / "libtensorrt_rtx.so").symlink_to(found[0])
        yield os.pathsep.join([folder, *filter(None, [before])])
