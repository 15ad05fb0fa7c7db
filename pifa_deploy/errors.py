"""The exceptions of this package and the process exit codes they map to.

Wrong arguments raise `ValueError` or `TypeError`. Everything else that a user can cause derives from
`PifaDeployError`; the command line prints its message as one line and exits with its `exit_code`.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a `pifa-deploy` process says when it ends."""

    PASSED = 0
    GATE_FAILED = 1
    USAGE = 2
    NOT_DECIDED = 3
    STAGE_FAILED = 4
    MISFIT = 5
    INPUT_REFUSED = 6
    OUTPUT_HELD = 7
    INTERRUPTED = 130


def first_line(error: BaseException, limit: int = 300) -> str:
    """Returns an exception's type and the first line of its message, cut to `limit` characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:limit] if lines else type(error).__name__


class PifaDeployError(Exception):
    """Base of all errors of this package; the message says what was found, what was expected, what to do."""

    exit_code = ExitCode.STAGE_FAILED


class MissingCapabilityError(PifaDeployError):
    """This machine lacks a library, a device or a kernel, so nothing was decided."""

    exit_code = ExitCode.NOT_DECIDED


class StageFailedError(PifaDeployError):
    """A stage (compress, export, build) failed or its child process died."""

    exit_code = ExitCode.STAGE_FAILED


class FactorizationError(StageFailedError):
    """A matrix has no usable pivot factors."""


class ExportError(StageFailedError):
    """A model could not be turned into an ONNX folder."""


class BuildError(StageFailedError):
    """An engine could not be built."""


class OutputError(StageFailedError):
    """An output could not be written (no space, no permission)."""


class MisfitError(PifaDeployError):
    """A sound artefact that does not fit this machine or this version."""

    exit_code = ExitCode.MISFIT


class InputRefusedError(PifaDeployError):
    """An input file or folder is malformed or hostile."""

    exit_code = ExitCode.INPUT_REFUSED


class OutputExistsError(PifaDeployError):
    """The output folder exists and replacing it was not asked for."""

    exit_code = ExitCode.USAGE


class InputMissingError(PifaDeployError):
    """A named input does not exist."""

    exit_code = ExitCode.USAGE


class OutputHeldError(PifaDeployError):
    """Another process is writing the same output."""

    exit_code = ExitCode.OUTPUT_HELD
