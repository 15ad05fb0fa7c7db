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

    def __init__(self, step: Step, exit_code: int) -> None:
        """Takes the step and the exit code of its process, negative for a signal."""
        how = f"died of signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
        command = shlex.join(("pifa-deploy", *step.arguments))
        super().__init__(f"{step.title} {how}; its own message stands above, and this repeats it: {command}")
        known = exit_code in tuple(ExitCode)
        self.exit_code = ExitCode(exit_code) if known else ExitCode.STAGE_FAILED


def run_steps(file: PipelineFile, steps: Sequence[Step], *, force: bool, say: Callable[[str], None]) -> list[Outcome]:
    """Runs steps in the folder of the file, one process each; a step whose output stands for the same inputs is kept.

    Args:
        file: the pipeline.
        steps: as `steps_of` returns them.
        force: run every step again.
        say: told each command before it runs, and what is kept.

    Raises:
        InputMissingError: something that a step reads is neither there nor made by a step before.
        StepFailedError: a step failed; its exit code becomes this one's.
    """
    root = file.path.resolve().parent
    record = root / file.output / STEPS_FILE
    known = {} if force else _read_record(record)
    keys: dict[Path, str] = {}
    outcomes = []
    for step in steps:
        command = step.command(root)
        key = _key(root, step, command, keys)
        keys[step.output] = key
        before = known.get(str(step.output), {})
        kept = before.get("key") == key and (root / step.output).exists()
        if kept:
            say(f"kept {step.output}: {step.title}")
            outcomes.append(Outcome(step=step, exit_code=before["exit_code"], kept=True))
            continue
        say(shlex.join(("pifa-deploy", *command)))
        code = subprocess.run(
            [sys.executable, "-m", "pifa_deploy.cli.main", *command], cwd=root, stdin=subprocess.DEVNULL, check=False
        ).returncode
        if code not in (_JUDGED if step.judges else (ExitCode.PASSED,)):
            raise StepFailedError(step, code)
        outcomes.append(Outcome(step=step, exit_code=code, kept=False))
        known = {**known, str(step.output): {"key": key, "exit_code": code}}
        write_json(record, {"schema": _SCHEMA, "artefact": "steps", "steps": known})
    return outcomes


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


def _key(root: Path, step: Step, command: Sequence[str], keys: Mapping[Path, str]) -> str:
    """Returns a hash of a command and all that it reads; what an earlier step made is known by that step's hash."""
    places = [*step.needs, *(place for _, _, place in step.reads_too if (root / place).exists())]
    digest = hashlib.sha256(json.dumps(list(command)).encode())
    for place in places:
        if place not in keys and ":" not in str(place) and not (root / place).exists():
            raise InputMissingError(
                f"{place}: is not there, {step.title} needs it; make it, or bring the folder of --stage cpu here"
            )
        digest.update(f"{place}:{keys.get(place) or _stamp(root / place)}\n".encode())
    return digest.hexdigest()


def _stamp(place: Path) -> str:
    """Returns size and time of every file at a place."""
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    return ";".join(f"{path.name},{path.stat().st_size},{path.stat().st_mtime_ns}" for path in files if path.exists())
