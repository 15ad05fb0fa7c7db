"""A pipeline file as steps, each one `pifa-deploy` command with what it reads and makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pifa_deploy.errors import InputRefusedError
from pifa_deploy.pipeline_file import BenchTable, PipelineFile, Table, TasksTable, Variant
from pifa_deploy.pipeline_report import report_step
from pifa_deploy.pipeline_step import CPU, GPU, PLUGIN, Arguments, Step, backend_of, checkpoint_of, engines_of, place_of
from pifa_deploy.targets import RTX

# Options of [verify] that have a meaning for the other artefact only.
_OF_THE_OTHER = {"onnx": ("plugin", "device"), "engine": ("source", "level", "bisect")}
_DEVICES = {"onnx": "cpu", "engine": "cuda"}
# Options of [bench.NAME] that ask about a GPU or its engines, or about a CPU, and figures that two machines do not have
# in common.
_OF_GPUS = ("target", "cuda-graph", "launch-us", "require-precision", "require-plugin", "require-sparse")
_OF_CPUS = ("measure-limits",)
_OF_ONE_MACHINE = ("bandwidth", "peak-tflops")


def steps_of(file: PipelineFile, stage: str, arguments: Arguments) -> list[Step]:
    """Returns the steps of a stage in order.

    "cpu" makes the checkpoints, exports, verifies in ONNX Runtime, builds what builds without a GPU, evaluates, solves
    tasks and measures on the CPU. "gpu" takes what "cpu" left: it builds engines that need this machine, verifies and
    measures them; a contender without [build] is measured in "cpu" only.

    Raises:
        InputRefusedError: a table of options has an unknown key or a value that the command does not take.
    """
    steps = [*(_cpu_steps if stage == "cpu" else _gpu_steps)(file, arguments)]
    return steps if file.report is None else [*steps, report_step(file, stage, arguments)]


def _cpu_steps(file: PipelineFile, arguments: Arguments) -> Iterator[Step]:
    for variant in file.variants:
        yield from _making(file, variant, arguments)
        if variant.export is None:
            continue
        yield _step(file, variant, "export", (checkpoint_of(file, variant),), arguments)
        if variant.verify is not None:
            yield _verify(file, variant, "onnx", arguments)
        if variant.build is not None and backend_of(variant) == RTX:
            yield _step(file, variant, "build", (place_of(file, variant.name, "onnx"),), arguments)
    if file.evaluate is not None:
        places = {variant.name: checkpoint_of(file, variant) for variant in file.variants}
        output = file.output / "evaluate.json"
        options = arguments("evaluate", file.evaluate, f"{file.path}: [evaluate]")
        yield Step(
            title="evaluate",
            arguments=("evaluate", *_labelled(places), *options, "--json", str(output)),
            output=output,
            needs=tuple(places.values()),
        )
    if file.tasks is not None:
        yield from _tasks(file, file.tasks, arguments)
    for table in file.bench:
        yield _measure(file, table, "onnx", arguments)


def _gpu_steps(file: PipelineFile, arguments: Arguments) -> Iterator[Step]:
    for variant in file.variants:
        if variant.build is None:
            continue
        if backend_of(variant) != RTX:
            yield _step(file, variant, "build", (place_of(file, variant.name, "onnx"),), arguments)
        if variant.verify is not None:
            yield _verify(file, variant, "engine", arguments)
    for table in file.bench:
        step = _measure(file, table, "engine", arguments)  # which refuses a mistake in the table in any case
        if engines_of(file, table):
            yield step


def _making(file: PipelineFile, variant: Variant, arguments: Arguments) -> Iterator[Step]:
    if variant.source in ("dense", "checkpoint"):
        return
    source = Path(str(file.dense) if variant.source == "compress" else variant.place)
    if variant.source == "relayout":
        source = checkpoint_of(file, next(other for other in file.variants if other.name == variant.place))
    output = place_of(file, variant.name, "checkpoint")
    options = arguments(variant.source, variant.options, f"{file.path}: [variants.{variant.name}]: {variant.source}")
    yield Step(
        title=f"{variant.source} {variant.name}",
        arguments=(variant.source, str(source), str(output), "--force", *options),
        output=output,
        needs=(source,),
    )


def _step(file: PipelineFile, variant: Variant, command: str, inputs: tuple[Path, ...], arguments: Arguments) -> Step:
    output = place_of(file, variant.name, {"export": "onnx", "build": "engine"}[command])
    table: Table = getattr(variant, command)
    options = arguments(command, table, f"{file.path}: [{command}] of {variant.name}")
    return Step(
        title=f"{command} {variant.name}",
        arguments=(command, *map(str, inputs), str(output), "--force", *options),
        output=output,
        needs=inputs,
        optional=command == "build",
        depends_on=_builder(variant) if command == "build" else (),
    )


def _verify(file: PipelineFile, variant: Variant, artefact: str, arguments: Arguments) -> Step:
    onnx, reference = place_of(file, variant.name, "onnx"), checkpoint_of(file, variant)
    engine = (place_of(file, variant.name, "engine"),) if artefact == "engine" else ()
    output = place_of(file, variant.name, f"verify-{artefact}.json")
    table = {key: value for key, value in (variant.verify or {}).items() if key not in _OF_THE_OTHER[artefact]}
    options = arguments("verify", table, f"{file.path}: [verify] of {variant.name}")
    asked = [part for place in engine for part in ("--engine", str(place))]
    source = (Path(str(table["source"])),) if "source" in table else ()
    return Step(
        title=f"verify {artefact} {variant.name}",
        arguments=("verify", str(onnx), "--reference", str(reference), *asked, *options, "--json", str(output)),
        output=output,
        needs=(onnx, reference, *engine, *source),
        judges=True,
        depends_on=_runtimes(artefact, [variant]),
    )


def _measure(file: PipelineFile, table: BenchTable, artefact: str, arguments: Arguments) -> Step:
    contenders = engines_of(file, table) if artefact == "engine" else table.contenders
    places = {name: place_of(file, name, artefact) for name in contenders}
    output = file.output / f"bench-{table.name}-{artefact}.json"
    where = f"{file.path}: [bench.{table.name}]"
    asked = _bench_options(table, artefact, where)
    options = arguments("bench", asked, where)
    first, named = table.contenders[0], _among(("baseline",), asked)
    if contenders and first not in contenders and _among(("gate-speed-up",), asked) and not named:
        raise InputRefusedError(
            f"{where}: gate-speed-up is against {first}, which has no engine; add [build] of it, name a baseline, or "
            f"give the gate in [bench.{table.name}.cpu]"
        )
    variants = [variant for variant in file.variants if variant.name in contenders]
    return Step(
        title=f"bench {table.name} {artefact}",
        arguments=("bench", *_labelled(places), "--device", _DEVICES[artefact], *options, "--json", str(output)),
        output=output,
        needs=tuple(places.values()),
        judges=True,
        depends_on=(*_runtimes(artefact, variants), CPU),
    )


def _bench_options(table: BenchTable, artefact: str, where: str) -> Table:
    """Returns what holds in one stage: the general options but those about GPUs, then those of the stage."""
    for key in _among(_OF_ONE_MACHINE, table.options):
        raise InputRefusedError(f"{where}: {key} is of one machine; give it in [bench.{table.name}.cpu] or .gpu")
    for key in _among(_OF_GPUS, table.cpu):
        raise InputRefusedError(f"{where}: {key} in .cpu is about a GPU; give it in [bench.{table.name}] or .gpu")
    for key in _among(_OF_CPUS, table.gpu):
        raise InputRefusedError(f"{where}: {key} in .gpu is about a CPU; give it in [bench.{table.name}] or .cpu")
    idle = _among(_OF_CPUS if artefact == "engine" else _OF_GPUS, table.options)
    general = {key: value for key, value in table.options.items() if key not in idle}
    return {**general, **(table.gpu if artefact == "engine" else table.cpu)}


def _among(names: tuple[str, ...], table: Table) -> list[str]:
    return [key for key in table if key.replace("_", "-") in names]


def _builder(variant: Variant) -> tuple[str, ...]:
    backend = backend_of(variant)
    plugin = (PLUGIN,) if (variant.build or {}).get("plugin") else ()
    return (backend.replace("-", "_"), *(() if backend == RTX else (GPU,)), *plugin)


def _runtimes(artefact: str, variants: Sequence[Variant]) -> tuple[str, ...]:
    if artefact == "onnx":
        return ("torch", "onnxruntime")
    backends = {backend_of(variant).replace("-", "_") for variant in variants}
    plugin = any((variant.build or {}).get("plugin") for variant in variants)
    return (*sorted(backends), GPU, *((PLUGIN,) if plugin else ()))


def _tasks(file: PipelineFile, table: TasksTable, arguments: Arguments) -> Iterator[Step]:
    where, places = f"{file.path}: [tasks]", {variant.name: checkpoint_of(file, variant) for variant in file.variants}
    solving, comparing = (arguments(command, table.options, where) for command in ("tasks", "compare-tasks"))
    for name in table.contenders:
        place = places[name] if table.artefact == "checkpoint" else place_of(file, name, "onnx")
        output = place_of(file, name, "tasks")
        yield Step(
            title=f"tasks {name}",
            arguments=("tasks", str(place), str(output), "--force", *solving),
            output=output,
            needs=(place,),
            optional=True,
        )
    reference, *others = (place_of(file, name, "tasks") for name in table.contenders)
    for candidate in others:
        output = candidate.with_suffix(".json")
        yield Step(
            title=f"compare-tasks {candidate.parent.name}",
            arguments=("compare-tasks", str(reference), str(candidate), *comparing, "--json", str(output)),
            output=output,
            needs=(reference, candidate),
            judges=True,
        )


def _labelled(places: Mapping[str, Path]) -> list[str]:
    return [f"{name}={place}" for name, place in places.items()]
