"""What of a report is worse than in an earlier one, and whether by too much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

# Only comparable where both reports were measured on the same machine; speed-ups are comparable anywhere.
_OF_A_MACHINE = ("ms", "J/token")
# What two reports call the same figure.
_KEY = ("variant", "figure", "unit")
# Rounding noise: its size is judged by the gates of parity, and its changes mean nothing.
_NOISE = ("nats",)


def machine_of(stages: Mapping[str, Sequence[Json]]) -> tuple[str, ...]:
    """Returns what the benches of a report say of their machines: processor and GPUs."""
    found = []
    for entry in stages["bench"]:
        environment = entry["content"]["environment"]
        found.append(f"{environment.get('cpu')}, {environment.get('gpus')}")
    return tuple(sorted(set(found)))


def regressions(
    before: Json, figures: Sequence[Json], stages: Mapping[str, Sequence[Json]], limit: float
) -> list[Json]:
    """Returns a decision for every figure of the earlier report that can be held against this one, at least one.

    Args:
        before: the earlier report.
        figures: of this one, see `report_variants.figures_of`.
        stages: of this one.
        limit: largest relative worsening that passes, 0.05 is five per cent.
    """
    now = {_key(figure): figure["value"] for figure in figures}
    same_machine = machine_of(before["stages"]) == machine_of(stages)
    decisions: list[Json] = []
    for figure in before["figures"]:
        if figure["unit"] in _NOISE or not comparable(figure, same_machine=same_machine):
            continue
        name = f"{figure['variant']}: {figure['figure']}, relative worsening"
        found = now.get(_key(figure))
        if found is None:
            reason = "the earlier report has this figure, this one has not"
            decisions.append({"name": name, "value": None, "limit": limit, "passed": None, "reason": reason})
            continue
        worse = worsening(figure["value"], found, better=figure["better"])
        decisions.append({"name": name, "value": worse, "limit": limit, "passed": worse <= limit, "reason": None})
    if not decisions:
        reason = "the earlier report has nothing to compare with" + (
            "" if same_machine else ": times of another machine are not judged"
        )
        decisions.append(
            {"name": "relative worsening", "value": None, "limit": limit, "passed": None, "reason": reason}
        )
    return decisions


def comparable(figure: Json, *, same_machine: bool) -> bool:
    """Whether a figure says the same in two reports."""
    return same_machine or figure["unit"] not in _OF_A_MACHINE


def worsening(before: float, now: float, *, better: str) -> float:
    """Returns by what share a figure got worse, negative where it got better; `better` is "lower" or "higher".

    A figure that was 0 and is worse now has no share: it counts as 1.
    """
    change = now - before if better == "lower" else before - now
    if before:
        return change / abs(before)
    return 1.0 if change > 0 else 0.0


def changes(before: Json, figures: Sequence[Json], stages: Mapping[str, Sequence[Json]]) -> list[Json]:
    """Returns the figures that two reports both have, each with both values; arguments as of `regressions`."""
    former = {_key(figure): figure["value"] for figure in before["figures"]}
    same_machine = machine_of(before["stages"]) == machine_of(stages)
    return [
        {
            **{name: figure[name] for name in _KEY},
            "before": former[_key(figure)],
            "now": figure["value"],
            "comparable": comparable(figure, same_machine=same_machine),
        }
        for figure in figures
        if _key(figure) in former
    ]


def _key(figure: Json) -> tuple[str, ...]:
    return tuple(figure[name] for name in _KEY)
