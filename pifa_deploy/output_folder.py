"""Output folders and files that are whole or not there at all.

A folder is written beside its place and renamed into it. What stood there before stays whole until the
new one is, and one process at a time may write one output.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pifa_deploy.deferred_signals import signals_deferred
from pifa_deploy.errors import OutputError, OutputExistsError, OutputHeldError
from pifa_deploy.op_spec import QUANT_METHOD

# File -> its "artefact", None where it states none. A folder whose files say none of this was not made by this
# program: --force does not replace it. (Any config.json would not do: it also marks the dense model of the user; nor
# any tasks.json: what `compare-tasks --json` wrote may lie among the user's files.)
ARTEFACT_FILES = {
    "pifa.json": "onnx",
    "engine.json": None,
    "demo.json": "demo",
    "report.json": "report",
    "sparsity.json": "2:4",
    "tasks.json": "tasks",
}

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EIO,
)


@contextmanager
def new_folder(target: Path | str, *, force: bool = False) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends without an exception.

    Args:
        target: where the folder shall stand; its parents are made, links are followed.
        force: replace an existing artefact folder; it is removed only after the new one is in place.

    Raises:
        OutputExistsError: `target` exists and `force` is off, or it is not an artefact of this program.
        OutputHeldError: another process is writing `target`.
        OutputError: no space left, or no permission.
    """
    target = Path(os.path.realpath(target))
    with writing_errors(target):
        _refuse_existing(target, force)
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target, target.with_name(f".{target.name}.lock")):
        partial = target.with_name(f".{target.name}.partial")
        try:
            with writing_errors(target):
                _clear_leftovers(target)
                _refuse_existing(target, force)  # again: another process may have finished since
                partial.mkdir()
                yield partial
                _swap_in(partial, target)
        finally:
            try:
                with signals_deferred():
                    shutil.rmtree(partial, ignore_errors=True)
            finally:  # where a signal came before it was deferred
                shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Writes a UTF-8 file beside its place and renames it into it.

    Raises:
        OutputError: no space left, no permission, or something stands there that is no file.
    """
    path = Path(os.path.abspath(path))
    partial = _partial_file(path)
    with writing_errors(path):
        _refuse_special(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def check_file(path: Path | str) -> None:
    """Tries the place of a file that `write_text` shall write after long work; leaves nothing there.

    Raises:
        OutputError: nothing can be written there now.
    """
    path = Path(os.path.abspath(path))
    try:
        _refuse_special(path)
        parent = next(each for each in path.parents if os.path.lexists(each))
        with suppress(FileNotFoundError):
            os.lstat(_partial_file(path))  # the length of the name
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; choose another place") from error


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` as indented JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def _partial_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _refuse_special(path: Path) -> None:
    # Renaming a file into its place would remove a device such as /dev/null, or a pipe that somebody reads.
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, expected a file", str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "it is no regular file (for standard output give -)", str(path))


def _refuse_existing(target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not force:
        raise OutputExistsError(f"{target} exists; name another output or pass --force to replace it")
    if not _is_artefact(target):
        raise OutputExistsError(
            f"{target} was not written by pifa-deploy; --force does not replace it, remove it first"
        )


def _is_artefact(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    for name in (*ARTEFACT_FILES, "config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            if name == "config.json":
                mine = found["quantization_config"]["quant_method"] == QUANT_METHOD
            else:
                mine = isinstance(found["schema"], int) and found.get("artefact") == ARTEFACT_FILES[name]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if mine:
            return True
    return False


def _swap_in(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old)


def _clear_leftovers(target: Path) -> None:
    """Puts right what a killed process left; the lock is held, so nobody is using it."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(target.with_name(f".{target.name}.partial"), ignore_errors=True)


@contextmanager
def locked(target: Path, path: Path) -> Iterator[None]:
    """Holds the lock file `path`, which says that `target` is being written; a process that dies holds none.

    Raises:
        OutputHeldError: another process holds it.
        OutputError: no space left, or no permission.
    """
    with writing_errors(target):
        held = [_locked_file(path, target)]
    try:
        yield
    finally:
        try:
            with signals_deferred():
                _release(path, held)
        finally:  # where a signal came before it was deferred
            _release(path, held)


def _release(path: Path, held: list[int]) -> None:
    if held:
        # Removed while still held: who opened it meanwhile finds in `_locked_file` that it is gone.
        path.unlink(missing_ok=True)
        os.close(held.pop())


def _locked_file(path: Path, target: Path) -> int:
    """Returns a descriptor that holds the lock of the file that stands at `path` now."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _stands_at(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise OutputHeldError(
                f"{target} is being written by another process; wait for it or name another output"
            ) from None
        os.close(descriptor)


def _stands_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def writing_errors(target: Path) -> Iterator[None]:
    """Turns a failed write into OutputError; an error about a file elsewhere (an input) stays what it is."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors and torch raise their own exceptions, with the system's words in them.
        no_space = number in _NO_SPACE or os.strerror(errno.ENOSPC) in str(error)
        # FAT32, as memory cards have it, holds no file of 4 GiB.
        too_large = number == errno.EFBIG or os.strerror(errno.EFBIG) in str(error)
        if not (no_space or too_large) and (number not in _NO_PLACE or not _is_beside(error, target)):
            raise
        advice = "free some space" if no_space else "choose another place"
        if too_large:
            advice = "choose a file system that holds larger files"
        raise OutputError(f"{target} could not be written: {error}; {advice} and run the command again") from error


def _is_beside(error: Exception, target: Path) -> bool:
    name = getattr(error, "filename", None)
    if not isinstance(name, (str, Path)):
        return True
    path = Path(os.path.abspath(name))
    if target.parent not in path.parents:
        return path in target.parents
    top = path.relative_to(target.parent).parts[0]
    return top == target.name or top.startswith(f".{target.name}.")
