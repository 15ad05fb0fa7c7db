"""The CUDA plugin for TensorRT: where the library is, how it is built, what it says about itself, how it is loaded."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pifa_deploy import op_spec
from pifa_deploy.build_log import last_lines
from pifa_deploy.digest import file_sha256
from pifa_deploy.errors import BuildError, InputMissingError, InputRefusedError, MisfitError, MissingCapabilityError

LIBRARY = "libpifa_plugin.so"
LIBRARY_VARIABLE = "PIFA_PLUGIN_LIBRARY"
PLUGIN_LOG = "plugin.log"
SOURCE = Path(__file__).resolve().parents[1] / "plugins"
_HEADER = "NvInferRuntime.h"
_HEADER_FOLDERS = (
    *("/usr/include", "/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu"),
    *("/usr/local/include", "/usr/local/tensorrt/include", "/opt/tensorrt/include"),
)
_NO_HEADERS = (
    f"{_HEADER} was not found; name a TensorRT folder with --tensorrt-root, "
    "or download the headers with --fetch-headers"
)
_NVCC_PLACES = ("/usr/local/cuda/bin/nvcc",)
_ARCHITECTURE = re.compile(r"\d{2,3}")


@dataclass(frozen=True, kw_only=True)
class PluginBuildOptions:
    """How the plugin library is built.

    Attributes:
        source: folder `plugins` of a checkout; the one that this package was installed from in editable mode.
        architectures: compute capabilities without dot ("86"); all that the plugin serves and nvcc knows if empty.
        tensorrt_root: folder with TensorRT's headers; where the system keeps them if left out.
        fetch_headers: download the headers from the package index where they are not found.
        kernels: files that implement pifaLinear.h in place of the plugin's own; for tests and experiments.
        jobs: files that are compiled at once.
    """

    source: Path = SOURCE
    architectures: tuple[str, ...] = ()
    tensorrt_root: Path | None = None
    fetch_headers: bool = False
    kernels: tuple[Path, ...] = ()
    jobs: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError for an architecture that is no number or fewer jobs than one."""
        for name in self.architectures:
            if not _ARCHITECTURE.fullmatch(name):
                raise ValueError(f"architecture is {name!r}, expected a compute capability without dot such as 86")
        if self.jobs < 1:
            raise ValueError(f"jobs is {self.jobs}, expected 1 or more")


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


def build_library(folder: Path, options: PluginBuildOptions | None = None) -> Path:
    """Builds the plugin library in `folder` and returns its path; what was compiled there before is reused.

    Uses CMake, or nvcc alone where there is no CMake. `folder`/plugin.log has what the compilers said.

    Raises:
        InputMissingError: the sources are not there.
        MissingCapabilityError: nvcc or the TensorRT headers are missing.
        BuildError: the compilation failed; the message has its last lines.
    """
    options = options or PluginBuildOptions()
    if not (options.source / "CMakeLists.txt").is_file():
        raise InputMissingError(
            f"{options.source} holds no plugin sources; clone the repository and name its folder plugins with --source"
        )
    nvcc = _nvcc()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / PLUGIN_LOG
    log.unlink(missing_ok=True)
    library = folder / LIBRARY
    if shutil.which("cmake") is None:
        _run(_nvcc_command(nvcc, folder, options), log)
        (folder / f"{LIBRARY}.new").replace(library)
        return library
    _run(_configure_command(nvcc, folder, options), log)
    _run(["cmake", "--build", str(folder), "--parallel", str(options.jobs)], log)
    return library


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc"), f"{home}/bin/nvcc" if home else None]
    for place in [*places, *_NVCC_PLACES]:
        if place and (found := shutil.which(place)):
            return found
    raise MissingCapabilityError(
        "nvcc was not found, the plugin is compiled with it; install the CUDA toolkit (12.0 or newer) or set CUDA_HOME"
    )


def _configure_command(nvcc: str, folder: Path, options: PluginBuildOptions) -> list[str]:
    definitions = {
        "PIFA_NVCC": nvcc,
        "PIFA_ARCHS": ";".join(options.architectures),
        "PIFA_KERNELS": ";".join(str(path.resolve()) for path in options.kernels),
        "PIFA_FETCH_TENSORRT_HEADERS": "ON" if options.fetch_headers else "OFF",
        "Python3_EXECUTABLE": sys.executable,
    }
    if options.tensorrt_root is not None:
        definitions["TENSORRT_ROOT"] = str(options.tensorrt_root.resolve())
    flags = [f"-D{name}={value}" for name, value in definitions.items()]
    return ["cmake", "-S", str(options.source), "-B", str(folder), *flags]


def _nvcc_command(nvcc: str, folder: Path, options: PluginBuildOptions) -> list[str]:
    """Returns one command that does what CMakeLists.txt says."""
    wanted = options.architectures or tuple((options.source / "cmake/architectures.txt").read_text().split())
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    known = set(re.findall(r"\d+", listed))
    if missing := [name for name in options.architectures if name not in known]:
        raise ValueError(f"architecture {missing[0]} is not one that {nvcc} knows: {', '.join(sorted(known, key=int))}")
    chosen = sorted((name for name in wanted if name in known), key=int)
    if not chosen:
        raise MissingCapabilityError(f"{nvcc} knows none of {', '.join(wanted)}; install a newer CUDA toolkit")
    code = [f"arch=compute_{name},code=sm_{name}" for name in chosen]
    code.append(f"arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
    sources = options.source / "pifaLinear"
    files = [*sorted(sources.glob("*.cpp")), *(options.kernels or sorted(sources.glob("*.cu")))]
    return [
        *(nvcc, "-shared", "-O3", "-std=c++17", "-cudart", "static", "-Xcompiler", "-fPIC"),
        *(part for each in code for part in ("-gencode", each)),
        f'-DPIFA_BUILD_ARCHS="{",".join(chosen)}"',
        *("-isystem", str(_headers(folder, options)), "-I", str(sources)),
        *("-Xlinker", f"--version-script={options.source / 'cmake/exports.map'}", "-Xlinker", "--no-undefined"),
        *map(str, files),
        *("-o", str(folder / f"{LIBRARY}.new"), "-ldl", "-lpthread", "-lrt"),
    ]


def _headers(folder: Path, options: PluginBuildOptions) -> Path:
    named = os.environ.get("TENSORRT_ROOT")
    root: Path | None = options.tensorrt_root or (Path(named) if named else None)
    fetched = folder / "tensorrt-headers"
    places: list[Path] = [*((root, root / "include") if root else ()), *map(Path, _HEADER_FOLDERS), fetched]
    for place in places:
        if (place / _HEADER).is_file():
            return place
    if not options.fetch_headers:
        raise MissingCapabilityError(_NO_HEADERS)
    _run([sys.executable, str(options.source / "cmake/fetch_headers.py"), str(fetched)], folder / PLUGIN_LOG)
    return fetched


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("ab") as stream:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, check=False)
    if done.returncode == 0:
        return
    said = " ".join(log.read_text(encoding="utf-8", errors="replace").split())  # CMake breaks its lines
    if _HEADER in said and "was not found" in said:
        raise MissingCapabilityError(_NO_HEADERS)
    if "could not be downloaded" in said:
        raise MissingCapabilityError(f"the TensorRT headers could not be downloaded, see {log}; name a TensorRT folder")
    raise BuildError(f"the plugin was not built; last lines: {last_lines(log)}; the whole log is {log}")
