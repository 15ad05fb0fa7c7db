"""From a low-rank-compressed language model in PyTorch to a fast, checked engine on an edge GPU.

Importing this package makes `transformers.AutoModelForCausalLM.from_pretrained` understand PIFA checkpoints.
The names below are loaded when first used, so that `import pifa_deploy` itself costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

from pifa_deploy import transformers_hook

__version__ = "0.1.0"

_HOME = {
    "PivotFactors": "factorization",
    "factors_from_weight": "factorization",
    "factors_from_low_rank": "factorization",
    "rank_for_density": "density",
    "density_for_rank": "density",
    "PifaLinear": "linear",
    "validate": "checkpoint",
}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__


transformers_hook.install()
