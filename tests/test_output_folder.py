"""Outputs are whole or not there, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pifa_deploy.errors import ExitCode, OutputError, OutputExistsError, OutputHeldError
from pifa_deploy.output_folder import ARTEFACT_FILES, check_file, new_folder, write_json, write_text

MARK = '{"schema": 1}'


def artefact(folder: Path, text: str = "old") -> Path:
    folder.mkdir()
    (folder / "engine.json").write_text(MARK)
    (folder / "weights").write_text(text)
    return folder


def names(folder: Path) -> list[str]:
    """Returns everything in a folder, hidden files too."""
    return sorted(entry.name for entry in folder.iterdir())


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD = {"engine.json": MARK, "weights": "old"}

WRITER = """
import sys, time
from pifa_deploy.output_folder import new_folder
with new_folder(sys.argv[1], force=True) as folder:
    (folder / "engine.json").write_text("from the other process")
    print("writing", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other_writer(tmp_path: Path) -> Any:
    """Starts another process that is inside `new_folder(tmp_path / "out")` until it reads a line."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "out")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "out"
    with new_folder(target) as folder:
        (folder / "engine.json").write_text("new")
        assert not target.exists()
        assert folder.parent == target.parent  # the same file system: a rename, not a copy
    assert content(target) == {"engine.json": "new"}
    assert names(target.parent) == ["out"]


def test_an_empty_folder_is_filled_without_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(str(tmp_path / "out")) as folder:
        (folder / "a").write_text("new")
    assert content(tmp_path / "out") == {"a": "new"}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("make", [artefact, lambda path: path.write_text("a file")], ids=["folder", "file"])
def test_an_existing_output_is_refused_without_force(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "out")
    with (
        pytest.raises(OutputExistsError, match="out exists; name another output or pass --force") as caught,
        new_folder(tmp_path / "out"),
    ):
        pytest.fail("the block ran")
    assert caught.value.exit_code == ExitCode.USAGE
    assert names(tmp_path) == ["out"]


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    artefact(tmp_path / "out")
    with new_folder(tmp_path / "out", force=True) as folder:
        (folder / "report.json").write_text("new")
        assert content(tmp_path / "out") == OLD
    assert content(tmp_path / "out") == {"report.json": "new"}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("existed", [True, False], ids=["replacing", "new"])
def test_an_interrupted_block_leaves_what_was_there(tmp_path: Path, error: type[BaseException], existed: bool) -> None:
    if existed:
        artefact(tmp_path / "out")
    with pytest.raises(error), new_folder(tmp_path / "out", force=True) as folder:  # noqa: PT012
        (folder / "engine.json").write_text("half")
        raise error
    assert names(tmp_path) == ["out"] * existed
    if existed:
        assert content(tmp_path / "out") == OLD


def test_an_error_while_swapping_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact(tmp_path / "out")
    rename = Path.rename

    def interrupted(self: Path, to: Path) -> Path:
        if self.name == ".out.partial":
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", force=True) as folder:
        (folder / "engine.json").write_text("new")
    assert content(tmp_path / "out") == OLD
    assert names(tmp_path) == ["out"]


class TestForceNeverReplaces:
    def refused(self, target: Path) -> None:
        before = sorted(str(path) for path in target.rglob("*"))
        with (
            pytest.raises(OutputExistsError, match="was not written by pifa-deploy; --force does not replace it"),
            new_folder(target, force=True),
        ):
            pytest.fail("the block ran")
        assert sorted(str(path) for path in target.rglob("*")) == before

    def test_a_folder_of_other_files(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("x")
        self.refused(tmp_path / "out")

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("x")
        self.refused(tmp_path / "out")

    @pytest.mark.parametrize("marker", ARTEFACT_FILES)
    def test_a_folder_with_a_file_of_that_name_but_another_content(self, tmp_path: Path, marker: str) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / marker).write_text('{"title": "a report of the user"}')
        (tmp_path / "out" / "thesis.tex").write_text("x")
        self.refused(tmp_path / "out")

    @pytest.mark.parametrize("marker", ARTEFACT_FILES)
    def test_a_folder_with_a_result_that_a_command_wrote_under_that_name(self, tmp_path: Path, marker: str) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / marker).write_text('{"schema": 1, "artefact": "compare-tasks", "tasks": []}')
        (tmp_path / "out" / "thesis.tex").write_text("x")
        self.refused(tmp_path / "out")

    def test_a_folder_in_which_an_artefact_name_is_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "out" / "engine.json").mkdir(parents=True)
        self.refused(tmp_path / "out")

    @pytest.mark.parametrize(
        "config",
        ['{"model_type": "llama"}', '{"quantization_config": {"quant_method": "awq"}}', "[]", "not json", "{}"],
    )
    def test_a_model_that_is_not_ours(self, tmp_path: Path, config: str) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text(config)
        (tmp_path / "out" / "model.safetensors").write_text("weights of the user")
        self.refused(tmp_path / "out")


@pytest.mark.parametrize(
    ("marker", "text"),
    [
        ("pifa.json", '{"schema": 1, "artefact": "onnx"}'),
        ("engine.json", '{"schema": 1}'),
        ("demo.json", '{"schema": 1, "artefact": "demo"}'),
        ("report.json", '{"schema": 1, "artefact": "report"}'),
        ("sparsity.json", '{"schema": 1, "artefact": "2:4"}'),
        ("tasks.json", '{"schema": 1, "artefact": "tasks"}'),
        ("config.json", '{"quantization_config": {"quant_method": "pifa"}}'),
    ],
)
def test_force_replaces_every_kind_of_artefact(tmp_path: Path, marker: str, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / marker).write_text(text)
    with new_folder(tmp_path / "out", force=True) as folder:
        (folder / "a").write_text("new")
    assert content(tmp_path / "out") == {"a": "new"}


def test_a_link_is_followed_to_the_folder_it_names(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    artefact(tmp_path / "disk" / "real")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    with new_folder(tmp_path / "out", force=True) as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert content(tmp_path / "disk" / "real") == {"a": "new"}
    assert names(tmp_path / "disk") == ["real"]


class TestConcurrentWriters:
    def test_the_second_is_told_that_the_output_is_held(self, tmp_path: Path, other_writer: Any) -> None:
        first = other_writer()
        with (
            pytest.raises(OutputHeldError, match="out is being written by another process") as caught,
            new_folder(tmp_path / "out", force=True),
        ):
            pytest.fail("the block ran")
        assert caught.value.exit_code == ExitCode.OUTPUT_HELD
        first.communicate("go on\n", timeout=20)
        assert first.returncode == 0
        assert content(tmp_path / "out") == {"engine.json": "from the other process"}
        assert names(tmp_path) == ["out"]

    def test_another_output_is_free(self, tmp_path: Path, other_writer: Any) -> None:
        other_writer()
        with new_folder(tmp_path / "out2") as folder:
            (folder / "a").write_text("new")
        assert (tmp_path / "out2" / "a").exists()

    def test_what_a_killed_one_left_is_cleared(self, tmp_path: Path, other_writer: Any) -> None:
        artefact(tmp_path / "out")
        first = other_writer()
        os.kill(first.pid, signal.SIGKILL)
        first.wait(timeout=20)
        assert content(tmp_path / "out") == OLD
        assert len(names(tmp_path)) > 1  # it did leave something
        with new_folder(tmp_path / "out", force=True) as folder:
            assert names(folder) == []
            (folder / "engine.json").write_text("new")
        assert content(tmp_path / "out") == {"engine.json": "new"}
        assert names(tmp_path) == ["out"]

    @pytest.mark.parametrize("finished", [True, False])
    def test_one_killed_between_its_two_renames_lost_nothing(self, tmp_path: Path, finished: bool) -> None:
        artefact(tmp_path / ".out.old")
        if finished:  # killed before it removed the old folder
            artefact(tmp_path / "out", "new")
        with pytest.raises(RuntimeError), new_folder(tmp_path / "out", force=True):
            raise RuntimeError
        assert content(tmp_path / "out") == (OLD if not finished else {"engine.json": MARK, "weights": "new"})
        assert names(tmp_path) == ["out"]

    def test_a_lock_file_without_a_holder_does_not_hold(self, tmp_path: Path) -> None:
        (tmp_path / ".out.lock").touch()
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("new")
        assert names(tmp_path) == ["out"]

    def test_an_output_that_appears_before_the_lock_is_taken_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import fcntl

        lock = fcntl.flock

        def slow_lock(descriptor: int, operation: int) -> None:
            artefact(tmp_path / "out")  # the other process finished meanwhile
            lock(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", slow_lock)
        with pytest.raises(OutputExistsError, match="out exists"), new_folder(tmp_path / "out"):
            pytest.fail("the block ran")
        assert content(tmp_path / "out") == OLD


class TestFailedWrites:
    @pytest.mark.parametrize("existed", [True, False], ids=["replacing", "new"])
    def test_a_full_disk_is_an_output_error_and_leaves_nothing(self, tmp_path: Path, existed: bool) -> None:
        if existed:
            artefact(tmp_path / "out")
        with (  # noqa: PT012
            pytest.raises(OutputError, match=r"out could not be written: .*No space left.*; free some space") as caught,
            new_folder(tmp_path / "out", force=True) as folder,
        ):
            (folder / "half").write_text("half")
            with open("/dev/full", "wb", buffering=0) as full:  # the kernel's own ENOSPC
                full.write(b"x")
        assert caught.value.exit_code == ExitCode.STAGE_FAILED
        assert isinstance(caught.value.__cause__, OSError)
        assert names(tmp_path) == ["out"] * existed
        if existed:
            assert content(tmp_path / "out") == OLD

    def test_a_full_disk_under_a_library_with_its_own_exceptions_is_an_output_error(self, tmp_path: Path) -> None:
        from safetensors import SafetensorError

        with pytest.raises(OutputError, match="free some space"), new_folder(tmp_path / "out"):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        assert names(tmp_path) == []

    @pytest.mark.parametrize(
        ("number", "advice"),
        [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space"), (errno.EROFS, "choose another place")],
    )
    def test_say_what_to_do(self, tmp_path: Path, number: int, advice: str) -> None:
        with pytest.raises(OutputError, match=advice), new_folder(tmp_path / "out"):
            raise OSError(number, os.strerror(number))
        assert names(tmp_path) == []

    def test_a_missing_permission_of_the_output_is_an_output_error(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="choose another place"), new_folder(tmp_path / "out") as folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder / "a"))

    def test_a_missing_permission_of_an_input_is_not(self, tmp_path: Path) -> None:
        with pytest.raises(PermissionError), new_folder(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else/weights")
        assert names(tmp_path) == []

    def test_a_missing_input_is_not(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
            (tmp_path / "no such input").read_text()
        assert names(tmp_path) == []

    def test_a_parent_that_is_a_file_is_an_output_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        for target in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
            with pytest.raises(OutputError, match="choose another place"), new_folder(target):
                pytest.fail("the block ran")
            with pytest.raises(OutputError, match="choose another place"):
                write_text(target, "x")


class TestFiles:
    def test_json_is_sorted_indented_and_ends_with_a_newline(self, tmp_path: Path) -> None:
        write_json(tmp_path / "deep" / "a.json", {"b": [1, None], "a": "é"})
        text = (tmp_path / "deep" / "a.json").read_text(encoding="utf-8")
        assert json.loads(text) == {"a": "é", "b": [1, None]}
        assert text.index('"a"') < text.index('"b"')
        assert text.endswith("}\n")
        assert names(tmp_path / "deep") == ["a.json"]

    def test_a_reader_of_the_old_file_keeps_reading_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        write_json(path, {"value": 1})
        with path.open() as reader:
            write_json(path, {"value": 2})
            assert json.load(reader) == {"value": 1}
        assert json.loads(path.read_text()) == {"value": 2}

    def test_a_value_that_is_no_json_leaves_the_old_file(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"value": 1})
        with pytest.raises(TypeError):
            write_json(tmp_path / "a.json", {"value": object()})
        assert json.loads((tmp_path / "a.json").read_text()) == {"value": 1}
        assert names(tmp_path) == ["a.json"]

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    def test_an_interrupted_write_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        write_json(tmp_path / "a.json", {"value": 1})
        write = Path.write_text

        def half(self: Path, text: str, **options: Any) -> int:
            write(self, text[: len(text) // 2], **options)
            raise error

        monkeypatch.setattr(Path, "write_text", half)
        expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(expected):
            write_json(tmp_path / "a.json", {"value": 2})
        assert json.loads((tmp_path / "a.json").read_text()) == {"value": 1}
        assert names(tmp_path) == ["a.json"]

    def test_a_relative_place_is_told_like_any_other(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_text("x")
        monkeypatch.chdir(tmp_path)
        for target in ("folder", "file/a.json", "file/deep/a.json"):
            with pytest.raises(OutputError, match=f"{tmp_path}/{target} could not be written: .*choose another place"):
                write_json(target, {})
        assert names(tmp_path) == ["file", "folder"]

    def test_what_is_no_regular_file_is_not_replaced(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OutputError, match=r"pipe could not be written: .*no regular file"):
            write_text(tmp_path / "pipe", "x")
        assert (tmp_path / "pipe").is_fifo()

    def test_a_place_that_can_be_written_is_left_as_it_was(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text("old")
        for target in ("a.json", "b.json", "deep/er/c.json"):
            check_file(tmp_path / target)
        assert content(tmp_path) == {"a.json": "old"}
        assert names(tmp_path) == ["a.json"]

    def test_a_folder_in_the_place_of_the_file_is_an_output_error(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").mkdir()
        with pytest.raises(OutputError, match=r"a\.json could not be written"):
            write_json(tmp_path / "a.json", {})
        assert names(tmp_path) == ["a.json"]
