"""Maps of layers: what a verification really writes is what they show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from report_fixtures import MODULES, write

from pifa_deploy.operator_parity import OperatorFigures
from pifa_deploy.parity import Gates
from pifa_deploy.report import ReportOptions, make_report
from pifa_deploy.report_html import html_page
from pifa_deploy.report_layers import layer_maps
from pifa_deploy.report_stages import Source
from pifa_deploy.source_parity import SourceLayer, SourceWeights
from pifa_deploy.verification_report import Measured, VerifyReport, judge_levels
from pifa_deploy.weight_parity import StoredWeights

OPERATORS = tuple(
    OperatorFigures(module=name, rho=0.01 * (i + 1), max_error=1e-6, positions=128) for i, name in enumerate(MODULES)
)
SOURCE = SourceWeights(
    kind="dense",
    unchanged=3,
    changed=(),
    layers=tuple(
        SourceLayer(module=name, relative_error=0.1 + i / 50, max_error=0.3, bound_ratio=None)
        for i, name in enumerate(MODULES)
    ),
)


def written(**levels: Any) -> dict[str, Any]:
    """What `verify --json` writes of these levels."""
    measured, gates = Measured(dtype="fp32", **levels), Gates(mean_kl=1e-6, top1=0.99)
    report = VerifyReport(measured=measured, gates=gates, verdict=judge_levels(measured, gates))
    value: dict[str, Any] = json.loads(json.dumps(report.to_json(), allow_nan=False))
    return value


def reported(folder: Path, **levels: Any) -> dict[str, Any]:
    file = write(folder, v=written(**levels))["v"]
    return make_report(ReportOptions(sources=(Source(kind="verify", label="pifa", path=file),)))


def shown(svg: str) -> list[float]:
    return [float(each.text or "nan") for each in ElementTree.fromstring(svg).iterfind(".//{*}g/{*}text")]


def test_a_verification_shows_both_errors_of_each_layer(tmp_path: Path) -> None:
    stored = StoredWeights(tensors=5, differing=(), misplaced=())
    report = reported(tmp_path, weights=stored, source=SOURCE, operators=OPERATORS)
    maps = dict(layer_maps(report["stages"]))
    assert list(maps) == ["pifa: relative error of the weight", "pifa: error / expected rounding"]
    weight, rounding = map(shown, maps.values())
    assert weight == pytest.approx([layer.relative_error for layer in SOURCE.layers], rel=0.01)
    assert rounding == pytest.approx([layer.rho for layer in OPERATORS], rel=0.01)
    section = html_page(report).partition('id="layers"')[2].partition("</section>")[0]
    assert section.count("<svg") == 2


@pytest.mark.parametrize(
    "levels",
    [{}, {"operators": ()}, {"weights": StoredWeights(tensors=5, differing=(), misplaced=())}],
    ids=["nothing", "no PIFA layer", "no source"],
)
def test_what_was_not_measured_has_no_map(tmp_path: Path, levels: dict[str, Any]) -> None:
    report = reported(tmp_path, **levels)
    assert list(layer_maps(report["stages"])) == []
    assert 'id="layers"' not in html_page(report)


def test_a_layer_that_the_graph_lacks_leaves_its_cell_empty(tmp_path: Path) -> None:
    lost = OperatorFigures(module=MODULES[0], rho=math.inf, max_error=math.inf, positions=128)
    ((_, svg),) = layer_maps(reported(tmp_path, operators=(lost, *OPERATORS[1:]))["stages"])
    assert len(shown(svg)) == len(MODULES) - 1
