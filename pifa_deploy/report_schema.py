"""The shape of report.json and of the stage results in it; one table serves the check at reading and the JSON Schema.

`python -m pifa_deploy.report_schema` prints docs/report.schema.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pifa_deploy.json_shape import Fields, Many, Named, One, schema_of

SCHEMA = 1
VERDICTS = ("passed", "failed", "not decided")
TEXT, NUMBER, COUNT, ANY = One(type="string"), One(type="number"), One(type="integer"), One()
TEXT_OR_NULL, NUMBER_OR_NULL, DECIDED = (One(type=name, null=True) for name in ("string", "number", "boolean"))
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
                required={
                    "case": TEXT,
                    "rest_us": Named(value=NUMBER),
                    "modules": Many(item=Fields(required={"name": TEXT, "times_us": Named(value=NUMBER)})),
                },
                optional={"warnings": Many(item=TEXT)},
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
PAIRED = Fields(
    required={
        **dict.fromkeys(("task", "metric"), TEXT),
        **dict.fromkeys(("examples", "lost", "won"), COUNT),
        **dict.fromkeys(("reference", "candidate", "difference", "low", "high", "p_value"), NUMBER),
    }
)
TASKS = Fields(
    required={
        "artefact": One(type="string", values=("compare-tasks",)),
        "schema": One(type="integer", values=(1,)),
        "passed": DECIDED,
        "tasks": Many(item=PAIRED),
        "overall": PAIRED,
        "options": Fields(required={"margin": NUMBER, "confidence": NUMBER}),
        "decisions": Many(item=DECISION),
    },
    optional={"command": TEXT_OR_NULL},
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
    "tasks": TASKS,
    "engine": ENGINE,
    "checkpoint": CHECKPOINT,
}
STAGES = {kind: Many(item=Fields(required={"label": TEXT, "content": shape})) for kind, shape in CONTENTS.items()}
# Reports of this schema were written before there were such stages.
_LATER = ("tasks",)
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
            required={kind: shape for kind, shape in STAGES.items() if kind not in _LATER},
            optional={kind: STAGES[kind] for kind in _LATER},
        ),
    }
)


def json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of report.json (draft 2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:pifa-deploy:report:{SCHEMA}",
        "title": f"pifa-deploy report, version {SCHEMA}",
        **schema_of(REPORT),
    }


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
