"""Layer after layer on what was stored before: every linear recomputed from passes of partly compressed models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import content
from family_fixtures import (
    FAMILIES,
    HIDDEN,
    LAYERS,
    WINDOWS,
    calibration_ids,
    family_model,
    inputs_of,
    options,
    save_family,
    seen_inputs,
    stored_weights,
    with_weights,
    write_text,
)
from reconstruction_fixtures import Problem
from safetensors.torch import load_file

from pifa_deploy.calibration import CalibrationOptions
from pifa_deploy.checkpoint import validate
from pifa_deploy.compression import ActivationOptions, CompressOptions, LayerReport, compress_model
from pifa_deploy.compression.allocation import allocate
from pifa_deploy.compression.decoder import decoder_layers, linear_shapes
from pifa_deploy.compression.flow import LayerFlow
from pifa_deploy.compression.reconstruction import ReconstructionOptions
from pifa_deploy.density import rank_for_density
from pifa_deploy.errors import StageFailedError
from pifa_deploy.model_folder import load_model

PAPER = ReconstructionOptions(dense_share=1.0, ridge=1e-3, ridge_shape="identity")
# Activations are float32; what they are off by is divided by the ridge at worst.
ROUNDING = 1e-4
SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("dense") / "llama", "llama")


def factorised(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the stored matrices of the factorised linears."""
    names = validate(folder).modules
    return {name: weight for name, weight in stored_weights(folder).items() if name in names}


def weight_of(kind: str, name: str) -> np.ndarray:
    weight: np.ndarray = family_model(kind).get_submodule(name).weight.detach().double().numpy()
    return weight


def dense_inputs(kind: str, stored: Mapping[str, torch.Tensor], text: Path) -> dict[str, np.ndarray]:
    return inputs_of(with_weights(kind, {}), stored, calibration_ids(text))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "the defaults": ("llama", {}),
    "all error of earlier layers corrected": ("llama", {"reconstruction": PAPER}),
    "no dense flow": ("llama", {"reconstruction": ReconstructionOptions(dense_share=0.0)}),
    "low-rank pairs": ("llama", {"format": "lowrank"}),
    "attention and MLP read the same": ("phi", {"reconstruction": PAPER}),
    "attention adds the residual itself": ("bloom", {"reconstruction": PAPER}),
    "parts stay dense": ("llama", {"reconstruction": PAPER, "exclude": ("*.1.*", "*0.self_attn.k_proj", "*2.*gate*")}),
    "ranks by outliers": ("llama", {"reconstruction": PAPER, "layer_density": "owl"}),
    "ranks by effective rank": ("llama", {"reconstruction": PAPER, "layer_density": "effective-rank"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_linear_is_solved_on_the_inputs_that_the_stored_ones_before_it_give(
    case: str, text: Path, tmp_path: Path
) -> None:
    kind, changes = CASES[case]
    chosen = options(text, **changes)
    compress_model(save_family(tmp_path / "dense", kind), tmp_path / "out", chosen)
    stored, record = factorised(tmp_path / "out"), validate(tmp_path / "out").modules
    dense = dense_inputs(kind, stored, text)
    for layer, name, x in seen_inputs(kind, stored, calibration_ids(text)):
        right = Problem(weight_of(kind, name), x, dense[name])
        inputs, targets = right.rows(chosen.reconstruction)

        def apart(found: np.ndarray, other: Problem, name: str = name, inputs: np.ndarray = inputs) -> float:
            best = other.optimum(record[name].rank, chosen.reconstruction)
            return float(np.linalg.norm((found - best) @ inputs))

        found, scale = stored[name].numpy(), np.linalg.norm(targets)
        assert apart(found, right) <= ROUNDING * scale, name
        if layer > 0:  # the comparison can fail
            wrong = Problem(right.weight, dense[name], dense[name])
            assert apart(found, wrong) > 20 * ROUNDING * scale, name


def test_whitening_is_on_the_inputs_of_the_dense_model(llama: Path, text: Path, tmp_path: Path) -> None:
    reports: list[LayerReport] = []
    compress_model(llama, tmp_path / "out", options(text, method="whitened"), report=reports.append)
    stored, record = factorised(tmp_path / "out"), validate(tmp_path / "out").modules
    errors: dict[int, list[float]] = {}
    for name, x in dense_inputs("llama", stored, text).items():
        y = weight_of("llama", name) @ x
        u, s, v = np.linalg.svd(y, full_matrices=False)
        rank = record[name].rank
        found = stored[name].numpy() @ x
        assert np.linalg.norm(found - (u[:, :rank] * s[:rank]) @ v[:rank]) <= ROUNDING * np.linalg.norm(y), name
        errors.setdefault(int(name.split(".")[2]), []).append(float(np.linalg.norm(found - y) / np.linalg.norm(y)))
    for report in reports:
        assert report.error == pytest.approx(np.mean(errors[report.layer]), rel=1e-3)
        assert report.drift is None


def test_reports_tell_the_errors_on_the_inputs_seen_and_how_far_the_layers_drift(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    reports: list[LayerReport] = []
    summary = compress_model(llama, tmp_path / "out", options(text), report=reports.append)
    assert [(report.layer, report.layers) for report in reports] == [(layer, LAYERS) for layer in range(LAYERS)]
    stored = factorised(tmp_path / "out")
    errors: dict[int, list[float]] = {layer: [] for layer in range(LAYERS)}
    for layer, name, x in seen_inputs("llama", stored, calibration_ids(text)):
        weight = weight_of("llama", name)
        miss = (weight - stored[name].numpy()) @ x
        errors[layer].append(float(np.linalg.norm(miss) / np.linalg.norm(weight @ x)))
    # The input of a layer's norm is the output of the layer before.
    entries = [f"model.layers.{layer}.input_layernorm" for layer in range(1, LAYERS)] + ["model.norm"]
    dense, found = (
        inputs_of(with_weights("llama", weights), entries, calibration_ids(text)) for weights in ({}, stored)
    )
    for report, entry in zip(reports, entries, strict=True):
        assert report.error == pytest.approx(np.mean(errors[report.layer]), rel=1e-3)
        drift = np.linalg.norm(found[entry] - dense[entry]) / np.linalg.norm(dense[entry])
        assert report.drift == pytest.approx(drift, rel=1e-3)
        assert report.seconds > 0
    assert summary.error == pytest.approx(np.mean([errors[layer] for layer in range(LAYERS)]), rel=1e-3)
    assert [report.seconds_left > 0 for report in reports] == [True, True, False]


def test_without_a_dense_share_the_dense_model_is_not_run(llama: Path, text: Path, tmp_path: Path) -> None:
    reports: list[LayerReport] = []
    chosen = options(text, reconstruction=ReconstructionOptions(dense_share=0.0))
    summary = compress_model(llama, tmp_path / "out", chosen, report=reports.append)
    assert [report.drift for report in reports] == [None] * LAYERS  # nothing to drift from
    # What enters the layer, and the remembered output of attention.
    assert summary.activation_bytes == 4 * 2 * HIDDEN * WINDOWS.samples * WINDOWS.sequence_length


def test_svd_looks_at_the_weights_alone(llama: Path, tmp_path: Path) -> None:
    summary = compress_model(llama, tmp_path / "out", CompressOptions(density=0.6, method="svd", layout="pivoted"))
    errors, record = [], validate(tmp_path / "out").modules
    for name, found in factorised(tmp_path / "out").items():
        u, s, v = np.linalg.svd(weight_of("llama", name), full_matrices=False)
        rank = record[name].rank
        np.testing.assert_allclose(found.numpy(), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-5)
        errors.append(np.linalg.norm(s[rank:]) / np.linalg.norm(s))
    assert summary.error == pytest.approx(np.mean(errors), rel=1e-4)


# What must make no difference


@pytest.mark.parametrize("kind", ["llama", "phi", "bloom", "falcon", "opt"])
def test_remembered_modules_compute_what_they_would_again(
    kind: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_family(tmp_path / "dense", kind)
    settled: list[str] = []
    plain = LayerFlow.settle

    def noting(self: LayerFlow, name: str) -> None:
        settled.append(name)
        plain(self, name)

    monkeypatch.setattr(LayerFlow, "settle", noting)
    compress_model(source, tmp_path / "remembered", options(text))
    assert len(settled) == LAYERS  # attention, in every layer
    monkeypatch.setattr(LayerFlow, "settle", lambda self, name: None)
    compress_model(source, tmp_path / "again", options(text))
    assert content(tmp_path / "remembered") == content(tmp_path / "again")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_activations_in_files_give_the_same_model_and_are_gone_afterwards(
    dtype: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    place = tmp_path / "activations"
    kept: list[int] = []

    def count(_: LayerReport) -> None:
        opened = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
        kept.append(sum(target.startswith(str(place)) for target in opened))

    for name, folder in (("memory", None), ("files", place)):
        activations = ActivationOptions(dtype=dtype, folder=folder, batch_tokens=3 * WINDOWS.sequence_length)
        compress_model(llama, tmp_path / name, options(text, activations=activations), report=count)
    # The dense and the compressed flow, and nothing else between layers.
    assert kept == [0] * LAYERS + [2] * LAYERS
    assert list(place.iterdir()) == []
    assert content(tmp_path / "memory") == content(tmp_path / "files")


def test_activations_in_files_are_gone_after_a_failure_too(llama: Path, text: Path, tmp_path: Path) -> None:
    def stop(_: LayerReport) -> None:
        raise KeyboardInterrupt

    activations = ActivationOptions(folder=tmp_path / "activations")
    with pytest.raises(KeyboardInterrupt):
        compress_model(llama, tmp_path / "out", options(text, activations=activations), report=stop)
    assert list((tmp_path / "activations").iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_narrow_activations_cost_half_the_bytes_and_little_else(llama: Path, text: Path, tmp_path: Path) -> None:
    exact = ActivationOptions(batch_tokens=3 * WINDOWS.sequence_length)
    wide = compress_model(llama, tmp_path / "fp32", options(text, activations=exact))
    expected = factorised(tmp_path / "fp32")
    for dtype, eps in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):
        activations = ActivationOptions(dtype=dtype, batch_tokens=3 * WINDOWS.sequence_length)
        narrow = compress_model(llama, tmp_path / dtype, options(text, activations=activations))
        assert narrow.activation_bytes * 2 == wide.activation_bytes
        moved = [
            float((found - expected[name]).norm() / expected[name].norm())
            for name, found in factorised(tmp_path / dtype).items()
        ]
        assert 0.0 < max(moved) < 20 * eps
        assert narrow.error == pytest.approx(wide.error, rel=20 * eps)


def test_activations_too_large_for_their_dtype_name_where_they_are(llama: Path, text: Path, tmp_path: Path) -> None:
    model = family_model("llama")
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data *= 1e5
    model.save_pretrained(tmp_path / "dense")
    for file in llama.glob("token*"):
        (tmp_path / "dense" / file.name).write_bytes(file.read_bytes())
    activations = ActivationOptions(dtype="fp16")
    with pytest.raises(StageFailedError, match=r"has NaN or Inf in torch\.float16; .*store activations as fp32"):
        compress_model(tmp_path / "dense", tmp_path / "out", options(text, activations=activations))
    compress_model(tmp_path / "dense", tmp_path / "out", options(text, activations=ActivationOptions(), restart=True))


# One window, batches that do not divide the windows, all windows at once, less than a window.
@pytest.mark.parametrize("batch_tokens", [1, WINDOWS.sequence_length, 5 * WINDOWS.sequence_length, 10**6])
def test_the_size_of_batches_changes_nothing_but_rounding(
    batch_tokens: int, llama: Path, text: Path, tmp_path: Path
) -> None:
    for name, tokens in (("three", 3 * WINDOWS.sequence_length), ("other", batch_tokens)):
        chosen = options(text, activations=ActivationOptions(batch_tokens=tokens))
        compress_model(llama, tmp_path / name, chosen)
    expected = factorised(tmp_path / "three")
    for name, found in factorised(tmp_path / "other").items():
        assert (found - expected[name]).norm() <= ROUNDING * expected[name].norm(), name


@pytest.mark.parametrize("method", ["mpifa", "whitened"])
@pytest.mark.parametrize("kind", ["llama", "opt", "qwen3"])
def test_a_source_in_bfloat16_is_compressed_as_the_same_numbers_in_float32(
    kind: str, method: str, text: Path, tmp_path: Path
) -> None:
    save_family(tmp_path / "bf16", kind, dtype=torch.bfloat16)
    model = family_model(kind).bfloat16().float()
    model.save_pretrained(tmp_path / "fp32")
    for file in (tmp_path / "bf16").glob("token*"):
        (tmp_path / "fp32" / file.name).write_bytes(file.read_bytes())
    for name in ("bf16", "fp32"):
        compress_model(tmp_path / name, tmp_path / f"{name} out", options(text, method=method))
    one, other = (load_file(tmp_path / f"{name} out" / SINGLE) for name in ("bf16", "fp32"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# Ranks by statistics


def outliers(kind: str, layer: int, inputs: Mapping[str, np.ndarray], multiple: float = 5.0) -> float:
    """Returns the share of |W_ij| ||x_j|| above a multiple of their mean, over all linears of a layer (OWL)."""
    scores = np.concatenate(
        [
            (np.abs(weight_of(kind, name)) * np.linalg.norm(x, axis=1)).ravel()
            for name, x in inputs.items()
            if f".{layer}." in name
        ]
    )
    return float((scores > multiple * scores.mean()).mean())


def effective_rank(kind: str, layer: int, inputs: Mapping[str, np.ndarray]) -> float:
    """Returns exp(entropy) of the singular values of W X relative to min(m, n), averaged by size."""
    ranks, sizes = [], []
    for name, x in inputs.items():
        if f".{layer}." in name:
            weight = weight_of(kind, name)
            shares = np.linalg.svd(weight @ x, compute_uv=False)[: min(weight.shape)]
            shares = shares[shares > 0] / shares.sum()
            ranks.append(np.exp(-(shares * np.log(shares)).sum()) / min(weight.shape))
            sizes.append(weight.size)
    return float(np.average(ranks, weights=sizes))


@pytest.mark.parametrize(("layer_density", "score"), [("owl", outliers), ("effective-rank", effective_rank)])
@pytest.mark.parametrize("method", ["mpifa", "whitened", "svd"])
@pytest.mark.parametrize("attention", [None, 0.45])
def test_layers_get_the_ranks_that_their_activations_call_for(
    attention: float | None, method: str, layer_density: str, score: Any, llama: Path, text: Path, tmp_path: Path
) -> None:
    chosen = options(text, method=method, layer_density=layer_density, attention_density=attention)
    summary = compress_model(llama, tmp_path / "out", chosen)
    record = validate(tmp_path / "out")
    path, layers = decoder_layers(family_model("llama"), "model")
    shapes = linear_shapes(path, layers)
    inputs = dense_inputs("llama", {shape.name: torch.empty(0) for shape in shapes}, text)
    expected = allocate(
        shapes, chosen.allocation, scores={layer: score("llama", layer, inputs) for layer in range(LAYERS)}
    )
    assert {name: spec.rank for name, spec in record.modules.items()} == expected.ranks
    assert summary.module_density == expected.density
    stored = sum(spec.parameters() for spec in record.modules.values())
    assert stored <= 0.6 * sum(shape.size for shape in shapes)
    by_layer = [record.modules[f"{path}.{layer}.mlp.up_proj"].rank for layer in range(LAYERS)]
    assert len(set(by_layer)) > 1
    assert record.details["layer_density"] == layer_density
    if method == "svd":  # the statistics choose the ranks and nothing else
        name = f"{path}.1.mlp.up_proj"
        u, s, v = np.linalg.svd(weight_of("llama", name), full_matrices=False)
        rank = expected.ranks[name]
        np.testing.assert_allclose(
            factorised(tmp_path / "out")[name].numpy(), (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-5
        )


def test_attention_has_its_density_and_the_mlp_the_rest(llama: Path, text: Path, tmp_path: Path) -> None:
    summary = compress_model(llama, tmp_path / "out", options(text, attention_density=0.4))
    modules = validate(tmp_path / "out").modules
    shares = {}
    for kind in ("self_attn", "mlp"):
        specs = [spec for name, spec in modules.items() if kind in name]
        shares[kind] = sum(spec.parameters() for spec in specs) / sum(
            spec.in_features * spec.out_features for spec in specs
        )
    assert shares["self_attn"] == pytest.approx(0.4, abs=0.03)  # ranks of such small matrices are coarse
    assert shares["mlp"] > 0.62
    assert 0.58 < summary.module_density <= 0.6


# Parts of a model


@pytest.mark.parametrize("method", ["mpifa", "whitened", "svd"])
def test_what_the_patterns_leave_out_stays_as_it_was(method: str, llama: Path, text: Path, tmp_path: Path) -> None:
    # No linear in layer 0, two of the three that read the same in layer 1, all in layer 2.
    chosen = options(text, method=method, include=("*.1.*", "*.2.*"), exclude=("*.1.self_attn.k_proj", "*.1.mlp.*"))
    reports: list[LayerReport] = []
    summary = compress_model(llama, tmp_path / "out", chosen, report=reports.append)
    expected = [f"model.layers.1.self_attn.{name}_proj" for name in "qvo"] + [
        f"model.layers.2.{name}" for group in FAMILIES["llama"].groups for name in group
    ]
    record = validate(tmp_path / "out").modules
    assert record.keys() == set(expected)
    found, dense = load_model(tmp_path / "out", dtype=None).state_dict(), family_model("llama").state_dict()
    for name, weight in dense.items():
        if name.removesuffix(".weight") not in expected:
            assert torch.equal(found[name], weight), name
    assert summary.modules == len(expected)
    assert summary.error == pytest.approx((reports[1].error * 3 + reports[2].error * 7) / 10)
    assert reports[0].error == 0.0
    for name in expected:
        m, n = dense[f"{name}.weight"].shape
        assert record[name].rank == rank_for_density(m, n, 0.6)


def test_one_linear_alone_can_be_compressed(llama: Path, text: Path, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.down_proj"
    summary = compress_model(llama, tmp_path / "out", options(text, include=(name,)))
    assert list(validate(tmp_path / "out").modules) == [name]
    assert summary.modules == 1


def test_windows_are_read_as_their_options_say(llama: Path, text: Path, tmp_path: Path) -> None:
    windows = CalibrationOptions(samples=3, sequence_length=20, seed=4)
    compress_model(llama, tmp_path / "out", options(text, windows=windows))
    details = validate(tmp_path / "out").details
    assert {"samples": 3, "sequence_length": 20, "seed": 4}.items() <= details.items()
    assert len(details["calibration"][0]["windows"]) == 3
