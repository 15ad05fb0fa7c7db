"""The exported folder: its graph against transformers' own forward, its contract, and its bytes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from decoder_fixtures import (
    CHAT_TEMPLATE,
    SIZES,
    dense_decoder,
    export,
    factorised_decoder,
    first_rows,
    mixed,
    padded_step,
    plain_step,
    save_decoder,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from pifa_deploy import onnx_passes
from pifa_deploy.decoder_graph import attention
from pifa_deploy.errors import ExitCode, ExportError, InputRefusedError, OutputExistsError
from pifa_deploy.linear import PifaLinear
from pifa_deploy.onnx_export import ExportOptions
from pifa_deploy.onnx_folder import OnnxFolder, node_attributes, open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner

BIASED = {"attention_bias": True, "mlp_bias": True}
# (family, configuration, layout and form of the factors; None for a dense model, export options)
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "llama": ("llama", {}, {}, {}),
    "qwen2, biases on q, k, v, tied": ("qwen2", {"tie_word_embeddings": True}, {}, {}),
    "mistral, sliding window": ("mistral", {"sliding_window": 5, "head_dim": 16}, {}, {}),
    "every bias, mixed layouts": ("llama", BIASED, {"layout": mixed}, {}),
    "first rows everywhere": ("llama", {"tie_word_embeddings": True}, {"layout": first_rows}, {}),
    "low-rank": ("qwen2", {}, {"form": "lowrank"}, {}),
    "dense": ("llama", {}, None, {}),
    "plain ops": ("qwen2", {}, {"layout": mixed}, {"plain_ops": True}),
}
PIFA = [name for name in VARIANTS if name not in ("low-rank", "dense", "plain ops")]
NARROW = {"fp16": (torch.float16, onnx.TensorProto.FLOAT16), "bf16": (torch.bfloat16, onnx.TensorProto.BFLOAT16)}
EPS32 = float(torch.finfo(torch.float32).eps)
# Operands are rounded at about 30 places a layer, each error amplified by row norms of about 2.
LIMIT32 = SIZES["num_hidden_layers"] * 30 * 2 * EPS32


class Exported:
    """One exported checkpoint, its runner, and the float64 model it stands for."""

    def __init__(self, folder: Path, checkpoint: Path, exact: Any) -> None:
        self.path, self.checkpoint, self.exact = folder, checkpoint, exact
        self.opened: OnnxFolder = open_folder(folder)
        self.manifest = json.loads((folder / "pifa.json").read_text())

    @property
    def graph(self) -> onnx.GraphProto:
        return self.opened.model.graph

    @property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self.graph.initializer}

    def pifa_nodes(self) -> list[onnx.NodeProto]:
        return [node for node in self.graph.node if node.domain == "pifa"]


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Any]:
    family, changes, factors, _ = VARIANTS[name]
    model = dense_decoder(family, dtype=dtype, **changes)
    model, exact = (model, model) if factors is None else factorised_decoder(model, **factors)
    save_decoder(model, folder)
    return folder, exact.double()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    made: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in made:
            root = tmp_path_factory.mktemp("export")
            checkpoint, exact = saved(name, root / "checkpoint")
            export(checkpoint, root / "onnx", dtype="fp32", **VARIANTS[name][3])
            made[name] = Exported(root / "onnx", checkpoint, exact)
        return made[name]

    return make


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    made: dict[str, Exported] = {}

    def make(flag: str) -> Exported:
        if flag not in made:
            root = tmp_path_factory.mktemp(flag)
            checkpoint, exact = saved("qwen2, biases on q, k, v, tied", root / "checkpoint", NARROW[flag][0])
            export(checkpoint, root / "onnx", dtype=flag)
            made[flag] = Exported(root / "onnx", checkpoint, exact)
        return made[flag]

    return make


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, SIZES["vocab_size"], shape)


@torch.no_grad()
def stock(model: Any, ids: np.ndarray, **options: Any) -> Any:
    model.set_attn_implementation("eager")
    return model(torch.from_numpy(ids), **options)


def assert_close(found: np.ndarray, expected: torch.Tensor, limit: float = LIMIT32) -> None:
    """Norm error, and the largest error relative to the largest value, are below `limit`."""
    reference = expected.double().numpy()
    error = found.astype(np.float64) - reference
    assert found.shape == reference.shape
    assert np.linalg.norm(error) <= limit * np.linalg.norm(reference)
    assert np.abs(error).max() <= limit * np.abs(reference).max()


@pytest.mark.parametrize("variant", VARIANTS)
class TestLogits:
    def test_without_a_past(self, variant: str, exported: Any) -> None:
        export = exported(variant)
        for ids in (tokens(1, 1), tokens(1, 11), tokens(3, 7)):
            logits, _ = OnnxRuntimeRunner(export.opened, threads=1).step(plain_step(ids), None)
            assert_close(logits, stock(export.exact, ids, use_cache=False).logits)
            assert logits.std() > 1  # what is compared is not nearly constant

    def test_with_the_past_of_transformers(self, variant: str, exported: Any) -> None:
        export, ids = exported(variant), tokens(2, 9)
        past = stock(export.exact, ids[:, :6], use_cache=True, past_key_values=DynamicCache()).past_key_values
        feed = {
            f"past_key_values.{i}.{part}": getattr(layer, f"{part}s").float()
            for i, layer in enumerate(past.layers)
            for part in ("key", "value")
        }
        runner = OnnxRuntimeRunner(export.opened, threads=1)
        logits, present = runner.step(plain_step(ids[:, 6:], 6), runner.load_cache(feed))
        whole = stock(export.exact, ids, use_cache=True, past_key_values=DynamicCache())
        assert_close(logits, whole.logits[:, 6:])
        for i, layer in enumerate(whole.past_key_values.layers):
            assert_close(present[f"past_key_values.{i}.key"].numpy(), layer.keys)
            assert_close(present[f"past_key_values.{i}.value"].numpy(), layer.values)

    def test_in_chunks_and_single_tokens(self, variant: str, exported: Any) -> None:
        export, ids, cache = exported(variant), tokens(2, 14), None
        runner, parts = OnnxRuntimeRunner(export.opened, threads=1), []
        for start, end in ((0, 4), (4, 9), (9, 10), (10, 11), (11, 14)):
            logits, cache = runner.step(plain_step(ids[:, start:end], start), cache)
            parts.append(logits)
        assert_close(np.concatenate(parts, axis=1), stock(export.exact, ids, use_cache=False).logits)

    def test_of_a_batch_padded_on_the_left(self, variant: str, exported: Any) -> None:
        export, rows = exported(variant), [tokens(4, seed=1), tokens(9, seed=2), tokens(1, seed=3)]
        runner, step = OnnxRuntimeRunner(export.opened, threads=1), padded_step(rows)
        logits, cache = runner.step(step, None)
        assert np.isfinite(logits).all()
        more = tokens(3, 1, seed=4)
        following = plain_step(more, 9)
        following.attention_mask[:, :9] = step.attention_mask
        following.position_ids[:, 0] = [len(row) for row in rows]
        last, _ = runner.step(following, cache)
        for i, row in enumerate(rows):
            alone = stock(export.exact, np.append(row, more[i])[None], use_cache=False).logits[0]
            assert_close(logits[i, -len(row) :], alone[:-1])
            assert_close(last[i], alone[-1:])


class TestGraph:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_interface_has_the_names_and_dimensions_people_expect(self, variant: str, exported: Any) -> None:
        export = exported(variant)
        heads, head_dim = (SIZES["num_key_value_heads"], VARIANTS[variant][1].get("head_dim", 8))
        past = ["batch_size", heads, "past_sequence_length", head_dim]
        present = ["batch_size", heads, "total_sequence_length", head_dim]
        expected_in = {
            "input_ids": ["batch_size", "sequence_length"],
            "attention_mask": ["batch_size", "total_sequence_length"],
            "position_ids": ["batch_size", "sequence_length"],
        }
        expected_out = {"logits": ["batch_size", "sequence_length", SIZES["vocab_size"]]}
        for i in range(SIZES["num_hidden_layers"]):
            expected_in |= {f"past_key_values.{i}.key": past, f"past_key_values.{i}.value": past}
            expected_out |= {f"present.{i}.key": present, f"present.{i}.value": present}
        assert list(described(export.graph.input).items()) == list(expected_in.items())
        assert list(described(export.graph.output).items()) == list(expected_out.items())

    @pytest.mark.parametrize("variant", PIFA)
    def test_every_factorised_linear_is_one_node_named_after_it(self, variant: str, exported: Any) -> None:
        export = exported(variant)
        nodes = {node.name: node for node in export.pifa_nodes()}
        specs = json.loads((export.checkpoint / "config.json").read_text())["quantization_config"]["modules"]
        assert nodes.keys() == specs.keys()
        assert len(export.pifa_nodes()) == 7 * SIZES["num_hidden_layers"]
        for name, node in nodes.items():
            moved = any(value.name == f"{name}.output_index" for value in export.graph.initializer)
            assert node.op_type == ("PifaLinear" if moved else "PifaOrderedLinear")
            assert node_attributes(node) == {
                "rank": specs[name]["rank"],
                "out_features": specs[name]["out_features"],
                "form": "row",
                "plugin_namespace": "pifa",
                "plugin_version": "1",
            }
            stored = [f"{name}.{part}" for part in ("pivot_weight", "coefficients", *["output_index"][: int(moved)])]
            assert list(node.input[1 : 1 + len(stored)]) == stored

    def test_a_bias_of_some_linears_is_added_behind_the_node(self, exported: Any) -> None:
        export = exported("qwen2, biases on q, k, v, tied")
        assert {len(node.input) for node in export.pifa_nodes()} == {4}
        adds = {name: node for node in export.graph.node if node.op_type == "Add" for name in node.input}
        for node in export.pifa_nodes():
            if node.name.endswith(("q_proj", "k_proj", "v_proj")):
                assert f"{node.name}.bias" in adds[node.output[0]].input
        assert [nodes[-1].op_type for nodes in bodies(export).values()] == ["MatMul"]

    def test_a_bias_of_every_linear_is_an_input_of_the_node(self, exported: Any) -> None:
        export = exported("every bias, mixed layouts")
        assert all(node.input[-1] == f"{node.name}.bias" for node in export.pifa_nodes())
        assert [nodes[-1].op_type for nodes in bodies(export).values()] == ["Add", "Add"]

    def test_pivots_that_are_the_first_rows_everywhere_need_no_index(self, exported: Any) -> None:
        export = exported("first rows everywhere")
        assert {node.op_type for node in export.pifa_nodes()} == {"PifaOrderedLinear"}
        assert bodies(export).keys() == {"PifaOrderedLinear"}
        assert not [name for name in export.initializers if name.endswith("output_index")]

    def test_first_rows_beside_permuted_layers_have_an_operator_each(self, exported: Any) -> None:
        export = exported("every bias, mixed layouts")
        assert {node.op_type for node in export.pifa_nodes()} == {"PifaLinear", "PifaOrderedLinear"}
        assert bodies(export).keys() == {"PifaLinear", "PifaOrderedLinear"}

    @pytest.mark.parametrize("variant", ["dense", "low-rank", "plain ops"])
    def test_a_file_without_the_operator_does_not_mention_it(self, variant: str, exported: Any) -> None:
        export = exported(variant)
        assert not export.pifa_nodes()
        assert not export.opened.model.functions
        assert [opset.domain for opset in export.opened.model.opset_import] == [""]
        assert {node.domain for node in export.graph.node} == {""}

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_weights_are_stored_once_and_as_they_are(self, variant: str, exported: Any) -> None:
        export = exported(variant)
        stored = load_file(export.checkpoint / "model.safetensors")
        for name, tensor in stored.items():
            if not name.endswith("pivot_rows"):
                found = onnx.numpy_helper.to_array(export.initializers[name], str(export.path))
                np.testing.assert_array_equal(found, tensor.numpy(), err_msg=name)
        weights = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
        assert export.opened.weight_bytes() < weights + 4 * 32 * len(stored) + 8192

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_the_checker_accepts_the_file_with_the_registered_operator(self, variant: str, exported: Any) -> None:
        onnx_passes.check(str(exported(variant).path / "model.onnx"))
        assert onnx.defs.has("PifaLinear", "pifa")

    def test_the_checker_refuses_a_node_without_its_rank(self, exported: Any, tmp_path: Path) -> None:
        shutil.copytree(exported("llama").path, tmp_path / "onnx")
        model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
        node = next(node for node in model.graph.node if node.domain == "pifa")
        node.attribute.remove(next(attribute for attribute in node.attribute if attribute.name == "rank"))
        onnx.save(model, tmp_path / "onnx" / "model.onnx")
        with pytest.raises(onnx.checker.ValidationError, match="rank"):
            onnx_passes.check(str(tmp_path / "onnx" / "model.onnx"))


def described(values: Any) -> dict[str, list[str | int]]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


def bodies(export: Exported) -> dict[str, Any]:
    return {function.name: function.node for function in export.opened.model.functions}


class TestDtypes:
    @pytest.mark.parametrize("flag", NARROW)
    def test_weights_cache_and_logits_have_it(self, flag: str, narrow: Any) -> None:
        export, expected = narrow(flag), NARROW[flag][1]
        types = {value.name: value.type.tensor_type.elem_type for value in (*export.graph.input, *export.graph.output)}
        assert {kind for name, kind in types.items() if name.startswith(("past", "present"))} == {expected}
        assert types["logits"] == expected
        weights = {
            name: t.data_type for name, t in export.initializers.items() if name.startswith(("model.", "lm_head"))
        }
        index = {name for name in weights if name.endswith("output_index")}
        assert {weights.pop(name) for name in index} == {onnx.TensorProto.INT32}
        weights = {name: kind for name, kind in weights.items() if "inv_freq" not in name}
        assert set(weights.values()) == {expected}
        assert export.manifest["dtype"] == flag

    def test_fp16_logits_are_as_near_as_those_of_transformers_in_fp16(self, narrow: Any) -> None:
        export, ids = narrow("fp16"), tokens(3, 40)
        half = AutoModelForCausalLM.from_pretrained(export.checkpoint, dtype=torch.float16).eval()
        exact = stock(export.exact, ids, use_cache=False).logits.numpy()
        floor = np.linalg.norm(stock(half, ids, use_cache=False).logits.double().numpy() - exact)
        runner, cache, parts = OnnxRuntimeRunner(export.opened, threads=1), None, []
        for start, end in ((0, 17), (17, 39), (39, 40)):
            logits, cache = runner.step(plain_step(ids[:, start:end], start), cache)
            parts.append(logits)
        error = np.linalg.norm(np.concatenate(parts, axis=1) - exact)
        # Both round to 11 bits after every operation, in another order.
        assert error <= 2 * floor
        assert floor <= 0.02 * np.linalg.norm(exact)

    def test_fp16_rows_without_any_key_stay_finite(self, narrow: Any) -> None:
        runner = OnnxRuntimeRunner(narrow("fp16").opened, threads=1)
        step = padded_step([tokens(2, seed=1), tokens(12, seed=2), tokens(12, seed=3)])
        step.attention_mask[2] = 0  # a row of nothing but padding
        logits, cache = runner.step(step, None)
        assert np.isfinite(logits).all()
        assert all(torch.isfinite(value).all() for value in cache.values())
        following = plain_step(tokens(3, 1), 12)
        following.attention_mask[:, :12] = step.attention_mask
        following.attention_mask[2] = 0
        assert np.isfinite(runner.step(following, cache)[0]).all()

    def test_a_weight_that_overflows_fp16_is_refused_by_name(self, tmp_path: Path) -> None:
        model, _ = factorised_decoder(dense_decoder())
        name = "model.layers.1.mlp.up_proj.coefficients"
        with torch.no_grad():
            model.get_parameter(name)[0, 0] = 7e4
        save_decoder(model, tmp_path / "checkpoint")
        with pytest.raises(
            InputRefusedError, match=re.escape(f"{name} has NaN or Inf entries in torch.float16")
        ) as info:
            export(tmp_path / "checkpoint", tmp_path / "onnx", dtype="fp16")
        assert info.value.exit_code == ExitCode.INPUT_REFUSED
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    def test_an_unknown_dtype_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="'int8', expected one of fp32, fp16, bf16"):
            ExportOptions(dtype="int8")


class TestFolder:
    def test_holds_graph_weights_config_tokenizer_and_manifest(self, exported: Any) -> None:
        export = exported("llama")
        names = {path.name for path in export.path.iterdir()}
        assert {"model.onnx", "model.onnx.data", "config.json", "pifa.json"} <= names
        assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
        assert not [name for name in names if name.startswith(".")]
        tokenizer = AutoTokenizer.from_pretrained(export.path)
        original = AutoTokenizer.from_pretrained(export.checkpoint)
        assert tokenizer("some text").input_ids == original("some text").input_ids
        assert tokenizer.chat_template == CHAT_TEMPLATE

    def test_every_tensor_name_of_the_manifest_is_in_the_graph(self, exported: Any) -> None:
        for variant in ("llama", "every bias, mixed layouts", "first rows everywhere", "low-rank", "plain ops"):
            export = exported(variant)
            specs = json.loads((export.checkpoint / "config.json").read_text())["quantization_config"]["modules"]
            assert export.manifest["modules"].keys() == specs.keys()
            for name, module in export.manifest["modules"].items():
                assert {key: module[key] for key in specs[name]} == specs[name]
                if variant != "plain ops":
                    assert set(module["tensors"]) <= export.initializers.keys()

    def test_manifest_says_what_was_exported_and_by_what(self, exported: Any) -> None:
        export = exported("qwen2, biases on q, k, v, tied")
        manifest = export.manifest
        assert manifest["schema"] == 1
        assert (manifest["artefact"], manifest["dtype"], manifest["plain_ops"]) == ("onnx", "fp32", False)
        types = ["PifaLinear", "PifaOrderedLinear", "PifaColumnLinear"]
        assert manifest["op"] == {"domain": "pifa", "types": types, "version": 1}
        assert manifest["cache"] == {"layers": 2, "kv_heads": 2, "head_dim": 8}
        for name in ("torch", "transformers", "onnx", "onnxscript", "onnx-ir"):
            assert manifest["tools"][name] == version(name)
        lines = [f"{name}:{sha256(export.checkpoint / name)}\n" for name in ("config.json", "model.safetensors")]
        assert manifest["source_sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()
        assert manifest["files"].keys() == {path.name for path in export.path.iterdir()} - {"pifa.json"}
        for name, entry in manifest["files"].items():
            assert entry == {"bytes": (export.path / name).stat().st_size, "sha256": sha256(export.path / name)}
        assert exported("dense").manifest["modules"] == {}

    def test_another_copy_of_the_checkpoint_gives_the_same_bytes(self, exported: Any, tmp_path: Path) -> None:
        first = exported("every bias, mixed layouts")
        shutil.copytree(first.checkpoint, tmp_path / "a longer name" / "copy")
        summary = export(tmp_path / "a longer name" / "copy", tmp_path / "other", dtype="fp32")
        assert {path.name for path in (tmp_path / "other").iterdir()} == {path.name for path in first.path.iterdir()}
        for path in first.path.iterdir():
            assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name
        assert summary.pifa_nodes == 14
        assert summary.nodes == len(first.graph.node)
        assert summary.bytes == sum((first.path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
        assert summary.tokenizer

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_no_file_holds_a_path_of_this_machine(self, variant: str, exported: Any) -> None:
        export = exported(variant)
        places = {export.checkpoint, export.path, export.path.parent.parent, Path.cwd(), Path(sys.prefix), Path.home()}
        for path in export.path.iterdir():
            content = path.read_bytes()
            for place in (str(place).encode() for place in places if len(place.parts) > 1):
                assert place not in content, (path.name, place)
            if path.name != "model.onnx.data":
                assert not re.search(rb"/(home|root|usr|tmp|opt|work)/|site-packages|\.py\b", content), path.name

    def test_an_existing_folder_is_replaced_only_when_asked(self, exported: Any, tmp_path: Path) -> None:
        shutil.copytree(exported("llama").path, tmp_path / "onnx")
        before = (tmp_path / "onnx" / "model.onnx").stat().st_mtime_ns
        with pytest.raises(OutputExistsError, match="pass --force to replace it"):
            export(exported("llama").checkpoint, tmp_path / "onnx", dtype="fp32")
        assert (tmp_path / "onnx" / "model.onnx").stat().st_mtime_ns == before


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_architecture_that_cannot_be_traced_is_an_export_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_decoder(factorised_decoder(dense_decoder())[0], tmp_path / "checkpoint")

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x[..., : int(x.sum())]  # depends on data

    monkeypatch.setattr(PifaLinear, "forward", forward)
    with pytest.raises(ExportError, match="LlamaForCausalLM could not be traced for ONNX") as info:
        export(tmp_path / "checkpoint", tmp_path / "onnx", dtype="fp32")
    assert info.value.exit_code == ExitCode.STAGE_FAILED
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_large_queries_and_keys_do_not_overflow_float16() -> None:
    # 128 products of 40 x 40 are 204,800, beyond float16; scaled by 128 ** -0.5 they are 18,102.
    query = torch.full((1, 2, 3, 128), 40.0, dtype=torch.float16)
    value = torch.arange(3 * 128, dtype=torch.float16).reshape(1, 1, 3, 128) / 384
    found, _ = attention(torch.nn.Identity(), query, query[:, :1], value, None)
    expected = value.double().mean(2).expand(1, 3, 2, 128)
    assert float((found.double() - expected).abs().max()) <= 2e-3
