"""What a report shows of the profiles of a bench: where each contender's time goes, linear layer by linear layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pifa_deploy.report_layers import cells_of
from pifa_deploy.report_numbers import number, percent
from pifa_deploy.report_plots import heat_map, in_order
from pifa_deploy.report_tables import Table, one_bench_each
from pifa_deploy.report_variants import main_cases, variants_of

Json = Mapping[str, Any]
Times = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One case of a bench.

    Attributes:
        title: the bench where there are several, and the case.
        table: a row a contender.
        maps: (title, SVG) of each PIFA model that no earlier bench has shown: time of every linear relative to the
            baseline's.
    """

    title: str
    table: Table
    maps: tuple[tuple[str, str], ...]


def profiles_of(report: Json) -> Iterator[Profile]:
    """Yields the longest prefill and the longest decode of every bench that was profiled; report.json has them all."""
    benches, shown = one_bench_each(report), set[tuple[str, ...]]()
    for label, part in benches.items():
        content = part["stages"]["bench"][0]["content"]
        found = {each["case"]: each for each in content["layers"]}
        places = {each["name"]: each["path"] for each in content["contenders"]}
        # The other models' layers are told by the table; a map of each would be most of the page.
        pifa = [each.contender for each in variants_of(part["stages"]) if each.family == "pifa" and each.times]
        for case in main_cases(part["stages"]).values():
            if case not in found:
                continue
            maps = {name: (case, places[name], places[content["baseline"]]) for name in pifa}
            new = [name for name, which in maps.items() if which not in shown]
            shown.update(maps.values())
            title = case if len(benches) == 1 else f"{label}: {case}"
            yield _profile(found[case], content["baseline"], title=title, mapped=new)


def _profile(case: Json, baseline: str, *, title: str, mapped: Collection[str]) -> Profile:
    times: dict[str, dict[str, float]] = {name: {} for name in case["rest_us"]}
    for module in case["modules"]:
        for name, us in module["times_us"].items():
            times.setdefault(name, {})[module["name"]] = us
    maps = []
    for name, modules in times.items():
        ratios = cells_of(_ratios(modules, times.get(baseline, {})))
        if name != baseline and name in mapped and ratios:
            svg = heat_map(ratios, title=f"{title}: {name}, time relative to {baseline}", digits=2, reference=1.0)
            maps.append((name, svg))
    table = _table(times, case["rest_us"], baseline, title=title)
    return Profile(title=title, table=replace(table, note="; ".join(case["warnings"])), maps=tuple(maps))


def _table(times: Mapping[str, Times], rest: Times, baseline: str, *, title: str) -> Table:
    sums = {name: _by_kind(modules) for name, modules in times.items()}
    kinds = in_order({kind for found in sums.values() for kind in found})
    rows = []
    for name, found in sums.items():
        ratios = _ratios(found, sums.get(baseline, {}))
        linears, others = sum(times[name].values()), rest.get(name)
        share = None if others is None else others / (others + linears)
        cells = [number(ratios.get(kind), 3) for kind in kinds]
        milliseconds = (number(None if us is None else us / 1e3) for us in (linears, others))
        rows.append((name, *milliseconds, percent(share), *cells))
    columns = ("variant", "linears ms", "rest ms", "rest", *(kind.removesuffix("_proj") for kind in kinds))
    return Table(title=title, columns=columns, rows=tuple(rows))


def _by_kind(modules: Times) -> dict[str, float]:
    """Returns "q_proj" -> microseconds of all layers together."""
    found: dict[str, float] = {}
    for (_, kind), us in cells_of(modules).items():
        found[kind] = found.get(kind, 0.0) + us
    return found


def _ratios(times: Times, base: Times) -> dict[str, float]:
    return {name: us / base[name] for name, us in times.items() if base.get(name)}
