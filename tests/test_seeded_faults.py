"""Faults put into the graph or the weights of a real export: each fails, at a level and in a layer that are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from decoder_fixtures import edited, letters

from pifa_deploy import onnx_passes
from pifa_deploy.factorization import factors_from_weight
from pifa_deploy.verification import VerifyOptions, verify_folder

pytest_plugins = ("parity_fixtures",)

LAYER = "model.layers.1"
SMALL = {"prefill_lengths": (9, 30), "padded_lengths": (5, 16, 11), "decode_prompt": 12, "decode_steps": 8}
# Enough for shares of a percent: fp16 may decide a near tie otherwise.
POSITIONS = {"positions": 700, "window": 250}
# Long sequences of four steps, so that a fault may hide behind a long cache.
LONG = {"positions": 240, "window": 30, "context": 120}
TOKENS = 1200


@pytest.fixture(scope="module")
def checkpoint(parity_checkpoint: Path) -> Path:
    return parity_checkpoint


@pytest.fixture(scope="module")
def exported(parity_export: Any) -> Any:
    return parity_export


def options_for(folder: Path, *, seed: int = 0, **changes: Any) -> VerifyOptions:
    text = folder / f"text {seed}.txt"
    text.write_text(letters(TOKENS, seed))
    return VerifyOptions(text=(text,), **(SMALL | POSITIONS | changes))


def values(model: ir.Model, name: str, change: Callable[[np.ndarray], Any]) -> None:
    """Changes the numbers of one initializer; what `change` returns takes its place."""
    initializer = model.graph.initializers[name]
    array = initializer.const_value.numpy().copy()
    changed = change(array)
    initializer.const_value = ir.tensor(array if changed is None else np.ascontiguousarray(changed), name=name)


def node_named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def exchange_q_and_k(model: ir.Model) -> None:
    q, k = node_named(model, f"{LAYER}.self_attn.q_proj"), node_named(model, f"{LAYER}.self_attn.k_proj")
    for i in range(1, 4):
        inputs = q.inputs[i], k.inputs[i]
        q.replace_input_with(i, inputs[1])
        k.replace_input_with(i, inputs[0])


def exchange_outputs_of_gate_and_up(model: ir.Model) -> None:
    """Both are of the right layer and right by themselves; what reads them takes the other."""
    gate, up = (node_named(model, f"{LAYER}.mlp.{name}_proj").outputs[0] for name in ("gate", "up"))
    readers = [(list(value.uses()), other) for value, other in ((gate, up), (up, gate))]
    for uses, other in readers:
        for node, i in uses:
            node.replace_input_with(i, other)


def weights_of_another_layer(model: ir.Model) -> None:
    for part in ("pivot_weight", "coefficients"):
        name = f"mlp.down_proj.{part}"
        model.graph.initializers[f"{LAYER}.{name}"].const_value = ir.tensor(
            model.graph.initializers[f"model.layers.0.{name}"].const_value.numpy(), name=f"{LAYER}.{name}"
        )


def rank_one_too_small(model: ir.Model) -> None:
    path = f"{LAYER}.mlp.up_proj"
    node = node_named(model, path)
    pivots, coefficients, index = (value.const_value.numpy() for value in node.inputs[1:4])
    weight = np.concatenate([pivots, coefficients.astype(np.float64) @ pivots])[index]
    rank = len(pivots) - 1
    u, s, v = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    factors = factors_from_weight(torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank]), rank, dtype=torch.float64)
    pivot_rows = factors.pivot_rows.tolist()
    order = np.argsort(pivot_rows + sorted(set(range(len(weight))) - set(pivot_rows)))
    for name, array in (("pivot_weight", factors.pivot_weight.numpy()), ("coefficients", factors.coefficients.numpy())):
        values(model, f"{path}.{name}", lambda old, new=array: new.astype(old.dtype))
        model.graph.initializers[f"{path}.{name}"].shape = ir.Shape(array.shape)
    values(model, f"{path}.output_index", lambda old: order.astype(old.dtype))
    node.attributes["rank"] = ir.AttrInt64("rank", rank)


def pivot_rows_of_another_seed(model: ir.Model) -> None:
    values(
        model,
        f"{LAYER}.mlp.gate_proj.pivot_weight",
        lambda old: np.random.default_rng(9).normal(size=old.shape, scale=old.std()).astype(old.dtype),
    )


def sums_in_fp16(model: ir.Model) -> None:
    """The operator's body in split-K form: eight products whose sum is rounded to fp16 each time."""
    bodies = {key: function for key, function in model.functions.items() if key[1] == "PifaLinear"}
    ((key, found),) = bodies.items()
    body = onnx_passes._Body("PifaLinear", bias=len(found.inputs) == 5)
    x, weight, parts = body.inputs["x"], body.inputs["pivot_weight"], 8
    wide = [
        body.emit("Cast", f"wide_{name}", [value], to=int(ir.DataType.FLOAT))
        for name, value in (("x", x), ("w", weight))
    ]
    left = ir.node("Split", [wide[0]], attributes={"axis": -1, "num_outputs": parts}, num_outputs=parts)
    right = ir.node("Split", [wide[1]], attributes={"axis": 1, "num_outputs": parts}, num_outputs=parts)
    body.nodes += [left, right]
    total = None
    for i in range(parts):
        turned = body.emit("Transpose", f"turned_{i}", [right.outputs[i]], perm=[1, 0])
        product = body.emit("MatMul", f"product_{i}", [left.outputs[i], turned])
        total = product if total is None else body.emit("Add", f"sum_{i}", [total, product])
        half = body.emit("Cast", f"half_{i}", [total], to=int(ir.DataType.FLOAT16))
        total = body.emit("Cast", f"wide_{i}", [half], to=int(ir.DataType.FLOAT))
    total = body.emit("CastLike", "y_p", [total, x])
    y_np = body.product("y_np", total, body.inputs["coefficients"])
    y = body.emit("Concat", "y_cat", [total, y_np], axis=-1)
    y = body.emit("Gather", "y_moved", [y, body.inputs["output_index"]], axis=-1)
    y.name = "y"
    graph = ir.Graph(list(body.inputs.values()), [y], nodes=body.nodes, opset_imports={"": onnx_passes.OPSET})
    model.functions[key] = ir.Function(key[0], key[1], graph=graph, attributes=list(found.attributes.values()))


def permutation_off_by_one(model: ir.Model) -> None:
    values(model, f"{LAYER}.mlp.down_proj.output_index", lambda index: np.roll(index, 1))


def drop_a_bias(model: ir.Model) -> None:
    bias = model.graph.initializers[f"{LAYER}.self_attn.q_proj.bias"]
    (add,) = bias.consumers()
    product = next(value for value in add.inputs if value is not bias)
    ir.convenience.replace_all_uses_with(add.outputs[0], product)
    model.graph.remove(add, safe=True)


def turn_square_coefficients(model: ir.Model) -> None:
    values(model, f"{LAYER}.self_attn.o_proj.coefficients", lambda array: array.T)


def zero_one_coefficient_row(model: ir.Model) -> None:
    values(model, f"{LAYER}.self_attn.v_proj.coefficients", lambda array: array[2].fill(0))


def flip_one_bit_of_a_scale(model: ir.Model) -> None:
    """The lowest bit of the exponent of one coefficient: twice or half of it."""

    def change(array: np.ndarray) -> None:
        bits = array.view(np.uint16 if array.itemsize == 2 else np.uint32)
        bits[3, 2] ^= 1 << (10 if array.itemsize == 2 else 23)

    values(model, f"{LAYER}.mlp.gate_proj.coefficients", change)


def wrong_head(model: ir.Model) -> None:
    """The embedding stands where the head has a matrix of its own."""
    model.graph.initializers["lm_head.weight"].const_value = ir.tensor(
        model.graph.initializers["model.embed_tokens.weight"].const_value.numpy(), name="lm_head.weight"
    )


def norm_epsilon(model: ir.Model) -> None:
    node = next(
        node
        for node in model.graph
        if node.op_type == "Add"
        and node.inputs[0].producer() is not None
        and node.inputs[0].producer().op_type == "ReduceMean"
    )
    values(model, node.inputs[1].name, lambda array: array + np.float32(1e-2))


def tanh_for_sigmoid(model: ir.Model) -> None:
    (old,) = [node for node in model.graph if node.op_type == "Sigmoid"][1:]
    new = ir.node("Tanh", [old.inputs[0]])
    ir.convenience.replace_nodes_and_values(model.graph, old, [old], [new], [old.outputs[0]], [new.outputs[0]])


def constant(model: ir.Model, name: str, numbers: Any) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, dtype=np.int64), name=name))
    model.graph.register_initializer(value)
    return value


def decode_one_position_late(model: ir.Model) -> None:
    """With a past, tokens get the position of the one before them."""
    positions = next(value for value in model.graph.inputs if value.name == "position_ids")
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    readers = list(positions.uses())
    length = ir.node("Shape", [past], attributes={"start": 2, "end": 3})
    step = ir.node("Min", [length.outputs[0], constant(model, "fault_one", [1])])
    late = ir.node("Sub", [positions, step.outputs[0]])
    for node, i in readers:
        node.replace_input_with(i, late.outputs[0])
    model.graph.insert_before(model.graph[0], [length, step, late])


def graph_input(model: ir.Model, name: str) -> ir.Value:
    return next(value for value in model.graph.inputs if value.name == name)


def sizes(model: ir.Model) -> tuple[ir.Node, ir.Node]:
    """Returns nodes that give the number of cached positions and of new tokens, each int64 [1]."""
    past = ir.node("Shape", [graph_input(model, "past_key_values.0.key")], attributes={"start": 2, "end": 3})
    return past, ir.node("Shape", [graph_input(model, "input_ids")], attributes={"start": 1, "end": 2})


def positions_become(model: ir.Model, nodes: list[ir.Node]) -> None:
    """Puts what the last node makes in the place of the position ids; the nodes may read them."""
    positions = graph_input(model, "position_ids")
    readers = [(node, i) for node, i in positions.uses() if node not in nodes]
    for node, i in readers:
        node.replace_input_with(i, nodes[-1].outputs[0])
    model.graph.insert_before(model.graph[0], nodes)


def chunk_one_position_late(model: ir.Model) -> None:
    """Several tokens behind a cache get the positions of those before them; single tokens do not."""
    one, (past, new) = constant(model, "fault_one", [1]), sizes(model)
    cached = ir.node("Min", [past.outputs[0], one])
    more = ir.node("Sub", [new.outputs[0], one])
    several = ir.node("Min", [more.outputs[0], one])
    both = ir.node("Mul", [cached.outputs[0], several.outputs[0]])
    late = ir.node("Sub", [graph_input(model, "position_ids"), both.outputs[0]])
    positions_become(model, [past, new, cached, more, several, both, late])


def late_behind_a_long_cache(model: ir.Model) -> None:
    past, _ = sizes(model)
    reached = ir.node("GreaterOrEqual", [past.outputs[0], constant(model, "fault_reach", [85])])
    step = ir.node("Cast", [reached.outputs[0]], attributes={"to": int(ir.DataType.INT64)})
    late = ir.node("Sub", [graph_input(model, "position_ids"), step.outputs[0]])
    positions_become(model, [past, reached, step, late])


def positions_stop_growing(model: ir.Model) -> None:
    stop = constant(model, "fault_stop", 70)
    positions_become(model, [ir.node("Min", [graph_input(model, "position_ids"), stop])])


def chunk_is_not_causal(model: ir.Model) -> None:
    """Tokens of one step behind a cache see each other in both directions."""
    (order,) = [node for node in model.graph if node.op_type == "LessOrEqual"]
    past, _ = sizes(model)
    far = ir.node("Mul", [past.outputs[0], constant(model, "fault_far", [100_000])])
    early = ir.node("Sub", [order.inputs[0], far.outputs[0]])
    model.graph.insert_before(order, [past, far, early])
    order.replace_input_with(0, early.outputs[0])


def only_the_newest_keys_are_seen(model: ir.Model) -> None:
    (order,) = [node for node in model.graph if node.op_type == "LessOrEqual"]
    shifted = ir.node("Add", [order.inputs[0], constant(model, "fault_window", 80)])
    near = ir.node("Greater", [shifted.outputs[0], order.inputs[1]])
    both = ir.node("And", [order.outputs[0], near.outputs[0]])
    for node, i in [(node, i) for node, i in order.outputs[0].uses() if node is not both]:
        node.replace_input_with(i, both.outputs[0])
    model.graph.insert_after(order, [shifted, near, both])


def padding_is_seen_behind_a_cache(model: ir.Model) -> None:
    mask, (past, _) = graph_input(model, "attention_mask"), sizes(model)
    readers = [(node, i) for node, i in mask.uses() if node.op_type != "Shape"]
    cached = ir.node("Min", [past.outputs[0], constant(model, "fault_one", [1])])
    ones = ir.node("Max", [mask, cached.outputs[0]])
    for node, i in readers:
        node.replace_input_with(i, ones.outputs[0])
    model.graph.insert_before(model.graph[0], [past, cached, ones])


def rows_read_the_cache_of_the_first(model: ir.Model) -> None:
    start, stop = (constant(model, f"fault_{i}", [i]) for i in (0, 1))
    for part in ("key", "value"):
        past = graph_input(model, f"past_key_values.0.{part}")
        readers = [(node, i) for node, i in past.uses() if node.op_type == "Concat"]
        first = ir.node("Slice", [past, start, stop, start])
        shape = ir.node("Shape", [past])
        rows = ir.node("Expand", [first.outputs[0], shape.outputs[0]])
        for node, i in readers:
            node.replace_input_with(i, rows.outputs[0])
        model.graph.insert_before(model.graph[0], [first, shape, rows])


def padding_is_seen(model: ir.Model) -> None:
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    readers = [(node, i) for node, i in mask.uses() if node.op_type != "Shape"]
    ones = ir.node("Max", [mask, constant(model, "fault_one", [1])])
    for node, i in readers:
        node.replace_input_with(i, ones.outputs[0])
    model.graph.insert_before(model.graph[0], [ones])


def newest_token_is_not_seen(model: ir.Model) -> None:
    (old,) = [node for node in model.graph if node.op_type == "LessOrEqual"]
    new = ir.node("Less", list(old.inputs))
    ir.convenience.replace_nodes_and_values(model.graph, old, [old], [new], [old.outputs[0]], [new.outputs[0]])


def in_place_of(model: ir.Model, name: str, make: Callable[[ir.Value], list[ir.Node]]) -> None:
    """Hands on, under the name of a grown cache, what `make` turns it into."""
    fresh = next(value for value in model.graph.outputs if value.name == name)
    fresh.name = "fault_fresh"
    nodes = make(fresh)
    stale = nodes[-1].outputs[0]
    stale.name, stale.type, stale.shape = name, fresh.type, fresh.shape
    model.graph.extend(nodes)
    model.graph.outputs[list(model.graph.outputs).index(fresh)] = stale


def cache_repeats_its_oldest_position(model: ir.Model) -> None:
    """The values handed on have the oldest position in place of the newest."""

    def make(fresh: ir.Value) -> list[ir.Node]:
        bounds = [constant(model, f"fault_{i}", [number]) for i, number in enumerate((0, -1, 2, 0, 1))]
        kept = ir.node("Slice", [fresh, bounds[0], bounds[1], bounds[2]])
        oldest = ir.node("Slice", [fresh, bounds[3], bounds[4], bounds[2]])
        return [kept, oldest, ir.node("Concat", [kept.outputs[0], oldest.outputs[0]], attributes={"axis": 2})]

    in_place_of(model, "present.0.value", make)


def caches_of_two_layers_exchanged(model: ir.Model) -> None:
    names = ("present.0.key", "present.1.key")
    first, second = (next(value for value in model.graph.outputs if value.name == name) for name in names)
    for name, value in (("fault_0", first), ("fault_1", second)):
        value.name = name
    for name, value in zip(names, (second, first), strict=True):
        handed = ir.node("Identity", [value])
        handed.outputs[0].name, handed.outputs[0].type, handed.outputs[0].shape = name, value.type, value.shape
        model.graph.append(handed)
    made = [next(node for node in model.graph if node.outputs[0].name == name).outputs[0] for name in names]
    outputs = list(model.graph.outputs)
    for i, value in enumerate(outputs):
        if value in (first, second):
            model.graph.outputs[i] = made[0 if value is first else 1]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What must be found: the gates that fail at least, what the bisection names, and the dtype it is seeded in."""

    edit: Callable[[ir.Model], None]
    gates: tuple[str, ...]
    bad: str
    flag: str = "fp16"


KIND, PARTS = "mean_kl_worst_kind", "bisection.parts"
STORED, PLACED, RHO, KL, RATIO = "weights.stored", "weights.placed", "operators.rho", "mean_kl", "low_rank_ratio"
FAULTS = [
    Fault(edit=exchange_q_and_k, gates=(PLACED, RHO, KL), bad=f"{LAYER}.self_attn.q_proj"),
    Fault(edit=exchange_outputs_of_gate_and_up, gates=(KL,), bad=f"{LAYER}.mlp"),
    Fault(edit=weights_of_another_layer, gates=(STORED, RHO, KL), bad=f"{LAYER}.mlp.down_proj"),
    Fault(edit=rank_one_too_small, gates=(STORED, RHO, KL), bad=f"{LAYER}.mlp.up_proj"),
    Fault(edit=pivot_rows_of_another_seed, gates=(STORED, RHO, KL), bad=f"{LAYER}.mlp.gate_proj"),
    Fault(edit=sums_in_fp16, gates=(RHO,), bad="model.layers.0.self_attn.q_proj"),
    Fault(edit=permutation_off_by_one, gates=(STORED, RHO, KL), bad=f"{LAYER}.mlp.down_proj"),
    Fault(edit=drop_a_bias, gates=(RHO, KL), bad=f"{LAYER}.self_attn.q_proj"),
    Fault(edit=turn_square_coefficients, gates=(STORED, RHO, KL), bad=f"{LAYER}.self_attn.o_proj"),
    Fault(edit=zero_one_coefficient_row, gates=(STORED, RHO, KL), bad=f"{LAYER}.self_attn.v_proj"),
    Fault(edit=flip_one_bit_of_a_scale, gates=(STORED, RHO), bad=f"{LAYER}.mlp.gate_proj"),
    Fault(edit=wrong_head, gates=(STORED, KL), bad="head"),
    Fault(edit=norm_epsilon, gates=(KL,), bad="model.layers.0.self_attn"),
    Fault(edit=tanh_for_sigmoid, gates=(KL,), bad=f"{LAYER}.mlp"),
    Fault(edit=decode_one_position_late, gates=(KL,), bad="model.layers.0.self_attn"),
    Fault(edit=padding_is_seen, gates=(KL,), bad="model.layers.0.self_attn"),
    Fault(edit=newest_token_is_not_seen, gates=(KL,), bad="model.layers.0.self_attn"),
    Fault(edit=cache_repeats_its_oldest_position, gates=(KL,), bad="model.layers.0.self_attn"),
    Fault(edit=caches_of_two_layers_exchanged, gates=(KL,), bad="model.layers.0.self_attn"),
    Fault(edit=chunk_one_position_late, gates=(KIND, PARTS), bad="model.layers.0.self_attn"),
    Fault(edit=chunk_is_not_causal, gates=(KIND, PARTS), bad="model.layers.0.self_attn"),
    Fault(edit=padding_is_seen_behind_a_cache, gates=(KIND, PARTS), bad="model.layers.0.self_attn"),
    Fault(edit=rows_read_the_cache_of_the_first, gates=(KIND, PARTS), bad="model.layers.0.self_attn"),
    # The bisection's prompt is shorter than what these wait for.
    Fault(edit=late_behind_a_long_cache, gates=(KIND,), bad=""),
    Fault(edit=positions_stop_growing, gates=(KIND,), bad=""),
    Fault(edit=only_the_newest_keys_are_seen, gates=(KIND,), bad=""),
    Fault(edit=sums_in_fp16, gates=(RHO, KL, RATIO), bad="model.layers.0.self_attn.q_proj", flag="fp32"),
    Fault(edit=flip_one_bit_of_a_scale, gates=(STORED, RHO, KL), bad=f"{LAYER}.mlp.gate_proj", flag="fp32"),
    Fault(edit=norm_epsilon, gates=(KL,), bad="model.layers.0.self_attn", flag="fp32"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.edit.__name__}-{fault.flag}")
def test_a_fault_fails_at_its_level_and_in_its_layer(
    fault: Fault, exported: Any, checkpoint: Path, tmp_path: Path
) -> None:
    broken = edited(exported(fault.flag), tmp_path / "broken", fault.edit)
    report = verify_folder(broken, checkpoint, options_for(tmp_path, bisect=True, **LONG))
    assert not report
    failed = {gate.name for gate in report.verdict.failed()}
    assert failed >= set(fault.gates), report.verdict.gates
    # What touches no weight must not be put down to the weights.
    if not set(fault.gates) & {STORED, PLACED}:
        assert not failed & {STORED, PLACED}
    found = report.measured.bisection
    assert found is not None
    expected = f"first bad layer: {fault.bad} (" if fault.bad else "every layer replays well"
    assert found.line().startswith(expected), found.line()
    assert ("bisection.parts" in failed or "bisection.rho" in failed) == bool(fault.bad)


@pytest.mark.parametrize("flag", ["fp32", "fp16"])
@pytest.mark.parametrize("seed", range(10))
def test_a_clean_export_passes_on_any_text(
    seed: int, flag: str, exported: Any, checkpoint: Path, tmp_path: Path
) -> None:
    report = verify_folder(exported(flag), checkpoint, options_for(tmp_path, seed=seed, bisect=seed == 0))
    assert report, report.verdict.failed()
    found = report.measured.bisection
    if found is not None:
        assert found.first_bad() is None
        assert found.line().startswith("every layer replays well")
