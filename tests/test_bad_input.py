"""Bad input through the command line: one line that names what is wrong, the right exit code, nothing half-written."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_fixtures import (
    Q_PROJ,
    SINGLE,
    Outcome,
    change_config,
    change_tensor,
    content,
    cut,
    save_dense,
    shard_elsewhere,
    small_model,
    small_tokenizer,
    with_entry,
    write,
)
from onnx import TensorProto
from research_fixtures import archive_of, compressed, global_only, rewritten, save_research, tiny_llama
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from pifa_deploy import op_spec
from pifa_deploy.output_folder import new_folder

pytest_plugins = ("cli_plugin",)

Command = Callable[..., Outcome]
USAGE, NOT_DECIDED, STAGE_FAILED, MISFIT, REFUSED, HELD = 2, 3, 4, 5, 6, 7


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "broken"))


@pytest.fixture
def refused(pifa_deploy: Command, tmp_path: Path) -> Callable[..., None]:
    """`refused(code, pattern, "compress", ...)` asserts that nothing in tmp_path was added, changed or removed."""

    def check(code: int, pattern: str, *arguments: object) -> None:
        before = content(tmp_path)
        pifa_deploy(*arguments).failed(code, pattern)
        assert content(tmp_path) == before

    return check


# PIFA checkpoints


def rows(change: Callable[[list[int]], list[int]]) -> Callable[[Path], None]:
    return change_tensor(f"{Q_PROJ}.pivot_rows", lambda t: torch.tensor(change(t.tolist()), dtype=torch.int32))


def rank(value: int) -> Callable[[Path], None]:
    return change_config(lambda config: config["quantization_config"]["modules"][Q_PROJ].update(rank=value))


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file cut short": (cut(SINGLE, 0.6), r"model\.safetensors: not a readable safetensors file"),
    "not safetensors": (write(SINGLE, b"PK\3\4" + bytes(64)), r"model\.safetensors: not a readable safetensors file"),
    "integer weights": (change_tensor(f"{Q_PROJ}.pivot_weight", lambda t: t.int()), rf"{Q_PROJ}\.pivot_weight is I32"),
    "another shape": (
        change_tensor(f"{Q_PROJ}.coefficients", lambda t: t[:, 1:].contiguous()),
        rf"{Q_PROJ}\.coefficients is F32 \(\d+, \d+\), expected",
    ),
    "another shape of a dense tensor": (
        change_tensor("model.norm.weight", lambda t: t[1:].contiguous()),
        r"model\.norm\.weight is \(47,\), the configuration says \(48,\)",
    ),
    "NaN": (change_tensor(f"{Q_PROJ}.coefficients", with_entry(np.nan)), rf"{Q_PROJ}\.coefficients has NaN or Inf"),
    "Inf": (change_tensor("lm_head.weight", with_entry(np.inf)), r"lm_head\.weight has NaN or Inf"),
    "rank 0": (rank(0), rf"config\.json: .*{Q_PROJ}.*rank is 0, expected a positive integer"),
    "a rank above the smaller side": (rank(49), rf"config\.json: .*{Q_PROJ}.*rank is 49, expected at most 48"),
    "duplicate pivots": (rows(lambda r: [r[0], r[0], *r[2:]]), rf"{Q_PROJ}\.pivot_rows has duplicate rows at 0"),
    "unsorted pivots": (rows(lambda r: r[::-1]), rf"{Q_PROJ}\.pivot_rows has unsorted rows at 0"),
    "a pivot out of range": (rows(lambda r: [*r[:-1], 48]), rf"{Q_PROJ}\.pivot_rows has a row 48, expected 0 <= row <"),
    "a missing tensor": (change_tensor("model.norm.weight", lambda t: None), r"model\.norm\.weight"),
    "weights outside the folder": (shard_elsewhere, r"weight_map names '\.\./outside\.safetensors', expected a file"),
    "a config that is no JSON": (write("config.json", b"{"), r"config\.json: not JSON"),
    "no config": (lambda at: (at / "config.json").unlink(), r"no config\.json|is no checkpoint"),
}
# `inspect` builds no model: it cannot know which tensors of the dense part there should be.
NEEDS_MODEL = {"a missing tensor", "another shape of a dense tensor"}


CASES = [(command, each) for command in ("export", "inspect", "evaluate") for each in CHECKPOINTS]


@pytest.mark.parametrize(
    ("command", "corruption"), [case for case in CASES if not (case[0] == "inspect" and case[1] in NEEDS_MODEL)]
)
def test_a_corrupt_checkpoint_is_refused(
    command: str, corruption: str, checkpoint: Path, text: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    corrupt, pattern = CHECKPOINTS[corruption]
    folder = copied(checkpoint, tmp_path)
    corrupt(folder)
    more = {"export": [tmp_path / "out"], "inspect": [], "evaluate": ["--text", text, "--context", 16]}[command]
    refused(REFUSED, pattern, command, folder, *more)


def test_a_reference_that_is_not_the_source_is_refused(
    onnx_folder: Path, checkpoint: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    folder = copied(checkpoint, tmp_path)
    change_tensor(f"{Q_PROJ}.pivot_weight", lambda t: t * 1.01)(folder)
    refused(REFUSED, "was exported from a checkpoint with hash", "verify", onnx_folder, "--reference", folder)


# Dense models

DENSE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file cut short": (cut(SINGLE, 0.5), r"model\.safetensors: not a readable safetensors file"),
    "not safetensors": (write(SINGLE, b"\x80\x04."), r"model\.safetensors: not a readable safetensors file"),
    "integer weights": (
        change_tensor(f"{Q_PROJ}.weight", lambda t: t.to(torch.int8)),
        rf"model\.safetensors: {Q_PROJ}\.weight is I8, expected BF16/F16/F32/F64",
    ),
    "another shape": (
        change_tensor(f"{Q_PROJ}.weight", lambda t: t[1:].contiguous()),
        rf"{Q_PROJ}\.weight is \(47, 48\), the configuration says \(48, 48\)",
    ),
    "NaN": (change_tensor(f"{Q_PROJ}.weight", with_entry(np.nan)), rf"{Q_PROJ}\.weight has NaN or Inf"),
    "Inf": (change_tensor("model.norm.weight", with_entry(-np.inf)), r"model\.norm\.weight has NaN or Inf"),
    "a missing tensor": (change_tensor(f"{Q_PROJ}.weight", lambda t: None), rf"missing keys: {Q_PROJ}\.weight"),
    "a config of more layers": (
        change_config(lambda config: config.update(num_hidden_layers=3, layer_types=None)),
        r"missing keys: model\.layers\.2\.",
    ),
    "an unknown architecture": (change_config(lambda c: c.update(model_type="nope")), r"model type `nope`"),
    "a size that is text": (change_config(lambda c: c.update(hidden_size="wide")), r"hidden_size"),
    "weights outside the folder": (shard_elsewhere, r"weight_map names '\.\./outside\.safetensors'"),
    "no config": (lambda at: (at / "config.json").unlink(), r"has no config\.json"),
}


@pytest.mark.parametrize("corruption", DENSE)
@pytest.mark.parametrize("command", ["compress", "export"])
def test_a_corrupt_dense_model_is_refused(
    command: str, corruption: str, dense: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    corrupt, pattern = DENSE[corruption]
    folder = copied(dense, tmp_path)
    corrupt(folder)
    more = ["--density", 0.5, "--method", "svd"] if command == "compress" else []
    refused(REFUSED, pattern, command, folder, tmp_path / "out", *more)


def compress(source: object, tmp_path: Path, *more: object) -> tuple[object, ...]:
    return ("compress", source, tmp_path / "out", "--density", 0.5, *(more or ("--method", "svd")))


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def test_a_model_folder_with_pickled_weights_only_is_refused_and_not_unpickled(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copied(dense, tmp_path)
    torch.save({**load_file(folder / SINGLE), "x": Evil()}, folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    refused(REFUSED, "no file named model.safetensors", *compress(folder, tmp_path))


@pytest.mark.parametrize("model_type", ["llama", "of_its_own"])
def test_code_that_comes_with_a_model_is_not_run(
    model_type: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pifa_deploy: Command
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    folder = copied(dense, tmp_path)
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_config(lambda config: config.update(auto_map=auto, model_type=model_type))(folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    outcome = pifa_deploy(*compress(folder, tmp_path))
    assert not (tmp_path / "pwned").exists()
    if model_type == "llama":
        assert outcome.code == 0
    else:
        outcome.failed(REFUSED, "custom code")
        assert not (tmp_path / "out").exists()


def test_a_model_without_linear_layers_is_refused(tmp_path: Path, refused: Callable[..., None]) -> None:
    config = GPT2Config(vocab_size=31, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    refused(REFUSED, "GPT2LMHeadModel has no nn.Linear layers to factorise", *compress(tmp_path / "gpt2", tmp_path))


def test_a_factorised_model_is_refused(checkpoint: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    refused(REFUSED, "pifa: is factorised already; give the dense model", *compress(checkpoint, tmp_path))


def test_activations_that_are_not_finite_fail_by_layer(
    tmp_path: Path, text: Path, refused: Callable[..., None]
) -> None:
    model = small_model()
    model.get_submodule("model.layers.0.input_layernorm").weight.data[:] = 1e30  # its square is no float32
    model.save_pretrained(tmp_path / "dense")
    small_tokenizer().save_pretrained(tmp_path / "dense")
    refused(
        STAGE_FAILED,
        r"model\.layers\.0\.self_attn\.o_proj input has NaN or Inf in torch\.float32; check the model",
        *compress(tmp_path / "dense", tmp_path, "--calibration", text, "--sequence-length", 32),
    )


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (b"not a model", r"model\.gguf: starts with b'not ', expected a model folder or a GGUF file"),
        (b"", r"model\.gguf: starts with b''"),
        (b"GGUF", r"model\.gguf: could not be loaded|needs a package"),
        (b"GGUF\3\0\0\0" + b"\xff" * 64, r"model\.gguf: could not be loaded|needs a package"),
    ],
    ids=["no GGUF", "empty", "cut after the magic", "cut in the header"],
)
def test_a_file_that_is_no_whole_gguf_is_refused(
    data: bytes, pattern: str, tmp_path: Path, refused: Callable[..., None]
) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'pifa-deploy[demo]'")
    (tmp_path / "model.gguf").write_bytes(data)
    refused(REFUSED, pattern, *compress(tmp_path / "model.gguf", tmp_path))


# Texts


def not_utf8(path: Path) -> None:
    path.write_bytes("caffè".encode() + b"\xe9t\xe9")


TEXTS: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "missing": (lambda at: None, USAGE, r"text\.txt: no such text file"),
    "a folder": (lambda at: at.mkdir(), USAGE, r"text\.txt: no such text file"),
    "not UTF-8": (not_utf8, REFUSED, r"text\.txt: not UTF-8 at byte 6; convert"),
    "empty": (lambda at: at.write_bytes(b""), REFUSED, r"text\.txt: is empty"),
    "blank": (lambda at: at.write_bytes(b" \n\n"), REFUSED, r"text\.txt: is empty"),
    "too short": (lambda at: at.write_text("Emma."), REFUSED, r"\d+ tokens, .*needs \d+"),
}


@pytest.mark.parametrize("fault", TEXTS)
@pytest.mark.parametrize("command", ["compress", "evaluate", "verify"])
def test_a_text_that_cannot_be_used_is_refused(
    command: str,
    fault: str,
    dense: Path,
    checkpoint: Path,
    onnx_folder: Path,
    tmp_path: Path,
    refused: Callable[..., None],
) -> None:
    make, code, pattern = TEXTS[fault]
    if (command, fault) == ("compress", "a folder"):  # which may hold texts
        code, pattern = REFUSED, r"text\.txt: has no \.txt or \.md files; give a folder of UTF-8 text"
    path = tmp_path / "text.txt"
    make(path)
    arguments = {
        "compress": compress(dense, tmp_path, "--calibration", path),
        "evaluate": ("evaluate", dense, "--text", path),
        "verify": ("verify", onnx_folder, "--reference", checkpoint, "--text", path),
    }[command]
    refused(code, pattern, *arguments)


def test_a_tokenizer_of_another_model_is_refused(
    dense: Path, text: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    folder = save_dense(tmp_path / "narrow", vocab_size=200)
    pattern = r"the tokenizer made token \d+ of the text, the model knows 0 \.\. 199"
    window = ("--sequence-length", 64)
    refused(REFUSED, pattern, *compress(folder, tmp_path, "--calibration", text, *window))
    refused(REFUSED, pattern, "evaluate", folder, "--text", text, "--context", 64)


def test_a_model_without_a_tokenizer_is_refused_where_one_is_needed(
    text: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    small_model().save_pretrained(tmp_path / "bare")
    refused(REFUSED, "tokenizer of .*bare", *compress(tmp_path / "bare", tmp_path, "--calibration", text))
    refused(REFUSED, "tokenizer of .*bare", "evaluate", tmp_path / "bare", "--text", text)


# ONNX folders


def edit(change: Callable[[onnx.ModelProto], Any]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return corrupt


def opset(version: int) -> Callable[[Path], None]:
    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in model.opset_import if entry.domain == op_spec.DOMAIN).version = version

    return edit(change)


def attribute(name: str, value: bytes) -> Callable[[Path], None]:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.domain == op_spec.DOMAIN)
        next(found for found in node.attribute if found.name == name).s = value

    return edit(change)


def location(value: str) -> Callable[[Path], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
        next(entry for entry in tensor.external_data if entry.key == "location").value = value

    return edit(change)


def manifest(**fields: Any) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        path = folder / "pifa.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return corrupt


ONNX: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (cut("model.onnx", 0.5), r"model\.onnx: not a readable ONNX file"),
    "not ONNX": (write("model.onnx", b"\x89PNG\r\n"), r"model\.onnx: not a readable ONNX file|holds no graph"),
    "empty": (write("model.onnx", b""), r"model\.onnx: (holds no graph|not a readable ONNX file)"),
    "an unknown op version": (opset(2), r"pifa::PifaLinear version 2, this program knows PifaLinear, .* version 1"),
    "an unknown plugin version": (attribute("plugin_version", b"7"), r"plugin_version '7', this program knows '1'"),
    "an unknown form": (attribute("form", b"diagonal"), r"form is 'diagonal', expected 'row' of PifaLinear"),
    "data above the folder": (location("../model.onnx.data"), r"takes its data from '\.\./model\.onnx\.data'"),
    "data at an absolute path": (location("/etc/passwd"), r"takes its data from '/etc/passwd', expected a file in the"),
    "missing data": (lambda at: (at / "model.onnx.data").unlink(), r"model\.onnx\.data: missing"),
    "data cut short": (cut("model.onnx.data", 0.9), r"model\.onnx\.data: has \d+ bytes, .* the file is cut short"),
    "a manifest that is no JSON": (write("pifa.json", b"{"), r"pifa\.json: not JSON"),
    "a manifest of another schema": (manifest(schema=2), r"pifa\.json: schema is 2, this program reads 1"),
}


@pytest.mark.parametrize("corruption", ONNX)
@pytest.mark.parametrize("command", ["build", "inspect", "verify", "generate"])
def test_a_corrupt_onnx_folder_is_refused(
    command: str, corruption: str, onnx_folder: Path, checkpoint: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    corrupt, pattern = ONNX[corruption]
    folder = copied(onnx_folder, tmp_path)
    corrupt(folder)
    more = {
        "build": [tmp_path / "out"],
        "inspect": [],
        "verify": ["--reference", checkpoint],
        "generate": ["--prompt", "Emma"],
    }[command]
    refused(REFUSED, pattern, command, folder, *more)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"modules": [1]}, r"pifa\.json: modules is \[1\], expected an object"),
        ({"modules": {"a.b": 3}}, r"pifa\.json: modules\['a\.b'\]"),
        ({"modules": {"a.b": {"rank": 0, "in_features": 4, "out_features": 4}}}, r"modules\['a\.b'\]: rank is 0"),
    ],
    ids=["a list", "a number", "rank 0"],
)
def test_a_manifest_with_malformed_modules_is_refused(
    fields: dict[str, Any], pattern: str, onnx_folder: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    folder = copied(onnx_folder, tmp_path)
    manifest(**fields)(folder)
    refused(REFUSED, pattern, "inspect", folder)


def test_an_unknown_dtype_in_the_manifest_is_refused(
    onnx_folder: Path, checkpoint: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    folder = copied(onnx_folder, tmp_path)
    manifest(dtype="int3")(folder)
    refused(REFUSED, r"dtype.* 'int3', expected one of", "verify", folder, "--reference", checkpoint)


def test_an_onnx_folder_without_a_tokenizer_cannot_generate(
    onnx_folder: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    folder = copied(onnx_folder, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    refused(REFUSED, "tokenizer of .*broken", "generate", folder, "--prompt", "Emma")


# Foreign checkpoints


@pytest.fixture(scope="module")
def research(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_research(tmp_path_factory.mktemp("research") / "good.pt", compressed(tiny_llama(), "svd")[0])


def calls_a_function(good: Path, to: Path) -> Path:
    packed, _ = compressed(tiny_llama(), "svd")
    packed.payload = Evil()
    return save_research(to, packed)


def cut_file(good: Path, to: Path) -> Path:
    to.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    return to


def plain_file(data: bytes) -> Callable[[Path, Path], Path]:
    def make(good: Path, to: Path) -> Path:
        to.write_bytes(data)
        return to

    return make


def with_nan(good: Path, to: Path) -> Path:
    packed, _ = compressed(tiny_llama(), "svd")
    packed.get_submodule(Q_PROJ).BLinear.weight.data[0, 0] = np.nan
    return save_research(to, packed)


FOREIGN: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "calls a function": (
        calls_a_function,
        r"in\.pt: .*mkdir.*; nothing of the file was run|nothing of the file was run",
    ),
    "names a global off the allow-list": (
        lambda good, to: archive_of(to, global_only("os", "system")),
        r"in\.pt: data\.pkl names the global os\.system, which is not on",
    ),
    "bytes after the end": (
        lambda good, to: rewritten(good, to, lambda name, data: data + b"N." if name == "data.pkl" else data),
        r"in\.pt: ",
    ),
    "cut short": (cut_file, r"in\.pt: "),
    "not a zip file": (plain_file(b"GGUF" + bytes(99)), r"in\.pt: "),
    "empty": (plain_file(b""), r"in\.pt: "),
    "NaN in a factor": (with_nan, rf"{Q_PROJ}.*(NaN|finite)"),
}


@pytest.mark.parametrize("fault", FOREIGN)
def test_a_hostile_or_damaged_pickle_is_refused_and_runs_nothing(
    fault: str, research: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, pattern = FOREIGN[fault]
    refused(REFUSED, pattern, "import", make(research, tmp_path / "in.pt"), tmp_path / "out")


@pytest.mark.parametrize(
    "corrupt",
    [cut(SINGLE, 0.5), shard_elsewhere, write("config.json", b"[]"), lambda at: (at / SINGLE).unlink()],
    ids=["cut short", "weights outside the folder", "config is a list", "no weights"],
)
def test_a_damaged_low_rank_folder_is_refused(
    corrupt: Callable[[Path], Any], dense: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    folder = copied(dense, tmp_path)
    corrupt(folder)
    refused(REFUSED, "broken", "import", folder, tmp_path / "out")


# Usage


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", "{no}", "{out}", "--density", "0.5", "--method", "svd"),
        ("import", "{no}", "{out}"),
        ("export", "{no}", "{out}"),
        ("build", "{no}", "{out}"),
        ("inspect", "{no}"),
        ("verify", "{no}", "--reference", "{no}"),
        ("evaluate", "{no}", "--text", "{text}"),
        ("generate", "{no}", "--prompt", "Emma"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_missing_input_is_named(
    arguments: tuple[str, ...], text: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    places = {"no": tmp_path / "absent", "out": tmp_path / "out", "text": text}
    refused(USAGE, r"absent.*no such (file|folder)", *(part.format(**places) for part in arguments))


def test_a_missing_reference_is_named(onnx_folder: Path, tmp_path: Path, refused: Callable[..., None]) -> None:
    refused(USAGE, "absent: no such file or folder", "verify", onnx_folder, "--reference", tmp_path / "absent")


USAGES: dict[str, tuple[str, str]] = {
    "density 0": ("compress {dense} {out} --method svd --density 0", "density is 0.0, expected 0 < density < 1"),
    "density 1": ("compress {dense} {out} --method svd --density 1", "density is 1.0, expected"),
    "density above 1": ("compress {dense} {out} --method svd --density 1.5", "density is 1.5, expected"),
    "density nan": ("compress {dense} {out} --method svd --density nan", "density is nan, expected"),
    "density that is text": ("compress {dense} {out} --method svd --density half", "'half' is not a valid float"),
    "a density that leaves no rank": (
        "compress {dense} {out} --method svd --density 0.001",
        rf"{Q_PROJ}: density 0\.001 of a 48 x 48 matrix allows rank 0",
    ),
    "no density": ("compress {dense} {out} --method svd", "method svd needs --density"),
    "no text for the default method": ("compress {dense} {out} --density 0.5", "method mpifa needs calibration text"),
    "an unknown method": ("compress {dense} {out} --density 0.5 --method magic", "'magic' is not one of"),
    "rank multiple 0": ("compress {dense} {out} --method svd --density 0.5 --rank-multiple 0", "rank_multiple is 0"),
    "no samples": (
        "compress {dense} {out} --density 0.5 --calibration {text} --calibration-samples 0",
        "samples is 0",
    ),
    "an unknown dtype": ("export {checkpoint} {out} --dtype int8", "'int8' is not one of"),
    "an unknown target": ("build {onnx} {out} --target gtx9", "gtx9"),
    "a capability that is none": ("build {onnx} {out} --compute-capabilities eight", "eight"),
    "no cache": ("build {onnx} {out} --max-cache-len 0", "max_cache_len is 0, expected a positive integer"),
    "negative decode steps": ("verify {onnx} --reference {checkpoint} --decode-steps -1", "decode_steps -1"),
    "windows of one token": ("evaluate {dense} --text {text} --context 1", "expected at least 1 of at least 2"),
    "no windows": ("evaluate {dense} --text {text} --max-windows 0", "0 windows"),
    "no text": ("evaluate {dense}", "Missing option '--text'"),
    "no prompt": ("generate {onnx}", "Missing argument 'PROMPT'"),
    "no new tokens": ("generate {onnx} --prompt Emma --max-new-tokens 0", "max_new_tokens is 0, expected at least 1"),
    "an unknown option": ("inspect {dense} --colour", "No such option.*--colour.*; see pifa-deploy inspect --help"),
    "an unknown command": ("compile {dense}", "No such command 'compile'.*; see pifa-deploy --help"),
    "no arguments": ("export", "Missing argument 'CHECKPOINT'"),
}


@pytest.mark.parametrize("case", USAGES)
def test_wrong_usage_is_told_in_one_line(
    case: str, dense: Path, checkpoint: Path, onnx_folder: Path, text: Path, tmp_path: Path, refused: Any
) -> None:
    line, pattern = USAGES[case]
    places = {"dense": dense, "checkpoint": checkpoint, "onnx": onnx_folder, "text": text, "out": tmp_path / "out"}
    refused(USAGE, pattern, *(part.format(**places) for part in line.split()))


def test_an_orin_is_not_served_by_tensorrt_rtx(onnx_folder: Path, tmp_path: Path, refused: Any) -> None:
    refused(
        MISFIT,
        "AGX Orin .* 8.7, which tensorrt-rtx does not serve",
        "build",
        onnx_folder,
        tmp_path / "out",
        "--target",
        "orin-agx",
    )


def test_without_onnx_runtime_nothing_is_decided(
    onnx_folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, refused: Any
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    pattern = r"ONNX Runtime is not installed; pip install 'pifa-deploy\[cpu\]'"
    refused(NOT_DECIDED, pattern, "generate", onnx_folder, "--prompt", "Emma")
    refused(NOT_DECIDED, pattern, "verify", onnx_folder, "--reference", checkpoint)


# Outputs

MAKING = {
    "compress": ("compress", "{dense}", "{out}", "--density", "0.5", "--method", "svd"),
    "import": ("import", "{research}", "{out}"),
    "export": ("export", "{checkpoint}", "{out}"),
    "build": ("build", "{onnx}", "{out}"),
}


@pytest.fixture
def making(dense: Path, research: Path, checkpoint: Path, onnx_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """`making("compress")` gives the arguments that make tmp_path / "out"."""

    def arguments(command: str, *more: object) -> list[object]:
        if command == "build":
            for name in ("tensorrt_rtx", "polygraphy"):
                pytest.importorskip(name, reason=f"{name} is not installed: pip install 'pifa-deploy[rtx]'")
        places = {"dense": dense, "research": research, "checkpoint": checkpoint, "onnx": onnx_folder}
        return [*(part.format(**places, out=tmp_path / "out") for part in MAKING[command]), *more]

    return arguments


@pytest.mark.parametrize("command", MAKING)
def test_an_existing_output_is_refused_without_force(
    command: str, making: Any, checkpoint: Path, tmp_path: Path, refused: Any
) -> None:
    shutil.copytree(checkpoint, tmp_path / "out")
    refused(USAGE, "out exists; name another output or pass --force", *making(command))


@pytest.mark.parametrize("command", MAKING)
@pytest.mark.parametrize("kind", ["dense model", "file"])
def test_force_does_not_replace_what_is_no_artefact(
    command: str, kind: str, making: Any, dense: Path, tmp_path: Path, refused: Any
) -> None:
    if kind == "file":
        (tmp_path / "out").write_text("thesis")
    else:
        shutil.copytree(dense, tmp_path / "out")
    refused(USAGE, "was not written by pifa-deploy; --force does not replace it", *making(command, "--force"))


@pytest.mark.parametrize("command", MAKING)
def test_an_output_that_another_process_holds_is_told(
    command: str, making: Any, tmp_path: Path, pifa_deploy: Command
) -> None:
    with new_folder(tmp_path / "out"):
        pifa_deploy(*making(command)).failed(HELD, "out is being written by another process; wait for it")


def test_a_stale_lock_file_holds_nothing(making: Any, tmp_path: Path, pifa_deploy: Command) -> None:
    (tmp_path / ".out.lock").write_text("")
    with (tmp_path / ".out.lock").open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
    assert pifa_deploy(*making("compress")).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("command", MAKING)
def test_an_output_below_a_file_is_told(command: str, making: Any, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "out").write_text("a file")
    arguments = [f"{part}/deeper" if part == str(tmp_path / "out") else part for part in making(command)]
    refused(STAGE_FAILED, "out/deeper could not be written: .*; choose another place", *arguments)


@pytest.mark.parametrize("command", ["compress", "export", "import"])
def test_a_refused_input_leaves_the_forced_output_whole(
    command: str, making: Any, checkpoint: Path, tmp_path: Path, refused: Any
) -> None:
    shutil.copytree(checkpoint, tmp_path / "out")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{}")
    arguments = making(command, "--force")
    arguments[1] = tmp_path / "bad"
    refused(REFUSED, "bad", *arguments)


def test_force_replaces_an_artefact_by_the_new_one(
    making: Any, checkpoint: Path, tmp_path: Path, pifa_deploy: Command
) -> None:
    shutil.copytree(checkpoint, tmp_path / "out")
    assert pifa_deploy(*making("compress", "--format", "lowrank", "--force")).code == 0
    assert json.loads(pifa_deploy("inspect", tmp_path / "out", "--json", "-").out)["rows"][0]["format"] == "lowrank"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_result_that_cannot_be_written_is_told(dense: Path, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "file").write_text("")
    pattern = r"--json.*file/result\.json cannot be written: Not a directory; choose another place"
    refused(USAGE, pattern, "inspect", dense, "--json", tmp_path / "file" / "result.json")


PLACES = {
    "a folder": ("folder", "folder cannot be written: it is a folder, expected a file"),
    "a folder with a slash": ("folder/", "folder cannot be written: it is a folder"),
    "below a file": ("file/x.json", r"file/x\.json cannot be written: Not a directory"),
    "below a file, deeper": ("file/y/x.json", r"file/y/x\.json cannot be written: Not a directory"),
    "below a loop of links": ("loop/x.json", r"loop/x\.json cannot be written: Too many levels"),
    "a name that is too long": ("x" * 250, "cannot be written: File name too long"),
    "a pipe": ("pipe", r"pipe cannot be written: it is no regular file \(for standard output give -\)"),
    "a device": ("/dev/null", "/dev/null cannot be written: it is no regular file"),
    "a place that the system keeps": ("/proc/x.json", r"/proc/x\.json cannot be written: "),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_place_of_a_result_is_tried_before_the_work(
    case: str, dense: Path, tmp_path: Path, refused: Any, pifa_deploy: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    place, pattern = PLACES[case]
    pifa_deploy("evaluate", dense, "--text", "absent.txt", "--json", place).failed(USAGE, f"'--json': .*{pattern}")
    assert sorted(os.listdir()) == ["file", "folder", "loop", "pipe"]
    assert os.listdir("folder") == []


def test_a_result_goes_into_folders_that_are_made_for_it(
    dense: Path, tmp_path: Path, pifa_deploy: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pifa_deploy("inspect", "absent", "--json", "deep/er/x.json").failed(USAGE, "absent: no such")
    assert os.listdir() == []
    assert pifa_deploy("inspect", dense, "--json", "deep/er/x.json").code == 0
    assert json.loads((tmp_path / "deep" / "er" / "x.json").read_text())


@pytest.mark.parametrize("kind", ["missing", "folder", "loop"])
def test_a_plan_that_is_no_file_is_named(kind: str, checkpoint: Path, tmp_path: Path, pifa_deploy: Command) -> None:
    plan = tmp_path / "plan.json"
    if kind == "folder":
        plan.mkdir()
    if kind == "loop":
        plan.symlink_to(plan)
    before = os.listdir(tmp_path)
    outcome = pifa_deploy("export", checkpoint, tmp_path / "out", "--plan", plan)
    outcome.failed(USAGE, r"plan\.json: no such file; write a plan with `pifa-deploy bench --choose`")
    assert os.listdir(tmp_path) == before


def test_debug_shows_the_traceback_and_the_line(dense: Path, tmp_path: Path, pifa_deploy: Command) -> None:
    outcome = pifa_deploy("--debug", *compress(tmp_path / "absent", tmp_path))
    assert outcome.code == USAGE
    assert "Traceback" in outcome.err
    assert outcome.errors == [line for line in outcome.err.splitlines() if "absent: no such" in line][-1:]
