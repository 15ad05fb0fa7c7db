"""Artefacts that answer one decoder step: token ids and a cache in, logits and the grown cache out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache, PreTrainedModel

from pifa_deploy.errors import MissingCapabilityError, StageFailedError, first_line
from pifa_deploy.onnx_folder import OnnxFolder

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
_NUMPY_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}  # numpy has no bfloat16


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one decoder call reads.

    Attributes:
        input_ids: int64 [batch, sequence].
        attention_mask: int64 [batch, past + sequence]; 0 hides padding, which stands on the left.
        position_ids: int64 [batch, sequence].
    """

    input_ids: IntArray
    attention_mask: IntArray
    position_ids: IntArray

    @property
    def starts(self) -> bool:
        """Whether the step reads from the first token on, with nothing in the cache."""
        return self.attention_mask.shape == self.input_ids.shape

    @classmethod
    def after(cls, past: int, ids: IntArray) -> Step:
        """Returns the step of one sequence that reads tokens [sequence] behind `past` others, none of them padding."""
        return cls(
            input_ids=ids[None],
            attention_mask=np.ones((1, past + len(ids)), np.int64),
            position_ids=np.arange(past, past + len(ids), dtype=np.int64)[None],
        )


class Runner(Protocol):
    """Anything that runs decoder steps; `cache` is its own kind of value, None before the first step."""

    def step(self, inputs: Step, cache: Any) -> tuple[FloatArray, Any]:
        """Returns float32 logits [batch, sequence, vocabulary] and the cache for the next step."""
        ...


class TimedCall(Protocol):
    """One decoder step made ready to run again and again: its inputs and outputs lie where the runtime wants them."""

    def launch(self) -> None:
        """Starts the step: on a GPU it returns when the work is queued, on a CPU when it is done."""
        ...

    def wait(self) -> None:
        """Returns when the last launch is done."""
        ...

    def gpu_ms(self) -> float | None:
        """Returns the time of the last launch on the GPU, between CUDA events around it; None on a CPU."""
        ...

    def close(self) -> None:
        """Gives back what the call holds."""
        ...


class TorchRunner:
    """A transformers model with its stock attention and cache: shares no code with the export."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Takes a causal LM in eval mode."""
        self.model = model

    def step(self, inputs: Step, cache: Any) -> tuple[FloatArray, Any]:
        """See Runner."""
        with torch.no_grad():
            output = self.model(
                input_ids=torch.from_numpy(inputs.input_ids),
                attention_mask=torch.from_numpy(inputs.attention_mask),
                position_ids=torch.from_numpy(inputs.position_ids),
                past_key_values=DynamicCache() if cache is None else cache,
                use_cache=True,
            )
        return output.logits.float().numpy(), output.past_key_values


class OnnxRuntimeRunner:
    """An ONNX folder in ONNX Runtime."""

    def __init__(self, folder: OnnxFolder, *, threads: int = 0) -> None:
        """Loads the graph on the CPU.

        Args:
            folder: a validated ONNX folder.
            threads: intra-op threads; 0 leaves the choice to ONNX Runtime.

        Raises:
            MissingCapabilityError: ONNX Runtime is not installed, or has no kernel for an operator and dtype.
        """
        self.session = _session(folder.model_path, threads)
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        self._outputs = [value.name for value in self.session.get_outputs()]
        self._cache_names = [name for name in self._inputs if name.startswith("past_key_values.")]
        for name in self._cache_names:
            if self._inputs[name].type not in _NUMPY_DTYPES:
                raise MissingCapabilityError(
                    f"{folder.model_path}: {name} is {self._inputs[name].type}, which cannot be fed on this CPU; "
                    "export fp32 or fp16, or verify on a GPU"
                )

    def step(self, inputs: Step, cache: Any) -> tuple[FloatArray, Any]:
        """See Runner."""
        feed: dict[str, Any] = {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask,
            "position_ids": inputs.position_ids,
        }
        feed.update(cache or self.empty_cache(len(inputs.input_ids)))
        results = dict(zip(self._outputs, self.session.run(None, feed), strict=True))
        grown = {name: results[name.replace("past_key_values", "present")] for name in self._cache_names}
        return results["logits"].astype(np.float32), grown

    def empty_cache(self, batch: int) -> dict[str, Any]:
        """Returns a cache of no positions."""
        empty = {}
        for name in self._cache_names:
            value = self._inputs[name]
            empty[name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), _NUMPY_DTYPES[value.type])
        return empty


def _session(path: Path, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingCapabilityError(
            "ONNX Runtime is not installed; pip install 'pifa-deploy[cpu]' (or [gpu])"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = first_line(error)
        if "NOT_IMPLEMENTED" in reason:
            raise MissingCapabilityError(
                f"ONNX Runtime {onnxruntime.__version__} cannot run {path} on this CPU: {reason}; "
                "export fp32 or fp16, or verify on a GPU"
            ) from error
        raise StageFailedError(f"ONNX Runtime {onnxruntime.__version__} could not load {path}: {reason}") from error
