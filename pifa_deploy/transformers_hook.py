"""Teaches transformers to load and save PIFA checkpoints.

`install()` costs nothing where transformers is not used: it waits for `transformers.modeling_utils` to
be imported, and then imports `pifa_deploy.transformers_quantizer`, which registers itself.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_TRIGGER = "transformers.modeling_utils"
_QUANTIZER = "pifa_deploy.transformers_quantizer"


def install() -> None:
    """Registers with transformers now if it is loaded, else as soon as it loads."""
    if _TRIGGER in sys.modules:
        importlib.import_module(_QUANTIZER)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the other finders find the trigger module and adds the registration to its loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TRIGGER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                importlib.import_module(_QUANTIZER)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
