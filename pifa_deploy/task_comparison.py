"""Did a compressed model lose on a task? Two lm-eval runs, example by example.

Both runs saw the same examples, so that only those count where one is right and the other wrong: the accuracy's
difference is judged with the pairs, and is surer by far than the difference of two accuracies.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import binomtest, norm

from pifa_deploy.errors import InputMissingError, InputRefusedError

METRICS = ("acc_norm", "acc", "exact_match", "em")
_SAMPLES = re.compile(r"samples_(?P<task>.+)_\d{4}-\d\d-\d\dT[^_]*\.jsonl")


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What to compare and how strictly.

    Attributes:
        tasks: names; all that both runs have when empty.
        metric: the samples' field that is 0 or 1; the first of METRICS that both have when None.
        margin: largest loss of accuracy that counts as none.
        confidence: of the intervals; the decision is made at one side of it.
    """

    tasks: tuple[str, ...] = ()
    metric: str | None = None
    margin: float = 0.01
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Raises ValueError for a margin or confidence out of range."""
        if not 0 < self.margin < 1 or not 0 < self.confidence < 1:
            raise ValueError(f"margin is {self.margin} and confidence {self.confidence}, expected both between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class PairedAccuracy:
    """One task in two runs.

    Attributes:
        task: its name.
        metric: what was compared.
        examples: how many.
        reference: the reference's accuracy.
        candidate: the candidate's accuracy.
        lost: examples that the reference has right and the candidate wrong.
        won: the other way round.
        difference: candidate - reference.
        low: lower end of the difference's interval.
        high: upper end.
        p_value: McNemar's exact two-sided test: of so uneven a split by chance.
    """

    task: str
    metric: str
    examples: int
    reference: float
    candidate: float
    lost: int
    won: int
    difference: float
    low: float
    high: float
    p_value: float

    def passed(self, margin: float) -> bool | None:
        """Returns True when the whole interval is above -margin, False when all of it is below, else None."""
        return True if self.low > -margin else False if self.high < -margin else None


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """All tasks; true when no accuracy was lost in any."""

    tasks: tuple[PairedAccuracy, ...]
    options: TaskOptions = field(default_factory=TaskOptions)

    @property
    def passed(self) -> bool | None:
        """False when a task lost more than the margin, else None when one is not decided, else True."""
        found = {task.passed(self.options.margin) for task in self.tasks}
        return False if False in found else None if None in found else True

    def __bool__(self) -> bool:
        return self.passed is True

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        margin = self.options.margin
        decisions = [
            {"name": f"{task.task}.{task.metric}", "value": task.low, "limit": -margin, "passed": task.passed(margin)}
            for task in self.tasks
        ]
        return {
            "artefact": "compare-tasks",
            "schema": 1,
            "passed": self.passed,
            "options": asdict(self.options),
            "tasks": [asdict(task) for task in self.tasks],
            "decisions": decisions,
        }


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """How often two runs agree.

    Attributes:
        both: examples that both have right.
        lost: that the reference alone has right.
        won: that the candidate alone has right.
        neither: that none has right.
    """

    both: int
    lost: int
    won: int
    neither: int

    @property
    def examples(self) -> int:
        """All of them."""
        return self.both + self.lost + self.won + self.neither

    def p_value(self) -> float:
        """Returns McNemar's exact two-sided p-value: of so uneven a split, were losses and wins equally likely."""
        differing = self.lost + self.won
        return float(binomtest(self.won, differing).pvalue) if differing else 1.0

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Returns the interval of the accuracies' difference, candidate - reference, at most 1 either way.

        The adjusted Wald interval of Bonett and Price for paired proportions (2012, J. Educ. Behav. Stat. 37, 479-488):
        one loss and one win are added, which keeps its coverage where there are few or none.
        """
        size = self.examples + 2
        lost, won = (self.lost + 1) / size, (self.won + 1) / size
        spread = float(norm.ppf((1 + confidence) / 2)) * math.sqrt((lost + won - (won - lost) ** 2) / size)
        return max(won - lost - spread, -1.0), min(won - lost + spread, 1.0)


def pairs_of(reference: Sequence[bool], candidate: Sequence[bool]) -> Pairs:
    """Counts examples by who has them right.

    Raises:
        ValueError: no example, or another number of them.
    """
    if not reference or len(reference) != len(candidate):
        raise ValueError(f"{len(reference)} and {len(candidate)} examples, expected as many, at least one")
    counts = Counter(zip(map(bool, reference), map(bool, candidate), strict=True))
    return Pairs(
        both=counts[True, True], lost=counts[True, False], won=counts[False, True], neither=counts[False, False]
    )


def compare_tasks(reference: Path | str, candidate: Path | str, options: TaskOptions) -> TaskReport:
    """Compares two lm-eval runs made with `--log_samples --output_path`.

    Args:
        reference: folder (searched in depth) with samples_TASK_DATE.jsonl of the reference, or one such file.
        candidate: the same of the candidate.
        options: see TaskOptions.

    Raises:
        InputMissingError: no samples of a task.
        InputRefusedError: malformed, other examples, or a metric that is not 0 or 1.
    """
    runs = [_sample_files(Path(place)) for place in (reference, candidate)]
    shared = sorted(runs[0].keys() & runs[1].keys())
    for task in options.tasks:
        for place, run in zip((reference, candidate), runs, strict=True):
            if task not in run:
                raise InputMissingError(
                    f"{place}: has no samples_{task}_DATE.jsonl, only {', '.join(sorted(run))}; run lm-eval with "
                    "--log_samples"
                )
    if not shared:
        raise InputMissingError(f"{reference} and {candidate} have no task in common; run lm-eval on the same tasks")
    chosen = options.tasks or tuple(shared)
    return TaskReport(tasks=tuple(_compare(task, runs, options) for task in chosen), options=options)


def _sample_files(place: Path) -> dict[str, Path]:
    """Returns task -> its newest samples file; the name is samples_TASK_2026-01-31T12-00-00.000000.jsonl."""
    if not place.exists():
        raise InputMissingError(f"{place}: no such file or folder; give what lm-eval's --output_path wrote")
    files = [place] if place.is_file() else sorted(place.rglob("samples_*.jsonl"), key=lambda path: path.name)
    found = {match["task"]: path for path in files if (match := _SAMPLES.fullmatch(path.name))}
    if not found:
        raise InputMissingError(f"{place}: has no samples_TASK_DATE.jsonl; run lm-eval with --log_samples")
    return found


def _compare(task: str, runs: Sequence[dict[str, Path]], options: TaskOptions) -> PairedAccuracy:
    samples = [_read(run[task]) for run in runs]
    missing = samples[0].keys() ^ samples[1].keys()
    if missing:
        raise InputRefusedError(
            f"{task}: {len(missing)} examples are in one run only, such as {min(missing)}; use the same --limit"
        )
    for key, sample in samples[0].items():
        if sample.get("doc_hash") != samples[1][key].get("doc_hash"):
            raise InputRefusedError(f"{task}: example {key} is another one in each run; use the same data set")
    metric = options.metric or _metric(task, samples)
    keys = sorted(samples[0])
    right = [[_right(run[key], metric, f"{task}: example {key}") for key in keys] for run in samples]
    pairs = pairs_of(*right)
    low, high = pairs.interval(options.confidence)
    return PairedAccuracy(
        task=task,
        metric=metric,
        examples=pairs.examples,
        reference=(pairs.both + pairs.lost) / pairs.examples,
        candidate=(pairs.both + pairs.won) / pairs.examples,
        lost=pairs.lost,
        won=pairs.won,
        difference=(pairs.won - pairs.lost) / pairs.examples,
        low=low,
        high=high,
        p_value=pairs.p_value(),
    )


def _read(path: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """Returns (doc_id, filter) -> sample; one line is one example under one filter."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            sample = json.loads(line)
            key = int(sample["doc_id"]), str(sample.get("filter", "none"))
        except (ValueError, KeyError, TypeError) as error:
            raise InputRefusedError(
                f"{path}: line {number} is no sample of lm-eval ({type(error).__name__}: {error}); run it again"
            ) from None
        if key in found:
            raise InputRefusedError(f"{path}: line {number} repeats example {key}; give the samples of one run")
        found[key] = sample
    # Of several filters the first one counts, as in lm-eval's tables.
    first = next((name for _, name in found), "none")
    return {key: sample for key, sample in found.items() if key[1] == first}


def _metric(task: str, samples: Sequence[dict[tuple[int, str], dict[str, Any]]]) -> str:
    known = [set.intersection(*(set(sample) for sample in run.values())) if run else set() for run in samples]
    metric = next((name for name in METRICS if all(name in names for names in known)), None)
    if metric is None:
        raise InputRefusedError(f"{task}: its samples have none of {', '.join(METRICS)}; name one with --metric")
    return metric


def _right(sample: dict[str, Any], metric: str, where: str) -> bool:
    value = sample.get(metric)
    if isinstance(value, bool) or (isinstance(value, (int, float)) and not math.isnan(value) and value in (0, 1)):
        return bool(value)
    raise InputRefusedError(f"{where}: {metric} is {value!r}, expected 0 or 1; name another with --metric")
