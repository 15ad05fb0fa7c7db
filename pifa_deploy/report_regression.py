"""What of a report is worse than in an earlier one, and whether by too much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

# Only comparable where both reports were measured on the same machine; speed-ups are comparable anywhere.
_OF_A_MACHINE = ("ms", "J/token")
# Rounding noise: its size is judged by the gates of parity, and its changes mean nothing.
_NOISE = ("nats",)


def machine_of(stages: Mapping[str, Sequence[Json]]) -> tuple[str, ...]:
    """Returns what the benches of a report say of their machines: processor and GPUs."""
    found = []
    for entry in stages["bench"]:
        environment = entry["content"].get("environment") or {}
        found.append(f"{environment.get('cpu')}, {environment.get('gpus')}")
    return tuple(sorted(set(found)))


def regressions(
    before: Json, figures: Sequence[Json], stages: Mapping[str, Sequence[Json]], limit: float
) -> list[Json]:
    """Returns a decision for every figure of the earlier report that can be held against this one.

    Args:
        before: the earlier report.
        figures: of this one, see `report_variants.figures_of`.
        stages: of this one.
        limit: largest relative worsening that passes, 0.05 is five per cent.
    """
    now = {_key(figure): figure["value"] for figure in figures}
    same_machine = machine_of(before["stages"]) == machine_of(stages)
    decisions = []
    for figure in before["figures"]:
        if figure["unit"] in _NOISE or (figure["unit"] in _OF_A_MACHINE and not same_machine):
            continue
        name = f"{figure['variant']}: {figure['figure']}, relative worsening"
        found = now.get(_key(figure))
        if found is None:
            reason = "the earlier report has this figure, this one has not"
            decisions.append({"name": name, "value": None, "limit": limit, "passed": None, "reason": reason})
            continue
        worse = worsening(figure["value"], found, better=figure["better"])
        decisions.append({"name": name, "value": worse, "limit": limit, "passed": worse <= limit, "reason": None})
    return decisions


def worsening(before: float, now: float, *, better: str) -> float:
    """Returns by what share a figure got worse, negative where it got better; `better` is "lower" or "higher".

    A figure that was 0 and is worse now has no share: it counts as 1.
    """
    change = now - before if better == "lower" else before - now
    if before:
        return change / abs(before)
    return 1.0 if change > 0 else 0.0


def _key(figure: Json) -> tuple[str, str, str]:
    return figure["variant"], figure["figure"], figure["unit"]
