"""Our runners under Polygraphy's protocol, so that its `Comparator` takes them.

    from polygraphy.comparator import Comparator
    results = Comparator.run([polygraphy_runner(TorchRunner(model)), onnxruntime_runner(folder)], data_loader=[feed])

Polygraphy's own runners are not used where they would mislead: PytRunner gives a tuple in place of outputs and no time,
TrtRunner takes copies for part of the GPU's time, registers no plugin library and lets an engine bring code for the
host. Its runner for ONNX Runtime is sound, and used.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pifa_deploy.decoder_step import IDS, PAST, Step, TensorRunner
from pifa_deploy.errors import MissingCapabilityError
from pifa_deploy.onnx_folder import OnnxFolder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner


def polygraphy_runner(runner: TensorRunner, *, name: str) -> Any:
    """Returns a polygraphy.backend.base.BaseRunner around a runner of torch or of an engine.

    It is fed what the graph is fed (ids and past_key_values.N.key/value, of length 0 for a prefill) and answers with
    logits and present.N.key/value as numpy arrays; bfloat16, which numpy lacks, as float32. Its time is that of the
    GPU where the runner knows it, else of the whole step on the host; in seconds.

    Raises:
        MissingCapabilityError: Polygraphy is not installed.
    """
    return _runner_class()(runner, name)


def onnxruntime_runner(folder: OnnxFolder, *, device: str = "cpu", threads: int = 0) -> Any:
    """Returns Polygraphy's OnnxrtRunner on a session of ours, which never falls back to another device.

    Raises:
        MissingCapabilityError: Polygraphy is not installed, or as `OnnxRuntimeRunner`.
    """
    _base_runner()
    from polygraphy.backend.onnxrt import OnnxrtRunner

    return OnnxrtRunner(
        lambda: OnnxRuntimeRunner(folder, device=device, threads=threads).session, name=f"onnxruntime {device}"
    )


def prefill_feed(runner: TensorRunner, step: Step) -> dict[str, np.ndarray]:
    """Returns what feeds every runner with a first step: its ids and a cache of no positions."""
    feed = {name: getattr(step, name) for name in IDS}
    for name, (dtype, dimensions) in runner.input_shapes().items():
        if name.startswith(PAST):
            shape = (len(step.input_ids), int(dimensions[1]), 0, int(dimensions[3]))
            feed[name] = _array(torch.empty(shape, dtype=dtype))
    return feed


def _base_runner() -> Any:
    try:
        from polygraphy.backend.base import BaseRunner
    except ImportError as error:
        raise MissingCapabilityError("Polygraphy is not installed; pip install 'pifa-deploy[rtx]'") from error
    return BaseRunner


@functools.cache
def _runner_class() -> type[Any]:
    """Returns the class of `polygraphy_runner`; its base is in a library that may not be installed."""
    base: Any = _base_runner()
    from polygraphy.common import TensorMetadata
    from polygraphy.datatype import DataType

    class StepRunner(base):  # type: ignore[misc]
        """See `polygraphy_runner`."""

        def __init__(self, runner: TensorRunner, name: str) -> None:
            super().__init__(name=name)
            self._runner = runner

        def get_input_metadata_impl(self) -> Any:
            found = TensorMetadata()
            for name, (dtype, dimensions) in self._runner.input_shapes().items():
                found.add(name, dtype=DataType.from_dtype(_numpy_dtype(dtype)), shape=list(dimensions))
            return found

        def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            past = {name: torch.from_numpy(array) for name, array in feed_dict.items() if name.startswith(PAST)}
            cache = self._runner.load_cache(past)
            started = time.perf_counter()
            logits, grown = self._runner.step(Step(**{name: feed_dict[name] for name in IDS}), cache)
            self.inference_time = time.perf_counter() - started
            gpu_ms = getattr(self._runner, "last_gpu_ms", None)
            if gpu_ms is not None:
                self.inference_time = gpu_ms / 1e3
            return {
                "logits": logits,
                **{name: _array(tensor) for name, tensor in self._runner.read_cache(grown).items()},
            }

    return StepRunner


def _numpy_dtype(dtype: torch.dtype) -> Any:
    return _array(torch.empty(0, dtype=dtype)).dtype


def _array(tensor: torch.Tensor) -> np.ndarray:
    held = tensor.cpu()
    found: np.ndarray = (held.float() if held.dtype == torch.bfloat16 else held).numpy()
    return found
