"""What `bench` measured, what is wrong with it, and whether it passes: figures first, then the judgement of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pifa_deploy.case_names import case_name
from pifa_deploy.environment import Environment, Load
from pifa_deploy.gpu_state import GpuState, held_down
from pifa_deploy.latency import Laps
from pifa_deploy.layer_profile import LayerProfile
from pifa_deploy.proof import Proof, ProofDecision, ProofGates, judge_proofs
from pifa_deploy.timed_contenders import TimedContender
from pifa_deploy.timing_statistics import SpeedUp, TimeStatistics, time_statistics

SCHEMA = 1
# trtexec warns of a coefficient of variation above this.
UNSTABLE_CV = 0.025
# Fewer rounds give an interval that is narrower than it says (tests/test_timing_statistics.py).
FEW_ROUNDS = 10


@dataclass(frozen=True, kw_only=True)
class Size:
    """One case: tokens read in a step by each sequence of a batch, behind `past` others."""

    phase: str
    batch: int
    tokens: int
    past: int

    @property
    def label(self) -> str:
        """What a table is called."""
        return case_name(**asdict(self))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender in one case.

    Attributes:
        name: of the contender.
        laps: every launch.
        tokens: of one launch, over all sequences.
        speed_up: baseline latency / this one's, by rounds.
        joules: of one launch, None where nothing measures them.
        bound_ms: least time of the linears, None where nothing was bounded.
        unbounded: why there is no bound although one was asked for.
    """

    name: str
    laps: Laps
    tokens: int
    speed_up: SpeedUp
    joules: float | None = None
    bound_ms: float | None = None
    unbounded: str | None = None

    @property
    def latency(self) -> TimeStatistics:
        """Statistics of the latency on the host."""
        return time_statistics(self.laps.latency_ms)

    @property
    def gpu_compute(self) -> TimeStatistics | None:
        """Statistics of the GPU compute time, None on a CPU."""
        return time_statistics(self.laps.gpu_compute_ms) if self.laps.gpu_compute_ms else None

    @property
    def enqueue(self) -> TimeStatistics | None:
        """Statistics of the enqueue time, None on a CPU."""
        return time_statistics(self.laps.enqueue_ms) if self.laps.enqueue_ms else None

    @property
    def cv(self) -> float:
        """Coefficient of variation of the GPU compute time, on a CPU of the latency, as trtexec judges stability."""
        return (self.gpu_compute or self.latency).cv

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second at the median latency."""
        return self.tokens / self.latency.median * 1e3

    @property
    def bound_fraction(self) -> float | None:
        """Bound relative to the measured time: 1 is the limit of the hardware."""
        return None if self.bound_ms is None else self.bound_ms / (self.gpu_compute or self.latency).median

    def to_json(self) -> dict[str, Any]:
        """Returns the figures as JSON values."""
        return {
            "name": self.name,
            "latency_ms": self.latency.to_json(),
            "gpu_compute_ms": self.gpu_compute.to_json() if self.gpu_compute else None,
            "enqueue_ms": self.enqueue.to_json() if self.enqueue else None,
            "tokens_per_s": self.tokens_per_s,
            "joules_per_token": None if self.joules is None else self.joules / self.tokens,
            "speed_up": self.speed_up.to_json(),
            "bound_ms": self.bound_ms,
            "bound_fraction": self.bound_fraction,
            "samples_ms": self.laps.latency_ms,
            "round_ms": self.laps.round_ms,
        }


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size, measured.

    Attributes:
        size: what was run.
        rows: one for each contender.
        load: how busy the machine was.
        before: the GPU before the rounds, None without one.
        after: the GPU right after them.
    """

    size: Size
    rows: tuple[Row, ...]
    load: Load
    before: GpuState | None = None
    after: GpuState | None = None

    def to_json(self, max_spread: float | None) -> dict[str, Any]:
        """Returns the case as JSON values."""
        return {
            **asdict(self.size),
            "rows": [row.to_json() for row in self.rows],
            "load": self.load.to_json(),
            "gpu": [state.to_json() for state in (self.before, self.after) if state is not None],
            "warnings": list(warnings_of(self, max_spread)),
        }


@dataclass(frozen=True, kw_only=True)
class BenchGates:
    """What has to hold.

    Attributes:
        speed_up: contender -> least speed-up in every case; the lower end of the interval has to reach it.
        max_spread: largest coefficient of variation; decides beside any other gate, else it is a warning.
        proof: what every engine among the contenders must contain.
    """

    speed_up: Mapping[str, float] = field(default_factory=dict)
    max_spread: float | None = None
    proof: ProofGates = field(default_factory=ProofGates)

    def __post_init__(self) -> None:
        """Raises ValueError for a limit that is not positive."""
        for name, limit in {**self.speed_up, "max_spread": self.max_spread}.items():
            if limit is not None and not limit > 0:
                raise ValueError(f"the limit for {name} is {limit}, expected a positive number")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One figure held against its limit."""

    name: str
    value: float
    limit: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Everything that was measured; true when there are gates and all passed.

    Attributes:
        environment: the machine.
        options: what was asked, JSON values.
        contenders: what was timed, without what ran it.
        memory: contender -> "weights_bytes", "activations_bytes", "peak_bytes" and more where `--memory` asked for it.
        baseline: whose time speed-ups are relative to.
        fixed: what compressed contenders have in common: "density", "rank" or None.
        cases: the sizes.
        gates: what has to hold.
        layers: where the time goes, None where it was not asked for.
        proofs: contender -> what it contains, for engines.
    """

    environment: Environment
    options: Mapping[str, Any]
    contenders: tuple[TimedContender, ...]
    memory: Mapping[str, Mapping[str, int | None]]
    baseline: str
    fixed: str | None
    cases: tuple[Case, ...]
    gates: BenchGates
    layers: LayerProfile | None = None
    proofs: Mapping[str, Proof] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.passed is True

    @property
    def decisions(self) -> tuple[Decision | ProofDecision, ...]:
        """Every gate."""
        judged = judge_proofs(self.proofs, self.gates.proof)
        proven = (replace(one, name=f"{name}: {one.name}") for name, found in judged.items() for one in found)
        return (*judge(self.cases, self.gates), *proven)

    @property
    def passed(self) -> bool | None:
        """Whether every gate holds; None where there is none, or none fails and one is not decided."""
        found = {one.passed for one in self.decisions}
        return False if False in found else None if None in found or not found else True

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {
            "artefact": "bench",
            "schema": SCHEMA,
            "environment": {**self.environment.to_json(), "clocks": self._clocks()},
            "options": dict(self.options),
            "contenders": [
                {**one.to_json(), "memory": dict(self.memory[one.name]), "proof": proof and proof.to_json()}
                for one, proof in ((one, self.proofs.get(one.name)) for one in self.contenders)
            ],
            "baseline": self.baseline,
            "fixed": self.fixed,
            "cases": [case.to_json(self.gates.max_spread) for case in self.cases],
            "layers": self.layers.to_json([case.size.label for case in self.cases]) if self.layers else [],
            "decisions": [asdict(one) for one in self.decisions],
            "passed": self.passed,
        }

    def _clocks(self) -> dict[str, int | None] | None:
        """Returns the GPU's clocks after the first case, None without a GPU."""
        state, names = self.cases[0].after, ("sm_mhz", "memory_mhz", "max_sm_mhz")
        return None if state is None else {name: getattr(state, name) for name in names}


def judge(cases: tuple[Case, ...], gates: BenchGates) -> tuple[Decision, ...]:
    """Returns a decision about times for each case and gate; () where nothing but the spread was asked about."""
    found = []
    for case in cases:
        rows = {row.name: row for row in case.rows}
        for name, limit in gates.speed_up.items():
            low = rows[name].speed_up.low
            label = f"{case.size.label}: speed-up of {name}, lower end"
            found.append(Decision(name=label, value=low, limit=limit, passed=low >= limit))
        if (gates.speed_up or gates.proof.asked) and gates.max_spread is not None:
            worst = max(row.cv for row in case.rows)
            label = f"{case.size.label}: largest coefficient of variation"
            found.append(Decision(name=label, value=worst, limit=gates.max_spread, passed=worst <= gates.max_spread))
    return tuple(found)


def warnings_of(case: Case, max_spread: float | None) -> tuple[str, ...]:
    """Returns what makes the times of a case doubtful, in trtexec's manner, and which bounds are missing."""
    found = []
    limit = UNSTABLE_CV if max_spread is None else max_spread
    for row in case.rows:
        gpu, enqueue = row.gpu_compute, row.enqueue
        if gpu and enqueue and enqueue.median >= gpu.median:
            found.append(
                f"{row.name}: enqueue-bound, enqueue time {enqueue.median:.3g} ms, GPU compute time {gpu.median:.3g} "
                "ms; --cuda-graph may help"
            )
        if row.cv > limit:
            found.append(f"{row.name}: unstable, coefficient of variation {row.cv:.1%}, above {limit:.1%}")
        if row.unbounded:
            found.append(f"{row.name}: no bound, {row.unbounded}")
    if len(case.rows[0].laps.rounds) < FEW_ROUNDS:
        found.append(f"{len(case.rows[0].laps.rounds)} rounds: intervals are too narrow below {FEW_ROUNDS}")
    found += _disturbances(case)
    return tuple(found)


def _disturbances(case: Case) -> list[str]:
    found, after = [], case.after
    if after is not None and (reasons := held_down(case.before, after)):
        found.append(f"the GPU held its clocks down: {', '.join(reasons)}")
    if case.before is not None and case.before.other_processes:
        found.append(f"{case.before.other_processes} other processes use the GPU")
    return [*found, *case.load.disturbances(on_gpu=after is not None)]
