"""What the outputs of a pipeline were made from: steps.json beside them, which says whether they still stand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pifa_deploy import __version__
from pifa_deploy.digest import file_sha256
from pifa_deploy.environment import Environment, this_environment
from pifa_deploy.errors import ExitCode, InputMissingError, MissingCapabilityError
from pifa_deploy.output_folder import write_json
from pifa_deploy.pipeline_step import CPU, GPU, PLUGIN, Step
from pifa_deploy.plugin_library import find_library

STEPS_FILE = "steps.json"
JUDGED = (ExitCode.PASSED, ExitCode.GATE_FAILED, ExitCode.NOT_DECIDED)
_SCHEMA = 3
_PARTS = {"version": str, "command": list, "files": dict, "machine": dict, "result": str}

Made = Mapping[str, Any]


class StepRecord:
    """Output -> what it was made from: version of this program, command, files by content, parts of the machine.

    Times of files do not count, since an artefact store or a checkout does not keep them; they only save hashing a
    file again. That of the inode is among them, because `cp -p`, rsync and tar set the other one as they like.
    """

    def __init__(self, root: Path, path: Path, environment: Callable[[], Environment] = this_environment) -> None:
        """Reads a record; what is not as this program writes it is left out.

        Args:
            root: folder that commands run in.
            path: of steps.json, which need not be there.
            environment: tells of this machine; asked once, where a step depends on it.
        """
        self._root, self._path, self._environment = root, path, environment
        self._machine: Environment | None = None
        found = _read(path)
        self._steps: dict[str, Made] = {name: made for name, made in found["steps"].items() if _is_whole(made)}
        self._hashes: dict[str, Any] = found["hashes"]

    def exit_code(self, step: Step) -> int:
        """Returns that of the step which made the output."""
        code: int = self._steps[str(step.output)]["exit_code"]
        return code

    def made_from(self, step: Step, command: Sequence[str]) -> Made:
        """Returns what a command makes a step's output from, here and now."""
        texts = {text for argument in command for text in (argument, argument.partition("=")[2])}
        named = sorted(text for text in texts - {"", str(step.output)} if (self._root / text).exists())
        return {
            "version": __version__,
            "command": list(command),
            "files": {text: self._sha256(text) for text in named},
            "machine": {part: self._part(part) for part in step.depends_on},
        }

    def change(self, step: Step, command: Sequence[str], *, elsewhere: bool = False) -> str | None:
        """Returns why a step's output does not stand for a command, None where it does.

        Args:
            step: that made it.
            command: that would make it now.
            elsewhere: it was made on another machine: this one's parts do not count, nor files that are not here.
        """
        before = self._steps.get(str(step.output))
        if before is None or not (self._root / step.output).exists():
            return "nothing says what it was made from" if before is None else "it is gone"
        if before["result"] != self._result(step):
            return "it is not as it was written"
        now = self.made_from(step, command)
        if before["version"] != now["version"]:
            return f"pifa-deploy {before['version']} made it, this is {now['version']}"
        if before["command"] != now["command"]:
            return "another command made it"
        missing = () if elsewhere else before["files"].keys() - now["files"].keys()
        others = {name for name, found in now["files"].items() if before["files"].get(name) != found}
        for name in sorted({*others, *missing}):
            return f"{name} is another" if name in others else f"{name} is gone"
        parts = {} if elsewhere else now["machine"]
        differences = (_difference(before, part, found) for part, found in parts.items())
        return next((difference for difference in differences if difference), None)

    def add(self, step: Step, made: Made, exit_code: int) -> None:
        """Notes what an output was made from."""
        self._steps[str(step.output)] = {**made, "result": self._result(step), "exit_code": int(exit_code)}
        self.save()

    def save(self) -> None:
        """Writes steps.json."""
        known = {text: found for text, found in self._hashes.items() if (self._root / text).exists()}
        content = {"schema": _SCHEMA, "artefact": "steps", "steps": self._steps, "hashes": known}
        write_json(self._path, content)

    def _result(self, step: Step) -> str:
        """Returns the hash of an output that is one file, "" for a folder, which those that read it check."""
        return self._file_sha256(str(step.output)) if (self._root / step.output).is_file() else ""

    def _sha256(self, text: str) -> str:
        place = self._root / text
        if not place.is_dir():
            return self._file_sha256(text)
        digest = hashlib.sha256()
        # A folder around the output folder would be another with each step, steps.json among the rest.
        folder, made = place.resolve(), self._path.parent.resolve()
        left_out = made.relative_to(folder) if folder in made.parents else None
        files = (path.relative_to(place) for path in place.rglob("*") if path.is_file())
        counted = (file for file in files if left_out not in file.parents and not any(map(_is_aside, file.parts)))
        for file in sorted(path.as_posix() for path in counted):
            digest.update(f"{file}:{self._file_sha256(f'{text}/{file}')}\n".encode())
        return digest.hexdigest()

    def _file_sha256(self, text: str) -> str:
        path = self._root / text
        found = path.stat()
        stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        known = self._hashes.get(text)
        if not isinstance(known, list) or known[:-1] != stamp:
            known = self._hashes[text] = [*stamp, file_sha256(path)]
        return str(known[-1])

    def _part(self, name: str) -> str:
        machine = self._machine = self._machine or self._environment()
        if name == CPU:
            mode = f", power mode {machine.power_mode}" if machine.power_mode else ""
            return f"{machine.cpu}, {machine.usable_cores} cores{mode}"
        if name == GPU:
            return ", ".join(f"{gpu['name']} with driver {gpu['driver']}" for gpu in machine.gpus) or "no GPU"
        if name == PLUGIN:
            return _library()
        return machine.packages.get(name, "not installed")


def _is_aside(name: str) -> bool:
    """Whether a name is not of an artefact: what download programs note beside a model, and Python beside its code."""
    return name.startswith(".") or name == "__pycache__"


def _library() -> str:
    """Returns the hash of the plugin library that an engine finds by itself."""
    try:
        return file_sha256(find_library())
    except (InputMissingError, MissingCapabilityError):
        return "no library"


def _difference(before: Made, part: str, found: str) -> str | None:
    was = before["machine"].get(part, "unknown")
    return None if was == found else f"{part} was {was}, is {found}"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] == _SCHEMA:
            return {name: dict(found[name]) for name in ("steps", "hashes")}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {"steps": {}, "hashes": {}}


def _is_whole(made: object) -> bool:
    return (
        isinstance(made, dict)
        and all(isinstance(made.get(name), kind) for name, kind in _PARTS.items())
        and made.get("exit_code") in JUDGED
    )
