"""What a case of a bench is called: tables, gates and profiles are joined by this name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def case_name(*, phase: str, batch: int, tokens: int, past: int) -> str:
    """Returns "prefill 128" or "decode at 128", with the batch where it is not 1 and a prefill's past.

    Args:
        phase: "prefill" or "decode".
        batch: sequences.
        tokens: read in a step by each sequence.
        past: tokens in the cache before it.
    """
    name = f"decode at {past}" if phase == "decode" else f"{phase} {tokens}"
    if phase != "decode" and past:
        name += f" after {past}"
    return name if batch == 1 else f"{name}, batch {batch}"


def case_name_of(case: Mapping[str, Any]) -> str:
    """Returns the name of a case as a bench writes it."""
    return case_name(**{key: case[key] for key in ("phase", "batch", "tokens", "past")})
