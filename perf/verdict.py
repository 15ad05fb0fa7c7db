"""What the rows of a benchmark say about the kernels: the exit code of bench_linear.py and bench_model.py."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

# The text of a failure may begin with the name of its exception.
WRONG = re.compile(r"^(\w+: )?wrong result|\b(NaN|Inf)\b")
Rows = Mapping[str, Mapping[str, Any]]


def judge(measured: Sequence[tuple[str, Rows, Collection[str]]]) -> tuple[int, str]:
    """Returns the exit code and one line that says why.

    Args:
        measured: of each point its name, its rows by contender, and the contenders that have to be among them.

    Returns:
        1 for a wrong result of anybody, else 3 where nothing was measured or a contender of those is missing or
        failed, else 0.
    """
    wrong = [
        f"{point}, {name}: {row['failed']}"
        for point, rows, _ in measured
        for name, row in rows.items()
        if "failed" in row and WRONG.search(row["failed"])
    ]
    if wrong:
        return 1, wrong[0]
    for point, rows, required in measured:
        if not required:
            return 3, f"not decided: {point}: no row of the kernels"
        for name in required:
            failed = rows.get(name, {"failed": "not measured"}).get("failed")
            if failed is not None:
                return 3, f"not decided: {point}, {name}: {failed}"
    return (0, f"{len(measured)} points, no wrong result") if measured else (3, "not decided: nothing was measured")
