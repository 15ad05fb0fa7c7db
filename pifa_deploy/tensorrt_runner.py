"""A TensorRT or TensorRT-RTX engine that answers decoder steps; its cache stays on the GPU."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pifa_deploy.decoder_step import PAST, PRESENT, FloatArray, Step, StepLimits, filled_cache
from pifa_deploy.engine_fit import MODULES, Machine, check_fit, check_shapes, step_limits, this_machine
from pifa_deploy.engine_profile import layer_clock
from pifa_deploy.engine_record import EngineRecord
from pifa_deploy.errors import MissingCapabilityError, StageFailedError, first_line
from pifa_deploy.plugin_library import find_library, load_library
from pifa_deploy.targets import RTX
from pifa_deploy.timed_call import PreparedCall

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
}
_NAMES: dict[str, tuple[int | str, ...]] = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "total_sequence_length"),
    "position_ids": ("batch_size", "sequence_length"),
}


class TensorRTRunner:
    """An engine folder in the TensorRT that built it; the cache is input name -> tensor on the GPU.

    Attributes:
        folder: the engine folder.
        record: its engine.json.
        last_gpu_ms: time of the last step on the GPU, without copies; None before the first.
    """

    def __init__(
        self, folder: Path | str, *, plugin_library: Path | None = None, machine: Machine | None = None
    ) -> None:
        """Loads the engine onto the GPU that torch takes.

        Args:
            folder: written by `pifa-deploy build`.
            plugin_library: as in `check_fit`.
            machine: this one if left out.

        Raises:
            InputMissingError, InputRefusedError, MissingCapabilityError, MisfitError: as `check_fit`.
            StageFailedError: TensorRT refused the engine, or has no memory for it.
        """
        self.folder = Path(folder)
        self.last_gpu_ms: float | None = None
        self.record: EngineRecord = check_fit(folder, machine or this_machine(), plugin_library=plugin_library)
        if not torch.cuda.is_available():
            raise MissingCapabilityError(
                f"torch {torch.__version__} finds no GPU, and {folder} is fed through it; install torch with CUDA"
            )
        self._trt = importlib.import_module(MODULES[self.record.backend])
        self._log = error_log(self._trt)
        if self.record.options.get("plugin_library"):
            load_library(self._trt, find_library(plugin_library))
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._nothing = torch.empty(1, dtype=torch.uint8, device=self.device)
        # The engine refers to the runtime: both live as long as the runner.
        self._runtime, self._engine = loaded_engine(self._trt, self._log, self.folder / self._file())
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._dtypes = {name: self._dtype(name) for name in names}
        self._outputs = [name for name in names if self._engine.get_tensor_mode(name).name == "OUTPUT"]
        self._context = self._new_context()
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]

    @property
    def limits(self) -> StepLimits:
        """The largest step that the engine was built for."""
        return step_limits(self.record)

    def step(self, inputs: Step, cache: Any) -> tuple[FloatArray, Any]:
        """See Runner.

        Raises:
            MisfitError: the step is larger than the engine was built for.
            StageFailedError: TensorRT failed; the message has its words.
        """
        # The cache may have been made on the caller's stream.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            feeds = {**self._ids(inputs), **(cache or self._empty_cache(len(inputs.input_ids)))}
            results = self._bound(self._context, feeds)
            self._events[0].record(self._stream)
            self._enqueue(self._context)
            self._events[1].record(self._stream)
            logits = results["logits"].float().cpu()  # waits for the stream
        self.last_gpu_ms = self._events[0].elapsed_time(self._events[1])
        grown = {name.replace(PRESENT, PAST, 1): results[name] for name in self._outputs if name != "logits"}
        return logits.numpy(), grown

    def timed(self, step: Step, *, cuda_graph: bool = False) -> PreparedCall:
        """Returns the step on a cache of drawn numbers, ready to be launched; launch it once before timing.

        It has an execution context of its own, for which TensorRT-RTX compiles the kernels of exactly these shapes
        before the first launch returns, instead of while others run.

        Args:
            step: what is read; its mask says how long the cache is.
            cuda_graph: record the launch: TensorRT-RTX does it by itself, for TensorRT torch does.

        Raises:
            MisfitError, StageFailedError: as `step`.
            MissingCapabilityError: the engine cannot be captured.
        """
        own = self.record.backend == RTX
        context = self._new_context(steady=True, cuda_graph=cuda_graph)
        with torch.cuda.stream(self._stream):
            feeds = {**self._ids(step), **filled_cache(self.input_shapes(), step, self.device)}
            results = self._bound(context, feeds)

        def run(held: tuple[Any, ...] = (feeds, results)) -> None:  # the context knows addresses only
            self._enqueue(context)

        return PreparedCall(run, stream=self._stream, cuda_graph=cuda_graph and not own)

    def layer_times(self, step: Step, launches: int) -> list[dict[str, float]]:
        """Returns for each launch: layer of the engine -> milliseconds, by TensorRT's own profiler.

        Raises:
            MisfitError, StageFailedError: as `step`.
        """
        context = self._new_context(steady=True)
        context.profiler = clock = layer_clock(self._trt)
        with torch.cuda.stream(self._stream):
            feeds = {**self._ids(step), **filled_cache(self.input_shapes(), step, self.device)}
            held = self._bound(context, feeds)
        found = []
        for _ in range(launches):
            # `enqueue_emits_profile` is on by default: the times are reported before this returns.
            self._enqueue(context)
            self._stream.synchronize()
            found.append(clock.take())
        del held
        return found

    def load_cache(self, past: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See TensorRunner."""
        wanted = [name for name in self._dtypes if name.startswith(f"{PAST}.")]
        # A copy always: TensorRT wants addresses aligned to 256 bytes, which a part of a tensor need not have.
        return {name: past[name].to(self.device, self._dtypes[name], copy=True).contiguous() for name in wanted}

    def read_cache(self, cache: Any) -> dict[str, torch.Tensor]:
        """See TensorRunner."""
        return {name.replace(PAST, PRESENT, 1): tensor for name, tensor in cache.items()}

    def input_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int | str, ...]]]:
        """See TensorRunner."""
        shapes = profile_dimensions(self.record)
        return {name: (self._dtypes[name], dimensions) for name, dimensions in shapes.items()}

    def _file(self) -> str:
        major, minor = torch.cuda.get_device_capability(self.device)
        return self.record.engine_for(f"{major}.{minor}").file

    def _dtype(self, name: str) -> torch.dtype:
        found = self._engine.get_tensor_dtype(name).name
        if found not in _DTYPES:
            raise StageFailedError(
                f"{self.folder}: {name} is {found}, expected one of {', '.join(_DTYPES)}; build the engine again"
            )
        return _DTYPES[found]

    def _ids(self, step: Step) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self._dtypes[name]) for name, tensor in step.tensors(self.device).items()}

    def _empty_cache(self, batch: int) -> dict[str, torch.Tensor]:
        empty = {}
        for name, (dtype, dimensions) in self.input_shapes().items():
            if name.startswith(f"{PAST}."):
                shape = (batch, int(dimensions[1]), 0, int(dimensions[3]))
                empty[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return empty

    def _new_context(self, *, steady: bool = False, cuda_graph: bool = False) -> Any:
        if self.record.backend == RTX and steady:
            config = self._engine.create_runtime_config()
            strategies = self._trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            if cuda_graph:
                config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise StageFailedError(
                f"{self.folder}: TensorRT made no execution context ({self._log.take()}); free GPU memory, or build "
                "the engine for smaller sizes"
            )
        return context

    def _bound(self, context: Any, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tells the context shapes and addresses; returns a tensor for every output."""
        check_shapes(self.record, self.folder, {name: tuple(tensor.shape) for name, tensor in feeds.items()})
        for name, tensor in feeds.items():
            taken = context.set_input_shape(name, tuple(tensor.shape)) and self._address(context, name, tensor)
            if not taken:
                raise StageFailedError(
                    f"{self.folder}: TensorRT refused {list(tensor.shape)} for {name} ({self._log.take()}); "
                    "build the engine again"
                )
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise StageFailedError(f"{self.folder}: TensorRT could not infer shapes ({first_line(error)})") from error
        if missing:
            raise StageFailedError(f"{self.folder}: TensorRT knows no shape of {missing[0]}; build the engine again")
        results = {}
        for name in self._outputs:
            shape = tuple(context.get_tensor_shape(name))
            results[name] = torch.empty(shape, dtype=self._dtypes[name], device=self.device)
            self._address(context, name, results[name])
        return results

    def _address(self, context: Any, name: str, tensor: torch.Tensor) -> bool:
        # An empty tensor has no address, and TensorRT wants one for it all the same.
        return bool(context.set_tensor_address(name, tensor.data_ptr() or self._nothing.data_ptr()))

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise StageFailedError(f"{self.folder}: TensorRT could not run the step ({self._log.take()})")


@functools.cache
def error_log(trt: Any) -> Any:
    """Returns a TensorRT logger that keeps errors: `take()` gives them as one line and forgets them.

    There is one for each module: TensorRT keeps the first logger of a process for much of what it says later.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
    """
    kept = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in kept:
                self._lines.append(" ".join(message.split()))

        def take(self, limit: int = 600) -> str:
            said, self._lines = "; ".join(self._lines), []
            return said[:limit] or "it said nothing"

    return ErrorLog()


def loaded_engine(trt: Any, log: Any, file: Path) -> tuple[Any, Any]:
    """Returns the runtime and the engine of a file; code for the host that an engine may carry stays forbidden.

    Raises:
        StageFailedError: TensorRT made neither; the message has its words.
    """
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(file.read_bytes()) if runtime is not None else None
    if engine is None:
        raise StageFailedError(
            f"{file}: {trt.__name__} {trt.__version__} did not load the engine ({log.take()}); update the driver, or "
            "build it again"
        )
    return runtime, engine


def profile_dimensions(record: EngineRecord) -> dict[str, tuple[int | str, ...]]:
    """Returns input name -> its dimensions in the engine's profile: an int where static, else its name."""
    shapes = {}
    for name, limits in record.profiles[0].items():
        names = _NAMES.get(name, ("batch_size", "heads", "past_sequence_length", "head_dim"))
        pairs = zip(limits["min"], limits["max"], names, strict=True)
        shapes[name] = tuple(low if low == high else label for low, high, label in pairs)
    return shapes
