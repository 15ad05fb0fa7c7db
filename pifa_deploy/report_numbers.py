"""Numbers of a report as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pifa_deploy.report_variants import Estimate


def number(value: Any, digits: int = 4) -> str:
    """Returns a value with so many significant digits, an integer in full, "–" for None."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 2}e}"
    return f"{value:,.{_decimals(value, digits)}f}"


def plain(value: Any) -> str:
    """Returns a value without digits that say nothing: a limit of 0.99 is "0.99"."""
    return f"{value:.4g}" if isinstance(value, float) else number(value)


def interval(estimate: Estimate | None, digits: int = 3) -> str:
    """Returns "1.23 [1.20, 1.26]", all three with the decimals of the first."""
    if estimate is None:
        return "–"
    value, ends = estimate.value, (estimate.low, estimate.high)
    if None in ends or ends[0] == ends[1]:
        return number(value, digits)
    if not 1e-3 <= abs(value) < 1e6:
        return f"{number(value, digits)} [{number(ends[0], digits)}, {number(ends[1], digits)}]"
    places = _decimals(value, digits)
    return f"{value:,.{places}f} [{ends[0]:,.{places}f}, {ends[1]:,.{places}f}]"


def millions(value: float | None) -> str:
    """Returns bytes as MB, or a count in millions."""
    return number(None if value is None else value / 1e6)


def percent(value: float | None, digits: int = 1) -> str:
    """Returns a share as "12.3 %"."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def counts(found: Mapping[str, int]) -> str:
    """Returns "Half 12, Float 1"."""
    return ", ".join(f"{name} {count}" for name, count in found.items()) or "–"


def _decimals(value: float, digits: int) -> int:
    return max(digits - 1 - int(f"{value:e}".partition("e")[2]), 0)
