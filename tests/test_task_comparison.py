"""Paired comparison of lm-eval runs: against scipy and simulation, and from files as lm-eval writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from pifa_deploy.errors import ExitCode, InputMissingError, InputRefusedError
from pifa_deploy.task_comparison import Pairs, TaskOptions, compare_tasks, pairs_of

pytest_plugins = ("cli_plugin",)


def write_run(folder: Path, task: str, right: list[int], model: str = "pifa__checkpoint", **changes: Any) -> Path:
    """Writes samples as lm-eval 0.4.13 does, one line an example, letters of all scripts as they are."""
    place = folder / model
    place.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, value in enumerate(right):
        sample = {"doc_id": number, "doc": {"question": f"q\u2028\x85{number}"}, "target": 1, "arguments": {}}
        sample |= {"resps": [], "filtered_resps": [], "filter": "none", "metrics": ["acc"]}
        sample |= {f"{part}_hash": f"{number:064x}" for part in ("doc", "prompt", "target")}
        lines.append(json.dumps(sample | {"acc": float(value)} | changes, ensure_ascii=False))
    (place / f"samples_{task}_2026-01-31T12-00-00.123456.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 7), (3, 9), (40, 52), (11, 11)])
def test_the_p_value_is_scipys_exact_test(lost: int, won: int) -> None:
    found = Pairs(both=30, lost=lost, won=won, neither=5).p_value()
    assert found == pytest.approx(binomtest(won, lost + won, 0.5).pvalue if lost + won else 1.0)


@pytest.mark.parametrize(
    ("size", "lost", "won"), [(200, 0.02, 0.02), (500, 0.06, 0.03), (1000, 0.002, 0.0), (60, 0.1, 0.2)]
)
def test_the_interval_covers_the_difference_as_often_as_it_says(size: int, lost: float, won: float) -> None:
    random = np.random.default_rng(0)
    counts = random.multinomial(size, [0.5, lost, won, 0.5 - lost - won], 2000)
    ends = [Pairs(both=b, lost=c, won=w, neither=d).interval(0.95) for b, c, w, d in counts.tolist()]
    covered = np.mean([low <= won - lost <= high for low, high in ends])
    assert 0.93 < covered <= 1.0
    assert max(high - low for low, high in ends) < 7 * np.sqrt((lost + won + 2 / size) / size)


def test_pairing_is_surer_than_two_accuracies() -> None:
    """800 of 1000 each, 10 lost and 10 won: two independent runs would be known to within 0.035."""
    low, high = Pairs(both=790, lost=10, won=10, neither=190).interval()
    assert (low + high) == pytest.approx(0, abs=1e-12)
    assert high < 0.01


def test_pairs_are_counted() -> None:
    found = pairs_of([True, True, False, False, True], [True, False, True, False, False])
    assert found == Pairs(both=1, lost=2, won=1, neither=1)
    with pytest.raises(ValueError, match="2 and 1 examples, expected as many"):
        pairs_of([True, True], [True])
    with pytest.raises(ValueError, match="0 and 0 examples, expected as many, at least one"):
        pairs_of([], [])


class TestFiles:
    def test_two_runs_are_compared_and_decided(self, tmp_path: Path, pifa_deploy: Any) -> None:
        random = np.random.default_rng(0)
        right = random.integers(0, 2, 2000)
        worse, noisy = right.copy(), right.copy()
        worse[:200] = 0
        flipped = random.permutation(2000)[:6]
        noisy[flipped] = 1 - noisy[flipped]
        reference = write_run(tmp_path / "a", "arc_easy", right.tolist())
        cases = {"worse": worse, "noisy": noisy, "few": right[:30]}
        runs = {name: write_run(tmp_path / name, "arc_easy", values.tolist()) for name, values in cases.items()}
        assert pifa_deploy("compare-tasks", reference, runs["noisy"]).code == ExitCode.PASSED
        assert pifa_deploy("compare-tasks", reference, runs["worse"]).code == ExitCode.GATE_FAILED
        short = write_run(tmp_path / "short", "arc_easy", right[:30].tolist())
        outcome = pifa_deploy("compare-tasks", short, runs["few"], "--json", tmp_path / "out.json")
        assert outcome.code == ExitCode.NOT_DECIDED
        written = json.loads((tmp_path / "out.json").read_text())
        assert [written[key] for key in ("artefact", "schema", "passed")] == ["compare-tasks", 1, None]
        assert written["decisions"][0]["name"] == "arc_easy.acc"
        assert pifa_deploy("compare-tasks", short, runs["few"], "--margin", 0.2).code == ExitCode.PASSED

    def test_figures_are_those_of_the_files(self, tmp_path: Path) -> None:
        right, other = [1, 1, 0, 0, 1, 1], [1, 0, 1, 0, 1, 0]
        folders = [write_run(tmp_path / str(i), "piqa", values) for i, values in enumerate((right, other))]
        (task,) = compare_tasks(*folders, TaskOptions()).tasks
        assert (task.task, task.metric, task.examples, task.lost, task.won) == ("piqa", "acc", 6, 2, 1)
        assert (task.reference, task.candidate) == (pytest.approx(4 / 6), pytest.approx(3 / 6))
        assert task.difference == pytest.approx(-1 / 6)
        assert task.low < task.difference < task.high

    def test_the_newest_run_of_a_task_counts_and_acc_norm_before_acc(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "a", "hella_swag", [1, 0, 1], acc_norm=1.0)
        (tmp_path / "a" / "pifa__checkpoint" / "samples_hella_swag_2025-01-31T12-00-00.1.jsonl").write_text("{}")
        (task,) = compare_tasks(folder, folder, TaskOptions(tasks=("hella_swag",))).tasks
        assert (task.metric, task.reference) == ("acc_norm", 1.0)

    def test_the_first_filter_counts(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "a", "gsm8k", [1, 0, 1])
        (file,) = folder.rglob("*.jsonl")
        strict = file.read_text()
        file.write_text(strict + strict.replace('"filter": "none"', '"filter": "flexible"'))
        assert compare_tasks(folder, folder, TaskOptions()).tasks[0].examples == 3

    def test_both_runs_are_read_by_the_filter_that_is_first_in_the_reference(self, tmp_path: Path) -> None:
        for name, order in (("a", ("strict", "flexible")), ("b", ("flexible", "strict"))):
            folder = write_run(tmp_path / name, "gsm8k", [1, 0, 1])
            (file,) = folder.rglob("*.jsonl")
            answers = {"strict": file.read_text().replace('"none"', '"strict"')}
            answers["flexible"] = (
                answers["strict"].replace('"strict"', '"flexible"').replace('"acc": 0.0', '"acc": 1.0')
            )
            file.write_text("".join(answers[kind] for kind in order))
        (task,) = compare_tasks(tmp_path / "a", tmp_path / "b", TaskOptions()).tasks
        assert (task.reference, task.candidate) == (2 / 3, 2 / 3)

    def test_one_task_pooled_is_that_task(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "a", "arc", [1, 0, 1])
        found = compare_tasks(folder, folder, TaskOptions(pooled=True)).to_json()
        assert [decision["name"] for decision in found["decisions"]] == ["arc.acc"]

    def test_another_filter_can_be_chosen(self, tmp_path: Path, pifa_deploy: Any) -> None:
        folder = write_run(tmp_path / "a", "gsm8k", [1, 0, 1])
        (file,) = folder.rglob("*.jsonl")
        strict = file.read_text()
        lenient = strict.replace('"filter": "none"', '"filter": "flexible"').replace('"acc": 0.0', '"acc": 1.0')
        file.write_text(strict + lenient)
        (task,) = compare_tasks(folder, folder, TaskOptions(filter="flexible")).tasks
        assert (task.examples, task.reference) == (3, 1.0)
        outcome = pifa_deploy("compare-tasks", folder, folder, "--filter", "flexble")
        outcome.failed(ExitCode.USAGE, r"has no filter 'flexble', only none, flexible; name one of these")

    def test_samples_of_two_models_in_one_folder_are_not_mixed(self, tmp_path: Path) -> None:
        for model in ("dense", "pifa"):
            write_run(tmp_path, "arc", [1, 0], model=model)
        with pytest.raises(InputRefusedError, match=r"arc in several folders, .*dense and .*pifa; name one"):
            compare_tasks(tmp_path, tmp_path, TaskOptions())
        assert compare_tasks(tmp_path / "dense", tmp_path / "pifa", TaskOptions()).tasks[0].examples == 2

    def test_tasks_together_decide_what_none_decides_alone(self, tmp_path: Path, pifa_deploy: Any) -> None:
        """As the subjects of MMLU: 20 with 100 examples each."""
        random = np.random.default_rng(0)
        for number in range(20):
            right = random.integers(0, 2, 100).tolist()
            for name in ("a", "b"):
                write_run(tmp_path / name, f"mmlu_{number}", right)
        places = (tmp_path / "a", tmp_path / "b")
        assert pifa_deploy("compare-tasks", *places).code == ExitCode.NOT_DECIDED
        outcome = pifa_deploy("compare-tasks", *places, "--pooled", "--json", tmp_path / "out.json")
        assert outcome.code == ExitCode.PASSED
        written = json.loads((tmp_path / "out.json").read_text())
        assert [decision["name"] for decision in written["decisions"]] == ["all tasks.acc"]
        assert written["overall"]["examples"] == 2000 == sum(task["examples"] for task in written["tasks"])
        assert re.search(r"all tasks +acc +2,000", outcome.out)
        done = pifa_deploy("report", "--tasks", f"pifa={tmp_path / 'out.json'}", "--out", tmp_path / "report")
        assert (done.code, done.err) == (ExitCode.PASSED, "")

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda text: text + "{", "line 4 is no sample of lm-eval"),
            (lambda text: text + "[]\n", "line 4 is no sample of lm-eval .TypeError"),
            (lambda text: text + text, "line 4 repeats example"),
            (lambda text: text.replace('"acc": 1.0', '"acc": 0.5'), "acc is 0.5, expected 0 or 1"),
            (lambda text: text.replace('"acc"', '"bleu"'), "its samples have none of acc_norm, acc"),
            (lambda text: text.replace('"doc_hash": "0', '"doc_hash": "1'), "is another one in each run"),
            (
                lambda text: text.replace('"prompt_hash": "0', '"prompt_hash": "1'),
                "asked in other words in each run",
            ),
            (lambda text: text.replace('"target_hash": "0', '"target_hash": "1'), "has another answer in each run"),
            (lambda text: text.replace('"acc": 1.0', '"acc": NaN'), "acc is nan, expected 0 or 1"),
            (lambda text: "\n".join(text.split("\n")[:-2]), "1 examples are in one run only"),
        ],
    )
    def test_what_cannot_be_compared_is_refused(self, edit: Any, message: str, tmp_path: Path) -> None:
        runs = [write_run(tmp_path / name, "arc", [1, 0, 1]) for name in "ab"]
        (file,) = runs[1].rglob("*.jsonl")
        file.write_text(edit(file.read_text()))
        with pytest.raises(InputRefusedError, match=message):
            compare_tasks(*runs, TaskOptions())

    def test_what_is_not_there_is_said(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "a", "arc", [1])
        other = write_run(tmp_path / "b", "piqa", [1])
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputMissingError, match=r"has no samples_piqa_DATE\.jsonl, only arc"):
            compare_tasks(folder, other, TaskOptions(tasks=("piqa",)))
        with pytest.raises(InputMissingError, match="have no task in common"):
            compare_tasks(folder, other, TaskOptions())
        with pytest.raises(InputMissingError, match=r"has no samples_TASK_DATE\.jsonl; run lm-eval with --log_samples"):
            compare_tasks(tmp_path / "empty", folder, TaskOptions())
        with pytest.raises(InputMissingError, match="no such file or folder"):
            compare_tasks(tmp_path / "absent", folder, TaskOptions())

    @pytest.mark.parametrize("changes", [{"margin": 0.0}, {"margin": 1.0}, {"confidence": 1.0}])
    def test_a_margin_out_of_range_is_an_error(self, changes: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="expected both between 0 and 1"):
            TaskOptions(**changes)
