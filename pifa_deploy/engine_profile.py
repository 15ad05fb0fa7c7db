"""TensorRT's profile of an engine, told by the linear layers of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pifa_deploy.build_log import BUILD_LOG
from pifa_deploy.engine_layers import modules_of_layers
from pifa_deploy.engine_record import EngineRecord
from pifa_deploy.errors import InputRefusedError, StageFailedError
from pifa_deploy.linear_nodes import Launch


def layer_clock(trt: Any) -> Any:
    """Returns a profiler of TensorRT: `take()` gives layer -> milliseconds since the last time.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
    """

    class LayerClock(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self._times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self._times[layer_name] = self._times.get(layer_name, 0.0) + ms

        def take(self) -> dict[str, float]:
            times, self._times = self._times, {}
            return times

    return LayerClock()


def modules_of_engine(record: EngineRecord, folder: Path) -> dict[str, tuple[str, ...]]:
    """Returns layer -> the linears whose time it is.

    Args:
        record: its engine.json.
        folder: with the build log.

    Raises:
        InputRefusedError: neither says so.
    """
    log = folder / BUILD_LOG
    nodes = {**{name: name for name in record.network.get("modules", ())}, **record.network.get("linears", {})}
    found = modules_of_layers(log.read_text(encoding="utf-8", errors="replace") if log.is_file() else "", nodes)
    if not found:
        raise InputRefusedError(
            f"{folder}: {BUILD_LOG} and engine.json do not say which of its layers compute linears, expected a verbose "
            "log and the nodes of the linears; build it again with this version, or leave out --layers"
        )
    return found


def times_of_modules(layers_ms: Mapping[str, float], modules: Mapping[str, tuple[str, ...]]) -> Launch:
    """Returns (module, layer) -> microseconds; "" is the module of layers without one.

    A layer that computes several modules in one product is shared among them in equal parts: nothing tells more.

    Args:
        layers_ms: layer of an engine -> milliseconds, as TensorRT's profiler reports them.
        modules: layer -> the modules that it computes.

    Raises:
        StageFailedError: none of the layers has a module: the names are others than in the build log.
    """
    if not modules.keys() & layers_ms.keys():
        raise StageFailedError(
            f"TensorRT's profiler names {len(layers_ms)} layers such as {next(iter(layers_ms), 'none')}, expected "
            "those of the build log; leave out --layers"
        )
    shared = {layer: modules.get(layer) or ("",) for layer in layers_ms}
    return {(name, layer): layers_ms[layer] * 1e3 / len(names) for layer, names in shared.items() for name in names}
