"""`bench` and what engines contain: the gates on it, and how a 2:4 engine without sparse kernels is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from cli_fixtures import Outcome
from test_proof import MODULES, OLD, engine, log_line

from pifa_deploy import bench
from pifa_deploy.bench_report import BenchGates, BenchReport
from pifa_deploy.engine_layers import NOT_PICKED
from pifa_deploy.environment import this_environment
from pifa_deploy.errors import ExitCode
from pifa_deploy.proof import ProofGates, judge_proofs, prove
from pifa_deploy.report import ReportOptions, make_report
from pifa_deploy.report_stages import Source
from pifa_deploy.report_variants import variants_of
from pifa_deploy.timed_contenders import RunOptions, TimedContender, open_timed

pytest_plugins = ("cli_plugin",)

QUICK = ("--warm-up", "0", "--iterations", "2", "--duration", "0", "--rounds", "2", "--device", "cpu", "--prefill", "4")


@pytest.fixture
def engines(tmp_path: Path) -> dict[str, Path]:
    """An engine of half precision with one PIFA module in a plugin, and a 2:4 one in float, no kernel picked."""
    half = (("up", "custom_layer", "Half", MODULES[:1]), ("down", "gemm", "Half", MODULES[1:]))
    for name in ("half", "wide"):
        (tmp_path / name).mkdir()
    engine(tmp_path / "half", layers=half)
    engine(tmp_path / "wide", log_line("a", "gemm", "Float"), OLD, sparse_weights=True)
    return {name: tmp_path / name for name in ("half", "wide")}


@pytest.fixture
def as_engines(monkeypatch: pytest.MonkeyPatch, onnx_folder: Path, engines: dict[str, Path]) -> None:
    """Engine folders answer with the ONNX model: what they contain is read from them, running them needs a GPU."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'pifa-deploy[cpu]'")

    def opened(name: str, place: str, options: RunOptions) -> TimedContender:
        if Path(place) not in engines.values():
            return open_timed(name, place, options)
        kind = "2:4" if Path(place) == engines["wide"] else "pifa"
        return replace(open_timed(name, str(onnx_folder), options), path=place, runtime="tensorrt-rtx", kind=kind)

    monkeypatch.setattr(bench, "open_timed", opened)


def report(gates: ProofGates, **folders: Path) -> BenchReport:
    proofs = {name: prove(folder) for name, folder in folders.items()}
    known: dict[str, Any] = {"options": {}, "contenders": (), "memory": {}, "baseline": "", "fixed": None, "cases": ()}
    return BenchReport(environment=this_environment(), gates=BenchGates(proof=gates), proofs=proofs, **known)


@pytest.fixture
def dense_engine(tmp_path: Path) -> Path:
    """An engine without PIFA modules, built without leave to use sparse kernels."""
    (tmp_path / "dense_engine").mkdir()
    return engine(tmp_path / "dense_engine", log_line("a", "gemm"), network={"modules": []})


def test_each_engine_is_decided_as_the_report_decides_it(engines: dict[str, Path], dense_engine: Path) -> None:
    gates = ProofGates(precision="fp16", plugin=True, sparse=True)
    folders = {**engines, "dense": dense_engine}
    sources = tuple(Source(kind="engine", label=name, path=folder) for name, folder in folders.items())
    told = make_report(ReportOptions(sources=sources, gates=gates))["gates"]
    benched = [asdict(one) for one in report(gates, **folders).decisions]
    assert [(f"{gate['label']}: {gate['name']}", gate["passed"], gate["value"]) for gate in told] == [
        (one["name"], one["passed"], one["value"]) for one in benched
    ]
    asked = [("half", "plugin"), ("wide", "plugin"), ("wide", "sparse")]
    asked += [(name, "precision") for name in ("half", "wide", "dense")]
    assert sorted((gate["label"], gate["name"]) for gate in told) == sorted(asked)


def test_plugin_and_sparse_kernels_are_asked_of_the_engines_that_can_have_them(
    engines: dict[str, Path], dense_engine: Path
) -> None:
    dense = prove(dense_engine)
    proofs = {name: prove(folder) for name, folder in engines.items()} | {"dense": dense}
    judged = judge_proofs(proofs, ProofGates(plugin=True, sparse=True))
    found = {name: [one.name for one in decisions] for name, decisions in judged.items()}
    assert found == {"half": ["plugin"], "wide": ["plugin", "sparse"], "dense": []}
    plugin, sparse = judge_proofs({"dense": dense}, ProofGates(plugin=True, sparse=True))["dense"]
    assert (plugin.passed, plugin.reason) == (None, "the model has no PIFA module")
    assert (sparse.passed, sparse.name) == (False, "sparse")


@pytest.mark.parametrize(
    ("gates", "folders", "passed"),
    [
        ({"precision": "fp16"}, ("half",), True),
        ({"precision": "fp16"}, ("half", "wide"), False),
        ({"plugin": True}, ("half",), False),
        ({"sparse": True}, ("wide",), None),
        ({"sparse": True, "precision": "fp16"}, ("wide",), False),
        ({}, ("half", "wide"), None),
    ],
)
def test_a_failure_outweighs_what_is_not_decided(
    engines: dict[str, Path], gates: dict[str, Any], folders: tuple[str, ...], passed: bool | None
) -> None:
    found = report(ProofGates(**gates), **{name: engines[name] for name in folders})
    assert found.passed is passed
    assert bool(found) is (passed is True)


@pytest.mark.usefixtures("as_engines")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ("--require-precision", "fp16"),
            ExitCode.GATE_FAILED,
            "FAILED: wide: precision 1 Float, limit fp16 (wider: a)",
        ),
        (("--require-precision", "fp32"), ExitCode.PASSED, "passed: half: precision 2 Half, limit fp32"),
        (("--require-plugin",), ExitCode.GATE_FAILED, "FAILED: half: plugin 1 of 2 modules, limit every PIFA module"),
        (("--require-sparse",), ExitCode.NOT_DECIDED, "not decided: wide: sparse not stated, limit at least 1 layer"),
    ],
)
def test_the_command_ends_as_its_gates_do(
    pifa_deploy: Callable[..., Outcome], engines: dict[str, Path], arguments: tuple[str, ...], code: int, words: str
) -> None:
    found = pifa_deploy("bench", *engines.values(), *QUICK, *arguments)
    assert found.code == code, found.err
    assert words in found.out


@pytest.mark.usefixtures("as_engines")
def test_a_2_4_engine_without_a_sparse_kernel_is_called_so(
    pifa_deploy: Callable[..., Outcome], engines: dict[str, Path], tmp_path: Path
) -> None:
    found = pifa_deploy("bench", *engines.values(), *QUICK, "--json", tmp_path / "bench.json")
    assert found.code == ExitCode.PASSED, found.err
    assert f"{NOT_PICKED}, tensorrt-rtx" in found.out
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [one["proof"]["sparse_label"] for one in content["contenders"]] == [None, NOT_PICKED]
    stages: dict[str, Any] = {"bench": [{"label": "b", "content": content}], "evaluate": [], "engine": []}
    assert [variant.kind for variant in variants_of(stages)] == ["pifa", NOT_PICKED]


def test_gates_on_engines_need_one(pifa_deploy: Callable[..., Outcome], dense: Path) -> None:
    message = "--require-precision, --require-plugin and --require-sparse ask about engines; name one"
    pifa_deploy("bench", dense, *QUICK, "--require-plugin").failed(ExitCode.USAGE, message)
