"""What a report shows of profiles: times relative to the baseline, the rest beside them, and no map without news."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from report_fixtures import KINDS, LINEARS, MODULES, bench, profile

from pifa_deploy.report_html import html_page
from pifa_deploy.report_times import Profile, profiles_of


def report(**benches: dict[str, Any]) -> dict[str, Any]:
    """A report with these benches alone."""
    entries = [{"label": label, "content": content} for label, content in benches.items()]
    return {"stages": {"verify": [], "evaluate": [], "engine": [], "checkpoint": [], "tasks": [], "bench": entries}}


def shown(svg: str) -> list[float]:
    groups = [each for each in ElementTree.fromstring(svg).iter("g") if "cells" in each.get("class", "").split()]
    return [float(each.text or "nan") for group in groups for each in group.iter("text")]


def test_the_longest_prefill_and_decode_are_shown() -> None:
    found = list(profiles_of(report(bench=bench())))
    assert [one.title for one in found] == ["prefill 512", "decode at 128"]


def test_maps_show_pifa_models_relative_to_the_baseline() -> None:
    found = next(profiles_of(report(bench=bench())))
    maps = dict(found.maps)
    assert list(maps) == ["pifa"]
    ratios = [(3 + i / 4) / 5 for i in range(len(MODULES))]
    assert shown(maps["pifa"]) == [pytest.approx(ratio, rel=0.05) for ratio in ratios]


def test_the_table_adds_up_the_layers() -> None:
    found = next(profiles_of(report(bench=bench()))).table
    columns = list(found.columns)
    assert columns == ["variant", "linears ms", "rest ms", "rest", "q", "k", "gate", "down"]
    rows = {row[0]: dict(zip(columns, row, strict=True)) for row in found.rows}
    assert list(rows) == list(KINDS)
    assert [rows["dense"][kind] for kind in ("q", "k", "gate", "down")] == ["1.00"] * 4
    places = [i for i, name in enumerate(MODULES) if name.endswith(LINEARS[1])]
    expected = sum(3 + i / 4 for i in places) / (5 * len(places))
    assert float(rows["pifa"]["k"]) == pytest.approx(expected, abs=0.006)
    total = sum(3 + i / 4 for i in range(len(MODULES)))
    assert float(rows["pifa"]["linears ms"]) == pytest.approx(total / 1e3, rel=1e-3)
    assert rows["pifa"]["rest"] == f"{100 * 20 / (20 + total):.1f} %"


def test_several_benches_are_named_and_one_without_a_profile_has_nothing() -> None:
    found = list(profiles_of(report(one=bench(), two=bench(layers=[]), three=bench())))
    assert [one.title for one in found] == [
        *("one: prefill 512", "one: decode at 128"),
        *("three: prefill 512", "three: decode at 128"),
    ]
    assert [len(one.maps) for one in found] == [1, 1, 0, 0]  # the same model, against the same baseline


def test_a_linear_that_the_baseline_lacks_has_no_ratio() -> None:
    case = profile("prefill 512", {name: name for name in KINDS})
    for module in case["modules"]:
        if module["name"].endswith(LINEARS[0]):
            del module["times_us"]["dense"]
    found: Profile = next(profiles_of(report(bench=bench(layers=[case]))))
    rows = {row[0]: row for row in found.table.rows}
    assert (rows["pifa"][4], rows["dense"][4]) == ("–", "–")
    assert len(shown(dict(found.maps)["pifa"])) == len(MODULES) * 3 // 4


def test_the_page_folds_the_maps(tmp_path: Any) -> None:
    from test_report import report_of

    page = html_page(report_of(tmp_path, bench=bench()))
    section = page.partition('id="profiles"')[2].partition("</section>")[0]
    assert re.findall(r"<h3>(.*?)</h3>", section) == ["prefill 512", "decode at 128"]
    assert section.count("<details>") == section.count("<svg") == 2
    assert 'id="profiles"' not in html_page(report_of(tmp_path, bench=bench(layers=[])))
