"""Shapes of JSON values: checked against a file's content, or written as JSON Schema."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pifa_deploy.errors import InputRefusedError

_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "string": ((str,), "text"),
    "number": ((int, float), "a finite number"),
    "integer": ((int,), "an integer"),
    "boolean": ((bool,), "true or false"),
    "scalar": ((str, int, float, bool), "text, a number, true or false"),
}


@dataclass(frozen=True, kw_only=True)
class One:
    """A single value: of a type of _TYPES, or "any".

    Attributes:
        type: which.
        null: whether null will do too.
        values: the only ones allowed.
        least: smallest number allowed.
        pattern: regular expression that the whole text matches.
    """

    type: str = "any"
    null: bool = False
    values: tuple[Any, ...] = ()
    least: int | None = None
    pattern: str | None = None


@dataclass(frozen=True, kw_only=True)
class Many:
    """A list of values of one shape, at least `least` of them."""

    item: Shape
    least: int = 0


@dataclass(frozen=True, kw_only=True)
class Named:
    """An object whose keys are names of the user's and whose values have one shape."""

    value: Shape


@dataclass(frozen=True, kw_only=True)
class Fields:
    """An object with fixed keys; keys that are not listed are allowed, so that stages can say more."""

    required: Mapping[str, Shape] = field(default_factory=dict)
    optional: Mapping[str, Shape] = field(default_factory=dict)
    null: bool = False


Shape = One | Many | Named | Fields


def validate(value: Any, shape: Shape, where: str) -> None:
    """Checks a JSON value against a shape.

    Args:
        value: as `json.loads` gives it.
        shape: what it must be.
        where: file and field so far, for the message.

    Raises:
        InputRefusedError: it has another shape; the message names the field, what was found and what was expected.
    """
    if value is None and not isinstance(shape, Many | Named) and (shape.null or shape == One()):
        return
    if isinstance(shape, One):
        _validate_one(value, shape, where)
    elif isinstance(shape, Many):
        _expect(isinstance(value, list), where, value, "a list")
        _expect(len(value) >= shape.least, where, value, f"at least {shape.least}")
        for place, item in enumerate(value):
            validate(item, shape.item, f"{where}[{place}]")
    else:
        _expect(isinstance(value, dict), where, value, "an object")
        if isinstance(shape, Named):
            fields = dict.fromkeys(value, shape.value)
        else:
            for name in shape.required:
                _expect(name in value, f"{where}.{name}", None, "a value")
            fields = {**shape.optional, **shape.required}
        for name in filter(value.__contains__, fields):
            validate(value[name], fields[name], f"{where}.{name}")


def _validate_one(value: Any, shape: One, where: str) -> None:
    if shape.type != "any":
        kinds, expected = _TYPES[shape.type]
        # bool is an int in Python, and JSON has no infinity.
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        _expect(fits and not (isinstance(value, float) and not math.isfinite(value)), where, value, expected)
    if shape.values:
        _expect(value in shape.values, where, value, " or ".join(map(repr, shape.values)))
    if shape.least is not None:
        _expect(value >= shape.least, where, value, f"at least {shape.least}")
    if shape.pattern is not None:
        _expect(re.fullmatch(shape.pattern, value) is not None, where, value, f"text that matches {shape.pattern}")


def _expect(holds: bool, where: str, found: Any, expected: str) -> None:
    if not holds:
        text = repr(found)
        shown = text if len(text) <= 60 else f"{text[:60]}…"
        raise InputRefusedError(f"{where} is {shown}, expected {expected}; run the stage that wrote it again")


def schema_of(shape: Shape) -> dict[str, Any]:
    """Returns the JSON Schema of a shape."""
    if isinstance(shape, One):
        return _schema_of_one(shape)
    if isinstance(shape, Many):
        return {"type": "array", "items": schema_of(shape.item), **({"minItems": shape.least} if shape.least else {})}
    if isinstance(shape, Named):
        return {"type": "object", "additionalProperties": schema_of(shape.value)}
    fields = {name: schema_of(each) for name, each in {**shape.required, **shape.optional}.items()}
    kind: Any = ["object", "null"] if shape.null else "object"
    return {"type": kind, "properties": fields, "required": sorted(shape.required)}


def _schema_of_one(shape: One) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    if shape.type != "any":
        types = ["string", "number", "boolean"] if shape.type == "scalar" else [shape.type]
        types += ["null"] if shape.null else []
        schema["type"] = types if len(types) > 1 else types[0]
    if shape.values:
        schema["enum"] = list(shape.values)
    if shape.least is not None:
        schema["minimum"] = shape.least
    if shape.pattern is not None:
        schema["pattern"] = f"^(?:{shape.pattern})$"
    return schema
