"""What is measured side by side: checkpoints in PyTorch and ONNX folders in ONNX Runtime, told by what they hold."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto

from pifa_deploy.checkpoint import tensor_files
from pifa_deploy.decoder_step import Runner, Step
from pifa_deploy.engine_record import is_engine
from pifa_deploy.errors import InputRefusedError, MissingCapabilityError, first_line
from pifa_deploy.evaluation import Logits, torch_logits
from pifa_deploy.model_folder import HUB_PREFIX, load_model
from pifa_deploy.onnx_folder import MANIFEST_FILE, MODEL_FILE, OnnxFolder, open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner
from pifa_deploy.sparse_checkpoint import SparseModule, is_sparse, read_sparsity
from pifa_deploy.transformers_quantizer import factorised_modules, spec_of

_STEP_INPUTS = {"input_ids", "attention_mask", "position_ids"}
_LOGITS = "logits"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a model is, and on what it runs.

    Attributes:
        checkpoint: its place, as it was asked for.
        kind: "dense", "pifa", "lowrank", "lowrank+pifa", "2:4" or "onnx".
        runtime: "torch" or "onnxruntime".
        device: "cpu" or "cuda".
        threads: CPU threads of the runtime.
        dtype: "fp32", "fp16" or "bf16".
        parameters: stored numbers; of a 2:4-pruned linear only the half that was kept.
        weight_bytes: of the files, in which a 2:4-pruned model still has its zeros; None for a model from the hub.
    """

    checkpoint: str
    kind: str
    runtime: str
    device: str
    threads: int
    dtype: str
    parameters: int
    weight_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A loaded model.

    Attributes:
        entry: what it is.
        vocabulary: number of tokens that it knows, None where the graph does not say.
        logits: see `evaluation.Logits`.
    """

    entry: Entry
    vocabulary: int | None
    logits: Logits


def open_contender(place: str, *, device: str = "cpu") -> Contender:
    """Loads a checkpoint in fp32 PyTorch, or an ONNX folder in ONNX Runtime with as many threads as torch.

    Args:
        place: what `load_model` takes, or an ONNX folder.
        device: "cpu" or "cuda".

    Raises:
        As `check_runnable`, `load_model`, `open_folder` and `OnnxRuntimeRunner`; InputRefusedError also for a graph
        that is no decoder.
    """
    check_runnable(place, device)
    return _in_onnx_runtime(place, device) if is_onnx(place) else _in_torch(place, device)


def check_runnable(place: str, device: str) -> None:
    """Raises what speaks against running a place on a device, without loading it.

    Raises:
        InputRefusedError: a folder that holds no model.
        MissingCapabilityError: an engine folder, or no CUDA device.
    """
    is_onnx(place)  # raises for what is neither
    if device != "cpu" and not torch.cuda.is_available():
        raise MissingCapabilityError(f"torch {torch.__version__} finds no CUDA device; use --device cpu")


def is_onnx(place: str) -> bool:
    """Tells whether a place is an ONNX folder or the model.onnx in it.

    Raises:
        InputRefusedError: a folder that holds no model.
        MissingCapabilityError: an engine folder.
    """
    path = Path(place)
    if place.startswith(HUB_PREFIX):
        return False
    if is_engine(path):
        raise MissingCapabilityError(
            f"{place}: is an engine folder, which gives no perplexity here; name the ONNX folder that it was built "
            "from, and hold the engine against it with verify --engine"
        )
    if path.name == MODEL_FILE or (path / MODEL_FILE).is_file():
        return True
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputRefusedError(f"{place}: is no checkpoint or ONNX folder; expected config.json or model.onnx")
    return False


def tokenizer_place(place: str) -> str:
    """Returns where `load_tokenizer` finds the tokenizer of a place."""
    path = Path(place)
    return str(path.parent) if path.name == MODEL_FILE else place


def runner_logits(runner: Runner) -> Logits:
    """Returns the logits of a runner, float32 on the CPU."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        batch, length = ids.shape
        step = Step(
            input_ids=ids.numpy(),
            attention_mask=np.ones((batch, length), np.int64),
            position_ids=np.tile(np.arange(length, dtype=np.int64), (batch, 1)),
        )
        return torch.from_numpy(runner.step(step, None)[0])

    return logits


def onnx_parameters(folder: OnnxFolder) -> int:
    """Returns the stored numbers as in `Entry`; constants and the rotary frequencies are not weights.

    Raises:
        InputRefusedError: pifa.json has a malformed record of pruned modules.
    """
    floats = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
    weights = (
        math.prod(map(int, tensor.dims))
        for tensor in folder.model.graph.initializer
        if tensor.data_type in floats and tensor.dims and not tensor.name.endswith("inv_freq")
    )
    modules = folder.sparsity["modules"].items() if folder.sparsity else ()
    pruned = []
    for name, entry in modules:
        try:
            pruned.append(SparseModule(in_features=entry["in_features"], out_features=entry["out_features"]))
        except (KeyError, TypeError, ValueError) as error:
            where = f"{folder.path / MANIFEST_FILE}: sparsity.modules[{name!r}]"
            raise InputRefusedError(f"{where}: {first_line(error)}; export again") from None
    return sum(weights) - pruned_zeros(pruned)


def _in_torch(place: str, device: str) -> Contender:
    model = load_model(place, dtype=torch.float32).to(device)
    record = read_sparsity(place) if is_sparse(place) else None
    # Row and column form are one format to whoever compares sizes.
    formats = sorted({spec_of(module).format.partition("-")[0] for module in factorised_modules(model).values()})
    entry = Entry(
        checkpoint=place,
        kind="2:4" if record else "+".join(formats) or "dense",
        runtime="torch",
        device=device,
        threads=torch.get_num_threads(),
        dtype="fp32",
        parameters=model.num_parameters() - pruned_zeros(record.modules.values() if record else ()),
        weight_bytes=stored_bytes(place),
    )
    return Contender(entry=entry, vocabulary=model.get_input_embeddings().num_embeddings, logits=torch_logits(model))


def _in_onnx_runtime(place: str, device: str) -> Contender:
    folder = open_folder(place)
    vocabulary = vocabulary_of(folder)
    threads = torch.get_num_threads()
    runner = OnnxRuntimeRunner(folder, threads=threads, device=device)
    entry = Entry(
        checkpoint=place,
        kind="onnx",
        runtime="onnxruntime",
        device=device,
        threads=threads,
        dtype=folder.dtype,
        parameters=onnx_parameters(folder),
        weight_bytes=folder.weight_bytes(),
    )
    return Contender(entry=entry, vocabulary=vocabulary, logits=runner_logits(runner))


def vocabulary_of(folder: OnnxFolder) -> int | None:
    """Returns how many tokens a graph knows, None where it does not say.

    Raises:
        InputRefusedError: a graph that takes or gives something else than a decoder.
    """
    graph = folder.model.graph
    outputs = {value.name: list(value.type.tensor_type.shape.dim) for value in graph.output}
    lacking = sorted((_STEP_INPUTS - {value.name for value in graph.input}) | ({_LOGITS} - outputs.keys()))
    if lacking:
        raise InputRefusedError(
            f"{folder.model_path}: has no {lacking[0]}; expected a graph written by `pifa-deploy export`"
        )
    return int(outputs[_LOGITS][-1].dim_value) or None if outputs[_LOGITS] else None


def pruned_zeros(modules: Iterable[SparseModule]) -> int:
    """Returns how many numbers 2:4 pruning takes from these linears."""
    return sum(module.in_features * module.out_features // 2 for module in modules)


def stored_bytes(place: str) -> int | None:
    """Returns the bytes of the weight files of a checkpoint; None for a model from the hub."""
    if place.startswith(HUB_PREFIX):
        return None
    path = Path(place)
    files = set(tensor_files(path).values()) if path.is_dir() else {path}
    return sum(file.stat().st_size for file in files)
