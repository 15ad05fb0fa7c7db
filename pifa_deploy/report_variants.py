"""The variants of a model that a report compares: what bench, evaluate, verify and the engines say of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from pifa_deploy.case_names import case_name_of
from pifa_deploy.engine_layers import NOT_PICKED
from pifa_deploy.timing_statistics import speed_up

SPARSE, DENSE = "2:4", "dense"
_Z = 1.959964  # of the normal distribution, for 95 %
_MOST = 700.0  # exp of more is no float
Json = Mapping[str, Any]
Stages = Mapping[str, Sequence[Json]]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with the interval that holds it with 95 %, where it is known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One variant in one case of a bench; `baseline`: it is what the others are held against."""

    median_ms: float
    row: Json
    bound_ms: float | None = None
    baseline: bool = False

    @property
    def speed_up(self) -> Estimate:
        """Time of the baseline over its time."""
        return stated_speed_up(self.row)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One form of the model.

    Attributes:
        name: what it is called, unique in the report.
        contender: its name in the bench.
        kind: "dense", "pifa", ...; a 2:4 engine whose log shows no sparse kernel says so.
        facts: runtime, dtype, density, parameters, weight_bytes; what is not known is left out.
        perplexity: label of the text -> estimate.
        ratio: label of the text -> perplexity relative to the first model evaluated.
        times: name of the case -> timing.
    """

    name: str
    contender: str
    kind: str
    facts: Json
    perplexity: Mapping[str, Estimate] = field(default_factory=dict)
    ratio: Mapping[str, Estimate] = field(default_factory=dict)
    times: Mapping[str, Timing] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The kind without remarks: "dense", "2:4", "lowrank", "pifa" or "other"."""
        for name in (DENSE, SPARSE, "pifa", "lowrank"):
            if self.kind.replace("-", "").startswith(name):
                return name
        return "other"


def variants_of(stages: Stages) -> list[Variant]:
    """Returns the contenders of the benches, then the evaluated models that are none of them."""
    scores: dict[str, Json] = {}
    for entry in stages["evaluate"]:
        for name, row in _rows(entry):
            # The same model on other texts may stand in another file.
            scores[name] = {**row, "texts": {**scores.get(name, {}).get("texts", {}), **row["texts"]}}
    found, used = [], set()
    several = len(stages["bench"]) > 1
    for entry in stages["bench"]:
        for contender in entry["content"]["contenders"]:
            place = _evaluated(contender, scores)
            used.add(place)
            score = scores[place] if place is not None else {}
            found.append(_contender(entry, contender, score, several=several, stages=stages))
    for place, row in scores.items():
        if place not in used:
            facts = _facts(row, ("runtime", "dtype", "parameters", "weight_bytes"))
            perplexity, ratio = _perplexities(row)
            found.append(
                Variant(name=place, contender=place, kind=row["kind"], facts=facts, perplexity=perplexity, ratio=ratio)
            )
    return found


def stated_speed_up(row: Json) -> Estimate:
    """Returns the speed-up over the baseline that a row of a bench states."""
    found = row["speed_up"]
    return Estimate(value=found["median"], low=found["low"], high=found["high"])


def cases_of(stages: Stages) -> dict[str, Json]:
    """Returns the name of each case -> the case; where there are several benches, the name has the bench's label."""
    several = len(stages["bench"]) > 1
    return {
        _qualified(case_name_of(case), entry, several): case
        for entry in stages["bench"]
        for case in entry["content"]["cases"]
    }


def main_cases(stages: Stages) -> dict[str, str]:
    """Returns phase -> name of the case to plot: of the smallest batch the longest."""
    best: dict[str, tuple[tuple[int, int, int], str]] = {}
    for name, case in cases_of(stages).items():
        size = (-case["batch"], case["tokens"], case["past"])
        if case["phase"] not in best or size > best[case["phase"]][0]:
            best[case["phase"]] = size, name
    return {phase: best[phase][1] for phase in ("prefill", "decode") if phase in best}


def texts_of(stages: Stages) -> list[str]:
    """Returns the labels of the evaluated texts."""
    return list(dict.fromkeys(text for entry in stages["evaluate"] for _, row in _rows(entry) for text in row["texts"]))


def against_faster(case: str, variants: Sequence[Variant]) -> Iterator[tuple[Variant, Variant, Estimate]]:
    """Yields (PIFA variant, the faster one of dense and 2:4, speed-up of the former) in one case."""
    timed = [variant for variant in variants if case in variant.times]
    rivals = [variant for variant in timed if variant.family in (DENSE, SPARSE)]
    if not rivals:
        return
    rival = min(rivals, key=lambda variant: variant.times[case].median_ms)
    for variant in timed:
        if variant.family == "pifa":
            yield variant, rival, _speed_up(rival.times[case].row, variant.times[case].row)


def figures_of(stages: Stages) -> list[dict[str, Any]]:
    """Returns the main figures as a flat list, so that two reports can be held against each other."""
    found = []

    def add(variant: str, figure: str, value: Any, *, unit: str, better: str = "lower") -> None:
        if isinstance(value, int | float) and math.isfinite(value):
            found.append({"variant": variant, "figure": figure, "value": value, "unit": unit, "better": better})

    for variant in variants_of(stages):
        add(variant.name, "weights", variant.facts.get("weight_bytes"), unit="bytes")
        for text, estimate in variant.perplexity.items():
            add(variant.name, f"perplexity, {text}", estimate.value, unit="")
        for case, timing in variant.times.items():
            add(variant.name, f"{case}, median", timing.median_ms, unit="ms")
            add(variant.name, f"{case}, energy", timing.row["joules_per_token"], unit="J/token")
            if not timing.baseline:
                add(variant.name, f"{case}, speed-up", timing.speed_up.value, unit="x", better="higher")
    for entry in stages["verify"]:
        overall = entry["content"]["overall"] or {}
        add(entry["label"], "mean KL", overall.get("mean_kl"), unit="nats")
        add(entry["label"], "top-1 agreement", overall.get("top1"), unit="", better="higher")
    for entry in stages["engine"]:
        add(entry["label"], "engine", entry["content"]["bytes"], unit="bytes")
    return found


def _contender(entry: Json, contender: Json, score: Json, *, several: bool, stages: Stages) -> Variant:
    times = {}
    for case in entry["content"]["cases"]:
        for row in case["rows"]:
            if row["name"] == contender["name"]:
                name = _qualified(case_name_of(case), entry, several)
                times[name] = Timing(
                    median_ms=row["latency_ms"]["median"],
                    row=row,
                    bound_ms=row["bound_ms"],
                    baseline=row["name"] == entry["content"]["baseline"],
                )
    perplexity, ratio = _perplexities(score)
    return Variant(
        name=_qualified(contender["name"], entry, several),
        contender=contender["name"],
        kind=_kind(contender, stages["engine"]),
        facts=_facts(contender, ("runtime", "dtype", "density", "parameters", "weight_bytes", "memory")),
        perplexity=perplexity,
        ratio=ratio,
        times=times,
    )


def _kind(contender: Json, engines: Sequence[Json]) -> str:
    kind, runtime = str(contender["kind"]), str(contender["runtime"])
    if not kind.startswith(SPARSE):
        return kind
    if runtime == "onnxruntime":
        return f"{SPARSE}, run as dense"
    for engine in engines:
        if engine["label"] in (contender["name"], PurePath(contender["path"]).name):
            return str(engine["content"]["proof"]["sparse_label"] or NOT_PICKED)
    told = contender["proof"] and contender["proof"]["sparse_label"]
    return str(told or f"{SPARSE}, no build log given") if runtime.startswith("tensorrt") else kind


def _evaluated(contender: Json, scores: Mapping[str, Json]) -> str | None:
    """Returns the name of the evaluated model that a contender is: of the same path, or of the same name."""
    path = contender["path"]
    same = [name for name, row in scores.items() if row["checkpoint"] == path]
    named = [name for name in (contender["name"], PurePath(path).name) if name in scores]
    return next(iter(same + named), None)


def _rows(entry: Json) -> Iterator[tuple[str, Json]]:
    """Yields (name, row) of an evaluation; the name is the last part of the path, or all of it where two end alike."""
    rows = entry["content"]["rows"]
    names = [PurePath(row["name"]).name or row["name"] for row in rows]
    for name, row in zip(names, rows, strict=True):
        yield (name if names.count(name) == 1 else row["name"]), row


def _perplexities(row: Json) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Returns text -> perplexity, and text -> perplexity relative to the first model."""
    perplexity, ratio = {}, {}
    for text, score in row.get("texts", {}).items():
        if score["perplexity"] is not None:
            perplexity[text] = _exponential(score["mean_nll"], score["standard_error"])
        if score["ratio"] is not None:
            ratio[text] = _exponential(score["nll_difference"], score["nll_difference_standard_error"])
    return perplexity, ratio


def _exponential(mean: float, error: float | None) -> Estimate:
    value, spread = math.exp(min(mean, _MOST)), _Z * (error or 0.0)
    if error is None:
        return Estimate(value=value)
    return Estimate(value=value, low=math.exp(min(mean - spread, _MOST)), high=math.exp(min(mean + spread, _MOST)))


def _speed_up(rival: Json, row: Json) -> Estimate:
    found = speed_up(rival["round_ms"], row["round_ms"])
    return Estimate(value=found.median, low=found.low, high=found.high)


def _facts(value: Json, names: Sequence[str]) -> dict[str, Any]:
    return {name: value[name] for name in names if value.get(name) is not None}


def _qualified(name: str, entry: Json, several: bool) -> str:
    return f"{name} ({entry['label']})" if several else name
