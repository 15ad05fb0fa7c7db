"""Weights bit for bit, and checkpoints against what they were made from."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from decoder_fixtures import dense_decoder, edited, export, factorised_decoder, mixed, save_decoder

from pifa_deploy.errors import InputRefusedError
from pifa_deploy.exported_files import changed_files
from pifa_deploy.factorization import factors_from_low_rank
from pifa_deploy.graph_cut import CutGraph
from pifa_deploy.layouts import apply_layout, low_rank_pair
from pifa_deploy.linear import LowRankLinear, PifaLinear
from pifa_deploy.model_folder import load_model
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.source_parity import measure_source, storing_bound
from pifa_deploy.transformers_quantizer import factorised_modules
from pifa_deploy.weight_parity import StoredWeights, measure_weights

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of rank 1, with no coefficients left, first rows and scattered rows; embedding and head are one tensor."""
    model, _ = factorised_decoder(dense_decoder("llama", tie_word_embeddings=True), mixed)
    return save_decoder(model, tmp_path_factory.mktemp("weights") / "checkpoint")


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        folder = checkpoint.parent / kind
        if not folder.exists():
            flag, _, form = kind.partition(" ")
            export(
                checkpoint, folder, dtype=flag, plain_ops=form == "plain", format="auto" if form == "auto" else "pifa"
            )
        return folder

    return make


def measured(checkpoint: Path, folder: Path) -> StoredWeights:
    model = load_model(checkpoint, dtype=torch.float32)
    return measure_weights(model, CutGraph(open_folder(folder)), reference=checkpoint)


class TestStored:
    @pytest.mark.parametrize("kind", ["fp16", "bf16 plain", "fp16 auto"])
    def test_a_clean_export_has_every_tensor(self, kind: str, exported: Any, checkpoint: Path) -> None:
        found = measured(checkpoint, exported(kind))
        assert found == StoredWeights(tensors=found.tensors, differing=(), misplaced=(), changed_files=())
        model = load_model(checkpoint, dtype=torch.float32)
        # Every parameter but empty ones and the head, which is the embedding, and the rotary frequencies.
        filled = [name for name, value in model.named_parameters() if value.numel()]
        moved = [layer for layer in factorised_modules(model).values() if layer.output_index.numel()]
        if kind != "fp16 auto":
            assert found.tensors == len(filled) + len(moved) + 1
        else:
            assert open_folder(exported(kind)).manifest["left_dense"]

    @pytest.mark.parametrize(
        ("name", "change", "why"),
        [
            (f"{UP}.pivot_weight", lambda array: np.nextafter(array, np.inf), "elements have other bits"),
            (f"{UP}.coefficients", lambda array: array[:-1], "the checkpoint has"),
            (f"{UP}.output_index", lambda array: array[::-1].copy(), "elements have other bits"),
            (f"{UP}.pivot_weight", lambda array: array.astype(np.int32), "is INT32, expected"),
            ("model.norm.weight", lambda array: -array, "32 of 32 elements have other bits"),
            ("model.rotary_emb.inv_freq", lambda array: array * 2, "elements have other bits"),
        ],
    )
    def test_any_other_bit_is_seen(
        self, name: str, change: Any, why: str, exported: Any, checkpoint: Path, tmp_path: Path
    ) -> None:
        def seed(model: ir.Model) -> None:
            value = model.graph.initializers[name]
            array = change(value.const_value.numpy())
            value.const_value, value.shape = ir.tensor(array, name=name), ir.Shape(array.shape)

        (line,) = measured(checkpoint, edited(exported("fp16"), tmp_path / "broken", seed)).differing
        assert line.startswith(f"{name}: ")
        assert why in line

    @pytest.mark.parametrize(("zero", "count"), [(0.0, 0), (-0.0, 1)])
    def test_a_negative_zero_is_another_bit(
        self, zero: float, count: int, exported: Any, checkpoint: Path, tmp_path: Path
    ) -> None:
        def seed(model: ir.Model) -> None:
            value = model.graph.initializers[f"{UP}.coefficients"]
            array = value.const_value.numpy().copy()
            array[0, 0] = zero
            value.const_value = ir.tensor(array, name=value.name)

        model = load_model(checkpoint, dtype=torch.float32)
        model.get_submodule(UP).coefficients.data[0, 0] = 0.0
        graph = CutGraph(open_folder(edited(exported("fp16"), tmp_path / "zero", seed)))
        assert len(measure_weights(model, graph).differing) == count

    def test_a_missing_tensor_and_one_too_many_are_seen(self, exported: Any, checkpoint: Path, tmp_path: Path) -> None:
        def rename(model: ir.Model) -> None:
            value = model.graph.initializers.pop("model.embed_tokens.weight")
            value.name = "other.weight"
            model.graph.register_initializer(value)

        found = measured(checkpoint, edited(exported("bf16 plain"), tmp_path / "broken", rename))
        assert "model.embed_tokens.weight: not in the graph" in found.differing
        assert "other.weight: not in the checkpoint" in found.differing

    @pytest.mark.parametrize("factor", [1.01, -1.0])
    def test_a_layer_written_dense_is_the_product_of_its_factors(
        self, factor: float, exported: Any, checkpoint: Path, tmp_path: Path
    ) -> None:
        name = open_folder(exported("fp16 auto")).manifest["left_dense"][0]

        def seed(model: ir.Model) -> None:
            value = model.graph.initializers[f"{name}.weight"]
            array = value.const_value.numpy().copy()
            array[0, 0] *= factor
            value.const_value = ir.tensor(array, name=value.name)

        found = measured(checkpoint, edited(exported("fp16 auto"), tmp_path / "broken", seed))
        assert found.differing == (f"{name}: its dense weight is not the rounded product of the factors",)

    def test_a_layer_written_as_a_pair_is_the_product_of_its_factors(
        self, exported: Any, checkpoint: Path, tmp_path: Path
    ) -> None:
        model = load_model(checkpoint, dtype=torch.float32)

        def pair(scale: float) -> Callable[[ir.Model], None]:
            def change(graph: ir.Model) -> None:
                u, v = (factor.numpy() * 1.0 for factor in low_rank_pair(model.get_submodule(UP).half()))
                for name, array in (("low_rank_u", u * scale), ("low_rank_v", v)):
                    tensor = ir.tensor(array.astype(np.float16), name=f"{UP}.{name}")
                    graph.graph.register_initializer(ir.Value(name=tensor.name, const_value=tensor))
                for name in ("pivot_weight", "coefficients", "output_index"):
                    graph.graph.initializers.pop(f"{UP}.{name}", None)

            return change

        for scale, expected in ((1.0, 0), (1.01, 1)):
            target = edited(exported("fp16"), tmp_path / str(scale), pair(scale))
            found = measured(checkpoint, target).differing
            assert len(found) == expected, found


def with_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def reverse_ids(folder: Path) -> None:
    file = folder / "tokenizer.json"
    value = json.loads(file.read_text())
    vocabulary = value["model"]["vocab"]
    value["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    file.write_text(json.dumps(value))


class TestFilesBesideTheGraph:
    @pytest.fixture
    def copy(self, exported: Any, tmp_path: Path) -> Path:
        return Path(shutil.copytree(exported("fp16"), tmp_path / "copy"))

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (reverse_ids, "tokenizer.json: is not as the export wrote it"),
            (
                lambda folder: with_json(folder / "config.json", max_position_embeddings=7),
                "config.json: is not as the export wrote it",
            ),
            (
                lambda folder: with_json(folder / "generation_config.json", eos_token_id=5),
                "generation_config.json: is not as the export wrote it",
            ),
            (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja: is not there"),
            (lambda folder: (folder / "vocab.json").write_text("{}"), "vocab.json: was not there at the export"),
        ],
    )
    def test_one_that_is_not_as_the_export_left_it_is_named(self, change: Any, expected: str, copy: Path) -> None:
        change(copy)
        assert changed_files(open_folder(copy)) == (expected,)

    def test_what_is_the_users_is_not_looked_at(self, copy: Path) -> None:
        (copy / "notes.txt").write_text("mine")
        with_json(copy / "genai_config.json", search={})
        assert changed_files(open_folder(copy)) == ()

    def test_without_hashes_the_tokenizer_is_held_against_the_checkpoint(self, copy: Path, checkpoint: Path) -> None:
        with_json(copy / "pifa.json", files={})
        folder = open_folder(copy)
        assert changed_files(folder) is None
        assert changed_files(folder, "hf:some/model") is None
        assert changed_files(folder, checkpoint) == ()
        reverse_ids(copy)
        assert changed_files(folder, checkpoint) == (f"tokenizer.json: is not as in {checkpoint}",)
        # transformers wrote what an export from the hub has: a folder of the same model may have other bytes.
        with_json(copy / "pifa.json", source_sha256=None)
        assert changed_files(open_folder(copy), checkpoint) is None

    def test_hashes_that_were_changed_too_do_not_help(self, copy: Path, checkpoint: Path) -> None:
        reverse_ids(copy)
        files = json.loads((copy / "pifa.json").read_text())["files"]
        files["tokenizer.json"]["sha256"] = hashlib.sha256((copy / "tokenizer.json").read_bytes()).hexdigest()
        with_json(copy / "pifa.json", files=files)
        assert changed_files(open_folder(copy)) == ()
        assert changed_files(open_folder(copy), checkpoint) == (f"tokenizer.json: is not as in {checkpoint}",)


class TestSource:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("layout", ["pivoted", "shared-mlp"])
    def test_a_low_rank_source_is_met_within_the_rounding_of_the_factors(self, layout: str, dtype: torch.dtype) -> None:
        """The MLP's features are renumbered by the second layout, and found again."""
        source, found = low_rank_and_pifa(layout, dtype)
        result = measure_source(found, source)
        assert (result.kind, result.changed) == ("factorised", ())
        ratios = [layer.bound_ratio for layer in result.layers]
        assert max(ratios) < 1.2
        assert max(ratios) > 0.05  # the bound is no excuse for anything

    def test_a_changed_factor_a_bias_and_a_norm_are_seen(self) -> None:
        source, found = low_rank_and_pifa("pivoted", torch.float16)
        found.get_submodule(UP).coefficients.data[0] *= 1.05
        found.get_submodule("model.norm").weight.data[3] += 0.5
        result = measure_source(found, source)
        worst = max(result.layers, key=lambda layer: layer.bound_ratio)
        assert (worst.module, worst.bound_ratio > 2) == (UP, True)
        assert result.changed == ("model.norm.weight: not what the source has",)

    def test_the_bound_is_what_rounding_at_random_does(self) -> None:
        """Factors in float64, each number of which is rounded: the error is below the bound and not far."""
        generator = torch.Generator().manual_seed(0)
        layer = PifaLinear(96, 128, 40).double()
        layer.pivot_weight.data = torch.randn(40, 96, generator=generator, dtype=torch.float64)
        layer.coefficients.data = 3 * torch.randn(88, 40, generator=generator, dtype=torch.float64)
        layer.pivot_rows.copy_(torch.arange(40))
        layer.derive_output_index()
        exact = torch.cat([torch.eye(40).double(), layer.coefficients.data]) @ layer.pivot_weight.data
        rounded = layer.half()
        u, v = low_rank_pair(rounded)
        ratio = float((u @ v - exact).norm()) / storing_bound(rounded)
        assert 0.3 < ratio < 1

    def test_against_a_dense_source_the_error_of_the_compression_is_reported(self) -> None:
        model, exact = factorised_decoder(dense_decoder("qwen2"))
        dense = exact.float()
        with torch.no_grad():
            dense.get_submodule(UP).weight.mul_(2)
        result = measure_source(model, dense)
        assert (result.kind, result.changed) == ("dense", ())
        errors = {layer.module: layer.relative_error for layer in result.layers}
        assert errors.pop(UP) == pytest.approx(0.5, abs=1e-6)
        assert max(errors.values()) < 1e-6
        assert {layer.bound_ratio for layer in result.layers} == {None}

    def test_another_model_is_refused(self) -> None:
        model, _ = factorised_decoder(dense_decoder("qwen2"))
        with pytest.raises(InputRefusedError, match=r"the source has no module model\.layers\.1"):
            measure_source(model, dense_decoder("qwen2", num_hidden_layers=1))
        with pytest.raises(InputRefusedError, match=r"is \[56, 32\], in the source \[58, 32\]"):
            measure_source(model, dense_decoder("qwen2", intermediate_size=58))


def equal_ranks(name: str, m: int, n: int) -> tuple[int, range]:
    return 10, range(10)


def low_rank_and_pifa(layout: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Returns a low-rank model in fp32, and the PIFA model made from it in `dtype`."""
    source, _ = factorised_decoder(dense_decoder("qwen2"), equal_ranks, form="lowrank")
    found, _ = factorised_decoder(dense_decoder("qwen2"), equal_ranks, form="lowrank")
    for path, pair in factorised_modules(found).items():
        assert isinstance(pair, LowRankLinear)
        u, v = (factor.detach().double() for factor in (pair.low_rank_u, pair.low_rank_v))
        found.set_submodule(path, PifaLinear.from_factors(factors_from_low_rank(u, v, dtype=torch.float32), pair.bias))
    apply_layout(found, layout)
    return source, found.to(dtype)
