"""A compression that ends early goes on where it was: with the same bytes, for the same model and options only."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_fixtures import Outcome, content, cut, passage, save_dense, write

from pifa_deploy.calibration import HELD_OUT_TEXT, CalibrationOptions
from pifa_deploy.compression import (
    ActivationOptions,
    CompressOptions,
    LayerReport,
    ReconstructionOptions,
    compress_model,
    pipeline,
    resume,
)
from pifa_deploy.errors import InputRefusedError, MisfitError

pytest_plugins = ("cli_plugin",)

MISFIT, REFUSED, INTERRUPTED, TERMINATED = 5, 6, 130, 143
LAYERS = 4
STATE, LAYER = ".out.resume/state.json", ".out.resume/layer-00001.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("deep") / "dense", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(passage(HELD_OUT_TEXT, 6000), encoding="utf-8")
    (folder / "b.txt").write_text(passage(HELD_OUT_TEXT, 6001), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def options(texts: Path) -> CompressOptions:
    # The last of three batches is smaller than the others.
    return CompressOptions(
        density=0.5,
        calibration=(str(texts / "a.txt"),),
        windows=CalibrationOptions(samples=5, sequence_length=32),
        activations=ActivationOptions(batch_tokens=64),
    )


RUNS: dict[str, dict[str, Any]] = {
    "mpifa": {},
    # The output of attention is kept in bf16 between the passes of a layer, and read again only by the first run.
    "mpifa as lowrank": {"format": "lowrank", "dtype": "fp16", "activations": ActivationOptions(dtype="bf16")},
    "mpifa in rounds": {"reconstruction": ReconstructionOptions(solver="alternating", dense_share=0.0)},
    "whitened": {"method": "whitened", "activations": ActivationOptions(dtype="bf16", batch_tokens=64)},
    "owl": {"layer_density": "owl", "attention_density": 0.4},
    "sparsegpt": {"method": "sparsegpt", "density": 0.5},
    "magnitude": {"method": "magnitude", "density": 0.5, "calibration": ()},
}


@pytest.fixture(scope="module")
def whole(source: Path, options: CompressOptions, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """`whole("mpifa")` gives the files of a run that nobody stopped."""
    made: dict[str, dict[str, str]] = {}

    def files(name: str) -> dict[str, str]:
        if name not in made:
            folder = tmp_path_factory.mktemp("whole")
            compress_model(source, folder / "out", replace(options, **RUNS[name]))
            made[name] = content(folder)
        return made[name]

    return files


# Killed


def killed_run(source: Path, out: Path, options: CompressOptions, moment: str, count: int) -> None:
    """Compresses in a process of its own until it kills itself, the `count`-th time that it comes to a moment."""
    calls = 0

    def passing() -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)

    solve_group, save_file, swap = pipeline.solve_group, resume.save_file, resume.ResumeFolder.remove

    def solving(*args: Any, **kwargs: Any) -> Any:
        passing()
        return solve_group(*args, **kwargs)

    def saving(tensors: Any, path: Path, **kwargs: Any) -> None:
        save_file(tensors, path, **kwargs)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        passing()
        path.write_bytes(data)

    def removing(folder: Any) -> None:
        passing()
        swap(folder)

    pipeline.solve_group = solving if moment == "solve" else solve_group
    resume.save_file = saving if moment == "file of a layer" else save_file
    resume.ResumeFolder.remove = removing if moment == "end" else swap  # type: ignore[method-assign]
    compress_model(source, out, options, report=lambda _: passing() if moment == "layer" else None)


@pytest.fixture(scope="module")
def killed() -> Callable[..., None]:
    """`killed(source, out, options, moment, count)` runs `killed_run`; each process is forked from one that only
    imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "pifa_deploy.compression", "transformers.models.llama.modeling_llama", "tokenizers"]
    )

    def run(*arguments: Any) -> None:
        process = context.Process(target=killed_run, args=arguments)
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL

    return run


# A layer has four solves (q k v, o, gate up, down) where the groups of linears come one after the other.
@pytest.mark.parametrize(
    ("run", "moment", "count", "finished"),
    [
        ("mpifa", "layer", 1, 1),
        ("mpifa", "layer", LAYERS, LAYERS),
        ("mpifa", "solve", 2, 0),
        ("mpifa", "solve", 11, 2),
        ("mpifa", "file of a layer", 1, 0),
        ("mpifa", "file of a layer", 3, 2),
        ("mpifa as lowrank", "layer", 3, 3),
        ("mpifa as lowrank", "solve", 12, 2),
        ("mpifa in rounds", "layer", 2, 2),
        ("whitened", "layer", 2, 2),
        ("whitened", "solve", 7, 1),
        ("owl", "layer", 2, 2),
        ("sparsegpt", "layer", 1, 1),
        ("sparsegpt", "solve", 15, 3),
        ("magnitude", "layer", 3, 3),
    ],
)
def test_killed_and_started_again_it_writes_the_same_bytes(
    run: str,
    moment: str,
    count: int,
    finished: int,
    source: Path,
    options: Any,
    tmp_path: Path,
    whole: Any,
    killed: Any,
) -> None:
    chosen = replace(options, **RUNS[run])
    killed(source, tmp_path / "out", chosen, moment, count)
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.resume/layer-*.safetensors"))) == finished
    reports: list[LayerReport] = []
    compress_model(source, tmp_path / "out", chosen, report=reports.append)
    assert content(tmp_path) == whole(run)
    assert [report.layer for report in reports] == list(range(LAYERS))
    assert [report.seconds == 0.0 for report in reports] == [layer < finished for layer in range(LAYERS)]


def test_killed_again_and_again_it_writes_the_same_bytes(
    source: Path, options: CompressOptions, tmp_path: Path, whole: Any, killed: Any
) -> None:
    for moment, count in (("layer", 1), ("solve", 6), ("file of a layer", 1), ("layer", 4)):
        killed(source, tmp_path / "out", options, moment, count)
    compress_model(source, tmp_path / "out", options)
    assert content(tmp_path) == whole("mpifa")


def test_killed_when_the_output_stood_it_is_whole(
    source: Path, options: CompressOptions, tmp_path: Path, whole: Any, killed: Any
) -> None:
    killed(source, tmp_path / "out", options, "end", 1)
    assert {name: digest for name, digest in content(tmp_path).items() if name.startswith("out")} == whole("mpifa")
    compress_model(source, tmp_path / "out", replace(options, force=True))
    assert content(tmp_path) == whole("mpifa")


def test_the_command_line_goes_on_after_a_kill(source: Path, texts: Path, tmp_path: Path, pifa_deploy: Any) -> None:
    def arguments(out: Path) -> list[str]:
        # Enough text for the kill to come before the end.
        return [
            *("compress", str(source), str(out), "--density", "0.5", "--calibration", str(texts / "a.txt")),
            *("--sequence-length", "64", "--calibration-samples", "400", "--activation-dtype", "bf16"),
        ]

    command = [sys.executable, "-c", "from pifa_deploy.cli.main import main; main()", *arguments(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        for _ in range(6000):
            if (tmp_path / LAYER).exists():
                break
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / LAYER).exists()
    assert not (tmp_path / "out").exists()
    outcome = pifa_deploy(*arguments(tmp_path / "out"))
    assert outcome.code == 0
    assert all(line.endswith(", 0.0 s, 0 s left") for line in shown(outcome)[:2])
    (tmp_path / "other").mkdir()
    assert pifa_deploy(*arguments(tmp_path / "other" / "out")).code == 0
    whole = content(tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    assert content(tmp_path) == whole


# Another compression


@pytest.fixture(scope="module")
def unfinished(source: Path, options: CompressOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a run to "out" was stopped after two layers. Copy it."""
    folder = tmp_path_factory.mktemp("unfinished")

    def stop(report: LayerReport) -> None:
        if report.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_model(source, folder / "out", options, report=stop)
    assert sorted(content(folder)) == [
        ".out.resume",
        *(f".out.resume/layer-{n:05d}.safetensors" for n in (0, 1)),
        STATE,
    ]
    return folder


@pytest.fixture
def stopped(unfinished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unfinished, tmp_path / "stopped"))


def test_a_stopped_run_goes_on_in_another_process(
    stopped: Path, source: Path, options: CompressOptions, whole: Any
) -> None:
    compress_model(source, stopped / "out", options)
    assert content(stopped) == whole("mpifa")


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "density": ({"density": 0.6}, r"density 0\.5, now it is 0\.6"),
    "method": ({"method": "whitened"}, "method mpifa, now it is whitened"),
    "format": ({"format": "lowrank"}, "format pifa, now it is lowrank"),
    "dtype": ({"dtype": "bf16"}, "dtype fp32, now it is bf16"),
    "linears": ({"exclude": ("*.o_proj",)}, r"exclude \[\], now it is \['\*\.o_proj'\]"),
    "seed": ({"windows": CalibrationOptions(samples=5, sequence_length=32, seed=1)}, r"windows\.seed 0, now it is 1"),
    "samples": ({"windows": CalibrationOptions(samples=6, sequence_length=32)}, r"windows\.samples 5, now it is 6"),
    "ridge": ({"reconstruction": ReconstructionOptions(ridge=0.5)}, r"reconstruction\.ridge 0\.\d+, now it is 0\.5"),
    "batches": ({"activations": ActivationOptions(batch_tokens=32)}, r"activations\.batch_tokens 64, now it is 32"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_options_are_refused_by_name(other: str, stopped: Path, source: Path, options: CompressOptions) -> None:
    changes, pattern = OTHERS[other]
    before = content(stopped)
    with pytest.raises(MisfitError, match=rf"\.out\.resume: is of another compression, with {pattern}; run the same"):
        compress_model(source, stopped / "out", replace(options, **changes))
    assert content(stopped) == before


def test_another_text_is_refused_by_name(stopped: Path, source: Path, options: CompressOptions, texts: Path) -> None:
    before = content(stopped)
    with pytest.raises(MisfitError, match=r"with calibration text \[.*a\.txt.*\], now it is \[.*b\.txt.*\]; run"):
        compress_model(source, stopped / "out", replace(options, calibration=(str(texts / "b.txt"),)))
    assert content(stopped) == before


def test_another_model_is_refused(stopped: Path, source: Path, options: CompressOptions, tmp_path: Path) -> None:
    changed = save_dense(tmp_path / "changed", num_hidden_layers=LAYERS, rms_norm_eps=1e-5)
    before = content(stopped)
    with pytest.raises(MisfitError, match=r"with model [0-9a-f]{64}, now it is [0-9a-f]{64}; run"):
        compress_model(changed, stopped / "out", options)
    assert content(stopped) == before
    moved = shutil.copytree(source, tmp_path / "moved")
    compress_model(moved, stopped / "out", options)


def test_another_commit_of_a_hub_model_is_refused(
    source: Path, options: CompressOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, first, second = tmp_path / "hub" / "models--some--model", "a" * 40, "b" * 40
    for commit in (first, second):
        shutil.copytree(source, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (repository / "refs").mkdir()

    def compress(commit: str, *, stop: bool = False) -> None:
        (repository / "refs" / "main").write_text(commit)

        def report(layer: LayerReport) -> None:
            if stop:
                raise KeyboardInterrupt

        compress_model("hf:some/model", tmp_path / "out", replace(options, method="svd", calibration=()), report=report)

    with pytest.raises(KeyboardInterrupt):
        compress(first, stop=True)
    with pytest.raises(
        MisfitError, match=rf"with model hf:some/model at {first}, now it is hf:some/model at {second};"
    ):
        compress(second)
    compress(first)
    assert (tmp_path / "out" / "config.json").is_file()


def test_another_tokenizer_is_refused(stopped: Path, source: Path, options: CompressOptions, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(source, tmp_path / "changed"))
    state = json.loads((changed / "tokenizer.json").read_text(encoding="utf-8"))
    state["model"]["merges"] = state["model"]["merges"][:20]
    (changed / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(MisfitError, match=r"with calibration tokens [0-9a-f]{64}, now"):
        compress_model(changed, stopped / "out", options)


def test_where_and_how_the_work_is_done_may_change(
    stopped: Path, source: Path, options: CompressOptions, texts: Path, tmp_path: Path, whole: Any
) -> None:
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copyfile(texts / "a.txt", tmp_path / "elsewhere" / "a.txt")
    activations = replace(options.activations, folder=tmp_path / "activations")
    changed = replace(options, calibration=(str(moved),), activations=activations, device="cpu", force=True)
    compress_model(source, stopped / "out", changed)
    assert content(stopped) == whole("mpifa")
    assert list((tmp_path / "activations").iterdir()) == []


def test_the_command_line_tells_a_misfit_and_leaves_the_old_output_whole(
    stopped: Path, source: Path, texts: Path, checkpoint: Path, pifa_deploy: Any
) -> None:
    shutil.copytree(checkpoint, stopped / "out")
    before = content(stopped)
    outcome = pifa_deploy(*command(source, stopped / "out", texts), "--seed", 1, "--force")
    outcome.failed(MISFIT, r"windows\.seed 0, now it is 1; run the same command again, or pass --restart")
    assert content(stopped) == before


def command(source: Path, out: Path, texts: Path) -> list[object]:
    """Returns the command line that `options` stand for."""
    sizes = ("--calibration-samples", 5, "--sequence-length", 32, "--batch-tokens", 64)
    return ["compress", source, out, "--density", 0.5, "--calibration", texts / "a.txt", *sizes]


def test_restart_begins_anew(
    stopped: Path, source: Path, options: CompressOptions, texts: Path, tmp_path: Path
) -> None:
    other = replace(options, windows=replace(options.windows, seed=1))
    (tmp_path / "fresh").mkdir()
    compress_model(source, tmp_path / "fresh" / "out", other)
    reports: list[LayerReport] = []
    compress_model(source, stopped / "out", replace(other, restart=True), report=reports.append)
    assert all(report.seconds > 0.0 for report in reports)
    assert content(stopped) == content(tmp_path / "fresh")


# Damage

DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "state cut short": (STATE, cut(STATE, 0.5), r"state\.json: not JSON \(.*\); pass --restart to begin anew"),
    "state empty": (STATE, write(STATE, b""), r"state\.json: not JSON"),
    "state in another coding": (STATE, write(STATE, b"\xff\xfe{"), r"state\.json: not JSON"),
    "state a list": (STATE, write(STATE, b"[1]"), r"state\.json: is no JSON object; pass --restart"),
    "state gone": (STATE, lambda folder: (folder / STATE).unlink(), r"state\.json: missing, .*; pass --restart"),
    "layer cut short": (LAYER, cut(LAYER, 0.9), r"layer-00001\.safetensors: damaged \(.*\); remove it to go on from"),
    "layer empty": (LAYER, write(LAYER, b""), r"layer-00001\.safetensors: damaged"),
    "layer of something else": (LAYER, write(LAYER, b"PK\3\4" + bytes(64)), r"layer-00001\.safetensors: damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused_and_nothing_is_lost(
    damage: str, stopped: Path, source: Path, options: CompressOptions, whole: Any
) -> None:
    place, corrupt, pattern = DAMAGE[damage]
    good = (stopped / place).read_bytes()
    corrupt(stopped)
    before = content(stopped)
    with pytest.raises(InputRefusedError, match=pattern):
        compress_model(source, stopped / "out", options)
    assert content(stopped) == before
    (stopped / place).write_bytes(good)
    compress_model(source, stopped / "out", options)
    assert content(stopped) == whole("mpifa")


def test_damaged_ranks_are_refused_and_nothing_is_lost(
    source: Path, options: CompressOptions, tmp_path: Path, whole: Any, killed: Any
) -> None:
    chosen = replace(options, **RUNS["owl"])
    killed(source, tmp_path / "out", chosen, "layer", 2)
    ranks = tmp_path / ".out.resume" / "allocation.json"
    good = ranks.read_bytes()
    for bad in (b"{", b"[]", b'{"ranks": {}}', b'{"layer_densities": {"first": 1}}'):
        ranks.write_bytes(bad)
        before = content(tmp_path / ".out.resume")
        with pytest.raises(InputRefusedError, match=r"allocation\.json: damaged \(.*\); pass --restart to begin anew"):
            compress_model(source, tmp_path / "out", chosen)
        assert content(tmp_path / ".out.resume") == before
        assert not (tmp_path / "out").exists()
    ranks.write_bytes(good)
    compress_model(source, tmp_path / "out", chosen)
    assert content(tmp_path) == whole("owl")


def test_a_damaged_layer_can_be_done_again(
    stopped: Path, source: Path, options: CompressOptions, texts: Path, whole: Any, pifa_deploy: Any
) -> None:
    cut(LAYER, 0.5)(stopped)
    outcome = pifa_deploy(*command(source, stopped / "out", texts))
    outcome.failed(REFUSED, r"\.out\.resume/layer-00001\.safetensors: damaged .*; remove it to go on from there, or")
    (stopped / LAYER).unlink()
    reports: list[LayerReport] = []
    compress_model(source, stopped / "out", options, report=reports.append)
    assert [report.seconds == 0.0 for report in reports] == [True, False, False, False]
    assert content(stopped) == whole("mpifa")


# What is shown

LINE = r"layer {}/4: error 0\.\d{{4}}, drift \d\.\d{{4}}, \d+\.\d s, \d+ s left"


def shown(outcome: Outcome) -> list[str]:
    return [line for line in outcome.err.splitlines() if line.startswith("layer ")]


def test_each_layer_is_shown_with_its_error_and_the_seconds_left(
    source: Path, texts: Path, tmp_path: Path, pifa_deploy: Any
) -> None:
    outcome = pifa_deploy(*command(source, tmp_path / "out", texts))
    assert outcome.code == 0
    assert len(shown(outcome)) == LAYERS
    for number, line in enumerate(shown(outcome), start=1):
        assert re.fullmatch(LINE.format(number), line), line
    assert shown(outcome)[-1].endswith(", 0 s left")


def test_the_seconds_left_follow_the_pace_of_the_layers_of_this_run(
    stopped: Path, source: Path, options: CompressOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("pifa_deploy.compression.clock.StepClock.total", lambda self: float(next(clock)))
    reports: list[LayerReport] = []
    compress_model(source, stopped / "out", options, report=reports.append)
    # The clock is read at the start and the end of each layer: one apart, and one more between two layers.
    assert [report.seconds for report in reports] == [0.0, 0.0, 1.0, 1.0]
    assert [report.seconds_left for report in reports] == [0.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, INTERRUPTED, "interrupted"), (signal.SIGTERM, TERMINATED, "terminated")],
    ids=["SIGINT", "SIGTERM"],
)
@pytest.mark.parametrize("solves", [3, 6])
def test_a_signal_says_that_the_same_command_goes_on(
    number: int,
    code: int,
    word: str,
    solves: int,
    source: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Any,
    pifa_deploy: Any,
) -> None:
    real, calls = pipeline.solve_group, []

    def solving(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == solves:
            signal.raise_signal(number)
        return real(*args, **kwargs)

    monkeypatch.setattr(pipeline, "solve_group", solving)
    outcome = pifa_deploy(*command(source, tmp_path / "out", texts))
    outcome.failed(code, f"^error: {word}; what existed before is untouched$")
    if solves < 4:
        assert list(tmp_path.iterdir()) == []
        assert "the same command" not in outcome.err
        return
    assert "note: the same command, without --restart, goes on after layer 1" in outcome.err.splitlines()
    assert pifa_deploy(*command(source, tmp_path / "out", texts)).code == 0
    assert content(tmp_path) == whole("mpifa")
