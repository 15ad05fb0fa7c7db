"""Import of folders with low-rank pairs in foreign namings: exactness against dense float64 products, and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from research_fixtures import imported, refused, relative_error, tiny_llama, tiny_qwen2, tiny_tokenizer, untouched
from safetensors.torch import load_file, save_file
from torch import nn

from pifa_deploy import checkpoint
from pifa_deploy.errors import InputMissingError, OutputExistsError

# Factors rounded to fp32 after pivoting: a few units of 6e-8 per layer, through two layers.
FP32 = 2e-5
Q_PROJ = "model.layers.0.self_attn.q_proj"


def svd_llm(layer: str, u, v):
    stem = layer.removesuffix("_proj")
    return {f"{stem}_u_proj.weight": u, f"{stem}_v_proj.weight": v}


NAMINGS = {
    "svd-llm": svd_llm,
    "asvd": lambda layer, u, v: {f"{layer}.ALinear.weight": u, f"{layer}.BLinear.weight": v},
    "dobi-svd": lambda layer, u, v: {f"{layer}.ALinear.weight": v, f"{layer}.BLinear.weight": u},
    "plain": lambda layer, u, v: {f"{layer}.U": u, f"{layer}.V": v},
    "plain lower case": lambda layer, u, v: {f"{layer}.u.weight": u, f"{layer}.v.weight": v},
    "plain swapped": lambda layer, u, v: {f"{layer}.V": u, f"{layer}.U": v},
    "spelled out": lambda layer, u, v: {f"{layer}.low_rank_u": u, f"{layer}.low_rank_v": v},
}


def low_rank_folder(
    folder: Path, model, naming: str, *, rank: int = 7, skip: str = "lm_head", change=None
) -> nn.Module:
    """Writes the model with pairs of the given naming; returns a float64 model with the dense products."""
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    dense = type(model)(model.config).double().eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    truth = {name: tensor.double() for name, tensor in state.items()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or re.search(skip, name):
            continue
        u = torch.randn(module.out_features, rank, generator=generator).to(module.weight) / rank**0.5
        v = torch.randn(rank, module.in_features, generator=generator).to(module.weight) / 6
        del state[f"{name}.weight"]
        state.update(NAMINGS[naming](name, u, v))
        truth[f"{name}.weight"] = u.double() @ v.double()
    dense.load_state_dict(truth)
    if change is not None:
        change(state)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "model.safetensors")
    return dense


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_answers_as_the_dense_product(tmp_path, naming):
    dense = low_rank_folder(tmp_path / "in", tiny_llama(), naming)
    summary = imported(tmp_path / "in", tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32
    assert (summary.kind, summary.modules, summary.dense_linears, summary.dtype) == ("low-rank", 14, 1, "float32")
    assert checkpoint.validate(tmp_path / "out").source == "import:low-rank"


@pytest.mark.parametrize("place", ["{layer}.bias", "{stem}_u_proj.bias"])
def test_biases_are_applied_wherever_they_lie(tmp_path, place):
    def move(state):
        for name in [name for name in state if name.endswith(".bias")]:
            layer = name.removesuffix(".bias")
            state[place.format(layer=layer, stem=layer.removesuffix("_proj"))] = state.pop(name)

    dense = low_rank_folder(tmp_path / "in", tiny_qwen2(), "svd-llm", change=move)
    summary = imported(tmp_path / "in", tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32
    assert summary.biases_added == 0


def test_tied_embeddings_and_dense_layers_are_kept(tmp_path):
    dense = low_rank_folder(tmp_path / "in", tiny_llama(tie_word_embeddings=True), "asvd", skip="mlp|lm_head")
    summary = imported(tmp_path / "in", tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32
    assert (summary.modules, summary.dense_linears) == (8, 7)
    assert "lm_head.weight" not in checkpoint.tensor_files(tmp_path / "out")


def test_a_rank_above_the_layer_size_is_no_loss(tmp_path):
    dense = low_rank_folder(tmp_path / "in", tiny_llama(), "plain", rank=20, skip="q_proj")
    imported(tmp_path / "in", tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32
    # k_proj is 16 x 32.
    assert checkpoint.validate(tmp_path / "out").modules["model.layers.0.self_attn.k_proj"].rank == 16


def test_shards_are_read_by_their_index(tmp_path):
    dense = low_rank_folder(tmp_path / "in", tiny_llama(), "asvd")
    shard(tmp_path / "in")
    imported(tmp_path / "in", tmp_path / "out")
    assert relative_error(tmp_path / "out", dense) < FP32


def shard(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{1 + ('ALinear' in name)}-of-2.safetensors" for name in state}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in state if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard_is_refused(tmp_path):
    low_rank_folder(tmp_path / "in", tiny_llama(), "asvd")
    shard(tmp_path / "in")
    (tmp_path / "in" / "model-2-of-2.safetensors").unlink()
    refused(tmp_path / "in", tmp_path / "out", "model-2-of-2.safetensors, which is missing")


def test_the_dtype_of_the_files_is_kept_unless_another_is_asked(tmp_path):
    low_rank_folder(tmp_path / "in", tiny_llama().bfloat16(), "asvd")
    assert imported(tmp_path / "in", tmp_path / "kept").dtype == "bfloat16"
    assert imported(tmp_path / "in", tmp_path / "wide", dtype="fp32").dtype == "float32"
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_the_tokenizer_is_copied(tmp_path):
    low_rank_folder(tmp_path / "in", tiny_llama(), "asvd")
    tiny_tokenizer().save_pretrained(tmp_path / "in")
    summary = imported(tmp_path / "in", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert summary.notes == []


def test_a_missing_tokenizer_is_reported(tmp_path):
    low_rank_folder(tmp_path / "in", tiny_llama(), "asvd")
    assert any("no tokenizer came along" in note for note in imported(tmp_path / "in", tmp_path / "out").notes)


def test_all_square_pairs_are_refused_as_undecided(tmp_path):
    low_rank_folder(tmp_path / "in", tiny_llama(), "plain", rank=32, skip="mlp")
    refused(
        tmp_path / "in",
        tmp_path / "out",
        rf"in: {re.escape(Q_PROJ)} has .*U \(32, 32\).*either may be U, expected shapes that decide it"
        rf"|in: model.layers.0.self_attn.o_proj has .*\(32, 32\).*either may be U",
    )


def edited(name: str, value):
    def change(state):
        state[name] = value(state[name]).contiguous()

    return change


def removed(name: str):
    return lambda state: state.pop(name)


def added(name: str, shape: tuple[int, ...]):
    return lambda state: state.update({name: torch.ones(shape)})


def nan(tensor):
    tensor = tensor.clone()
    tensor[0, 0] = float("nan")
    return tensor


U, V = f"{Q_PROJ}.ALinear.weight", f"{Q_PROJ}.BLinear.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited(U, nan), f"{U} has NaN or Inf"),
        (edited("model.norm.weight", lambda t: t * float("inf")), "model.norm.weight has NaN or Inf"),
        (removed(V), rf"{Q_PROJ} has {U} \(32, 7\), expected U \(32, r\) and V \(r, 32\)"),
        (edited(V, lambda t: t[:6]), rf"{Q_PROJ} has .*\(32, 7\).*\(6, 32\), expected"),
        (edited(V, lambda t: t.T), rf"{Q_PROJ} has .*\(32, 7\).*\(32, 7\), expected"),
        (edited(U, lambda t: t[0]), rf"{Q_PROJ} has .*\(7,\).*expected"),
        (edited(U, lambda t: t.int()), f"{Q_PROJ} has .*of floating point"),
        (edited(U, lambda t: t[:, :0]), rf"{Q_PROJ} has .*\(32, 0\).*expected"),
        (added(f"{Q_PROJ}.U", (32, 7)), rf"{Q_PROJ} has .*{Q_PROJ}.U \(32, 7\).*expected"),
        (added(f"{Q_PROJ}.weight", (32, 32)), f"{Q_PROJ}.weight fits no module"),
        (added(f"{Q_PROJ}.bias", (32,)), f"{Q_PROJ} has a bias, expected none"),
        (added(f"{Q_PROJ}.BLinear.bias", (7,)), f"{Q_PROJ} has the biases {Q_PROJ}.BLinear.bias, expected at most one"),
        (added("model.layers.0.extra", (1,)), "model.layers.0.extra fits no module"),
        (added("model.layers.7.mlp.up_proj.U", (1, 1)), "model.layers.7.mlp.up_proj.U fits no module"),
        (removed("model.norm.weight"), "model.norm.weight is missing"),
        (edited("lm_head.weight", lambda t: t[:-1]), r"lm_head.weight is \(39, 32\), expected \(40, 32\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    low_rank_folder(tmp_path / "in", tiny_llama(), "asvd", change=change)
    refused(tmp_path / "in", tmp_path / "out", f"in: {message}")


def test_a_bias_of_another_length_is_refused(tmp_path):
    change = edited(f"{Q_PROJ}.bias", lambda t: t[:-1])
    low_rank_folder(tmp_path / "in", tiny_qwen2(), "asvd", change=change)
    refused(tmp_path / "in", tmp_path / "out", rf"in: {Q_PROJ}.bias is \(31,\), expected \(32,\)")


def test_a_dense_model_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "in")
    refused(tmp_path / "in", tmp_path / "out", "in: no tensor is named as a part of a low-rank pair, expected names")


def test_a_pifa_checkpoint_is_refused(tmp_path):
    low_rank_folder(tmp_path / "in", tiny_llama(), "asvd")
    imported(tmp_path / "in", tmp_path / "pifa")
    refused(tmp_path / "pifa", tmp_path / "out", "pifa: is a PIFA checkpoint already")


def test_another_quantization_is_refused(tmp_path):
    low_rank_folder(tmp_path / "in", tiny_llama(), "asvd")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    refused(tmp_path / "in", tmp_path / "out", "in: quantization_config is set, expected a model that is not quantized")


def test_a_configuration_with_code_of_its_own_runs_none(tmp_path, monkeypatch):
    dense = low_rank_folder(tmp_path / "in", tiny_llama(), "asvd")
    (tmp_path / "in" / "evil.py").write_text("raise SystemExit('run')")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    imported(tmp_path / "in", tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert relative_error(tmp_path / "out", dense) < FP32


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused(tmp_path, missing):
    low_rank_folder(tmp_path / "in", tiny_llama(), "asvd")
    (tmp_path / "in" / missing).unlink()
    refused(tmp_path / "in", tmp_path / "out", f"in: has n.*{missing}")


def test_a_truncated_file_is_refused(tmp_path):
    low_rank_folder(tmp_path / "in", tiny_llama(), "asvd")
    path = tmp_path / "in" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path / "in", tmp_path / "out", "model.safetensors: not a readable safetensors file")


def test_an_existing_output_is_replaced_only_with_force(tmp_path):
    low_rank_folder(tmp_path / "in", tiny_llama(), "asvd")
    imported(tmp_path / "in", tmp_path / "out")
    with pytest.raises(OutputExistsError, match="--force"):
        imported(tmp_path / "in", tmp_path / "out")
    imported(tmp_path / "in", tmp_path / "out", force=True)
    checkpoint.validate(tmp_path / "out")


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(InputMissingError, match="in: no such file or folder"):
        imported(tmp_path / "in", tmp_path / "out")
    assert untouched(tmp_path / "out")
