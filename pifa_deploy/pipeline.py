"""The steps of a pipeline run, each in a process of its own, and what came of them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pifa_deploy.child_process import exit_status
from pifa_deploy.environment import Environment, this_environment
from pifa_deploy.errors import (
    ExitCode,
    InputMissingError,
    MissingCapabilityError,
    OutputError,
    OutputExistsError,
    PifaDeployError,
)
from pifa_deploy.output_folder import locked, writing_errors
from pifa_deploy.pipeline_file import PipelineFile
from pifa_deploy.pipeline_record import JUDGED, STEPS_FILE, StepRecord
from pifa_deploy.pipeline_report import REPORT
from pifa_deploy.pipeline_step import Step, within
from pifa_deploy.report import REPORT_JSON
from pifa_deploy.targets import local_gpus

# A step that is interrupted removes what it had half written.
_GRACE_S = 30.0
_LOCK = ".pifa-deploy.lock"
_NOT_CURRENT = ", which is not there or not up to date"
_LACKS = "this machine lacks something that it needs; its message is in the log"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a step.

    Attributes:
        step: the step.
        exit_code: of its process. An optional step that this machine lacks a library for has 3, and so has what would
            need its output.
        kept: whether it was not run because its output was there already.
        ungated: whether its result is figures that no gate asked about.
        undecided: why nothing that it wrote says what it did not decide, "" where that is not so.
    """

    step: Step
    exit_code: int
    kept: bool
    ungated: bool = False
    undecided: str = ""


class StepFailedError(PifaDeployError):
    """A step that makes something did not."""

    def __init__(self, title: str, command: Sequence[str], exit_code: int) -> None:
        """Takes what the step does, its arguments, and the exit code of its process, negative for a signal."""
        how = f"died of signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
        again = shlex.join(("pifa-deploy", *command))
        super().__init__(
            f"{title} {how}; its own message stands above, and this repeats it in the folder of the file: {again}"
        )
        # A gate that failed is a result; 1 of a step that has none is the interpreter's.
        known = exit_code in tuple(ExitCode) and exit_code != ExitCode.GATE_FAILED
        self.exit_code = ExitCode(exit_code) if known else ExitCode.STAGE_FAILED


def run_steps(
    file: PipelineFile,
    steps: Sequence[Step],
    *,
    others: Sequence[Step] = (),
    force: bool = False,
    say: Callable[[str], None],
    environment: Callable[[], Environment] = this_environment,
) -> list[Outcome]:
    """Runs steps in the folder of the file, one process each; a step whose output stands for the same inputs is kept.

    Args:
        file: the pipeline.
        steps: as `steps_of` returns them.
        others: those of the other stage: what they made earlier, there or here, is read while it is up to date; what
            needs one that is not is not decided.
        force: run every step again.
        say: told each command before it runs, what is kept and why not, and what of the other stage is not up to date.
        environment: tells of this machine.

    Raises:
        InputMissingError: something that a step reads is neither there nor made by a step before.
        StepFailedError: a step failed; its exit code becomes this one's.
    """
    root = file.path.resolve().parent
    _check_needs(root, steps, others)
    record = StepRecord(root, root / file.output / STEPS_FILE, environment)
    made = {step.output for step in (*steps, *others)}
    stale = _stale(root, record, others, lacking=(), say=say)
    current = {step.output for step in others} - stale
    lacking = set(stale)
    outcomes: list[Outcome] = []

    def there(place: Path) -> bool:
        return (root / place).exists() and (place in current or place not in made)

    for step in steps:
        if step.reports:
            # Steps above may have made again, or not at all, what results of the other stage are about.
            current -= _stale(root, record, others, lacking=lacking, say=say)
        missing = [place for place in step.needs if within(place, lacking)]
        if missing:
            reason = f"needs {min(missing)}{_NOT_CURRENT if within(min(missing), stale) else ''}"
            say(f"not decided {step.output}: {step.title} {reason}")
            outcomes.append(Outcome(step=step, exit_code=ExitCode.NOT_DECIDED, kept=False, undecided=reason))
        else:
            told = _undecided(step, there, outcomes) if step.reports else ()
            outcomes.append(_outcome(root, record, step, (*step.command(there), *told), force=force, say=say))
        unmade = missing or (step.optional and outcomes[-1].exit_code == ExitCode.NOT_DECIDED)
        (lacking if unmade else current).add(step.output)
    record.save()
    return outcomes


def _stale(
    root: Path,
    record: StepRecord,
    others: Sequence[Step],
    *,
    lacking: Collection[Path],
    say: Callable[[str], None],
) -> set[Path]:
    """Returns what the other stage made from anything else than it would now, besides what is known to be lacking."""
    stale: set[Path] = set()
    for step in others:
        if step.output in lacking:
            continue
        change = record.change(step, step.arguments, elsewhere=True)
        needs = (place for place in step.needs if within(place, {*stale, *lacking}))
        reason = change or next((f"{place} is not" for place in needs), None)
        if reason:
            stale.add(step.output)
            if (root / step.output).exists():
                say(f"not up to date {step.output}: {reason}")
    return stale


def _undecided(step: Step, there: Callable[[Path], bool], outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Returns arguments that tell a report what nothing else does."""
    told = [(outcome.step.title, outcome.undecided) for outcome in outcomes if outcome.undecided]
    told += [(gate.option.lstrip("-"), gate.otherwise) for gate in step.lacking(there)]
    return tuple(part for title, reason in told for part in ("--undecided", f"{title}={reason}"))


def _outcome(
    root: Path, record: StepRecord, step: Step, command: Sequence[str], *, force: bool, say: Callable[[str], None]
) -> Outcome:
    """Keeps or makes a step's output; what its process prints goes to standard error."""
    change = None if force or step.reports else record.change(step, command)
    if change is None and not (force or step.reports):
        say(f"kept {step.output}: {step.title}")
        code = record.exit_code(step)
        return Outcome(step=step, exit_code=code, kept=True, ungated=_ungated(root, step, code))
    if change and (root / step.output).exists():
        say(f"again {step.output}: {change}")
    say(shlex.join(("pifa-deploy", *command)))
    before = record.made_from(step, command)
    code = _run(root, step, command)
    lacks = code == ExitCode.NOT_DECIDED and (step.optional or not (root / step.output).exists())
    if not (lacks and step.optional):
        record.add(step, before, code)
    return Outcome(
        step=step,
        exit_code=code,
        kept=False,
        ungated=_ungated(root, step, code),
        undecided=_LACKS if lacks else "",
    )


def _ungated(root: Path, step: Step, code: int) -> bool:
    """Whether no gate asked about what a step found: a bench passes then, and a report is not decided."""
    if not step.judges or code != (ExitCode.NOT_DECIDED if step.reports else ExitCode.PASSED):
        return False
    place, gates = (step.output / REPORT_JSON, "gates") if step.reports else (step.output, "decisions")
    try:
        return not json.loads((root / place).read_text(encoding="utf-8"))[gates]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _run(root: Path, step: Step, command: Sequence[str]) -> int:
    """Returns the exit code of a step that did what it is for."""
    if step.judges and (root / step.output).is_file():
        # A step that cannot decide writes nothing: an earlier result must not stand for this one.
        (root / step.output).unlink()
    process = [sys.executable, "-m", "pifa_deploy.cli.step", *command]
    # A pifa_deploy.py in the folder of the file is not this program (Python 3.11 and later).
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    code = exit_status(process, cwd=root, env=environment, output=sys.stderr, grace_s=_GRACE_S)
    optional = (ExitCode.NOT_DECIDED,) if step.optional else ()
    # 1 is also what an interpreter ends with that never came to the command; a gate that failed leaves its result.
    died = code == ExitCode.GATE_FAILED and not (root / step.output).exists()
    if died or code not in (JUDGED if step.judges else (ExitCode.PASSED, *optional)):
        raise StepFailedError(step.title, command, code)
    return code


def verdict(outcomes: Sequence[Outcome]) -> ExitCode | None:
    """Returns what a pipeline says: failed when a gate failed, else not decided when one was not, else passed.

    None where nothing had a gate.
    """
    asked = [outcome for outcome in outcomes if not outcome.ungated]
    codes = {outcome.exit_code for outcome in asked if outcome.step.judges or outcome.exit_code}
    if not codes:
        return None
    return next((code for code in (ExitCode.GATE_FAILED, ExitCode.NOT_DECIDED) if code in codes), ExitCode.PASSED)


def require_gpu() -> None:
    """Raises MissingCapabilityError where the GPU stage cannot decide anything."""
    if not local_gpus():
        raise MissingCapabilityError(
            "this machine has no NVIDIA GPU, so the stage gpu decides nothing; run it on the target device, "
            "or --stage cpu here"
        )


def _check_needs(root: Path, steps: Sequence[Step], others: Sequence[Step]) -> None:
    """Raises InputMissingError for what a step needs that neither is there nor made by a step before.

    What an optional step of the other stage did not make is no error either.
    """
    made = {step.output for step in others if step.optional}
    for step in steps:
        for place in step.needs:
            if not within(place, made) and ":" not in str(place) and not (root / place).exists():
                raise InputMissingError(
                    f"{place}: is not there, {step.title} needs it; make it, or bring the folder of --stage cpu here"
                )
        made.add(step.output)


@contextmanager
def held_output(file: PipelineFile) -> Iterator[None]:
    """Makes the output folder and keeps other runs out of it; a folder that stays empty is removed.

    The steps of this run need no such lock: they have their own, each of what it makes.

    Raises:
        OutputHeldError: another run has it.
        OutputError: it cannot be written.
    """
    folder = Path(os.path.realpath(file.path.parent / file.output))
    with ExitStack() as held:
        try:
            if not folder.exists():
                with writing_errors(folder):
                    folder.mkdir(parents=True)
                held.callback(_remove_empty, folder)
            held.enter_context(locked(folder, folder / _LOCK))
        except OutputError as error:
            raise OutputError(f"{file.path}: [output] folder: {error}") from error
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def remove_report(file: PipelineFile) -> None:
    """Removes an earlier run's report: after a run that fails it would pass for the report of that run.

    Raises:
        OutputExistsError: what stands in its place is none.
    """
    place = Path(os.path.realpath(file.path.resolve().parent / file.output / REPORT))
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    if not (place / REPORT_JSON).is_file():
        raise OutputExistsError(f"{place} stands where the report goes and is none; remove it first")
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    place.rename(old)
    shutil.rmtree(old)
