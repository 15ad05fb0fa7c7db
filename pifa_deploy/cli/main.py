"""Entry point: the group of commands, and errors as one line with the right exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from pifa_deploy import __version__
from pifa_deploy.cli.interruption import Interruptions, Terminated, interruptions_noticed
from pifa_deploy.errors import ExitCode, PifaDeployError

# A command's module is imported when the command is called: `--help` must not wait for torch.
_COMMANDS = {
    "doctor": ("look", "Say what is installed and what this machine can build and run."),
    "compress": ("make", "Factorise a dense model into a PIFA checkpoint."),
    "import": ("make", "Turn a research or low-rank checkpoint into a PIFA checkpoint."),
    "relayout": ("make", "Move the pivots of a PIFA checkpoint."),
    "inspect": ("look", "Show what a checkpoint, ONNX folder or engine holds."),
    "export": ("make", "Write a checkpoint as ONNX with PIFA nodes."),
    "build": ("make", "Build TensorRT engines from an ONNX folder."),
    "plugin": ("plugin", "Build the TensorRT plugin in CUDA, or describe it."),
    "verify": ("check", "Compare an ONNX folder with its PyTorch checkpoint."),
    "evaluate": ("check", "Perplexity of checkpoints on a text."),
    "tasks": ("compare", "Run tasks of lm-eval on a checkpoint or ONNX folder."),
    "compare-tasks": ("compare", "Compare two lm-eval runs, example by example."),
    "bench": ("bench", "Latency, memory and energy of contenders, side by side."),
    "report": ("report", "One report of all results: JSON, Markdown, JUnit, HTML."),
    "generate": ("generate", "Continue a prompt with an ONNX folder or an engine."),
    "advise": ("advise", "Bound what a GPU can gain, from its datasheet."),
    "ci": ("ci", "Run a whole pipeline file, with gates and a report."),
    "demo": ("demo", "Run the whole flow on a real model."),
}


class _LazyGroup(click.Group):
    """Lists its commands from a table and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"pifa_deploy.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pifa-deploy")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def cli(debug: bool) -> None:
    """From a low-rank-compressed language model in PyTorch to a checked TensorRT engine.

    Exit codes: 0 passed, 1 a gate failed, 2 usage, 3 this machine lacks something, 4 a stage failed,
    5 the artefact does not fit this machine, 6 the input was refused, 7 the output is held.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and ends the process with its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    code = run(arguments)
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # One of a torchrun that failed: at an ordinary exit NCCL may wait for processes that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Runs one command; returns its exit code."""
    debug = "--debug" in arguments
    # transformers announces optional image packages on every start; this program has no use for them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Other libraries draw their progress bars into log files too.
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # Signals are taken until the line is out: torchrun sends SIGTERM to a process that is telling what failed.
    with interruptions_noticed() as interruptions:
        return _run(list(arguments), interruptions, debug)


def _run(arguments: list[str], interruptions: Interruptions, debug: bool) -> int:
    try:
        with interruptions.raised():
            code: Any = cli.main(arguments, prog_name="pifa-deploy", standalone_mode=False)
        return int(code or 0)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "pifa-deploy"
        if type(error).__name__ == "NoArgsIsHelpError":  # no command at all; click before 8.2 has no such class
            error.show()
            return ExitCode.USAGE
        return _failed(f"{error.format_message()}; see {command} --help", ExitCode.USAGE, debug)
    except (KeyboardInterrupt, click.Abort) as stop:
        if isinstance(stop, Terminated):
            return _failed("terminated; what existed before is untouched", 128 + signal.SIGTERM, debug)
        return _failed("interrupted; what existed before is untouched", ExitCode.INTERRUPTED, debug)
    except PifaDeployError as error:
        return _failed(str(error), error.exit_code, debug)
    except (ValueError, TypeError, click.ClickException) as error:
        return _failed(str(error), ExitCode.USAGE, debug)
    except SystemExit:
        # click ends the process so, with status 1, when the reader of a pipe is gone; 1 is a failed gate here.
        return 128 + signal.SIGPIPE
    except Exception as error:
        return _failed(f"{type(error).__name__}: {error}", ExitCode.STAGE_FAILED, debug)


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    elif code == ExitCode.STAGE_FAILED:
        message += " (--debug shows the traceback)"
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


if __name__ == "__main__":
    main()
