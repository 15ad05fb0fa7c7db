"""Checkpoints and ONNX folders side by side: what they are, how they compare, and the command that shows it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_fixtures import Outcome, passage, small_model, small_tokenizer
from decoder_fixtures import edited
from onnx_ir import Model
from sparse_fixtures import INTERMEDIATE, save_sparse
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pifa_deploy.calibration import CALIBRATION_TEXT, even_windows, token_ids
from pifa_deploy.checkpoint import validate
from pifa_deploy.cli import console
from pifa_deploy.contenders import Entry, open_contender
from pifa_deploy.density import rank_for_density
from pifa_deploy.errors import ExitCode, InputRefusedError, MissingCapabilityError
from pifa_deploy.evaluation import EvaluateOptions, Score, perplexity
from pifa_deploy.evaluation_report import EvaluateReport, Row, evaluate_all
from pifa_deploy.linear import LowRankLinear
from pifa_deploy.model_folder import load_model
from pifa_deploy.onnx_export import ExportOptions, export_checkpoint
from pifa_deploy.transformers_quantizer import attach

pytest_plugins = ("cli_plugin",)

OPTIONS = EvaluateOptions(context=48, max_windows=5, batch_size=2)
USAGE, NOT_DECIDED, REFUSED = ExitCode.USAGE, ExitCode.NOT_DECIDED, ExitCode.INPUT_REFUSED


def has_onnx_runtime() -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'pifa-deploy[cpu]'")


@pytest.fixture(scope="module")
def other_text(text: Path) -> Path:
    path = text.parent / "emma.txt"
    path.write_text(passage(CALIBRATION_TEXT, 6000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def fp16(checkpoint: Path) -> Path:
    """An fp16 ONNX folder whose name says something else."""
    export_checkpoint(checkpoint, checkpoint.parent / "dense-fp32", ExportOptions(dtype="fp16"))
    return checkpoint.parent / "dense-fp32"


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = small_model(), tmp_path_factory.mktemp("forms") / "onnx"
    for name, linear in [(name, module) for name, module in model.named_modules() if name.endswith("_proj")]:
        u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        rank = rank_for_density(*linear.weight.shape, density=0.5)
        model.set_submodule(name, LowRankLinear.from_pair(u[:, :rank] * s[:rank], v[:rank]))
    attach(model, source="svd", density=0.5, details={})
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms") / "sparse"
    save_sparse(folder)
    return folder


def report_of(text: Path, *places: Path, **texts: Path) -> EvaluateReport:
    return evaluate_all(list(map(str, places)), {"held out": text, **texts}, OPTIONS)


# What a place is


def test_every_kind_is_told_by_what_it_holds(
    dense: Path, checkpoint: Path, low_rank: Path, sparse: Path, onnx_folder: Path, fp16: Path
) -> None:
    has_onnx_runtime()
    places = (dense, checkpoint, low_rank, sparse, onnx_folder, fp16, fp16 / "model.onnx")
    entries = [open_contender(str(place)).entry for place in places]
    threads = torch.get_num_threads()
    assert [(entry.kind, entry.runtime, entry.dtype, entry.device, entry.threads) for entry in entries] == [
        ("dense", "torch", "fp32", "cpu", threads),
        ("pifa", "torch", "fp32", "cpu", threads),
        ("lowrank", "torch", "fp32", "cpu", threads),
        ("2:4", "torch", "fp32", "cpu", threads),
        ("onnx", "onnxruntime", "fp32", "cpu", threads),
        ("onnx", "onnxruntime", "fp16", "cpu", threads),
        ("onnx", "onnxruntime", "fp16", "cpu", threads),
    ]
    assert [entry.checkpoint for entry in entries] == list(map(str, places))


def sizes(model: Any) -> tuple[int, int]:
    """Returns the numbers of a model, and those of its projections."""
    projections = [module.weight.numel() for name, module in model.named_modules() if name.endswith("_proj")]
    return sum(parameter.numel() for parameter in model.parameters()), sum(projections)


def test_parameters_and_bytes_are_those_that_are_stored(
    dense: Path, checkpoint: Path, onnx_folder: Path, fp16: Path
) -> None:
    has_onnx_runtime()
    places = {"dense": dense, "pifa": checkpoint, "onnx": onnx_folder, "fp16": fp16}
    entries = {name: open_contender(str(place)).entry for name, place in places.items()}
    count, projections = sizes(small_model())
    factors = sum(spec.parameters() for spec in validate(checkpoint).modules.values())
    assert entries["dense"].parameters == count
    assert entries["pifa"].parameters == count - projections + factors
    assert entries["onnx"].parameters == entries["fp16"].parameters == entries["pifa"].parameters
    for name in ("dense", "pifa"):
        assert entries[name].weight_bytes == (places[name] / "model.safetensors").stat().st_size
    assert 4 * entries["onnx"].parameters < entries["onnx"].weight_bytes < 4.2 * entries["onnx"].parameters
    assert 2 * entries["fp16"].parameters < entries["fp16"].weight_bytes < 2.2 * entries["fp16"].parameters


def test_the_zeros_of_a_pruned_model_are_no_parameters_but_in_its_files(sparse: Path, tmp_path: Path) -> None:
    has_onnx_runtime()
    export_checkpoint(sparse, tmp_path / "onnx", ExportOptions(dtype="fp32"))
    count, projections = sizes(small_model(intermediate_size=INTERMEDIATE))
    for place in (sparse, tmp_path / "onnx"):
        entry = open_contender(str(place)).entry
        assert entry.parameters == count - projections // 2
        assert entry.weight_bytes > 4 * count
    manifest = json.loads((tmp_path / "onnx" / "pifa.json").read_text())
    name = min(manifest["sparsity"]["modules"])
    del manifest["sparsity"]["modules"][name]["in_features"]
    (tmp_path / "onnx" / "pifa.json").write_text(json.dumps(manifest))
    with pytest.raises(InputRefusedError, match=rf"pifa\.json: sparsity\.modules\['{name}'\]: KeyError"):
        open_contender(str(tmp_path / "onnx"))


def test_an_engine_folder_needs_a_gpu_and_is_not_decided(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text("{}")
    for place in (tmp_path, tmp_path / "engine.json"):
        with pytest.raises(MissingCapabilityError, match="is an engine folder, which gives no perplexity here"):
            open_contender(str(place))


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefusedError, match=r"is no checkpoint or ONNX folder; expected config\.json or model\.on"):
        open_contender(str(tmp_path))


@pytest.mark.parametrize("name", ["position_ids", "logits"])
def test_a_graph_that_is_no_decoder_is_refused(onnx_folder: Path, tmp_path: Path, name: str) -> None:
    def rename(model: Model) -> None:
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.name == name:
                value.name = "other"

    folder = edited(onnx_folder, tmp_path / "edited", rename)
    with pytest.raises(InputRefusedError, match=rf"model\.onnx: has no {name}; expected a graph written by"):
        open_contender(str(folder))


def test_without_a_cuda_device_nothing_is_decided(
    dense: Path, onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MissingCapabilityError, match="finds no CUDA device; use --device cpu"):
        open_contender(str(dense), device="cuda")
    with pytest.raises(MissingCapabilityError, match="finds no CUDA device; use --device cpu"):
        open_contender(str(onnx_folder), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["checkpoint", "onnx_folder"])
def test_a_model_on_a_gpu_has_the_perplexity_that_it_has_on_the_cpu(
    kind: str, text: Path, request: pytest.FixtureRequest
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    if kind == "onnx_folder":
        has_onnx_runtime()
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("ONNX Runtime has no CUDAExecutionProvider: pip install 'pifa-deploy[gpu]'")
    place = str(request.getfixturevalue(kind))
    found = [
        evaluate_all([place], {"t": text}, EvaluateOptions(context=48, device=device)).rows[0]
        for device in ("cpu", "cuda")
    ]
    assert [row.entry.device for row in found] == ["cpu", "cuda"]
    assert found[1].scores["t"].mean_nll == pytest.approx(found[0].scores["t"].mean_nll, rel=1e-3)


# Side by side


def test_an_onnx_folder_has_the_perplexity_of_its_checkpoint(
    checkpoint: Path, onnx_folder: Path, fp16: Path, text: Path
) -> None:
    has_onnx_runtime()
    torch_row, fp32_row, fp16_row = report_of(text, checkpoint, onnx_folder, fp16).rows
    ids = token_ids(text.read_text(encoding="utf-8"), small_tokenizer())
    exact = load_model(checkpoint, dtype=torch.float64)
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(exact(window[None]).logits[0, :-1], window[1:])
            for window in even_windows(ids, OPTIONS.context, 5)
        ]
    expected = [float(loss) for loss in losses]
    for row, tolerance in ((torch_row, 1e-5), (fp32_row, 1e-5), (fp16_row, 2e-3)):
        np.testing.assert_allclose(row.scores["held out"].to_json()["window_nll"], expected, rtol=tolerance)
    assert fp16_row.scores["held out"].nll != fp32_row.scores["held out"].nll


def test_rows_and_texts_stand_side_by_side(dense: Path, checkpoint: Path, text: Path, other_text: Path) -> None:
    report = report_of(text, dense, checkpoint, emma=other_text)
    for row, place in zip(report.rows, (dense, checkpoint), strict=True):
        for label, file in (("held out", text), ("emma", other_text)):
            windows = even_windows(token_ids(file.read_text(encoding="utf-8"), small_tokenizer()), 48, 5)
            expected = perplexity(load_model(place, dtype=torch.float32), windows)
            assert row.scores[label].perplexity == pytest.approx(expected, rel=1e-5)
            assert row.scores[label].tokens == (47,) * 5
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["texts"] == {"held out": str(text), "emma": str(other_text)}
    assert found["options"] == {"context": 48, "stride": None, "max_windows": 5, "batch_size": 2, "device": "cpu"}
    first, second = (row["texts"]["emma"] for row in found["rows"])
    assert (first["ratio"], first["nll_difference"], first["nll_difference_standard_error"]) == (1, 0, 0)
    paired = np.array(second["window_nll"]) - np.array(first["window_nll"])
    assert second["ratio"] == pytest.approx(second["perplexity"] / first["perplexity"])
    assert second["nll_difference"] == pytest.approx(paired.mean())
    assert second["nll_difference_standard_error"] == pytest.approx(paired.std(ddof=1) / 5**0.5)


def entry(**changes: Any) -> Entry:
    fields = {"checkpoint": "a", "kind": "dense", "runtime": "torch", "device": "cpu", "threads": 1, "dtype": "fp32"}
    return Entry(**{**fields, "parameters": 7, "weight_bytes": 28, **changes})


def score(nll: tuple[float, ...], *passes: tuple[int, float]) -> Score:
    return Score(nll=nll, tokens=(10,) * len(nll), passes=passes)


def test_the_speed_leaves_out_the_first_forward_pass_where_there_are_more() -> None:
    scores = {"a": score((1, 2), (100, 10.0), (100, 1.0)), "b": score((3,), (50, 0.5))}
    assert Row(name="m", entry=entry(), scores=scores).tokens_per_second == pytest.approx(150 / 1.5)
    assert Row(name="m", entry=entry(), scores={"b": scores["b"]}).tokens_per_second == pytest.approx(100)


def test_a_perplexity_beyond_the_largest_float_stands_in_the_json_as_null() -> None:
    rows = tuple(Row(name="m", entry=entry(), scores={"t": score((nll, 20.0), (8, 1.0))}) for nll in (20.0, 1e5))
    report = EvaluateReport(texts={"t": Path("t")}, options=OPTIONS, rows=rows)
    found = [row["texts"]["t"] for row in json.loads(json.dumps(report.to_json(), allow_nan=False))["rows"]]
    assert [each["perplexity"] for each in found] == [pytest.approx(math.exp(2)), None]
    assert found[1]["nll_difference"] == pytest.approx((1e5 - 20) / 20)
    assert found[1]["ratio"] is None


def test_a_model_that_gives_nan_fails_and_leaves_no_report(
    dense: Path, onnx_folder: Path, text: Path, tmp_path: Path, pifa_deploy: Command
) -> None:
    has_onnx_runtime()
    broken = Path(shutil.copytree(onnx_folder, tmp_path / "broken"))
    # A token of the second window that the first one has not makes NaN.
    first, second, *_ = even_windows(token_ids(text.read_text(encoding="utf-8"), small_tokenizer()), 48, 5).tolist()
    token = next(each for each in second[:-1] if each not in first)
    graph = onnx.load(broken / "model.onnx", load_external_data=False).graph
    (table,) = [each for each in graph.initializer if each.name == "model.embed_tokens.weight"]
    offset = next(int(entry.value) for entry in table.external_data if entry.key == "offset")
    with (broken / "model.onnx.data").open("r+b") as data:
        data.seek(offset + token * table.dims[1] * 4)
        data.write(np.float32(np.nan).tobytes())
    arguments = ("--text", f"novel={text}", "--context", 48, "--max-windows", 5, "--json", tmp_path / "x.json")
    outcome = pifa_deploy("evaluate", dense, f"mine={broken}", *arguments)
    told = "mine on novel: the negative log-likelihood of window 2 of 5 is nan, expected a finite number; look for NaN"
    outcome.failed(ExitCode.STAGE_FAILED, told)
    assert outcome.out == ""
    assert not (tmp_path / "x.json").exists()


def test_one_forward_pass_at_a_time_reads_a_batch_of_windows(dense: Path, text: Path) -> None:
    passes = report_of(text, dense).rows[0].scores["held out"].passes
    assert [tokens for tokens, _ in passes] == [96, 96, 48]


# Refused


def with_other_tokenizer(dense: Path, target: Path) -> Path:
    """The same model with a tokenizer of one token a byte, all of which it knows."""
    shutil.copytree(dense, target)
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(target)
    return target


def test_models_that_read_other_tokens_are_not_compared(dense: Path, text: Path, tmp_path: Path) -> None:
    other = with_other_tokenizer(dense, tmp_path / "other")
    assert report_of(text, other).rows[0].scores["held out"].perplexity > 1
    with pytest.raises(InputRefusedError) as info:
        report_of(text, dense, other)
    assert str(info.value).startswith(f"{dense} and {other} make different tokens of {text}, ")


def test_another_tokenizer_that_makes_the_same_tokens_is_compared(dense: Path, text: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dense, tmp_path / "copy"))
    report = report_of(text, dense, copy)
    assert report.rows[1].against(report.rows[0], "held out")["nll_difference"] == 0


def test_nothing_to_evaluate_is_a_usage_error(text: Path) -> None:
    with pytest.raises(ValueError, match="0 models and 1 texts, expected at least one of each"):
        report_of(text)


# The command

Command = Callable[..., Outcome]


def test_the_table_has_a_column_a_text_and_the_differences_to_the_first_row(
    dense: Path, checkpoint: Path, onnx_folder: Path, text: Path, other_text: Path, tmp_path: Path, pifa_deploy: Command
) -> None:
    has_onnx_runtime()
    places = (dense, checkpoint, onnx_folder)
    options = ("--context", 64, "--max-windows", 4, "--batch-size", 3, "--json", tmp_path / "result.json")
    outcome = pifa_deploy("evaluate", *places, "--text", text, "--text", f"in domain={other_text}", *options)
    assert outcome.code == 0, outcome.err
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    lines = outcome.out.splitlines()
    assert "held-out ppl  s.e. NLL  in domain ppl  s.e. NLL" in lines[0]
    for row, line in zip(rows, lines[2:5], strict=True):
        figures = [
            row["texts"][label][key] for label in ("held-out", "in domain") for key in ("perplexity", "standard_error")
        ]
        shown = [row["parameters"], row["weight_bytes"] / 1e6, row["tokens_per_second"], *figures]
        assert line.startswith(f"{row['checkpoint']} ")
        assert line.split()[2:] == [row["runtime"], row["dtype"], *map(console.number, shown)]
    keys = ("ratio", "nll_difference", "nll_difference_standard_error")
    assert lines[6].split("  ")[0] == f"against {dense}"
    for line, (row, label) in zip(
        lines[8:12], [(r, t) for r in rows[1:] for t in ("held-out", "in domain")], strict=True
    ):
        assert line.startswith(f"{row['checkpoint']} ")
        assert f" {label} " in line
        assert line.split()[-3:] == [console.number(row["texts"][label][key]) for key in keys]
    threads = torch.get_num_threads()
    assert lines[13:] == [
        "held-out: 4 windows of 64 tokens, stride 64, 252 scored tokens",
        "in domain: 4 windows of 64 tokens, stride 64, 252 scored tokens",
        f"tokens/s: forward passes only, batches of 3, device cpu, CPU threads: {threads}",
    ]


def test_one_checkpoint_has_no_differences_and_a_stride_reaches_the_whole_text(
    dense: Path, text: Path, pifa_deploy: Command
) -> None:
    outcome = pifa_deploy("evaluate", dense, "--text", text, "--context", 64, "--stride", 48)
    assert outcome.code == 0, outcome.err
    assert "against" not in outcome.out
    count = len(token_ids(text.read_text(encoding="utf-8"), small_tokenizer())) - 1
    assert f"tokens, stride 48, {count:,} scored tokens" in outcome.out


@pytest.mark.parametrize(
    ("line", "code", "pattern"),
    [
        ("{dense} --text {text} --stride 0", USAGE, "stride is 0, expected 1 <= stride <= context, which is 512"),
        ("{dense} --text {text} --context 64 --stride 65", USAGE, "stride is 65, expected"),
        ("{dense} --text {text} --batch-size 0", USAGE, "batch_size is 0, expected at least 1"),
        ("{dense} --text {text} --text {text}", USAGE, "are both named 'held-out'; name one as NAME="),
        ("{dense} --text a={text} --text a={other}", USAGE, "held-out.txt and .*emma.txt are both named 'a'"),
        ("{dense} --text =file.txt", USAGE, r"--text is '=file.txt', expected \[NAME=\]FILE"),
        ("{dense} --text label=", USAGE, r"--text is 'label=', expected \[NAME=\]FILE"),
        ("{dense} --text a=absent.txt", USAGE, r"absent\.txt: no such text file"),
        ("{dense} --text {text} --device tpu", USAGE, "'tpu' is not one of"),
        ("{dense} --text {text} --context 9000", REFUSED, r"held-out\.txt: the text has \d+ tokens, one window needs"),
        ("{dense} {empty} --text {text}", REFUSED, "empty: is no checkpoint or ONNX folder"),
        ("{dense} {engine} --text {text}", NOT_DECIDED, "engine: is an engine folder, which gives no perplexity here"),
        ("{dense} {other} --text {text}", REFUSED, r"emma\.txt: starts with b'.*', expected a model folder or a GGUF"),
    ],
)
def test_bad_input_is_one_line_and_the_right_exit_code(
    line: str,
    code: int,
    pattern: str,
    dense: Path,
    text: Path,
    other_text: Path,
    tmp_path: Path,
    pifa_deploy: Command,
) -> None:
    places = {"dense": dense, "text": text, "other": other_text}
    for name in ("empty", "engine"):
        places[name] = tmp_path / name
        places[name].mkdir()
    (tmp_path / "engine" / "engine.json").write_text("{}")
    outcome = pifa_deploy("evaluate", *(part.format(**places) for part in line.split()))
    outcome.failed(code, pattern)
    assert outcome.out == ""


def test_no_time_goes_into_the_first_model_when_the_last_one_is_refused(
    dense: Path, text: Path, tmp_path: Path, pifa_deploy: Command
) -> None:
    small_model().save_pretrained(tmp_path / "bare")
    outcome = pifa_deploy("evaluate", dense, tmp_path / "bare", "--text", text, "--context", 64)
    outcome.failed(REFUSED, "tokenizer of .*bare")
    assert f"evaluate {dense}" not in outcome.err


def test_a_token_that_the_graph_does_not_know_is_refused(onnx_folder: Path, text: Path, tmp_path: Path) -> None:
    has_onnx_runtime()
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "other"))
    letters = sorted(set(text.read_text(encoding="utf-8")))
    tokenizer = Tokenizer(models.WordLevel({letter: 400 + i for i, letter in enumerate(letters)}, unk_token=letters[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    with pytest.raises(
        InputRefusedError, match=r"the tokenizer made token 4\d\d of the text, the model knows 0 \.\. 383"
    ):
        report_of(text, folder)
