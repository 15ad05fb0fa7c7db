"""GPUs: those known by name, which TensorRT serves them, and those in this machine.

Compute capabilities: https://developer.nvidia.com/cuda-gpus.
"""

from __future__ import annotations

import difflib
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pifa_deploy.datasheets import DATASHEETS, Datasheet
from pifa_deploy.errors import MisfitError

RTX = "tensorrt-rtx"
TENSORRT = "tensorrt"
BACKENDS = (RTX, TENSORRT)

# What each builder compiles for. TensorRT-RTX 1.7: the members of its ComputeCapability enumeration.
SERVED = {
    RTX: ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
    TENSORRT: ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "11.0", "12.0", "12.1"),
}
# The default of TensorRT-RTX, written out so that engine.json can say what an engine is for.
RTX_DEFAULT = ("8.0", "8.6", "8.9", "12.0")

_DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
_JETSON = {"Xavier": "7.2", "Orin": "8.7", "Thor": "11.0"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """One GPU to deploy to.

    Attributes:
        name: what `--target` takes.
        title: product name.
        compute_capability: "major.minor".
        datasheet: memory, bandwidth and peak rates, as far as NVIDIA publishes them.
    """

    name: str
    title: str
    compute_capability: str
    datasheet: Datasheet

    @property
    def flavours(self) -> tuple[str, ...]:
        """Backends that build engines for this GPU."""
        return backends_for(self.compute_capability)


@dataclass(frozen=True, kw_only=True)
class LocalGpu:
    """One GPU of this machine; `compute_capability` is None where the driver does not tell."""

    name: str
    compute_capability: str | None
    driver: str | None = None
    memory_mib: int | None = None


def _targets(*rows: tuple[str, str, str]) -> dict[str, Target]:
    return {
        name: Target(name=name, title=title, compute_capability=capability, datasheet=DATASHEETS[name])
        for name, title, capability in rows
    }


TARGETS = _targets(
    ("xavier-nx", "Jetson Xavier NX", "7.2"),
    ("xavier-agx", "Jetson AGX Xavier 32GB", "7.2"),
    ("orin-nano", "Jetson Orin Nano 8GB (Super mode)", "8.7"),
    ("orin-nx", "Jetson Orin NX 16GB", "8.7"),
    ("orin-nx-super", "Jetson Orin NX 16GB (Super mode)", "8.7"),
    ("orin-agx", "Jetson AGX Orin 64GB", "8.7"),
    ("thor", "Jetson AGX Thor (T5000)", "11.0"),
    ("dgx-spark", "DGX Spark (GB10)", "12.1"),
    ("rtx2080ti", "GeForce RTX 2080 Ti", "7.5"),
    ("rtx3060", "GeForce RTX 3060 12GB", "8.6"),
    ("rtx3080", "GeForce RTX 3080 10GB", "8.6"),
    ("rtx3090", "GeForce RTX 3090", "8.6"),
    ("rtx4060", "GeForce RTX 4060", "8.9"),
    ("rtx4070", "GeForce RTX 4070", "8.9"),
    ("rtx4090", "GeForce RTX 4090", "8.9"),
    ("rtx5070", "GeForce RTX 5070", "12.0"),
    ("rtx5080", "GeForce RTX 5080", "12.0"),
    ("rtx5090", "GeForce RTX 5090", "12.0"),
    ("rtx2080-laptop", "GeForce RTX 2080 laptop", "7.5"),
    ("rtx3060-laptop", "GeForce RTX 3060 laptop", "8.6"),
    ("rtx3080-laptop", "GeForce RTX 3080 laptop 16GB", "8.6"),
    ("rtx4060-laptop", "GeForce RTX 4060 laptop", "8.9"),
    ("rtx4070-laptop", "GeForce RTX 4070 laptop", "8.9"),
    ("rtx4090-laptop", "GeForce RTX 4090 laptop", "8.9"),
    ("rtx5070-laptop", "GeForce RTX 5070 laptop", "12.0"),
    ("rtx5080-laptop", "GeForce RTX 5080 laptop", "12.0"),
    ("rtx5090-laptop", "GeForce RTX 5090 laptop", "12.0"),
    ("a2", "A2", "8.6"),
    ("l4", "L4", "8.9"),
    ("a6000", "RTX A6000", "8.6"),
    ("a100", "A100 80GB SXM", "8.0"),
    ("h100", "H100 SXM", "9.0"),
    ("h200", "H200 SXM", "9.0"),
    ("b200", "B200", "10.0"),
)


def backends_for(compute_capability: str) -> tuple[str, ...]:
    """Returns the backends that serve a compute capability, () for none."""
    return tuple(backend for backend in BACKENDS if compute_capability in SERVED[backend])


def targets_named(
    names: Iterable[str], *, otherwise: str = " Or give --compute-capabilities, such as 8.6"
) -> tuple[Target, ...]:
    """Returns the targets of these names; case, spaces, hyphens and underscores do not matter.

    Args:
        names: what users wrote.
        otherwise: end of the message about an unknown name.

    Raises:
        ValueError: a name is unknown; the message lists near matches.
    """
    by_key = {_key(name): target for name, target in TARGETS.items()}
    found = []
    for name in names:
        if _key(name) not in by_key:
            near = [by_key[key].name for key in difflib.get_close_matches(_key(name), by_key, n=4, cutoff=0.5)]
            listed = f"did you mean {', '.join(near)}?" if near else f"known targets: {', '.join(TARGETS)}"
            raise ValueError(f"target {name!r} is unknown; {listed}{otherwise}")
        found.append(by_key[_key(name)])
    return tuple(found)


def capabilities(names: Iterable[str] = (), explicit: Iterable[str] = (), *, backend: str = RTX) -> tuple[str, ...]:
    """Returns the compute capabilities to build for, ascending and without repetition.

    Args:
        names: targets by name.
        explicit: compute capabilities such as "8.6".
        backend: the builder that has to serve all of them.

    Raises:
        ValueError: an unknown name, backend or a capability not written as "major.minor".
        MisfitError: the backend does not serve one of them; the message says which does.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    wanted = {target.compute_capability: target.title for target in targets_named(names)}
    for capability in explicit:
        if not re.fullmatch(r"\d{1,2}\.\d", capability):
            raise ValueError(f"compute capability is {capability!r}, expected major.minor such as 8.6 or 12.0")
        wanted.setdefault(capability, "")
    for capability, title in wanted.items():
        _check_served(capability, title, backend)
    return tuple(sorted(wanted, key=lambda capability: tuple(map(int, capability.split(".")))))


def _check_served(capability: str, title: str, backend: str) -> None:
    if capability in SERVED[backend]:
        return
    others = backends_for(capability)
    advice = (
        f"build with --backend {others[0]} on the device itself"
        if others
        else "no backend of this program does; choose another target"
    )
    raise MisfitError(
        f"{title + ' has ' if title else ''}compute capability {capability}, which {backend} does not serve "
        f"({', '.join(SERVED[backend])}); {advice}"
    )


def local_gpus() -> tuple[LocalGpu, ...]:
    """Returns the GPUs of this machine as nvidia-smi or, on a Jetson, the device tree names them."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return _jetson_gpu()
    gpus = tuple(_parse_gpu(line) for line in done.stdout.splitlines() if line.count(",") == 3)
    if any(gpu.compute_capability is None for gpu in gpus):
        return _jetson_gpu() or gpus
    return gpus or _jetson_gpu()


def this_gpu() -> LocalGpu | None:
    """Returns the GPU that this process and its children take, None without one.

    That is CUDA's current device where torch sees CUDA: CUDA puts its fastest GPU first and obeys CUDA_VISIBLE_DEVICES,
    nvidia-smi lists by PCI bus and does not. Otherwise it is the first one that `local_gpus` lists.
    """
    import torch  # seconds, which those who name GPUs only need not wait

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return LocalGpu(name=properties.name, compute_capability=f"{properties.major}.{properties.minor}")
    return next(iter(local_gpus()), None)


def _parse_gpu(line: str) -> LocalGpu:
    name, capability, driver, memory = (field.strip() for field in line.split(","))
    return LocalGpu(
        name=name,
        compute_capability=capability if re.fullmatch(r"\d+\.\d+", capability) else None,
        driver=driver if driver[:1].isdigit() else None,
        memory_mib=int(memory) if memory.isdigit() else None,
    )


def _jetson_gpu() -> tuple[LocalGpu, ...]:
    try:
        model = _DEVICE_TREE_MODEL.read_text(encoding="utf-8", errors="replace").rstrip("\0\n")
    except OSError:
        return ()
    found = [capability for word, capability in _JETSON.items() if word in model]
    return (LocalGpu(name=model, compute_capability=found[0]),) if found else ()


def _key(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
