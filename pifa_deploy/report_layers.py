"""What a report shows of single layers: rank and error of each factorised linear, as maps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pifa_deploy.report_plots import heat_map

_PLACE = re.compile(r"(?:^|.*\.)(\d+)\.(?:.*\.)?([^.]+)")
Json = Mapping[str, Any]
Cells = dict[tuple[int, str], float]


def layer_maps(stages: Mapping[str, Sequence[Json]]) -> Iterator[tuple[str, str]]:
    """Yields (title, SVG) of every figure that is known of each layer."""
    for entry in stages["checkpoint"]:
        ranks = {name: int(spec["rank"]) for name, spec in entry["content"]["modules"].items()}
        yield from _map(f"{entry['label']}: rank", ranks)
    for entry in stages["verify"]:
        for title, errors in module_errors(entry["content"]["levels"]):
            yield from _map(f"{entry['label']}: {title}", errors, log=True)


def module_errors(levels: Json) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields (what, module -> error) of the levels of a verification that state one for each module.

    What is not finite, null in the file, is left out: no shade says it.
    """
    weights, operators = levels["weights"], levels["operators"]
    source = weights["source"] if weights else None
    for title, rows, field in (
        ("relative error of the weight", source["layers"] if source else (), "relative_error"),
        ("error / expected rounding", operators["modules"] if operators else (), "rho"),
    ):
        yield title, {row["module"]: row[field] for row in rows if row[field] is not None}


def _map(title: str, values: Mapping[str, float], *, log: bool = False) -> Iterator[tuple[str, str]]:
    cells = cells_of(values)
    if cells:
        yield title, heat_map(cells, title=title, digits=3, log=log)


def cells_of(values: Mapping[str, float]) -> Cells:
    """Returns (layer, module) -> value of the modules whose names hold the number of a layer."""
    found = {_PLACE.fullmatch(name): value for name, value in values.items()}
    return {(int(match[1]), match[2]): value for match, value in found.items() if match}
