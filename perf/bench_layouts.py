"""What the place of the pivots costs in ONNX Runtime on the CPU.

    perf/bench_layouts.py layers --json FILE            one linear, every way to write it down
    perf/bench_layouts.py models DENSE OTHER... --json FILE   whole models, ONNX folders from `pifa-deploy export`

One thread, contenders in turn, the median of the ratios to dense within a round. Every contender is first
compared with the float64 product of its own weights.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
import onnxruntime

from pifa_deploy import onnx_passes, op_spec
from pifa_deploy.density import low_rank_rank_for_density, rank_for_density
from pifa_deploy.latency import Timing, decode_call, prefill_call, side_by_side
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner

# SmolLM2-135M's linears, a 2048 x 2048 between them, and LLaMA-7B's.
SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096), (11008, 4096))
TOKENS = (1, 16, 128, 512)
# How the outputs of the row form can reach their places: the operator's body, and what was tried against it.
MOVES = ("low rank", "gather", "transpose-gather-transpose", "PifaLinear", "PifaOrderedLinear", "PifaColumnLinear")
OPERATORS = tuple(op_spec.FORMS)
Array = np.ndarray


class _Graph:
    """Nodes and weights of one linear layer."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[ir.Node] = []
        self.weights: dict[str, Array] = {}

    def weight(self, name: str, *shape: int) -> ir.Value:
        return self.constant(name, (self.random.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32))

    def constant(self, name: str, value: Array) -> ir.Value:
        self.weights[name] = value
        held = ir.Value(name=name, const_value=ir.tensor(value, name=name), type=ir.TensorType(ir.tensor(value).dtype))
        held.shape = ir.Shape(value.shape)
        return held

    def add(self, op_type: str, inputs: list[ir.Value], domain: str = "", **attributes: object) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain)  # type: ignore[arg-type]
        self.nodes.append(node)
        return node.outputs[0]

    def product(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        return self.add("MatMul", [x, self.add("Transpose", [weight], perm=[1, 0])])


def linear(kind: str, shape: tuple[int, int], density: float) -> tuple[onnxruntime.InferenceSession, Array]:
    """Returns a session that maps x [1, tokens, n] to y, and the float64 weight [m, n] that it must compute with."""
    (m, n), graph = shape, _Graph()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, "tokens", n]))
    r = min(low_rank_rank_for_density(m, n, density) if kind == "low rank" else rank_for_density(m, n, density), m, n)
    order = graph.random.permutation(m)
    if kind == "dense":
        y = graph.product(x, graph.weight("weight", m, n))
        exact = graph.weights["weight"].astype(np.float64)
    elif kind == "low rank":
        y = graph.product(graph.product(x, graph.weight("v", r, n)), graph.weight("u", m, r))
        exact = graph.weights["u"].astype(np.float64) @ graph.weights["v"]
    elif kind == "PifaColumnLinear":
        inputs = [x, graph.weight("pivot_weight", m, r), graph.weight("coefficients", r, n - r)]
        y = graph.add(kind, inputs, op_spec.DOMAIN, **op_spec.attributes(kind, rank=r, out_features=m))
        pivots = graph.weights["pivot_weight"].astype(np.float64)
        exact = np.concatenate([pivots, pivots @ graph.weights["coefficients"]], axis=1)
    else:
        pivot_weight, coefficients = graph.weight("pivot_weight", r, n), graph.weight("coefficients", m - r, r)
        pivots = graph.weights["pivot_weight"].astype(np.float64)
        exact = np.concatenate([pivots, graph.weights["coefficients"] @ pivots])
        if kind in OPERATORS:
            moves = [graph.constant("output_index", order.astype(np.int32))] if kind == op_spec.OP_TYPE else []
            attributes = op_spec.attributes(kind, rank=r, out_features=m)
            y = graph.add(kind, [x, pivot_weight, coefficients, *moves], op_spec.DOMAIN, **attributes)
            exact = exact[order] if moves else exact
        else:
            exact = exact[order]
            y = _gathered(graph, kind, graph.product(x, pivot_weight), coefficients, order)
    return _session(graph, x, y), exact


def _gathered(graph: _Graph, kind: str, y_p: ir.Value, coefficients: ir.Value, order: Array) -> ir.Value:
    """Emits y = concat(y_p, y_np)[..., order] with a Gather on the last axis, or on the first between transposes."""
    y = graph.add("Concat", [y_p, graph.product(y_p, coefficients)], axis=-1)
    index = graph.constant("order", order.astype(np.int64))
    if kind == "gather":
        return graph.add("Gather", [y, index], axis=-1)
    turned = graph.add("Transpose", [y], perm=[2, 0, 1])
    return graph.add("Transpose", [graph.add("Gather", [turned, index], axis=0)], perm=[1, 2, 0])


def _session(graph: _Graph, x: ir.Value, y: ir.Value) -> onnxruntime.InferenceSession:
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    constants = [value for node in graph.nodes for value in node.inputs if value is not None and value.const_value]
    opsets = {"": onnx_passes.OPSET, op_spec.DOMAIN: op_spec.OP_VERSION}
    body = ir.Graph(
        [x], [y], nodes=graph.nodes, initializers=list(dict.fromkeys(constants)), opset_imports=opsets, name="layer"
    )
    model = ir.Model(body, ir_version=10)
    onnx_passes.attach_function_bodies(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def bench_layer(shape: tuple[int, int], density: float, rounds: int) -> list[dict[str, object]]:
    made = {kind: linear(kind, shape, density) for kind in ("dense", *MOVES)}
    rows: list[dict[str, object]] = []
    for tokens in TOKENS:
        x = np.random.default_rng(tokens).standard_normal((1, tokens, shape[1])).astype(np.float32)
        calls: dict[str, Callable[[], object]] = {}
        for kind, (session, exact) in made.items():
            expected = x.astype(np.float64) @ exact.T
            error = np.linalg.norm(session.run(None, {"x": x})[0] - expected) / np.linalg.norm(expected)
            if not error < 1e-5:
                raise click.ClickException(f"{kind} of {shape}: relative error {error:.2e}")
            calls[kind] = lambda session=session, x=x: session.run(None, {"x": x})  # type: ignore[misc]
        times = side_by_side(calls, rounds=rounds)
        rows += [
            _row(kind, timing, shape=list(shape), tokens=tokens, density=density) for kind, timing in times.items()
        ]
        told = ", ".join(f"{kind} {timing.ratio:.2f}" for kind, timing in times.items())
        click.echo(f"{shape[0]} x {shape[1]}, {tokens} tokens: {told}")
    return rows


def _row(name: str, timing: Timing, **about: object) -> dict[str, object]:
    return {"name": name, **about, **{key: round(value, 4) for key, value in asdict(timing).items()}}


def _write(path: Path | None, rows: list[dict[str, object]]) -> None:
    if path:
        about = {"onnxruntime": onnxruntime.__version__, "machine": platform.machine(), "threads": 1}
        path.write_text(json.dumps({"schema": 1, **about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


@click.group()
def main() -> None:
    """Measure layouts in ONNX Runtime on the CPU."""


@main.command()
@click.option("--density", type=float, default=0.5, show_default=True)
@click.option("--rounds", type=int, default=31, show_default=True)
@click.option("--largest", type=int, default=11008, show_default=True, help="Leave out shapes above this.")
@click.option("--json", "path", type=click.Path(path_type=Path))
def layers(density: float, rounds: int, largest: int, path: Path | None) -> None:
    """One linear at a time."""
    rows = [row for shape in SHAPES if max(shape) <= largest for row in bench_layer(shape, density, rounds)]
    _write(path, rows)


@main.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", type=int, default=15, show_default=True)
@click.option("--tokens", "lengths", type=int, multiple=True, default=(128, 512), show_default=True)
@click.option("--past", type=int, default=128, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path))
def models(folders: tuple[Path, ...], rounds: int, lengths: tuple[int, ...], past: int, path: Path | None) -> None:
    """Whole models; the first is what ratios refer to."""
    runners = {folder.name: OnnxRuntimeRunner(open_folder(folder), threads=1) for folder in folders}
    cases = {f"prefill {length}": (prefill_call, length) for length in lengths}
    cases[f"decode at {past}"] = (decode_call, past)
    rows: list[dict[str, object]] = []
    for case, (call, size) in cases.items():
        times = side_by_side({name: call(runner, size) for name, runner in runners.items()}, rounds=rounds)
        rows += [_row(name, timing, case=case) for name, timing in times.items()]
        click.echo(f"{case}: " + ", ".join(f"{name} {timing.ratio:.3f}" for name, timing in times.items()))
    _write(path, rows)


if __name__ == "__main__":
    main()
