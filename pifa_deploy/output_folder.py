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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pifa_deploy.errors import OutputError, OutputExistsError, OutputHeldError

# A folder that holds none of these was not made by this program: --force does not replace it.
ARTEFACT_FILES = ("config.json", "pifa.json", "engine.json", "report.json")


@contextmanager
def new_folder(target: Path | str, *, force: bool = False) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends without an exception.

    Args:
        target: where the folder shall stand; its parents are made.
        force: replace an existing artefact folder; it is removed only after the new one is in place.

    Raises:
        OutputExistsError: `target` exists and `force` is off, or it is not an artefact of this program.
        OutputHeldError: another process is writing `target`.
        OutputError: no space left, or no permission.
    """
    target = Path(os.path.abspath(target))
    _refuse_existing(target, force)
    with _writing_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target):
        _clear_leftovers(target)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with _writing_errors(target):
                partial.mkdir()
                yield partial
                _swap_in(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Writes a UTF-8 file beside its place and renames it into it.

    Raises:
        OutputError: no space left, or no permission.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with _writing_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Writes `value` as indented JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def _refuse_existing(target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not force:
        raise OutputExistsError(f"{target} exists; name another output or pass --force to replace it")
    if not target.is_dir() or not any((target / name).is_file() for name in ARTEFACT_FILES):
        raise OutputExistsError(
            f"{target} was not written by pifa-deploy; --force does not replace it, remove it first"
        )


def _swap_in(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
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
def _lock(target: Path) -> Iterator[None]:
    path = target.with_name(f".{target.name}.lock")
    with _writing_errors(target):
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputHeldError(
                f"{target} is being written by another process; wait for it or name another output"
            ) from None
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextmanager
def _writing_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another place"
        raise OutputError(
            f"{target} could not be written: {error.strerror}; {advice} and run the command again"
        ) from error
