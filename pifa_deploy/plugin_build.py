"""How the plugin library is built: with CMake, or with nvcc alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pifa_deploy.build_log import last_lines
from pifa_deploy.errors import BuildError, InputMissingError, MissingCapabilityError

LIBRARY = "libpifa_plugin.so"
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
class BuildTools:
    """What there is of what a build of the plugin needs.

    Attributes:
        nvcc: the compiler, None without one.
        cmake: whether CMake is there; without it nvcc is called directly.
        headers: whether TensorRT's headers are where a build looks without being told.
        source: whether this package is installed from a checkout with the plugin's sources.
    """

    nvcc: str | None
    cmake: bool
    headers: bool
    source: bool


def build_tools() -> BuildTools:
    """Looks for them; runs nothing."""
    try:
        nvcc: str | None = _nvcc()
    except MissingCapabilityError:
        nvcc = None
    return BuildTools(
        nvcc=nvcc,
        cmake=shutil.which("cmake") is not None,
        headers=_found_headers(None, None) is not None,
        source=(SOURCE / "CMakeLists.txt").is_file(),
    )


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
    fetched = folder / "tensorrt-headers"
    if found := _found_headers(options.tensorrt_root, fetched):
        return found
    if not options.fetch_headers:
        raise MissingCapabilityError(_NO_HEADERS)
    _run([sys.executable, str(options.source / "cmake/fetch_headers.py"), str(fetched)], folder / PLUGIN_LOG)
    return fetched


def _found_headers(root: Path | None, fetched: Path | None) -> Path | None:
    named = os.environ.get("TENSORRT_ROOT")
    root = root or (Path(named) if named else None)
    places = [*((root, root / "include") if root else ()), *map(Path, _HEADER_FOLDERS), *filter(None, [fetched])]
    return next((place for place in places if (place / _HEADER).is_file()), None)


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
