"""Did a compressed model lose on a task? Two lm-eval runs, example by example.

Both runs saw the same examples, so that only those count where one is right and the other wrong: the accuracy's
difference is judged with the pairs, and is surer by far than the difference of two accuracies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import binomtest, norm

from pifa_deploy.errors import InputMissingError, InputRefusedError
from pifa_deploy.task_samples import read_samples, sample_files

METRICS = ("acc_norm", "acc", "exact_match", "em")
ALL_TASKS = "all tasks"
# Hashes in a sample: what must be the same in both runs.
_SAME = {
    "doc_hash": "is another one in each run; use the same data set",
    "prompt_hash": "was asked in other words in each run; use the same --num_fewshot, chat template and task file",
    "target_hash": "has another answer in each run; use the same task file",
}


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What to compare and how strictly.

    Attributes:
        tasks: names; all that both runs have when empty.
        metric: the samples' field that is 0 or 1; the first of METRICS that both have when None.
        filter: which of a task's ways to read an answer counts; its first one when None.
        margin: largest loss of accuracy that counts as none.
        confidence: of the intervals; the decision is made at one side of it.
        pooled: decide about the examples of all tasks together instead of task by task.
    """

    tasks: tuple[str, ...] = ()
    metric: str | None = None
    filter: str | None = None
    margin: float = 0.01
    confidence: float = 0.95
    pooled: bool = False

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

    @staticmethod
    def together(parts: Iterable[Pairs]) -> Pairs:
        """Returns the counts of several tasks together."""
        counts = [(part.both, part.lost, part.won, part.neither) for part in parts]
        both, lost, won, neither = map(sum, zip(*counts, strict=True))
        return Pairs(both=both, lost=lost, won=won, neither=neither)

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


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """All tasks, and their examples together; true when no accuracy was lost."""

    tasks: tuple[PairedAccuracy, ...]
    overall: PairedAccuracy
    options: TaskOptions = field(default_factory=TaskOptions)

    @property
    def judged(self) -> tuple[PairedAccuracy, ...]:
        """What is decided about."""
        return (self.overall,) if self.options.pooled and len(self.tasks) > 1 else self.tasks

    @property
    def passed(self) -> bool | None:
        """False when more than the margin was lost in one, else None when one is not decided, else True."""
        found = {each.passed(self.options.margin) for each in self.judged}
        return False if False in found else None if None in found else True

    def __bool__(self) -> bool:
        return self.passed is True

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values."""
        return {
            "artefact": "compare-tasks",
            "schema": 1,
            "passed": self.passed,
            "options": asdict(self.options),
            "tasks": [asdict(task) for task in self.tasks],
            "overall": asdict(self.overall),
            "decisions": [_decision(each, self.options.margin) for each in self.judged],
        }


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
        InputMissingError: no samples of a task, or none under the filter.
        InputRefusedError: malformed, samples of several models, other examples or prompts, or a metric that is not
            0 or 1.
    """
    places = (Path(reference), Path(candidate))
    runs = [_run(place) for place in places]
    shared = sorted(runs[0].keys() & runs[1].keys())
    for task in options.tasks:
        for place, run in zip(places, runs, strict=True):
            if task not in run:
                raise InputMissingError(
                    f"{place}: has no samples_{task}_DATE.jsonl, only {', '.join(sorted(run))}; name one of these, or "
                    "run lm-eval with --log_samples"
                )
    if not shared:
        raise InputMissingError(f"{reference} and {candidate} have no task in common; run lm-eval on the same tasks")
    found = {task: _pairs(task, [run[task] for run in runs], options) for task in options.tasks or shared}
    tasks = tuple(_paired(task, metric, pairs, options) for task, (metric, pairs) in found.items())
    metrics = "/".join(dict.fromkeys(task.metric for task in tasks))
    overall = _paired(ALL_TASKS, metrics, Pairs.together(pairs for _, pairs in found.values()), options)
    return TaskReport(tasks=tasks, overall=overall, options=options)


def _run(place: Path) -> dict[str, Path]:
    if not place.exists():
        raise InputMissingError(f"{place}: no such file or folder; give what lm-eval's --output_path wrote")
    found = sample_files(place)
    if not found:
        raise InputMissingError(f"{place}: has no samples_TASK_DATE.jsonl; run lm-eval with --log_samples")
    return found


def _pairs(task: str, files: Sequence[Path], options: TaskOptions) -> tuple[str, Pairs]:
    """Returns the metric, and who has which examples right."""
    reference = read_samples(files[0], options.filter)
    # The order of filters is that of a task's file, which may have changed between the runs.
    first = options.filter or next((str(sample.get("filter", "none")) for sample in reference.values()), None)
    samples = [reference, read_samples(files[1], first)]
    missing = samples[0].keys() ^ samples[1].keys()
    if missing:
        raise InputRefusedError(
            f"{task}: {len(missing)} examples are in one run only, such as {min(missing)}; use the same --limit"
        )
    for field_name, advice in _SAME.items():
        for key, sample in samples[0].items():
            hashes = {sample.get(field_name), samples[1][key].get(field_name)}
            if len(hashes - {None}) > 1:
                raise InputRefusedError(f"{task}: example {key} {advice}")
    metric = options.metric or _metric(task, samples)
    keys = sorted(samples[0])
    right = [[_right(run[key], metric, f"{task}: example {key}") for key in keys] for run in samples]
    return metric, pairs_of(*right)


def _paired(task: str, metric: str, pairs: Pairs, options: TaskOptions) -> PairedAccuracy:
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


def _decision(found: PairedAccuracy, margin: float) -> dict[str, Any]:
    passed = found.passed(margin)
    reason = None
    if passed is None:
        reason = f"too few examples: the interval {found.low:.4f} to {found.high:.4f} has the limit inside"
    return {
        "name": f"{found.task}.{found.metric}",
        "value": found.low,
        "limit": -margin,
        "passed": passed,
        "reason": reason,
    }


def _metric(task: str, samples: Sequence[dict[int, dict[str, Any]]]) -> str:
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
