"""ONNX folder + options -> engine folder, built in a child process whose death is an error message.

One engine file serves all asked compute capabilities. TensorRT-RTX stores the weights once and compiles
the kernels on the device: a 12-layer decoder took 3.0 s and 113 MB for three capabilities together, 2.3
to 2.7 s and the same 113 MB for each alone. TensorRT builds for the GPU of this machine only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pifa_deploy.build_log import BUILD_LOG, cause, last_lines, met_full_disk, remove_paths
from pifa_deploy.child_process import exit_status
from pifa_deploy.digest import file_sha256
from pifa_deploy.engine_child import INSPECT
from pifa_deploy.engine_record import ENGINE_JSON, EngineFile, EngineRecord, histogram, layers_in_log, memory_in_log
from pifa_deploy.errors import (
    BuildError,
    InputRefusedError,
    MisfitError,
    MissingCapabilityError,
    OutputError,
)
from pifa_deploy.linear_nodes import named_linears
from pifa_deploy.onnx_folder import OnnxFolder, external_files, open_folder
from pifa_deploy.output_folder import new_folder, write_json
from pifa_deploy.plugin_library import describe_library, messages_in_log, rtx_library_path
from pifa_deploy.proof import INSPECTOR_JSON
from pifa_deploy.targets import BACKENDS, RTX, RTX_DEFAULT, capabilities, this_gpu
from pifa_deploy.tokenizer_files import CONFIG_FILE, TOKENIZER_FILES, copy_files

ENGINE = "model.engine"
_SPEC = "spec.json"
_RESULT = "result.json"
SPARSITY = ("auto", "enable", "disable")
_MODULES = {RTX: ("tensorrt_rtx", "pifa-deploy[rtx]"), "tensorrt": ("tensorrt", "pifa-deploy[tensorrt]")}


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        backend: "tensorrt-rtx" or "tensorrt".
        targets: GPUs by name.
        compute_capabilities: further targets as "major.minor". Without either, TensorRT-RTX builds for
            8.0, 8.6, 8.9 and 12.0, TensorRT for the GPU of this machine.
        max_batch_size: largest batch.
        max_input_len: most tokens in one call (the prompt).
        max_cache_len: most tokens in the cache before a call.
        tf32: let float32 products round their inputs to TF32. Off, so that float32 means float32.
        sparsity: whether the builder may use 2:4 sparse kernels: "enable", "disable", or "auto", which enables them
            where the ONNX folder records 2:4-pruned weights. Built on a CPU, a TensorRT-RTX engine has the same size
            and layers either way: it stores the zeros, and what is gained shows on a GPU only.
        plugin_library: PifaLinear plugin to load before parsing; without it the function body is built.
        force: replace an existing engine folder.
    """

    backend: str = RTX
    targets: tuple[str, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    max_batch_size: int = 1
    max_input_len: int = 512
    max_cache_len: int = 512
    tf32: bool = False
    sparsity: str = "auto"
    plugin_library: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError or MisfitError as `targets.capabilities` does, ValueError for a size below 1."""
        for name in ("max_batch_size", "max_input_len", "max_cache_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}, expected one of {', '.join(BACKENDS)}")
        if self.sparsity not in SPARSITY:
            raise ValueError(f"sparsity is {self.sparsity!r}, expected one of {', '.join(SPARSITY)}")
        capabilities(self.targets, self.compute_capabilities, backend=self.backend)

    def to_json(self) -> dict[str, Any]:
        """Returns the options for engine.json; of the plugin only its file name, `build_engines` says more."""
        value = asdict(self)
        del value["force"]
        value |= {"targets": list(self.targets), "compute_capabilities": list(self.compute_capabilities)}
        value["plugin_library"] = self.plugin_library.name if self.plugin_library else None
        return value


def build_engines(onnx: Path | str, out: Path | str, options: BuildOptions) -> EngineRecord:
    """Builds the engine folder `out`: model.engine, engine.json, build.log and what the tokenizer needs.

    Args:
        onnx: ONNX folder or the ONNX file in it.
        out: folder to make; on failure it is not, and `<out>.build.log` keeps what the builder said.
        options: targets and sizes.

    Raises:
        InputMissingError, InputRefusedError: as `open_folder` and `describe_library`; or for an unknown dimension.
        MissingCapabilityError: TensorRT, Polygraphy or, for full TensorRT, a GPU of known capability is missing.
        MisfitError: full TensorRT is asked for another GPU than this machine's, or the plugin is of another version.
        BuildError: the builder failed or died; the message has its last lines and the signal.
        OutputExistsError, OutputHeldError, OutputError: as `new_folder`; no log is kept of a full disk.
    """
    source = open_folder(onnx)
    profile = profile_shapes(input_dimensions(source), options)
    plugin = describe_library(options.plugin_library).to_json() if options.plugin_library else None
    _require_builder(options.backend)
    built_for = _resolve_capabilities(options)
    out = Path(os.path.abspath(out))
    with new_folder(out, force=options.force) as folder:
        spec = {
            "backend": options.backend,
            "onnx": os.path.abspath(source.model_path),
            "profile": profile,
            "compute_capabilities": built_for,
            "tf32": options.tf32,
            "sparse_weights": _sparse_weights(options, source),
            "plugin_library": str(options.plugin_library.resolve()) if options.plugin_library else None,
            "engine": ENGINE,
            "result": _RESULT,
        }
        result = _run_child(spec, folder, out)
        tokenizer = copy_files(source.path, folder, (CONFIG_FILE, *TOKENIZER_FILES))
        record = _record(source, {**options.to_json(), "plugin_library": plugin}, spec, result, folder)
        record = replace(record, tokenizer=tokenizer)
        write_json(folder / ENGINE_JSON, record.to_json())
    out.with_name(f"{out.name}.{BUILD_LOG}").unlink(missing_ok=True)
    return record


def input_dimensions(source: OnnxFolder) -> dict[str, tuple[int | str, ...]]:
    """Returns graph input -> its dimensions: an int where static, its name where dynamic ("?" without one)."""
    weights = {tensor.name for tensor in source.model.graph.initializer}
    return {
        value.name: tuple(
            size.dim_value if size.HasField("dim_value") else size.dim_param or "?"
            for size in value.type.tensor_type.shape.dim
        )
        for value in source.model.graph.input
        if value.name not in weights
    }


def profile_shapes(
    inputs: Mapping[str, tuple[int | str, ...]], options: BuildOptions
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns input name -> {"min", "opt", "max"} -> dimensions: one profile for prefill and decode.

    The optimum is the step that is taken most: one token, batch 1, a half-full cache.

    Raises:
        InputRefusedError: a dynamic dimension has a name that no size belongs to.
    """
    tokens, cache = options.max_input_len, options.max_cache_len
    sizes = {
        "batch_size": (1, 1, options.max_batch_size),
        "sequence_length": (1, 1, tokens),
        "past_sequence_length": (0, cache // 2, cache),
        "total_sequence_length": (1, cache // 2 + 1, cache + tokens),
    }
    profile: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, dimensions in inputs.items():
        unknown = [size for size in dimensions if isinstance(size, str) and size not in sizes]
        if unknown:
            raise InputRefusedError(
                f"input {name} has the dynamic dimension {unknown[0]!r}, expected one of {', '.join(sizes)}; "
                "export the model with `pifa-deploy export`"
            )
        points = [sizes[size] if isinstance(size, str) else (size, size, size) for size in dimensions]
        profile[name] = {
            point: tuple(size[place] for size in points) for place, point in enumerate(("min", "opt", "max"))
        }
    return profile


def _require_builder(backend: str) -> None:
    module, extra = _MODULES[backend]
    for name in (module, "polygraphy"):
        found = importlib.util.find_spec(name)
        # A folder of that name in the working directory is found too, without an origin.
        if found is None or found.origin is None:
            raise MissingCapabilityError(
                f"{name} is not installed, {backend} engines need it; run: pip install '{extra}'"
            )


def _resolve_capabilities(options: BuildOptions) -> tuple[str, ...]:
    asked = capabilities(options.targets, options.compute_capabilities, backend=options.backend)
    if options.backend == RTX:
        return asked or RTX_DEFAULT
    gpu = this_gpu()
    if gpu is None:
        raise MissingCapabilityError(
            "this machine has no NVIDIA GPU, and tensorrt builds on the GPU that it builds for; run the build on the "
            f"target device, or use --backend {RTX}"
        )
    found = gpu.compute_capability
    if found is None:
        raise MissingCapabilityError(
            f"the driver does not tell the compute capability of {gpu.name}, and tensorrt builds for it; update "
            f"the driver, or use --backend {RTX}"
        )
    if asked and asked != (found,):
        raise MisfitError(
            f"the GPU of this machine has compute capability {found}, asked for {', '.join(asked)}; tensorrt builds "
            f"for the GPU it runs on: run the build there, or use --backend {RTX}"
        )
    return (found,)


def _child_command(spec: Path) -> list[str]:
    return [sys.executable, "-m", "pifa_deploy.engine_child", str(spec)]


def _run_child(spec: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """Runs the build in `folder` and returns its result; on failure moves the log to `<out>.build.log`."""
    # The child's working directory is on its import path: it has to be a folder that only we write.
    package_root = str(Path(__file__).resolve().parents[1])
    paths = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)), "PYTHONUNBUFFERED": "1"}
    write_json(folder / _SPEC, spec)
    log = folder / BUILD_LOG
    with contextlib.ExitStack() as during, log.open("wb") as stream:
        if spec["backend"] == RTX and spec["plugin_library"]:
            environment["LD_LIBRARY_PATH"] = during.enter_context(rtx_library_path())
        command = _child_command(folder / _SPEC)
        status = exit_status(command, cwd=folder, env=environment, output=stream)
        if status == 0 and spec["backend"] != RTX:
            # It was built on the GPU that it is for. The engine is good without it, and loading it may take all memory.
            exit_status([*command, INSPECT], cwd=folder, env=environment, output=stream)
            (folder / f"{INSPECTOR_JSON}.partial").unlink(missing_ok=True)
    if status != 0 and met_full_disk(log):
        raise OutputError(
            f"{out} could not be written: the disk filled up during the build (there or where temporary files go); "
            "free some space and run the command again"
        )
    places = {str(Path(spec["onnx"]).parent): "<onnx>", str(folder): "<out>"}
    remove_paths(log, {**places, sys.prefix: "<python>", package_root: "<package>"})
    if status == 0 and (folder / _RESULT).is_file() and (folder / ENGINE).is_file():
        result: dict[str, Any] = json.loads((folder / _RESULT).read_text(encoding="utf-8"))
        (folder / _RESULT).unlink()
        (folder / _SPEC).unlink()
        return result
    kept = out.with_name(f"{out.name}.{BUILD_LOG}")
    log.replace(kept)
    reasons = "".join(f"{line}; " for line in messages_in_log(kept))
    raise BuildError(f"{cause(status)}; {reasons}last lines: {last_lines(kept)}; the whole log is {kept}")


def _sparse_weights(options: BuildOptions, source: OnnxFolder) -> bool:
    return source.sparsity is not None if options.sparsity == "auto" else options.sparsity == "enable"


def _record(
    source: OnnxFolder, options: dict[str, Any], spec: dict[str, Any], result: dict[str, Any], folder: Path
) -> EngineRecord:
    built_for: tuple[str, ...] = spec["compute_capabilities"]
    log = (folder / BUILD_LOG).read_text(encoding="utf-8", errors="replace")
    engine = folder / ENGINE
    files = (source.model_path.name, *external_files(source.model))
    layers = layers_in_log(log, result["modules"])
    file = EngineFile(
        file=ENGINE, bytes=engine.stat().st_size, sha256=file_sha256(engine), compute_capabilities=built_for
    )
    return EngineRecord(
        backend=spec["backend"],
        version=result["version"],
        onnx_sha256={name: file_sha256(source.path / name) for name in files},
        compute_capabilities=built_for,
        targets=tuple(options["targets"]),
        profiles=(spec["profile"],),
        layers=layers,
        precision_histogram=histogram(layers),
        network={
            **result["network"],
            "modules": sorted(set(result["modules"].values())),
            "linears": named_linears(source.model),
        },
        memory=memory_in_log(log),
        engines=(file,),
        options=options,
        sparse_weights=spec["sparse_weights"],
        seconds=result["seconds"],
        peak_rss_bytes=result["peak_rss_bytes"],
    )
