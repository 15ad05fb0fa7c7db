"""onnxruntime-genai runs an exported folder as it stands, and says what our own greedy loop says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_fixtures import save_dense
from transformers import Gemma2Config, LlamaConfig, OPTConfig

from pifa_deploy.errors import InputRefusedError
from pifa_deploy.genai_config import genai_config, write_genai_config
from pifa_deploy.generation import GenerateOptions, end_tokens, generate_text, prompt_ids
from pifa_deploy.model_folder import load_tokenizer
from pifa_deploy.onnx_export import ExportOptions, export_checkpoint
from pifa_deploy.runners import open_runner

pytest_plugins = ("cli_plugin",)

PROMPT = "Emma Woodhouse, handsome, clever, and rich"
TOKENS = 24


@pytest.fixture(scope="module")
def genai() -> Any:
    return pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed: pip install '.[dev]'")


@pytest.fixture(scope="module")
def qwen2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genai")
    export_checkpoint(save_dense(folder / "dense", "qwen2"), folder / "onnx", ExportOptions(dtype="fp32"))
    return folder / "onnx"


def said_by_genai(genai: Any, folder: Path, *, chat: bool) -> tuple[list[int], list[int]]:
    """Returns the tokens of the prompt and of the continuation."""
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    messages = json.dumps([{"role": "user", "content": PROMPT}])
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True) if chat else PROMPT
    ids = [int(token) for token in tokenizer.encode(text)]
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + TOKENS)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids)
    said = []
    while not generator.is_done():
        generator.generate_next_token()
        said.append(int(generator.get_next_tokens()[0]))
    return ids, said


@pytest.mark.parametrize("fixture", ["onnx_folder", "qwen2_folder"])
@pytest.mark.parametrize("chat", [True, False])
def test_genai_reads_and_says_the_same_tokens(
    genai: Any, fixture: str, chat: bool, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(fixture)
    tokenizer = load_tokenizer(folder)
    ends = end_tokens(folder, tokenizer)
    options = GenerateOptions(max_new_tokens=TOKENS, chat=chat)
    expected = generate_text(open_runner(folder), tokenizer, PROMPT, options=options, ends=ends)
    ids, said = said_by_genai(genai, folder, chat=chat)
    assert ids == prompt_ids(tokenizer, PROMPT, chat=chat).tolist()
    assert [token for token in said if token not in ends] == list(expected.token_ids)
    assert len(said) > 3


def test_the_tokens_of_the_generation_config_go_before_those_of_the_model() -> None:
    config = LlamaConfig(eos_token_id=2, bos_token_id=1, pad_token_id=None)
    model = genai_config(config, {"eos_token_id": [4, 5]})["model"]
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([4, 5], 1, 4)
    assert genai_config(config, {"pad_token_id": 0})["model"]["pad_token_id"] == 0
    without = genai_config(LlamaConfig(eos_token_id=None, bos_token_id=None, pad_token_id=None), {})["model"]
    assert not {"eos_token_id", "bos_token_id", "pad_token_id"} & set(without)


def test_sizes_are_those_of_the_cache_and_the_model() -> None:
    model = genai_config(Gemma2Config(), {})["model"]
    decoder = model["decoder"]
    found = (decoder["head_size"], decoder["num_key_value_heads"], decoder["num_hidden_layers"], model["type"])
    assert found == (256, 4, 26, "gemma2")
    assert model["context_length"] == 8192


def test_an_architecture_that_genai_does_not_know_gets_no_file(tmp_path: Path) -> None:
    assert not write_genai_config(OPTConfig(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert write_genai_config(LlamaConfig(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["genai_config.json"]


def test_a_malformed_generation_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(InputRefusedError, match=r"generation_config\.json"):
        write_genai_config(LlamaConfig(), tmp_path)
