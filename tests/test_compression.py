"""Compressing a model: optimal truncation, and a checkpoint that holds what was asked for, or nothing at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import (
    CHAT_TEMPLATE,
    Q_PROJ,
    SIZES,
    content,
    passage,
    save_dense,
    small_model,
    small_tokenizer,
)
from safetensors.torch import load_file
from torch import nn

import pifa_deploy.compression
from pifa_deploy.calibration import CALIBRATION_TEXT, CalibrationOptions, calibration_set
from pifa_deploy.checkpoint import validate
from pifa_deploy.compression import (
    METHODS,
    ActivationOptions,
    CompressOptions,
    LayerReport,
    ReconstructionOptions,
    compress_model,
)
from pifa_deploy.compression.truncation import truncated_svd, whitened_svd
from pifa_deploy.density import low_rank_rank_for_density, rank_for_density
from pifa_deploy.errors import (
    FactorizationError,
    InputRefusedError,
    OutputExistsError,
    PifaDeployError,
    StageFailedError,
)
from pifa_deploy.linear import LowRankLinear, PifaLinear
from pifa_deploy.model_folder import load_model, load_tokenizer

pytest_plugins = ("cli_plugin",)

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 9), (9, 1)]
WINDOWS = CalibrationOptions(samples=8, sequence_length=64)
LAYERS, HIDDEN, INNER = (SIZES[name] or 0 for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))


def inputs(features: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Returns X [n, tokens] float64 with features of very different sizes, mixed."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((features, features)) * np.logspace(1, -2, features)
    return np.asarray(mix @ random.standard_normal((features, tokens)))


def textbook(weight: np.ndarray, x: np.ndarray, rank: int) -> np.ndarray:
    """Returns the product of SVD-LLM as published: SVD of W S with S the Cholesky factor of X X^T."""
    factor = np.linalg.cholesky(x @ x.T)
    u, s, v = np.linalg.svd(weight @ factor, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(factor))


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


# Whole models


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(passage(CALIBRATION_TEXT, 8000), encoding="utf-8")
    return str(path)


def asked(text: str, **changes: Any) -> CompressOptions:
    # Layers are compared one by one with what they replace, features in their places.
    fields: dict[str, Any] = {"density": 0.6, "layout": "pivoted", "calibration": (text,), "windows": WINDOWS}
    fields["device"] = "cpu"
    return CompressOptions(**fields | changes)


def targets(model: Any) -> dict[str, nn.Linear]:
    """Returns the linears that are compressed when nothing else is said: all but the output head."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize(("method", "format_"), [("mpifa", "pifa"), ("mpifa", "lowrank"), ("whitened", "pifa")])
def test_a_compressed_model_holds_what_was_asked_for(
    method: str, format_: str, kind: str, calibration: str, tmp_path: Path
) -> None:
    source = save_dense(tmp_path / "dense", kind)
    summary = compress_model(source, tmp_path / "out", asked(calibration, method=method, format=format_))
    record, dense = validate(tmp_path / "out"), small_model(kind)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    linears = targets(dense)
    assert record.modules.keys() == linears.keys()
    size_of = {"pifa": rank_for_density, "lowrank": low_rank_rank_for_density}[format_]
    for name, spec in record.modules.items():
        shape = (spec.out_features, spec.in_features)
        assert shape == tuple(linears[name].weight.shape)
        assert (spec.format, spec.rank) == (format_, size_of(*shape, 0.6))
        assert spec.parameters() <= 0.6 * math.prod(shape)  # never above the budget, and one more rank would be
        assert spec.parameters() + sum(shape) > 0.6 * math.prod(shape) - spec.rank
    state = dense.state_dict()
    kept = [name for name in state if not any(name == f"{module}.weight" for module in linears)]
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(kept)
    for name in kept:  # head, embedding, norms and biases, bit for bit
        assert torch.equal(stored[name], state[name]), name
    assert any(name.endswith("q_proj.bias") for name in kept) == (kind == "qwen2")
    assert (summary.path, summary.modules, summary.dense) == (str(tmp_path / "out"), len(linears), {})
    assert summary.dense_parameters == sum(tensor.numel() for tensor in state.values())
    numbers = sum(spec.parameters() for spec in record.modules.values())
    assert summary.module_density == numbers / sum(layer.weight.numel() for layer in linears.values()) <= 0.6
    assert summary.parameters == sum(t.numel() for name, t in stored.items() if not name.endswith("pivot_rows"))
    largest = max((float(t.abs().max()) for name, t in stored.items() if name.endswith("coefficients")), default=0.0)
    assert summary.layout.max_coefficient == pytest.approx(largest)


@pytest.mark.parametrize("format_", ["pifa", "lowrank"])
def test_the_written_model_computes_the_truncated_products(format_: str, calibration: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", "qwen2")
    compress_model(source, tmp_path / "out", asked(calibration, method="whitened", format=format_))
    windows = calibration_set([calibration], small_tokenizer(), WINDOWS).windows
    truth, modules = small_model("qwen2").double(), validate(tmp_path / "out").modules
    moments: dict[str, torch.Tensor] = {}

    def collect(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            moments[name] = x.T @ x

        return hook

    for name, layer in targets(truth).items():
        layer.register_forward_pre_hook(collect(name))
    with torch.no_grad():
        plain = truth(input_ids=windows).logits
        for name, layer in targets(truth).items():
            pair = whitened_svd(layer.weight.detach(), moments[name], modules[name].rank)
            layer.weight.data = pair[0] @ pair[1]
        expected = truth(input_ids=windows).logits
        for dtype in (torch.float32, torch.float64):
            found = load_model(tmp_path / "out", dtype=dtype)(input_ids=windows).logits
            # float32 storage and statistics, grown by |C| and the layers.
            assert (found - expected).norm() < 1e-4 * expected.norm()
    assert (plain - expected).norm() > 1e-2 * expected.norm()  # the comparison can fail


def test_the_tokenizer_and_its_chat_template_come_along(calibration: str, tmp_path: Path, dense: Path) -> None:
    compress_model(dense, tmp_path / "out", asked(calibration))
    carried, text = load_tokenizer(tmp_path / "out"), "It is a truth, universally acknowledged."
    assert carried.chat_template == CHAT_TEMPLATE
    assert carried(text).input_ids == small_tokenizer()(text).input_ids


def test_config_json_records_how_it_was_made(calibration: str, tmp_path: Path, dense: Path) -> None:
    chosen = asked(calibration, rank_multiple=4, attention_density=0.5)
    summary = compress_model(dense, tmp_path / "out", chosen)
    assert summary.layout is not None
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (written["source"], written["density"]) == ("mpifa", 0.6)
    found = calibration_set([calibration], small_tokenizer(), WINDOWS)
    assert written["details"] == {
        "calibration": [dict(entry) for entry in found.record],
        "samples": 8,
        "sequence_length": 64,
        "seed": 0,
        "reconstruction": asdict(ReconstructionOptions()),
        "format": "pifa",
        "layout": {"asked": "pivoted", **asdict(summary.layout)},
        "rank_multiple": 4,
        "attention_density": 0.5,
        "layer_density": "uniform",
        "left_dense": {},
    }
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_without_text_no_text_is_recorded(calibration: str, tmp_path: Path, dense: Path) -> None:
    compress_model(dense, tmp_path / "out", asked(calibration, method="svd"))
    details = validate(tmp_path / "out").details
    assert details["calibration"] == []
    assert "reconstruction" not in details


def test_a_linear_without_a_rank_that_saves_anything_stays_dense_and_is_told(
    calibration: str, tmp_path: Path, dense: Path
) -> None:
    # k and v are 24 x 48 here: the smallest multiple of 24 stores more than they do.
    summary = compress_model(dense, tmp_path / "out", asked(calibration, rank_multiple=24, density=0.85))
    names = {f"model.layers.{layer}.self_attn.{x}_proj" for layer in range(LAYERS) for x in "kv"}
    assert summary.dense.keys() == names == validate(tmp_path / "out").details["left_dense"].keys()
    assert all("24 x 48 has no multiple of 24 as rank" in reason for reason in summary.dense.values())
    found, state = load_file(tmp_path / "out" / "model.safetensors"), small_model().state_dict()
    assert all(torch.equal(found[f"{name}.weight"], state[f"{name}.weight"]) for name in names)
    assert summary.modules == 5 * LAYERS
    assert summary.module_density <= 0.85


@pytest.mark.parametrize(("method", "format_"), [("mpifa", "pifa"), ("mpifa", "lowrank"), ("svd", "pifa")])
def test_two_runs_write_the_same_bytes(
    method: str, format_: str, calibration: str, tmp_path: Path, dense: Path
) -> None:
    for name in ("one", "two"):
        compress_model(dense, tmp_path / name, asked(calibration, method=method, format=format_))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]  # and nothing beside them


def test_another_seed_gives_other_factors(calibration: str, tmp_path: Path, dense: Path) -> None:
    for seed in (0, 1):
        other = CalibrationOptions(samples=2, sequence_length=32, seed=seed)
        compress_model(dense, tmp_path / str(seed), asked(calibration, windows=other))
    one, two = (load_file(tmp_path / name / "model.safetensors")[f"{Q_PROJ}.pivot_weight"] for name in "01")
    assert not torch.equal(one, two)


def test_several_sources_calibrate_together(calibration: str, tmp_path: Path, dense: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text(passage(CALIBRATION_TEXT, 3000))
    compress_model(dense, tmp_path / "out", asked(calibration, calibration=(calibration, str(tmp_path / "folder"))))
    found = validate(tmp_path / "out").details["calibration"]
    assert [(entry["name"], len(entry["windows"])) for entry in found] == [("calibration.txt", 4), ("folder", 4)]


def test_ranks_are_multiples_on_request_and_the_density_reached_is_told(tmp_path: Path, dense: Path) -> None:
    free = compress_model(dense, tmp_path / "free", CompressOptions(density=0.6, method="svd"))
    rounded = compress_model(dense, tmp_path / "rounded", CompressOptions(density=0.6, method="svd", rank_multiple=8))
    found, unrounded = (validate(tmp_path / name).modules for name in ("rounded", "free"))
    assert all(spec.rank % 8 == 0 for spec in found.values())
    assert all(spec.rank <= unrounded[name].rank for name, spec in found.items())
    reached = sum(spec.parameters() for spec in found.values())
    assert rounded.module_density == reached / sum(spec.in_features * spec.out_features for spec in found.values())
    assert rounded.module_density < free.module_density <= 0.6


@pytest.mark.parametrize("format_", ["pifa", "lowrank"])
@pytest.mark.parametrize(("flag", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_weights_are_stored_in_the_asked_dtype(
    flag: str, dtype: torch.dtype, format_: str, calibration: str, tmp_path: Path, dense: Path
) -> None:
    compress_model(dense, tmp_path / "out", asked(calibration, dtype=flag, format=format_))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    floats = {tensor.dtype for name, tensor in stored.items() if not name.endswith("pivot_rows")}
    assert floats == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_later_layers_see_the_factors_as_they_are_rounded(calibration: str, tmp_path: Path, dense: Path) -> None:
    for flag in ("fp32", "bf16"):
        compress_model(dense, tmp_path / flag, asked(calibration, dtype=flag))
    wide, narrow = (load_file(tmp_path / flag / "model.safetensors") for flag in ("fp32", "bf16"))
    first, last = (f"model.layers.{layer}.self_attn.q_proj.pivot_weight" for layer in (0, LAYERS - 1))
    assert torch.equal(wide[first].bfloat16(), narrow[first])  # on the same inputs
    assert not torch.equal(wide[last].bfloat16(), narrow[last])


def test_both_formats_are_modules_of_their_kind(calibration: str, tmp_path: Path, dense: Path) -> None:
    for format_, kind in (("pifa", PifaLinear), ("lowrank", LowRankLinear)):
        compress_model(dense, tmp_path / format_, asked(calibration, format=format_))
        assert isinstance(load_model(tmp_path / format_, dtype=torch.float32).get_submodule(Q_PROJ), kind)


def test_tied_embeddings_stay_tied(calibration: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", tie_word_embeddings=True)
    compress_model(source, tmp_path / "out", asked(calibration))
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    found = load_model(tmp_path / "out", dtype=None)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(found.lm_head.weight, load_model(source, dtype=None).lm_head.weight)


def test_where_the_time_went_adds_up(calibration: str, tmp_path: Path, dense: Path) -> None:
    summary = compress_model(dense, tmp_path / "out", asked(calibration))
    assert {"forward", "statistics", "solves", "pivoting", "other"} <= summary.shares.keys()
    assert sum(summary.shares.values()) == pytest.approx(1.0, abs=1e-2)
    assert summary.seconds > 0


def test_activations_of_two_flows_and_one_group_are_kept_at_most(calibration: str, tmp_path: Path, dense: Path) -> None:
    summary = compress_model(dense, tmp_path / "out", asked(calibration))
    tokens = WINDOWS.samples * WINDOWS.sequence_length
    # Both flows, the dense inputs of all four groups, and the remembered output of attention.
    groups = 3 * HIDDEN + INNER
    assert summary.activation_bytes <= 4 * tokens * (3 * HIDDEN + groups)
    assert compress_model(dense, tmp_path / "svd", asked(calibration, method="svd")).activation_bytes == 0


# What cannot be done


def test_a_linear_without_usable_factors_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = small_model()
    weight = model.get_submodule(Q_PROJ).weight.data
    weight.copy_(6.5e4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).sign())
    model.save_pretrained(tmp_path / "dense")  # within float16, but a truncation overshoots in places
    options = CompressOptions(density=0.5, method="svd", dtype="fp16")
    with pytest.raises(FactorizationError, match=rf"{Q_PROJ}: the pivot rows of .* overflow torch\.float16"):
        compress_model(tmp_path / "dense", tmp_path / "out", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


def test_weights_beyond_the_asked_dtype_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    model = small_model()
    model.get_submodule(Q_PROJ).weight.data[0, 0] = 7e4
    model.save_pretrained(tmp_path / "dense")
    options = CompressOptions(density=0.5, method="svd", dtype="fp16")
    with pytest.raises(InputRefusedError, match=rf"{Q_PROJ}.weight has NaN or Inf entries in torch\.float16"):
        compress_model(tmp_path / "dense", tmp_path / "out", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


Change = Callable[[Any], None]


def infinite_norm(model: Any) -> None:
    model.get_submodule("model.layers.0.post_attention_layernorm").weight.data.fill_(3e38)
    model.get_submodule("model.layers.0.mlp.gate_proj").weight.data.fill_(3e38)
    model.get_submodule("model.layers.0.mlp.up_proj").weight.data.fill_(3e38)


def silent_values(model: Any) -> None:
    model.get_submodule("model.layers.1.self_attn.v_proj").weight.data.zero_()


def spare_linear(model: Any) -> None:
    model.model.layers[1].mlp.spare = nn.Linear(8, 8)


LOST = r"layers?[. ]0.* NaN or Inf .*check the model"
FAILURES: dict[str, tuple[Change, dict[str, Any], str]] = {
    "activations overflow": (infinite_norm, {}, LOST),
    "activations overflow in a dense pass": (infinite_norm, {"method": "whitened"}, LOST),
    "a linear sees only zeros": (
        silent_values,
        {},
        r"model\.layers\.1\.self_attn\.o_proj saw only zeros in calibration.*--exclude",
    ),
    "a linear sees only zeros in a dense pass": (
        silent_values,
        {"method": "whitened"},
        r"model\.layers\.1\.self_attn\.o_proj saw only zeros in calibration.*--exclude",
    ),
    "a linear that the model never calls": (
        spare_linear,
        {},
        r"model\.layers\.1\.mlp\.spare was never called in calibration; leave it out with --exclude",
    ),
    "a ridge too small for the statistics": (
        lambda model: None,
        {
            "reconstruction": ReconstructionOptions(ridge=1e-300),
            "windows": CalibrationOptions(samples=1, sequence_length=8),
        },
        r"model\.layers\.0\.self_attn\.q_proj: its statistics are singular .*larger --ridge",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_statistics_that_cannot_be_used_name_the_linear(
    case: str, calibration: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, options, message = FAILURES[case]

    def load(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)
        change(model)
        return model

    monkeypatch.setattr(pifa_deploy.compression, "load_model", load)
    with pytest.raises(StageFailedError, match=message):
        compress_model(dense, tmp_path / "out", asked(calibration, **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_linear_is_no_obstacle(
    method: str, calibration: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero weights and dead outputs have factors too; `o_proj` is all zeros, `up_proj` mostly."""

    def load(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)
        model.get_submodule("model.layers.1.self_attn.o_proj").weight.data.zero_()
        model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3:].zero_()
        return model

    with monkeypatch.context() as patched:
        patched.setattr(pifa_deploy.compression, "load_model", load)
        compress_model(dense, tmp_path / "out", asked(calibration, method=method, density=0.5))
    found = load_model(tmp_path / "out", dtype=torch.float32)
    x = torch.randn(5, HIDDEN)
    with torch.no_grad():
        assert not found.get_submodule("model.layers.1.self_attn.o_proj")(x).any()
        assert found.get_submodule("model.layers.1.mlp.up_proj")(x)[:, 3:].abs().max() <= 1e-4


def test_windows_longer_than_the_models_positions_are_refused(calibration: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", max_position_embeddings=32)
    with pytest.raises(ValueError, match="windows have 64 tokens, the model has positions for 32; lower --sequence"):
        compress_model(source, tmp_path / "out", asked(calibration))


def test_a_tokenizer_of_another_model_is_refused(calibration: str, tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense", vocab_size=200)
    with pytest.raises(
        InputRefusedError, match=r"the tokenizer made token \d+ of the text, the model knows 0 \.\. 199"
    ):
        compress_model(source, tmp_path / "out", asked(calibration))


def test_a_density_without_a_rank_names_the_linear_before_any_work(tmp_path: Path, dense: Path) -> None:
    reports: list[LayerReport] = []
    with pytest.raises(ValueError, match=rf"{Q_PROJ}: density 0\.001 .* is the least that would do"):
        compress_model(dense, tmp_path / "out", CompressOptions(density=0.001, method="svd"), report=reports.append)
    assert not reports
    assert list(tmp_path.iterdir()) == []


def test_patterns_that_match_nothing_are_refused(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(ValueError, match=r"include \['expert'\] and exclude \[\] leave no linear to compress"):
        compress_model(dense, tmp_path / "out", CompressOptions(density=0.5, method="svd", include=("expert",)))


def test_a_factorised_model_is_not_factorised_again(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(InputRefusedError, match="is factorised already; give the dense model"):
        compress_model(checkpoint, tmp_path / "out", CompressOptions(density=0.5, method="svd"))


def test_an_output_is_replaced_only_on_request_and_by_a_whole_one(
    calibration: str, tmp_path: Path, dense: Path
) -> None:
    compress_model(dense, tmp_path / "out", CompressOptions(density=0.5, method="svd"))
    before = content(tmp_path / "out")
    with pytest.raises(OutputExistsError):
        compress_model(dense, tmp_path / "out", asked(calibration))
    with pytest.raises(PifaDeployError):
        compress_model(dense, tmp_path / "out", asked(calibration, calibration=("nowhere",), force=True))
    assert content(tmp_path / "out") == before
    compress_model(dense, tmp_path / "out", asked(calibration, force=True))
    assert validate(tmp_path / "out").source == "mpifa"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.0}, "density is 0.0, expected 0 < density < 1"),
        ({"density": 1.0}, "density is 1.0, expected"),
        ({"density": float("nan")}, "density is nan, expected"),
        ({"method": "magic"}, "method is 'magic', expected one of"),
        ({"method": "mpifa"}, "method mpifa needs calibration text; pass --calibration FILE"),
        ({"method": "whitened"}, "method whitened needs calibration text; pass --calibration FILE"),
        ({"layer_density": "owl"}, "method svd needs calibration text; pass --calibration FILE"),
        ({"layer_density": "round"}, "layer_density is 'round', expected one of"),
        ({"attention_density": 2.0}, "attention_density is 2.0, expected"),
        ({"format": "zip"}, "format is 'zip', expected one of"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of"),
        ({"rank_multiple": 0}, "rank_multiple is 0, expected at least 1"),
        ({"layout": "best"}, "layout is 'best', expected one of"),
        (
            {"reconstruction": ReconstructionOptions(ridge=0.5)},
            "method svd has no reconstruction; leave out --dense-share",
        ),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressOptions(**{"density": 0.5, "method": "svd", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8', expected one of"),
        ({"batch_tokens": 0}, "batch_tokens is 0, expected at least 1"),
    ],
    ids=str,
)
def test_activation_options_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationOptions(**fields)
