"""A 2:4-pruned model in ONNX: the zeros stay where they are, and the folder says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_fixtures import Outcome, save_dense, small_model
from decoder_fixtures import plain_step
from sparse_fixtures import INTERMEDIATE, prune, save_sparse

from pifa_deploy.errors import InputRefusedError
from pifa_deploy.onnx_export import ExportOptions, export_checkpoint
from pifa_deploy.onnx_folder import OnnxFolder, open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner

pytest_plugins = ("cli_plugin",)

Exported = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """`exported("fp16")` gives the ONNX folder of a 2:4 model and its masks; do not change it."""
    made: dict[str, Exported] = {}
    source = tmp_path_factory.mktemp("sparse") / "model"
    masks = save_sparse(source)

    def make(dtype: str) -> Exported:
        if dtype not in made:
            export_checkpoint(source, source.parent / dtype, ExportOptions(dtype=dtype))
            made[dtype] = source.parent / dtype, masks
        return made[dtype]

    return make


def weight(folder: OnnxFolder, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in folder.model.graph.initializer if tensor.name == name)
    return np.asarray(onnx.numpy_helper.to_array(tensor, str(folder.path)), dtype=np.float32)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_zeros_are_in_the_initializers_where_the_masks_have_them(dtype: str, exported: Any) -> None:
    path, masks = exported(dtype)
    folder = open_folder(path)
    assert folder.sparsity is not None
    for name, mask in masks.items():
        (tensor,) = folder.sparsity["modules"][name]["tensors"]
        np.testing.assert_array_equal(weight(folder, tensor) != 0, mask.numpy())


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_four_neighbours_are_summed_over_by_the_product(dtype: str, exported: Any) -> None:
    path, masks = exported(dtype)
    graph = open_folder(path).model.graph
    users = {name: node for node in graph.node for name in node.input}
    for name in masks:
        turned = users[f"{name}.weight"]
        assert turned.op_type == "Transpose"
        (order,) = (attribute.ints for attribute in turned.attribute)
        assert list(order) == [1, 0]
        product = users[turned.output[0]]
        assert (product.op_type, product.input[1]) == ("MatMul", turned.output[0])


def test_it_computes_what_the_pruned_model_does(exported: Any) -> None:
    path, _ = exported("fp32")
    model = small_model(intermediate_size=INTERMEDIATE)
    prune(model)
    ids = np.arange(2, 14).reshape(2, 6)
    logits, _ = OnnxRuntimeRunner(open_folder(path), threads=1).step(plain_step(ids), None)
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(ids)).logits.numpy()
    assert np.linalg.norm(logits - expected) <= 1e-5 * np.linalg.norm(expected)


def test_the_manifest_records_pattern_method_and_modules(exported: Any) -> None:
    path, masks = exported("fp16")
    sparsity = json.loads((path / "pifa.json").read_text())["sparsity"]
    assert (sparsity["pattern"], sparsity["method"]) == ("2:4", "wanda")
    assert sparsity["modules"] == {
        name: {"in_features": mask.shape[1], "out_features": mask.shape[0], "tensors": [f"{name}.weight"]}
        for name, mask in masks.items()
    }
    assert not [file.name for file in path.iterdir() if file.name.startswith("sparsity")]


def test_a_dense_model_has_no_sparsity(tmp_path: Path) -> None:
    export_checkpoint(save_dense(tmp_path / "dense"), tmp_path / "onnx", ExportOptions(dtype="fp32"))
    assert json.loads((tmp_path / "onnx" / "pifa.json").read_text())["sparsity"] is None
    assert open_folder(tmp_path / "onnx").sparsity is None


def test_a_model_that_is_not_what_its_record_says_is_not_exported(tmp_path: Path) -> None:
    save_sparse(tmp_path / "model")
    small_model(intermediate_size=INTERMEDIATE).save_pretrained(tmp_path / "model")
    with pytest.raises(InputRefusedError, match=r"expected 0 outside model\.layers\.0\.mlp\.down_proj\.mask"):
        export_checkpoint(tmp_path / "model", tmp_path / "onnx", ExportOptions(dtype="fp32"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, r"pifa\.json: sparsity has the pattern None, this program reads '2:4'; export again"),
        ({"pattern": "1:4", "method": "a", "modules": {}}, r"pifa\.json: sparsity has the pattern '1:4'"),
        ({"pattern": "2:4", "modules": {}}, r"pifa\.json: sparsity lacks its method or modules, expected text"),
        ({"pattern": "2:4", "method": "a", "modules": 3}, r"pifa\.json: sparsity lacks its method or modules"),
    ],
)
def test_a_manifest_outside_the_contract_is_refused(value: Any, message: str, exported: Any, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(exported("fp16")[0], folder)
    manifest = json.loads((folder / "pifa.json").read_text())
    (folder / "pifa.json").write_text(json.dumps(manifest | {"sparsity": value}))
    with pytest.raises(InputRefusedError, match=message):
        open_folder(folder)


def test_the_command_line_takes_the_word_for_a_build(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pifa_deploy: Callable[..., Outcome]
) -> None:
    asked = []

    def build(onnx: Path, out: Path, options: Any) -> None:
        asked.append(options.sparsity)
        raise KeyboardInterrupt

    monkeypatch.setattr("pifa_deploy.engine.build_engines", build)
    for words in ([], ["--sparsity", "auto"], ["--sparsity", "enable"], ["--sparsity", "disable"]):
        pifa_deploy("build", exported("fp16")[0], tmp_path / "out", *words)
    assert asked == ["auto", "auto", "enable", "disable"]
    outcome = pifa_deploy("build", exported("fp16")[0], tmp_path / "out", "--sparsity", "force")
    assert outcome.code == 2
    assert "'force' is not one of 'auto', 'enable', 'disable'" in outcome.err
