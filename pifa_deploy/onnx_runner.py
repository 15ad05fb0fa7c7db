"""An ONNX folder that answers decoder steps in ONNX Runtime, on the CPU or a GPU.

Inputs and outputs are torch tensors that ONNX Runtime reads and writes where they lie, so that a cache stays on the
GPU from step to step: https://onnxruntime.ai/docs/performance/tune-performance/iobinding.html.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from pifa_deploy.decoder_step import PAST, PRESENT, FloatArray, Step, filled_cache
from pifa_deploy.errors import MissingCapabilityError, StageFailedError, first_line
from pifa_deploy.onnx_folder import OnnxFolder
from pifa_deploy.timed_call import PreparedCall

DEVICES = ("cpu", "cuda")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_DTYPES = {
    "tensor(float)": (torch.float32, onnx.TensorProto.FLOAT),
    "tensor(float16)": (torch.float16, onnx.TensorProto.FLOAT16),
    "tensor(bfloat16)": (torch.bfloat16, onnx.TensorProto.BFLOAT16),
    "tensor(int64)": (torch.int64, onnx.TensorProto.INT64),
}
_ELEMENT_TYPES = dict(_DTYPES.values())
_NO_GRAPH = "-1"


class OnnxRuntimeRunner:
    """An ONNX folder in ONNX Runtime; the cache is input name -> tensor on the device."""

    def __init__(
        self,
        folder: OnnxFolder,
        *,
        threads: int = 0,
        device: str = "cpu",
        cuda_graph: bool = False,
        trace: str | None = None,
    ) -> None:
        """Loads the graph.

        Args:
            folder: a validated ONNX folder.
            threads: intra-op threads; 0 leaves the choice to ONNX Runtime.
            device: "cpu" or "cuda".
            cuda_graph: let ONNX Runtime capture timed steps; it decides so for a whole session.
            trace: write down every node that runs: `session.end_profiling()` returns the file, whose name starts so.
                Then the graph is `folder.model`, which need not be that of the file, with the weights of the folder.

        Raises:
            MissingCapabilityError: ONNX Runtime or its part for the device is not there, or it has no kernel for an
                operator and dtype.
            StageFailedError: it cannot load the graph.
        """
        if device not in DEVICES:
            raise ValueError(f"device is {device!r}, expected one of {', '.join(DEVICES)}")
        if cuda_graph and device == "cpu":
            raise MissingCapabilityError("a CUDA graph was asked for on the CPU, expected a GPU; leave the graph out")
        self.device = torch.device(device)
        self._cuda_graph = cuda_graph
        self._graph_ids = itertools.count(1)
        options = _cuda_options(cuda_graph) if device == "cuda" else {}
        self._stream = options.pop("stream", None)
        traced = None if trace is None else (trace, folder.model.SerializeToString())
        self.session = _session(folder.model_path, threads, (_PROVIDERS[device], options), traced=traced)
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        self._outputs = {value.name: value for value in self.session.get_outputs()}
        self._cache_names = [name for name in self._inputs if name.startswith(f"{PAST}.")]

    def step(self, inputs: Step, cache: Any) -> tuple[FloatArray, Any]:
        """See Runner."""
        feeds = {**inputs.tensors(self.device), **(cache or self.empty_cache(len(inputs.input_ids)))}
        results = self._results(inputs)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._run(self._binding(feeds, results), self._run_options(_NO_GRAPH))
        if self._stream is not None:
            self._stream.synchronize()
        grown = {name: results[_present(name)] for name in self._cache_names}
        return results["logits"].float().cpu().numpy(), grown

    def timed(self, step: Step) -> PreparedCall:
        """Returns the step on a cache of drawn numbers, ready to be launched, its outputs in place.

        With `cuda_graph` the first launch captures the step; launch once before timing.
        """
        feeds = {**step.tensors(self.device), **filled_cache(self.input_shapes(), step, self.device)}
        results = self._results(step)
        binding = self._binding(feeds, results)
        options = self._run_options(str(next(self._graph_ids)) if self._cuda_graph else _NO_GRAPH)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

        def run(held: tuple[Any, ...] = (feeds, results)) -> None:  # the binding knows addresses only
            self._run(binding, options)

        # The replay of a graph waits for the GPU (onnxruntime/core/providers/cuda/cuda_graph.cc).
        return PreparedCall(run, stream=self._stream, waits=self._cuda_graph)

    def empty_cache(self, batch: int) -> dict[str, torch.Tensor]:
        """Returns a cache of no positions."""
        empty = {}
        for name in self._cache_names:
            dtype, (_, heads, _, head_dim) = self._described(self._inputs[name])
            empty[name] = torch.empty((batch, int(heads), 0, int(head_dim)), dtype=dtype, device=self.device)
        return empty

    def load_cache(self, past: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See TensorRunner."""
        return {name: past[name].to(self.device).contiguous() for name in self._cache_names}

    def read_cache(self, cache: Any) -> dict[str, torch.Tensor]:
        """See TensorRunner."""
        return {_present(name): tensor for name, tensor in cache.items()}

    def input_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int | str, ...]]]:
        """See TensorRunner."""
        return {name: self._described(value) for name, value in self._inputs.items()}

    def _described(self, value: Any) -> tuple[torch.dtype, tuple[int | str, ...]]:
        if value.type not in _DTYPES:
            raise StageFailedError(
                f"{value.name} is {value.type}, expected one of {', '.join(_DTYPES)}; export the model again"
            )
        return _DTYPES[value.type][0], tuple(value.shape)

    def _results(self, step: Step) -> dict[str, torch.Tensor]:
        """Returns a tensor for every output of a step."""
        batch, tokens = step.input_ids.shape
        results = {}
        for name, value in self._outputs.items():
            dtype, dimensions = self._described(value)
            # Other exporters give the grown cache dimensions of other names, so its sizes are those of the input.
            past = self._inputs.get(name.replace(PRESENT, PAST, 1))
            sizes = past.shape if past is not None else dimensions
            if len(sizes) != (3 if past is None else 4) or not isinstance(sizes[-1], int):
                raise StageFailedError(
                    f"output {name} has the dimensions {list(dimensions)}, expected logits of a known vocabulary and "
                    "present.N.key/value; export the model with `pifa-deploy export`"
                )
            middle = (tokens,) if past is None else (sizes[1], step.past + tokens)
            shape: tuple[Any, ...] = (batch, *middle, sizes[-1])
            results[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return results

    def _binding(self, feeds: Mapping[str, torch.Tensor], results: Mapping[str, torch.Tensor]) -> Any:
        binding = self.session.io_binding()
        for bind, tensors in ((binding.bind_input, feeds), (binding.bind_output, results)):
            for name, tensor in tensors.items():
                # An empty tensor gives no address of its own, and ONNX Runtime asks for none.
                bind(
                    name=name,
                    device_type=self.device.type,
                    device_id=tensor.device.index or 0,
                    element_type=_ELEMENT_TYPES[tensor.dtype],
                    shape=tuple(tensor.shape),
                    buffer_ptr=tensor.data_ptr(),
                )
        return binding

    def _run_options(self, graph: str) -> Any:
        import onnxruntime

        options = onnxruntime.RunOptions()
        if self._stream is not None:
            # Else ONNX Runtime waits for the GPU at the end of every run.
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
            options.add_run_config_entry("gpu_graph_id", graph)
        return options

    def _run(self, binding: Any, options: Any) -> None:
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:
            raise StageFailedError(f"ONNX Runtime could not run the step: {first_line(error)}") from error


def _present(name: str) -> str:
    return name.replace(PAST, PRESENT, 1)


def _cuda_options(cuda_graph: bool) -> dict[str, Any]:
    """Returns the options of ONNX Runtime's CUDA provider, and the stream that it shall work on."""
    if not torch.cuda.is_available():
        raise MissingCapabilityError(
            "ONNX Runtime was asked for a GPU and torch finds none; leave out --device cuda, or install torch with CUDA"
        )
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return {
        "stream": stream,
        "device_id": str(torch.cuda.current_device()),
        "user_compute_stream": str(stream.cuda_stream),
        "enable_cuda_graph": "1" if cuda_graph else "0",
        # On by default; float32 means float32 here, as in the engines.
        "use_tf32": "0",
    }


def _session(
    path: Path, threads: int, provider: tuple[str, dict[str, str]], *, traced: tuple[str, bytes] | None = None
) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingCapabilityError(
            "ONNX Runtime is not installed; pip install 'pifa-deploy[cpu]' (or [gpu])"
        ) from error
    version = onnxruntime.__version__
    if provider[0] not in onnxruntime.get_available_providers():
        raise MissingCapabilityError(
            f"ONNX Runtime {version} has no {provider[0]}, only {', '.join(onnxruntime.get_available_providers())}; "
            "pip install 'pifa-deploy[gpu]' in place of [cpu]"
        )
    options = _session_options(path, threads, traced)
    try:
        session = onnxruntime.InferenceSession(traced[1] if traced else str(path), options, providers=[provider])
    except Exception as error:
        reason = first_line(error)
        if "NOT_IMPLEMENTED" in reason:
            raise MissingCapabilityError(
                f"ONNX Runtime {version} cannot run {path} on this CPU: {reason}; "
                "export fp32 or fp16, or verify on a GPU"
            ) from error
        if provider[1].get("enable_cuda_graph") == "1" and "graph" in reason.lower():
            raise MissingCapabilityError(
                f"ONNX Runtime {version} cannot capture {path} as a CUDA graph: {reason}; time it without"
            ) from error
        raise StageFailedError(f"ONNX Runtime {version} could not load {path}: {reason}") from error
    check_provider(session.get_providers(), provider[0])
    session.disable_fallback()
    return session


def _session_options(path: Path, threads: int, traced: tuple[str, bytes] | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if traced is not None:
        options.enable_profiling, options.profile_file_prefix = True, traced[0]
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return options


def check_provider(found: list[str], asked: str) -> None:
    """Raises MissingCapabilityError where a session took another provider: ONNX Runtime only logs that one failed."""
    if found[:1] != [asked]:
        raise MissingCapabilityError(
            f"ONNX Runtime took {', '.join(found)} where {asked} was asked for: its CUDA libraries did not load; "
            "install the CUDA and cuDNN versions that its release notes name"
        )
