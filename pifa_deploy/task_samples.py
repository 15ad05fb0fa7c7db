"""What lm-eval writes with --log_samples: a file for each task, a line for each example and filter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pifa_deploy.errors import InputMissingError, InputRefusedError

_SAMPLES = re.compile(r"samples_(?P<task>.+)_\d{4}-\d\d-\d\dT[^_]*\.jsonl")


def sample_files(place: Path) -> dict[str, Path]:
    """Returns task -> its newest samples_TASK_2026-01-31T12-00-00.000000.jsonl in a folder, or the one file given.

    Raises:
        InputRefusedError: a task's samples lie in several folders: lm-eval makes one for each model.
    """
    files = [place] if place.is_file() else sorted(place.rglob("samples_*.jsonl"), key=lambda path: (path.name, path))
    found: dict[str, Path] = {}
    for path in files:
        match = _SAMPLES.fullmatch(path.name)
        if match is None:
            continue
        other = found.setdefault(match["task"], path)
        if other.parent != path.parent:
            raise InputRefusedError(
                f"{place}: has samples of {match['task']} in several folders, {other.parent} and {path.parent}; "
                "name one of them"
            )
        found[match["task"]] = path
    return found


def read_samples(path: Path, chosen: str | None = None) -> dict[int, dict[str, Any]]:
    """Returns doc_id -> sample; a line is one example under one filter.

    Args:
        path: the file.
        chosen: the filter that counts, the first one when None.

    Raises:
        InputMissingError: no such filter.
        InputRefusedError: malformed, or an example twice.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                sample = json.loads(line)
                key, name = int(sample["doc_id"]), str(sample.get("filter", "none"))
            except (ValueError, KeyError, TypeError) as error:
                raise InputRefusedError(
                    f"{path}: line {number} is no sample of lm-eval ({type(error).__name__}: {error}); run it again"
                ) from None
            if key in found.setdefault(name, {}):
                raise InputRefusedError(f"{path}: line {number} repeats example {key}; give the samples of one run")
            found[name][key] = sample
    if chosen is not None and chosen not in found:
        raise InputMissingError(
            f"{path}: has no filter {chosen!r}, only {', '.join(found) or 'none'}; name one of these"
        )
    # The first one stands first in lm-eval's tables too.
    return found[chosen or next(iter(found))] if found else {}
