"""The contract of the PIFA operators, version 1: the only place where its literals stand.

| operator                | inputs                                                             |
|-------------------------|--------------------------------------------------------------------|
| pifa::PifaLinear        | x, pivot_weight, coefficients, output_index[, bias]                |
| pifa::PifaOrderedLinear | x, pivot_weight, coefficients[, bias]                              |
| pifa::PifaColumnLinear  | x, pivot_weight, coefficients[, bias]                              |

Row form (the first two), W [m, n] = rows W_p and C W_p, with y_p = x @ W_p.T and y_np = y_p @ C.T:
x [..., n], pivot_weight W_p [r, n], coefficients C [m - r, r], output_index int32 [m], bias [m];
y[..., j] = concat(y_p, y_np)[..., output_index[j]], or concat(y_p, y_np) itself when the pivots are the first rows.

Column form, W [m, n] = columns W_c and W_c D, the first inputs being the pivots: pivot_weight W_c [m, r],
coefficients D [r, n - r], bias [m]; z = x[..., :r] + x[..., r:] @ D.T and y = z @ W_c.T.

Everything but output_index has one dtype T: float32, float16 or bfloat16; 1 <= r <= min(m, n). There are three
operators and not one with an attribute, because TensorRT's parsers find the ONNX function that holds an operator's
body by its name alone, and a function cannot branch on an attribute: one name, one body.
"""

from __future__ import annotations

DOMAIN = "pifa"
OP_TYPE = "PifaLinear"
ORDERED_OP_TYPE = "PifaOrderedLinear"
COLUMN_OP_TYPE = "PifaColumnLinear"
OP_VERSION = 1
PLUGIN_NAMESPACE = "pifa"
PLUGIN_VERSION = "1"
QUANT_METHOD = "pifa"  # how config.json of a checkpoint says that it holds the layers of this operator

INPUTS = ("x", "pivot_weight", "coefficients", "output_index")
INDEX_INPUT = INPUTS[3]
OPTIONAL_INPUT = "bias"
OUTPUT = "y"

DTYPE_FLAGS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
INDEX_DTYPE = "int32"
FORMS = {OP_TYPE: "row", ORDERED_OP_TYPE: "row", COLUMN_OP_TYPE: "column"}

INT_ATTRIBUTES = ("rank", "out_features")
STRING_ATTRIBUTES = ("form", "plugin_namespace", "plugin_version")


def inputs_of(op_type: str, *, bias: bool) -> tuple[str, ...]:
    """Returns the names of an operator's inputs in order."""
    names = INPUTS if op_type == OP_TYPE else INPUTS[:3]
    return (*names, OPTIONAL_INPUT) if bias else names


def attributes(op_type: str, *, rank: int, out_features: int) -> dict[str, int | str]:
    """Returns the attributes that every node of an operator carries, in their fixed order."""
    return {
        "rank": rank,
        "out_features": out_features,
        "form": FORMS[op_type],
        "plugin_namespace": PLUGIN_NAMESPACE,
        "plugin_version": PLUGIN_VERSION,
    }


def check_attributes(op_type: str, found: dict[str, object], where: str) -> None:
    """Raises `ValueError`, naming `where` and the attribute, unless `found` meets the operator's contract."""
    version = str(found.get("plugin_version"))
    if version != PLUGIN_VERSION:
        raise ValueError(
            f"{where}: {DOMAIN}::{op_type} has plugin_version {version!r}, this program knows "
            f"{PLUGIN_VERSION!r}; export the model again or update pifa-deploy"
        )
    if found.get("form") != FORMS[op_type]:
        raise ValueError(
            f"{where}: form is {found.get('form')!r}, expected {FORMS[op_type]!r} of {op_type}; export the model again"
        )
    if found.get("plugin_namespace") != PLUGIN_NAMESPACE:
        raise ValueError(
            f"{where}: plugin_namespace is {found.get('plugin_namespace')!r}, expected {PLUGIN_NAMESPACE!r}; "
            "without it TensorRT ignores the plugin; export the model again"
        )
    for name in INT_ATTRIBUTES:
        if not isinstance(found.get(name), int):
            raise ValueError(f"{where}: attribute {name} is {found.get(name)!r}, expected an integer; export again")
