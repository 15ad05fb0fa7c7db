"""The steps of a pipeline run, each in a process of its own, and what came of them."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pifa_deploy import __version__
from pifa_deploy.errors import ExitCode, InputMissingError, MissingCapabilityError, PifaDeployError
from pifa_deploy.output_folder import write_json
from pifa_deploy.pipeline_file import PipelineFile
from pifa_deploy.pipeline_steps import Step
from pifa_deploy.targets import local_gpus

STEPS_FILE = "steps.json"
_SCHEMA = 1
_JUDGED = (ExitCode.PASSED, ExitCode.GATE_FAILED, ExitCode.NOT_DECIDED)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a step: its exit code, and whether it was not run because its output was there already."""

    step: Step
    exit_code: int
    kept: bool


class StepFailedError(PifaDeployError):
    """A step that makes something did not."""

    def __init__(self, title: str, command: Sequence[str], exit_code: int) -> None:
        """Takes what the step does, its arguments, and the exit code of its process, negative for a signal."""
        how = f"died of signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
        again = shlex.join(("pifa-deploy", *command))
        super().__init__(
            f"{title} {how}; its own message stands above, and this repeats it in the folder of the file: {again}"
        )
        known = exit_code in tuple(ExitCode)
        self.exit_code = ExitCode(exit_code) if known else ExitCode.STAGE_FAILED


def run_steps(
    file: PipelineFile,
    steps: Sequence[Step],
    *,
    others: Sequence[Step] = (),
    force: bool = False,
    say: Callable[[str], None],
) -> list[Outcome]:
    """Runs steps in the folder of the file, one process each; a step whose output stands for the same inputs is kept.

    Args:
        file: the pipeline.
        steps: as `steps_of` returns them.
        others: those of the other stage: what they made earlier, and is up to date, may be read.
        force: run every step again.
        say: told each command before it runs, and what is kept.

    Raises:
        InputMissingError: something that a step reads is neither there nor made by a step before.
        StepFailedError: a step failed; its exit code becomes this one's.
    """
    root = file.path.resolve().parent
    record = root / file.output / STEPS_FILE
    known = _read_record(record)
    made = {step.output for step in (*steps, *others)}
    current = {step.output for step in others if _is_current(root, step, step.arguments, known)}
    outcomes = []

    def there(place: Path) -> bool:
        return (root / place).exists() and (place in current or place not in made)

    for step in steps:
        _check_needs(root, step)
        command = step.command(there)
        kept = not force and _is_current(root, step, command, known)
        code: int = known[str(step.output)]["exit_code"] if kept else ExitCode.PASSED
        if kept:
            say(f"kept {step.output}: {step.title}")
        else:
            say(shlex.join(("pifa-deploy", *command)))
            code = _run(root, step, command)
            entry = {"key": _key(root, step, command), "exit_code": code}
            known = {**known, str(step.output): entry}
            write_json(record, {"schema": _SCHEMA, "artefact": "steps", "steps": known})
        current.add(step.output)
        outcomes.append(Outcome(step=step, exit_code=code, kept=kept))
    return outcomes


def _run(root: Path, step: Step, command: Sequence[str]) -> int:
    """Returns the exit code of a step that did what it is for; what it prints goes to standard error."""
    if step.judges and (root / step.output).is_file():
        # A step that cannot decide writes nothing: an earlier result must not stand for this one.
        (root / step.output).unlink()
    process = [sys.executable, "-m", "pifa_deploy.cli.main", *command]
    code = subprocess.run(process, cwd=root, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False).returncode
    if code not in (_JUDGED if step.judges else (ExitCode.PASSED,)):
        raise StepFailedError(step.title, command, code)
    return code


def verdict(outcomes: Sequence[Outcome]) -> ExitCode:
    """Returns what a pipeline says: failed when a gate failed, else not decided when one was not, else passed."""
    codes = {outcome.exit_code for outcome in outcomes if outcome.step.judges}
    if not codes:
        return ExitCode.NOT_DECIDED
    return next((code for code in (ExitCode.GATE_FAILED, ExitCode.NOT_DECIDED) if code in codes), ExitCode.PASSED)


def require_gpu() -> None:
    """Raises MissingCapabilityError where the GPU stage cannot decide anything."""
    if not local_gpus():
        raise MissingCapabilityError(
            "this machine has no NVIDIA GPU, so the stage gpu decides nothing; run it on the target device, "
            "or --stage cpu here"
        )


def _read_record(path: Path) -> dict[str, Any]:
    """Returns output -> key and exit code of steps that ran; nothing where the record is not one of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict(found["steps"]) if found["schema"] == _SCHEMA else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _check_needs(root: Path, step: Step) -> None:
    for place in step.needs:
        if ":" not in str(place) and not (root / place).exists():
            raise InputMissingError(
                f"{place}: is not there, {step.title} needs it; make it, or bring the folder of --stage cpu here"
            )


def _is_current(root: Path, step: Step, command: Sequence[str], known: Mapping[str, Any]) -> bool:
    before = known.get(str(step.output), {})
    return (root / step.output).exists() and before.get("key") == _key(root, step, command)


def _key(root: Path, step: Step, command: Sequence[str]) -> str:
    """Returns a hash of this program's version, a command, and every file that it names, also behind a NAME=."""
    digest = hashlib.sha256(json.dumps([__version__, *command]).encode())
    for argument in command:
        for text in {argument, argument.partition("=")[2]} - {"", str(step.output)}:
            place = root / text
            if place.exists():
                digest.update(f"{text}:{_stamp(place)}\n".encode())
    return digest.hexdigest()


def _stamp(place: Path) -> str:
    """Returns size and time of every file at a place."""
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    return ";".join(f"{path.name},{path.stat().st_size},{path.stat().st_mtime_ns}" for path in files)
