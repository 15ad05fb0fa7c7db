"""Whether an engine folder fits this machine, and a step the engine: decided before TensorRT is given either."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pifa_deploy.decoder_step import PAST, StepLimits
from pifa_deploy.digest import file_sha256
from pifa_deploy.engine_record import EngineRecord, read_engine_json
from pifa_deploy.engine_schema import SIZES
from pifa_deploy.errors import InputRefusedError, MisfitError, MissingCapabilityError, first_line
from pifa_deploy.plugin_library import describe_library, find_library
from pifa_deploy.targets import RTX, TENSORRT, LocalGpu, backends_for, this_gpu

MODULES = {RTX: "tensorrt_rtx", TENSORRT: "tensorrt"}
_EXTRAS = {RTX: "pifa-deploy[rtx]", TENSORRT: "pifa-deploy[tensorrt]"}
# TX1, TX2, Xavier, Orin, T239, Thor (10.1 until CUDA 13).
_TEGRA = {(5, 3), (6, 2), (7, 2), (8, 7), (8, 8), (10, 1), (11, 0)}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What of a machine decides whether an engine runs on it.

    Attributes:
        gpu: the GPU that would run it, None without one.
        versions: backend -> version of the installed library; a backend that is not installed is left out.
    """

    gpu: LocalGpu | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def this_machine() -> Machine:
    """Returns this machine.

    Raises:
        MissingCapabilityError: a TensorRT library is installed and does not load.
    """
    versions = {backend: _installed(module) for backend, module in MODULES.items()}
    return Machine(gpu=this_gpu(), versions={backend: version for backend, version in versions.items() if version})


def check_fit(folder: Path | str, machine: Machine, *, plugin_library: Path | None = None) -> EngineRecord:
    """Returns engine.json of an engine folder that runs on a machine.

    Versions have to be the same: neither flavour reads the engines of another release, unless TensorRT was asked for
    version-compatible ones, which `build` does not do.
    https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/engine-compatibility.html
    https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-compatibility.html

    Args:
        folder: written by `pifa-deploy build`.
        machine: where it shall run.
        plugin_library: the PifaLinear plugin; where an engine needs one, `find_library` looks for it if left out.

    Raises:
        InputMissingError: no such folder.
        InputRefusedError: engine.json is malformed, or the engine is not the file that it describes.
        MissingCapabilityError: no GPU, no TensorRT of that flavour, or no plugin where the engine needs one.
        MisfitError: another version, another GPU or another plugin; the message has the command that builds it anew.
    """
    folder = Path(folder)
    record = read_engine_json(folder)
    installed = machine.versions.get(record.backend)
    if installed is None:
        raise MissingCapabilityError(
            f"{folder} needs {record.backend} {record.version}, and {MODULES[record.backend]} is not installed; run: "
            f"pip install '{_EXTRAS[record.backend]}'"
        )
    capability = _capability(folder, record, machine)
    if installed != record.version:
        raise MisfitError(
            f"{folder} was built by {record.backend} {record.version}, installed is {installed}, and engines run in "
            f"the version that built them; {_advice(record, folder, machine)}"
        )
    if capability not in record.compute_capabilities:
        raise MisfitError(
            f"{folder} was built for compute capability {', '.join(record.compute_capabilities)}, this GPU has "
            f"{capability}; {_advice(record, folder, machine)}"
        )
    _check_plugin(record, folder, machine, plugin_library)
    engine = record.engine_for(capability)
    found = file_sha256(folder / engine.file)
    if found != engine.sha256:
        raise InputRefusedError(
            f"{folder / engine.file}: its SHA-256 is {found}, expected {engine.sha256} as engine.json says; "
            "build the engine again"
        )
    return record


def check_shapes(record: EngineRecord, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises MisfitError for an input outside the engine's optimisation profile.

    Args:
        record: of the engine; it has one profile.
        folder: named in the error.
        shapes: input name -> dimensions.
    """
    profile = record.profiles[0]
    for name in sorted(shapes, key=lambda name: name == "attention_mask"):  # its length follows from the others
        asked, limits = tuple(shapes[name]), profile.get(name)
        if limits is None or len(asked) != len(limits["max"]):
            raise MisfitError(
                f"{folder}: input {name} has the size {list(asked)}, the engine takes "
                f"{list(limits['max']) if limits else 'no such input'}; build it from the ONNX folder of this model"
            )
        for place, (low, size, high) in enumerate(zip(limits["min"], asked, limits["max"], strict=True)):
            if not low <= size <= high:
                raise MisfitError(
                    f"{folder}: input {name} has the size {list(asked)}, the engine takes {low} to {high} at dimension "
                    f"{place}; run: {rebuild_command(record, folder, sizes=_sizes_of(shapes))}"
                )


def step_limits(record: EngineRecord) -> StepLimits:
    """Returns the largest step that an engine's profile allows; raises InputRefusedError for one of no decoder."""
    profile = record.profiles[0]
    if "input_ids" not in profile:
        raise InputRefusedError(
            f"the engine's inputs are {', '.join(sorted(profile))}, expected input_ids among them; build it from a "
            "folder written by `pifa-deploy export`"
        )
    past = next((limits["max"][2] for name, limits in profile.items() if name.startswith(f"{PAST}.")), None)
    return StepLimits(tokens=profile["input_ids"]["max"][1], past=past)


def rebuild_command(
    record: EngineRecord,
    folder: Path,
    *,
    sizes: Mapping[str, int] | None = None,
    backend: str | None = None,
    capability: str | None = None,
) -> str:
    """Returns the command that builds an engine folder anew, ONNX standing for the folder that it was built from.

    Args:
        record: of the engine.
        folder: where it is.
        sizes: "max_batch_size", "max_input_len", "max_cache_len" that it has to reach; never less than it has.
        backend: another one than the record's.
        capability: the only GPU to build for, in place of those of the record.
    """
    backend = backend or record.backend
    command = ["pifa-deploy", "build", "ONNX", str(folder), "--backend", backend]
    if backend == RTX:  # TensorRT builds for the GPU that it finds
        command += ["--compute-capabilities", capability or ",".join(record.compute_capabilities)]
    for name, default in SIZES.items():
        size = max(record.options.get(name, default), (sizes or {}).get(name, 0))
        command += [f"--{name.replace('_', '-')}", str(size)]
    if record.options.get("sparsity", "auto") != "auto":
        command += ["--sparsity", record.options["sparsity"]]
    if record.options.get("plugin_library"):
        command += ["--plugin", "auto"]
    return shlex.join([*command, "--force"])


def _installed(module: str) -> str | None:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        return None
    except Exception as error:
        raise MissingCapabilityError(
            f"{module} is installed and does not load ({first_line(error)}); install it again"
        ) from error
    return getattr(found, "__version__", None)  # none: a folder of that name, which imports too


def _capability(folder: Path, record: EngineRecord, machine: Machine) -> str:
    built_for = f"{folder} runs on compute capability {', '.join(record.compute_capabilities)} only"
    if machine.gpu is None:
        raise MissingCapabilityError(f"this machine has no NVIDIA GPU, and {built_for}; run it on such a GPU")
    if machine.gpu.compute_capability is None:
        raise MissingCapabilityError(
            f"the driver does not tell the compute capability of {machine.gpu.name}, and {built_for}; update the driver"
        )
    return machine.gpu.compute_capability


def _advice(record: EngineRecord, folder: Path, machine: Machine) -> str:
    """Returns the command that builds the engine for this machine, or why there is none."""
    capability = machine.gpu.compute_capability if machine.gpu else None
    able = backends_for(capability) if capability else ()
    if not able:
        return f"no backend of this program serves compute capability {capability}: run it on another GPU"
    backend = record.backend if record.backend in able else able[0]
    return f"run: {rebuild_command(record, folder, backend=backend, capability=capability)}"


def _check_plugin(record: EngineRecord, folder: Path, machine: Machine, given: Path | None) -> None:
    """Raises where the engine was built with the plugin and the library is missing, another version or too old."""
    needed = record.options.get("plugin_library")
    if not needed:
        return
    try:
        path = find_library(given)
    except MissingCapabilityError as error:
        raise MissingCapabilityError(f"{folder} needs the plugin {needed['file']} and {error}") from None
    library = describe_library(path)
    if library.op_version != needed["op_version"]:
        raise MisfitError(
            f"{folder} was built with version {needed['op_version']} of the plugin's operators, {path} has version "
            f"{library.op_version}; {_advice(record, folder, machine)}"
        )
    capability = _capability(folder, record, machine)
    if not _has_code(library.architectures, capability):
        build = ["pifa-deploy", "plugin", "build", str(path.parent), "--archs", capability.replace(".", "")]
        raise MisfitError(
            f"{path} holds code for {', '.join(library.architectures)}, this GPU has compute capability {capability}; "
            f"run: {shlex.join(build)}"
        )


def _has_code(architectures: tuple[str, ...], capability: str) -> bool:
    """Whether a GPU runs code for one of these: its own, that of its major version, or the newest one's PTX.

    A binary runs on later GPUs of its major version on the desktop only; it runs on no Tegra but its own, and a Tegra's
    on nothing else (CUDA C++ Programming Guide, "Binary Compatibility").
    """
    own = tuple(map(int, capability.split(".")))
    compiled = [(int(name[:-1]), int(name[-1])) for name in architectures]
    desktop = [one for one in compiled if one not in _TEGRA] if own not in _TEGRA else []
    same = own in compiled or any(major == own[0] and minor <= own[1] for major, minor in desktop)
    return same or (bool(compiled) and max(compiled) <= own)


def _sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    batch, tokens = shapes["input_ids"]
    past: Any = next((shape[2] for name, shape in shapes.items() if name.startswith(f"{PAST}.")), 0)
    return {"max_batch_size": batch, "max_input_len": tokens, "max_cache_len": past}
