"""The contract of the operator `pifa::PifaLinear`, version 1: the only place where its literals stand.

    y = PifaLinear(x, pivot_weight, coefficients, output_index[, bias])

| input        | shape        | dtype                                                            |
|--------------|--------------|------------------------------------------------------------------|
| x            | [..., n]     | T: float32, float16 or bfloat16                                  |
| pivot_weight | [r, n]       | T                                                                |
| coefficients | [m - r, r]   | T                                                                |
| output_index | [m] or [0]   | int32; y[..., j] = concat(y_p, y_np)[..., output_index[j]]       |
| bias         | [m]          | T, optional                                                      |

with y_p = x @ pivot_weight.T and y_np = y_p @ coefficients.T, 1 <= r <= min(m, n). `output_index` of
length 0 says that the pivots are the first r rows, so that nothing has to move.
"""

from __future__ import annotations

DOMAIN = "pifa"
OP_TYPE = "PifaLinear"
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
FORMS = ("row",)

INT_ATTRIBUTES = ("rank", "out_features")
STRING_ATTRIBUTES = ("form", "plugin_namespace", "plugin_version")


def attributes(*, rank: int, out_features: int) -> dict[str, int | str]:
    """Returns the attributes that every PifaLinear node carries, in their fixed order."""
    return {
        "rank": rank,
        "out_features": out_features,
        "form": FORMS[0],
        "plugin_namespace": PLUGIN_NAMESPACE,
        "plugin_version": PLUGIN_VERSION,
    }


def check_attributes(found: dict[str, object], where: str) -> None:
    """Raises `ValueError`, naming `where` and the attribute, unless `found` meets the contract."""
    version = str(found.get("plugin_version"))
    if version != PLUGIN_VERSION:
        raise ValueError(
            f"{where}: {DOMAIN}::{OP_TYPE} has plugin_version {version!r}, this program knows "
            f"{PLUGIN_VERSION!r}; export the model again or update pifa-deploy"
        )
    if found.get("form") not in FORMS:
        raise ValueError(f"{where}: form is {found.get('form')!r}, expected one of {FORMS}; export the model again")
    if found.get("plugin_namespace") != PLUGIN_NAMESPACE:
        raise ValueError(
            f"{where}: plugin_namespace is {found.get('plugin_namespace')!r}, expected {PLUGIN_NAMESPACE!r}; "
            "without it TensorRT ignores the plugin; export the model again"
        )
    for name in INT_ATTRIBUTES:
        if not isinstance(found.get(name), int):
            raise ValueError(f"{where}: attribute {name} is {found.get(name)!r}, expected an integer; export again")
