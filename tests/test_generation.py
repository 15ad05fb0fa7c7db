"""Greedy text through a runner: the same tokens as transformers' own loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import SIZES, small_model, small_tokenizer

from pifa_deploy.generation import generate
from pifa_deploy.model_folder import load_model, load_tokenizer
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.runners import OnnxRuntimeRunner, Step, TorchRunner

pytest_plugins = ("cli_plugin",)

PROMPTS = ["Emma", "Anne Elliot was", "Very well, Sir Walter; I shall be at Bath."]


class Scripted:
    """A runner that answers with given tokens and remembers what it was asked."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.steps: list[Step] = []

    def step(self, inputs: Step, cache: Any) -> tuple[Any, Any]:
        assert cache == (len(self.steps) or None)  # what the step before returned
        self.steps.append(inputs)
        logits = np.zeros((1, inputs.input_ids.shape[1], SIZES["vocab_size"]), np.float32)
        logits[0, -1, self.tokens[len(self.steps) - 1]] = 1
        return logits, len(self.steps)


def plain_tokenizer() -> Any:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="module")
def runner(onnx_folder: Path) -> OnnxRuntimeRunner:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'pifa-deploy[cpu]'")
    return OnnxRuntimeRunner(open_folder(onnx_folder))


def reference(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_onnx_folder_says_what_transformers_says(prompt: str, runner: OnnxRuntimeRunner, checkpoint: Path) -> None:
    model, tokenizer = load_model(checkpoint, dtype=torch.float32), plain_tokenizer()
    found = generate(runner, tokenizer, prompt, max_new_tokens=24)
    assert found == reference(model, tokenizer, prompt, 24)
    assert found


def test_the_torch_runner_says_the_same(checkpoint: Path, runner: OnnxRuntimeRunner) -> None:
    model, tokenizer = load_model(checkpoint, dtype=torch.float32), plain_tokenizer()
    both = [generate(each, tokenizer, PROMPTS[1], max_new_tokens=12) for each in (TorchRunner(model), runner)]
    assert both[0] == both[1]


def test_a_chat_template_wraps_the_prompt(runner: OnnxRuntimeRunner, onnx_folder: Path) -> None:
    tokenizer = load_tokenizer(onnx_folder)
    assert tokenizer.chat_template
    by_hand = generate(runner, plain_tokenizer(), "Q: Who is Emma?\nA:", max_new_tokens=10)
    assert generate(runner, tokenizer, "Who is Emma?", max_new_tokens=10) == by_hand


def test_without_chat_the_prompt_is_continued_as_it_is(runner: OnnxRuntimeRunner, onnx_folder: Path) -> None:
    continued = generate(runner, load_tokenizer(onnx_folder), "Emma was", max_new_tokens=10, chat=False)
    assert continued == generate(runner, plain_tokenizer(), "Emma was", max_new_tokens=10)


def test_it_stops_at_the_end_of_text_token_and_leaves_it_out() -> None:
    tokenizer = plain_tokenizer()
    word = tokenizer("E", add_special_tokens=False).input_ids[0]
    runner = Scripted([word, word, tokenizer.eos_token_id, word])
    assert generate(runner, tokenizer, "Emma", max_new_tokens=50) == "EE"
    assert len(runner.steps) == 3


def test_it_stops_after_the_asked_number_of_tokens() -> None:
    tokenizer = plain_tokenizer()
    word = tokenizer("E", add_special_tokens=False).input_ids[0]
    runner = Scripted([word] * 9)
    assert generate(runner, tokenizer, "Emma", max_new_tokens=4) == "EEEE"
    assert len(runner.steps) == 4


def test_every_step_says_where_it_stands() -> None:
    tokenizer = plain_tokenizer()
    prompt = tokenizer("Emma Woodhouse", add_special_tokens=False).input_ids
    runner = Scripted([7, 8, 9])
    generate(runner, tokenizer, "Emma Woodhouse", max_new_tokens=3)
    assert [step.input_ids.tolist() for step in runner.steps] == [[prompt], [[7]], [[8]]]
    n = len(prompt)
    assert [step.position_ids.tolist() for step in runner.steps] == [[list(range(n))], [[n]], [[n + 1]]]
    assert [step.attention_mask.tolist() for step in runner.steps] == [[[1] * (n + k)] for k in range(3)]


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="the prompt '' holds no token; give some text"):
        generate(Scripted([]), plain_tokenizer(), "")


def test_no_new_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0, expected at least 1"):
        generate(Scripted([]), plain_tokenizer(), "Emma", max_new_tokens=0)


def test_a_model_that_says_the_end_at_once_says_nothing() -> None:
    model = small_model()
    model.lm_head.weight.data.zero_()
    bias = torch.nn.Linear(SIZES["hidden_size"], SIZES["vocab_size"])
    bias.weight.data.zero_()
    bias.bias.data.zero_()[plain_tokenizer().eos_token_id] = 5.0
    model.set_output_embeddings(bias)
    assert generate(TorchRunner(model), plain_tokenizer(), "Emma", max_new_tokens=5) == ""
