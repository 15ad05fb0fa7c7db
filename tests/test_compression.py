"""Factorising a model: optimal truncation, exact statistics, and a checkpoint that holds what was asked for."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import CHAT_TEMPLATE, Q_PROJ, SIZES, content, passage, save_dense, small_model, small_tokenizer
from safetensors.torch import load_file
from torch import nn

from pifa_deploy.calibration import CALIBRATION_TEXT, CalibrationOptions, random_windows, token_ids
from pifa_deploy.checkpoint import validate
from pifa_deploy.compression import CompressOptions, compress_model, target_layers
from pifa_deploy.compression.statistics import input_moments
from pifa_deploy.compression.truncation import truncated_svd, whitened_svd
from pifa_deploy.density import low_rank_rank_for_density, rank_for_density
from pifa_deploy.errors import FactorizationError, InputRefusedError, StageFailedError
from pifa_deploy.linear import LowRankLinear, PifaLinear
from pifa_deploy.model_folder import load_model, load_tokenizer

pytest_plugins = ("cli_plugin",)

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 9), (9, 1)]
WINDOWS = CalibrationOptions(samples=8, sequence_length=64)


def inputs(features: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Returns X [n, tokens] float64 with features of very different sizes, mixed."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((features, features)) * np.logspace(1, -2, features)
    return mix @ random.standard_normal((features, tokens))


def textbook(weight: np.ndarray, x: np.ndarray, rank: int) -> np.ndarray:
    """Returns the product of SVD-LLM as published: SVD of W S with S the Cholesky factor of X X^T."""
    factor = np.linalg.cholesky(x @ x.T)
    u, s, v = np.linalg.svd(weight @ factor, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(factor)


def product(pair: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    return (pair[0] @ pair[1]).numpy()


def ranks(shape: tuple[int, int]) -> list[int]:
    return sorted({1, min(shape) // 2 or 1, min(shape)})


# Rounding of float64 work on matrices of this size, relative to the size of the whole output. The moments
# square the spectrum of the inputs, so that half of the digits carry the smallest directions.
ROUNDING = 1e-8


@pytest.mark.parametrize(("shape", "rank"), [(shape, rank) for shape in SHAPES for rank in ranks(shape)])
def test_whitened_truncation_is_as_good_as_the_textbook_optimum(shape: tuple[int, int], rank: int) -> None:
    weight = np.random.default_rng(1).standard_normal(shape)
    x = inputs(shape[1], 5 * shape[1] + 3)
    found = product(whitened_svd(torch.from_numpy(weight), torch.from_numpy(x @ x.T), rank))
    spectrum = np.linalg.svd(weight @ x, compute_uv=False)
    optimum = np.linalg.norm(spectrum[rank:])  # Eckart-Young on the outputs themselves
    scale = np.linalg.norm(spectrum)
    for result in (found, textbook(weight, x, rank)):
        assert abs(np.linalg.norm((weight - result) @ x) - optimum) <= ROUNDING * scale


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("tokens", [1, 5])
def test_with_fewer_tokens_than_features_it_stays_finite_and_optimal(shape: tuple[int, int], tokens: int) -> None:
    weight = np.random.default_rng(2).standard_normal(shape)
    x = inputs(shape[1], tokens)
    moment = torch.from_numpy(x @ x.T)
    for rank in (1, 4, min(shape)):
        found = product(whitened_svd(torch.from_numpy(weight), moment, rank))
        assert np.isfinite(found).all()
        error = np.linalg.norm((weight - found) @ x)
        plain = np.linalg.norm((weight - product(truncated_svd(torch.from_numpy(weight), rank))) @ x)
        scale = np.linalg.norm(weight @ x)
        optimum = np.linalg.norm(np.linalg.svd(weight @ x, compute_uv=False)[rank:])
        assert error <= optimum + ROUNDING * scale
        assert error <= plain + ROUNDING * scale


def test_directions_that_no_token_had_are_truncated_as_by_plain_svd() -> None:
    random = np.random.default_rng(5)
    rows, columns, tokens, rank = 120, 100, 10, 50
    left = np.linalg.qr(random.standard_normal((rows, columns)))[0]
    right = np.linalg.qr(random.standard_normal((columns, columns)))[0]
    weight = left * np.logspace(0, -4, columns) @ right
    x = random.standard_normal((columns, tokens))
    found = product(whitened_svd(torch.from_numpy(weight), torch.from_numpy(x @ x.T), rank))
    # What tokens take of the rank at most, the rest has for the plain truncation of what is left.
    allowed = np.linalg.norm(np.linalg.svd(weight, compute_uv=False)[rank - tokens :])
    assert np.linalg.norm(weight - found) <= allowed


def test_no_input_at_all_gives_finite_factors() -> None:
    u, v = whitened_svd(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 8), 3)
    assert bool(torch.isfinite(u).all() & torch.isfinite(v).all())


@pytest.mark.parametrize(("shape", "rank"), [(shape, rank) for shape in SHAPES for rank in ranks(shape)])
def test_plain_truncation_is_the_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    weight = np.random.default_rng(3).standard_normal(shape)
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    u_found, v_found = truncated_svd(torch.from_numpy(weight), rank)
    assert u_found.shape == (shape[0], rank)
    assert v_found.shape == (rank, shape[1])
    np.testing.assert_allclose(product((u_found, v_found)), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-12)


# Statistics


@functools.cache
def windows() -> torch.Tensor:
    ids = token_ids(passage(CALIBRATION_TEXT, 8000), small_tokenizer())
    return random_windows(ids, WINDOWS)


def hooked_moments(model: Any, names: list[str]) -> dict[str, np.ndarray]:
    """Returns X^T X of every module on its own, summed in float64."""
    found: dict[str, np.ndarray] = {}

    def collect(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = args[0].numpy().astype(np.float64).reshape(-1, args[0].shape[-1])
            found[name] = found.get(name, 0) + x.T @ x

        return hook

    handles = [model.get_submodule(name).register_forward_hook(collect(name)) for name in names]
    with torch.no_grad():
        for batch in windows().split(3):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_moments_are_those_of_each_layers_own_inputs(kind: str) -> None:
    model = small_model(kind)
    layers = target_layers(model, "model")
    expected = hooked_moments(model, list(layers))
    found = input_moments(model, layers, windows(), batch_size=3)
    assert found.keys() == expected.keys() == layers.keys()
    for name, moment in found.items():
        assert moment.dtype == torch.float64
        # A float32 sum of n products is off by at most n * eps * sum |products|.
        tokens = 3 * WINDOWS.sequence_length
        bound = (
            tokens * np.finfo(np.float32).eps * np.sqrt(np.outer(expected[name].diagonal(), expected[name].diagonal()))
        )
        assert (np.abs(moment.numpy() - expected[name]) <= bound).all(), name


def test_layers_with_the_same_input_share_one_matrix() -> None:
    model = small_model()
    found = input_moments(model, target_layers(model, "model"), windows())
    distinct = {id(moment) for moment in found.values()}
    assert len(distinct) == 4 * SIZES["num_hidden_layers"]  # q k v | o | gate up | down
    layer = "model.layers.1"
    assert found[f"{layer}.self_attn.q_proj"] is found[f"{layer}.self_attn.v_proj"]
    assert found[f"{layer}.mlp.gate_proj"] is found[f"{layer}.mlp.up_proj"]
    assert found[f"{layer}.self_attn.o_proj"] is not found[f"{layer}.self_attn.q_proj"]


def test_hooks_are_gone_afterwards_even_when_the_model_fails() -> None:
    model = small_model()
    layers = target_layers(model, "model")
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[SIZES["vocab_size"]]]))
    with pytest.raises(InputRefusedError, match=r"token 384 .*the model knows 0 \.\. 383"):
        input_moments(model, layers, torch.tensor([[1, SIZES["vocab_size"]]]))
    input_moments(model, layers, windows()[:1])
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_activations_that_are_not_finite_name_the_layer() -> None:
    model = small_model()
    with torch.no_grad():
        model.get_submodule("model.layers.1.input_layernorm").weight[3] = np.inf
    with pytest.raises(StageFailedError, match=r"model\.layers\.1\.self_attn\.q_proj saw NaN or Inf activations"):
        input_moments(model, target_layers(model, "model"), windows()[:1])


def test_a_layer_that_is_never_called_is_named() -> None:
    model = small_model()
    model.spare = nn.Linear(4, 4)
    with pytest.raises(StageFailedError, match="spare was never called in calibration"):
        input_moments(model, target_layers(model, "model"), windows()[:1])


# Whole models


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(passage(CALIBRATION_TEXT, 8000), encoding="utf-8")
    return path


def whitened(calibration: Path, **changes: Any) -> CompressOptions:
    return CompressOptions(**{"density": 0.6, "calibration": (calibration,), "windows": WINDOWS, **changes})


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("format_", ["pifa", "lowrank"])
def test_a_compressed_model_holds_what_was_asked_for(
    kind: str, format_: str, calibration: Path, tmp_path: Path
) -> None:
    source = save_dense(tmp_path / "dense", kind)
    summary = compress_model(source, tmp_path / "out", whitened(calibration, format=format_))
    record, dense, stored = (
        validate(tmp_path / "out"),
        small_model(kind),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    targets = target_layers(dense, kind)
    assert record.modules.keys() == targets.keys()
    assert "lm_head" not in record.modules
    size_of = {"pifa": rank_for_density, "lowrank": low_rank_rank_for_density}[format_]
    for name, spec in record.modules.items():
        shape = (spec.out_features, spec.in_features)
        assert shape == tuple(targets[name].weight.shape)
        assert (spec.format, spec.rank) == (format_, size_of(*shape, 0.6))
        assert spec.parameters() <= 0.6 * math.prod(shape)  # never above the budget, and one more rank would be
        assert spec.parameters() + sum(shape) > 0.6 * math.prod(shape) - spec.rank
    state = dense.state_dict()
    kept = [name for name in state if not any(name == f"{module}.weight" for module in targets)]
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(kept)
    for name in kept:  # head, embedding, norms and biases, bit for bit
        assert torch.equal(stored[name], state[name]), name
    assert any(name.endswith("q_proj.bias") for name in kept) == (kind == "qwen2")
    assert summary.modules == len(targets)
    assert summary.dense_parameters == sum(tensor.numel() for tensor in state.values())
    assert summary.module_density <= 0.6
    assert summary.parameters == sum(t.numel() for name, t in stored.items() if not name.endswith("pivot_rows"))


@pytest.mark.parametrize("format_", ["pifa", "lowrank"])
def test_the_written_model_computes_the_truncated_products(format_: str, calibration: Path, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", "qwen2")
    compress_model(source, tmp_path / "out", whitened(calibration, format=format_))
    dense = small_model("qwen2")
    layers = target_layers(dense, "model")
    moments = input_moments(dense, layers, windows())
    record = validate(tmp_path / "out")
    truth = small_model("qwen2").double()
    for name, layer in layers.items():
        pair = whitened_svd(layer.weight.detach(), moments[name], record.modules[name].rank)
        truth.get_submodule(name).weight.data = pair[0] @ pair[1]
    found = load_model(tmp_path / "out", dtype=torch.float32)
    exact = load_model(tmp_path / "out", dtype=torch.float64)
    with torch.no_grad():
        expected = truth(input_ids=windows()).logits
        plain = small_model("qwen2").double()(input_ids=windows()).logits
        for model, digits in ((found, 1e-4), (exact, 1e-5)):
            error = (model(input_ids=windows()).logits - expected).norm() / expected.norm()
            assert error < digits  # float32 storage, grown by |C| and the layers
    assert (plain - expected).norm() / expected.norm() > 1e-2  # the comparison can fail


def test_the_tokenizer_and_its_chat_template_come_along(calibration: Path, tmp_path: Path, dense: Path) -> None:
    compress_model(dense, tmp_path / "out", whitened(calibration))
    carried, text = load_tokenizer(tmp_path / "out"), "It is a truth, universally acknowledged."
    assert carried.chat_template == CHAT_TEMPLATE
    assert carried(text).input_ids == small_tokenizer()(text).input_ids


def test_config_json_records_how_it_was_made(calibration: Path, tmp_path: Path, dense: Path) -> None:
    compress_model(dense, tmp_path / "out", whitened(calibration, rank_multiple=4))
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (written["source"], written["density"]) == ("whitened", 0.6)
    assert written["details"] == {
        "calibration": ["calibration.txt"],
        "rank_multiple": 4,
        "samples": 8,
        "seed": 0,
        "sequence_length": 64,
    }
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("format_", ["pifa", "lowrank"])
def test_two_runs_write_the_same_bytes(format_: str, calibration: Path, tmp_path: Path, dense: Path) -> None:
    for name in ("one", "two"):
        compress_model(dense, tmp_path / name, whitened(calibration, format=format_))
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_another_seed_gives_other_factors(calibration: Path, tmp_path: Path, dense: Path) -> None:
    for seed in (0, 1):
        other = CalibrationOptions(samples=2, sequence_length=32, seed=seed)
        compress_model(dense, tmp_path / str(seed), whitened(calibration, windows=other))
    one, two = (load_file(tmp_path / name / "model.safetensors")[f"{Q_PROJ}.pivot_weight"] for name in "01")
    assert not torch.equal(one, two)


def test_ranks_are_multiples_on_request_and_the_density_reached_is_told(tmp_path: Path, dense: Path) -> None:
    options = {"density": 0.6, "method": "svd"}
    free = compress_model(dense, tmp_path / "free", CompressOptions(**options))
    rounded = compress_model(dense, tmp_path / "rounded", CompressOptions(**options, rank_multiple=8))
    found = validate(tmp_path / "rounded").modules
    assert all(spec.rank % 8 == 0 for spec in found.values())
    assert all(spec.rank <= validate(tmp_path / "free").modules[name].rank for name, spec in found.items())
    reached = sum(spec.parameters() for spec in found.values())
    assert rounded.module_density == reached / sum(spec.in_features * spec.out_features for spec in found.values())
    assert rounded.module_density < free.module_density <= 0.6


@pytest.mark.parametrize(("flag", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_weights_are_stored_in_the_asked_dtype(flag: str, dtype: torch.dtype, tmp_path: Path, dense: Path) -> None:
    compress_model(dense, tmp_path / "out", CompressOptions(density=0.6, method="svd", dtype=flag))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    floats = {tensor.dtype for name, tensor in stored.items() if not name.endswith("pivot_rows")}
    assert floats == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_whitening_beats_plain_truncation_on_the_calibration_inputs_of_every_layer() -> None:
    model = small_model()
    layers = target_layers(model, "model")
    moments = input_moments(model, layers, windows())
    for name, layer in layers.items():
        weight, moment = layer.weight.detach().double(), moments[name]
        rank = rank_for_density(*weight.shape, 0.5)

        def error(pair: tuple[torch.Tensor, torch.Tensor], weight: Any = weight, moment: Any = moment) -> float:
            miss = weight - pair[0] @ pair[1]
            return math.sqrt(float((miss @ moment * miss).sum()))  # ||(W - U V) X||_F

        plain, white = error(truncated_svd(weight, rank)), error(whitened_svd(weight, moment, rank))
        assert white < plain, name


def test_both_formats_are_modules_of_their_kind(calibration: Path, tmp_path: Path, dense: Path) -> None:
    for format_, kind in (("pifa", PifaLinear), ("lowrank", LowRankLinear)):
        compress_model(dense, tmp_path / format_, whitened(calibration, format=format_))
        assert isinstance(load_model(tmp_path / format_, dtype=torch.float32).get_submodule(Q_PROJ), kind)


def test_a_layer_without_usable_factors_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = small_model()
    model.get_submodule(Q_PROJ).weight.data.fill_(6e4)  # sixfold in one factor: beyond float16
    model.get_submodule(Q_PROJ).weight.data[0] *= 4
    model.save_pretrained(tmp_path / "dense")
    options = CompressOptions(density=0.5, method="svd", dtype="fp16")
    with pytest.raises(FactorizationError, match=rf"{Q_PROJ}: the pivot rows of .* overflow torch\.float16"):
        compress_model(tmp_path / "dense", tmp_path / "out", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.0}, "density is 0.0, expected 0 < density < 1"),
        ({"density": 1.0}, "density is 1.0, expected"),
        ({"density": float("nan")}, "density is nan, expected"),
        ({"method": "magic"}, "method is 'magic', expected one of"),
        ({"method": "whitened"}, "method whitened needs calibration text; pass --calibration FILE"),
        ({"format": "zip"}, "format is 'zip', expected one of"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of"),
        ({"rank_multiple": 0}, "rank_multiple is 0, expected at least 1"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressOptions(**{"density": 0.5, "method": "svd", **fields})


def test_a_factorised_model_is_not_factorised_again(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(InputRefusedError, match="is factorised already; give the dense model"):
        compress_model(checkpoint, tmp_path / "out", CompressOptions(density=0.5, method="svd"))
