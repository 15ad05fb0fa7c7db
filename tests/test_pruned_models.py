"""2:4-pruned models from whole compressions: what is zero, on which inputs it was chosen, and the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import content, small_tokenizer
from family_fixtures import (
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
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from pifa_deploy.compression import CompressOptions, CompressSummary, LayerReport, compress_model
from pifa_deploy.compression.decoder import decoder_layers, linear_shapes
from pifa_deploy.compression.sparsity import PRUNING_METHODS, prune_2_4
from pifa_deploy.model_folder import load_model, load_tokenizer
from pifa_deploy.sparse_checkpoint import validate_sparsity

KIND = "qwen2"  # q, k and v have biases


def linears() -> list[str]:
    return [shape.name for shape in linear_shapes(*decoder_layers(family_model(KIND), "model"))]


def pruned_options(text: Path, method: str, **changes: Any) -> CompressOptions:
    return options(text, **{"method": method, "density": 0.5, **changes})


class Made:
    """A dense folder, the text, and one pruned folder for each method."""

    def __init__(self, root: Path) -> None:
        self.root, self.text = root, write_text(root / "text.txt")
        self.dense = save_family(root / "dense", KIND)
        self.summaries: dict[str, CompressSummary] = {}
        self.reports: dict[str, list[LayerReport]] = {method: [] for method in PRUNING_METHODS}
        for method in PRUNING_METHODS:
            chosen = pruned_options(self.text, method)
            report = self.reports[method].append
            self.summaries[method] = compress_model(self.dense, root / method, chosen, report=report)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("pruned"))


every_method = pytest.mark.parametrize("method", PRUNING_METHODS)


@every_method
def test_exactly_half_of_every_linear_is_zero_and_all_else_as_it_was(method: str, made: Made) -> None:
    folder, names = made.root / method, linears()
    assert set(validate_sparsity(folder).modules) == set(names)
    found, dense = load_file(folder / "model.safetensors"), load_file(made.dense / "model.safetensors")
    assert found.keys() == dense.keys()
    for name, weight in dense.items():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(found[name], weight), name
            continue
        kept = (found[name] != 0).reshape(-1, 4).sum(1)
        assert bool((kept == 2).all()), name
        if method != "sparsegpt":
            assert torch.equal(found[name], torch.where(found[name] != 0, weight, 0.0)), name


@every_method
def test_the_folder_is_a_model_that_anybody_can_load(method: str, made: Made) -> None:
    ids = calibration_ids(made.text)
    stored = {name: weight for name, weight in stored_weights(made.root / method).items() if name in linears()}
    with torch.no_grad():
        expected = with_weights(KIND, stored)(input_ids=ids).logits
        ours = load_model(made.root / method, dtype=torch.float32)(input_ids=ids).logits
        stock = AutoModelForCausalLM.from_pretrained(made.root / method)(input_ids=ids).logits
    assert torch.equal(ours, stock)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    words = "It is a truth, universally acknowledged."
    assert load_tokenizer(made.root / method)(words).input_ids == small_tokenizer()(words).input_ids


@every_method
def test_the_summary_counts_what_is_kept(method: str, made: Made) -> None:
    summary, model = made.summaries[method], family_model(KIND)
    pruned = sum(model.get_submodule(name).weight.numel() // 2 for name in linears())
    total = sum(tensor.numel() for tensor in model.state_dict().values())
    assert summary.modules == len(linears())
    assert (summary.dense_parameters, summary.parameters) == (total, total - pruned)
    assert (summary.module_density, summary.layout, summary.dense) == (0.5, None, {})


@every_method
def test_the_record_says_how_it_was_made(method: str, made: Made) -> None:
    found = json.loads((made.root / method / "sparsity.json").read_text())
    assert found["method"] == method
    details = found["details"]
    assert {"samples": 8, "sequence_length": 48, "seed": 0}.items() <= details.items()
    names = [entry["name"] for entry in details["calibration"]]
    assert names == ([] if method == "magnitude" else ["text.txt"])
    assert not {"format", "rank_multiple", "reconstruction"} & details.keys()  # nothing has a rank here
    assert str(made.root) not in (made.root / method / "sparsity.json").read_text()


def test_wanda_and_ria_see_the_inputs_that_the_pruned_linears_before_give(made: Made) -> None:
    model = family_model(KIND)
    for method, power in (("wanda", 1.0), ("ria", 0.5)):
        stored = {name: weight for name, weight in stored_weights(made.root / method).items() if name in linears()}
        dense = inputs_of(with_weights(KIND, {}), stored, calibration_ids(made.text))
        differs = []
        for layer, name, x in seen_inputs(KIND, stored, calibration_ids(made.text)):
            size = np.abs(model.get_submodule(name).weight.detach().double().numpy())
            if method == "ria":
                size = size / size.sum(0) + size / size.sum(1)[:, None]
            kept, other = (best_two(size * np.linalg.norm(inputs, axis=1) ** power) for inputs in (x, dense[name]))
            assert np.array_equal(stored[name].numpy() != 0, kept), name
            differs += [not np.array_equal(kept, other)] if layer else []
        assert sum(differs) > len(differs) // 2  # the comparison can fail


def best_two(scores: np.ndarray) -> np.ndarray:
    """Returns True at the two largest of each four neighbouring scores."""
    groups = scores.reshape(-1, 4)
    return np.asarray(groups > np.sort(groups, axis=1)[:, 1:2]).reshape(scores.shape)


def test_sparsegpt_sees_the_inputs_that_the_pruned_linears_before_give(made: Made) -> None:
    stored = {name: weight for name, weight in stored_weights(made.root / "sparsegpt").items() if name in linears()}
    model = family_model(KIND)
    for _, name, x in seen_inputs(KIND, stored, calibration_ids(made.text)):
        weight = model.get_submodule(name).weight.detach()
        expected = prune_2_4(weight, torch.from_numpy(x @ x.T), "sparsegpt")[0].double()
        miss = (stored[name] - expected).numpy() @ x
        assert np.linalg.norm(miss) <= 1e-4 * np.linalg.norm(expected.numpy() @ x), name


@every_method
def test_reports_tell_the_error_on_the_inputs_seen(method: str, made: Made) -> None:
    stored = {name: weight for name, weight in stored_weights(made.root / method).items() if name in linears()}
    errors: dict[int, list[float]] = {}
    for layer, name, x in seen_inputs(KIND, stored, calibration_ids(made.text)):
        weight = family_model(KIND).get_submodule(name).weight.detach().double().numpy()
        # Magnitude looks at weights alone.
        seen = np.eye(weight.shape[1]) if method == "magnitude" else x
        miss = (weight - stored[name].numpy()) @ seen
        errors.setdefault(layer, []).append(float(np.linalg.norm(miss) / np.linalg.norm(weight @ seen)))
    for report in made.reports[method]:
        assert report.error == pytest.approx(np.mean(errors[report.layer]), rel=1e-3)
    assert made.summaries[method].error == pytest.approx(np.mean([*errors.values()]), rel=1e-3)


def test_sparsegpt_errs_less_than_wanda_and_wanda_less_than_magnitude(made: Made) -> None:
    assert made.summaries["sparsegpt"].error < made.summaries["wanda"].error
    ids = calibration_ids(made.text)
    with torch.no_grad():
        dense = family_model(KIND)(input_ids=ids).logits
        errors = {
            method: float((load_model(made.root / method, dtype=None)(input_ids=ids).logits - dense).norm())
            for method in PRUNING_METHODS
        }
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_two_runs_write_the_same_bytes(method: str, made: Made, tmp_path: Path) -> None:
    compress_model(made.dense, tmp_path / "out", pruned_options(made.text, method))
    assert content(tmp_path / "out") == content(made.root / method)


@pytest.mark.parametrize(("flag", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_weights_are_stored_in_the_asked_dtype(flag: str, dtype: torch.dtype, made: Made, tmp_path: Path) -> None:
    compress_model(made.dense, tmp_path / "out", pruned_options(made.text, "wanda", dtype=flag))
    validate_sparsity(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {dtype}


def test_patterns_leave_linears_dense(made: Made, tmp_path: Path) -> None:
    chosen = pruned_options(made.text, "wanda", include=("*.1.*",), exclude=("*k_proj", "*down_proj"))
    summary = compress_model(made.dense, tmp_path / "out", chosen)
    names = [name for name in linears() if ".1." in name and "k_proj" not in name and "down_proj" not in name]
    assert set(validate_sparsity(tmp_path / "out").modules) == set(names)
    found, dense = load_file(tmp_path / "out" / "model.safetensors"), family_model(KIND).state_dict()
    assert all(torch.equal(found[name], dense[name]) for name in found if name.removesuffix(".weight") not in names)
    assert (summary.modules, summary.module_density) == (5, 0.5)


def test_magnitude_needs_no_text_and_reads_none(made: Made, tmp_path: Path) -> None:
    compress_model(made.dense, tmp_path / "out", CompressOptions(method="magnitude"))
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", made.root / "magnitude"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_inputs_that_are_no_multiple_of_four_name_the_linear(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=22,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj has 22 inputs, 2:4 needs a multiple of 4"):
        compress_model(tmp_path / "dense", tmp_path / "out", CompressOptions(method="magnitude"))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    chosen = CompressOptions(method="magnitude", exclude=("*down_proj",))
    assert compress_model(tmp_path / "dense", tmp_path / "out", chosen).modules == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.6}, "density is 0.6, method wanda prunes 2:4, which is 0.5; leave it out"),
        ({"layer_density": "owl"}, "layer_density is 'owl', method wanda prunes all linears alike; leave it out"),
        ({"attention_density": 0.5}, "attention_density is 0.5, method wanda prunes all linears alike"),
        ({"rank_multiple": 8}, "rank_multiple is 8, method wanda prunes all linears alike"),
        ({"format": "lowrank"}, "format is 'lowrank', method wanda prunes all linears alike; leave it out"),
        ({"calibration": ()}, "method wanda needs calibration text; pass --calibration FILE"),
    ],
    ids=str,
)
def test_options_that_pruning_has_no_use_for_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressOptions(**{"method": "wanda", "calibration": ("text.txt",), **fields})
