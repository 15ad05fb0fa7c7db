"""Import of the research code's pickled models: exactness against dense float64 products, and refusals."""

from __future__ import annotations

import json
import pickle
import sys

import pytest
import torch
from research_fixtures import (
    archive_of,
    compressed,
    global_only,
    halved,
    imported,
    relative_error,
    save_research,
    tiny_llama,
    tiny_qwen2,
    tiny_tokenizer,
    untouched,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from pifa_deploy import checkpoint
from pifa_deploy.errors import (
    InputMissingError,
    InputRefusedError,
    OutputExistsError,
)
from pifa_deploy.importers import ImportOptions
from pifa_deploy.importers.pickled_tokenizer import tokenizer_files
from pifa_deploy.importers.restricted_pickle import InertRecord

# The models run in float64; what is left is rounding of RMSNorm and softmax, which transformers does in fp32.
EXACT = 2e-6
# Factors rounded to fp32 after pivoting: a few units of 6e-8 per layer, through two layers.
FP32 = 2e-5


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
def test_the_reconstructed_form_answers_as_the_dense_product(tmp_path, make):
    packed, dense = compressed(make(), "svd")
    summary = imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32
    assert (summary.kind, summary.modules, summary.dense_linears, summary.dtype) == ("pifa-research", 14, 1, "float32")
    # ALinear applies its bias in the research code too.
    assert summary.biases_added == 0


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_factorised_form_answers_as_the_dense_product_in_any_row_order(tmp_path, make, shuffled):
    packed, dense = compressed(halved(make()), "pivot", shuffled=shuffled)
    summary = imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < EXACT
    assert summary.dtype == "float16"


def test_stored_factors_are_kept_bit_for_bit(tmp_path):
    packed, _ = compressed(halved(tiny_llama()), "pivot")
    imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    name = "model.layers.1.mlp.down_proj"
    there, here = packed.get_submodule(name), model.get_submodule(name)
    assert torch.equal(here.pivot_weight, there.BLinear.weight)
    assert torch.equal(here.coefficients, there.ALinear.weight)
    assert torch.equal(here.pivot_rows.long(), there.false_idx)


def test_biases_that_the_research_forward_drops_are_applied_and_counted(tmp_path):
    packed, dense = compressed(halved(tiny_qwen2()), "pivot")
    summary = imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    assert summary.biases_added == 6
    assert any("6 layers have a bias that the research forward leaves out" in note for note in summary.notes)
    for name, parameter in dense.named_parameters():
        if name.endswith(".bias"):
            parameter.data.zero_()
    assert relative_error(tmp_path / "out", dense) > 0.1


def test_dense_and_both_factorised_forms_may_be_mixed(tmp_path):
    model = tiny_llama()
    packed, dense = compressed(model, "pivot", skip="self_attn")
    svd, svd_dense = compressed(model, "svd")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"):
        packed.set_submodule(name, svd.get_submodule(name))
        dense.set_submodule(name, svd_dense.get_submodule(name))
    packed.lm_head, dense.lm_head = model.lm_head, svd_dense.lm_head
    summary = imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32
    assert (summary.modules, summary.dense_linears) == (8, 7)
    assert checkpoint.validate(tmp_path / "out").details["form"] == "factorised+reconstructed"


@pytest.mark.parametrize("form", ["svd", "pivot"])
def test_strides_and_storage_offsets_are_honoured(tmp_path, form):
    def inside_a_larger_storage(weight):
        large = torch.full((weight.shape[1] + 5, weight.shape[0] + 3), 9.0, dtype=weight.dtype)
        view = large.T[2 : 2 + weight.shape[0], 4 : 4 + weight.shape[1]]
        view.copy_(weight)
        assert view.storage_offset() > 0
        assert not view.is_contiguous()
        return view

    packed, dense = compressed(tiny_qwen2(), form, shuffled=True, layout=inside_a_larger_storage)
    imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32


def test_layers_that_share_one_storage_are_told_apart(tmp_path):
    model = tiny_llama()
    norms = torch.rand(2, model.config.hidden_size) + 0.5
    packed, dense = compressed(model, "svd")
    for row, layer in enumerate(packed.model.layers):
        layer.input_layernorm.weight = nn.Parameter(norms[row])
        dense.model.layers[row].input_layernorm.weight = nn.Parameter(norms[row].double())
    assert packed.model.layers[0].input_layernorm.weight.untyped_storage().nbytes() == norms.nbytes
    imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32


def test_tied_embeddings_stay_tied(tmp_path):
    packed, dense = compressed(tiny_llama(tie_word_embeddings=True), "svd")
    dense.tie_weights()
    imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32
    assert "lm_head.weight" not in checkpoint.tensor_files(tmp_path / "out")


def test_an_output_head_that_left_its_tie_is_kept_and_reported(tmp_path):
    packed, dense = compressed(tiny_llama(tie_word_embeddings=True), "svd")
    head = torch.randn_like(packed.lm_head.weight)
    packed.lm_head.weight, dense.lm_head.weight = nn.Parameter(head), nn.Parameter(head.double())
    summary = imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32
    assert any("lm_head.weight differs from model.embed_tokens.weight" in note for note in summary.notes)


def test_a_rank_equal_to_the_output_size_has_no_coefficients(tmp_path):
    packed, dense = compressed(tiny_llama(), "pivot")
    layer, rows = packed.model.layers[0].self_attn.k_proj, torch.randperm(16)
    weight = torch.randn(16, 32)
    layer.BLinear.weight, layer.ALinear.weight = nn.Parameter(weight), nn.Parameter(torch.empty(0, 16))
    layer.false_idx, layer.true_idx = rows, torch.empty(0, dtype=torch.int64)
    dense.model.layers[0].self_attn.k_proj.weight.data[rows] = weight.double()
    imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32


def test_the_configuration_comes_along(tmp_path):
    packed, _ = compressed(tiny_llama(), "svd")
    imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 5e4
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["quantization_config"]["source"] == "import:pifa-research"


def test_a_configuration_of_an_older_transformers_is_understood(tmp_path):
    packed, dense = compressed(tiny_llama(), "svd")
    old = {"model_type": "llama", "rope_theta": 5e4, "rope_scaling": None, "torch_dtype": torch.float16}
    packed.config.__dict__.update(
        old, max_length=20, do_sample=True, temperature=0.6, pruned_heads={}, torchscript=False
    )
    del packed.config.__dict__["rope_parameters"]
    # Older versions kept the rotary table in every layer, saved with the model.
    packed.model.layers[0].self_attn.rotary_emb = nn.Module()
    packed.model.layers[0].self_attn.rotary_emb.register_buffer("inv_freq", torch.rand(4))
    imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32


def test_the_tokenizer_is_rebuilt_from_its_json(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    packed, _ = compressed(tiny_llama(), "svd")
    summary = imported(save_research(tmp_path / "m.pt", packed, tokenizer), tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "rows are kept unknown"
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"] == [4, 5, 6, 0]
    assert (found.bos_token, found.eos_token, found.model_max_length) == ("<s>", "</s>", 64)
    assert found.chat_template == "{{ messages }}"
    assert not any("tokenizer" in note for note in summary.notes)


def test_a_sentencepiece_tokenizer_leaves_its_model_and_special_tokens():
    class Token(InertRecord):
        origin, __slots__ = "tokenizers.AddedToken", ()

    class Slow(InertRecord):
        origin, __slots__ = "transformers.models.llama.tokenization_llama.LlamaTokenizer", ()

    token, slow, notes = Token(), Slow(), []
    token.state = {"content": "<s>"}
    slow.state = {"sp_model_proto": b"model", "_bos_token": token, "_eos_token": "</s>", "add_bos_token": True}
    files = tokenizer_files(slow, notes)
    assert files["tokenizer.model"] == b"model"
    config = json.loads(files["tokenizer_config.json"])
    assert (config["tokenizer_class"], config["bos_token"], config["eos_token"]) == ("LlamaTokenizer", "<s>", "</s>")
    assert any("needs sentencepiece" in note for note in notes)


def test_a_tokenizer_whose_state_is_no_json_is_left_out():
    class Backend(InertRecord):
        origin, __slots__ = "tokenizers.Tokenizer", ()

    backend, fast, notes = Backend(), InertRecord(), []
    backend.state, fast.state = b"{broken", {"_tokenizer": backend}
    assert tokenizer_files(fast, notes) == {}
    assert any("no tokenizer came along" in note for note in notes)


def test_a_missing_tokenizer_is_reported(tmp_path):
    packed, _ = compressed(tiny_llama(), "svd")
    summary = imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    assert any("no tokenizer came along" in note for note in summary.notes)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_asked_dtype_is_written(tmp_path, name, dtype):
    packed, _ = compressed(tiny_llama(), "svd")
    summary = imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out", dtype=name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert summary.dtype == str(dtype).removeprefix("torch.")


def test_mixed_dtypes_are_widened_and_reported(tmp_path):
    packed, dense = compressed(tiny_llama(), "svd")
    packed.model.embed_tokens.half()
    dense.model.embed_tokens.weight.data = packed.model.embed_tokens.weight.double()
    summary = imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32
    assert any("mixes float16, float32" in note for note in summary.notes)


def test_the_summary_is_json(tmp_path):
    packed, _ = compressed(tiny_llama(), "pivot")
    summary = imported(save_research(tmp_path / "m.pt", packed), tmp_path / "out")
    found = json.loads(json.dumps(summary.to_json()))
    assert found["modules"] == 14
    largest = max(
        float(module.ALinear.weight.detach().abs().max()) for module in packed.modules() if hasattr(module, "true_idx")
    )
    assert found["max_coefficient"] == pytest.approx(largest)


def test_nothing_is_imported_and_no_stock_reader_is_called(tmp_path, monkeypatch):
    packed, dense = compressed(tiny_qwen2(), "pivot")
    path = save_research(tmp_path / "m.pt", packed, tiny_tokenizer())

    def refuse(*_, **__):
        raise AssertionError("the file was handed to a reader that runs what it names")

    with monkeypatch.context() as patch:
        for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (torch.serialization, "load")):
            patch.setattr(module, name, refuse)
        imported(path, tmp_path / "out")
    assert not {"utils", "utils.utils", "utils.linear_pivot"} & sys.modules.keys()
    assert relative_error(tmp_path / "out", dense) < FP32


# --- input and output places ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    packed, _ = compressed(tiny_llama(), "svd")
    return save_research(tmp_path_factory.mktemp("good") / "good.pt", packed)


def test_an_existing_output_is_replaced_only_with_force(good, tmp_path):
    imported(good, tmp_path / "out")
    before = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    with pytest.raises(OutputExistsError, match="--force"):
        imported(good, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == before
    imported(good, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns > before


def test_an_existing_output_survives_a_refused_input(good, tmp_path):
    imported(good, tmp_path / "out")
    with pytest.raises(InputRefusedError):
        imported(archive_of(tmp_path / "m.pt", global_only("os", "system")), tmp_path / "out", force=True)
    checkpoint.validate(tmp_path / "out")


def test_a_source_that_does_not_exist_is_reported(tmp_path):
    with pytest.raises(InputMissingError, match="nowhere: no such file or folder"):
        imported(tmp_path / "nowhere", tmp_path / "out")
    assert untouched(tmp_path / "out")


def test_an_unknown_dtype_is_a_wrong_argument():
    with pytest.raises(ValueError, match="dtype is 'int8', expected one of fp32, fp16, bf16"):
        ImportOptions(dtype="int8")
