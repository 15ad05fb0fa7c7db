"""A report as one HTML file without scripts: its content security policy forbids every request."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pifa_deploy.report_layers import layer_maps
from pifa_deploy.report_plots import Bar, Point, key_mark, ranges, scatter
from pifa_deploy.report_quality import parity_tables, perplexity_table, tasks_tables
from pifa_deploy.report_tables import (
    Table,
    changes_table,
    commands_of,
    engines_table,
    environment_table,
    figures_tables,
    gates_tables,
    latency_tables,
    rivals_table,
    summary,
    widest_bench,
)
from pifa_deploy.report_times import Profile, profiles_of
from pifa_deploy.report_variants import Variant, cases_of, main_cases, texts_of, variants_of

_PAGE = Path(__file__).with_name("report_page")
_SIGNS = {
    "passed": {"sign": "✓", "style": "passed"},
    "failed": {"sign": "✕", "style": "failed"},
    "not decided": {"sign": "○", "style": "open"},
}
_FAMILIES = {"dense": "dense", "2:4": "2:4 sparse", "lowrank": "low-rank", "pifa": "PIFA", "other": "other"}
Json = Mapping[str, Any]
Figure = dict[str, Any]


def html_page(report: Json) -> str:
    """Returns the whole page; every text of the report is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = (_PAGE / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    stages = report["stages"]
    variants = variants_of(stages)
    widest = widest_bench(report)
    pareto = _pareto(widest, variants_of(widest["stages"]))
    return environment.get_template("report.html.jinja").render(
        report=report,
        style=Markup(style),
        style_hash=f"sha256-{digest}",
        signs=_SIGNS,
        summary=summary(report),
        families=_families(variants),
        pareto=pareto,
        bounded=any(timing.bound_ms for variant in variants for timing in variant.times.values()),
        speed_ups=_speed_ups(report, variants),
        layers=[_figure(title, svg) for title, svg in layer_maps(stages)],
        profiles=[_profile(profile) for profile in profiles_of(report)],
        main=_filled(*figures_tables(report)),
        rivals=_filled(rivals_table(report)),
        gates=_filled(*gates_tables(report)),
        changes=_filled(changes_table(report)),
        latency=_filled(*latency_tables(report)),
        perplexity=_filled(perplexity_table(report)),
        tasks=_filled(*tasks_tables(report)),
        parity=_filled(*parity_tables(report)),
        engines=_filled(engines_table(report)),
        environments=_filled(*map(environment_table, stages["bench"])),
        commands=commands_of(report),
    )


def _filled(*tables: Table) -> list[Table]:
    return [table for table in tables if table.rows]


def _figure(title: str, svg: str) -> Figure:
    return {"title": title, "svg": Markup(svg)}


def _profile(profile: Profile) -> Figure:
    figures = [_figure(title, svg) for title, svg in profile.maps]
    return {"title": profile.title, "table": profile.table, "figures": figures}


def _families(variants: list[Variant]) -> list[Figure]:
    present = {variant.family for variant in variants}
    return [{"name": name, "mark": Markup(key_mark(family))} for family, name in _FAMILIES.items() if family in present]


def _pareto(report: Json, variants: list[Variant]) -> list[Figure]:
    """Returns per text the plots of perplexity against weight bytes, prefill and decode time."""
    found = []
    for text in texts_of(report["stages"]):
        scored = [variant for variant in variants if text in variant.perplexity]
        figures = [_size_plot(scored, text)]
        figures += [_time_plot(scored, text, name) for name in main_cases(report["stages"]).values()]
        shown = [figure for figure in figures if figure]
        if shown:
            found.append({"title": f"The same on {text}", "figures": shown})
    return found


def _size_plot(variants: list[Variant], text: str) -> Figure | None:
    points = [
        Point(
            name=variant.name,
            family=variant.family,
            x=variant.facts["weight_bytes"] / 1e6,
            y=variant.perplexity[text].value,
        )
        for variant in variants
        if variant.facts.get("weight_bytes")
    ]
    return _scatter(points, f"{text}: size", "weights, MB", f"perplexity, {text}")


def _time_plot(variants: list[Variant], text: str, case: str) -> Figure | None:
    points = [
        Point(
            name=variant.name,
            family=variant.family,
            x=variant.times[case].median_ms,
            y=variant.perplexity[text].value,
            bound=variant.times[case].bound_ms,
        )
        for variant in variants
        if case in variant.times
    ]
    return _scatter(points, f"{text}: {case}", f"{case}, median ms", f"perplexity, {text}")


def _scatter(points: list[Point], title: str, x_label: str, y_label: str) -> Figure | None:
    if len(points) < 2:
        return None
    return _figure(title, scatter(points, title=f"{y_label} against {x_label}", x_label=x_label, y_label=y_label))


def _speed_ups(report: Json, variants: list[Variant]) -> list[Figure]:
    """Returns per case the speed-ups of all variants but the baseline."""
    figures = []
    for name in cases_of(report["stages"]):
        bars = []
        for variant in variants:
            timing = variant.times.get(name)
            if timing and not timing.baseline:
                bars.append(Bar(name=variant.contender, family=variant.family, estimate=timing.speed_up))
        if bars:
            svg = ranges(bars, title=f"Speed-up, {name}", x_label="times faster than the baseline", reference=1.0)
            figures.append(_figure(name, svg))
    return figures
