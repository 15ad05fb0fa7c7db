"""Sound files of the research code that hold a model that does not fit: refused by tensor, with nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from research_fixtures import compressed, imported, refused, save_research, tiny_llama, tiny_qwen2, untouched
from torch import nn

from pifa_deploy.errors import FactorizationError, StageFailedError


def test_a_state_dict_is_refused_with_what_was_expected(tmp_path):
    torch.save(tiny_llama().state_dict(), tmp_path / "m.pt")
    refused(tmp_path / "m.pt", tmp_path / "out", "m.pt: holds no entry 'model', expected a whole transformers model")


def test_a_dense_model_is_refused(tmp_path):
    refused(save_research(tmp_path / "m.pt", tiny_llama()), tmp_path / "out", "m.pt: the model has no factorised layer")


def packed_with(change, tmp_path: Path, form: str = "pivot", make=tiny_llama) -> Path:
    packed, _ = compressed(make(), form)
    change(packed)
    return save_research(tmp_path / "m.pt", packed)


def q_proj(model):
    return model.model.layers[0].self_attn.q_proj


def add_tensor(model):
    model.model.layers[0].extra = nn.Parameter(torch.ones(1))


def drop_norm(model):
    del model.model.norm


def short_embedding(model):
    model.model.embed_tokens.weight = nn.Parameter(torch.ones(39, 32))


def nan_factor(model):
    q_proj(model).BLinear.weight.data[1, 2] = float("nan")


def nan_dense(model):
    model.model.norm.weight.data[3] = float("inf")


def duplicate_pivot(model):
    q_proj(model).false_idx[1] = q_proj(model).false_idx[0]


def pivot_out_of_range(model):
    q_proj(model).false_idx[0] = 99


def short_pivots(model):
    q_proj(model).false_idx = q_proj(model).false_idx[:-1]


def no_others(model):
    del q_proj(model)._buffers["true_idx"]


def wide_factor(model):
    q_proj(model).BLinear.weight = nn.Parameter(torch.ones(5, 33))


def huge_expanded_factor(model):
    q_proj(model).BLinear.weight = nn.Parameter(torch.ones(1, 1).expand(1 << 30, 1 << 30))


def extra_bias(model):
    q_proj(model).bias = nn.Parameter(torch.ones(32))


def inner_bias(model):
    q_proj(model).BLinear.bias = nn.Parameter(torch.ones(5))


def many_layers(model):
    model.config.num_hidden_layers = 10**9


def strange_type(model):
    model.config.__dict__["model_type"] = "no-such-model"


def object_in_config(model):
    model.config.__dict__["hidden_act"] = nn.SiLU()


def shared_lists(model):
    value = ["x"] * 10
    for _ in range(7):
        value = [value] * 10
    model.config.__dict__["hidden_act"] = value


def shared_text(model):
    model.config.__dict__["hidden_act"] = {"x" * 100_000: ["y" * 100_000] * 100}


def zero_heads(model):
    model.config.num_attention_heads = 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_tensor, "model.layers.0.extra fits no module"),
        (drop_norm, "model.norm.weight is missing"),
        (short_embedding, r"model.embed_tokens.weight is \(39, 32\), expected \(40, 32\)"),
        (nan_factor, "model.layers.0.self_attn.q_proj.BLinear.weight has NaN"),
        (nan_dense, "model.norm.weight has NaN or Inf"),
        (duplicate_pivot, "q_proj.false_idx and .*q_proj.true_idx do not name each of 32 rows once"),
        (pivot_out_of_range, r"do not name each of 32 rows once \(found 0 .. 99\)"),
        (short_pivots, r"q_proj has BLinear.weight \(5, 32\).*false_idx \(4,\), true_idx \(27,\)"),
        (no_others, "q_proj holds parts of both forms"),
        (wide_factor, r"q_proj has BLinear.weight \(5, 33\).*32 x 32"),
        (huge_expanded_factor, r"a tensor on data/\d+ with size \(1073741824, 1073741824\), .*repeats the 4 bytes"),
        (extra_bias, "q_proj has a bias, expected none"),
        (inner_bias, "q_proj holds BLinear.bias"),
        (many_layers, "num_hidden_layers is 1000000000, expected at most"),
        (strange_type, "model_type is 'no-such-model', expected one that transformers knows"),
        (object_in_config, "config.hidden_act is no plain value .found torch.nn.modules.activation.SiLU"),
        (shared_lists, "config.hidden_act is no plain value .more than 100000 items when its shared parts are written"),
        (shared_text, "config.hidden_act is no plain value .more than 100000 items"),
        (zero_heads, "the configuration describes no causal language model of type 'llama'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_tensor(tmp_path, change, message):
    refused(packed_with(change, tmp_path), tmp_path / "out", f"m.pt: .*{message}")


def test_a_layer_without_the_bias_of_its_architecture_is_refused(tmp_path):
    def drop_bias(model):
        q_proj(model).bias = None

    path = packed_with(drop_bias, tmp_path, make=tiny_qwen2)
    refused(path, tmp_path / "out", "q_proj has no bias, expected one as the configuration says")


def test_a_module_tree_without_end_is_refused(tmp_path):
    def loop(model):
        model.model.layers[0].mlp._modules["again"] = model.model

    refused(packed_with(loop, tmp_path), tmp_path / "out", "the module tree has no end")


def test_coefficients_beyond_use_fail_by_layer(tmp_path):
    def blow_up(model):
        q_proj(model).ALinear.weight.data[0, 0] = 2e3

    with pytest.raises(FactorizationError, match=r"m.pt: model.layers.0.self_attn.q_proj: max \|C\| is 2e\+03"):
        imported(packed_with(blow_up, tmp_path), tmp_path / "out")
    assert untouched(tmp_path / "out")


def test_a_value_that_the_asked_dtype_cannot_hold_fails_by_tensor(tmp_path):
    def enlarge(model):
        model.model.norm.weight.data[0] = 1e6

    with pytest.raises(StageFailedError, match=r"model.norm.weight overflows torch.float16; import with a wider dtype"):
        imported(packed_with(enlarge, tmp_path), tmp_path / "out", dtype="fp16")
    assert untouched(tmp_path / "out")
