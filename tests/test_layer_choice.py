"""The forms of one layer, how the fastest is chosen, and exports that obey the choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cli_fixtures import Outcome, save_dense
from torch import nn

from pifa_deploy import layer_choice, onnx_passes
from pifa_deploy.column_linear import PifaColumnLinear
from pifa_deploy.compression import CompressOptions, compress_model
from pifa_deploy.decoder_step import Step
from pifa_deploy.errors import InputMissingError, InputRefusedError, MisfitError, MissingCapabilityError
from pifa_deploy.factorization import factors_from_low_rank
from pifa_deploy.latency import ClockOptions
from pifa_deploy.layer_choice import ChoiceOptions, FormTimes, choose, decide
from pifa_deploy.layer_forms import DENSE, FORMS, LOW_RANK, STORED, as_form
from pifa_deploy.layer_graph import layer_model
from pifa_deploy.layer_plan import PLUGIN, LayerPlan, Plan, read_plan, write_plan
from pifa_deploy.layouts import layout_of, low_rank_pair
from pifa_deploy.linear import LowRankLinear, PifaLinear
from pifa_deploy.model_folder import load_model
from pifa_deploy.onnx_export import ExportOptions, export_checkpoint
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner
from pifa_deploy.plugin_library import LIBRARY_VARIABLE
from pifa_deploy.torch_runner import TorchRunner
from pifa_deploy.transformers_quantizer import factorised_modules

pytest_plugins = ("cli_plugin",)

M, N, R = 21, 13, 5
QUICK = ClockOptions(warm_up_ms=0, iterations=6, duration_s=0, rounds=3)
DECODE = ChoiceOptions(prompt=0, generated=1)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def layer(kind: str, *, bias: bool = False) -> Any:
    u, v, b = random(M, R), random(R, N), random(M).float() if bias else None
    if kind == "lowrank":
        return LowRankLinear.from_pair(u.float(), v.float(), b)
    if kind == "column":
        columns, rest = random(M, R).float(), random(R, N - R).float()
        return PifaColumnLinear.from_factors(columns, rest, b)
    if kind == "ordered":
        u[:R] = torch.eye(R)
    found = PifaLinear.from_factors(factors_from_low_rank(u, v, dtype=torch.float32), b)
    if kind == "ordered":
        found.pivot_rows = torch.arange(R, dtype=torch.int32)
        found.pivot_weight, found.coefficients = nn.Parameter(v.float()), nn.Parameter(u[R:].float())
        found.derive_output_index()
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["pivoted", "ordered", "column", "lowrank"])
def test_every_form_of_every_layer_is_the_same_function_in_onnx_runtime(kind: str, bias: bool) -> None:
    stored = layer(kind, bias=bias)
    assert layout_of(stored) == kind
    u, v = low_rank_pair(stored)
    x = random(7, N)
    exact = x @ (u @ v).T + (stored.bias.detach().double() if bias else 0)
    for form in FORMS:
        model = layer_model(as_form(stored, form))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"x": x.float().numpy()})[0]).double()
        assert (found - exact).norm() / exact.norm() < 2e-6, form


def test_the_low_rank_form_is_balanced_and_dense_is_dense() -> None:
    stored = layer("pivoted")
    low, dense = as_form(stored, LOW_RANK), as_form(stored, DENSE)
    assert torch.allclose(low.low_rank_u.norm(), low.low_rank_v.norm(), rtol=1e-4)
    assert isinstance(dense, nn.Linear)
    with pytest.raises(ValueError, match=r"form is 'sparse', expected one of"):
        as_form(stored, "sparse")


def times(median: float, spread: float = 0.01, error: float = 1e-6) -> FormTimes:
    noise = 1 + spread * np.random.default_rng(int(median * 1000)).standard_normal(15)
    return FormTimes(error=error, rounds_ms={1: list(median * noise)})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({STORED: times(1.0), LOW_RANK: times(1.3), DENSE: times(0.7)}, DENSE),
        ({STORED: times(1.0), LOW_RANK: times(1.3), DENSE: times(2.0)}, STORED),
        # Two per cent in thirty per cent of noise decide nothing.
        ({STORED: times(1.0, 0.3), LOW_RANK: times(0.98, 0.3), DENSE: times(2.0)}, STORED),
        # Faster, but five times as far from float64 as low-rank.
        ({STORED: times(1.0), LOW_RANK: times(1.3), DENSE: times(0.7, error=5e-6)}, STORED),
        # The stored form itself is not exact enough.
        ({STORED: times(1.0, error=1e-3), LOW_RANK: times(1.3), DENSE: times(2.0)}, LOW_RANK),
        ({STORED: times(1.0), LOW_RANK: times(1.3), DENSE: times(2.0), PLUGIN: times(0.5)}, PLUGIN),
    ],
)
def test_the_fastest_form_is_taken_if_it_is_exact_and_beyond_the_noise(
    found: dict[str, FormTimes], expected: str
) -> None:
    plan = decide("shape", found, DECODE)
    assert (plan.form, plan.fastest) == (expected, {"1": expected})


def test_the_workload_weighs_prefill_and_decode() -> None:
    stored = FormTimes(error=0.0, rounds_ms={1: [1.0, 1.0], 64: [30.0, 30.0]})
    dense = FormTimes(error=0.0, rounds_ms={1: [1.5, 1.5], 64: [20.0, 20.0]})
    found = {STORED: stored, LOW_RANK: replace(stored, rounds_ms={1: [9.0, 9.0], 64: [90.0, 90.0]}), DENSE: dense}
    for generated, expected in ((10, DENSE), (30, STORED)):
        plan = decide("shape", found, ChoiceOptions(prompt=64, generated=generated))
        assert plan.form == expected
        assert plan.fastest == {"1": STORED, "64": DENSE}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choice")
    options = CompressOptions(density=0.6, method="svd", layout="shared-mlp")
    compress_model(save_dense(folder / "dense"), folder / "pifa", options)
    return folder / "pifa"


@pytest.fixture(scope="module")
def plan(checkpoint: Path) -> Plan:
    return choose(checkpoint, ChoiceOptions(prompt=16, generated=4, tokens=(3,), clock=QUICK, threads=1))


def test_a_plan_has_every_layer_and_survives_its_file(plan: Plan, checkpoint: Path, tmp_path: Path) -> None:
    layers = factorised_modules(load_model(checkpoint, dtype=None))
    assert list(plan.layers) == list(layers)
    assert set(plan.measurements) == {one.shape for one in plan.layers.values()}
    for one in plan.measurements.values():
        assert set(one) == set(FORMS)
        assert all(set(form["us"]) == {"1", "3", "16"} and form["error"] < 1e-5 for form in one.values())
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan


def mixed(plan: Plan, forms: tuple[str, ...]) -> Plan:
    """Returns the plan with the forms dealt out in turn."""
    names = list(plan.layers)
    layers = {name: LayerPlan(form=forms[i % len(forms)], fastest={}, shape="") for i, name in enumerate(names)}
    return replace(plan, layers=layers)


@pytest.mark.parametrize("forms", [(STORED, DENSE, LOW_RANK), (STORED, PLUGIN)])
def test_an_export_obeys_the_plan_and_stays_the_same_model(
    plan: Plan, checkpoint: Path, tmp_path: Path, forms: tuple[str, ...]
) -> None:
    dealt = mixed(plan, forms)
    write_plan(tmp_path / "plan.json", dealt)
    options = ExportOptions(dtype="fp32", plan=tmp_path / "plan.json")
    summary = export_checkpoint(checkpoint, tmp_path / "onnx", options)
    folder = open_folder(tmp_path / "onnx")
    pifa = [node.name for node in folder.model.graph.node if node.domain == "pifa"]
    kept = PLUGIN if PLUGIN in forms else STORED
    assert pifa == [name for name, one in dealt.layers.items() if one.form == kept]
    assert list(summary.left_dense) == [name for name, one in dealt.layers.items() if one.form == DENSE]
    onnx.checker.check_model(str(folder.model_path))
    step = Step.after(0, np.arange(5, 17, dtype=np.int64))
    expected, _ = TorchRunner(load_model(checkpoint, dtype=torch.float32)).step(step, None)
    found, _ = OnnxRuntimeRunner(folder).step(step, None)
    assert np.abs(found - expected).max() < 1e-4


def test_only_named_nodes_become_plain_operators(checkpoint: Path, tmp_path: Path) -> None:
    import onnx_ir as ir

    export_checkpoint(checkpoint, tmp_path / "onnx", ExportOptions(dtype="fp32"))
    model = ir.load(tmp_path / "onnx/model.onnx")
    names = [node.name for node in onnx_passes.pifa_nodes(model)]
    onnx_passes.expand_to_plain_ops(model, names[1:])
    assert [node.name for node in onnx_passes.pifa_nodes(model)] == names[:1]
    assert [function.name for function in model.functions.values()] == [onnx_passes.pifa_nodes(model)[0].op_type]


@pytest.mark.parametrize(
    ("change", "error", "pattern"),
    [
        ({"schema": 2}, InputRefusedError, r"is 'plan' of schema 2, expected a plan of schema 1"),
        ({"artefact": "bench"}, InputRefusedError, r"is 'bench' of schema 1"),
        ({"layers": []}, InputRefusedError, r"lacks layers or source_sha256"),
        ({"layers": {"a": {"form": "sparse"}}}, InputRefusedError, r"layers: a has the form 'sparse', expected one of"),
        ({"source_sha256": "0" * 64}, MisfitError, r"was made for a checkpoint with hash 000000000000…, this one has"),
        ({"layers": {"a": {"form": "dense"}}}, MisfitError, r"is in the plan or the checkpoint, not in both"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    plan: Plan, checkpoint: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], pattern: str
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**plan.to_json(), **change}))
    with pytest.raises(error, match=pattern):
        export_checkpoint(checkpoint, tmp_path / "onnx", ExportOptions(dtype="fp32", plan=file))
    assert not (tmp_path / "onnx").exists()


def test_a_plugin_library_that_is_named_and_not_there_is_no_absent_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pifa_deploy.plugin_library.SOURCE", tmp_path)  # no build of the checkout
    monkeypatch.delenv(LIBRARY_VARIABLE, raising=False)
    assert not layer_choice._has_kernels()
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "libother.so"))
    with pytest.raises(InputMissingError, match=r"libother\.so \(from PIFA_PLUGIN_LIBRARY\): no such plugin library"):
        layer_choice._has_kernels()


def test_what_cannot_be_chosen_for_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefusedError, match=r"has no factorised layers"):
        choose(checkpoint.parent / "dense", ChoiceOptions(clock=QUICK))
    with pytest.raises(InputMissingError, match=r"hf:some/model: no such folder; a plan is bound to a checkpoint"):
        choose("hf:some/model", ChoiceOptions(clock=QUICK))
    with pytest.raises(MissingCapabilityError, match=r"no bf16 kernels on a CPU"):
        choose(checkpoint, ChoiceOptions(dtype="bf16"))
    with pytest.raises(ValueError, match=r"the workload is 0 \+ 0 tokens"):
        ChoiceOptions(prompt=0, generated=0)
    with pytest.raises(ValueError, match=r"there is a plan, expected one of them"):
        ExportOptions(format="auto", plan=tmp_path / "plan.json")
    if not torch.cuda.is_available():
        with pytest.raises(MissingCapabilityError, match=r"finds no CUDA device"):
            choose(checkpoint, ChoiceOptions(device="cuda"))


def test_the_command_exports_by_a_plan(
    plan: Plan, checkpoint: Path, tmp_path: Path, pifa_deploy: Callable[..., Outcome]
) -> None:
    write_plan(tmp_path / "plan.json", mixed(plan, (DENSE,)))
    done = pifa_deploy("export", checkpoint, tmp_path / "onnx", "--dtype", "fp32", "--plan", tmp_path / "plan.json")
    assert done.code == 0, done.err
    assert "0 of them PIFA" in done.out
