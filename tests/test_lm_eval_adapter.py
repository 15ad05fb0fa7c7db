"""lm-eval through the adapter: the log-likelihoods of a direct computation, on checkpoints and on ONNX folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import SIZES, passage, save_dense, small_model, small_tokenizer

from pifa_deploy import lm_eval_adapter
from pifa_deploy.calibration import HELD_OUT_TEXT
from pifa_deploy.errors import ExitCode, InputRefusedError, MissingCapabilityError
from pifa_deploy.model_folder import load_model
from pifa_deploy.onnx_export import ExportOptions, export_checkpoint

pytest_plugins = ("cli_plugin",)

QUESTIONS = [
    {"question": "Emma Woodhouse was", "choices": [" handsome", " clever and rich", " a horse"], "answer": 0},
    {"question": "Sir Walter Elliot, of Kellynch Hall, in", "choices": [" Somersetshire", " Bath"], "answer": 0},
    {"question": "She had been", "choices": [" forced into prudence in her youth", " wrong", ""], "answer": 1},
]
CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
# As the bound of the perplexity: float32 logits are off by eps times their size, grown by the layers.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    found = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'pifa-deploy[lm-eval]'")
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    return found


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def fp16(checkpoint: Path) -> Path:
    export_checkpoint(checkpoint, checkpoint.parent / "lm-eval-fp16", ExportOptions(dtype="fp16"))
    return checkpoint.parent / "lm-eval-fp16"


@pytest.fixture(scope="module", params=["checkpoint", "onnx_folder"])
def model(request: pytest.FixtureRequest, lm_eval: Any) -> Any:
    if request.param == "onnx_folder":
        pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'pifa-deploy[cpu]'")
    place = request.getfixturevalue(request.param)
    return lm_eval_adapter.register()(path=str(place), batch_size=2)


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Any:
    return load_model(checkpoint, dtype=torch.float64)


@torch.no_grad()
def directly(exact: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """log p(continuation | context) in float64, and whether each of its tokens is the likeliest."""
    ids = torch.tensor([context + continuation])
    rows = torch.log_softmax(exact(ids).logits[0, len(context) - 1 : -1], -1)
    found = rows.gather(1, ids[0, len(context) :, None])
    return float(found.sum()), bool((rows.argmax(1) == ids[0, len(context) :]).all())


def tokens(text: str) -> list[int]:
    return small_tokenizer()(text, add_special_tokens=False).input_ids


def test_loglikelihoods_are_those_of_a_direct_computation(model: Any, exact: Any) -> None:
    likeliest = small_tokenizer().decode(int(exact(torch.tensor([tokens("Anne")])).logits[0, -1].argmax()))
    pairs = [("Emma Woodhouse was", " handsome, clever"), ("", "Anne Elliot"), ("Anne", likeliest), ("A", " b")]
    found = model.loglikelihood(instances("loglikelihood", *pairs))
    expected = []
    for context, continuation in pairs:
        whole, before = tokens(context + continuation), tokens(context) or [SIZES["bos_token_id"]]
        expected.append(directly(exact, before, whole[len(tokens(context)) :]))
    assert found[2][1] or len(tokens("Anne" + likeliest)) != len(tokens("Anne")) + 1
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], rtol=TOLERANCE)


def test_a_rolling_loglikelihood_counts_every_token_once(checkpoint: Path, onnx_folder: Path, exact: Any) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'pifa-deploy[lm-eval]'")
    text = passage(HELD_OUT_TEXT, 400)
    ids = tokens(text)
    assert len(ids) > 100
    # Windows of 48: the first reads the begin-of-text token, later ones the token before; the last reaches back.
    starts = range(0, len(ids), 48)
    expected = 0.0
    for start in starts:
        end = min(start + 48, len(ids))
        read = [SIZES["bos_token_id"], *ids][max(0, end - 48) : end]
        expected += directly(exact, read[: len(read) - (end - start) + 1], ids[start:end])[0]
    for place in (checkpoint, onnx_folder):
        model = lm_eval_adapter.register()(path=str(place), batch_size=3, max_length=48)
        found = model.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
        assert found == [pytest.approx(expected, rel=TOLERANCE)]


def test_generation_is_greedy_and_ends_where_it_is_told(model: Any, exact: Any) -> None:
    prompts = ["Emma", "Anne Elliot was", "Very well, Sir Walter; I shall be at Bath."]

    def plain(prompt: str, count: int) -> str:
        ids, produced = tokens(prompt), []
        for _ in range(count):
            with torch.no_grad():
                produced.append(int(exact(torch.tensor([ids + produced])).logits[0, -1].argmax()))
            if produced[-1] == SIZES["eos_token_id"]:
                break
        return small_tokenizer().decode(produced, skip_special_tokens=True)

    asked = [(prompt, {"until": [], "max_gen_toks": 12}) for prompt in prompts]
    found = model.generate_until(instances("generate_until", *asked))
    assert found == [plain(prompt, 12) for prompt in prompts]
    assert any(len(text) > 4 for text in found)
    stop = found[2][len(found[2]) // 2 :][:2]
    ended = model.generate_until(instances("generate_until", (prompts[2], {"until": [stop], "max_gen_toks": 12})))
    assert ended == [found[2].split(stop)[0]]


class Scripted:
    """A runner whose rows answer with given tokens, and which remembers what it was asked."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows
        self.steps: list[Any] = []

    def step(self, inputs: Any, cache: Any) -> tuple[Any, Any]:
        logits = np.zeros((len(self.rows), inputs.input_ids.shape[1], SIZES["vocab_size"]), np.float32)
        for row, answer in enumerate(self.rows):
            logits[row, -1, answer[len(self.steps)]] = 1
        self.steps.append(inputs)
        return logits, len(self.steps)


def onnx_model(onnx_folder: Path, rows: list[list[int]]) -> tuple[Any, Scripted]:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'pifa-deploy[cpu]'")
    model = lm_eval_adapter.open_model(str(onnx_folder))
    model._runner = runner = Scripted(rows)
    return model, runner


def asked(*, length: int) -> dict[str, Any]:
    return {
        "input_ids": torch.tensor([[1, 1, 7], [9, 8, 7]]),
        "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1]]),
        "max_length": length,
        "stopping_criteria": lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool),
        "pad_token_id": 5,
    }


def test_a_row_that_ended_is_padded_while_others_go_on(onnx_folder: Path) -> None:
    end = SIZES["eos_token_id"]
    model, runner = onnx_model(onnx_folder, [[20, end, 30, 31], [40, 41, 42, end]])
    found = model.generate(**asked(length=9), do_sample=False, use_cache=True)
    assert found.tolist() == [[1, 1, 7, 20, end, 5, 5], [9, 8, 7, 40, 41, 42, end]]
    assert [step.input_ids.tolist() for step in runner.steps] == [
        [[1, 1, 7], [9, 8, 7]],
        [[20], [40]],
        [[end], [41]],
        [[5], [42]],
    ]
    assert runner.steps[0].position_ids.tolist() == [[0, 0, 0], [0, 1, 2]]
    assert runner.steps[1].position_ids.tolist() == [[1], [3]]
    assert runner.steps[1].attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_generation_ends_at_the_longest_length_or_when_told(onnx_folder: Path) -> None:
    model, _ = onnx_model(onnx_folder, [[20] * 9, [40] * 9])
    assert model.generate(**asked(length=5)).shape == (2, 5)
    model, _ = onnx_model(onnx_folder, [[20] * 9, [40] * 9])
    told = {**asked(length=9), "stopping_criteria": lambda ids, scores: ids.shape[1] >= 4}
    assert model.generate(**told).shape == (2, 4)


@pytest.mark.parametrize(("option", "value"), [("do_sample", True), ("num_beams", 4), ("repetition_penalty", 1.1)])
def test_a_choice_of_tokens_that_is_not_greedy_is_refused(onnx_folder: Path, option: str, value: Any) -> None:
    model, _ = onnx_model(onnx_folder, [[20] * 9, [40] * 9])
    with pytest.raises(ValueError, match=f"generation asks for {option}; ONNX folders generate greedily"):
        model.generate(**asked(length=5), **{option: value})


def test_end_tokens_are_those_of_the_generation_config(tmp_path: Path) -> None:
    config = small_model().config
    assert lm_eval_adapter._end_tokens(tmp_path, config).tolist() == [SIZES["eos_token_id"]]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 17]}))
    assert lm_eval_adapter._end_tokens(tmp_path, config).tolist() == [1, 17]


# Whole tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS[:2]))
    (folder / "tiny.yaml").write_text(CHOICES % (folder / "data.jsonl"))
    return folder


def sampled(lm_eval: Any, tasks: Path, place: Path) -> tuple[float, list[list[float]]]:
    from lm_eval.tasks import TaskManager

    lm_eval_adapter.register()
    found = lm_eval.simple_evaluate(
        model="pifa",
        model_args={"path": str(place)},
        tasks=["tiny_choices"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["tiny_choices"], key=lambda sample: sample["doc_id"])
    values = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    return found["results"]["tiny_choices"]["acc,none"], values


def test_a_task_gives_the_direct_loglikelihoods_on_checkpoint_and_onnx(
    lm_eval: Any, tasks: Path, checkpoint: Path, onnx_folder: Path, fp16: Path, exact: Any
) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'pifa-deploy[cpu]'")
    expected = [
        [directly(exact, tokens(each["question"]), tokens(choice))[0] for choice in each["choices"]]
        for each in QUESTIONS[:2]
    ]
    right = np.mean([np.argmax(row) == each["answer"] for row, each in zip(expected, QUESTIONS, strict=False)])
    for place, tolerance in ((checkpoint, TOLERANCE), (onnx_folder, TOLERANCE), (fp16, 2e-2)):
        accuracy, values = sampled(lm_eval, tasks, place)
        for found, row in zip(values, expected, strict=True):
            np.testing.assert_allclose(found, row, rtol=tolerance)
        assert accuracy == right


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    line = [sys.executable, "-m", "pifa_deploy.lm_eval_adapter", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=800, check=False, env=environment)


def test_the_command_line_of_lm_eval_knows_the_model(
    lm_eval: Any, tasks: Path, checkpoint: Path, tmp_path: Path
) -> None:
    asked = ["run", "--model", "pifa", "--model_args", f"path={checkpoint}", "--tasks", "tiny_choices"]
    done = command(*asked, "--include_path", tasks, "--output_path", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "tiny_choices" in done.stdout
    assert len(list((tmp_path / "out").rglob("results_*.json"))) == 1


def test_bad_input_is_one_line_and_an_exit_code(lm_eval: Any, tasks: Path, tmp_path: Path) -> None:
    asked = ["run", "--model", "pifa", "--model_args", f"path={tmp_path}", "--tasks", "tiny_choices"]
    done = command(*asked, "--include_path", tasks)
    assert done.returncode == ExitCode.INPUT_REFUSED, done.stderr
    assert f"error: {tmp_path}: is no checkpoint or ONNX folder" in done.stderr
    assert "Traceback" not in done.stderr


# Without lm-eval


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(MissingCapabilityError, match=r"pip install 'pifa-deploy\[lm-eval\]'") as info:
        lm_eval_adapter.register()
    assert info.value.exit_code == ExitCode.NOT_DECIDED


def test_registering_again_gives_the_same_class(lm_eval: Any) -> None:
    assert lm_eval_adapter.register() is lm_eval_adapter.register()


def test_the_dtype_of_a_checkpoint_can_be_chosen_and_that_of_an_onnx_folder_not(
    checkpoint: Path, onnx_folder: Path
) -> None:
    assert lm_eval_adapter.open_model(str(checkpoint)).dtype == torch.float32
    assert lm_eval_adapter.open_model(str(checkpoint), dtype="bf16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype is 'float16', expected one of fp32, fp16, bf16"):
        lm_eval_adapter.open_model(str(checkpoint), dtype="float16")
    with pytest.raises(ValueError, match=r"dtype is 'fp16', .*onnx is fp32; leave dtype out"):
        lm_eval_adapter.open_model(str(onnx_folder), dtype="fp16")


def test_a_model_without_a_tokenizer_is_refused(lm_eval: Any, tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "bare")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputRefusedError, match=r"tokenizer of .*bare"):
        lm_eval_adapter.register()(path=str(folder))
