"""Decoder layers of many families: found, called as their model calls them, grouped, compressed and loaded again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cli_fixtures import small_tokenizer
from family_fixtures import (
    FAMILIES,
    HEADS,
    LAYERS,
    VOCABULARY,
    WINDOWS,
    family_model,
    options,
    save_family,
    write_text,
)
from safetensors.torch import load_file
from torch import nn

from pifa_deploy.calibration import calibration_set
from pifa_deploy.checkpoint import validate
from pifa_deploy.compression import ReconstructionOptions, compress_model
from pifa_deploy.compression.decoder import (
    LayerCall,
    decoder_layers,
    linear_groups,
    linear_shapes,
    record_calls,
    returns_tuple,
    same_calls,
)
from pifa_deploy.density import rank_for_density
from pifa_deploy.errors import InputRefusedError, StageFailedError
from pifa_deploy.model_folder import load_model, load_tokenizer

every_family = pytest.mark.parametrize("kind", FAMILIES)


def tokens(windows: int = 3, length: int = 29, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


def recorded(model: Any, ids: torch.Tensor) -> tuple[nn.ModuleList, torch.Tensor, list[LayerCall]]:
    _, layers = decoder_layers(model, "model")
    return layers, *record_calls(model, layers, ids, as_tuple=returns_tuple(model, layers))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


# How a model calls its layers


@every_family
def test_the_decoder_layers_are_found(kind: str) -> None:
    path, layers = decoder_layers(family_model(kind), "model")
    assert path == FAMILIES[kind].layers
    assert len(layers) == LAYERS


@every_family
def test_layers_called_one_by_one_compute_the_models_own_hidden_states(kind: str) -> None:
    model, ids = family_model(kind), tokens()
    layers, hidden, calls = recorded(model, ids)
    outputs: list[torch.Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(note) for layer in layers]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    for layer, call, expected in zip(layers, calls, outputs, strict=True):
        with torch.no_grad():
            hidden = call.run(layer, hidden)
        assert torch.equal(hidden, expected)


@every_family
def test_recording_leaves_the_model_as_it_was(kind: str) -> None:
    model, ids = family_model(kind), tokens()
    before = logits(model, ids)
    layers, _, _ = recorded(model, ids)
    assert torch.equal(logits(model, ids), before)
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in layers)


@every_family
def test_calls_depend_on_the_shape_of_a_batch_and_not_on_its_text(kind: str) -> None:
    model = family_model(kind)
    (_, _, one), (_, _, other), (_, _, shorter) = (
        recorded(model, tokens(length=length, seed=seed)) for length, seed in ((29, 0), (29, 1), (20, 0))
    )
    assert same_calls(one, other)
    assert not same_calls(one, shorter)


def test_layers_in_another_dtype_than_the_rest_are_recorded() -> None:
    model = family_model("llama")
    _, layers = decoder_layers(model, "model")
    expected = recorded(model, tokens())[1]
    layers.to(torch.bfloat16)
    _, hidden, calls = recorded(model, tokens())
    assert torch.equal(hidden, expected)
    assert len(calls) == LAYERS
    assert {parameter.dtype for parameter in layers.parameters()} == {torch.bfloat16}


def test_a_model_that_skips_a_layer_is_refused() -> None:
    model = family_model("llama")
    _, layers = decoder_layers(model, "model")
    model.config.num_hidden_layers = LAYERS - 1
    with pytest.raises(StageFailedError, match="LlamaForCausalLM called 2 of its 3 decoder layers; expected each once"):
        record_calls(model, layers, tokens(), as_tuple=False)


def test_layers_that_need_more_of_the_text_than_hidden_states_are_refused(tmp_path: Path) -> None:
    # Gemma 3n hands every layer an embedding of the tokens of its own.
    config = transformers.Gemma3nTextConfig(
        **{**HEADS, "num_hidden_layers": 2, "intermediate_size": [56, 56]},
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 2,
        laurel_rank=4,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    small_tokenizer().save_pretrained(tmp_path / "dense")
    message = "Gemma3nForCausalLM passes its decoder layers what depends on the text beside hidden states"
    with pytest.raises(InputRefusedError, match=message):
        compress_model(tmp_path / "dense", tmp_path / "out", options(write_text(tmp_path / "text")))
    assert not (tmp_path / "out").exists()


def test_a_model_without_linear_layers_is_refused() -> None:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, bos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputRefusedError, match=r"here: GPT2LMHeadModel has no nn\.Linear layers to factorise"):
        decoder_layers(model, "here")


# Which linears there are


@every_family
def test_linears_that_read_the_same_tensor_form_a_group(kind: str) -> None:
    model = family_model(kind)
    layers, hidden, calls = recorded(model, tokens())
    for layer, call in zip(layers, calls, strict=True):
        groups = linear_groups(layer, call, hidden)
        assert [group.names for group in groups] == FAMILIES[kind].groups
        for group in groups:
            assert {layer.get_submodule(name).in_features for name in group.names} == {group.in_features}
        assert not any(module._forward_pre_hooks for module in layer.modules())


def test_a_linear_that_is_never_called_is_in_no_group() -> None:
    model = family_model("llama")
    layers, hidden, calls = recorded(model, tokens())
    layers[1].get_submodule("mlp").spare = nn.Linear(4, 4)
    groups = linear_groups(layers[1], calls[1], hidden)
    assert [group.names for group in groups] == FAMILIES["llama"].groups


@every_family
def test_all_linears_of_the_layers_are_compressed_and_none_outside(kind: str) -> None:
    model, family = family_model(kind), FAMILIES[kind]
    path, layers = decoder_layers(model, "model")
    shapes = linear_shapes(path, layers)
    expected = {f"{path}.{number}.{name}" for number in range(LAYERS) for names in family.groups for name in names}
    assert {shape.name for shape in shapes} == expected
    for shape in shapes:
        assert (shape.out_features, shape.in_features) == tuple(model.get_submodule(shape.name).weight.shape)
        assert shape.name.startswith(f"{path}.{shape.layer}.")
        assert shape.kind == ("attention" if "att" in shape.name else "mlp")


def test_patterns_choose_linears() -> None:
    path, layers = decoder_layers(family_model("llama"), "model")

    def names(**patterns: tuple[str, ...]) -> list[str]:
        return [shape.name for shape in linear_shapes(path, layers, **patterns)]

    assert names(include=("*.1.self_attn.?_proj",)) == [f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"]
    assert names(include=("*mlp*",), exclude=("*.0.*", "*down*")) == [
        f"model.layers.{number}.mlp.{x}_proj" for number in (1, 2) for x in ("gate", "up")
    ]
    assert len(names(exclude=("*up_proj",))) == 6 * LAYERS
    with pytest.raises(ValueError, match=r"include \['\*expert\*'\] and exclude \[\] leave no linear.*layers\.0\.self"):
        names(include=("*expert*",))


def test_a_router_of_experts_is_no_linear() -> None:
    config = transformers.Llama4TextConfig(**HEADS, num_local_experts=4, intermediate_size_mlp=56, moe_layers=[1])
    path, layers = decoder_layers(transformers.AutoModelForCausalLM.from_config(config), "model")
    assert isinstance(layers[1].get_submodule("feed_forward.router"), nn.Linear)
    assert not [shape.name for shape in linear_shapes(path, layers) if shape.name.endswith("router")]


# Whole models


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made(kind, method, density)` gives a compressed folder; without a method the dense one."""
    root = tmp_path_factory.mktemp("families")
    text = write_text(root / "text.txt")
    near = ReconstructionOptions(dense_share=1.0, ridge=1e-3)

    @functools.cache
    def make(kind: str, method: str = "", density: float = 0.0) -> Path:
        folder = root / f"{kind} {method} {density}"
        if not method:
            return save_family(folder, kind)
        chosen = {"reconstruction": near} if method == "mpifa" else {}
        compress_model(make(kind), folder, options(text, method=method, density=density, **chosen))
        return folder

    return make


@every_family
def test_a_compressed_model_loads_with_the_ranks_asked_for_and_keeps_all_else(
    kind: str, made: Callable[..., Path]
) -> None:
    folder, dense = made(kind, "mpifa", 0.6), family_model(kind)
    path, layers = decoder_layers(dense, "model")
    record = validate(folder)
    assert record.modules.keys() == {shape.name for shape in linear_shapes(path, layers)}
    for spec in record.modules.values():
        assert spec.rank == rank_for_density(spec.out_features, spec.in_features, 0.6)
    found, expected = load_model(folder, dtype=None).state_dict(), dense.state_dict()
    kept = expected.keys() - {f"{name}.weight" for name in record.modules}
    assert any("embed" in name for name in kept)
    assert {f"{name}.bias" for name in record.modules if f"{name}.bias" in expected} <= kept
    for name in kept:
        assert torch.equal(found[name], expected[name]), name
    stored = load_file(folder / "model.safetensors")
    assert not {f"{name}.weight" for name in record.modules} & stored.keys()
    # Names of the record and names of tensors are those of the same modules.
    assert stored.keys() <= found.keys()


def calibration_error(kind: str, folder: Path, dense: Path) -> float:
    """Returns the relative error of the logits on the calibration text."""
    text = dense.parent / "text.txt"
    ids = calibration_set([str(text)], load_tokenizer(dense), WINDOWS).windows
    expected = logits(family_model(kind), ids)
    return float((logits(load_model(folder, dtype=torch.float32), ids) - expected).norm() / expected.norm())


@every_family
def test_each_method_is_nearer_the_dense_logits_than_the_simpler_one(kind: str, made: Callable[..., Path]) -> None:
    svd, whitened, mpifa = (
        calibration_error(kind, made(kind, method, 0.6), made(kind)) for method in ("svd", "whitened", "mpifa")
    )
    assert mpifa < 0.95 * whitened
    assert whitened < 0.95 * svd


@every_family
def test_at_a_density_near_one_the_logits_stay_near_the_dense_ones(kind: str, made: Callable[..., Path]) -> None:
    near, far = (calibration_error(kind, made(kind, "mpifa", density), made(kind)) for density in (0.99, 0.6))
    assert near < 0.02
    assert near < 0.2 * far
