"""Where the time of a step goes: each linear layer of a contender, by the profiler of its runtime.

Profiling slows a step down, by more the smaller its parts are: what counts is how the parts compare, not their sum.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pifa_deploy.decoder_step import Step
from pifa_deploy.engine_profile import modules_of_engine, times_of_modules
from pifa_deploy.environment import Load, LoadMeter
from pifa_deploy.errors import StageFailedError
from pifa_deploy.linear_nodes import Launch, in_a_layer
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_profile import check_profilable, profile_onnx
from pifa_deploy.tensorrt_runner import TensorRTRunner
from pifa_deploy.timed_contenders import RunOptions, TimedContender
from pifa_deploy.torch_runner import TorchRunner
from pifa_deploy.transformers_quantizer import KINDS

# Allocations, plans and captures are done after the first ones.
_WARM_UP, _LAUNCHES = 2, 7


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """One contender in one case.

    Attributes:
        modules_us: linear layer -> microseconds, its parts added up, each the median over the launches.
        rest_us: the same of everything else: attention, norms, the head.
    """

    modules_us: Mapping[str, float]
    rest_us: float

    @property
    def linears_us(self) -> float:
        """All linear layers together."""
        return sum(self.modules_us.values())

    @property
    def rest_share(self) -> float:
        """What is not in linear layers, relative to all of it."""
        return self.rest_us / (self.rest_us + self.linears_us)


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """All contenders, one after the other.

    Attributes:
        times: contender -> its times in each case.
        load: how busy the machine was meanwhile.
        on_gpu: whether they ran on one.
        failures: contender -> why it has no times here.
    """

    times: Mapping[str, Sequence[LayerTimes]]
    load: Load
    on_gpu: bool
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        """What makes the times doubtful, and whose are missing."""
        missing = [f"{name} was not profiled: {reason}" for name, reason in self.failures.items()]
        return [*missing, *self.load.disturbances(on_gpu=self.on_gpu)]

    def to_json(self, cases: Sequence[str]) -> list[dict[str, Any]]:
        """Returns an object for each case, named as in `cases`."""
        found = []
        for place, case in enumerate(cases):
            modules: dict[str, dict[str, float]] = defaultdict(dict)
            for name, times in self.times.items():
                for module, us in times[place].modules_us.items():
                    modules[module][name] = us
            found.append(
                {
                    "case": case,
                    "rest_us": {name: times[place].rest_us for name, times in self.times.items()},
                    "modules": [{"name": module, "times_us": times_us} for module, times_us in modules.items()],
                    "warnings": self.warnings,
                }
            )
        return found


def check_layers(contender: TimedContender) -> None:
    """Raises MissingCapabilityError or InputRefusedError for a contender whose layers have no times."""
    if contender.runtime == "onnxruntime":
        check_profilable(open_folder(contender.path), contender.device)
    elif isinstance(contender.runner, TensorRTRunner):
        modules_of_engine(contender.runner.record, contender.runner.folder)


def layer_times(contender: TimedContender, steps: Sequence[Step], *, threads: int) -> list[LayerTimes]:
    """Profiles a contender in each step, apart from all other measurements.

    Args:
        contender: see `open_timed`; a CUDA graph is not used.
        steps: what is run, each on a cache of drawn numbers.
        threads: of ONNX Runtime.

    Raises:
        As `check_layers`, `profile_onnx` and the runners' `timed`; StageFailedError for an engine whose layers have
        other names on this GPU than its builder gave them.
    """
    check_layers(contender)
    launches = _WARM_UP + _LAUNCHES
    runner = contender.runner
    if isinstance(runner, TorchRunner):
        profiles = [profile_torch(runner, step, launches=launches) for step in steps]
    elif isinstance(runner, TensorRTRunner):
        profiles = [_profile_engine(runner, step, launches=launches) for step in steps]
    else:
        profiles = profile_onnx(open_folder(contender.path), steps, threads=threads, launches=launches)
    return [medians_of(found[_WARM_UP:]) for found in profiles]


def profile_contenders(
    contenders: Sequence[TimedContender],
    steps: Sequence[Step],
    options: RunOptions,
    *,
    stage: Callable[[str], AbstractContextManager[None]],
) -> LayerProfile:
    """Profiles contenders one after the other; one whose profile fails is left out, with a warning.

    Args:
        contenders: see `open_timed`.
        steps: as `layer_times`.
        options: that they were opened with.
        stage: context manager that shows what is under way.

    Raises:
        As `layer_times`, but for StageFailedError: it must not cost the times that were measured before.
    """
    found, failures, meter = {}, {}, LoadMeter()
    for one in contenders:
        with stage(f"layers of {one.name}"):
            try:
                found[one.name] = layer_times(one, steps, threads=options.chosen_threads)
            except StageFailedError as error:
                failures[one.name] = str(error)
    return LayerProfile(times=found, load=meter.read(), on_gpu=options.chosen_device != "cpu", failures=failures)


def medians_of(launches: Sequence[Launch]) -> LayerTimes:
    """Returns the medians over the launches of one step."""
    # Part by part: an interruption hits few of the short parts, and so no median, but always the sum of many.
    found: dict[str, float] = defaultdict(float)
    for module, part in launches[0]:
        found[module] += statistics.median(launch.get((module, part), 0.0) for launch in launches)
    return LayerTimes(rest_us=found.pop("", 0.0), modules_us=dict(found))


def profile_torch(runner: TorchRunner, step: Step, *, launches: int) -> list[Launch]:
    """Returns for each launch: (module, "") -> microseconds of its forward, ("", "") -> of everything else.

    On the CPU by the host's clock, on a GPU between CUDA events on its stream.
    """
    call = runner.timed(step)
    mark, elapsed_us = _clock(runner.device)
    found = []
    with _marked(_linears(runner.model), mark) as marks:
        for _ in range(launches):
            marks.clear()
            start = time.perf_counter()
            call.launch()
            call.wait()
            host_us = (time.perf_counter() - start) * 1e6
            gpu_ms = call.gpu_ms()
            launch = {(name, ""): sum(elapsed_us(*pair) for pair in pairs) for name, pairs in marks.items()}
            launch["", ""] = max((host_us if gpu_ms is None else gpu_ms * 1e3) - sum(launch.values()), 0.0)
            found.append(launch)
    call.close()
    return found


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the factorised linears, and the dense ones inside decoder layers."""
    kinds = tuple(KINDS.values())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) or (isinstance(module, nn.Linear) and in_a_layer(name))
    }


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """Returns what marks a moment, and what gives the microseconds between two marks once the work is done."""
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: float(end - start) * 1e6

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    return mark, lambda start, end: float(start.elapsed_time(end)) * 1e3


@contextmanager
def _marked(modules: Mapping[str, nn.Module], mark: Callable[[], Any]) -> Iterator[dict[str, list[list[Any]]]]:
    """Yields module -> the marks before and after each of its calls, filled while the model runs."""
    marks: dict[str, list[list[Any]]] = defaultdict(list)

    def before(name: str) -> Callable[..., None]:
        return lambda *_: marks[name].append([mark()])

    def after(name: str) -> Callable[..., None]:
        return lambda *_: marks[name][-1].append(mark())

    handles = [module.register_forward_pre_hook(before(name)) for name, module in modules.items()]
    handles += [module.register_forward_hook(after(name)) for name, module in modules.items()]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def _profile_engine(runner: TensorRTRunner, step: Step, *, launches: int) -> list[Launch]:
    modules = modules_of_engine(runner.record, runner.folder)
    return [times_of_modules(layers_ms, modules) for layers_ms in runner.layer_times(step, launches)]
