"""The 2:4 model folder: any loader takes it, its masks are what was pruned, and what is broken is refused by name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_fixtures import SINGLE, change_config, change_tensor, cut, small_model, write
from safetensors.torch import load_file, save_file
from sparse_fixtures import INTERMEDIATE, UP_PROJ, prune, record_of, save_sparse

import pifa_deploy
from pifa_deploy import sparse_checkpoint
from pifa_deploy.checkpoint import tensor_files
from pifa_deploy.digest import model_sha256
from pifa_deploy.errors import ExitCode, InputMissingError, InputRefusedError
from pifa_deploy.model_folder import load_model, load_tokenizer
from pifa_deploy.output_folder import new_folder
from pifa_deploy.sparse_checkpoint import (
    SparseModule,
    SparsityRecord,
    is_sparse,
    read_sparsity,
    validate_sparsity,
    write_sparsity,
)

MASKS, RECORD = "sparsity_masks.safetensors", "sparsity.json"
DOWN_PROJ = "model.layers.0.mlp.down_proj"

VARIANTS: dict[str, dict[str, Any]] = {
    "one file": {},
    "sharded": {"max_shard_size": "20KB"},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder; copy it before changing it."""
    folder = tmp_path_factory.mktemp("sparse") / "sparse"
    save_sparse(folder)
    return folder


def bits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpacks a mask bit by bit, as the README of the format says."""
    rows = [[bool(int(row[j // 8]) >> (j % 8) & 1) for j in range(columns)] for row in packed]
    return torch.tensor(rows)


@pytest.mark.parametrize("variant", VARIANTS)
class TestRoundTrip:
    def test_the_masks_are_those_that_were_pruned_and_the_rest_is_zero(self, variant: str, tmp_path: Path) -> None:
        masks = save_sparse(tmp_path / "out", **VARIANTS[variant])
        record = validate_sparsity(tmp_path / "out")
        assert record == read_sparsity(tmp_path / "out") == record_of(masks)
        stored = load_file(tmp_path / "out" / MASKS)
        assert stored.keys() == {f"{name}.mask" for name in masks}
        for name, mask in masks.items():
            packed = stored[f"{name}.mask"]
            assert packed.dtype == torch.uint8
            assert packed.shape == (mask.shape[0], -(-mask.shape[1] // 8))
            assert torch.equal(bits(packed, mask.shape[1]), mask)
            files = tensor_files(tmp_path / "out")
            weight = load_file(files[f"{name}.weight"])[f"{name}.weight"]
            assert int((weight[~mask] != 0).sum()) == 0
            assert int((weight[mask] != 0).sum()) == mask.sum()

    def test_it_loads_as_the_dense_model_that_it_is(self, variant: str, tmp_path: Path) -> None:
        save_sparse(tmp_path / "out", **VARIANTS[variant])
        dtype = VARIANTS[variant].get("dtype", torch.float32)
        expected = small_model(intermediate_size=INTERMEDIATE)
        prune(expected)
        found, state = load_model(tmp_path / "out", dtype=dtype), expected.to(dtype).state_dict()
        assert found.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())

    def test_the_masks_are_no_tensors_of_the_model(self, variant: str, tmp_path: Path) -> None:
        save_sparse(tmp_path / "out", **VARIANTS[variant])
        assert set(tensor_files(tmp_path / "out")) == set(small_model(intermediate_size=INTERMEDIATE).state_dict())
        before = model_sha256(tmp_path / "out")
        for name in (MASKS, RECORD):
            (tmp_path / "out" / name).unlink()
        assert not is_sparse(tmp_path / "out")
        assert model_sha256(tmp_path / "out") == before


STOCK = """
import json, sys
from transformers import AutoModelForCausalLM
import torch
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True, local_files_only=True)
assert "pifa_deploy" not in sys.modules
zeros = {name: int((tensor == 0).sum()) for name, tensor in model.state_dict().items()}
print("FOUND" + json.dumps([{name: len(keys) for name, keys in info.items()}, zeros]))
"""


@pytest.mark.parametrize("variant", ["one file", "sharded"])
def test_stock_transformers_loads_it_without_this_package(variant: str, tmp_path: Path) -> None:
    masks = save_sparse(tmp_path / "out", **VARIANTS[variant])
    done = subprocess.run([sys.executable, "-c", STOCK, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    info, zeros = json.loads(done.stdout.partition("FOUND")[2])
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    for name, mask in masks.items():
        assert zeros[f"{name}.weight"] == mask.numel() // 2


def test_a_tokenizer_beside_the_masks_is_found(sparse: Path) -> None:
    assert load_tokenizer(sparse)("Emma").input_ids


def test_the_packing_of_a_mask_is_this(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 0, 1, 0, 0, 0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 1]]).bool()
    write_sparsity(tmp_path, record_of({"a": mask}), {"a": mask})
    # bit j % 8 of byte j // 8, lowest first: 1 + 4 + 64 + 128, 2 + 4; 4 + 8 + 16 + 32, 1 + 8
    assert load_file(tmp_path / MASKS)["a.mask"].tolist() == [[197, 6], [60, 9]]


def test_sparsity_json_is_this(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]]).bool()
    write_sparsity(
        tmp_path, record_of({"b": mask, "a": mask}, method="ria", details={"seed": 1}), {"a": mask, "b": mask}
    )
    shape = {"in_features": 4, "out_features": 2}
    assert json.loads((tmp_path / RECORD).read_text()) == {
        "schema": 1,
        "artefact": "2:4",
        "version": pifa_deploy.__version__,
        "pattern": "2:4",
        "method": "ria",
        "modules": {"a": shape, "b": shape},
        "details": {"seed": 1},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, MASKS]


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_sparse(tmp_path / name)
    for file in (MASKS, RECORD):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_record_survives_json(sparse: Path) -> None:
    record = validate_sparsity(sparse)
    assert SparsityRecord.from_json(json.loads(json.dumps(record.to_json())), "again") == record


def test_a_dense_folder_has_no_record(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    assert not is_sparse(tmp_path)
    assert not is_sparse(str(tmp_path / "absent"))


def test_force_replaces_such_a_folder_and_no_dense_model(sparse: Path, tmp_path: Path) -> None:
    shutil.copytree(sparse, tmp_path / "out")
    with new_folder(tmp_path / "out", force=True) as folder:
        (folder / "new").write_text("")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_minus_zero_is_a_zero(sparse: Path, tmp_path: Path) -> None:
    shutil.copytree(sparse, tmp_path / "out")
    change_tensor(f"{UP_PROJ}.weight", lambda weight: torch.where(weight == 0, -0.0, weight))(tmp_path / "out")
    validate_sparsity(tmp_path / "out")


def test_rows_are_checked_a_block_at_a_time(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_checkpoint, "_BLOCK_NUMBERS", 100)
    read: list[int] = []
    sliced = sparse_checkpoint._row_blocks
    monkeypatch.setattr(
        sparse_checkpoint,
        "_row_blocks",
        lambda module: (read.append(module.in_features * (rows.stop - rows.start)) or rows for rows in sliced(module)),
    )
    record = validate_sparsity(sparse)
    assert max(read) <= 100
    assert sum(read) == sum(module.in_features * module.out_features for module in record.modules.values())
    shutil.copytree(sparse, tmp_path / "out")
    nonzero_outside(UP_PROJ, row=-1, value=0.5)(tmp_path / "out")
    with pytest.raises(InputRefusedError, match=rf"{UP_PROJ}\.weight is 0\.5 at row {INTERMEDIATE - 1}, input \d+"):
        validate_sparsity(tmp_path / "out")


# The writer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda masks: masks.pop("b"),
            "b has a mask or a record but not both; expected masks for the recorded modules",
        ),
        (lambda masks: masks.update(c=masks["a"]), "c has a mask or a record but not both"),
        (
            lambda masks: masks.update(a=masks["a"].float()),
            r"mask of a is torch\.float32 \(2, 8\), expected torch\.bool",
        ),
        (lambda masks: masks.update(a=masks["a"][:1]), r"mask of a is torch\.bool \(1, 8\), expected .* \(2, 8\)"),
        (
            lambda masks: masks["b"][1].logical_not_()[0].logical_not_(),
            "mask of b does not keep 2 of each 4 inputs in row 1; prune it again",
        ),
        (lambda masks: masks["a"][0].fill_(True), "mask of a does not keep 2 of each 4 inputs in row 0"),
    ],
)
def test_masks_that_do_not_fit_the_record_are_not_written(
    change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    masks = {name: torch.tensor([[1, 0, 1, 0, 0, 0, 1, 1]] * 2).bool() for name in "ab"}
    record = record_of(masks)
    change(masks)
    with pytest.raises(ValueError, match=message):
        write_sparsity(tmp_path, record, masks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["in_features", "out_features"])
@pytest.mark.parametrize("value", [0, -4, True, 4.0, "4", None])
def test_a_size_that_is_no_positive_integer_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}, expected a positive integer"):
        SparseModule(**{"in_features": 4, "out_features": 4, name: value})


def test_inputs_that_are_no_multiple_of_four_are_refused() -> None:
    with pytest.raises(ValueError, match="in_features is 6, expected a multiple of 4"):
        SparseModule(in_features=6, out_features=4)


# Broken folders


def change_record(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        value = json.loads((folder / RECORD).read_text())
        change(value)
        (folder / RECORD).write_text(json.dumps(value))

    return corrupt


def with_field(name: str, value: Any) -> Callable[[Path], None]:
    return change_record(lambda record: record.update({name: value}))


def without_field(name: str) -> Callable[[Path], None]:
    return change_record(lambda record: record.pop(name))


def change_masks(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        masks = load_file(folder / MASKS)
        change(masks)
        save_file(masks, folder / MASKS)

    return corrupt


def set_bit(name: str, row: int, column: int, value: bool) -> Callable[[Path], None]:
    def change(masks: dict[str, torch.Tensor]) -> None:
        byte = masks[f"{name}.mask"][row, column // 8]
        byte.copy_(byte | 1 << column % 8 if value else byte & ~(1 << column % 8))

    return change_masks(change)


def nonzero_outside(name: str, row: int, value: float) -> Callable[[Path], None]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[row, int((weight[row] == 0).nonzero()[0])] = value
        return weight

    return change_tensor(f"{name}.weight", change)


def first_kept(folder: Path, name: str, row: int) -> int:
    weight = load_file(folder / SINGLE)[f"{name}.weight"]
    return int(weight[row].nonzero()[0])


def drop_a_bit(folder: Path) -> None:
    set_bit(UP_PROJ, 3, first_kept(folder, UP_PROJ, 3), False)(folder)


def add_a_bit(folder: Path) -> None:
    weight = load_file(folder / SINGLE)[f"{UP_PROJ}.weight"]
    set_bit(UP_PROJ, 5, int((weight[5] == 0).nonzero()[0]), True)(folder)


def move_a_bit(folder: Path) -> None:
    """Keeps two of four, but not the two that the weight has."""
    drop_a_bit(folder)
    column = first_kept(folder, UP_PROJ, 3)
    group = load_file(folder / SINGLE)[f"{UP_PROJ}.weight"][3, column // 4 * 4 :][:4]
    set_bit(UP_PROJ, 3, column // 4 * 4 + int((group == 0).nonzero()[0]), True)(folder)


def rename_everywhere(folder: Path) -> None:
    change_record(lambda record: record["modules"].update(gone=record["modules"].pop(UP_PROJ)))(folder)
    change_masks(lambda masks: masks.update({"gone.mask": masks.pop(f"{UP_PROJ}.mask")}))(folder)


UPDATE = "update pifa-deploy, or remove the file where another program wrote it"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a record that is no JSON": (write(RECORD, b"{"), rf"{RECORD}: not JSON"),
    "a record that is a list": (write(RECORD, b"[]"), rf"{RECORD}: holds a list, expected a JSON object"),
    "an unknown schema": (with_field("schema", 2), rf"{RECORD}: schema is 2, this program reads 1; {UPDATE}"),
    "a schema that only equals 1": (with_field("schema", True), rf"{RECORD}: schema is True, this program reads 1"),
    "no schema": (without_field("schema"), rf"{RECORD}: schema is None"),
    "another artefact": (with_field("artefact", "onnx"), rf"{RECORD}: artefact is 'onnx', this program reads '2:4'"),
    "another pattern": (with_field("pattern", "1:4"), rf"{RECORD}: pattern is '1:4', this program reads '2:4'"),
    "no method": (without_field("method"), rf"{RECORD}: method is None, expected the name of a pruning method"),
    "a method that is no text": (with_field("method", 7), rf"{RECORD}: method is 7"),
    "details that are no object": (with_field("details", [1]), rf"{RECORD}: details is \[1\], expected an object"),
    "no modules": (with_field("modules", {}), rf"{RECORD}: modules is empty or missing; prune the model again"),
    "modules in a list": (with_field("modules", ["a"]), rf"{RECORD}: modules is empty or missing"),
    "a module without its shape": (
        change_record(lambda record: record["modules"][UP_PROJ].pop("in_features")),
        rf"{RECORD}: modules\['{UP_PROJ}'\]: .*in_features.*; prune the model again",
    ),
    "a module that is no object": (with_field("modules", {"a": 3}), rf"{RECORD}: modules\['a'\]: "),
    "a module of 6 inputs": (
        with_field("modules", {"a": {"in_features": 6, "out_features": 2}}),
        rf"{RECORD}: modules\['a'\]: in_features is 6, expected a multiple of 4",
    ),
    "a quantisation beside it": (
        change_config(lambda config: config.update(quantization_config={"quant_method": "pifa"})),
        r"config\.json: has a quantization_config beside sparsity\.json; expected a dense model",
    ),
    "no masks": (
        lambda folder: (folder / MASKS).unlink(),
        rf"{MASKS}: missing, but sparsity\.json lists pruned modules; prune the model again",
    ),
    "masks cut short": (cut(MASKS, 0.6), rf"{MASKS}: not a readable safetensors file"),
    "masks cut in their header": (cut(MASKS, 0.01), rf"{MASKS}: not a readable safetensors file"),
    "a mask missing": (
        change_masks(lambda masks: masks.pop(f"{UP_PROJ}.mask")),
        rf"{MASKS}: {UP_PROJ}\.mask is missing or left over \(1 in all\); expected one mask for each module",
    ),
    "a mask left over": (
        change_masks(lambda masks: masks.update({"other.mask": torch.zeros(2, 2)})),
        rf"{MASKS}: other\.mask is missing or left over",
    ),
    "a mask of another dtype": (
        change_masks(lambda masks: masks.update({f"{UP_PROJ}.mask": masks[f"{UP_PROJ}.mask"].to(torch.int16)})),
        rf"{MASKS}: {UP_PROJ}\.mask is I16 \({INTERMEDIATE}, 6\), expected U8 \({INTERMEDIATE}, 6\)",
    ),
    "a mask of another shape": (
        change_masks(lambda masks: masks.update({f"{UP_PROJ}.mask": masks[f"{UP_PROJ}.mask"][1:].contiguous()})),
        rf"{MASKS}: {UP_PROJ}\.mask is U8 \({INTERMEDIATE - 1}, 6\), expected U8",
    ),
    "one of four kept": (drop_a_bit, rf"{MASKS}: {UP_PROJ}\.mask has not 2 of each 4 bits set in row 3; prune"),
    "three of four kept": (add_a_bit, rf"{MASKS}: {UP_PROJ}\.mask has not 2 of each 4 bits set in row 5"),
    "a bit behind the last input": (
        set_bit(DOWN_PROJ, 7, INTERMEDIATE + 1, True),
        rf"{MASKS}: {DOWN_PROJ}\.mask has padding bits that are set in row 7; prune the model again",
    ),
    "another pair than the weight's": (
        move_a_bit,
        rf"{SINGLE}: {UP_PROJ}\.weight is \S+ at row 3, input \d+, expected 0",
    ),
    "a weight that is not zero": (
        nonzero_outside(UP_PROJ, row=2, value=-0.25),
        rf"{SINGLE}: {UP_PROJ}\.weight is -0\.25 at row 2, input \d+, expected 0 outside {UP_PROJ}\.mask; "
        r"prune the model again, or remove sparsity\.json to use it as a dense model",
    ),
    "a weight that is hardly zero": (
        nonzero_outside(UP_PROJ, row=0, value=1e-45),
        r"up_proj\.weight is 1\.4e-45 at row 0",
    ),
    "a weight that is no number": (
        nonzero_outside(UP_PROJ, row=0, value=float("nan")),
        r"up_proj\.weight is nan at row 0",
    ),
    "a module that the model lacks": (
        rename_everywhere,
        r"gone\.weight is missing; sparsity\.json lists gone as pruned",
    ),
    "a weight of another shape": (
        change_tensor(f"{UP_PROJ}.weight", lambda weight: weight[1:].contiguous()),
        rf"{SINGLE}: {UP_PROJ}\.weight is F32 \({INTERMEDIATE - 1}, 48\), expected .*F32.* \({INTERMEDIATE}, 48\)",
    ),
    "a weight of integers": (
        change_tensor(f"{UP_PROJ}.weight", lambda weight: (weight * 100).to(torch.int32)),
        rf"{SINGLE}: {UP_PROJ}\.weight is I32",
    ),
    "weights cut short": (cut(SINGLE, 0.9), rf"{SINGLE}: not a readable safetensors file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused_by_name_and_never_loaded(name: str, sparse: Path, tmp_path: Path) -> None:
    corrupt, message = BROKEN[name]
    folder = tmp_path / "out"
    shutil.copytree(sparse, folder)
    corrupt(folder)
    with pytest.raises(InputRefusedError, match=message) as caught:
        validate_sparsity(folder)
    assert caught.value.exit_code == ExitCode.INPUT_REFUSED
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    with pytest.raises(InputRefusedError) as loading:
        load_model(folder, dtype=torch.float32)
    if "integers" not in name and "quantisation" not in name:  # which are refused before that
        assert re.search(message, str(loading.value))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="absent: no such folder"):
        validate_sparsity(tmp_path / "absent")


def test_a_folder_without_a_configuration_is_refused(sparse: Path, tmp_path: Path) -> None:
    shutil.copytree(sparse, tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(InputRefusedError, match=r"out: has no config\.json"):
        validate_sparsity(tmp_path / "out")


def test_without_its_record_a_changed_model_is_a_dense_one(sparse: Path, tmp_path: Path) -> None:
    shutil.copytree(sparse, tmp_path / "out")
    nonzero_outside(UP_PROJ, row=0, value=1.0)(tmp_path / "out")
    for name in (MASKS, RECORD):
        (tmp_path / "out" / name).unlink()
    load_model(tmp_path / "out", dtype=torch.float32)
