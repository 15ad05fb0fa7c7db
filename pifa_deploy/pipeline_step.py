"""One step of a pipeline: a `pifa-deploy` command with what it reads and makes, and where variants are put."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from pifa_deploy.pipeline_file import BenchTable, PipelineFile, Table, Variant
from pifa_deploy.targets import RTX

# Parts of a machine that a result may be about; the others are modules, by their versions.
CPU, GPU, PLUGIN = "cpu", "gpu", "plugin"

# (command, table of options, where the table stands) -> arguments; raises InputRefusedError for a bad table.
Arguments = Callable[[str, Table, str], list[str]]


@dataclass(frozen=True, kw_only=True)
class OnlyWith:
    """Arguments of a gate about what one option gives.

    Attributes:
        option: without anything given by it the arguments are left out, and the gate is not decided.
        arguments: of the gate.
        otherwise: why it is not decided then.
    """

    option: str
    arguments: tuple[str, ...]
    otherwise: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command.

    Attributes:
        title: what it does, for people.
        arguments: of `pifa-deploy`.
        output: file or folder that it makes.
        needs: files and folders that it cannot do without.
        reads_too: (option, label or "", file or folder): given to the command where they are there and up to date.
        only_with: arguments that need something of `reads_too`.
        judges: whether it decides something: exit codes 1 and 3 are then results and the pipeline goes on.
        optional: whether exit code 3, this machine lacks a library for it, only leaves out what needs its output.
        reports: whether it is told what the steps before it could not decide; it is never kept.
        depends_on: what of a machine its result is about: CPU, GPU, PLUGIN and modules.
    """

    title: str
    arguments: tuple[str, ...]
    output: Path
    needs: tuple[Path, ...] = ()
    reads_too: tuple[tuple[str, str, Path], ...] = ()
    only_with: tuple[OnlyWith, ...] = ()
    judges: bool = False
    optional: bool = False
    reports: bool = False
    depends_on: tuple[str, ...] = ()

    def command(self, there: Callable[[Path], bool]) -> tuple[str, ...]:
        """Returns the arguments of `pifa-deploy`, with those of `reads_too` for which `there` holds."""
        found = [(flag, label, place) for flag, label, place in self.reads_too if there(place)]
        named = [(flag, f"{label}={place}" if label else str(place)) for flag, label, place in found]
        lacking = self.lacking(there)
        gates = [gate.arguments for gate in self.only_with if gate not in lacking]
        return (*self.arguments, *(part for given in (*named, *gates) for part in given))

    def lacking(self, there: Callable[[Path], bool]) -> tuple[OnlyWith, ...]:
        """Returns the gates about something for which `there` does not hold."""
        given = {flag for flag, _, place in self.reads_too if there(place)}
        return tuple(gate for gate in self.only_with if gate.option not in given)


def within(place: Path, places: Collection[Path]) -> bool:
    """Whether a path is one of several or lies below one."""
    return any(one in places for one in (place, *place.parents))


def place_of(file: PipelineFile, variant: str, artefact: str) -> Path:
    """Returns where a file or folder of a variant is made."""
    return file.output / variant / artefact


def checkpoint_of(file: PipelineFile, variant: Variant) -> Path:
    """Returns where the checkpoint of a variant is, made or given."""
    if variant.source == "dense":
        return Path(str(file.dense))
    return Path(variant.place) if variant.source == "checkpoint" else place_of(file, variant.name, "checkpoint")


def engines_of(file: PipelineFile, table: BenchTable) -> tuple[str, ...]:
    """Returns the contenders of a measurement that an engine is built of, in order."""
    built = {variant.name for variant in file.variants if variant.build is not None}
    return tuple(name for name in table.contenders if name in built)


def backend_of(variant: Variant) -> str:
    """Returns what a variant's engine is built with."""
    return str((variant.build or {}).get("backend", RTX))
