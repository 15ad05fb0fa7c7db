"""What an artefact holds: told by its content, the same in the table and in JSON as in the files."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx
import pytest
from cli_fixtures import Outcome, change_config, change_tensor
from safetensors.torch import load_file
from sparse_fixtures import UP_PROJ, save_sparse

from pifa_deploy.checkpoint import validate
from pifa_deploy.compression import CompressOptions, compress_model
from pifa_deploy.engine_record import EngineFile, EngineLayer, EngineRecord
from pifa_deploy.errors import InputMissingError, InputRefusedError
from pifa_deploy.inspection import inspect_path

pytest_plugins = ("cli_plugin",)

RECORD = "sparsity.json"


@pytest.fixture
def engine_folder(tmp_path: Path) -> Path:
    record = EngineRecord(
        backend="tensorrt-rtx",
        version="1.7.1",
        onnx_sha256={"model.onnx": "a" * 64},
        compute_capabilities=("8.6", "8.9"),
        targets=("rtx4090",),
        profiles=({"input_ids": {"min": (1, 1), "opt": (1, 1), "max": (1, 16)}},),
        layers=(EngineLayer(name="gemm 0", type="gemm", precision="Half", modules=("a",)),),
        engines=(
            EngineFile(
                file="model.engine", bytes=7, sha256=sha256(b"engine!").hexdigest(), compute_capabilities=("8.6", "8.9")
            ),
        ),
        seconds=1.5,
        peak_rss_bytes=10,
    )
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "model.engine").write_bytes(b"engine!")
    (tmp_path / "engine" / "engine.json").write_text(json.dumps(record.to_json()))
    return tmp_path / "engine"


def test_a_checkpoint_is_told_by_its_record(checkpoint: Path) -> None:
    found, record = inspect_path(checkpoint), validate(checkpoint)
    stored = load_file(checkpoint / "model.safetensors")
    assert found.kind == "checkpoint"
    assert found.facts["architecture"] == "LlamaForCausalLM"
    assert found.facts["tensors"] == len(stored)
    assert found.facts["bytes"] == (checkpoint / "model.safetensors").stat().st_size
    assert found.facts["dtypes"] == {"F32": len(stored) - 12, "I32": 12}
    assert (found.facts["source"], found.facts["requested_density"], found.facts["modules"]) == ("svd", 0.5, 14)
    held = sum(stored[f"{name}.{part}"].numel() for name in record.modules for part in ("pivot_weight", "coefficients"))
    dense = sum(spec.in_features * spec.out_features for spec in record.modules.values())
    assert found.facts["module_density"] == pytest.approx(held / dense, abs=5e-5)  # shown with four digits
    rows = found.to_json()["rows"]
    assert [row["module"] for row in rows] == sorted(record.modules)
    for row in rows:
        spec = record.modules[row["module"]]
        by_columns = row["module"].endswith("down_proj")  # the default layout of an MLP
        assert (row["format"], row["rank"], row["out"], row["in"]) == (
            "pifa-column" if by_columns else "pifa",
            stored[f"{row['module']}.pivot_weight"].shape[by_columns],
            spec.out_features,
            spec.in_features,
        )
        assert row["density"] == pytest.approx(spec.parameters() / (row["out"] * row["in"]), abs=5e-5)


def test_the_low_rank_format_is_told_with_its_own_density(dense: Path, tmp_path: Path) -> None:
    compress_model(dense, tmp_path / "out", CompressOptions(density=0.5, method="svd", format="lowrank"))
    for row in inspect_path(tmp_path / "out").to_json()["rows"]:
        assert row["format"] == "lowrank"
        assert row["density"] == pytest.approx(
            row["rank"] * (row["out"] + row["in"]) / (row["out"] * row["in"]), abs=5e-5
        )
        assert row["density"] <= 0.5


def test_a_dense_model_is_told(dense: Path) -> None:
    found = inspect_path(dense)
    assert (found.kind, found.rows) == ("dense model", ())
    assert found.facts["dtypes"] == {"F32": len(load_file(dense / "model.safetensors"))}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse") / "model"
    save_sparse(folder)
    return folder


def test_a_pruned_model_is_told_with_its_zeros(sparse: Path) -> None:
    found, stored = inspect_path(sparse), load_file(sparse / "model.safetensors")
    assert found.kind == "2:4 model"
    assert (found.facts["pattern"], found.facts["method"], found.facts["modules"]) == ("2:4", "wanda", 14)
    assert found.facts["tensors"] == len(stored)
    assert found.facts["bytes"] == (sparse / "model.safetensors").stat().st_size
    zeros = sum(int((tensor == 0).sum()) for tensor in stored.values())
    assert found.facts["zeros"] == pytest.approx(zeros / sum(tensor.numel() for tensor in stored.values()), abs=5e-5)
    assert found.facts["module_zeros"] == 0.5 > found.facts["zeros"] > 0.1
    assert found.facts["details"] == {"samples": 8}
    rows = {row["module"]: (row["out"], row["in"], row["zeros"]) for row in found.to_json()["rows"]}
    expected = {
        name: tuple(stored[f"{name}.weight"].shape) for name in json.loads((sparse / RECORD).read_text())["modules"]
    }
    assert rows == {name: (*shape, 0.5) for name, shape in expected.items()}


def test_weights_that_are_zero_by_chance_count_too(sparse: Path, tmp_path: Path) -> None:
    shutil.copytree(sparse, tmp_path / "out")
    change_tensor(f"{UP_PROJ}.weight", lambda weight: weight * 0)(tmp_path / "out")
    found = inspect_path(tmp_path / "out")
    assert {row["module"]: row["zeros"] for row in found.to_json()["rows"]}[UP_PROJ] == 1
    assert found.facts["module_zeros"] > 0.5


def test_a_pruned_model_that_is_not_what_its_record_says_is_refused(sparse: Path, tmp_path: Path) -> None:
    shutil.copytree(sparse, tmp_path / "out")
    change_tensor(f"{UP_PROJ}.weight", lambda weight: weight + 1)(tmp_path / "out")
    with pytest.raises(InputRefusedError, match=rf"{UP_PROJ}\.weight is 1 at row 0, input \d+, expected 0 outside"):
        inspect_path(tmp_path / "out")


@pytest.mark.parametrize("record", [None, {"pattern": "2:4", "method": "ria", "modules": {"a": {}, "b": {}}}])
def test_an_onnx_folder_tells_the_sparsity_of_its_source(
    record: dict[str, Any] | None, onnx_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(onnx_folder, tmp_path / "onnx")
    manifest = json.loads((tmp_path / "onnx" / "pifa.json").read_text())
    (tmp_path / "onnx" / "pifa.json").write_text(json.dumps(manifest | {"sparsity": record}))
    expected = record and {"pattern": "2:4", "method": "ria", "modules": 2}
    assert inspect_path(tmp_path / "onnx").facts["sparsity"] == expected


def test_an_onnx_folder_is_told_by_its_graph(onnx_folder: Path, checkpoint: Path) -> None:
    found, model = inspect_path(onnx_folder), onnx.load(onnx_folder / "model.onnx")
    assert found.kind == "onnx"
    counted = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    assert found.facts["operators"] == dict(counted)
    named = {name: count for name, count in found.facts["operators"].items() if name.startswith("pifa::")}
    assert named == {"pifa::PifaLinear": 8, "pifa::PifaOrderedLinear": 4, "pifa::PifaColumnLinear": 2}
    assert found.facts["opsets"]["pifa"] == 1
    assert (found.facts["dtype"], found.facts["plain_ops"], found.facts["cache_layers"]) == ("fp32", False, 2)
    assert found.facts["weight_bytes"] == sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    ranks = {row["module"]: row["rank"] for row in found.to_json()["rows"]}
    assert ranks == {name: spec.rank for name, spec in validate(checkpoint).modules.items()}


def test_an_engine_folder_is_told_by_engine_json(engine_folder: Path) -> None:
    found = inspect_path(engine_folder)
    assert found.kind == "engine"
    assert (found.facts["backend"], found.facts["layers"]) == ("tensorrt-rtx", 1)
    assert found.rows == (("model.engine", 7, "8.6, 8.9", sha256(b"engine!").hexdigest()),)


def test_the_file_that_tells_the_kind_may_be_named_itself(
    checkpoint: Path, onnx_folder: Path, engine_folder: Path
) -> None:
    for folder, name in ((checkpoint, "config.json"), (onnx_folder, "model.onnx"), (engine_folder, "engine.json")):
        assert inspect_path(folder / name) == inspect_path(folder)


@pytest.mark.parametrize("make", ["checkpoint", "dense", "sparse", "onnx_folder", "engine_folder"])
def test_table_and_json_say_the_same(
    make: str, request: pytest.FixtureRequest, tmp_path: Path, pifa_deploy: Callable[..., Outcome]
) -> None:
    folder = request.getfixturevalue(make)
    shown = pifa_deploy("inspect", folder, "--json", tmp_path / "result.json")
    value = json.loads((tmp_path / "result.json").read_text())
    assert value == json.loads(json.dumps(inspect_path(folder).to_json()))
    lines = shown.out.splitlines()
    assert lines[0] == f"{folder}: {value['kind']}"
    rows = value.pop("rows")
    assert [line.split()[0] for line in lines[1 : len(value)]] == list(inspect_path(folder).facts)
    for row in rows:
        first = next(iter(inspect_path(folder).columns))
        line = next(line for line in lines if line.startswith(f"{row[first]} "))
        assert all(str(cell).replace(",", "") in line.replace(",", "") for cell in row.values())


def test_names_of_folders_mean_nothing(checkpoint: Path, onnx_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model.engine")
    shutil.copytree(onnx_folder, tmp_path / "model.safetensors")
    assert inspect_path(tmp_path / "model.engine").kind == "checkpoint"
    assert inspect_path(tmp_path / "model.safetensors").kind == "onnx"


@pytest.mark.parametrize(
    ("names", "shown"), [(None, "unknown"), ([], "unknown"), (7, "unknown"), (["A", "B"], "A")], ids=str
)
def test_an_architecture_that_is_no_list_is_unknown(names: object, shown: str, dense: Path, tmp_path: Path) -> None:
    shutil.copytree(dense, tmp_path / "dense")
    change_config(lambda config: config.update(architectures=names))(tmp_path / "dense")
    assert inspect_path(tmp_path / "dense").facts["architecture"] == shown


@pytest.mark.parametrize("name", ["empty folder", "other folder", "other file", "weights alone"])
def test_other_folders_and_files_are_refused(name: str, checkpoint: Path, tmp_path: Path) -> None:
    place = tmp_path / "x"
    if name.endswith("folder"):
        place.mkdir()
        if name.startswith("other"):
            (place / "thesis.tex").write_text("x")
    else:
        shutil.copytree(checkpoint, place)
        place = place / ("tokenizer.json" if name == "other file" else "model.safetensors")
    with pytest.raises(InputRefusedError, match="is no checkpoint, ONNX folder or engine folder; expected"):
        inspect_path(place)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="absent: no such file or folder"):
        inspect_path(tmp_path / "absent")
