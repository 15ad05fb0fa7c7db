"""`pifa-deploy tasks`: real lm-eval runs of a small model, and what compare-tasks and the report make of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_fixtures import Outcome

from pifa_deploy.errors import ExitCode, MissingCapabilityError, StageFailedError
from pifa_deploy.task_run import TaskRunOptions, _save, run_tasks
from pifa_deploy.task_samples import read_samples, sample_files

pytest_plugins = ("cli_plugin",)

Command = Callable[..., Outcome]

FIELDS = """
dataset_path: json
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{[good, bad]}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
WRITTEN = """
task: tiny_written
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: generate_until
doc_to_text: "{{good}}"
doc_to_target: "a"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
filter_list:
  - {name: letter, filter: [{function: regex, regex_pattern: "([a-z])"}, {function: take_first}]}
  - {name: whole, filter: [{function: take_first}]}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'pifa-deploy[lm-eval]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of a group and one that generates; the texts hold signs that end a line elsewhere than in JSON."""
    place, random = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    words = ["Anne", " Emma", " was", " clever", "\u2028", " Bath", "\x85", ".", " rich"]
    for name in ("one", "two"):
        docs = [{side: "".join(random.choice(words, 6)) for side in ("good", "bad")} for _ in range(40)]
        data = "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs)
        (place / f"{name}.jsonl").write_text(data, encoding="utf-8")
        path = json.dumps(str(place / f"{name}.jsonl"))
        (place / f"{name}.yaml").write_text(
            f"include: fields\ntask: tiny_{name}\ndataset_kwargs: {{data_files: {{test: {path}}}}}\n"
        )
    (place / "fields").write_text(FIELDS)
    (place / "group.yaml").write_text("group: tiny\ntask: [tiny_one, tiny_two]\n")
    (place / "written.yaml").write_text(WRITTEN % (place / "one.jsonl"))
    return place


@pytest.fixture(scope="module")
def runs(lm_eval: Any, folder: Path, dense: Path, checkpoint: Path, onnx_folder: Path) -> dict[str, Path]:
    """The checkpoint by lm-eval's own command line, its ONNX folder and the dense model by `tasks`."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'pifa-deploy[cpu]'")
    from pifa_deploy.cli.main import run

    asked = ["run", "--model", "pifa", "--model_args", f"path={checkpoint}", "--tasks", "tiny", "--limit", "30"]
    asked += ["--include_path", str(folder), "--log_samples", "--output_path", str(folder / "checkpoint")]
    line = [sys.executable, "-m", "pifa_deploy.lm_eval_adapter", *asked]
    done = subprocess.run(line, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    for name, place in (("onnx", onnx_folder), ("dense", dense)):
        given = ["--include-path", folder, "--task", "tiny", "--limit", 30, "--batch-size", 4]
        assert run([str(each) for each in ("tasks", place, folder / name, *given)]) == 0
    return {name: folder / name for name in ("checkpoint", "onnx", "dense")}


def test_a_checkpoint_and_its_onnx_folder_solve_the_same_examples(
    runs: dict[str, Path], tmp_path: Path, pifa_deploy: Command
) -> None:
    given = ("--margin", 0.1, "--json", tmp_path / "tasks.json")
    outcome = pifa_deploy("compare-tasks", runs["checkpoint"], runs["onnx"], *given)
    assert outcome.code == ExitCode.PASSED, outcome.out + outcome.err
    found = json.loads((tmp_path / "tasks.json").read_text())
    assert [(each["task"], each["examples"], each["lost"], each["won"]) for each in found["tasks"]] == [
        ("tiny_one", 30, 0, 0),
        ("tiny_two", 30, 0, 0),
    ]
    done = pifa_deploy("report", "--tasks", f"onnx={tmp_path / 'tasks.json'}", "--out", tmp_path / "report")
    assert (done.code, done.err) == (ExitCode.PASSED, "")
    assert "tiny\\_one | acc | 30 |" in (tmp_path / "report" / "report.md").read_text()


def test_counts_are_those_of_the_logged_likelihoods(runs: dict[str, Path], pifa_deploy: Command) -> None:
    """Who is right is read off the log-likelihoods, not off the metric."""
    right = {}
    for name in ("dense", "onnx"):
        samples = read_samples(sample_files(runs[name])["tiny_one"])
        scores = [[float(answer[0][0]) for answer in samples[key]["resps"]] for key in sorted(samples)]
        right[name] = np.array(scores).argmax(1) == 0
    outcome = pifa_deploy("compare-tasks", runs["dense"], runs["onnx"], "--task", "tiny_one", "--json", "-")
    (task,) = json.loads(outcome.out)["tasks"]
    assert task["examples"] == 30
    assert task["lost"] == int((right["dense"] & ~right["onnx"]).sum())
    assert task["won"] == int((~right["dense"] & right["onnx"]).sum())
    assert task["lost"] + task["won"] > 0
    assert outcome.code in (ExitCode.NOT_DECIDED, ExitCode.GATE_FAILED)


def test_a_run_says_what_it_did(runs: dict[str, Path], lm_eval: Any) -> None:
    told = json.loads((runs["onnx"] / "tasks.json").read_text())
    assert {name: task["examples"] for name, task in told["tasks"].items()} == {"tiny_one": 30, "tiny_two": 30}
    right = [sample["acc"] for sample in read_samples(sample_files(runs["onnx"])["tiny_two"]).values()]
    assert told["tasks"]["tiny_two"]["metrics"]["acc,none"] == pytest.approx(np.mean(right))
    assert told["options"]["limit"] == 30
    assert told["seconds"] > 0


def test_answers_that_are_generated_and_read_in_two_ways(
    lm_eval: Any, folder: Path, onnx_folder: Path, tmp_path: Path, pifa_deploy: Command
) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'pifa-deploy[cpu]'")
    given = ("--include-path", folder, "--task", "tiny_written", "--limit", 6, "--json", "-")
    outcome = pifa_deploy("tasks", onnx_folder, tmp_path / "out", *given)
    assert outcome.code == 0, outcome.err
    metrics = json.loads(outcome.out)["tasks"]["tiny_written"]["metrics"]
    assert metrics.keys() >= {"exact_match,letter", "exact_match,whole"}
    for more, chosen in (((), "letter"), (("--filter", "whole"), "whole")):
        done = pifa_deploy("compare-tasks", tmp_path / "out", tmp_path / "out", "--json", "-", *more)
        (task,) = json.loads(done.out)["tasks"]
        assert (task["metric"], task["examples"], task["lost"], task["won"]) == ("exact_match", 6, 0, 0)
        assert task["reference"] == metrics[f"exact_match,{chosen}"]


def test_bad_requests_are_one_line(
    lm_eval: Any, folder: Path, checkpoint: Path, tmp_path: Path, pifa_deploy: Command
) -> None:
    def asked(*more: object) -> Outcome:
        return pifa_deploy("tasks", checkpoint, tmp_path / "out", *more)

    outcome = asked("--task", "tiny_oen", "--include-path", folder)
    assert outcome.code == ExitCode.USAGE
    assert "lm-eval has no task 'tiny_oen'; did you mean tiny_one? --include-path FOLDER adds" in outcome.errors[0]
    outcome = asked("--task", "tiny", "--include-path", tmp_path / "gone")
    assert "gone: no such folder; expected one with YAML files of lm-eval tasks" in outcome.errors[0]
    assert not (tmp_path / "out").exists()


def test_samples_that_lm_eval_only_warns_about_are_missed(tmp_path: Path) -> None:
    class FullDisk:
        """lm-eval's tracker where writing fails half-way: it warns and goes on."""

        def save_results_aggregated(self, *, results: Any, samples: Any) -> None:
            pass

        def save_results_samples(self, *, task_name: str, samples: Any) -> None:
            (tmp_path / f"samples_{task_name}_2026-01-31T12-00-00.1.jsonl").write_text('{"doc_id": 0}\n')

    with pytest.raises(StageFailedError, match="arc: lm-eval wrote 1 of 2 samples; its warning stands above"):
        _save({"samples": {"arc": [{}, {}]}}, FullDisk(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "there is no task to run; name one with --task"),
        ({"limit": 0}, "limit is 0, expected at least 1"),
        ({"num_fewshot": -1}, "num_fewshot is -1, expected at least 0"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"device": "cpuu"}, "device is 'cpuu', expected cpu or cuda"),
    ],
)
def test_options_out_of_range_are_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskRunOptions(**{"tasks": ("arc",), **changes})


def test_without_lm_eval_nothing_is_decided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pifa_deploy: Command
) -> None:
    for name in ("lm_eval", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    outcome = pifa_deploy("tasks", tmp_path, tmp_path / "out", "--task", "arc_easy")
    outcome.failed(ExitCode.NOT_DECIDED, r"lm-eval does not load .*; pip install 'pifa-deploy\[lm-eval\]'")


def test_an_onnx_folder_asked_for_on_a_gpu_is_not_run_on_the_cpu(
    lm_eval: Any, onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(MissingCapabilityError, match="onnx: tasks run ONNX folders on the CPU only; use --device cpu"):
        run_tasks(str(onnx_folder), tmp_path / "out", TaskRunOptions(tasks=("arc_easy",), device="cuda"))
    assert not (tmp_path / "out").exists()
