"""A prepared step behind the protocol `TimedCall`: plain on a CPU, between events and perhaps a CUDA graph on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pifa_deploy.errors import MissingCapabilityError, StageFailedError, first_line

_WARM_UP = 3  # torch's advice before a capture: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs


class PreparedCall:
    """Runs one callable again and again; see TimedCall."""

    def __init__(
        self,
        run: Callable[[], object],
        *,
        stream: torch.cuda.Stream | None = None,
        cuda_graph: bool = False,
        waits: bool = False,
    ) -> None:
        """Takes what to run; on a GPU it is captured once where a CUDA graph is asked for.

        Args:
            run: starts the step on `stream`; on a CPU it returns when the step is done.
            stream: None on a CPU.
            cuda_graph: record what `run` starts and replay the recording.
            waits: whether `run` returns when the work is done on a GPU too.

        Raises:
            MissingCapabilityError: what `run` does cannot be captured, or there is no GPU to capture it on.
        """
        self._run: Callable[[], object] | None = run
        self._stream = stream
        self.waits = waits or stream is None
        self._graph: Any = None
        self._events: list[torch.cuda.Event] = []
        if stream is not None:
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        if cuda_graph:
            self._graph = _captured(run, stream)
            self._run = self._graph.replay

    def launch(self) -> None:
        """See TimedCall; raises ValueError after `close`."""
        if self._run is None:
            raise ValueError("the timed call is closed, expected an open one; make another with timed()")
        with _on(self._stream):
            for event in self._events[:1]:
                event.record(self._stream)
            self._run()
            for event in self._events[1:]:
                event.record(self._stream)

    def wait(self) -> None:
        """See TimedCall."""
        for event in self._events[1:]:
            event.synchronize()

    def gpu_ms(self) -> float | None:
        """See TimedCall; the launch has to be done."""
        if not self._events:
            return None
        return float(self._events[0].elapsed_time(self._events[1]))

    def close(self) -> None:
        """See TimedCall."""
        self.wait()
        self._run = self._graph = None


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _captured(run: Callable[[], object], stream: torch.cuda.Stream | None) -> Any:
    if stream is None:
        raise MissingCapabilityError("a CUDA graph was asked for on the CPU, expected a GPU; leave the graph out")
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            run()
    stream.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
    except (RuntimeError, StageFailedError) as error:
        raise MissingCapabilityError(
            f"the step cannot be captured as a CUDA graph ({first_line(error)}); time it without"
        ) from error
    return graph
