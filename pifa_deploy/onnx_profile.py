"""ONNX Runtime's profile of an ONNX folder, told by the linear layers of the model.

ONNX Runtime puts the bodies of local functions into the graph before it optimises, and calls their nodes
"_inlfunc_PifaLinear_token_3_PifaLinear_y_p", which does not say whose call it was. So what is profiled is a copy of the
graph in which the bodies already stand, every node of a linear named "module#number": optimisations keep a node's name
or add to its end. The trace is described in https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from pifa_deploy.decoder_step import Step
from pifa_deploy.errors import InputRefusedError, MissingCapabilityError, StageFailedError
from pifa_deploy.linear_nodes import Launch, linear_nodes
from pifa_deploy.onnx_folder import OnnxFolder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner

_MARK = "#"
_NODE, _KERNEL, _RUN = "Node", "_kernel_time", "model_run"


def check_profilable(folder: OnnxFolder, device: str) -> None:
    """Checks that a profile would say something.

    Raises:
        MissingCapabilityError: on a GPU, where the trace states how long the host took to start a node.
        InputRefusedError: no initializer is the matrix of a linear layer.
    """
    if device != "cpu":
        raise MissingCapabilityError(
            "ONNX Runtime's profiler has no times of a GPU, and the layers of an ONNX folder were asked for; leave out "
            "--layers, or measure checkpoints or engines"
        )
    if not linear_nodes(folder.model):
        raise InputRefusedError(
            f"{folder.model_path}: no initializer is named after a linear layer, expected such as "
            "model.layers.0.mlp.up_proj.weight; export it with `pifa-deploy export`, or leave out --layers"
        )


def profile_onnx(folder: OnnxFolder, steps: Sequence[Step], *, threads: int, launches: int) -> list[list[Launch]]:
    """Runs each step on the CPU, in a session of its own that writes down every node.

    Args:
        folder: a validated ONNX folder.
        steps: what is run, each on a cache of drawn numbers.
        threads: as for the runner.
        launches: of each step.

    Returns:
        For each step, for each launch: (module, node) -> microseconds; "" is the module of what is in no linear.

    Raises:
        StageFailedError: the trace is not of these launches.
        As `OnnxRuntimeRunner`.
    """
    labelled, modules = labelled_graph(folder.model)
    with tempfile.TemporaryDirectory(prefix="pifa-profile-") as place:
        runner = OnnxRuntimeRunner(replace(folder, model=labelled), threads=threads, trace=str(Path(place) / "trace"))
        for step in steps:
            call = runner.timed(step)
            for _ in range(launches):
                call.launch()
        trace = Path(runner.session.end_profiling())
        events = json.loads(trace.read_text(encoding="utf-8"))
    found = launches_in_trace(events, modules)
    if len(found) != launches * len(steps):
        raise StageFailedError(
            f"{folder.model_path}: ONNX Runtime's trace has {len(found)} launches, expected {launches * len(steps)}; "
            "leave out --layers"
        )
    return [found[i : i + launches] for i in range(0, len(found), launches)]


def launches_in_trace(events: Iterable[Mapping[str, Any]], modules: Collection[str]) -> list[Launch]:
    """Returns for each launch of a trace, in order: (module, node) -> microseconds; "" is the module of other nodes.

    Args:
        events: what ONNX Runtime wrote: every node, and the runs that they lie in.
        modules: those of a labelled graph.
    """
    events = sorted(events, key=lambda event: event["ts"])
    ends = [event["ts"] + event["dur"] for event in events if event.get("name") == _RUN]
    found: list[Launch] = [defaultdict(float) for _ in ends]
    place = 0
    for event in events:
        if event.get("cat") != _NODE or not event["name"].endswith(_KERNEL):
            continue
        while place < len(ends) and event["ts"] > ends[place]:
            place += 1
        if place == len(ends):
            raise StageFailedError(f"ONNX Runtime's trace has {event['name']} outside of any run, expected inside")
        module = event["name"].partition(_MARK)[0]
        found[place][module if module in modules else "", event["name"]] += event["dur"]
    return [dict(launch) for launch in found]


def labelled_graph(model: onnx.ModelProto) -> tuple[onnx.ModelProto, frozenset[str]]:
    """Returns a copy with calls of linear layers replaced by their bodies and the nodes of linears named after them.

    The copy computes the same with the same weights, which stay in their files. Also returns the modules.
    """
    modules = linear_nodes(model)
    bodies = {(body.domain, body.name): body for body in model.functions}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    for i, node in enumerate(model.graph.node):
        body = bodies.get((node.domain, node.op_type)) if i in modules else None
        nodes = [node] if body is None else _body_of_call(node, body, prefix=f"{modules[i]}{_MARK}{i}.")
        copy.graph.node.extend(nodes)
        if i in modules:
            for k, each in enumerate(copy.graph.node[-len(nodes) :]):
                each.name = f"{modules[i]}{_MARK}{i}.{k}"
    return copy, frozenset(modules.values())


def _body_of_call(call: onnx.NodeProto, body: onnx.FunctionProto, *, prefix: str) -> list[onnx.NodeProto]:
    """Returns the nodes of a function with the names of a call's inputs and outputs, others behind a prefix."""
    names = {
        "": "",
        **dict(zip(body.input, call.input, strict=False)),
        **dict(zip(body.output, call.output, strict=True)),
    }
    nodes = []
    for node in body.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [names.get(name, f"{prefix}{name}") for name in node.input]
        copy.output[:] = [names.get(name, f"{prefix}{name}") for name in node.output]
        nodes.append(copy)
    return nodes
