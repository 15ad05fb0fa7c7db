"""Greedy text through a runner: the same tokens as transformers' own loop."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import SIZES, Outcome, small_model, small_tokenizer

from pifa_deploy.cli.generate import _remarks
from pifa_deploy.decoder_step import Step, StepLimits
from pifa_deploy.errors import ExitCode, StageFailedError
from pifa_deploy.generation import (
    Generated,
    GenerateOptions,
    TextStream,
    end_tokens,
    generate,
    generate_text,
    position_limit,
)
from pifa_deploy.model_folder import load_model, load_tokenizer
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner
from pifa_deploy.sampling import SamplingOptions
from pifa_deploy.torch_runner import TorchRunner

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


TEXT = "Ünïcode 🙂 и 日本語, e\u0301!"


class TestTextStream:
    def test_characters_of_several_bytes_come_whole(self) -> None:
        tokenizer = plain_tokenizer()
        tokens = tokenizer(TEXT, add_special_tokens=False).input_ids
        stream = TextStream(tokenizer)
        pieces = [stream.push(token) for token in tokens]
        assert "".join(pieces) == TEXT
        assert pieces.count("🙂") == 1
        assert pieces.count("") >= 3 + 2 * 3  # bytes of the others but their last one
        assert not any("\ufffd" in piece for piece in pieces)
        assert stream.flush() == ""

    def test_bytes_that_make_no_character_come_at_the_end(self) -> None:
        tokenizer = plain_tokenizer()
        tokens = tokenizer("A🙂", add_special_tokens=False).input_ids[:-1]
        stream = TextStream(tokenizer)
        assert "".join(stream.push(token) for token in tokens) == "A"
        assert stream.flush() == "\ufffd"

    def test_special_tokens_are_left_out(self) -> None:
        tokenizer = plain_tokenizer()
        stream = TextStream(tokenizer)
        assert stream.push(tokenizer.eos_token_id) == ""
        assert stream.push(tokenizer("E", add_special_tokens=False).input_ids[0]) == "E"


def text_from(runner: Any, prompt: str = "Emma", *, limits: StepLimits | None = None, **options: Any) -> Generated:
    tokenizer, positions = plain_tokenizer(), options.pop("positions", None)
    ends = options.pop("ends", {tokenizer.eos_token_id})
    shown: list[str] = []
    found = generate_text(
        runner,
        tokenizer,
        prompt,
        options=GenerateOptions(**options),
        ends=ends,
        limits=limits,
        positions=positions,
        show=shown.append,
    )
    assert "".join(shown) == found.text
    assert "" not in shown
    return found


def test_any_end_token_ends_the_text() -> None:
    for ends, count in (({1}, 4), ({1, 9}, 2), ({7}, 0), (set(), 5)):
        found = text_from(Scripted([7, 8, 9, 10, 1]), ends=ends, max_new_tokens=5)
        assert found.token_ids == (7, 8, 9, 10, 1)[:count] or (not ends and len(found.token_ids) == 5)
        assert found.stop == ("end" if ends else "length")
        assert found.decode_steps == min(count, 4)


def test_the_figures_are_those_of_the_steps(runner: OnnxRuntimeRunner) -> None:
    found = text_from(runner, PROMPTS[2], max_new_tokens=6, ends=())
    assert found.prompt_tokens == len(plain_tokenizer()(PROMPTS[2]).input_ids)
    assert (len(found.token_ids), found.decode_steps) == (6, 5)
    assert found.prefill_tokens_per_s == found.prompt_tokens / found.prefill_seconds
    assert found.decode_tokens_per_s == 5 / found.decode_seconds
    value = json.loads(json.dumps(found.to_json()))
    assert (value["artefact"], value["schema"], value["text"]) == ("generate", 1, found.text)
    assert value["token_ids"] == list(found.token_ids)
    assert text_from(Scripted([1]), max_new_tokens=6).decode_tokens_per_s is None


def test_text_is_shown_before_the_next_step() -> None:
    tokenizer, seen = plain_tokenizer(), list[tuple[str, int]]()
    letters = [tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "ABC"]
    runner = Scripted([*letters, tokenizer.eos_token_id])
    generate_text(
        runner,
        tokenizer,
        "Emma",
        options=GenerateOptions(),
        ends={tokenizer.eos_token_id},
        show=lambda piece: seen.append((piece, len(runner.steps))),
    )
    assert seen == [("A", 1), ("B", 2), ("C", 3)]


def test_a_long_prompt_is_read_in_parts(runner: OnnxRuntimeRunner) -> None:
    whole = text_from(runner, PROMPTS[2], max_new_tokens=8, ends=())
    scripted = Scripted([0] * 99)
    text_from(scripted, PROMPTS[2], max_new_tokens=1, limits=StepLimits(tokens=4))
    read = [step.input_ids.shape[1] for step in scripted.steps]
    assert sum(read) == whole.prompt_tokens
    assert set(read[:-1]) == {4}
    in_parts = text_from(runner, PROMPTS[2], max_new_tokens=8, ends=(), limits=StepLimits(tokens=4))
    assert in_parts.token_ids == whole.token_ids


@pytest.mark.parametrize(("most", "tokens"), [(0, 1), (1, 1), (2, 2), (4, 4), (40, 9)])
def test_it_stops_when_the_cache_of_the_engine_is_full(most: int, tokens: int) -> None:
    runner = Scripted([7] * 20)
    prompt = plain_tokenizer()("E", add_special_tokens=False).input_ids
    assert len(prompt) == 1
    found = text_from(runner, "E", max_new_tokens=9, limits=StepLimits(past=most))
    assert max(step.past for step in runner.steps) <= most
    assert len(found.token_ids) == max(tokens, 1 + most if most < 9 else 9)
    assert found.stop == ("cache" if most < 8 else "length")
    line = _remarks(found, StepLimits(past=most))[1:]
    told = f"the engine was built for {most} tokens in the cache; build it again with a larger --max-cache-len"
    assert line == ([f"stopped after {len(found.token_ids)} tokens: {told}"] if most < 8 else [])


@pytest.mark.parametrize(("positions", "tokens", "stop"), [(3, 1, "positions"), (5, 3, "positions"), (6, 4, "length")])
def test_it_stops_at_the_last_position_of_the_model(positions: int, tokens: int, stop: str) -> None:
    runner, prompt = Scripted([7] * 20), "EEE"
    assert len(plain_tokenizer()(prompt, add_special_tokens=False).input_ids) == 3
    found = text_from(runner, prompt, max_new_tokens=4, positions=positions)
    assert max(int(step.position_ids.max()) for step in runner.steps) < positions
    assert (len(found.token_ids), found.stop) == (tokens, stop)
    told = "\n".join(_remarks(found, None, positions)[1:])
    expected = f"stopped after {tokens} tokens: with the 3 of the prompt they fill the {positions} positions"
    assert told.startswith(expected) if stop == "positions" else told == ""


def test_a_prompt_with_more_tokens_than_positions_is_refused() -> None:
    runner = Scripted([7])
    with pytest.raises(
        ValueError, match=r"the prompt has 3 tokens and the model was made for 2 positions .*; shorten it"
    ):
        text_from(runner, "EEE", positions=2)
    assert runner.steps == []


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({}, None),
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        # Vicuna 1.5 16k, Llama 3.2, Phi-3 mini 128k, Qwen2.5 with the scaling of its model card, gpt-oss
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope"},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
            },
            131072,
        ),
    ],
)
def test_positions_are_those_of_the_configuration(
    config: dict[str, Any], positions: int | None, tmp_path: Path
) -> None:
    assert position_limit(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert position_limit(tmp_path) == positions


@pytest.mark.parametrize("prompt", ["caf\udce9", "\ud83d"])
def test_a_prompt_that_is_no_unicode_is_refused(prompt: str) -> None:
    strange = len(prompt) - 1
    with pytest.raises(ValueError, match=rf"the prompt has '\\ud.*' at character {strange}, .*give it in UTF-8"):
        text_from(Scripted([7]), prompt)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_gives_nan_fails_and_is_not_an_empty_answer(temperature: float) -> None:
    class Broken(Scripted):
        def step(self, inputs: Step, cache: Any) -> tuple[Any, Any]:
            logits, cache = super().step(inputs, cache)
            return logits * (np.nan if len(self.steps) == 3 else 1), cache

    runner, seen = Broken([7] * 9), list[str]()
    options = GenerateOptions(sampling=SamplingOptions(temperature=temperature))
    with pytest.raises(StageFailedError, match=r"384 NaN and 0 infinite of 384 logits"):
        generate_text(runner, plain_tokenizer(), "E", options=options, ends=(), show=seen.append)
    assert len(runner.steps) == 3


def test_a_seed_gives_the_same_text_again(runner: OnnxRuntimeRunner) -> None:
    texts = [
        text_from(runner, max_new_tokens=12, ends=(), sampling=SamplingOptions(temperature=2, seed=seed)).token_ids
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_end_tokens_are_those_of_the_generation_config_and_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = plain_tokenizer()
    assert end_tokens(tmp_path, tokenizer) == {1}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert end_tokens(tmp_path, tokenizer) == {1, 5}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert end_tokens(tmp_path, tokenizer) == {1, 7, 9}
    tokenizer.eos_token = None
    assert end_tokens(tmp_path, tokenizer) == {7, 9}


class TestCommand:
    def test_it_prints_the_text_and_the_speed(
        self, onnx_folder: Path, pifa_deploy: Callable[..., Outcome], runner: OnnxRuntimeRunner
    ) -> None:
        expected = text_from(runner, max_new_tokens=9)
        outcome = pifa_deploy("generate", onnx_folder, "Emma", "--no-chat", "--max-new-tokens", 9)
        assert outcome.code == 0
        assert outcome.out == expected.text + "\n"
        speed = f"prefill: {expected.prompt_tokens} tokens, .* tokens/s; decode: {expected.decode_steps} tokens, "
        assert re.search(speed, outcome.err)

    def test_argument_and_option_are_the_same_prompt(
        self, onnx_folder: Path, pifa_deploy: Callable[..., Outcome], tmp_path: Path
    ) -> None:
        by_argument = pifa_deploy("generate", onnx_folder, "Emma", "--json", "-")
        by_option = pifa_deploy("generate", onnx_folder, "--prompt", "Emma", "--json", tmp_path / "x.json")
        first, second = json.loads(by_argument.out), json.loads((tmp_path / "x.json").read_text())
        assert first["token_ids"] == second["token_ids"]
        assert by_option.out == second["text"] + "\n"

    def test_the_last_position_is_the_end(
        self, onnx_folder: Path, pifa_deploy: Callable[..., Outcome], tmp_path: Path
    ) -> None:
        folder = Path(shutil.copytree(onnx_folder, tmp_path / "short"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 6}))
        outcome = pifa_deploy("generate", folder, "EEE", "--no-chat", "--json", "-")
        found = json.loads(outcome.out)
        if found["stop"] != "end":
            assert (found["stop"], found["prompt_tokens"], len(found["token_ids"])) == ("positions", 3, 4)
            assert "they fill the 6 positions that the model was made for" in outcome.err
        pifa_deploy("generate", folder, "E" * 7, "--no-chat").failed(ExitCode.USAGE, "7 tokens and the model .* 6 pos")
        pifa_deploy("generate", folder, "caf\udce9").failed(ExitCode.USAGE, r"'\\udce9' at character 3")

    def test_one_prompt_is_wanted(self, onnx_folder: Path, pifa_deploy: Callable[..., Outcome]) -> None:
        pifa_deploy("generate", onnx_folder).failed(ExitCode.USAGE, "Missing argument 'PROMPT'")
        pifa_deploy("generate", onnx_folder, "a", "--prompt", "b").failed(ExitCode.USAGE, "were both given")
        pifa_deploy("generate", onnx_folder, "a", "--top-k", 3).failed(ExitCode.USAGE, "give a temperature")
        plugin = pifa_deploy("generate", onnx_folder, "a", "--plugin", "x.so")
        plugin.failed(ExitCode.USAGE, r"x\.so is a plugin of TensorRT, and .*onnx is no engine folder")

    def test_another_tokenizer_can_be_named(
        self, onnx_folder: Path, checkpoint: Path, pifa_deploy: Callable[..., Outcome], tmp_path: Path
    ) -> None:
        for name in ("model.onnx", "model.onnx.data", "pifa.json"):
            shutil.copyfile(onnx_folder / name, tmp_path / name)
        pifa_deploy("generate", tmp_path, "Emma").failed(ExitCode.INPUT_REFUSED, "config.json")
        named = pifa_deploy("generate", tmp_path, "Emma", "--tokenizer", checkpoint)
        assert named.code == 0
        assert named.out == pifa_deploy("generate", onnx_folder, "Emma").out
