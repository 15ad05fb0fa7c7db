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
_CASE_FIGURES = (
    *("max_abs", "cosine", "mean_kl", "p999_kl", "top1"),
    *("delta_nll", "delta_nll_low", "delta_nll_high"),
)
PARITY = Fields(required={"name": TEXT, "positions": COUNT, **dict.fromkeys(_CASE_FIGURES, NUMBER_OR_NULL)})
PARITY_OR_NULL = Fields(required=PARITY.required, null=True)
# A level that was not asked for is null, and so is a figure that is not finite.
SOURCE = Fields(
    required={"layers": Many(item=Fields(required={"module": TEXT, "relative_error": NUMBER_OR_NULL}))}, null=True
)
OPERATORS = Fields(required={"modules": Many(item=Fields(required={"module": TEXT, "rho": NUMBER_OR_NULL}))}, null=True)
LEVELS = Fields(
    required={
        "weights": Fields(required={"source": SOURCE}, null=True),
        "operators": OPERATORS,
        "logits": Fields(null=True),
    }
)
VERIFY = Fields(
    required={
        "artefact": One(type="string", values=("verify",)),
        "schema": One(type="integer", values=(2,)),
        "dtype": TEXT,
        "passed": DECIDED,
        "decisions": Many(item=DECISION),
        "low_rank": PARITY_OR_NULL,
        **dict.fromkeys(("cases", "kinds"), Many(item=PARITY)),
        "overall": PARITY_OR_NULL,
        "levels": LEVELS,
        "bisection": Fields(required={"line": TEXT}, null=True),
    },
    optional={"command": TEXT_OR_NULL},
)
STATISTICS = ("min", "max", "mean", "median", "p90", "p95", "p99", "cv")
TIMES = Fields(required=dict.fromkeys(STATISTICS, NUMBER))
TIMES_OR_NULL = Fields(required=TIMES.required, null=True)
SPEED_UP = Fields(required=dict.fromkeys(("median", "low", "high", "confidence"), NUMBER))
ROW = Fields(
    required={
        "name": TEXT,
        "latency_ms": TIMES,
        **dict.fromkeys(("gpu_compute_ms", "enqueue_ms"), TIMES_OR_NULL),
        "tokens_per_s": NUMBER,
        **dict.fromkeys(("joules_per_token", "bound_ms", "bound_fraction"), NUMBER_OR_NULL),
        "speed_up": SPEED_UP,
        **dict.fromkeys(("samples_ms", "round_ms"), Many(item=NUMBER)),
    }
)
PROOF = Fields(
    required={
        "source": TEXT,
        **dict.fromkeys(("layers", "plugin_layers", "fused_layers", "plugin_modules"), COUNT),
        **dict.fromkeys(("precisions", "matrix_precisions"), Named(value=COUNT)),
        **dict.fromkeys(("modules", "sparse_eligible", "sparse_picked"), One(type="integer", null=True)),
        "sparse_allowed": One(type="boolean"),
        "sparse_label": TEXT_OR_NULL,
    }
)
BENCH = Fields(
    required={
        "artefact": One(type="string", values=("bench",)),
        "schema": One(type="integer", values=(1,)),
        "contenders": Many(
            item=Fields(
                required={
                    **dict.fromkeys(("name", "path", "kind", "runtime", "device", "dtype"), TEXT),
                    **dict.fromkeys(("weight_bytes", "parameters", "density"), NUMBER_OR_NULL),
                    "memory": Fields(required={"peak_bytes": NUMBER_OR_NULL}),
                    "proof": Fields(required=PROOF.required, null=True),
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
                    "warnings": Many(item=TEXT),
                },
            )
        ),
        "environment": Named(value=ANY),
        "options": Named(value=ANY),
        "fixed": TEXT_OR_NULL,
        "decisions": Many(item=DECISION),
        "passed": DECIDED,
        "layers": Many(
            item=Fields(
                required={
                    "case": TEXT,
                    "rest_us": Named(value=NUMBER),
                    "modules": Many(item=Fields(required={"name": TEXT, "times_us": Named(value=NUMBER)})),
                    "warnings": Many(item=TEXT),
                },
            )
        ),
    },
    optional={"command": TEXT_OR_NULL},
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
                    **dict.fromkeys(("name", "checkpoint", "kind", "runtime", "device", "dtype"), TEXT),
                    **dict.fromkeys(("parameters", "weight_bytes", "tokens_per_second"), NUMBER_OR_NULL),
                    "texts": Named(value=Fields(required=dict.fromkeys(_SCORE_FIGURES, NUMBER_OR_NULL))),
                },
            )
        ),
        "options": Named(value=ANY),
    },
    optional={"command": TEXT_OR_NULL},
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
    required={
        **dict.fromkeys(("backend", "version"), TEXT),
        "bytes": COUNT,
        "compute_capabilities": Many(item=TEXT),
        "proof": PROOF,
        "decisions": Many(item=DECISION),
    }
)
CHECKPOINT = Fields(
    required={
        "modules": Named(value=Fields(required=dict.fromkeys(("rank", "in_features", "out_features"), COUNT))),
        "density": NUMBER_OR_NULL,
        "source": TEXT_OR_NULL,
    }
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
            item=Fields(
                required={"variant": TEXT, "figure": TEXT, "unit": TEXT, "before": NUMBER, "now": NUMBER},
                optional={"comparable": One(type="boolean")},
            )
        ),
        "stages": Fields(required=STAGES),
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
