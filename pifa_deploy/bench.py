"""Contenders timed side by side: prefill and decode apart, in rounds, with the state of the machine beside them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pifa_deploy.bench_report import BenchGates, BenchReport, Case, Row, Size
from pifa_deploy.contender_bounds import BoundOptions, bounds_of
from pifa_deploy.decoder_step import Step, TimedCall
from pifa_deploy.energy import Meter, counter_meter, joules_per_launch, rail_meter
from pifa_deploy.engine_record import is_engine
from pifa_deploy.environment import LoadMeter, this_environment
from pifa_deploy.gpu_state import GpuState, gpu_processes, gpu_reader
from pifa_deploy.latency import ClockOptions, Laps, measure
from pifa_deploy.layer_profile import LayerProfile, check_layers, profile_contenders
from pifa_deploy.peak_memory import PeakMemory, measure_memory
from pifa_deploy.proof import prove
from pifa_deploy.targets import BACKENDS
from pifa_deploy.timed_contenders import RunOptions, TimedContender, drawn_step, open_timed
from pifa_deploy.timing_statistics import speed_up

# Contenders of equal density differ by the rounding of their ranks.
DENSITY_TOLERANCE = 0.02
FIXED = ("density", "rank")
Stage = Callable[[str], AbstractContextManager[None]]
Look = Callable[[], GpuState]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure.

    Attributes:
        prefill: prompt lengths, run on an empty cache.
        decode: cache lengths at which one token is run.
        batch: sequences.
        run: device, threads, CUDA graph.
        clock: how long.
        baseline: contender that speed-ups are relative to; the first one when None.
        fixed: what compressed contenders must have in common: "density", "rank" or None.
        bounds: what to bound by.
        gates: what has to hold.
        memory: measure each contender's memory in a process of its own.
        layers: profile each contender by linear layer.
    """

    prefill: tuple[int, ...] = (128, 512)
    decode: tuple[int, ...] = (128,)
    batch: int = 1
    run: RunOptions = field(default_factory=RunOptions)
    clock: ClockOptions = field(default_factory=ClockOptions)
    baseline: str | None = None
    fixed: str | None = None
    bounds: BoundOptions = field(default_factory=BoundOptions)
    gates: BenchGates = field(default_factory=BenchGates)
    memory: bool = False
    layers: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        if not self.prefill + self.decode:
            raise ValueError("there is no prefill and no decode length, expected at least one")
        if min(*self.prefill, *self.decode, self.batch, math.inf) < 1:
            raise ValueError(
                f"prefill is {list(self.prefill)}, decode {list(self.decode)} and batch {self.batch}, expected at "
                "least 1"
            )
        if self.fixed not in (None, *FIXED):
            raise ValueError(f"fixed is {self.fixed!r}, expected one of {', '.join(FIXED)}")
        if self.bounds.target is not None and self.run.chosen_device == "cpu":
            raise ValueError(
                f"--target {self.bounds.target.name} bounds a GPU and the contenders run on the CPU; give --bandwidth "
                "and --peak-tflops of this CPU, or leave it out"
            )

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The cases in order."""
        prefill = (Size(phase="prefill", batch=self.batch, tokens=tokens, past=0) for tokens in self.prefill)
        decode = (Size(phase="decode", batch=self.batch, tokens=1, past=past) for past in self.decode)
        return (*prefill, *decode)

    def to_json(self) -> dict[str, Any]:
        """Returns the options as JSON values, device and threads as chosen."""
        run = {**asdict(self.run), "device": self.run.chosen_device, "threads": self.run.chosen_threads}
        names = ("prefill", "decode", "batch", "baseline", "fixed", "memory", "layers")
        rest = {name: getattr(self, name) for name in names}
        return {
            **rest,
            "run": run,
            "clock": asdict(self.clock),
            "bounds": self.bounds.to_json(),
            "gates": asdict(self.gates),
        }


def run_bench(places: Mapping[str, str], options: BenchOptions, stage: Stage) -> BenchReport:
    """Loads all contenders and times them in every case.

    Args:
        places: name -> checkpoint, ONNX folder or engine folder; the first is the baseline unless one is named.
        options: see BenchOptions.
        stage: context manager that shows what is under way.

    Raises:
        As `open_timed` and `prove`; ValueError as `baseline_of`, and for contenders that lack in common what `fixed`
        says or gates on engines where there is none.
    """
    baseline = baseline_of(tuple(places), options)
    if options.gates.proof.asked and not any(map(is_engine, places.values())):
        raise ValueError("--require-precision, --require-plugin and --require-sparse ask about engines; name one")
    # While nothing is loaded here: each model would be in memory twice.
    peaks = _peaks(places, options, stage) if options.memory else {}
    seen = gpu_processes()
    with stage(f"load {', '.join(places)}"):
        contenders = tuple(open_timed(name, place, options.run) for name, place in places.items())
    if options.fixed is not None:
        check_fixed(contenders, options.fixed)
    for one in contenders:
        one.check_sizes(options.prefill, options.decode)
        if options.layers:
            check_layers(one)
    proofs = {one.name: prove(one.path) for one in contenders if one.runtime in BACKENDS}
    environment = this_environment()
    cases = _cases(contenders, options, stage, seen=seen)
    return BenchReport(
        environment=environment,
        options=options.to_json(),
        contenders=contenders,
        memory={one.name: _memory(one, peaks.get(one.name)) for one in contenders},
        baseline=baseline,
        fixed=options.fixed,
        cases=cases,
        gates=options.gates,
        layers=_layers(contenders, options, stage) if options.layers else None,
        proofs=proofs,
    )


def check_fixed(contenders: Sequence[TimedContender], fixed: str) -> None:
    """Checks that the compressed contenders have in common what they are compared at.

    Args:
        contenders: dense ones are what the others are compared with, and not looked at.
        fixed: "density": stored numbers within 2 %; "rank": the same rank in every factorised linear.

    Raises:
        ValueError: they do not, or there are not two of them.
    """
    sized = [one for one in contenders if one.density is not None]
    ranked = [one for one in contenders if one.modules]
    found = len(sized if fixed == "density" else ranked)
    if found < 2:
        raise ValueError(f"--fixed {fixed} compares compressed models and there are {found}, expected at least 2")
    if fixed == "density":
        _check_density(sized)
    else:
        _check_rank(ranked)


def _check_density(contenders: Sequence[TimedContender]) -> None:
    # Over all linears that any of them compresses: one that another leaves dense counts as dense there.
    sizes = {name: size for one in contenders for name, size in one.dense_sizes.items()}
    total = sum(sizes.values())
    found = sorted((one.stored_numbers(sizes) / total, one.name) for one in contenders)
    (low, first), (high, last) = found[0], found[-1]
    if high > low * (1 + DENSITY_TOLERANCE):
        raise ValueError(
            f"--fixed density: {first} has density {low:.4f} and {last} {high:.4f}, expected within "
            f"{DENSITY_TOLERANCE:.0%}; compress them to one --density"
        )


def _check_rank(contenders: Sequence[TimedContender]) -> None:
    first = contenders[0]
    for other in contenders[1:]:
        for module in sorted(first.ranks.keys() | other.ranks.keys()):
            one, two = first.ranks.get(module), other.ranks.get(module)
            if one != two:
                raise ValueError(
                    f"--fixed rank: {module} has rank {one} in {first.name} and {two} in {other.name}, expected the "
                    "same; `pifa-deploy relayout CKPT OUT --layout low-rank` makes a low-rank model of equal rank"
                )


def baseline_of(contenders: Sequence[str], options: BenchOptions) -> str:
    """Returns whose time speed-ups are relative to; ValueError where it, or one with a gate, is no such contender."""
    baseline = contenders[0] if options.baseline is None else options.baseline
    for name in (baseline, *options.gates.speed_up):
        if name not in contenders:
            raise ValueError(f"{name!r} is no contender, expected one of {', '.join(contenders)}")
    if baseline in options.gates.speed_up:
        raise ValueError(f"a gate asks about {baseline!r}, the baseline, whose speed-up is always 1; ask about another")
    return baseline


@contextlib.contextmanager
def _gpu(options: BenchOptions, seen: Collection[int] | None) -> Iterator[Look | None]:
    """Yields what looks at the GPU, None where the contenders run on the CPU."""
    if options.run.chosen_device == "cpu":
        yield None
        return
    with gpu_reader(processes_before=seen) as look:
        yield look


def _cases(
    contenders: Sequence[TimedContender], options: BenchOptions, stage: Stage, *, seen: Collection[int] | None
) -> tuple[Case, ...]:
    # Bounds first: a figure that nobody publishes is refused before anything is timed.
    tokens = [size.batch * size.tokens for size in options.sizes]
    bounds = {one.name: bounds_of(one, tokens, options.bounds) for one in contenders}
    cases = []
    with _gpu(options, seen) as look:
        for place, size in enumerate(options.sizes):
            with stage(size.label):
                case = _case(contenders, size, options, look=look)
            found = ((row, bounds[row.name]) for row in case.rows)
            rows = tuple(replace(row, bound_ms=bound.ms[place], unbounded=bound.reason) for row, bound in found)
            cases.append(replace(case, rows=rows))
    return tuple(cases)


def _step(contenders: Sequence[TimedContender], size: Size) -> Step:
    # The same tokens for all, so of the smallest vocabulary.
    vocabulary = min((one.vocabulary for one in contenders if one.vocabulary), default=1)
    return drawn_step(size.tokens, size.past, batch=size.batch, vocabulary=vocabulary)


def _case(contenders: Sequence[TimedContender], size: Size, options: BenchOptions, *, look: Look | None) -> Case:
    step = _step(contenders, size)
    with ExitStack() as stack:
        calls: dict[str, TimedCall] = {}
        for one in contenders:
            calls[one.name] = one.timed(step)
            stack.callback(calls[one.name].close)
        before, meter = look() if look else None, LoadMeter()
        laps = measure(calls, options.clock)
        load, after = meter.read(), look() if look else None
        joules = _joules(calls, options, look)
    rows = tuple(_rows(contenders, size, options, laps=laps, joules=joules))
    return Case(size=size, rows=rows, load=load, before=before, after=after)


def _joules(calls: Mapping[str, TimedCall], options: BenchOptions, look: Look | None) -> dict[str, float | None]:
    """Returns joules of a launch of each contender: alone, because power is read too seldom for the clock's turns."""
    if options.run.chosen_device == "cpu":
        return dict.fromkeys(calls)
    meter: Meter = counter_meter(look) if look and look().energy_j is not None else rail_meter()
    return {name: joules_per_launch(call, meter, options.clock.duration_s) for name, call in calls.items()}


def _rows(
    contenders: Sequence[TimedContender],
    size: Size,
    options: BenchOptions,
    *,
    laps: Mapping[str, Laps],
    joules: Mapping[str, float | None],
) -> Iterator[Row]:
    base = laps[options.baseline or contenders[0].name].round_ms
    for one in contenders:
        yield Row(
            name=one.name,
            laps=laps[one.name],
            tokens=size.batch * size.tokens,
            speed_up=speed_up(base, laps[one.name].round_ms, seed=options.clock.seed),
            joules=joules[one.name],
        )


def _layers(contenders: Sequence[TimedContender], options: BenchOptions, stage: Stage) -> LayerProfile:
    steps = [_step(contenders, size) for size in options.sizes]
    return profile_contenders(contenders, steps, options.run, stage=stage)


def _peaks(places: Mapping[str, str], options: BenchOptions, stage: Stage) -> dict[str, PeakMemory]:
    steps = [(size.batch, size.tokens, size.past) for size in options.sizes]
    found = {}
    for name, place in places.items():
        with stage(f"memory of {name}"):
            found[name] = measure_memory(place, steps, options.run)
    return found


def _memory(contender: TimedContender, peak: PeakMemory | None) -> dict[str, int | None]:
    found: dict[str, int | None] = {
        "weights_bytes": contender.loaded_bytes,
        "activations_bytes": contender.activation_bytes,
        "peak_bytes": None,
    }
    return found | {name: value for name, value in (asdict(peak) if peak else {}).items() if value is not None}
