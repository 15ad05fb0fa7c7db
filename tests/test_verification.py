"""Verification end to end: the export passes, and each seeded fault fails."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from decoder_fixtures import (
    SIZES,
    dense_decoder,
    edited,
    export,
    factorised_decoder,
    letters,
    save_decoder,
)

from pifa_deploy.errors import ExitCode, InputRefusedError, MissingCapabilityError
from pifa_deploy.linear import LowRankLinear, PifaLinear
from pifa_deploy.model_folder import load_model
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.parity import DEFAULT_GATES, Gates, judge
from pifa_deploy.verification import VerifyOptions, cases, low_rank_twin, verify_folder

SMALL = {"prefill_lengths": (1, 9, 30), "padded_lengths": (5, 16, 11), "decode_prompt": 12, "decode_steps": 12}
TOKENS = 60
FLAGS = ("fp32", "fp16")
LAYER = "model.layers.1"
# Every key and query head has a key of its own, so that the factors of q and k have the same shapes.
HEADS = {"num_key_value_heads": SIZES["num_attention_heads"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verification")


@pytest.fixture(scope="module")
def checkpoint(root: Path) -> Path:
    """A Qwen2 with biases on q, k, v, whose logits have the spread of a trained model's."""
    return save_decoder(factorised_decoder(dense_decoder("qwen2", **HEADS))[0], root / "checkpoint")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, root: Path) -> Callable[[str], Path]:
    def make(flag: str) -> Path:
        if not (root / flag).exists():
            export(checkpoint, root / flag, dtype=flag)
        return root / flag

    return make


@pytest.fixture
def options(tmp_path: Path) -> VerifyOptions:
    return options_with(tmp_path)


def options_with(folder: Path, *, seed: int = 0, count: int = TOKENS, **changes: Any) -> VerifyOptions:
    text = folder / f"text {seed}.txt"
    text.write_text(letters(count, seed))
    return VerifyOptions(text=(text,), **(SMALL | changes))


class TestCleanExport:
    @pytest.mark.parametrize("flag", FLAGS)
    @pytest.mark.parametrize("seed", range(5))
    def test_passes_on_any_text(self, seed: int, flag: str, exported: Any, checkpoint: Path, tmp_path: Path) -> None:
        report = verify_folder(exported(flag), checkpoint, options_with(tmp_path, seed=seed))
        assert report, report.verdict.failed()
        assert [gate.name for gate in report.verdict.gates] == ["finite", "mean_kl", "top1", "low_rank_ratio"]
        assert report.gates == DEFAULT_GATES[flag]

    def test_figures_are_the_same_every_time(self, exported: Any, checkpoint: Path, options: VerifyOptions) -> None:
        reports = [verify_folder(exported("fp16"), checkpoint, options) for _ in range(2)]
        assert reports[0].to_json() == reports[1].to_json()

    def test_report_is_json_and_can_be_judged_again(
        self, exported: Any, checkpoint: Path, options: VerifyOptions
    ) -> None:
        report = verify_folder(exported("fp16"), checkpoint, options)
        written = json.loads(json.dumps(report.to_json(), allow_nan=False))
        assert (written["passed"], written["dtype"]) == (True, "fp16")
        names = [case["name"] for case in written["cases"]]
        assert names[:5] == ["prefill 1", "prefill 9", "prefill 30", "padded batch 5+16+11", "prompt 12"]
        assert names[5:] == [f"decode at {past}" for past in range(12, 24)]
        positions = [case["positions"] for case in written["cases"]]
        assert positions == [1, 9, 30, 32, 12, *[1] * 12]
        assert written["overall"]["positions"] == sum(positions)
        assert written["gates"] == {"mean_kl": 2e-4, "top1": 0.993, "low_rank_ratio": 4.0}
        assert [gate["passed"] for gate in written["decisions"]] == [True] * 4
        assert not judge(report.overall, replace(report.gates, mean_kl=1e-12), low_rank=report.low_rank)

    def test_stricter_gates_make_the_report_false(
        self, exported: Any, checkpoint: Path, options: VerifyOptions
    ) -> None:
        report = verify_folder(exported("fp16"), checkpoint, replace(options, gates=Gates(mean_kl=1e-12, top1=None)))
        assert not report
        assert not report.to_json()["passed"]
        assert "mean_kl" in [gate.name for gate in report.verdict.failed()]

    def test_without_its_gate_the_low_rank_twin_is_not_run(
        self, exported: Any, checkpoint: Path, options: VerifyOptions
    ) -> None:
        gates = Gates(mean_kl=1e-3, top1=None, low_rank_ratio=None)
        report = verify_folder(exported("fp16"), checkpoint, replace(options, gates=gates))
        assert report
        assert report.low_rank is None
        assert [gate.name for gate in report.verdict.gates] == ["finite", "mean_kl"]

    def test_a_dense_model_is_verified_without_a_twin(self, tmp_path: Path) -> None:
        source = save_decoder(dense_decoder(), tmp_path / "dense")
        export(source, tmp_path / "onnx", dtype="fp16")
        report = verify_folder(tmp_path / "onnx", source, options_with(tmp_path))
        assert report
        assert report.low_rank is None


def values(model: ir.Model, name: str, change: Callable[[np.ndarray], Any]) -> None:
    """Changes the numbers of one initializer."""
    initializer = model.graph.initializers[name]
    array = initializer.const_value.numpy().copy()
    change(array)
    initializer.const_value = ir.tensor(array, name=name)


def swap_two_outputs(model: ir.Model) -> None:
    def change(index: np.ndarray) -> None:
        index[[3, 4]] = index[[4, 3]]

    values(model, f"{LAYER}.mlp.down_proj.output_index", change)


def zero_one_coefficient_row(model: ir.Model) -> None:
    values(model, f"{LAYER}.self_attn.o_proj.coefficients", lambda array: array[2].fill(0))


def lose_one_pivot_row(model: ir.Model) -> None:
    values(model, f"{LAYER}.mlp.up_proj.pivot_weight", lambda array: array[-1].fill(0))


def exchange_q_and_k(model: ir.Model) -> None:
    nodes = {node.name: node for node in model.graph}
    q, k = nodes[f"{LAYER}.self_attn.q_proj"], nodes[f"{LAYER}.self_attn.k_proj"]
    for i in range(1, 4):
        inputs = q.inputs[i], k.inputs[i]
        q.replace_input_with(i, inputs[1])
        k.replace_input_with(i, inputs[0])


def drop_a_bias(model: ir.Model) -> None:
    bias = model.graph.initializers[f"{LAYER}.self_attn.q_proj.bias"]
    (add,) = bias.consumers()
    product = next(value for value in add.inputs if value is not bias)
    ir.convenience.replace_all_uses_with(add.outputs[0], product)
    model.graph.remove(add, safe=True)


def constant(model: ir.Model, name: str, numbers: Any) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, dtype=np.int64), name=name))
    model.graph.register_initializer(value)
    return value


def past_length(model: ir.Model) -> tuple[list[ir.Node], ir.Value]:
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    shape = ir.node("Shape", [past], attributes={"start": 2, "end": 3})
    return [shape], shape.outputs[0]


def decode_one_position_late(model: ir.Model) -> None:
    """With a past, tokens get the position of the one before them."""
    positions = next(value for value in model.graph.inputs if value.name == "position_ids")
    readers = list(positions.uses())
    nodes, past = past_length(model)
    step = ir.node("Min", [past, constant(model, "fault_one", [1])])
    late = ir.node("Sub", [positions, step.outputs[0]])
    for node, i in readers:
        node.replace_input_with(i, late.outputs[0])
    model.graph.insert_before(model.graph[0], [*nodes, step, late])


def cache_is_one_position_stale(model: ir.Model) -> None:
    """The keys handed on hold at each position what belongs to the one before."""
    name = "present.1.key"
    fresh = next(value for value in model.graph.outputs if value.name == name)
    fresh.name = "fault_fresh"
    total = ir.node("Shape", [fresh], attributes={"start": 2, "end": 3})
    scalar = ir.node("Squeeze", [total.outputs[0]])
    start, one = constant(model, "fault_start", 0), constant(model, "fault_step", 1)
    positions = ir.node("Range", [start, scalar.outputs[0], one])
    before = ir.node("Sub", [positions.outputs[0], one])
    rows = ir.node("Max", [before.outputs[0], start])
    stale = ir.node("Gather", [fresh, rows.outputs[0]], attributes={"axis": 2})
    stale.outputs[0].name, stale.outputs[0].type, stale.outputs[0].shape = name, fresh.type, fresh.shape
    model.graph.extend([total, scalar, positions, before, rows, stale])
    model.graph.outputs[list(model.graph.outputs).index(fresh)] = stale.outputs[0]


def cache_lacks_the_newest_position(model: ir.Model) -> None:
    """The values handed on repeat the oldest position in place of the newest."""
    name = "present.0.value"
    fresh = next(value for value in model.graph.outputs if value.name == name)
    fresh.name = "fault_fresh"
    bounds = [constant(model, f"fault_{i}", [number]) for i, number in enumerate((0, -1, 2, 0, 1))]
    kept = ir.node("Slice", [fresh, bounds[0], bounds[1], bounds[2]])
    oldest = ir.node("Slice", [fresh, bounds[3], bounds[4], bounds[2]])
    stale = ir.node("Concat", [kept.outputs[0], oldest.outputs[0]], attributes={"axis": 2})
    stale.outputs[0].name, stale.outputs[0].type, stale.outputs[0].shape = name, fresh.type, fresh.shape
    model.graph.extend([kept, oldest, stale])
    model.graph.outputs[list(model.graph.outputs).index(fresh)] = stale.outputs[0]


FAULTS = [
    swap_two_outputs,
    zero_one_coefficient_row,
    lose_one_pivot_row,
    exchange_q_and_k,
    drop_a_bias,
    decode_one_position_late,
    cache_is_one_position_stale,
    cache_lacks_the_newest_position,
]


class TestSeededFaults:
    @pytest.mark.parametrize("flag", FLAGS)
    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
    def test_fails(
        self, fault: Any, flag: str, exported: Any, checkpoint: Path, options: VerifyOptions, tmp_path: Path
    ) -> None:
        broken = edited(exported(flag), tmp_path / "broken", fault)
        report = verify_folder(broken, checkpoint, options)
        assert not report
        failed = {gate.name: gate.value for gate in report.verdict.failed()}
        assert failed["mean_kl"] > 10 * DEFAULT_GATES[flag].mean_kl  # not by a hair
        assert failed["low_rank_ratio"] > 10 * DEFAULT_GATES[flag].low_rank_ratio

    @pytest.mark.parametrize("fault", [cache_is_one_position_stale, cache_lacks_the_newest_position])
    def test_of_the_cache_show_in_the_decode_steps_only(
        self, fault: Any, exported: Any, checkpoint: Path, options: VerifyOptions, tmp_path: Path
    ) -> None:
        report = verify_folder(edited(exported("fp32"), tmp_path / "broken", fault), checkpoint, options)
        limit = DEFAULT_GATES["fp32"].mean_kl
        for case in report.cases:
            assert (case.mean_kl > limit) == case.name.startswith("decode"), case.name

    @pytest.mark.parametrize("flag", FLAGS)
    def test_that_change_nothing_are_no_faults(
        self, flag: str, exported: Any, checkpoint: Path, options: VerifyOptions, tmp_path: Path
    ) -> None:
        same = edited(exported(flag), tmp_path / "same", lambda model: None)
        assert (
            verify_folder(same, checkpoint, options).to_json()
            == verify_folder(exported(flag), checkpoint, options).to_json()
        )

    def test_a_logit_that_is_not_finite_fails_every_gate(
        self, exported: Any, checkpoint: Path, options: VerifyOptions, tmp_path: Path
    ) -> None:
        def overflow(model: ir.Model) -> None:
            values(model, "lm_head.weight", lambda array: array[7].fill(6e4))

        report = verify_folder(edited(exported("fp16"), tmp_path / "broken", overflow), checkpoint, options)
        assert not report
        assert [gate.name for gate in report.verdict.failed()] == ["finite", "mean_kl", "top1", "low_rank_ratio"]
        assert json.loads(json.dumps(report.to_json(), allow_nan=False))["overall"]["mean_kl"] is None


class TestRefusals:
    def test_another_checkpoint_is_refused_by_its_hash(
        self, exported: Any, checkpoint: Path, options: VerifyOptions, tmp_path: Path
    ) -> None:
        shutil.copytree(checkpoint, tmp_path / "other")
        data = bytearray((tmp_path / "other" / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / "other" / "model.safetensors").write_bytes(data)
        message = (
            rf"{re.escape(str(exported('fp32') / 'pifa.json'))}: was exported from a checkpoint with hash [0-9a-f]"
        )
        with pytest.raises(InputRefusedError, match=message) as info:
            verify_folder(exported("fp32"), tmp_path / "other", options)
        assert info.value.exit_code == ExitCode.INPUT_REFUSED

    def test_a_copy_of_the_checkpoint_is_the_checkpoint(
        self, exported: Any, checkpoint: Path, options: VerifyOptions, tmp_path: Path
    ) -> None:
        shutil.copytree(checkpoint, tmp_path / "copy")
        assert verify_folder(exported("fp32"), tmp_path / "copy", options)

    def test_a_text_that_is_too_short_is_refused(self, exported: Any, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(InputRefusedError, match=r"text 0\.txt: 31 tokens, verification needs 32"):
            verify_folder(exported("fp32"), checkpoint, options_with(tmp_path, count=31))
        assert verify_folder(exported("fp32"), checkpoint, options_with(tmp_path, count=32))

    def test_without_onnx_runtime_nothing_is_decided(
        self, exported: Any, checkpoint: Path, options: VerifyOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(MissingCapabilityError, match="ONNX Runtime is not installed"):
            verify_folder(exported("fp32"), checkpoint, options)

    @pytest.mark.parametrize(
        "changes",
        [{"prefill_lengths": ()}, {"prefill_lengths": (0,)}, {"padded_lengths": (3, 0)}, {"decode_steps": -1}],
    )
    def test_lengths_below_one_are_an_error(self, changes: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="expected at least 1 and 0"):
            VerifyOptions(**(SMALL | changes))


class TestCases:
    def test_padding_stands_on_the_left_and_rows_follow_each_other_in_the_text(self) -> None:
        ids = np.arange(100, 160)
        steps = dict(cases(ids, VerifyOptions(**SMALL)))
        padded = steps["padded batch 5+16+11"]
        starts = (0, 5, 21)
        for row, (start, length) in enumerate(zip(starts, (5, 16, 11), strict=True)):
            assert padded.input_ids[row, 16 - length :].tolist() == ids[start : start + length].tolist()
            assert padded.attention_mask[row].tolist() == [0] * (16 - length) + [1] * length
            assert padded.position_ids[row, 16 - length :].tolist() == list(range(length))

    def test_decode_steps_continue_the_prompt(self) -> None:
        ids = np.arange(100, 160)
        steps = dict(cases(ids, VerifyOptions(**SMALL)))
        assert steps["prompt 12"].input_ids.tolist() == [ids[:12].tolist()]
        for past in range(12, 24):
            step = steps[f"decode at {past}"]
            assert step.input_ids.tolist() == [[ids[past]]]
            assert step.position_ids.tolist() == [[past]]
            assert step.attention_mask.tolist() == [[1] * (past + 1)]

    def test_parts_can_be_left_out(self) -> None:
        options = VerifyOptions(prefill_lengths=(4,), padded_lengths=(), decode_steps=0)
        assert [name for name, _ in cases(np.arange(9), options)] == ["prefill 4"]


class TestLowRankTwin:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
    def test_is_the_same_function(self, dtype: torch.dtype) -> None:
        model, exact = factorised_decoder(dense_decoder("qwen2"))
        twin = low_rank_twin(model, dtype)
        ids = torch.arange(3, 33).reshape(2, 15)
        with torch.no_grad():
            found, expected = twin(ids).logits.double(), exact(ids).logits.double()
        # The norms of transformers compute in float32 whatever the dtype of the model.
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        assert float((found - expected).norm() / expected.norm()) < 2 * 30 * 2 * eps

    def test_holds_the_matrices_and_no_pivots(self) -> None:
        model, exact = factorised_decoder(dense_decoder("qwen2"))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        twin = low_rank_twin(model, torch.float64)
        pifa = {name for name, module in model.named_modules() if isinstance(module, PifaLinear)}
        pairs = {name: module for name, module in twin.named_modules() if isinstance(module, LowRankLinear)}
        assert not [module for module in twin.modules() if isinstance(module, PifaLinear)]
        assert pairs.keys() == pifa
        for name, layer in pairs.items():
            assert layer.rank == model.get_submodule(name).rank
            product = layer.low_rank_u @ layer.low_rank_v
            torch.testing.assert_close(product, exact.get_submodule(name).weight, rtol=0, atol=1e-13)
            # Balanced: neither factor takes the larger share of the scale.
            u, v = layer.low_rank_u.detach(), layer.low_rank_v.detach()
            assert float(u.norm()) == pytest.approx(float(v.norm()))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])

    def test_shares_no_storage_with_the_model(self) -> None:
        model, _ = factorised_decoder(dense_decoder("qwen2"))
        twin = low_rank_twin(model, torch.float32)
        mine = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        assert not mine & {tensor.untyped_storage().data_ptr() for tensor in twin.state_dict().values()}

    def test_of_a_dense_model_is_none(self) -> None:
        assert low_rank_twin(dense_decoder(), torch.float16) is None


def test_the_checkpoint_loads_with_the_logit_spread_it_was_made_for(checkpoint: Path, exported: Any) -> None:
    """Flat logits would hide faults behind gates that are absolute."""
    model = load_model(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(3, 43)[None]).logits
    assert 2 < float(logits.std()) < 5
    assert open_folder(exported("fp32")).cache_layers == SIZES["num_hidden_layers"]
