"""The checkpoint folder: what is saved loads back to the same bits, and what is broken is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pifa_deploy.checkpoint import (
    FactorizationRecord,
    ModuleSpec,
    is_checkpoint,
    tensor_files,
    validate,
)
from pifa_deploy.errors import ExitCode, InputMissingError, InputRefusedError
from pifa_deploy.linear import LowRankLinear, PifaLinear

TOKENS = torch.arange(1, 13).reshape(2, 6)
Q_PROJ = "model.layers.1.self_attn.q_proj"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"kind": "llama"},
    "llama, tied": {"kind": "llama", "tie": True},
    "qwen2 with biases": {"kind": "qwen2"},
    "qwen2 with biases, tied": {"kind": "qwen2", "tie": True},
    "a rank per layer": {"kind": "llama", "densities": (0.3, 0.5, 0.75, 0.9)},
    "low-rank format": {"kind": "llama", "form": "lowrank"},
    "low-rank format with biases": {"kind": "qwen2", "form": "lowrank", "densities": (0.4, 0.6)},
    "float16": {"kind": "qwen2", "dtype": torch.float16},
    "bfloat16": {"kind": "llama", "dtype": torch.bfloat16},
    "sharded": {"kind": "llama", "max_shard_size": "20KB"},
    "sharded, tied, biases": {"kind": "qwen2", "max_shard_size": "20KB", "tie": True, "densities": (0.3, 0.8)},
}


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def raw(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("variant", VARIANTS)
class TestRoundTrip:
    def test_loads_to_the_same_bits(self, variant: str, pifa_checkpoint: Any, pifa_model: Any) -> None:
        options = VARIANTS[variant]
        folder = pifa_checkpoint(**options)
        record = validate(folder)
        original = pifa_model(**{key: value for key, value in options.items() if key != "max_shard_size"})
        loaded = load(folder)
        kind = LowRankLinear if options.get("form") == "lowrank" else PifaLinear
        factorised = {name for name, module in loaded.named_modules() if isinstance(module, kind)}
        assert factorised == set(record.modules)
        assert len(factorised) == 14
        assert loaded.dtype == options.get("dtype", torch.float32)
        assert torch.equal(logits(loaded), logits(original))

    def test_saved_again_holds_the_same_bits(self, variant: str, pifa_checkpoint: Any, tmp_path: Path) -> None:
        options = VARIANTS[variant]
        folder = pifa_checkpoint(**options)
        load(folder).save_pretrained(tmp_path / "again", max_shard_size=options.get("max_shard_size", "1GB"))
        validate(tmp_path / "again")
        before, after = tensors(folder), tensors(tmp_path / "again")
        assert {name: raw(tensor) for name, tensor in before.items()} == {n: raw(tensor) for n, tensor in after.items()}
        if "max_shard_size" not in options:  # which tensor goes to which shard is transformers' affair
            assert (folder / SINGLE).read_bytes() == (tmp_path / "again" / SINGLE).read_bytes()
        configs = [json.loads((at / "config.json").read_text()) for at in (folder, tmp_path / "again")]
        assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
        assert torch.equal(logits(load(tmp_path / "again")), logits(load(folder)))


def test_variants_are_what_they_are_called(pifa_checkpoint: Any) -> None:
    assert len(list(pifa_checkpoint(**VARIANTS["sharded"]).glob("*.safetensors"))) > 2
    assert f"{Q_PROJ}.bias" in tensors(pifa_checkpoint(**VARIANTS["qwen2 with biases"]))
    assert "lm_head.weight" in tensors(pifa_checkpoint(**VARIANTS["llama"]))
    assert "lm_head.weight" not in tensors(pifa_checkpoint(**VARIANTS["llama, tied"]))
    ranks = {spec.rank for spec in validate(pifa_checkpoint(**VARIANTS["a rank per layer"])).modules.values()}
    assert len(ranks) > 3


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_logits_are_those_of_the_dense_low_rank_model(
    kind: str, pifa_checkpoint: Any, pifa_model: Any, tiny_model: Any
) -> None:
    dense = tiny_model(kind).double()
    with torch.no_grad():
        for name, weight in pifa_model(kind).truncated.items():
            dense.get_submodule(name).weight.copy_(weight)
    expected, found = logits(dense), logits(load(pifa_checkpoint(kind))).double()
    # Factors and activations are rounded to float32 (u = 6e-8) at about 30 places in each of 2 layers, each
    # amplified by the row norms of C (below 4 here): the errors add up to less than 60 * 4 u.
    assert float((found - expected).norm() / expected.norm()) < 60 * 4 * 6e-8


def test_a_checkpoint_holds_exactly_what_its_record_says(pifa_checkpoint: Any) -> None:
    folder = pifa_checkpoint("qwen2")
    record, found = validate(folder), tensors(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"], config["source"], config["density"]) == ("pifa", 1, "svd", 0.5)
    assert set(config["modules"][Q_PROJ]) == {"rank", "in_features", "out_features", "format"}
    for name, spec in record.modules.items():
        weight, c, rows = (found[f"{name}.{part}"] for part in ("pivot_weight", "coefficients", "pivot_rows"))
        assert weight.shape == (spec.rank, spec.in_features)
        assert c.shape == (spec.out_features - spec.rank, spec.rank)
        assert rows.dtype == torch.int32
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert f"{name}.weight" not in found
        assert not [key for key in found if key.startswith(name) and key.endswith("output_index")]
        assert spec.parameters() == weight.numel() + c.numel()


def test_a_record_survives_json() -> None:
    modules = {
        "b": ModuleSpec(rank=2, in_features=3, out_features=4),
        "a": ModuleSpec(rank=1, in_features=1, out_features=1, format="lowrank"),
    }
    record = FactorizationRecord(modules=modules, source="whitened", density=0.5, details={"tokens": 3})
    assert FactorizationRecord.from_json(json.loads(json.dumps(record.to_json())), "x") == record
    assert list(record.to_json()["modules"]) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_checkpoint_loads_in_half_precision(dtype: torch.dtype, pifa_checkpoint: Any) -> None:
    full, half = load(pifa_checkpoint("qwen2")), load(pifa_checkpoint("qwen2"), dtype=dtype)
    for name, tensor in full.state_dict().items():
        found = half.state_dict()[name]
        assert torch.equal(found, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        assert found.dtype == (dtype if tensor.is_floating_point() else tensor.dtype)
    assert torch.isfinite(logits(half)).all()
    # The same rounding as in the test against the dense model, with this dtype's unit.
    unit = torch.finfo(dtype).eps / 2
    assert float((logits(half).float() - logits(full)).norm() / logits(full).norm()) < 60 * 4 * unit


def test_a_loaded_model_generates_and_trains(pifa_checkpoint: Any) -> None:
    model = load(pifa_checkpoint("llama"))
    out = model.generate(TOKENS[:1], max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 10)
    model(TOKENS, labels=TOKENS).loss.backward()
    layer = model.get_submodule(Q_PROJ)
    assert layer.pivot_weight.grad.abs().sum() > 0
    assert layer.coefficients.grad.abs().sum() > 0


def test_only_folders_with_a_record_are_checkpoints(pifa_checkpoint: Any, tiny_model: Any, tmp_path: Path) -> None:
    assert is_checkpoint(pifa_checkpoint("llama"))
    tiny_model().save_pretrained(tmp_path / "dense")
    assert not is_checkpoint(tmp_path / "dense")
    assert not is_checkpoint(tmp_path)
    with pytest.raises(InputRefusedError, match=r"config\.json: quantization_config is not a PIFA record"):
        validate(tmp_path / "dense")


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="nowhere: no such folder") as caught:
        validate(tmp_path / "nowhere")
    assert caught.value.exit_code == ExitCode.USAGE


def test_the_single_file_counts_where_an_index_stands_too(pifa_checkpoint: Any, tmp_path: Path) -> None:
    # transformers loads the single file then; what is checked must be what is loaded.
    folder = copied(pifa_checkpoint("llama"), tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    assert set(tensor_files(folder).values()) == {folder / SINGLE}
    validate(folder)
    load(folder)


# Corruptions. Each is a function of a copied folder; the pattern must be in the message.


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        held = load_file(folder / SINGLE)
        changed = change(held.pop(name))
        save_file(held if changed is None else {**held, name: changed}, folder / SINGLE, metadata={"format": "pt"})

    return corrupt


def change_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return corrupt


def set_module(**fields: Any) -> Callable[[Path], None]:
    return change_config(lambda record: record["modules"][Q_PROJ].update(fields))


def set_rows(change: Callable[[list[int]], list[int]]) -> Callable[[Path], None]:
    return change_tensor(f"{Q_PROJ}.pivot_rows", lambda rows: torch.tensor(change(rows.tolist()), dtype=torch.int32))


def with_entry(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


def cut_short(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) * 2 // 3])


def cut_in_the_header(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:100])


def extra_dense_weight(folder: Path) -> None:
    held = load_file(folder / SINGLE)
    save_file({**held, f"{Q_PROJ}.weight": torch.zeros(32, 32)}, folder / SINGLE, metadata={"format": "pt"})


def write(name: str, text: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


CORRUPTIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file cut short": (cut_short, r"model\.safetensors: not a readable safetensors file"),
    "a file cut in its header": (cut_in_the_header, r"model\.safetensors: not a readable safetensors file"),
    "an empty file": (write(SINGLE, b""), r"model\.safetensors: not a readable safetensors file"),
    "a file that is a pickle": (write(SINGLE, b"\x80\x04\x95" + 99 * b"."), r"model\.safetensors: not a readable"),
    "no weights at all": (
        lambda at: (at / SINGLE).unlink(),
        r"has neither model\.safetensors nor model\.safetensors\.i",
    ),
    "weights of integers": (
        change_tensor(f"{Q_PROJ}.pivot_weight", lambda t: t.to(torch.int32)),
        rf"model\.safetensors: {Q_PROJ}\.pivot_weight is I32 .*expected BF16/F16/F32/F64",
    ),
    "pivot rows of another width": (
        change_tensor(f"{Q_PROJ}.pivot_rows", lambda t: t.to(torch.int64)),
        rf"{Q_PROJ}\.pivot_rows is I64 .*expected I32",
    ),
    "a pivot weight of another shape": (
        change_tensor(f"{Q_PROJ}.pivot_weight", lambda t: t[:, :-1].contiguous()),
        rf"{Q_PROJ}\.pivot_weight is F32 \(9, 31\), expected .* \(9, 32\)",
    ),
    "coefficients transposed": (
        change_tensor(f"{Q_PROJ}.coefficients", lambda t: t.T.contiguous()),
        rf"{Q_PROJ}\.coefficients is F32 \(9, 23\), expected .* \(23, 9\)",
    ),
    "a bias of another length": (
        change_tensor(f"{Q_PROJ}.bias", lambda t: t[:-1].contiguous()),
        rf"{Q_PROJ}\.bias is F32 \(31,\), expected .* \(32,\)",
    ),
    "a missing tensor": (
        change_tensor(f"{Q_PROJ}.coefficients", lambda t: None),
        rf"{Q_PROJ}\.coefficients is missing; config\.json lists {Q_PROJ} as factorised",
    ),
    "a dense weight beside the factors": (extra_dense_weight, rf"holds {Q_PROJ}\.weight beside its factors"),
    "a NaN among the coefficients": (
        change_tensor(f"{Q_PROJ}.coefficients", with_entry(np.nan)),
        rf"model\.safetensors: {Q_PROJ}\.coefficients has NaN or Inf",
    ),
    "an Inf in the embedding": (
        change_tensor("model.embed_tokens.weight", with_entry(np.inf)),
        r"model\.safetensors: model\.embed_tokens\.weight has NaN or Inf",
    ),
    "a duplicate pivot": (
        set_rows(lambda rows: [rows[0], rows[0], *rows[2:]]),
        rf"model\.safetensors: {Q_PROJ}\.pivot_rows has duplicate rows at 0, expected strictly ascending",
    ),
    "unsorted pivots": (set_rows(lambda rows: rows[::-1]), rf"{Q_PROJ}\.pivot_rows has unsorted rows at 0"),
    "a pivot above the last row": (set_rows(lambda rows: [*rows[:-1], 32]), r"has a row 32, expected 0 <= row < 32"),
    "a negative pivot": (set_rows(lambda rows: [-1, *rows[1:]]), r"has a row -1, expected 0 <= row < 32"),
    "rank 0": (set_module(rank=0), rf"config\.json: .*modules\['{Q_PROJ}'\]: rank is 0, expected a positive integer"),
    "a rank above the smaller side": (set_module(rank=33), r"rank is 33, expected at most 32"),
    "a rank that is no integer": (set_module(rank=9.5), r"rank is 9\.5, expected a positive integer"),
    "a rank that is true": (set_module(rank=True), r"rank is True, expected a positive integer"),
    "a negative size": (set_module(in_features=-32), r"in_features is -32, expected a positive integer"),
    "an unknown format": (set_module(format="gzip"), r"format is 'gzip', expected one of"),
    "an unknown field of a module": (set_module(pickle="x"), rf"modules\['{Q_PROJ}'\].*pickle"),
    "a module that is no object": (
        change_config(lambda r: r["modules"].update({Q_PROJ: 7})),
        rf"modules\['{Q_PROJ}'\]",
    ),
    "no modules": (change_config(lambda r: r.update(modules={})), r"quantization_config\.modules is empty or missing"),
    "an unknown version": (
        change_config(lambda r: r.update(version=2)),
        r"config\.json: quantization_config\.version is 2, this program reads 1; update pifa-deploy",
    ),
    "a density that is text": (change_config(lambda r: r.update(density="half")), r"density is 'half'"),
    "details that are a list": (change_config(lambda r: r.update(details=[1])), r"details is \[1\]"),
    "another quantization method": (change_config(lambda r: r.update(quant_method="awq")), "is not a PIFA record"),
    "a config that is not JSON": (write("config.json", "{'a': 1}"), r"config\.json: not JSON"),
    "a config cut short": (write("config.json", '{"quantization_config": {'), r"config\.json: not JSON"),
    "a config that is not text": (write("config.json", b"\xff\xfe\x00"), r"config\.json: not JSON"),
    "a config nested without end": (write("config.json", "[" * 200_000), r"config\.json: not JSON"),
    "a config with an endless number": (write("config.json", '{"a": ' + "9" * 5000 + "}"), r"config\.json: not JSON"),
    "a config that is a list": (write("config.json", "[1]"), r"config\.json: holds a list, expected a JSON object"),
    "no config": (lambda at: (at / "config.json").unlink(), r"has no config\.json"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupt_checkpoint_is_refused_by_name(corruption: str, pifa_checkpoint: Any, tmp_path: Path) -> None:
    corrupt, pattern = CORRUPTIONS[corruption]
    folder = copied(pifa_checkpoint("qwen2"), tmp_path)
    validate(folder)
    corrupt(folder)
    with pytest.raises(InputRefusedError, match=pattern) as caught:
        validate(folder)
    assert caught.value.exit_code == ExitCode.INPUT_REFUSED == 6
    assert "\n" not in str(caught.value)


def change_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return corrupt


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def shard_with_a_stranger(folder: Path) -> None:
    save_file({**load_file(first_shard(folder)), "stranger": torch.zeros(1)}, first_shard(folder))


SHARDED_CORRUPTIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a path above the folder": (
        change_index(lambda m: m.update({f"{Q_PROJ}.pivot_rows": "../outside.safetensors"})),
        r"index\.json: weight_map names '\.\./outside\.safetensors', expected a file name inside the folder",
    ),
    "an absolute path": (
        change_index(lambda m: m.update({f"{Q_PROJ}.pivot_rows": "/etc/passwd"})),
        r"weight_map names '/etc/passwd', expected a file name inside",
    ),
    "the parent folder": (change_index(lambda m: m.update(a="..")), r"weight_map names '\.\.'"),
    "no path": (change_index(lambda m: m.update(a="")), r"weight_map names ''"),
    "a path that is a number": (change_index(lambda m: m.update(a=3)), r"weight_map names 3,"),
    "a path with a zero byte": (change_index(lambda m: m.update(a="a\0b")), r"weight_map names 'a\\x00b'"),
    "a shard that is not there": (
        lambda at: first_shard(at).unlink(),
        r"weight_map names model-00001-of-.*\.safetensors, which is missing",
    ),
    "a shard cut short": (
        lambda at: first_shard(at).write_bytes(first_shard(at).read_bytes()[:-5]),
        r"model-00001-of-.*\.safetensors: not a readable safetensors file",
    ),
    "a tensor in another shard than listed": (
        change_index(lambda m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]})),
        r"index\.json: model\.norm\.weight should be in model-.*, which does not hold it",
    ),
    "a tensor that is not listed": (shard_with_a_stranger, r"holds stranger, which model\.safetensors\.index\.json"),
    "an index without a map": (write(INDEX, "{}"), r"index\.json: weight_map is missing"),
    "an index that is not JSON": (write(INDEX, "x"), r"index\.json: not JSON"),
}


@pytest.mark.parametrize("corruption", SHARDED_CORRUPTIONS)
def test_a_corrupt_sharded_checkpoint_is_refused_by_name(corruption: str, pifa_checkpoint: Any, tmp_path: Path) -> None:
    corrupt, pattern = SHARDED_CORRUPTIONS[corruption]
    folder = copied(pifa_checkpoint(**VARIANTS["sharded"]), tmp_path)
    validate(folder)
    corrupt(folder)
    with pytest.raises(InputRefusedError, match=pattern) as caught:
        validate(folder)
    assert caught.value.exit_code == 6


def test_values_can_be_left_unread(pifa_checkpoint: Any, tmp_path: Path) -> None:
    folder = copied(pifa_checkpoint("qwen2"), tmp_path)
    change_tensor(f"{Q_PROJ}.coefficients", with_entry(np.nan))(folder)
    validate(folder, values=False)
    with pytest.raises(InputRefusedError, match="NaN"):
        validate(folder)


def add_tensor(name: str) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        save_file({**load_file(folder / SINGLE), name: torch.zeros(3)}, folder / SINGLE, metadata={"format": "pt"})

    return corrupt


def rename_module(folder: Path) -> None:
    held = {key.replace(Q_PROJ, "model.layers.7.q"): value for key, value in load_file(folder / SINGLE).items()}
    save_file(held, folder / SINGLE, metadata={"format": "pt"})
    change_config(lambda r: r["modules"].update({"model.layers.7.q": r["modules"].pop(Q_PROJ)}))(folder)


def resize_module(folder: Path) -> None:
    change_tensor(f"{Q_PROJ}.pivot_weight", lambda t: t[:, :16].contiguous())(folder)
    set_module(in_features=16)(folder)


# What the folder alone cannot tell, and what it can, when transformers opens it.
LOAD_CORRUPTIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a norm is missing": (
        change_tensor("model.layers.0.input_layernorm.weight", lambda t: None),
        r"model\.layers\.0\.input_layernorm\.weight is missing \(1 in all\); it would stay uninitialised",
    ),
    "the bias of a factorised layer is missing": (
        change_tensor(f"{Q_PROJ}.bias", lambda t: None),
        rf"{Q_PROJ}\.bias is missing \(1 in all\)",
    ),
    "the head is missing and not tied": (
        change_tensor("lm_head.weight", lambda t: None),
        r"lm_head\.weight is missing",
    ),
    "a factor is missing": (
        change_tensor(f"{Q_PROJ}.pivot_rows", lambda t: None),
        rf"{Q_PROJ}\.pivot_rows is missing",
    ),
    "a tensor is unused": (add_tensor("model.stranger"), r"model\.stranger fits no module of the model \(1 in all\)"),
    "a module does not exist": (
        rename_module,
        r"config\.json lists model\.layers\.7\.q as factorised, but the model has no such module",
    ),
    "a module has another size": (resize_module, rf"config\.json says {Q_PROJ} is 32 x 16, the model has Linear"),
    "a module is no linear": (
        change_config(lambda r: r["modules"].update({"model.norm": r["modules"][Q_PROJ]})),
        r"config\.json says model\.norm is 32 x 32, the model has Qwen2RMSNorm",
    ),
    "a weight is NaN": CORRUPTIONS["a NaN among the coefficients"],
    "a pivot is duplicate": CORRUPTIONS["a duplicate pivot"],
    "a shape is wrong": CORRUPTIONS["coefficients transposed"],
    "a rank is zero": (set_module(rank=0), r"rank is 0, expected a positive integer"),
    "the version is unknown": (change_config(lambda r: r.update(version=2)), r"version is 2, this program reads 1"),
}


@pytest.mark.parametrize("corruption", LOAD_CORRUPTIONS)
def test_from_pretrained_refuses_by_name(corruption: str, pifa_checkpoint: Any, tmp_path: Path) -> None:
    corrupt, pattern = LOAD_CORRUPTIONS[corruption]
    folder = copied(pifa_checkpoint("qwen2"), tmp_path)
    corrupt(folder)
    with pytest.raises(InputRefusedError, match=pattern) as caught:
        load(folder)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("corruption", ["a file cut short", "an empty file"])
def test_from_pretrained_does_not_load_half_a_file(corruption: str, pifa_checkpoint: Any, tmp_path: Path) -> None:
    folder = copied(pifa_checkpoint("qwen2"), tmp_path)
    CORRUPTIONS[corruption][0](folder)
    with pytest.raises(Exception, match=re.compile("safetensors|header|incomplete", re.IGNORECASE)):
        load(folder)
