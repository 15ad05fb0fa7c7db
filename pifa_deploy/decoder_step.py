"""One decoder step: what it reads, what answers it, and the same step made ready to be timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
IDS = ("input_ids", "attention_mask", "position_ids")
PAST = "past_key_values"
PRESENT = "present"


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

    @property
    def past(self) -> int:
        """Positions in the cache before the step."""
        return int(self.attention_mask.shape[1] - self.input_ids.shape[1])

    @classmethod
    def after(cls, past: int, ids: IntArray) -> Step:
        """Returns the step of one sequence that reads tokens [sequence] behind `past` others, none of them padding."""
        return cls(
            input_ids=ids[None],
            attention_mask=np.ones((1, past + len(ids)), np.int64),
            position_ids=np.arange(past, past + len(ids), dtype=np.int64)[None],
        )

    def tensors(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Returns graph input -> int64 tensor on the device, without the cache."""
        arrays = {name: getattr(self, name) for name in IDS}
        return {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """The largest step that a runner takes; None: no limit of its own.

    Attributes:
        tokens: most tokens in one step.
        past: most positions in the cache before a step.
    """

    tokens: int | None = None
    past: int | None = None


class Runner(Protocol):
    """Anything that runs decoder steps; `cache` is its own kind of value, None before the first step."""

    def step(self, inputs: Step, cache: Any) -> tuple[FloatArray, Any]:
        """Returns float32 logits [batch, sequence, vocabulary] and the cache for the next step."""
        ...


class TimedCall(Protocol):
    """One decoder step made ready to run again and again: its inputs and outputs lie where the runtime wants them.

    Attributes:
        waits: whether `launch` returns when the work is done, and not when it is queued.
    """

    waits: bool

    def launch(self) -> None:
        """Starts the step."""
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


class TensorRunner(Runner, Protocol):
    """A runner whose cache can be put in and taken out as tensors, under the names of the graph.

    `load_cache` takes past_key_values.N.key/value [batch, kv_heads, past, head_dim], `read_cache` gives
    present.N.key/value, and `input_shapes` says (dtype, dimensions) of every input, a name where one is dynamic.
    """

    def load_cache(self, past: Mapping[str, torch.Tensor]) -> Any:
        """Returns the runner's own kind of cache."""
        ...

    def read_cache(self, cache: Any) -> dict[str, torch.Tensor]:
        """Returns output name -> tensor."""
        ...

    def input_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int | str, ...]]]:
        """Returns input name -> dtype and dimensions."""
        ...


def filled_cache(
    shapes: Mapping[str, tuple[torch.dtype, tuple[int | str, ...]]], step: Step, device: torch.device
) -> dict[str, torch.Tensor]:
    """Returns a cache of drawn numbers of the length that a step expects, as a timed step reads it.

    Drawn, because a GPU takes less power, and so less time, for zeros.

    Args:
        shapes: as `TensorRunner.input_shapes`.
        step: gives batch and length.
        device: where the tensors lie.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = {"batch_size": len(step.input_ids), "past_sequence_length": step.past}
    made = {}
    for name, (dtype, dimensions) in shapes.items():
        if name.startswith(PAST):
            shape = [size if isinstance(size, int) else sizes[size] for size in dimensions]
            made[name] = torch.randn(shape, generator=generator).to(device, dtype)
    return made
