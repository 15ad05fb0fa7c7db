"""What is installed, what this machine can do with it, and what to install for the rest.

Versions come from package metadata: nothing heavy is imported, and a broken library cannot stop the
diagnosis.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pifa_deploy.plugin_build import BuildTools, build_tools
from pifa_deploy.targets import RTX, SERVED, TENSORRT, LocalGpu, local_gpus

# module -> the distributions that install it; the first one found gives the version.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "safetensors": ("safetensors",),
    "onnx": ("onnx",),
    "onnx_ir": ("onnx-ir",),
    "onnxscript": ("onnxscript",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    "tensorrt_rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
    "polygraphy": ("polygraphy",),
}
_UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Capability:
    """Something that this program can do, or why it cannot here.

    Attributes:
        name: "compress", "export", "verify", "build tensorrt-rtx", "run engine", ...
        available: whether this machine can.
        reason: what was found or is missing.
        install: what to do about it, "" when nothing is needed.
    """

    name: str
    available: bool
    reason: str
    install: str = ""


_RUNTIMES = {"tensorrt_rtx": RTX, "tensorrt": TENSORRT}


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found on this machine.

    Attributes:
        python: its version.
        platform: operating system and architecture.
        packages: module -> version, None where it is not installed.
        onnxruntime_providers: execution providers, () without ONNX Runtime.
        gpus: NVIDIA GPUs.
        capabilities: what can be done here.
    """

    python: str
    platform: str
    packages: Mapping[str, str | None]
    onnxruntime_providers: tuple[str, ...]
    gpus: tuple[LocalGpu, ...]
    capabilities: tuple[Capability, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        return {"schema": 1, **asdict(self)}


def diagnose() -> Diagnosis:
    """Looks at this machine; changes nothing and raises nothing for what is missing or broken."""
    packages = {module: installed_version(module, names) for module, names in _DISTRIBUTIONS.items()}
    gpus = local_gpus()
    return Diagnosis(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages=packages,
        onnxruntime_providers=_providers() if packages["onnxruntime"] else (),
        gpus=gpus,
        capabilities=(*judge(packages, gpus), judge_plugin(build_tools())),
    )


def judge(packages: Mapping[str, str | None], gpus: tuple[LocalGpu, ...]) -> tuple[Capability, ...]:
    """Returns what can be done with these packages (module -> version or None) and GPUs."""
    return (
        _needs("compress", packages, ("torch", "transformers", "safetensors"), "pifa-deploy"),
        _needs("export", packages, ("torch", "transformers", "onnx", "onnx_ir", "onnxscript"), "pifa-deploy"),
        _needs("verify", packages, ("torch", "transformers", "onnx", "onnxruntime"), "pifa-deploy[cpu]"),
        _needs(f"build {RTX}", packages, ("tensorrt_rtx", "polygraphy"), "pifa-deploy[rtx]", "no GPU is needed"),
        _build_on_gpu(packages, gpus),
        _run_engine(packages, gpus),
    )


def judge_plugin(tools: BuildTools) -> Capability:
    """Returns whether the CUDA plugin can be built with these tools; TensorRT's headers can be downloaded."""
    missing, install = "", ""
    if not tools.source:
        missing, install = "its sources are not here", "clone the repository and run `pip install -e .` in it"
    elif tools.nvcc is None:
        missing, install = "nvcc missing", "install the CUDA toolkit (12.0 or newer) or set CUDA_HOME"
    if missing:
        return Capability(name="build plugin", available=False, reason=missing, install=install)
    reason = f"{tools.nvcc}, {'CMake' if tools.cmake else 'without CMake'}, "
    reason += (
        "TensorRT's headers found"
        if tools.headers
        else "TensorRT's headers by --fetch-headers (1 MB) or --tensorrt-root"
    )
    return Capability(name="build plugin", available=True, reason=reason)


def rows(diagnosis: Diagnosis) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str, str, str], ...]]:
    """Returns two tables: (what, found) and (capability, yes or no, reason, what to do)."""
    found = [("python", f"{diagnosis.python}, {diagnosis.platform}")]
    found += [(module, version or "not installed") for module, version in diagnosis.packages.items()]
    if diagnosis.onnxruntime_providers:
        found.append(("onnxruntime providers", ", ".join(diagnosis.onnxruntime_providers)))
    found += [("GPU", _gpu_text(gpu)) for gpu in diagnosis.gpus] or [("GPU", "none")]
    able = [
        (each.name, "yes" if each.available else "no", each.reason, each.install) for each in diagnosis.capabilities
    ]
    return tuple(found), tuple(able)


def installed_version(module: str, distributions: tuple[str, ...]) -> str | None:
    """Returns a module's version from package metadata, "unknown" without any, None if it cannot be imported."""
    found = importlib.util.find_spec(module)
    # A folder of that name in the working directory is found too, without an origin.
    if found is None or found.origin is None:
        return None
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return _UNKNOWN


def _providers() -> tuple[str, ...]:
    try:
        return tuple(importlib.import_module("onnxruntime").get_available_providers())
    except Exception as error:
        return (f"onnxruntime does not load: {error}",)


def _needs(
    name: str, packages: Mapping[str, str | None], modules: tuple[str, ...], extra: str, remark: str = ""
) -> Capability:
    missing = [module for module in modules if packages.get(module) is None]
    if missing:
        return Capability(
            name=name, available=False, reason=f"{', '.join(missing)} missing", install=f"pip install '{extra}'"
        )
    reason = ", ".join(f"{module} {packages[module]}" for module in modules)
    return Capability(name=name, available=True, reason=f"{reason}; {remark}" if remark else reason)


def _build_on_gpu(packages: Mapping[str, str | None], gpus: tuple[LocalGpu, ...]) -> Capability:
    """Judges the build with full TensorRT: first the GPU it builds on, which no package can mend, then the packages."""
    name, capability = f"build {TENSORRT}", gpus[0].compute_capability if gpus else None
    reason, install = "", ""
    if not gpus:
        reason, install = "no NVIDIA GPU found", "use a machine with one and its driver"
    elif capability is None:
        reason, install = f"the driver does not tell the capability of {_gpu_text(gpus[0])}", "update the driver"
    elif capability not in SERVED[TENSORRT]:
        reason = f"{TENSORRT} does not serve {_gpu_text(gpus[0])}"
        install = f"use a machine with a GPU that it serves, or --backend {RTX}"
    if reason:
        return Capability(name=name, available=False, reason=reason, install=install)
    return _needs(name, packages, ("tensorrt", "polygraphy"), "pifa-deploy[tensorrt]", _gpu_text(gpus[0]))


def _run_engine(packages: Mapping[str, str | None], gpus: tuple[LocalGpu, ...]) -> Capability:
    """Judges generate, bench and `verify --engine` on engines; `engine_fit` holds each engine against the machine."""
    name = "run engine"
    if not gpus:
        reason, install = "no NVIDIA GPU found", "use a machine with one and its driver"
        return Capability(name=name, available=False, reason=reason, install=install)
    capability = gpus[0].compute_capability
    served = {module: backend for module, backend in _RUNTIMES.items() if capability in SERVED[backend]}
    found = [f"{backend} {packages[module]}" for module, backend in served.items() if packages.get(module)]
    if found:
        return Capability(name=name, available=True, reason=f"{', '.join(found)}; {_gpu_text(gpus[0])}")
    if not served:
        reason, install = f"no TensorRT serves {_gpu_text(gpus[0])}", "use a machine with a GPU that one serves"
    else:
        extras = " or ".join(f"'pifa-deploy[{backend.removeprefix('tensorrt-')}]'" for backend in served.values())
        reason, install = f"{' and '.join(served)} missing", f"pip install {extras}"
    return Capability(name=name, available=False, reason=reason, install=install)


def _gpu_text(gpu: LocalGpu) -> str:
    parts = [gpu.name, f"compute capability {gpu.compute_capability or _UNKNOWN}"]
    parts += [f"driver {gpu.driver}"] if gpu.driver else []
    parts += [f"{gpu.memory_mib} MiB"] if gpu.memory_mib else []
    return ", ".join(parts)
