"""The command that measures latency: bench."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pifa_deploy.cli import console
from pifa_deploy.errors import ExitCode

if TYPE_CHECKING:
    from pifa_deploy.bench import BenchOptions
    from pifa_deploy.bench_report import BenchReport, Case, Decision, Row
    from pifa_deploy.layer_profile import LayerProfile
    from pifa_deploy.proof import ProofDecision

_GATE = "NAME=X such as pifa=1.2"
_PREFILL, _DECODE = (128, 512), (128,)
_CLOCK = ("warm_up_ms", "iterations", "duration_s", "rounds", "seed")
_NOT_CHOOSING = (
    *("decode", "batch", "cuda_graph", "baseline", "fixed", "gate_speed_up", "max_spread", "memory", "layers"),
    *("target", "bandwidth_gb_s", "peak_tflops", "launch_us", "measure_limits"),
    *("require_precision", "require_plugin", "require_sparse"),
)
_MODULES = {
    "torch": "torch",
    "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}


@click.command("bench")
@click.argument("places", nargs=-1, required=True, metavar="[NAME=]PLACE...")
@click.option("--prefill", multiple=True, type=int, help="Prompt length; may be repeated. 128 and 512.")
@click.option("--decode", multiple=True, type=int, help="Cache length at which a token is run; may be repeated. 128.")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="The GPU when there is one if left out.")
@click.option("--threads", type=int, help="CPU threads; as many as this process may use if left out.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Of checkpoints: fp32, on a GPU as stored.")
@click.option("--cuda-graph/--no-cuda-graph", default=False, show_default=True, help="Replay each step as a graph.")
@click.option("--warm-up", "warm_up_ms", type=float, default=200.0, show_default=True, help="Milliseconds.")
@click.option("--iterations", type=int, default=10, show_default=True, help="Timed launches at least.")
@click.option("--duration", "duration_s", type=float, default=3.0, show_default=True, help="Seconds at least.")
@click.option("--rounds", type=int, default=20, show_default=True, help="Turns that each contender has.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order within a round.")
@click.option("--baseline", help="Contender that speed-ups are relative to; the first one if left out.")
@click.option("--fixed", type=click.Choice(["density", "rank"]), help="What compressed contenders have in common.")
@click.option("--target", help="A GPU, such as orin-agx, whose datasheet bounds each measurement.")
@click.option("--bandwidth", "bandwidth_gb_s", type=float, help="GB/s to bound by, instead of the datasheet's.")
@click.option("--peak-tflops", type=float, help="Dense rate to bound by, instead of the datasheet's.")
@click.option("--launch-us", type=float, help="Cost of a kernel to bound by; assumed by GPU if left out.")
@click.option("--measure-limits", is_flag=True, help="Bound by what this CPU reaches by itself, measured first.")
@click.option("--gate-speed-up", multiple=True, metavar="NAME=X", help="Fail where the interval reaches below X.")
@click.option("--max-spread", type=float, help="Largest coefficient of variation, a gate beside others.")
@click.option("--require-precision", type=click.Choice(console.PRECISIONS), help="Widest of engines' matrix products.")
@click.option("--require-plugin", is_flag=True, help="Every PIFA module of an engine must be in a plugin layer.")
@click.option("--require-sparse", is_flag=True, help="An engine's build log must show that sparse kernels were picked.")
@click.option("--memory", is_flag=True, help="Measure each contender's memory in a process of its own.")
@click.option("--layers", is_flag=True, help="Profile each contender by linear layer, after the times.")
@click.option(
    "--choose",
    "plan",
    type=click.Path(path_type=Path),
    callback=console.writable,
    help="Instead: write a plan for export --plan here.",
)
@click.option(
    "--generated", type=int, default=128, show_default=True, help="--choose: tokens after the first --prefill."
)
@console.json_option
def bench_command(places: tuple[str, ...], json_path: Path | None, **flags: Any) -> int:
    """Time contenders side by side: prefill and decode apart, in rounds of random order.

    PLACE is a checkpoint (PyTorch), an ONNX folder (ONNX Runtime) or an engine folder (TensorRT). The first one is the
    baseline. Without a GPU everything runs on the CPU, and the first line says so. Exit code 1 when a gate fails, 3
    when a --require gate could not be decided and none failed.

    With --choose PLAN the factorised layers of one checkpoint are measured instead, each in every form it can take.
    """
    plan, generated = flags.pop("plan"), flags.pop("generated")
    named = console.named(places, lambda place: Path(place).name)
    if plan is not None:
        return _choose(named, plan, json_path, {**flags, "generated": generated})
    options = bench_options(flags)
    from pifa_deploy.bench import run_bench

    if flags["measure_limits"]:
        options = _with_limits(options)
    report = run_bench(named, options, console.stage)
    if console.result({**report.to_json(), "command": console.command_line()}, json_path):
        click.echo(_heading(report))
        for case in report.cases:
            click.echo(f"\n{case.size.label}\n{_table(report, case)}")
            for warning in case.to_json(report.gates.max_spread)["warnings"]:
                click.echo(f"warning: {warning}")
        if report.layers:
            _show_layers(report, report.layers)
    for decision in report.decisions:
        console.summary(_verdict(decision), json_path)
    if report.passed is None and report.decisions:
        return ExitCode.NOT_DECIDED
    return ExitCode.GATE_FAILED if report.passed is False else ExitCode.PASSED


def _verdict(decision: Decision | ProofDecision) -> str:
    value, limit = (each if isinstance(each, str) else f"{each:.4g}" for each in (decision.value, decision.limit))
    reason = getattr(decision, "reason", "")
    mark = console.MARKS[decision.passed]
    return f"{mark}: {decision.name} {value}, limit {limit}{f' ({reason})' if reason else ''}"


def _choose(named: dict[str, str], path: Path, json_path: Path | None, flags: dict[str, Any]) -> int:
    """Measures the layers of one checkpoint and writes their plan."""
    if len(named) != 1:
        raise ValueError(f"--choose takes one checkpoint and there are {len(named)}, expected exactly one")
    source = click.get_current_context().get_parameter_source
    idle = [name for name in _NOT_CHOOSING if source(name) is click.core.ParameterSource.COMMANDLINE]
    if idle:
        raise ValueError(
            f"--{idle[0].replace('_', '-')} has no meaning with --choose, which times layers; leave it out"
        )
    from pifa_deploy.layer_choice import ChoiceOptions, choose
    from pifa_deploy.layer_plan import write_plan
    from pifa_deploy.timed_contenders import RunOptions

    run = RunOptions(device=flags["device"], threads=flags["threads"])
    prefill: tuple[int, ...] = flags["prefill"] or (_PREFILL[-1],)
    given = {name: flags[name] for name in _CLOCK if source(name) is click.core.ParameterSource.COMMANDLINE}
    options = ChoiceOptions(
        dtype=flags["dtype"] or ("fp32" if run.chosen_device == "cpu" else "fp16"),
        prompt=prefill[0],
        generated=flags["generated"],
        tokens=prefill[1:],
        device=run.chosen_device,
        threads=run.chosen_threads,
        clock=replace(ChoiceOptions().clock, **given),
    )
    (place,) = named.values()
    with console.stage(f"choose forms for {place}"):
        found = choose(place, options)
    write_plan(path, found)
    console.result(found.to_json(), json_path)
    counts = ", ".join(f"{number} {form}" for form, number in found.counts().items())
    console.summary(f"{path}: {counts}, on {found.device} with {found.runtime}", json_path)
    return ExitCode.PASSED


def _with_limits(options: BenchOptions) -> BenchOptions:
    from pifa_deploy.cpu_limits import measured_bounds

    with console.stage("limits of this CPU"):
        return replace(options, bounds=measured_bounds(options.run.chosen_threads))


def bench_options(flags: dict[str, Any]) -> BenchOptions:
    """Returns what the command line asks for; --measure-limits is for the caller."""
    from pifa_deploy.targets import targets_named

    target = targets_named([flags["target"]], otherwise="")[0] if flags["target"] else None
    # torch and transformers take seconds to load: after the name has been found.
    from pifa_deploy.bench import BenchOptions
    from pifa_deploy.bench_report import BenchGates
    from pifa_deploy.contender_bounds import BoundOptions
    from pifa_deploy.latency import ClockOptions
    from pifa_deploy.proof import ProofGates
    from pifa_deploy.timed_contenders import RunOptions

    asked = bool(flags["prefill"] or flags["decode"])
    run = RunOptions(**{name: flags[name] for name in ("device", "threads", "cuda_graph", "dtype")})
    bounds = BoundOptions(
        target=target, **{name: flags[name] for name in ("bandwidth_gb_s", "peak_tflops", "launch_us")}
    )
    if flags["measure_limits"] and (bounds.asked or run.chosen_device != "cpu"):
        raise ValueError(
            "--measure-limits measures this CPU; leave it out with --device cuda and beside --target or --bandwidth"
        )
    return BenchOptions(
        prefill=flags["prefill"] if asked else _PREFILL,
        decode=flags["decode"] if asked else _DECODE,
        **{name: flags[name] for name in ("batch", "baseline", "fixed", "memory", "layers")},
        run=run,
        clock=ClockOptions(**{name: flags[name] for name in _CLOCK}),
        bounds=bounds,
        gates=BenchGates(
            speed_up=_gates(flags["gate_speed_up"]),
            max_spread=flags["max_spread"],
            proof=ProofGates(**{name: flags[f"require_{name}"] for name in ("precision", "plugin", "sparse")}),
        ),
    )


def _gates(given: tuple[str, ...]) -> dict[str, float]:
    """Returns name -> limit of NAME=X arguments."""
    found = {}
    for gate in given:
        name, limit = console.split_named(gate, "--gate-speed-up", _GATE)
        if name in found:
            raise ValueError(f"--gate-speed-up names {name!r} twice, expected one limit for each")
        try:
            found[name] = float(limit)
        except ValueError:
            raise ValueError(f"--gate-speed-up is {gate!r}, expected {_GATE}") from None
    return found


def _heading(report: BenchReport) -> str:
    machine, run = report.environment, report.options["run"]
    where = f"{machine.cpu}, {run['threads']} of {machine.cores} cores used"
    if run["device"] == "cpu":
        first = f"No GPU is used: everything below was measured on the CPU ({where})."
    else:
        gpu = machine.gpus[0]["name"] if machine.gpus else "a GPU"
        first = f"Measured on {gpu}, driver {machine.driver or 'unknown'} ({where})."
    runtimes = dict.fromkeys(_MODULES[one.runtime] for one in report.contenders)
    tools = ", ".join(f"{name} {machine.packages.get(name, 'unknown')}" for name in runtimes)
    mode = f"; power mode {machine.power_mode}" if machine.power_mode else ""
    fixed = f"; equal {report.fixed}" if report.fixed else ""
    return f"{first}\n{machine.machine}; {tools}{mode}; baseline {report.baseline}{fixed}"


def _table(report: BenchReport, case: Case) -> str:
    on_gpu = any(row.gpu_compute for row in case.rows)
    columns = ["contender", "kind", "median ms", "p99", "cv", "x baseline", "95% from", "to", "tokens/s", "weights MB"]
    columns += ["GPU ms", "enqueue ms", "J/token"] if on_gpu else []
    columns += ["peak MB"] if report.options["memory"] else []
    columns += ["bound ms", "bound %"] if any(row.bound_ms for row in case.rows) else []
    labels = {name: proof.sparsity.label for name, proof in report.proofs.items()}
    kinds = {one.name: f"{labels.get(one.name) or one.kind}, {one.runtime} {one.dtype}" for one in report.contenders}
    return console.table(columns, [[row.name, kinds[row.name], *_cells(report, row, columns)] for row in case.rows])


def _show_layers(report: BenchReport, profile: LayerProfile) -> None:
    """Shows where the time of each contender goes, case by case."""
    columns = ["contender", "linears", "linears ms", "rest ms", "rest"]
    for place, case in enumerate(report.cases):
        rows = []
        for name, times in profile.times.items():
            found = times[place]
            linears, rest = (round(us / 1e3, 3) for us in (found.linears_us, found.rest_us))
            rows.append([name, len(found.modules_us), linears, rest, f"{found.rest_share:.1%}"])
        click.echo(f"\nlayers, {case.size.label} (profiled)\n{console.table(columns, rows)}")
    for warning in profile.warnings:
        click.echo(f"warning: {warning}")


def _cells(report: BenchReport, row: Row, columns: list[str]) -> list[Any]:
    def shown(value: float | None, digits: int) -> float | None:
        return None if value is None else round(value, digits)

    memory, gain = report.memory[row.name], row.speed_up
    weights, peak = memory["weights_bytes"] or 0, memory["peak_bytes"]
    values = {
        "median ms": row.latency.median,
        "p99": row.latency.p99,
        "cv": shown(row.cv, 4),
        "x baseline": shown(gain.median, 3),
        "95% from": shown(gain.low, 3),
        "to": shown(gain.high, 3),
        "tokens/s": row.tokens_per_s,
        "weights MB": shown(weights / 1e6, 1),
        "GPU ms": row.gpu_compute.median if row.gpu_compute else None,
        "enqueue ms": row.enqueue.median if row.enqueue else None,
        "J/token": None if row.joules is None else row.joules / row.tokens,
        "peak MB": None if peak is None else shown(peak / 1e6, 1),
        "bound ms": row.bound_ms,
        "bound %": None if row.bound_fraction is None else shown(100 * row.bound_fraction, 1),
    }
    return [values[column] for column in columns[2:]]
