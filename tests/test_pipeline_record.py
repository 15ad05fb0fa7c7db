"""What the record of a pipeline takes for the same inputs, and for the same machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pifa_deploy import pipeline_record
from pifa_deploy.environment import Environment, this_environment
from pifa_deploy.pipeline_record import StepRecord
from pifa_deploy.pipeline_step import CPU, GPU, PLUGIN, Step

ORIN = Environment(
    machine="Linux aarch64",
    cpu="Cortex-A78AE",
    cores=12,
    usable_cores=8,
    memory_bytes=None,
    gpus=({"name": "Orin", "driver": "540.4"},),
    driver="540.4",
    power_mode="30W",
    packages={"tensorrt": "10.3"},
)
STEP = Step(
    title="bench",
    arguments=("bench", "a=model", "--text", "in.txt"),
    output=Path("made/bench.json"),
    depends_on=("tensorrt", GPU, CPU),
)


def record(root: Path, environment: Environment = ORIN) -> StepRecord:
    return StepRecord(root, root / "made/steps.json", lambda: environment)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder in which the step was run on an Orin."""
    for name, text in {
        "model/a/weights": "abc",
        "model/config.json": "{}",
        "in.txt": "text",
        "made/bench.json": "",
    }.items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_text(text)
    made = record(tmp_path / "there")
    made.add(STEP, made.made_from(STEP, STEP.arguments), 1)
    return tmp_path / "there"


def change(root: Path, environment: Environment = ORIN, *, elsewhere: bool = False) -> str | None:
    return record(root, environment).change(STEP, STEP.arguments, elsewhere=elsewhere)


def test_a_copy_with_other_times_is_the_same(root: Path) -> None:
    copy = Path(shutil.copytree(root, root.parent / "here", copy_function=shutil.copyfile))
    for place in copy.rglob("*"):
        os.utime(place, (1_700_000_000, 1_700_000_000))
    assert change(copy) is None
    assert record(copy).exit_code(STEP) == 1


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda root: (root / "in.txt").write_text("next"), "in.txt is another"),
        (lambda root: (root / "model/a/weights").write_text("abd"), "model is another"),
        (lambda root: (root / "model/a/weights").rename(root / "model/weights"), "model is another"),
        (lambda root: (root / "model/more").write_text(""), "model is another"),
        (lambda root: (root / "in.txt").unlink(), "in.txt is gone"),
        (lambda root: swap(root / "in.txt", "next"), "in.txt is another"),
        (lambda root: (root / "made/bench.json").write_text("{"), "it is not as it was written"),
        (lambda root: (root / "made/bench.json").unlink(), "it is gone"),
        (lambda root: (root / "made/steps.json").unlink(), "nothing says what it was made from"),
    ],
)
def test_another_content_of_the_same_size_and_a_missing_file_are_told(
    root: Path, edit: Callable[[Path], object], expected: str
) -> None:
    edit(root)
    assert change(root) == expected


def swap(path: Path, text: str) -> None:
    """Puts another file in the place of one as `cp -p` and `rsync -t` do, with the time of the one before."""
    before = path.stat()
    other = path.with_name("other")
    other.write_text(text)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_what_other_programs_leave_in_a_folder_does_not_count(root: Path) -> None:
    for name in (".cache/huggingface/a.metadata", ".DS_Store", "__pycache__/task.pyc"):
        (root / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "model" / name).write_text("now")
    assert change(root) is None


def test_the_output_folder_does_not_count_in_a_folder_around_it(root: Path) -> None:
    step = Step(title="tasks", arguments=("tasks", "m", "made/a", "--include-path", "."), output=Path("made/a"))

    def told() -> str | None:
        return record(root).change(step, step.arguments)

    kept = record(root)
    before = kept.made_from(step, step.arguments)
    (root / "made/a").mkdir()
    (root / "made/a/tasks.json").write_text("{}")
    kept.add(step, before, 0)
    assert told() is None
    (root / "made/bench.json").write_text("another step made it again")
    assert told() is None
    (root / "in.txt").write_text("next")
    assert told() == ". is another"
    # Named itself, or a folder in it, it counts.
    assert change_of(root, "made")
    assert change_of(root, "made/a")


def change_of(root: Path, folder: str) -> bool:
    """Whether a file in the output folder changes what a step that reads a folder is made from."""
    step = Step(title="t", arguments=("tasks", folder), output=Path("elsewhere"))
    before = record(root).made_from(step, step.arguments)["files"]
    (root / "made/a/tasks.json").write_text(f"{folder} again")
    return bool(record(root).made_from(step, step.arguments)["files"] != before)


def test_another_command_or_version_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record(root).change(STEP, (*STEP.arguments, "--batch", "2")) == "another command made it"
    monkeypatch.setattr(pipeline_record, "__version__", "99")
    assert change(root) == f"pifa-deploy {importlib.metadata.version('pifa-deploy')} made it, this is 99"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"packages": {"tensorrt": "10.4"}}, "tensorrt was 10.3, is 10.4"),
        ({"packages": {}}, "tensorrt was 10.3, is not installed"),
        ({"gpus": ()}, "gpu was Orin with driver 540.4, is no GPU"),
        (
            {"usable_cores": 4},
            "cpu was Cortex-A78AE, 8 cores, power mode 30W, is Cortex-A78AE, 4 cores, power mode 30W",
        ),
        ({"power_mode": None}, "cpu was Cortex-A78AE, 8 cores, power mode 30W, is Cortex-A78AE, 8 cores"),
        ({"memory_bytes": 1, "cores": 2}, None),
    ],
)
def test_a_result_about_a_machine_stands_for_that_machine_only(
    root: Path, other: dict[str, object], expected: str | None
) -> None:
    there = replace(ORIN, **other)
    assert change(root, there) == expected
    assert change(root, there, elsewhere=True) is None


def test_files_that_stayed_on_the_other_machine_do_not_count(root: Path) -> None:
    (root / "in.txt").unlink()
    assert change(root, elsewhere=True) is None
    (root / "in.txt").write_text("next")
    assert change(root, elsewhere=True) == "in.txt is another"


def test_a_file_is_hashed_again_only_after_a_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    real = pipeline_record.file_sha256
    monkeypatch.setattr(pipeline_record, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    assert change(root) is None
    assert hashed == []
    (root / "in.txt").write_text("next")
    assert change(root) == "in.txt is another"
    assert hashed == ["in.txt"]


@pytest.mark.parametrize(
    "edit",
    [
        {"exit_code": 4},
        {"exit_code": "0"},
        {"exit_code": [0]},
        {"files": None},
        {"machine": []},
        {"command": "bench"},
        {"version": None},
        {"result": None},
    ],
)
def test_an_entry_that_is_not_whole_counts_as_none(root: Path, edit: dict[str, object]) -> None:
    path = root / "made/steps.json"
    content = json.loads(path.read_text())
    content["steps"][str(STEP.output)].update(edit)
    path.write_text(json.dumps(content))
    assert change(root) == "nothing says what it was made from"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 1, "steps": {}}', '{"schema": 3, "steps": 3, "hashes": 4}']
)
def test_a_file_that_is_no_record_counts_as_none(root: Path, text: str) -> None:
    (root / "made/steps.json").write_text(text)
    assert change(root) == "nothing says what it was made from"


def test_hashes_that_are_malformed_are_made_again(root: Path) -> None:
    path = root / "made/steps.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "hashes": {text: [1] for text in content["hashes"]}}))
    assert change(root) is None


def test_the_parts_of_this_machine_are_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(b"abc")
    monkeypatch.setenv("PIFA_PLUGIN_LIBRARY", str(library))
    step = replace(STEP, depends_on=("torch", CPU, PLUGIN))
    made = StepRecord(tmp_path, tmp_path / "steps.json").made_from(step, ("bench",))
    # The SHA-256 of "abc" is the first example of FIPS 180-2, appendix B.
    assert made["machine"]["plugin"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert made["machine"]["torch"] == importlib.metadata.version("torch")
    assert made["machine"]["cpu"].startswith(f"{this_environment().cpu}, {len(os.sched_getaffinity(0))} cores")
    monkeypatch.setenv("PIFA_PLUGIN_LIBRARY", str(tmp_path / "none.so"))
    assert StepRecord(tmp_path, tmp_path / "steps.json").made_from(step, ())["machine"]["plugin"] == "no library"
