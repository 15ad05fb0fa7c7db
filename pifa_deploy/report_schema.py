"""The shape of report.json and of the stage results in it; one table serves the check at reading and the JSON Schema.

`python -m pifa_deploy.report_schema` prints docs/report.schema.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pifa_deploy.errors import InputRefusedError

SCHEMA = 1
VERDICTS = ("passed", "failed", "not decided")
_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "string": ((str,), "text"),
    "number": ((int, float), "a finite number"),
    "integer": ((int,), "an integer"),
    "boolean": ((bool,), "true or false"),
    "scalar": ((str, int, float, bool), "text, a number, true or false"),
}


@dataclass(frozen=True, kw_only=True)
class One:
    """A single value: of a type of _TYPES, or "any"; `null` allows null, `values` lists the only ones allowed."""

    type: str = "any"
    null: bool = False
    values: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Many:
    """A list of values of one shape."""

    item: Shape


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

TEXT, NUMBER, COUNT, ANY = One(type="string"), One(type="number"), One(type="integer"), One()
TEXT_OR_NULL, NUMBER_OR_NULL, COUNT_OR_NULL, DECIDED = (
    One(type=name, null=True) for name in ("string", "number", "integer", "boolean")
)
SCALAR = One(type="scalar", null=True)
DECISION = Fields(
    required={"name": TEXT, "value": SCALAR, "limit": SCALAR, "passed": DECIDED}, optional={"reason": TEXT_OR_NULL}
)
_CASE_FIGURES = ("max_abs", "cosine", "mean_kl", "p999_kl", "top1")
PARITY = Fields(
    required={"name": TEXT, "positions": COUNT, **dict.fromkeys(_CASE_FIGURES, NUMBER_OR_NULL)},
    optional=dict.fromkeys(("delta_nll", "delta_nll_low", "delta_nll_high"), NUMBER_OR_NULL),
)
PARITY_OR_NULL = Fields(required=PARITY.required, optional=PARITY.optional, null=True)
VERIFY = Fields(
    required={
        "dtype": TEXT,
        "passed": DECIDED,
        "decisions": Many(item=DECISION),
    },
    optional={
        "schema": COUNT,
        "command": TEXT_OR_NULL,
        "low_rank": PARITY_OR_NULL,
        "cases": Many(item=PARITY),
        "overall": PARITY_OR_NULL,
        "levels": ANY,
    },
)
STATISTICS = ("min", "max", "mean", "median", "p90", "p95", "p99", "cv")
TIMES = Fields(required=dict.fromkeys(STATISTICS, NUMBER))
TIMES_OR_NULL = Fields(required=TIMES.required, null=True)
SPEED_UP = Fields(required=dict.fromkeys(("median", "low", "high", "confidence"), NUMBER), null=True)
ROW = Fields(
    required={"name": TEXT, "latency_ms": TIMES},
    optional={
        **dict.fromkeys(("gpu_compute_ms", "enqueue_ms", "h2d_ms", "d2h_ms"), TIMES_OR_NULL),
        **dict.fromkeys(("tokens_per_s", "joules_per_token", "bound_ms", "bound_fraction"), NUMBER_OR_NULL),
        "speed_up": SPEED_UP,
        "samples_ms": Many(item=NUMBER),
        "round_ms": Many(item=NUMBER),
    },
)
BENCH = Fields(
    required={
        "artefact": One(type="string", values=("bench",)),
        "schema": One(type="integer", values=(1,)),
        "contenders": Many(
            item=Fields(
                required={"name": TEXT, "kind": TEXT},
                optional={
                    **dict.fromkeys(("path", "runtime", "device", "dtype"), TEXT_OR_NULL),
                    **dict.fromkeys(("weight_bytes", "parameters", "density"), NUMBER_OR_NULL),
                    "memory": Fields(null=True),
                },
            )
        ),
        "baseline": TEXT,
        "cases": Many(
            item=Fields(
                required={
                    "phase": TEXT,
                    "batch": COUNT,
                    "tokens": COUNT,
                    "past": COUNT,
                    "rows": Many(item=ROW),
                },
                optional={"warnings": Many(item=TEXT)},
            )
        ),
    },
    optional={
        "environment": Named(value=ANY),
        "options": Named(value=ANY),
        "command": TEXT_OR_NULL,
        "fixed": TEXT_OR_NULL,
        "decisions": Many(item=DECISION),
        "passed": DECIDED,
        "layers": Many(
            item=Fields(
                required={"name": TEXT, "times_us": Named(value=NUMBER_OR_NULL)}, optional={"rank": COUNT_OR_NULL}
            )
        ),
    },
)
_SCORE_FIGURES = (
    "perplexity",
    "mean_nll",
    "standard_error",
    "ratio",
    "nll_difference",
    "nll_difference_standard_error",
)
EVALUATE = Fields(
    required={
        "artefact": One(type="string", values=("evaluation",)),
        "schema": One(type="integer", values=(1,)),
        "rows": Many(
            item=Fields(
                required={
                    "checkpoint": TEXT,
                    "kind": TEXT,
                    "texts": Named(value=Fields(required=dict.fromkeys(_SCORE_FIGURES, NUMBER_OR_NULL))),
                },
                optional={
                    **dict.fromkeys(("name", "runtime", "device", "dtype"), TEXT_OR_NULL),
                    **dict.fromkeys(("parameters", "weight_bytes", "tokens_per_second"), NUMBER_OR_NULL),
                },
            )
        ),
    },
    optional={"options": Named(value=ANY), "command": TEXT_OR_NULL, "decisions": Many(item=DECISION)},
)
ENGINE = Fields(
    required={"backend": TEXT, "version": TEXT, "bytes": COUNT, "compute_capabilities": Many(item=TEXT)},
    optional={"proof": Named(value=ANY), "decisions": Many(item=DECISION)},
)
CHECKPOINT = Fields(
    required={"modules": Named(value=Fields(required={"rank": COUNT, "in_features": COUNT, "out_features": COUNT}))},
    optional={"density": NUMBER_OR_NULL, "source": TEXT_OR_NULL},
)
CONTENTS: Mapping[str, Fields] = {
    "verify": VERIFY,
    "bench": BENCH,
    "evaluate": EVALUATE,
    "engine": ENGINE,
    "checkpoint": CHECKPOINT,
}
FIGURE = {"variant": TEXT, "figure": TEXT, "value": NUMBER, "unit": TEXT, "better": One(values=("lower", "higher"))}
REPORT = Fields(
    required={
        "artefact": One(type="string", values=("report",)),
        "schema": One(type="integer", values=(SCHEMA,)),
        "title": TEXT,
        "created": TEXT,
        "version": TEXT,
        "command": TEXT_OR_NULL,
        "verdict": One(type="string", values=VERDICTS),
        "gates": Many(
            item=Fields(required={"stage": TEXT, "label": TEXT, **DECISION.required, "reason": TEXT_OR_NULL})
        ),
        "figures": Many(item=Fields(required=FIGURE)),
        "changes": Many(
            item=Fields(required={"variant": TEXT, "figure": TEXT, "unit": TEXT, "before": NUMBER, "now": NUMBER})
        ),
        "stages": Fields(
            required={
                kind: Many(item=Fields(required={"label": TEXT, "content": shape})) for kind, shape in CONTENTS.items()
            }
        ),
    }
)


def validate(value: Any, shape: Shape, where: str) -> None:
    """Checks a JSON value against a shape.

    Args:
        value: as `json.loads` gives it.
        shape: of the table above.
        where: file and field so far, for the message.

    Raises:
        InputRefusedError: it has another shape; the message names the field, what was found and what was expected.
    """
    if value is None and not isinstance(shape, Many | Named) and (shape.null or shape == ANY):
        return
    if isinstance(shape, One):
        _validate_one(value, shape, where)
    elif isinstance(shape, Many):
        _expect(isinstance(value, list), where, value, "a list")
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
        for name in fields.keys() & value.keys():
            validate(value[name], fields[name], f"{where}.{name}")


def _validate_one(value: Any, shape: One, where: str) -> None:
    if shape.type != "any":
        kinds, expected = _TYPES[shape.type]
        # bool is an int in Python, and JSON has no infinity.
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        _expect(fits and not (isinstance(value, float) and not math.isfinite(value)), where, value, expected)
    if shape.values:
        _expect(value in shape.values, where, value, " or ".join(map(repr, shape.values)))


def _expect(holds: bool, where: str, found: Any, expected: str) -> None:
    if not holds:
        text = repr(found)
        shown = text if len(text) <= 60 else f"{text[:60]}…"
        raise InputRefusedError(f"{where} is {shown}, expected {expected}; run the stage that wrote it again")


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of report.json (draft 2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:pifa-deploy:report:{SCHEMA}",
        "title": f"pifa-deploy report, version {SCHEMA}",
        **_schema_of(REPORT),
    }


def _schema_of(shape: Shape) -> dict[str, Any]:
    if isinstance(shape, One):
        return _schema_of_one(shape)
    if isinstance(shape, Many):
        return {"type": "array", "items": _schema_of(shape.item)}
    if isinstance(shape, Named):
        return {"type": "object", "additionalProperties": _schema_of(shape.value)}
    fields = {name: _schema_of(each) for name, each in {**shape.required, **shape.optional}.items()}
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
    return schema


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
