"""What `bench` times: a checkpoint in PyTorch, an ONNX folder in ONNX Runtime, an engine folder in TensorRT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pifa_deploy.checkpoint import FactorizationRecord, ModuleSpec, read_config
from pifa_deploy.contenders import is_onnx, onnx_parameters, pruned_zeros, stored_bytes, vocabulary_of
from pifa_deploy.decoder_step import PAST, Step, StepLimits, TimedCall
from pifa_deploy.engine_record import ENGINE_JSON, EngineRecord, is_engine
from pifa_deploy.environment import usable_cores
from pifa_deploy.errors import MisfitError, MissingCapabilityError
from pifa_deploy.inspection import manifest_modules
from pifa_deploy.model_folder import load_model, torch_dtype
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner
from pifa_deploy.op_spec import DTYPE_FLAGS
from pifa_deploy.sparse_checkpoint import PATTERN, is_sparse, read_sparsity
from pifa_deploy.tensorrt_runner import TensorRTRunner
from pifa_deploy.torch_runner import TorchRunner
from pifa_deploy.transformers_quantizer import factorised_modules, spec_of

DENSE = "dense"
# 2:4 keeps half of the numbers.
_PRUNED_DENSITY = 0.5


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """On what the contenders run.

    Attributes:
        device: "cpu" or "cuda"; None: "cuda" where torch finds a GPU.
        threads: CPU threads of PyTorch and ONNX Runtime; as many as this process may use when None.
        cuda_graph: replay each step as a CUDA graph.
        dtype: of a checkpoint in PyTorch; None: fp32 on a CPU, as stored on a GPU.
    """

    device: str | None = None
    threads: int | None = None
    cuda_graph: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}, expected cpu or cuda")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}, expected at least 1")
        if self.dtype is not None:
            torch_dtype(self.dtype)

    @property
    def chosen_device(self) -> str:
        """The device, chosen by what torch finds where none was named."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def chosen_threads(self) -> int:
        """The number of threads."""
        return self.threads or usable_cores()


@dataclass(frozen=True, kw_only=True)
class TimedContender:
    """A loaded model that can be timed.

    Attributes:
        name: what tables call it.
        path: its place, as it was asked for.
        kind: "dense", "pifa", "lowrank", "lowrank+pifa" or "2:4"; an engine is what the config.json beside it says.
        runtime: "torch", "onnxruntime", "tensorrt" or "tensorrt-rtx".
        device: "cpu" or "cuda".
        dtype: "fp32", "fp16" or "bf16"; "mixed" for weights of several.
        weight_bytes: of the files; None for a model from the hub.
        loaded_bytes: of the weights in memory.
        parameters: stored numbers, None where nothing says; of a 2:4-pruned linear only the half that was kept.
        vocabulary: number of tokens that it knows, None where nothing says.
        modules: the factorised linears.
        pruned: the 2:4-pruned linears -> numbers of the dense matrix; empty for an engine, which does not say.
        activation_bytes: what the engine's builder planned; None for another runtime.
        runner: has `timed(step)`.
        cuda_graph: whether `timed` is asked for a CUDA graph.
    """

    name: str
    path: str
    kind: str
    runtime: str
    device: str
    dtype: str
    weight_bytes: int | None
    loaded_bytes: int
    parameters: int | None
    vocabulary: int | None
    modules: Mapping[str, ModuleSpec]
    pruned: Mapping[str, int] = field(default_factory=dict)
    activation_bytes: int | None = None
    runner: Any
    cuda_graph: bool = False

    @property
    def density(self) -> float | None:
        """Stored numbers of the compressed linears relative to dense ones; None for a dense model."""
        if not self.modules:
            return _PRUNED_DENSITY if self.kind == PATTERN else None
        dense = sum(spec.in_features * spec.out_features for spec in self.modules.values())
        return sum(spec.parameters() for spec in self.modules.values()) / dense

    @property
    def dense_sizes(self) -> dict[str, int]:
        """Numbers of the dense matrix of each compressed linear."""
        return {**self.pruned, **{name: spec.in_features * spec.out_features for name, spec in self.modules.items()}}

    def stored_numbers(self, sizes: Mapping[str, int]) -> float:
        """Returns how many numbers it stores for linears of these dense sizes, compressed by it or not."""
        unknown = self.kind == PATTERN and not self.pruned
        return sum(
            self.modules[name].parameters()
            if name in self.modules
            else size * (_PRUNED_DENSITY if unknown or name in self.pruned else 1)
            for name, size in sizes.items()
        )

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each factorised linear."""
        return {name: spec.rank for name, spec in self.modules.items()}

    def check_sizes(self, prefill: Sequence[int], decode: Sequence[int]) -> None:
        """Raises MisfitError for a prompt or cache that is longer than an engine was built for."""
        limits: StepLimits = getattr(self.runner, "limits", StepLimits())
        for what, lengths, most in (("prefill", prefill, limits.tokens), ("decode", decode, limits.past)):
            if most is not None and max(lengths, default=0) > most:
                raise MisfitError(
                    f"{self.path}: --{what} {max(lengths)} is more than the {most} that the engine was built for; "
                    f"build it with a larger {'--max-input-len' if what == 'prefill' else '--max-cache-len'}"
                )

    def timed(self, step: Step) -> TimedCall:
        """Returns the step ready to be launched; raises as the runner's `timed`."""
        # ONNX Runtime decides about graphs for a whole session, when it is made.
        asked = {"cuda_graph": True} if self.cuda_graph and self.runtime != "onnxruntime" else {}
        call: TimedCall = self.runner.timed(step, **asked)
        return call

    def to_json(self) -> dict[str, Any]:
        """Returns what it is as JSON values."""
        return {
            "name": self.name,
            "path": self.path,
            "kind": self.kind,
            "runtime": self.runtime,
            "device": self.device,
            "dtype": self.dtype,
            "weight_bytes": self.weight_bytes,
            "parameters": self.parameters,
            "density": self.density,
        }


def open_timed(name: str, place: str, options: RunOptions) -> TimedContender:
    """Loads what a place holds into the runtime that runs it.

    Raises:
        As `load_model`, `open_folder`, `read_engine_json` and the runners; MissingCapabilityError also for a device
        that is not there; InputRefusedError for a folder that holds no model.
    """
    device = options.chosen_device
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingCapabilityError(f"torch {torch.__version__} finds no CUDA device; use --device cpu")
    if options.cuda_graph and device == "cpu":
        raise MissingCapabilityError("a CUDA graph was asked for on the CPU, expected a GPU; leave out --cuda-graph")
    torch.set_num_threads(options.chosen_threads)
    opened = _engine if is_engine(place) else _onnx if is_onnx(place) else _torch
    return opened(name, place, options)


def _torch(name: str, place: str, options: RunOptions) -> TimedContender:
    device = options.chosen_device
    flag = options.dtype or ("fp32" if device == "cpu" else None)
    model = load_model(place, dtype=torch_dtype(flag) if flag else None).to(device)
    modules = {path: spec_of(layer) for path, layer in factorised_modules(model).items()}
    record = read_sparsity(place) if is_sparse(place) else None
    return TimedContender(
        name=name,
        path=place,
        kind=PATTERN if record else kind_of(modules),
        runtime="torch",
        device=device,
        dtype=_dtype_flag(model.dtype),
        weight_bytes=stored_bytes(place),
        loaded_bytes=sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
        parameters=model.num_parameters() - pruned_zeros(record.modules.values() if record else ()),
        vocabulary=model.get_input_embeddings().num_embeddings,
        modules=modules,
        pruned={path: one.in_features * one.out_features for path, one in record.modules.items()} if record else {},
        runner=TorchRunner(model),
        cuda_graph=options.cuda_graph,
    )


def _onnx(name: str, place: str, options: RunOptions) -> TimedContender:
    folder = open_folder(place)
    modules = manifest_modules(folder)
    runner = OnnxRuntimeRunner(
        folder, threads=options.chosen_threads, device=options.chosen_device, cuda_graph=options.cuda_graph
    )
    return TimedContender(
        name=name,
        path=place,
        kind=PATTERN if folder.sparsity else kind_of(modules),
        runtime="onnxruntime",
        device=options.chosen_device,
        dtype=folder.dtype,
        weight_bytes=folder.weight_bytes(),
        loaded_bytes=folder.weight_bytes(),
        parameters=onnx_parameters(folder),
        vocabulary=vocabulary_of(folder),
        modules=modules,
        pruned={
            path: one["in_features"] * one["out_features"]
            for path, one in (folder.sparsity["modules"].items() if folder.sparsity else ())
        },
        runner=runner,
        cuda_graph=options.cuda_graph,
    )


def _engine(name: str, place: str, options: RunOptions) -> TimedContender:
    folder = Path(place).parent if Path(place).name == ENGINE_JSON else Path(place)
    if options.chosen_device == "cpu":
        raise MissingCapabilityError(f"{place}: is an engine folder, which runs on a GPU only; time it on one")
    runner = TensorRTRunner(folder)
    record, config = runner.record, _engine_config(folder)
    modules = engine_modules(record, config, str(folder))
    cache = next((dtype for name, (dtype, _) in runner.input_shapes().items() if name.startswith(PAST)), torch.float32)
    bytes_ = sum(engine.bytes for engine in record.engines)
    return TimedContender(
        name=name,
        path=place,
        kind=PATTERN if record.sparse_weights else kind_of(modules),
        runtime=record.backend,
        device="cuda",
        dtype=_dtype_flag(cache),
        weight_bytes=bytes_,
        loaded_bytes=record.memory.get("weights", bytes_),
        parameters=None,
        vocabulary=config.get("vocab_size"),
        modules=modules,
        activation_bytes=record.memory.get("activations"),
        runner=runner,
        cuda_graph=options.cuda_graph,
    )


def _engine_config(folder: Path) -> dict[str, Any]:
    """Returns the model's configuration, which engine folders of older versions lack."""
    return read_config(folder) if (folder / "config.json").is_file() else {}


def engine_modules(record: EngineRecord, config: Mapping[str, Any], where: str) -> dict[str, ModuleSpec]:
    """Returns the factorised linears of an engine: those of its configuration that the export did not leave dense.

    Args:
        record: engine.json.
        config: config.json.
        where: the folder, for errors.
    """
    found = config.get("quantization_config")
    if found is None:
        return {}
    modules = FactorizationRecord.from_json(found, f"{where}/config.json").modules
    nodes = record.network.get("modules")
    return {name: spec for name, spec in modules.items() if spec.format == "lowrank" or nodes is None or name in nodes}


def kind_of(modules: Mapping[str, ModuleSpec]) -> str:
    """Returns what a model with these factorised linears is; row and column form are one format here."""
    return "+".join(sorted({spec.format.partition("-")[0] for spec in modules.values()})) or DENSE


def _dtype_flag(dtype: torch.dtype) -> str:
    return next((flag for flag, name in DTYPE_FLAGS.items() if getattr(torch, name) == dtype), str(dtype))


def drawn_step(tokens: int, past: int, *, batch: int, vocabulary: int) -> Step:
    """Returns a step of drawn tokens [batch, tokens] behind `past` others, the same ones every time."""
    ids = np.random.default_rng(0).integers(0, vocabulary, size=(batch, tokens), dtype=np.int64)
    return Step(
        input_ids=ids,
        attention_mask=np.ones((batch, past + tokens), np.int64),
        position_ids=np.tile(np.arange(past, past + tokens, dtype=np.int64), (batch, 1)),
    )
