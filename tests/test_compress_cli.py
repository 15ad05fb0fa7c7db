"""Bad input to `pifa-deploy compress`: one line, the right exit code, and nothing half-written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from cli_fixtures import Outcome, content, save_dense, small_model, small_tokenizer

from pifa_deploy import compression
from pifa_deploy.checkpoint import FORMATS
from pifa_deploy.cli import make
from pifa_deploy.compression.allocation import LAYER_DENSITIES
from pifa_deploy.compression.reconstruction import SOLVERS
from pifa_deploy.layouts import LAYOUTS
from pifa_deploy.op_spec import DTYPE_FLAGS

pytest_plugins = ("cli_plugin",)

USAGE, NOT_DECIDED, STAGE_FAILED, REFUSED = 2, 3, 4, 6
SHORT = ("--sequence-length", "32", "--calibration-samples", "4", "--batch-tokens", "64")
LOW_RANK = ("--density", "0.5", *SHORT)
Refused = Callable[..., None]


@pytest.fixture
def refused(pifa_deploy: Callable[..., Outcome], text: Path, tmp_path: Path) -> Refused:
    """`refused(code, pattern, source, *options)` asserts that nothing in tmp_path was added, changed or removed."""

    def check(code: int, pattern: str, source: Path, *options: object) -> None:
        before = content(tmp_path)
        given = () if "--calibration" in options else ("--calibration", text)
        pifa_deploy("compress", source, tmp_path / "out", *given, *options).failed(code, pattern)
        assert content(tmp_path) == before

    return check


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """`changed(change)` saves a small model after `change(model)`."""

    def save(change: Callable[[Any], Any]) -> Path:
        model = small_model()
        with torch.no_grad():
            change(model)
        model.save_pretrained(tmp_path / "changed")
        small_tokenizer().save_pretrained(tmp_path / "changed")
        return tmp_path / "changed"

    return save


# Usage

USAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "no density": (SHORT, "method mpifa needs --density; see pifa-deploy compress --help"),
    "a negative density": (("--density", "-0.5", *SHORT), r"density is -0\.5, expected 0 < density < 1"),
    "a density of more than all": (("--density", "1.5", *SHORT), r"density is 1\.5, expected 0 < density < 1"),
    "a density that leaves no rank": (
        ("--density", "0.001", *SHORT),
        r"model\.layers\.0\.self_attn\.q_proj: density 0\.001",
    ),
    "an attention density that leaves the MLP nothing": (
        ("--attention-density", "0.9", "--density", "0.2", *SHORT),
        "attention_density|attention density",
    ),
    "2:4 of another density": (
        ("--method", "wanda", "--density", "0.7", *SHORT),
        r"density is 0\.7, method wanda prunes 2:4, which is 0\.5; leave it out",
    ),
    "2:4 with layer densities": (
        ("--method", "sparsegpt", "--layer-density", "owl", *SHORT),
        "layer_density is 'owl', method sparsegpt prunes all linears alike; leave it out",
    ),
    "patterns that leave nothing": (
        ("--include", "*.q_proj", "--exclude", "model.layers.*", *LOW_RANK),
        r"include \['\*\.q_proj'\] and exclude \['model\.layers\.\*'\] leave no linear to compress; expected patterns "
        r"for names like model\.layers\.0\.self_attn\.q_proj",
    ),
    "no positions for the windows": (
        ("--density", "0.5", "--sequence-length", "1025", "--calibration-samples", "2"),
        "windows have 1025 tokens, the model has positions for 1024; lower --sequence-length",
    ),
    "windows of one token": (("--density", "0.5", "--sequence-length", "1"), "sequence_length 1, expected at least"),
    "no windows": (("--density", "0.5", "--calibration-samples", "0"), "samples is 0"),
    "batches of nothing": (("--density", "0.5", "--batch-tokens", "0"), "batch_tokens is 0, expected at least 1"),
    "a dense share of two": (("--dense-share", "2", *LOW_RANK), r"dense_share is 2\.0, expected 0 <= dense_share <= 1"),
    "no ridge": (("--ridge", "0", *LOW_RANK), r"ridge is 0\.0, expected a positive number"),
    "no rounds": (("--steps", "0", *LOW_RANK), "steps is 0, expected at least 1"),
    "rank multiple 0": (("--rank-multiple", "0", *LOW_RANK), "rank_multiple is 0, expected at least 1"),
}


@pytest.mark.parametrize("case", USAGES)
def test_wrong_usage_is_told(case: str, dense: Path, refused: Refused) -> None:
    options, pattern = USAGES[case]
    refused(USAGE, pattern, dense, *options)


def test_a_gpu_that_is_not_there_is_told(dense: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(USAGE, "device is 'cuda', expected cpu", dense, *LOW_RANK, "--device", "cuda")


def test_inputs_that_no_pattern_of_four_divides_are_told(tmp_path: Path, refused: Refused) -> None:
    source = save_dense(tmp_path / "odd", intermediate_size=82)
    pattern = r"model\.layers\.0\.mlp\.down_proj has 82 inputs, 2:4 needs a multiple of 4; leave it out with --exclude"
    refused(USAGE, pattern, source, "--method", "wanda", *SHORT)
    refused(USAGE, pattern, source, "--method", "magnitude", *SHORT)


# Text


def test_calibration_that_is_missing_is_told(dense: Path, tmp_path: Path, pifa_deploy: Callable[..., Outcome]) -> None:
    for method in ("mpifa", "whitened", "wanda", "ria", "sparsegpt"):
        density = () if method in ("wanda", "ria", "sparsegpt") else ("--density", "0.5")
        outcome = pifa_deploy("compress", dense, tmp_path / "out", "--method", method, *density)
        outcome.failed(USAGE, f"method {method} needs calibration text; pass --calibration FILE")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_text_is_refused(dense: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "texts").mkdir()
    pattern = r"texts: has no \.txt or \.md files; give a folder of UTF-8 text"
    refused(REFUSED, pattern, dense, *LOW_RANK, "--calibration", tmp_path / "texts")
    (tmp_path / "texts" / "empty.md").write_text(" \n")
    refused(REFUSED, r"empty\.md: is empty", dense, *LOW_RANK, "--calibration", tmp_path / "texts")


def test_one_short_text_among_others_is_named(dense: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "short.txt").write_text("Emma.")
    more = ("--calibration", text, "--calibration", tmp_path / "short.txt")
    refused(REFUSED, r"short\.txt: the text has \d tokens, one window needs 32; give more", dense, *LOW_RANK, *more)


def test_fewer_windows_than_texts_are_refused(dense: Path, text: Path, tmp_path: Path, refused: Refused) -> None:
    more = [part for _ in range(5) for part in ("--calibration", text)]
    refused(USAGE, "samples is 4 for 5 calibration sources; expected at least one window each", dense, *LOW_RANK, *more)


def test_a_data_set_without_its_library_is_not_decided(
    dense: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    pattern = "datasets:wikitext needs the package datasets; pip install datasets"
    refused(NOT_DECIDED, pattern, dense, *LOW_RANK, "--calibration", "datasets:wikitext")


# Models whose activations cannot be used


@pytest.mark.parametrize("method", ["mpifa", "whitened", "sparsegpt"])
def test_inputs_of_nothing_but_zeros_are_named(method: str, changed: Any, refused: Refused) -> None:
    source = changed(lambda model: model.model.layers[0].input_layernorm.weight.zero_())
    density = () if method == "sparsegpt" else ("--density", "0.5")
    refused(
        STAGE_FAILED,
        r"model\.layers\.0\.self_attn\.q_proj saw only zeros in calibration, its statistics are singular; leave it out",
        source,
        *("--method", method, *density, *SHORT),
    )


def test_linears_that_see_only_zeros_can_be_left_out(
    changed: Any, text: Path, tmp_path: Path, pifa_deploy: Callable[..., Outcome]
) -> None:
    source = changed(lambda model: model.model.layers[0].input_layernorm.weight.zero_())
    without = ("--exclude", "*.0.self_attn.*")
    outcome = pifa_deploy("compress", source, tmp_path / "out", "--calibration", text, *LOW_RANK, *without)
    assert outcome.code == 0, outcome.err
    assert "10 linears" in outcome.out


def overflowing(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight.fill_(3e38)


@pytest.mark.parametrize(
    ("method", "what"),
    [("mpifa", "dense layer 0 output"), ("whitened", "dense layer 0 output"), ("wanda", "compressed layer 0 output")],
)
def test_an_output_that_is_not_finite_is_named_by_layer(method: str, what: str, changed: Any, refused: Refused) -> None:
    density = () if method == "wanda" else ("--density", "0.5")
    pattern = rf"error: {what} has NaN or Inf in torch\.float32; check the model"
    refused(STAGE_FAILED, pattern, changed(overflowing), "--method", method, *density, *SHORT)


def test_activations_beyond_fp16_are_told_to_be_fp32(
    changed: Any, text: Path, tmp_path: Path, refused: Refused, pifa_deploy: Callable[..., Outcome]
) -> None:
    source = changed(lambda model: model.model.embed_tokens.weight.mul_(1e6))
    half = (*LOW_RANK, "--activation-dtype", "fp16")
    pattern = r"what enters the first decoder layer has NaN or Inf in torch\.float16; store activations as fp32"
    refused(STAGE_FAILED, pattern, source, *half)
    source = changed(lambda model: model.model.layers[0].mlp.gate_proj.weight.mul_(1e4))
    pattern = r"model\.layers\.0\.mlp\.down_proj input has NaN or Inf in torch\.float16; store activations as fp32"
    refused(STAGE_FAILED, pattern, source, *half)
    for wide in ("fp32", "bf16"):
        more = (*LOW_RANK, "--activation-dtype", wide, "--force")
        assert pifa_deploy("compress", source, tmp_path / "out", "--calibration", text, *more).code == 0


def test_a_failure_in_a_later_layer_keeps_the_earlier_ones(
    changed: Any, text: Path, tmp_path: Path, pifa_deploy: Callable[..., Outcome]
) -> None:
    source = changed(lambda model: model.model.layers[1].input_layernorm.weight.fill_(1e30))
    outcome = pifa_deploy("compress", source, tmp_path / "out", "--calibration", text, *LOW_RANK)
    outcome.failed(STAGE_FAILED, r"model\.layers\.1\.self_attn\.o_proj input has NaN or Inf")
    assert not (tmp_path / "out").exists()
    files = [path.name for path in (tmp_path / ".out.resume").iterdir()]
    assert sorted(files) == ["layer-00000.safetensors", "state.json"]


# Activations on disk


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_activation_folder_that_cannot_be_is_told(below: str, dense: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    pattern = r"file.*: activations could not be written \((ENOTDIR|EEXIST)\); free some space or choose another --act"
    refused(STAGE_FAILED, pattern, dense, *LOW_RANK, "--activation-folder", tmp_path / "file" / below)


def test_activations_that_fill_the_disk_are_told_and_leave_nothing(
    dense: Path, full_disk: Path, refused: Refused
) -> None:
    pattern = r"error: .*disk: activations could not be written \(ENOSPC\); free some space or choose another"
    more = ("--density", "0.5", "--sequence-length", "64", "--calibration-samples", "20")
    refused(STAGE_FAILED, pattern, dense, *more, "--activation-folder", full_disk)
    assert list(full_disk.iterdir()) == []


def test_activations_on_disk_give_the_same_files_as_in_memory(
    dense: Path, text: Path, tmp_path: Path, pifa_deploy: Callable[..., Outcome]
) -> None:
    found = []
    for more in ((), ("--activation-folder", tmp_path / "new" / "activations")):
        line = ("compress", dense, tmp_path / "out", "--calibration", text, *LOW_RANK, "--force", *more)
        assert pifa_deploy(*line, "--activation-dtype", "bf16").code == 0
        found.append(content(tmp_path / "out"))
    assert found[0] == found[1]
    assert list((tmp_path / "new" / "activations").iterdir()) == []


# The command line and the library know the same


def test_the_command_offers_what_the_library_has() -> None:
    offered = {
        option.name: tuple(option.type.choices)
        for option in make.compress_command.params
        if isinstance(option.type, click.Choice)
    }
    assert sorted(make._METHODS) == sorted(compression.METHODS)
    assert offered["method"] == tuple(make._METHODS)
    # The layout decides whether a PIFA layer is stored by rows or by columns.
    assert {"pifa-column", *offered["format"]} == set(FORMATS)
    assert offered["layout"] == tuple(make._LAYOUTS) == LAYOUTS
    assert sorted(offered["layer_density"]) == sorted(LAYER_DENSITIES)
    assert sorted(offered["solver"]) == sorted(SOLVERS)
    assert sorted(offered["dtype"]) == sorted(offered["activation_dtype"]) == sorted(DTYPE_FLAGS)
