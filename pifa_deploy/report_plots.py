"""Plots of a report as inline SVG: text stays text, colours come from the page's style sheet and follow its dark mode.

Families of variants differ in shape as well as in colour. All drawings are 360 units wide, the width of a phone: their
text has the size of the page's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from pifa_deploy.report_numbers import number
from pifa_deploy.report_variants import Estimate
from pifa_deploy.svg_axes import Axis, legal, linear_axis, log_axis

WIDTH = 360
_HEIGHT, _RIGHT, _TOP, _BOTTOM = 284, 14, 14, 42
_CHARACTER, _LINE = 7.2, 13  # of the page's 12 px text
_SHAPES = {
    "dense": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "2:4": "M-4.5 -4.5h9v9h-9z",
    "lowrank": "M0 -5.5L5.5 4.5H-5.5z",
    "pifa": "M0 -6.5L6.5 0L0 6.5L-6.5 0z",
    "other": "M-5.5 -1.5h4v-4h3v4h4v3h-4v4h-3v-4h-4z",
}
_CLASSES = {"2:4": "sparse"}
Box = tuple[float, float, float, float]
Element = ElementTree.Element


@dataclass(frozen=True, kw_only=True)
class Point:
    """One variant in a scatter plot.

    Attributes:
        name: label beside it.
        family: see `Variant.family`.
        x, y: where it lies; smaller is better in both.
        bound: the smallest x that physics allows, None where it is not known.
    """

    name: str
    family: str
    x: float
    y: float
    bound: float | None = None


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One line of a range plot: a name, its family and an estimate."""

    name: str
    family: str
    estimate: Estimate


def scatter(points: Sequence[Point], *, title: str, x_label: str, y_label: str) -> str:
    """Returns a plot of cost against quality, with the line of the variants that no other one beats in both."""
    svg = _drawing(_HEIGHT, title, "; ".join(f"{p.name}: {number(p.x)}, {number(p.y)}" for p in points))
    bounds = [point.bound for point in points if point.bound is not None]
    values = [point.y for point in points]
    make = log_axis if min(values) > 0 and max(values) / min(values) > 6 else linear_axis
    up = make(values, _HEIGHT - _BOTTOM, _TOP)
    left = 28 + _CHARACTER * max(len(text) for _, text in up.ticks)
    across = linear_axis([*(point.x for point in points), *bounds], left, WIDTH - _RIGHT)
    _draw_axes(svg, across, up, x_label=x_label, y_label=y_label)
    front = _draw_front(svg, points, across, up)
    taken: list[Box] = [(across.at(p.x) - 7, up.at(p.y) - 7, across.at(p.x) + 7, up.at(p.y) + 7) for p in points]
    taken += [(across.at(p.bound) - 3, up.at(p.y) - 2, across.at(p.x), up.at(p.y) + 2) for p in points if p.bound]
    for point in points:
        x, y = across.at(point.x), up.at(point.y)
        if point.bound is not None:
            _draw_bound(svg, across.at(point.bound), x, y)
        _draw_mark(svg, point.family, x, y, f"{point.name}: {number(point.x)} {x_label}, {number(point.y)} {y_label}")
    taken += front
    for point in points:
        _draw_label(svg, point.name, (across.at(point.x), up.at(point.y)), taken, least=across.start)
    return _text_of(svg)


def ranges(bars: Sequence[Bar], *, title: str, x_label: str, reference: float) -> str:
    """Returns a plot of estimates with their intervals, one below the other, and a line at `reference`."""
    names = max((len(bar.name) for bar in bars), default=0)
    left = min(max(names * _CHARACTER + 14, 60), WIDTH * 0.45)
    height = _TOP + 24 * len(bars) + _BOTTOM
    told = "; ".join(f"{bar.name}: {number(bar.estimate.value, 3)}" for bar in bars)
    svg = _drawing(height, title, told)
    ends = [end for bar in bars for end in (bar.estimate.value, bar.estimate.low, bar.estimate.high) if end is not None]
    across = linear_axis([*ends, reference], left, WIDTH - _RIGHT - 34)
    bottom = height - _BOTTOM
    _draw_ticks(svg, across, bottom, x_label)
    _line(svg, (across.at(reference), _TOP - 6), (across.at(reference), bottom), "reference")
    for i, bar in enumerate(bars):
        y, estimate = _TOP + 24 * i + 12, bar.estimate
        _text(svg, (left - 10, y + 4), bar.name, "label end")
        if estimate.low is not None and estimate.high is not None:
            _line(svg, (across.at(estimate.low), y), (across.at(estimate.high), y), f"whisker {_class(bar.family)}")
        _draw_mark(svg, bar.family, across.at(estimate.value), y, f"{bar.name}: {number(estimate.value, 3)}")
        _text(svg, (WIDTH - 4, y + 4), number(estimate.value, 3), "label end")
    return _text_of(svg)


def heat_map(
    cells: dict[tuple[int, str], float],
    *,
    title: str,
    digits: int = 3,
    log: bool = False,
    reference: float | None = None,
) -> str:
    """Returns a map of layers (down) and their modules (across); each cell shows its number.

    Args:
        cells: (layer, module) -> value; what is missing stays empty.
        title: what the values are.
        digits: of the numbers shown.
        log: shade by order of magnitude.
        reference: shade by the distance from this value, at its strongest from half or twice of it on, in a colour of
            its own above; maps of one reference compare.
    """
    rows, columns = sorted({row for row, _ in cells}), in_order({column for _, column in cells})
    left, top, tall = 26, 22, 17
    wide = (WIDTH - left) / max(len(columns), 1)
    shares = _shares(cells, log=log, reference=reference)
    told = f"from {number(min(cells.values()), digits)} to {number(max(cells.values()), digits)}"
    svg = _drawing(top + tall * len(rows) + 4, title, told)
    for j, column in enumerate(columns):
        short = _shortened(column.removesuffix("_proj"), max(int((wide - 2) / _CHARACTER), 3))
        _text(svg, (left + wide * (j + 0.5), top - 8), short, "tick middle")
    # What all cells have in common stands once: maps are most of a page.
    group = _add(svg, "g")
    group.set("class", "cells middle")
    for i, row in enumerate(rows):
        y = top + tall * i
        _text(svg, (left - 6, y + 12), str(row), "tick end")
        for j, column in enumerate(columns):
            if (row, column) not in cells:
                continue
            cell = _add(group, "rect", x=left + wide * j + 1, y=y + 1, width=wide - 2, height=tall - 2)
            if reference and cells[row, column] > reference:
                cell.set("class", "above")
            cell.set("fill-opacity", f"{0.05 + 0.4 * shares[row, column]:.3f}")
            _text(group, (left + wide * (j + 0.5), y + 12), number(cells[row, column], digits))
    return _text_of(svg)


def _shares(cells: dict[tuple[int, str], float], *, log: bool, reference: float | None) -> dict[tuple[int, str], float]:
    """Returns how strongly each cell is shaded, 0 to 1."""
    if reference:
        return {place: min(abs(math.log2(max(value, 1e-300) / reference)), 1.0) for place, value in cells.items()}
    shades = {place: math.log(max(value, 1e-300)) if log else value for place, value in cells.items()}
    low, high = min(shades.values()), max(shades.values())
    return {place: (shade - low) / (high - low) if high > low else 0.5 for place, shade in shades.items()}


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def in_order(columns: set[str]) -> list[str]:
    """Returns modules in the order in which a layer computes them."""
    known = ("q", "k", "v", "qkv", "o", "gate", "gate_up", "up", "fc1", "down", "fc2")
    places = {f"{name}_proj": place for place, name in enumerate(known)}
    return sorted(columns, key=lambda column: (places.get(column, len(known)), column))


def key_mark(family: str) -> str:
    """Returns the mark of a family on its own, for a legend."""
    svg = Element("svg", {"viewBox": "-8 -8 16 16", "class": "key-mark", "aria-hidden": "true"})
    _add(svg, "path", d=_SHAPES[family]).set("class", f"mark {_class(family)}")
    return _text_of(svg)


def _draw_axes(svg: Element, across: Axis, up: Axis, *, x_label: str, y_label: str) -> None:
    bottom = _HEIGHT - _BOTTOM
    for value, text in up.ticks:
        _line(svg, (across.start, up.at(value)), (across.end, up.at(value)), "grid")
        _text(svg, (across.start - 6, up.at(value) + 4), text, "tick end")
    _draw_ticks(svg, across, bottom, x_label)
    _line(svg, (across.start, bottom), (across.end, bottom), "axis")
    middle = (_TOP + bottom) / 2
    label = _text(svg, (11, middle), y_label, "tick middle")
    label.set("transform", f"rotate(-90 11 {middle:.1f})")


def _draw_ticks(svg: Element, across: Axis, bottom: float, label: str) -> None:
    for value, text in across.ticks:
        _line(svg, (across.at(value), bottom), (across.at(value), bottom + 4), "axis")
        _text(svg, (across.at(value), bottom + 17), text, "tick middle")
    _text(svg, ((across.start + across.end) / 2, bottom + 35), label, "tick middle")


def _draw_front(svg: Element, points: Sequence[Point], across: Axis, up: Axis) -> list[Box]:
    """Draws stairs through the points that no other point beats in both directions; returns where they lie."""
    front: list[Point] = []
    for point in sorted(points, key=lambda each: (each.x, each.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    boxes: list[Box] = []
    for one, other in itertools.pairwise(front):
        left, right, top, bottom = across.at(one.x), across.at(other.x), up.at(one.y), up.at(other.y)
        _add(svg, "path", d=f"M{left:.1f} {top:.1f}H{right:.1f}V{bottom:.1f}").set("class", "front")
        boxes += [(left, top - 2, right, top + 2), (right - 2, top, right + 2, bottom)]
    return boxes


def _draw_bound(svg: Element, bound: float, x: float, y: float) -> None:
    _line(svg, (bound, y), (x, y), "to-bound")
    _line(svg, (bound, y - 7), (bound, y + 7), "bound")


def _draw_mark(svg: Element, family: str, x: float, y: float, told: str) -> None:
    mark = _add(svg, "path", d=_SHAPES[family], transform=f"translate({x:.1f} {y:.1f})")
    mark.set("class", f"mark {_class(family)}")
    _add(mark, "title").text = legal(told)


def _draw_label(svg: Element, name: str, place: tuple[float, float], taken: list[Box], *, least: float) -> None:
    """Writes a name beside its mark, at the first place where nothing else stands."""
    x, y = place
    shown = _shortened(name, 28)
    wide = len(shown) * _CHARACTER
    places = [(x + 10, y + 4), (x - 10 - wide, y + 4)]
    places += [(x - wide / 2, y + side * (step * _LINE) + 4) for step in (1.2, 2.2, 3.2) for side in (-1, 1)]
    places += [(x + 10, y - 9), (x + 10, y + 17), (x - 10 - wide, y - 9), (x - 10 - wide, y + 17)]
    best: tuple[float, tuple[float, float], Box] | None = None
    for left, base in places:
        box = (left - 2, base - 11, left + wide + 2, base + 3)
        outside = max(least - box[0], 0) + max(box[2] - WIDTH, 0) + max(-box[1], 0) + max(box[3] - _HEIGHT + _BOTTOM, 0)
        cost = outside + sum(_overlap(box, other) for other in taken)
        if best is None or cost < best[0]:
            best = cost, (left, base), box
    if best:
        taken.append(best[2])
        _text(svg, best[1], shown, "label")


def _overlap(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    up = min(one[3], other[3]) - max(one[1], other[1])
    return across * up if across > 0 and up > 0 else 0.0


def _drawing(height: float, title: str, description: str) -> Element:
    svg = Element("svg", {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "class": "plot"})
    _add(svg, "title").text = legal(title)
    _add(svg, "desc").text = legal(description)
    return svg


def _class(family: str) -> str:
    return _CLASSES.get(family, family)


def _add(parent: Element, tag: str, **attributes: float | str) -> Element:
    texts = {name: f"{value:.1f}" if isinstance(value, float) else str(value) for name, value in attributes.items()}
    return ElementTree.SubElement(parent, tag, texts)


def _line(svg: Element, start: tuple[float, float], end: tuple[float, float], style: str) -> None:
    _add(svg, "line", x1=start[0], y1=start[1], x2=end[0], y2=end[1]).set("class", style)


def _text(parent: Element, place: tuple[float, float], text: str, style: str = "") -> Element:
    element = _add(parent, "text", x=place[0], y=place[1])
    if style:
        element.set("class", style)
    element.text = legal(text)
    return element


def _text_of(svg: Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode")
