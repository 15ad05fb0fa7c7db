"""A pipeline file as steps, each one `pifa-deploy` command with what it reads and makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pifa_deploy.compression.sparsity import PRUNING_METHODS
from pifa_deploy.pipeline_file import BenchTable, PipelineFile, Table, Variant
from pifa_deploy.targets import RTX

# Options of [verify] that have a meaning for the other artefact only.
_OF_THE_OTHER = {"onnx": ("plugin",), "engine": ("source", "level", "bisect")}
_DEVICES = {"onnx": "cpu", "engine": "cuda"}

# (command, table of options, where the table stands) -> arguments; raises InputRefusedError for a bad table.
Arguments = Callable[[str, Table, str], list[str]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command.

    Attributes:
        title: what it does, for people.
        arguments: of `pifa-deploy`.
        output: file or folder that it makes.
        needs: files and folders that it cannot do without.
        reads_too: (option, label or "", file or folder): given to the command where they are there and up to date.
        judges: whether it decides something: exit codes 1 and 3 are then results and the pipeline goes on.
    """

    title: str
    arguments: tuple[str, ...]
    output: Path
    needs: tuple[Path, ...] = ()
    reads_too: tuple[tuple[str, str, Path], ...] = ()
    judges: bool = False

    def command(self, there: Callable[[Path], bool]) -> tuple[str, ...]:
        """Returns the arguments of `pifa-deploy`, with those of `reads_too` for which `there` holds."""
        found = [(flag, label, place) for flag, label, place in self.reads_too if there(place)]
        named = [(flag, f"{label}={place}" if label else str(place)) for flag, label, place in found]
        return (*self.arguments, *(part for pair in named for part in pair))


def steps_of(file: PipelineFile, stage: str, arguments: Arguments) -> list[Step]:
    """Returns the steps of a stage in order.

    "cpu" makes the checkpoints, exports, verifies in ONNX Runtime, builds what builds without a GPU, evaluates and
    measures on the CPU. "gpu" takes what "cpu" left: it builds engines that need this machine, verifies and measures
    them.

    Raises:
        InputRefusedError: a table of options has an unknown key or a value that the command does not take.
    """
    return [*(_cpu_steps if stage == "cpu" else _gpu_steps)(file, arguments), *_report(file, arguments)]


def _cpu_steps(file: PipelineFile, arguments: Arguments) -> Iterator[Step]:
    for variant in file.variants:
        yield from _making(file, variant, arguments)
        if variant.export is None:
            continue
        yield _step(file, variant, "export", (_checkpoint(file, variant),), arguments)
        if variant.verify is not None:
            yield _verify(file, variant, "onnx", arguments)
        if variant.build is not None and _backend(variant) == RTX:
            yield _step(file, variant, "build", (_place(file, variant.name, "onnx"),), arguments)
    if file.evaluate is not None:
        places = {variant.name: _checkpoint(file, variant) for variant in file.variants}
        output = file.output / "evaluate.json"
        options = arguments("evaluate", file.evaluate, f"{file.path}: [evaluate]")
        yield Step(
            title="evaluate",
            arguments=("evaluate", *_labelled(places), *options, "--json", str(output)),
            output=output,
            needs=tuple(places.values()),
        )
    for table in file.bench:
        yield _measure(file, table, "onnx", arguments)


def _gpu_steps(file: PipelineFile, arguments: Arguments) -> Iterator[Step]:
    for variant in file.variants:
        if variant.build is None:
            continue
        if _backend(variant) != RTX:
            yield _step(file, variant, "build", (_place(file, variant.name, "onnx"),), arguments)
        if variant.verify is not None:
            yield _verify(file, variant, "engine", arguments)
    for table in file.bench:
        yield _measure(file, table, "engine", arguments)


def _making(file: PipelineFile, variant: Variant, arguments: Arguments) -> Iterator[Step]:
    if variant.source in ("dense", "checkpoint"):
        return
    source = Path(str(file.dense) if variant.source == "compress" else variant.place)
    if variant.source == "relayout":
        source = _checkpoint(file, next(other for other in file.variants if other.name == variant.place))
    output = _place(file, variant.name, "checkpoint")
    options = arguments(variant.source, variant.options, f"{file.path}: [variants.{variant.name}]: {variant.source}")
    yield Step(
        title=f"{variant.source} {variant.name}",
        arguments=(variant.source, str(source), str(output), "--force", *options),
        output=output,
        needs=(source,),
    )


def _step(file: PipelineFile, variant: Variant, command: str, inputs: tuple[Path, ...], arguments: Arguments) -> Step:
    output = _place(file, variant.name, {"export": "onnx", "build": "engine"}[command])
    table: Table = getattr(variant, command)
    options = arguments(command, table, f"{file.path}: [{command}] of {variant.name}")
    return Step(
        title=f"{command} {variant.name}",
        arguments=(command, *map(str, inputs), str(output), "--force", *options),
        output=output,
        needs=inputs,
    )


def _verify(file: PipelineFile, variant: Variant, artefact: str, arguments: Arguments) -> Step:
    onnx, reference = _place(file, variant.name, "onnx"), _checkpoint(file, variant)
    engine = (_place(file, variant.name, "engine"),) if artefact == "engine" else ()
    output = _place(file, variant.name, f"verify-{artefact}.json")
    table = {key: value for key, value in (variant.verify or {}).items() if key not in _OF_THE_OTHER[artefact]}
    options = arguments("verify", table, f"{file.path}: [verify] of {variant.name}")
    asked = [part for place in engine for part in ("--engine", str(place))]
    return Step(
        title=f"verify {artefact} {variant.name}",
        arguments=("verify", str(onnx), "--reference", str(reference), *asked, *options, "--json", str(output)),
        output=output,
        needs=(onnx, reference, *engine),
        judges=True,
    )


def _measure(file: PipelineFile, table: BenchTable, artefact: str, arguments: Arguments) -> Step:
    places = {name: _place(file, name, artefact) for name in table.contenders}
    output = file.output / f"bench-{table.name}-{artefact}.json"
    options = arguments("bench", table.options, f"{file.path}: [bench.{table.name}]")
    return Step(
        title=f"bench {table.name} {artefact}",
        arguments=("bench", *_labelled(places), "--device", _DEVICES[artefact], *options, "--json", str(output)),
        output=output,
        needs=tuple(places.values()),
        judges=True,
    )


def _report(file: PipelineFile, arguments: Arguments) -> Iterator[Step]:
    if file.report is None:
        return
    inputs: list[tuple[str, str, Path]] = []
    for variant in file.variants:
        name = variant.name
        if variant.verify is not None:
            inputs.append(("--verify", name, _place(file, name, "verify-onnx.json")))
        if variant.build is not None:
            inputs.append(("--engine", name, _place(file, name, "engine")))
            if variant.verify is not None:
                inputs.append(("--verify", f"{name} engine", _place(file, name, "verify-engine.json")))
        if _has_ranks(variant):
            inputs.append(("--checkpoint", name, _checkpoint(file, variant)))
    if file.evaluate is not None:
        inputs.append(("--evaluate", "", file.output / "evaluate.json"))
    for table in file.bench:
        for label, artefact in ((table.name, "onnx"), (f"{table.name} engines", "engine")):
            inputs.append(("--bench", label, file.output / f"bench-{table.name}-{artefact}.json"))
    output = file.output / "report"
    options = arguments("report", file.report, f"{file.path}: [report]")
    yield Step(
        title="report",
        arguments=("report", "--out", str(output), "--force", *options),
        output=output,
        reads_too=tuple(inputs),
        judges=True,
    )


def _labelled(places: Mapping[str, Path]) -> list[str]:
    return [f"{name}={place}" for name, place in places.items()]


def _has_ranks(variant: Variant) -> bool:
    return variant.source in ("import", "relayout") or (
        variant.source == "compress" and variant.options.get("method") not in PRUNING_METHODS
    )


def _place(file: PipelineFile, variant: str, artefact: str) -> Path:
    return file.output / variant / artefact


def _checkpoint(file: PipelineFile, variant: Variant) -> Path:
    if variant.source == "dense":
        return Path(str(file.dense))
    return Path(variant.place) if variant.source == "checkpoint" else _place(file, variant.name, "checkpoint")


def _backend(variant: Variant) -> str:
    return str((variant.build or {}).get("backend", RTX))
