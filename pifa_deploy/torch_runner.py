"""A transformers model that answers decoder steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from pifa_deploy.decoder_graph import cache_shape
from pifa_deploy.decoder_step import PAST, PRESENT, FloatArray, Step, filled_cache
from pifa_deploy.timed_call import PreparedCall


class TorchRunner:
    """A transformers model with its stock attention and cache: shares no code with the export."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Takes a causal LM in eval mode, on the device it shall run on."""
        self.model = model
        self.device = torch.device(model.device)

    def step(self, inputs: Step, cache: Any) -> tuple[FloatArray, Any]:
        """See Runner."""
        output = self._forward(inputs.tensors(self.device), DynamicCache() if cache is None else cache)
        return output.logits.float().cpu().numpy(), output.past_key_values

    def timed(self, step: Step, *, cuda_graph: bool = False) -> PreparedCall:
        """Returns the step on a cache of drawn numbers, ready to be launched.

        Args:
            step: what is read; its mask says how long the cache is.
            cuda_graph: capture the step once and replay it.

        Raises:
            MissingCapabilityError: a CUDA graph on the CPU, or a model that cannot be captured.
        """
        ids = step.tensors(self.device)
        cache = self.load_cache(filled_cache(self.input_shapes(), step, self.device))
        restore = _restorer(cache)

        def run() -> None:
            self._forward(ids, cache)
            restore()

        stream = None
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self.device))
        return PreparedCall(run, stream=stream, cuda_graph=cuda_graph)

    def load_cache(self, past: Mapping[str, torch.Tensor]) -> Any:
        """See TensorRunner."""
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            key, value = (past[f"{PAST}.{layer}.{part}"].to(self.device) for part in ("key", "value"))
            cache.update(key, value, layer)
        return cache

    def read_cache(self, cache: Any) -> dict[str, torch.Tensor]:
        """See TensorRunner."""
        layers = enumerate(cache.layers)
        return {
            f"{PRESENT}.{i}.{part}": tensor
            for i, layer in layers
            for part, tensor in (("key", layer.keys), ("value", layer.values))
        }

    def input_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int | str, ...]]]:
        """See TensorRunner."""
        layers, heads, head_dim = cache_shape(self.model.config)
        shapes: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
            "input_ids": (torch.int64, ("batch_size", "sequence_length")),
            "attention_mask": (torch.int64, ("batch_size", "total_sequence_length")),
            "position_ids": (torch.int64, ("batch_size", "sequence_length")),
        }
        past = ("batch_size", heads, "past_sequence_length", head_dim)
        names = [f"{PAST}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
        return shapes | dict.fromkeys(names, (self.model.dtype, past))

    @torch.no_grad()
    def _forward(self, ids: Mapping[str, torch.Tensor], cache: Any) -> Any:
        return self.model(**ids, past_key_values=cache, use_cache=True)


def _restorer(cache: Any) -> Callable[[], None]:
    """Returns what undoes the growth of a cache: a step replaces the tensors of its layers and changes none."""
    layers = [(layer, dict(vars(layer))) for layer in cache.layers]

    def restore() -> None:
        cache.layers[:] = [layer for layer, _ in layers]
        for layer, state in layers:
            vars(layer).clear()
            vars(layer).update(state)

    return restore
