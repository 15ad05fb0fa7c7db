"""Plots: what they draw lies where the axes say, read back from the SVG."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from pifa_deploy.report_plots import Bar, Point, heat_map, ranges, scatter
from pifa_deploy.report_variants import Estimate
from pifa_deploy.svg_axes import legal, linear_axis, log_axis

POINTS = [
    Point(name="dense", family="dense", x=538.1, y=11.4, bound=300.0),
    Point(name="2:4", family="2:4", x=269.0, y=74.3),
    Point(name="low-rank", family="lowrank", x=325.4, y=150.0),
    Point(name="pifa", family="pifa", x=325.3, y=98.6),
]


def texts(svg: ElementTree.Element, style: str) -> list[tuple[float, float, str]]:
    found = [each for each in svg.iter("text") if style in each.get("class", "").split()]
    return [(float(each.get("x", "0")), float(each.get("y", "0")), each.text or "") for each in found]


def in_cells(svg: ElementTree.Element) -> list[str]:
    return [
        each.text or ""
        for group in svg.iter("g")
        if group.get("class") == "cells middle"
        for each in group.iter("text")
    ]


def number_of(text: str) -> float | None:
    return float(text.replace(",", "")) if re.fullmatch(r"[\d.,]+", text) else None


def scale(ticks: list[tuple[float, float]], log: bool) -> np.poly1d:
    """Returns place -> value, fitted to (place, value) of the tick labels."""
    places, values = np.array(ticks).T
    return np.poly1d(np.polyfit(places, np.log(values) if log else values, 1))


@pytest.mark.parametrize("worst", [150.0, 12.5], ids=["log", "linear"])
def test_marks_lie_where_the_tick_labels_say(worst: float) -> None:
    points = [Point(name=p.name, family=p.family, x=p.x, y=min(p.y, worst), bound=p.bound) for p in POINTS]
    svg = ElementTree.fromstring(scatter(points, title="t", x_label="MB", y_label="perplexity"))
    ticks = [(x, y, number_of(text)) for x, y, text in texts(svg, "tick")]
    low = max(y for _, y, value in ticks if value is not None)
    across = scale([(x, value) for x, y, value in ticks if value is not None and y == low], log=False)
    up = scale([(y - 4, value) for _, y, value in ticks if value is not None and y != low], log=worst > 100)
    marks = [each for each in svg.iter("path") if "mark" in each.get("class", "")]
    assert len(marks) == len(points)
    for point, mark in zip(points, marks, strict=True):
        x, y = map(float, re.findall(r"[\d.]+", mark.get("transform", "")))
        assert across(x) == pytest.approx(point.x, abs=3)
        assert (np.exp(up(y)) if worst > 100 else up(y)) == pytest.approx(point.y, rel=0.01)
        assert (mark.findtext("title") or "").startswith(point.name)
    (bound,) = (each for each in svg.iter("line") if each.get("class") == "bound")
    assert across(float(bound.get("x1", "0"))) == pytest.approx(300.0, abs=3)


def test_the_front_leaves_out_what_another_variant_beats() -> None:
    points = [Point(name=str(i), family="other", x=x, y=y) for i, (x, y) in enumerate([(1, 9), (2, 5), (3, 7), (4, 1)])]
    svg = ElementTree.fromstring(scatter(points, title="t", x_label="x", y_label="y"))
    stairs = [each.get("d", "") for each in svg.iter("path") if each.get("class") == "front"]
    marks = [each.get("transform", "") for each in svg.iter("path") if "mark" in each.get("class", "")]
    x, y = re.findall(r"[\d.]+", marks[2])
    assert len(stairs) == 2
    assert not any(x in stair or y in stair for stair in stairs)


def test_labels_of_near_points_do_not_cover_each_other() -> None:
    crowd = [Point(name=f"variant {i}", family="pifa", x=100 + i % 3, y=10 + i / 20) for i in range(6)]
    svg = ElementTree.fromstring(scatter([*crowd, POINTS[0]], title="t", x_label="x", y_label="y"))
    boxes = [(x, y - 10, x + 6.6 * len(text), y + 2) for x, y, text in texts(svg, "label")]
    assert len(boxes) == 7
    for i, one in enumerate(boxes):
        assert one[0] >= 0
        assert one[2] <= 360
        for other in boxes[:i]:
            apart = one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]
            assert apart


def test_ranges_draw_the_interval_around_the_value() -> None:
    bars = [
        Bar(name="a", family="pifa", estimate=Estimate(value=1.5, low=1.4, high=1.6)),
        Bar(name="b", family="lowrank", estimate=Estimate(value=0.9)),
    ]
    svg = ElementTree.fromstring(ranges(bars, title="t", x_label="x", reference=1.0))
    ticks = [(x, number_of(text)) for x, _, text in texts(svg, "tick")]
    across = scale([(x, value) for x, value in ticks if value is not None], log=False)
    (whisker,) = (each for each in svg.iter("line") if "whisker" in each.get("class", ""))
    assert [across(float(whisker.get(end, "0"))) for end in ("x1", "x2")] == pytest.approx([1.4, 1.6], abs=0.01)
    (line,) = (each for each in svg.iter("line") if each.get("class") == "reference")
    assert across(float(line.get("x1", "0"))) == pytest.approx(1.0, abs=0.01)


def test_a_heat_map_shows_each_value_and_shades_by_it() -> None:
    cells = {(layer, name): 10.0 ** (layer + i) for layer in (2, 0) for i, name in enumerate(("q_proj", "down_proj"))}
    svg = ElementTree.fromstring(heat_map(cells, title="t", log=True))
    assert in_cells(svg) == ["1.00", "10.0", "100", "1,000"]
    shades = [float(each.get("fill-opacity", "0")) for each in svg.iter("rect")]
    assert np.diff(shades) == pytest.approx(np.diff(shades)[0] * np.array([1, 1, 1]), abs=0.002)
    assert [text for _, _, text in texts(svg, "tick")] == ["q", "down", "0", "2"]


def test_maps_of_one_reference_shade_alike_on_both_sides_of_it() -> None:
    cells = {(0, "q_proj"): 0.25, (0, "k_proj"): 0.5, (0, "v_proj"): 1.0, (1, "q_proj"): 2.0, (1, "v_proj"): 1.25}
    svg = ElementTree.fromstring(heat_map(cells, title="t", reference=1.0))
    found = dict(zip((0.25, 0.5, 1.0, 2.0, 1.25), svg.iter("rect"), strict=True))
    assert [float(text) for text in in_cells(svg)] == list(found)
    shades = {value: float(cell.get("fill-opacity", "0")) for value, cell in found.items()}
    assert shades[1.0] < shades[1.25] < shades[2.0]
    assert shades[0.5] == shades[0.25] == shades[2.0]
    assert {value for value, cell in found.items() if cell.get("class") == "above"} == {2.0, 1.25}


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-7, 3e-7], [2e9, 2e9 + 1], [-3.0, 4.0]])
def test_axes_of_odd_values_have_ticks_inside(values: list[float]) -> None:
    axis = linear_axis(values, 40, 340)
    assert len(axis.ticks) >= 2
    assert all(40 <= axis.at(value) <= 340 for value, _ in axis.ticks)
    assert all(40 < axis.at(value) < 340 or value == 0 for value in values)


@pytest.mark.parametrize("top", [1.1, 2.3, 7.0, 19.0, 33.0, 480.0, 1234.0])
def test_tick_labels_say_where_the_ticks_are(top: float) -> None:
    for value, text in linear_axis([0.0, top], 0, 300).ticks:
        assert number_of(text) == pytest.approx(value)


def test_a_log_axis_writes_large_numbers_as_powers() -> None:
    labels = [text for _, text in log_axis([10, 1.5e8], 0, 100).ticks]
    assert labels[:2] == ["10", "100"]
    assert labels[-1] == "10⁸"


def test_what_xml_cannot_hold_is_replaced() -> None:
    assert legal("a\x00b\x1b\ufffe\ud800c\n") == "a\ufffdb\ufffd\ufffd\ufffdc\n"
