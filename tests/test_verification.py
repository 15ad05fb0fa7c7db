"""Verification end to end: levels, the report and its file; tests/test_seeded_faults.py has what must fail."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import asdict, replace
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
    letters,
    plain_step,
    save_decoder,
)

from pifa_deploy.errors import ExitCode, InputRefusedError, MissingCapabilityError, PifaDeployError
from pifa_deploy.logit_cases import CaseOptions, cases
from pifa_deploy.low_rank_twin import low_rank_twin
from pifa_deploy.model_folder import load_model
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner
from pifa_deploy.parity import DEFAULT_GATES, Gates
from pifa_deploy.saved_verification import judge_saved
from pifa_deploy.verification import VerifyOptions, verify_folder

SMALL = {
    "prefill_lengths": (1, 9, 30),
    "padded_lengths": (5, 16, 11),
    "decode_prompt": 12,
    "decode_steps": 12,
    "positions": 0,
}
TOKENS = 123
FLAGS = ("fp32", "fp16")
LAYER = "model.layers.1"
LOGIT_GATES = [
    *("finite", "mean_kl", "mean_kl_worst_kind", "top1", "p999_kl", "delta_nll"),
    *("low_rank_ratio", "low_rank_ratio_delta_nll"),
]
GATE_NAMES = ["weights.stored", "weights.placed", "weights.files", "operators.rho", *LOGIT_GATES]

pytest_plugins = ("cli_plugin", "parity_fixtures")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verification")


@pytest.fixture(scope="module")
def checkpoint(parity_checkpoint: Path) -> Path:
    return parity_checkpoint


@pytest.fixture(scope="module")
def exported(parity_export: Any) -> Any:
    return parity_export


@pytest.fixture
def options(tmp_path: Path) -> VerifyOptions:
    return options_with(tmp_path)


def options_with(folder: Path, *, seed: int = 1, count: int = TOKENS, **changes: Any) -> VerifyOptions:
    text = folder / f"text {seed}.txt"
    text.write_text(letters(count, seed))
    return VerifyOptions(text=(text,), **(SMALL | changes))


class TestCleanExport:
    def test_figures_are_the_same_every_time(self, exported: Any, checkpoint: Path, options: VerifyOptions) -> None:
        reports = [verify_folder(exported("fp16"), checkpoint, options) for _ in range(2)]
        assert reports[0].to_json() == reports[1].to_json()

    def test_an_edit_that_changes_nothing_changes_no_figure(
        self, exported: Any, checkpoint: Path, options: VerifyOptions, tmp_path: Path
    ) -> None:
        same = edited(exported("fp32"), tmp_path / "same", lambda model: None)
        found, expected = (verify_folder(folder, checkpoint, options) for folder in (same, exported("fp32")))
        assert found.to_json() == expected.to_json()

    def test_report_is_json_of_every_level(self, exported: Any, checkpoint: Path, options: VerifyOptions) -> None:
        report = verify_folder(exported("fp16"), checkpoint, options)
        written = json.loads(json.dumps(report.to_json(), allow_nan=False))
        assert [written[key] for key in ("artefact", "schema", "passed", "dtype")] == ["verify", 2, True, "fp16"]
        names = [case["name"] for case in written["cases"]]
        padded = "padded batch 5+16+11"
        behind = [f"{padded}, 7 at 16", f"{padded}, 1 at 23", f"{padded}, 1 at 24"]
        assert names[:8] == ["prefill 1", "prefill 9", "prefill 30", padded, *behind, "prompt 12"]
        assert names[8:] == [f"decode at {past}" for past in range(12, 24)]
        positions = [case["positions"] for case in written["cases"]]
        assert positions == [1, 9, 30, 32, 21, 3, 3, 12, *[1] * 12]
        kinds = {kind["name"]: kind["positions"] for kind in written["kinds"]}
        assert kinds == {"prefill": 52, "padded": 32, "padded, cached": 27, "decode": 12}
        assert written["farthest_position"] == 29
        assert written["overall"]["positions"] == sum(positions)
        assert written["overall"]["labelled"] == sum(positions) - 1  # the text ends there
        assert written["gates"] == asdict(DEFAULT_GATES["fp16"])
        assert [(gate["name"], gate["passed"]) for gate in written["decisions"]] == [
            (name, True) for name in GATE_NAMES
        ]
        assert written["levels"]["logits"] == {key: written[key] for key in ("overall", "low_rank")}
        assert written["levels"]["weights"]["source"] is None
        modules = written["levels"]["operators"]["modules"]
        assert [module["module"] for module in modules[:2]] == [f"model.layers.0.self_attn.{x}_proj" for x in "qk"]
        assert all(module["positions"] == TOKENS for module in modules)
        assert written["bisection"] is None

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
        gates = Gates(mean_kl=1e-3, top1=None, low_rank_ratio=None, rho=None)
        report = verify_folder(exported("fp16"), checkpoint, replace(options, gates=gates))
        assert report
        assert report.logits.low_rank is None
        names = [gate.name for gate in report.verdict.gates]
        assert names == ["weights.stored", "weights.placed", "weights.files", "finite", "mean_kl", "mean_kl_worst_kind"]

    def test_a_dense_model_is_verified_without_a_twin(self, root: Path, tmp_path: Path) -> None:
        source = save_decoder(dense_decoder(), root / "dense")
        export(source, root / "dense-onnx", dtype="fp16")
        report = verify_folder(root / "dense-onnx", source, options_with(tmp_path, count=128, bisect=True))
        with low_rank_twin(load_model(source, dtype=torch.float32), open_folder(root / "dense-onnx")) as twin:
            assert twin is None
        assert report, report.verdict.failed()
        assert report.logits.low_rank is None
        assert report.measured.operators == ()
        assert report.measured.bisection is not None
        assert report.measured.bisection.first_bad() is None


class TestLevels:
    def test_each_can_be_had_alone(self, exported: Any, checkpoint: Path, options: VerifyOptions) -> None:
        for level, names in {
            "weights": ["weights.stored", "weights.placed", "weights.files"],
            "operators": ["operators.rho"],
            "logits": LOGIT_GATES,
        }.items():
            report = verify_folder(exported("fp16"), checkpoint, replace(options, levels=(level,)))
            assert report
            assert [gate.name for gate in report.verdict.gates] == names
            written = report.to_json()["levels"]
            assert [name for name, figures in written.items() if figures is not None] == [level]

    def test_weights_need_no_runtime(
        self, exported: Any, checkpoint: Path, options: VerifyOptions, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert verify_folder(exported("fp16"), checkpoint, replace(options, levels=("weights",)))
        with pytest.raises(MissingCapabilityError, match="ONNX Runtime is not installed"):
            verify_folder(exported("fp16"), checkpoint, replace(options, levels=("operators",)))

    def test_figures_of_logits_that_were_not_measured_are_an_error(
        self, exported: Any, checkpoint: Path, options: VerifyOptions
    ) -> None:
        report = verify_folder(exported("fp16"), checkpoint, replace(options, levels=("weights",)))
        with pytest.raises(ValueError, match="the level logits was not measured; verify with it"):
            _ = report.logits

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"levels": ()}, r"levels are \(\), expected some of weights, operators, logits"),
            ({"levels": ("weight",)}, "expected some of weights, operators, logits"),
            ({"operator_positions": 0}, "operator_positions is 0, expected at least 1"),
            ({"levels": ("logits",), "source": "x"}, "a source was given without the level weights"),
            ({"positions": -1}, "positions is -1, expected at least 0"),
        ],
    )
    def test_options_that_make_no_sense_are_an_error(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            VerifyOptions(**(SMALL | changes))


def test_on_the_command_line_a_clean_export_has_no_bad_layer(
    exported: Any, checkpoint: Path, pifa_deploy: Any, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(letters(700))
    common = ("--reference", checkpoint, "--text", tmp_path / "text.txt", "--positions", 0, "--decode-steps", 2)
    outcome = pifa_deploy("verify", exported("fp32"), *common, "--source", checkpoint, "--bisect")
    assert outcome.code == ExitCode.PASSED, outcome.err
    for line in (
        "every layer replays well",
        "56 tensors compared",
        "14 run alone",
        "source: factorised",
        "95 % interval",
    ):
        assert line in outcome.out
    outcome = pifa_deploy("verify", exported("fp32"), *common, "--level", "operators", "--gate-rho", 0.001)
    assert outcome.code == ExitCode.GATE_FAILED
    assert "FAILED operators.rho" in outcome.err


@pytest.mark.parametrize(("rho", "limit"), [(0.0, 0.0), (None, 2.0), (3.0, 3.0)])
def test_a_bisection_has_the_gate_on_rho_as_its_limit(
    exported: Any, checkpoint: Path, tmp_path: Path, rho: float | None, limit: float
) -> None:
    gates = replace(DEFAULT_GATES["fp32"], rho=rho)
    options = options_with(tmp_path, count=128, bisect=True, levels=("weights",), gates=gates)
    found = verify_folder(exported("fp32"), checkpoint, options).measured.bisection
    assert found is not None
    assert found.rho_limit == limit
    # Rounded sums are within their bound and never exact in every layer.
    assert (found.first_bad_operator() is None) == (limit > 0)


def test_a_saved_bisection_is_judged_by_the_gate_that_is_asked_for(
    exported: Any, checkpoint: Path, tmp_path: Path
) -> None:
    options = options_with(tmp_path, count=128, bisect=True, levels=("weights",))
    saved = tmp_path / "run.json"
    saved.write_text(json.dumps(verify_folder(exported("fp32"), checkpoint, options).to_json()))
    for rho, passed in ((2.0, True), (0.0, False)):
        found = {gate.name: gate for gate in judge_saved(saved, {"rho": rho}).verdict.gates}
        assert (found["bisection.rho"].limit, found["bisection.rho"].passed) == (rho, passed)
        assert found["bisection.parts"].passed


class TestPlainOps:
    def test_are_verified_layer_by_layer_too(self, exported: Any, checkpoint: Path, tmp_path: Path) -> None:
        report = verify_folder(exported("plain"), checkpoint, options_with(tmp_path, count=128, bisect=True))
        assert report, report.verdict.failed()
        assert report.measured.operators is not None
        assert len(report.measured.operators) == 14
        assert max(each.rho for each in report.measured.operators) < 1.5
        assert report.measured.bisection is not None
        assert len(report.measured.bisection.parts) == 6


def test_a_logit_that_is_not_finite_fails_every_gate_of_its_level(
    exported: Any, checkpoint: Path, options: VerifyOptions, tmp_path: Path
) -> None:
    def overflow(model: ir.Model) -> None:
        head = model.graph.initializers["lm_head.weight"]
        array = head.const_value.numpy().copy()
        array[7] = 6e4
        head.const_value = ir.tensor(array, name=head.name)

    report = verify_folder(edited(exported("fp16"), tmp_path / "broken", overflow), checkpoint, options)
    assert not report
    failed = [gate.name for gate in report.verdict.failed()]
    assert failed == ["weights.stored", *(name for name in LOGIT_GATES if name != "low_rank_ratio_delta_nll")]
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["overall"]["mean_kl"] is None


@pytest.fixture(scope="module")
def saved(exported: Any, checkpoint: Path, root: Path) -> Path:
    report = verify_folder(
        exported("fp16"),
        checkpoint,
        options_with(root, seed=7, count=1200, positions=700, window=250, source=checkpoint),
    )
    path = root / "run.json"
    path.write_text(json.dumps(report.to_json(), allow_nan=False))
    return path


class TestJudgingAgain:
    def test_the_file_says_what_the_run_said(self, saved: Path) -> None:
        assert json.loads(json.dumps(judge_saved(saved, {}).to_json())) == json.loads(saved.read_text())

    @pytest.mark.parametrize(
        ("gate", "limit", "name"),
        [
            ("mean_kl", 1e-12, "mean_kl"),
            ("p999_kl", 1e-12, "p999_kl"),
            ("delta_nll", 1e-12, "delta_nll"),
            ("rho", 0.01, "operators.rho"),
            ("low_rank_ratio", 0.01, "low_rank_ratio"),
        ],
    )
    def test_other_limits_decide_anew(self, saved: Path, gate: str, limit: float, name: str) -> None:
        assert judge_saved(saved, {gate: 100.0 if gate != "top1" else 0.0})
        report = judge_saved(saved, {gate: limit})
        assert report.verdict.passed is False
        assert name in [each.name for each in report.verdict.failed()]

    def test_a_gate_on_what_was_not_measured_is_not_decided(self, saved: Path, tmp_path: Path) -> None:
        value = json.loads(saved.read_text())
        value["levels"]["operators"] = None
        (tmp_path / "run.json").write_text(json.dumps(value))
        assert judge_saved(tmp_path / "run.json", {})
        report = judge_saved(tmp_path / "run.json", {"rho": 2.0})
        assert report.verdict.passed is None
        assert report.to_json()["passed"] is None
        assert judge_saved(tmp_path / "run.json", {"rho": 2.0, "mean_kl": 1e-12}).verdict.passed is False

    def test_on_the_command_line(self, saved: Path, pifa_deploy: Any, tmp_path: Path) -> None:
        assert pifa_deploy("verify", "--judge", saved).code == ExitCode.PASSED
        outcome = pifa_deploy("verify", "--judge", saved, "--gate-rho", 0.01, "--json", tmp_path / "again.json")
        assert outcome.code == ExitCode.GATE_FAILED
        assert json.loads((tmp_path / "again.json").read_text())["gates"]["rho"] == 0.01
        assert pifa_deploy("verify", "--judge", saved, "--gate-relative-error", 1).code == ExitCode.NOT_DECIDED
        assert pifa_deploy("verify", "--judge", saved, "--reference", "x").code == ExitCode.USAGE
        assert pifa_deploy("verify").code == ExitCode.USAGE

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda value: value.update(schema=1), r"is artefact 'verify' schema 1, this program judges 'verify'"),
            (lambda value: value.update(artefact="bench"), r"is artefact 'bench' schema 2"),
            (lambda value: value.pop("levels"), "not what .* writes .KeyError: 'levels'"),
            (lambda value: value["levels"].update(operators=3), "not what .* writes .TypeError"),
            (lambda value: value["levels"]["operators"]["modules"][0].update(rho="much"), "not what .* writes"),
            (lambda value: value["levels"]["weights"].update(differing="none"), "found str, expected a list"),
            (lambda value: value["overall"].pop("top1"), "not what .* writes .TypeError"),
            (lambda value: value["gates"].update(mean_kl="small"), "gate mean_kl is 'small', expected a number"),
        ],
    )
    def test_a_file_that_is_another_is_refused(
        self, change: Any, message: str, saved: Path, tmp_path: Path, pifa_deploy: Any
    ) -> None:
        value = json.loads(saved.read_text())
        change(value)
        path = tmp_path / "run.json"
        path.write_text(json.dumps(value))
        with pytest.raises(InputRefusedError, match=message):
            judge_saved(path, {})
        outcome = pifa_deploy("verify", "--judge", path)
        assert outcome.code == ExitCode.INPUT_REFUSED
        assert len(outcome.errors) == 1

    def test_what_is_no_json_or_not_there_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text("{")
        with pytest.raises(InputRefusedError, match=r"run\.json"):
            judge_saved(tmp_path / "run.json", {})
        with pytest.raises(PifaDeployError, match=r"absent\.json"):
            judge_saved(tmp_path / "absent.json", {})


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
        with pytest.raises(InputRefusedError, match=r"text 1\.txt: 122 tokens, verification needs 123"):
            verify_folder(exported("fp32"), checkpoint, options_with(tmp_path, count=TOKENS - 1))
        assert verify_folder(exported("fp32"), checkpoint, options_with(tmp_path, count=TOKENS))

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
        ids = np.arange(100, 300)
        found = {case.name: case for case in cases(ids, CaseOptions(**SMALL))}
        starts, behind = (140, 154, 179), (7, 1, 1)  # behind the prefills; each row goes on by nine tokens
        for row, (start, length) in enumerate(zip(starts, (5, 16, 11), strict=True)):
            case, past = found["padded batch 5+16+11"], 16
            assert case.step.input_ids[row, 16 - length :].tolist() == list(range(start, start + length))
            assert case.step.attention_mask[row].tolist() == [0] * (16 - length) + [1] * length
            assert case.step.position_ids[row, 16 - length :].tolist() == list(range(length))
            assert case.labels[row].tolist() == [-1] * (16 - length) + list(range(start + 1, start + length + 1))
            for tokens in behind:
                case, first = found[f"padded batch 5+16+11, {tokens} at {past}"], length + past - 16
                assert case.step.input_ids[row].tolist() == list(range(start + first, start + first + tokens))
                assert case.step.position_ids[row].tolist() == list(range(first, first + tokens))
                assert case.step.attention_mask[row].tolist() == [0] * (16 - length) + [1] * (first + tokens)
                assert case.labels[row].tolist() == list(range(start + first + 1, start + first + tokens + 1))
                past += tokens
        labels = found["padded batch 5+16+11"].visible_labels().tolist()
        assert labels == [*range(141, 146), *range(155, 171), *range(180, 191)]

    def test_decode_steps_continue_the_prompt(self) -> None:
        ids = np.arange(100, 300)
        found = {case.name: case for case in cases(ids, CaseOptions(**SMALL))}
        first = 100 + 40 + 32 + 27
        assert found["prompt 12"].step.input_ids.tolist() == [list(range(first, first + 12))]
        for past in range(12, 24):
            step = found[f"decode at {past}"].step
            assert step.input_ids.tolist() == [[first + past]]
            assert step.position_ids.tolist() == [[past]]
            assert step.attention_mask.tolist() == [[1] * (past + 1)]
            assert found[f"decode at {past}"].labels.tolist() == [[first + past + 1]]

    def test_parts_can_be_left_out(self) -> None:
        options = CaseOptions(prefill_lengths=(4,), padded_lengths=(), decode_steps=0, positions=0)
        found = list(cases(np.arange(4), options))
        assert [case.name for case in found] == ["prefill 4"]
        assert found[0].labels.tolist() == [[1, 2, 3, -1]]  # the text ends there

    @pytest.mark.parametrize(
        ("positions", "steps"),
        [(0, []), (114, []), (115, [(7,)]), (122, [(4, 1, 1, 1, 7)]), (136, [(7, 4, 1, 1, 1, 7), (7,)])],
    )
    def test_long_sequences_make_up_the_positions_and_the_first_decodes_behind_a_long_cache(
        self, positions: int, steps: list[tuple[int, ...]]
    ) -> None:
        changes = {"positions": positions, "window": 7, "context": 21, "decode_steps": 3}
        assert CaseOptions(**(SMALL | changes)).sequences() == steps

    def test_every_token_is_read_once_and_long_sequences_fill_their_cache(self) -> None:
        options = CaseOptions(**(SMALL | {"positions": 300, "window": 7, "context": 30}))
        ids = np.arange(options.tokens_needed())
        found = list(cases(ids, options))
        read = np.concatenate(
            [case.step.input_ids[case.step.attention_mask[:, case.step.past :] == 1] for case in found]
        )
        assert sorted(read.tolist()) == ids.tolist()
        assert len(read) == sum(len(case.visible_labels()) for case in found) >= 300
        long = [case.step for case in found if case.name.startswith("tokens")]
        expected = 0
        for step in long:
            assert step.past in (0, expected)
            assert step.position_ids.tolist() == [list(range(step.past, step.past + step.input_ids.shape[1]))]
            expected = step.past + step.input_ids.shape[1]
            assert expected <= 28
        assert {case.kind for case in found} == {"prefill", "padded", "padded, cached", "decode", "chunk"}

    def test_the_default_compares_8192_positions_and_as_far_as_2048(self) -> None:
        options = CaseOptions()
        ids = np.zeros(options.tokens_needed(), np.int64)
        found = list(cases(ids, options))
        assert 8192 <= sum(len(case.visible_labels()) for case in found) < 8192 + 512
        assert max(int(case.step.position_ids.max()) for case in found) == 2047
        assert sum(case.kind == "decode" for case in found) == 64
        assert options.tokens_needed() <= 8192 + 512


class TestLowRankTwin:
    @pytest.mark.parametrize("flag", ["fp32", "plain"])
    def test_is_the_same_function_without_pivots(
        self, flag: str, exported: Any, parity_decoder: tuple[Any, Any]
    ) -> None:
        model, exact = parity_decoder
        ids = np.random.default_rng(0).integers(3, 60, (2, 15))
        with torch.no_grad():
            expected = exact(torch.from_numpy(ids)).logits.numpy()
        with low_rank_twin(model, open_folder(exported(flag))) as twin:
            assert twin is not None
            found, _ = OnnxRuntimeRunner(twin).step(plain_step(ids), None)
            names = {tensor.name for tensor in twin.model.graph.initializer}
            place = twin.path
        eps = np.finfo(np.float32 if flag == "fp32" else np.float16).eps
        assert np.linalg.norm(found - expected) < 2 * 30 * 2 * eps * np.linalg.norm(expected)
        assert not place.exists()
        assert not [name for name in names if name.endswith((".pivot_weight", ".coefficients", ".output_index"))]
        assert len([name for name in names if name.endswith("low_rank_u_t")]) == 14

    def test_its_matrices_are_those_of_the_reference_and_not_of_the_folder(
        self, exported: Any, checkpoint: Path, tmp_path: Path
    ) -> None:
        def zeros(model: ir.Model) -> None:
            value = model.graph.initializers[f"{LAYER}.mlp.up_proj.pivot_weight"]
            value.const_value = ir.tensor(np.zeros_like(value.const_value.numpy()), name=value.name)

        model = load_model(checkpoint, dtype=torch.float32)
        ids = plain_step(np.arange(3, 20)[None])
        logits = []
        for folder in (exported("fp32"), edited(exported("fp32"), tmp_path / "broken", zeros)):
            with low_rank_twin(model, open_folder(folder)) as twin:
                assert twin is not None
                logits.append(OnnxRuntimeRunner(twin).step(ids, None)[0])
        assert np.array_equal(*logits)


def test_the_checkpoint_loads_with_the_logit_spread_it_was_made_for(checkpoint: Path, exported: Any) -> None:
    """Flat logits would hide faults behind gates that are absolute."""
    model = load_model(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(3, 43)[None]).logits
    assert 2 < float(logits.std()) < 5
    assert open_folder(exported("fp32")).cache_layers == SIZES["num_hidden_layers"]
