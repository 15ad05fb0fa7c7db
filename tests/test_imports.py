"""What importing costs, and which way imports may go."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import pifa_deploy

PACKAGE = Path(pifa_deploy.__file__).parent

# A module imports only what stands above it.
ORDER = [
    "errors",
    "deferred_signals",
    "op_spec",
    "json_shape",
    "output_folder",
    "density",
    "conditioning",
    "refit",
    "factorization",
    "linear",
    "column_linear",
    "checkpoint",
    "sparse_checkpoint",
    "digest",
    "transformers_quantizer",
    "transformers_hook",
    "tokenizer_files",
    "shared_pivots",
    "hidden_features",
    "layouts",
    "layer_forms",
    "layer_plan",
    "equal_rank",
    "model_folder",
    "relayout",
    "importers",
    "calibration",
    "compression",
    "evaluation",
    "datasheets",
    "targets",
    "gpu_limits",
    "roofline",
    "advice",
    "onnx_passes",
    "layer_graph",
    "onnx_folder",
    "linear_nodes",
    "decoder_graph",
    "genai_config",
    "onnx_export",
    "build_log",
    "child_process",
    "plugin_build",
    "plugin_library",
    "kernel_library",
    "cuda_kernels",
    "launch_groups",
    "decoder_step",
    "engine_schema",
    "engine_record",
    "engine_layers",
    "engine_profile",
    "proof",
    "engine_child",
    "engine",
    "timed_call",
    "engine_fit",
    "torch_runner",
    "onnx_runner",
    "onnx_profile",
    "tensorrt_runner",
    "runners",
    "polygraphy_runners",
    "graph_cut",
    "exported_files",
    "weight_parity",
    "source_parity",
    "operator_parity",
    "low_rank_twin",
    "logit_rows",
    "logit_difference",
    "logit_cases",
    "parity",
    "residual_stream",
    "bisection",
    "verification_report",
    "saved_verification",
    "verification",
    "sampling",
    "generation",
    "timing_statistics",
    "latency",
    "layer_choice",
    "contenders",
    "evaluation_report",
    "lm_eval_adapter",
    "task_samples",
    "task_run",
    "task_comparison",
    "doctor",
    "inspection",
    "jetson",
    "gpu_state",
    "energy",
    "environment",
    "timed_contenders",
    "layer_profile",
    "contender_bounds",
    "cpu_limits",
    "case_names",
    "peak_memory",
    "bench_report",
    "bench",
    "report_schema",
    "report_stages",
    "report_variants",
    "report_numbers",
    "report_tables",
    "report_quality",
    "svg_axes",
    "report_plots",
    "report_layers",
    "report_times",
    "report_html",
    "report_markdown",
    "report_junit",
    "report_regression",
    "report",
    "demo",
    "pipeline_file",
    "pipeline_step",
    "pipeline_report",
    "pipeline_steps",
    "pipeline_record",
    "pipeline",
    "cli",
]

OPTIONAL_LIBRARIES = [
    "onnxruntime",
    "polygraphy",
    "tensorrt",
    "tensorrt_rtx",
    "pynvml",
    "gguf",
    "accelerate",
    "lm_eval",
]

IMPORT_ALL = """
import importlib, json, pkgutil, sys, traceback

class WithoutOptionalLibraries:
    # Asks the real finders, but never for a hidden library: as if it were not installed.
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

HIDDEN = set(json.loads(sys.argv[1]))
sys.meta_path[:] = [WithoutOptionalLibraries(finder) for finder in sys.meta_path]
import pifa_deploy
outcome, failed_packages = {}, []
names = pkgutil.walk_packages(pifa_deploy.__path__, "pifa_deploy.", onerror=failed_packages.append)
for name in sorted(module.name for module in names):
    try:
        importlib.import_module(name)
        outcome[name] = ""
    except BaseException:
        outcome[name] = traceback.format_exc()
for name in HIDDEN & set(sys.modules):
    outcome[name] = "was imported although it is hidden"
print("OUTCOME" + json.dumps(outcome))
"""


def module_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def imports_without_optional_libraries() -> dict[str, str]:
    """Maps every module to its traceback, empty when it imported; one process for all."""
    out = python("-c", IMPORT_ALL, json.dumps(OPTIONAL_LIBRARIES))
    outcome: dict[str, str] = json.loads(out.partition("OUTCOME")[2])
    return outcome


@pytest.mark.parametrize("module", [dotted(path) for path in module_files()])
def test_module_imports_without_the_optional_libraries(
    imports_without_optional_libraries: dict[str, str], module: str
) -> None:
    outcome = imports_without_optional_libraries
    if module.rpartition(".")[2] == "__main__":
        pytest.skip("runs when imported")
    assert outcome[f"pifa_deploy.{module}"] == ""


def test_no_optional_library_slipped_through(imports_without_optional_libraries: dict[str, str]) -> None:
    assert not set(OPTIONAL_LIBRARIES) & set(imports_without_optional_libraries)


def test_importing_the_package_is_light_and_fast() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import pifa_deploy; took = time.perf_counter() - start; "
        "import json; print(json.dumps([took, sorted({name.partition('.')[0] for name in sys.modules})]))"
    )
    took, loaded = json.loads(python("-c", code))
    heavy = {"transformers", "onnx", "onnx_ir", "onnxscript", "scipy", "click", *OPTIONAL_LIBRARIES}
    assert not heavy & set(loaded)
    assert took < 3


@pytest.mark.parametrize("name", [name for name in pifa_deploy.__all__ if name != "__version__"])
def test_public_names_are_there_and_loaded_on_demand(name: str) -> None:
    assert getattr(pifa_deploy, name).__module__.startswith("pifa_deploy.")
    assert name in dir(pifa_deploy)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pifa_deploy' has no attribute 'pivot'"):
        pifa_deploy.pivot  # noqa: B018


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """Returns (line, module of this package) of all imports in a file, those in functions too."""
    package = ["pifa_deploy", *path.relative_to(PACKAGE).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            start = ".".join(part for part in (base, node.module) if part)
            names = [f"{start}.{alias.name}" for alias in node.names] if start == "pifa_deploy" else [start]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "pifa_deploy" and len(parts) > 1 and not parts[1].startswith("__"):
                found.append((node.lineno, parts[1]))
    return found


def test_imports_of_all_forms_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "cli").mkdir()
    file = tmp_path / "cli" / "main.py"
    file.write_text(
        "import os, pifa_deploy.errors\n"
        "from pifa_deploy import linear, __version__\n"
        "from pifa_deploy.engine import build\n"
        "from . import options\n"
        "from ..report import write\n"
        "def later():\n"
        "    from .. import parity\n"
        "    import pifa_deploy\n"
    )
    assert imported_modules(file) == [
        (1, "errors"),
        (2, "linear"),
        (3, "engine"),
        (4, "cli"),
        (5, "report"),
        (7, "parity"),
    ]


@pytest.mark.parametrize("path", module_files(), ids=dotted)
def test_module_imports_only_what_stands_above_it(path: Path) -> None:
    room = dotted(path).partition(".")[0]
    assert room in ORDER, f"{room} is not in ORDER of {__file__}; add it at its place, below all that it imports"
    for line, other in imported_modules(path):
        assert other in ORDER, f"{path}:{line} imports {other}, which is not in ORDER of {__file__}; add it"
        assert other == room or ORDER.index(other) < ORDER.index(room), (
            f"{path}:{line} imports {other}, which does not stand above {room}; pass what it needs in, or move the line"
        )


def test_order_names_each_module_once() -> None:
    assert len(set(ORDER)) == len(ORDER)
