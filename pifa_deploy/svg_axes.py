"""Axes of plots: from values to places on paper, with ticks at round numbers; and text that XML can hold."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A scale.

    Attributes:
        low, high: values at its ends.
        start, end: where these lie on paper.
        ticks: (value, text).
        log: whether equal distances are equal ratios.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Returns the place of a value."""
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return self.start + (scale(value) - low) / (high - low) * (self.end - self.start)


def linear_axis(values: Sequence[float], start: float, end: float, *, most: int = 7) -> Axis:
    """Returns an axis that holds the values with some room around them, and at most `most` + 1 ticks."""
    low, high = min(values), max(values)
    room = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    # Sizes and times do not go below zero.
    bottom, top = (max(low - room, 0.0) if low >= 0 else low - room), high + room
    step = _round_step((top - bottom) / most)
    first = math.ceil(bottom / step - 1e-9)
    ticks = [step * i for i in range(first, math.floor(top / step + 1e-9) + 1)]
    digits = max(-math.floor(math.log10(step) + 1e-9), 0)
    return Axis(
        low=bottom, high=top, start=start, end=end, ticks=tuple((tick, f"{tick:,.{digits}f}") for tick in ticks)
    )


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Returns a logarithmic axis of positive values with ticks at 1, 2 and 5."""
    room = (max(values) / min(values)) ** 0.1
    bottom, top = min(values) / room, max(values) * room
    decades = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
    steps = (1, 2, 5) if top / bottom < 300 else (1,)
    ticks = [10.0**decade * step for decade in decades for step in steps]
    shown = tuple((tick, _power(tick)) for tick in ticks if bottom <= tick <= top)
    return Axis(low=bottom, high=top, start=start, end=end, ticks=shown, log=True)


def legal(text: str) -> str:
    """Returns a text with the characters that XML 1.0 cannot hold replaced."""
    return _ILLEGAL.sub("\ufffd", text)


def _power(value: float) -> str:
    """Returns "20,000", from a million on "2·10⁶"."""
    if value < 1e6:
        return f"{value:,g}"
    digits, _, power = f"{value:.0e}".partition("e+")
    raised = str(int(power)).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if digits == "1" else f"{digits}·10{raised}"


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))
