"""Passes over the exported graph: the operators' schemas and function bodies, and a deterministic, portable form.

One name has one body in a file (see `op_spec`), so the bias is an input of an operator only when every node of
that operator has one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from pifa_deploy import op_spec

OPSET = 18
# Only what is computed from shapes and scalars is folded.
_FOLD_LIMIT = 1024
_HIDDEN = "pifa.hidden"
# ONNX's way to say: to the end.
_LAST = 2**63 - 1
# What PifaLinear's body moves by its index, each the fastest somewhere (docs/layouts.md has the measurements). On a CPU
# the weights, where layers are small, for r^2 multiplications a token more; rows of the transposed outputs from about
# `LARGE` outputs on. In TensorRT the outputs: it fuses that into what follows, and would move weights in every run.
MOVES = ("weights", "rows", "outputs")
LARGE = 2048


def op_schema(op_type: str) -> onnx.defs.OpSchema:
    """Returns the ONNX schema of one of the operators."""
    schema = onnx.defs.OpSchema
    option = schema.FormalParameterOption
    inputs = [
        schema.FormalParameter(name, f"tensor({op_spec.INDEX_DTYPE})" if name == op_spec.INDEX_INPUT else "T")
        for name in op_spec.inputs_of(op_type, bias=False)
    ]
    inputs.append(schema.FormalParameter(op_spec.OPTIONAL_INPUT, "T", param_option=option.Optional))
    kinds = dict.fromkeys(op_spec.INT_ATTRIBUTES, schema.AttrType.INT)
    kinds |= dict.fromkeys(op_spec.STRING_ATTRIBUTES, schema.AttrType.STRING)
    return schema(
        op_type,
        op_spec.DOMAIN,
        op_spec.OP_VERSION,
        doc=op_spec.__doc__ or "",
        inputs=inputs,
        outputs=[schema.FormalParameter(op_spec.OUTPUT, "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "weights and activations")],
        attributes=[schema.Attribute(name, kind, required=True) for name, kind in kinds.items()],
    )


def register_op_schemas() -> None:
    """Makes `onnx.checker` know the operators; calling it again changes nothing."""
    for op_type in op_spec.FORMS:
        if not onnx.defs.has(op_type, op_spec.DOMAIN):
            onnx.defs.register_schema(op_schema(op_type))


class _Body:
    """The nodes of a function body, written down one after the other."""

    def __init__(self, op_type: str, *, bias: bool) -> None:
        self.op_type = op_type
        self.inputs = {name: ir.Value(name=name) for name in op_spec.inputs_of(op_type, bias=bias)}
        self.nodes: list[ir.Node] = []

    def emit(self, op_type: str, output: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, name=f"{self.op_type}_{output}")
        node.outputs[0].name = output
        self.nodes.append(node)
        return node.outputs[0]

    def integers(self, output: str, *value: int) -> ir.Value:
        return self.emit("Constant", output, [], value_ints=list(value))

    def product(self, output: str, x: ir.Value, weight: ir.Value) -> ir.Value:
        """Emits x weight^T."""
        return self.emit("MatMul", output, [x, self.emit("Transpose", f"{weight.name}_t", [weight], perm=[1, 0])])


def function_body(op_type: str, *, bias: bool, moves: str = "weights") -> ir.Function:
    """Returns the plain-op body of an operator that any ONNX runtime can run.

    Args:
        op_type: one of `op_spec.FORMS`.
        bias: whether the operator has its optional bias input.
        moves: what PifaLinear moves by its index, one of `MOVES`.
    """
    body = _Body(op_type, bias=bias)
    write = {
        op_spec.OP_TYPE: {"weights": _moved_weights, "rows": _moved_rows, "outputs": _moved_outputs}[moves],
        op_spec.ORDERED_OP_TYPE: _ordered_rows,
        op_spec.COLUMN_OP_TYPE: _columns,
    }
    result = write[op_type](body)
    if bias:
        result = body.emit("Add", "y_bias", [result, body.inputs[op_spec.OPTIONAL_INPUT]])
    result.name = op_spec.OUTPUT
    graph = ir.Graph(list(body.inputs.values()), [result], nodes=body.nodes, opset_imports={"": OPSET})
    declared = [ir.Attr(name, ir.AttributeType.INT, None) for name in op_spec.INT_ATTRIBUTES]
    declared += [ir.Attr(name, ir.AttributeType.STRING, None) for name in op_spec.STRING_ATTRIBUTES]
    return ir.Function(op_spec.DOMAIN, op_type, graph=graph, attributes=declared)


def _moved_weights(body: _Body) -> ir.Value:
    """Emits y_p [I; C]^T with the rows of [I; C] in their places, a constant that runtimes compute once."""
    pivot_weight, coefficients = body.inputs["pivot_weight"], body.inputs["coefficients"]
    rank = body.emit("Shape", "rank_1d", [pivot_weight], start=0, end=1)
    corner = body.emit("Expand", "corner", [body.integers("zero", 0), body.emit("Concat", "r_r", [rank, rank], axis=0)])
    identity = body.emit("CastLike", "identity", [body.emit("EyeLike", "eye", [corner], dtype=1), pivot_weight])
    stacked = body.emit("Concat", "stacked", [identity, coefficients], axis=0)
    left = body.emit("Gather", "left", [stacked, body.inputs[op_spec.INDEX_INPUT]], axis=0)
    return body.product("y_rows", body.product("y_p", body.inputs["x"], pivot_weight), left)


def _moved_outputs(body: _Body) -> ir.Value:
    """Emits concat(y_p, y_np) with its elements moved."""
    return body.emit("Gather", "y_moved", [_ordered_rows(body), body.inputs[op_spec.INDEX_INPUT]], axis=-1)


def _moved_rows(body: _Body) -> ir.Value:
    """Emits the same through its transpose, of which a Gather copies whole rows."""
    index = body.inputs[op_spec.INDEX_INPUT]
    flat = body.emit("Flatten", "y_flat", [_ordered_rows(body)], axis=-1)
    turned = body.emit("Transpose", "y_turned", [flat], perm=[1, 0])
    moved = body.emit("Transpose", "y_moved", [body.emit("Gather", "y_taken", [turned, index], axis=0)], perm=[1, 0])
    leading = body.emit("Shape", "leading", [body.inputs["x"]], end=-1)
    features = body.emit("Shape", "features", [index])
    shape = body.emit("Concat", "y_shape", [leading, features], axis=0)
    return body.emit("Reshape", "y_rows", [moved, shape], allowzero=1)


def _ordered_rows(body: _Body) -> ir.Value:
    """Emits [y_p, y_p C^T]."""
    y_p = body.product("y_p", body.inputs["x"], body.inputs["pivot_weight"])
    return body.emit("Concat", "y_cat", [y_p, body.product("y_np", y_p, body.inputs["coefficients"])], axis=-1)


def _columns(body: _Body) -> ir.Value:
    """Emits (x_p + x_np D^T) W_c^T."""
    x, pivot_weight = body.inputs["x"], body.inputs["pivot_weight"]
    rank = body.emit("Shape", "rank_1d", [pivot_weight], start=1, end=2)
    axis, start, end = body.integers("axis", -1), body.integers("start", 0), body.integers("end", _LAST)
    x_p = body.emit("Slice", "x_p", [x, start, rank, axis])
    x_np = body.emit("Slice", "x_np", [x, rank, end, axis])
    z = body.emit("Add", "z", [x_p, body.product("z_np", x_np, body.inputs["coefficients"])])
    return body.product("y_cols", z, pivot_weight)


def pifa_nodes(model: ir.Model) -> list[ir.Node]:
    """Returns the nodes of the PIFA operators in graph order."""
    return [node for node in model.graph if node.domain == op_spec.DOMAIN and node.op_type in op_spec.FORMS]


def attach_function_bodies(model: ir.Model) -> None:
    """Gives the model the function body of each PIFA operator in it."""
    moved = [node.attributes["out_features"].as_int() for node in pifa_nodes(model) if node.op_type == op_spec.OP_TYPE]
    moves = "rows" if moved and statistics.median(moved) >= LARGE else "weights"
    biased = {
        node.op_type: len(node.inputs) > len(op_spec.inputs_of(node.op_type, bias=False)) for node in pifa_nodes(model)
    }
    for op_type, bias in biased.items():
        body = function_body(op_type, bias=bias, moves=moves)
        model.functions[body.identifier()] = body
        model.graph.opset_imports[op_spec.DOMAIN] = op_spec.OP_VERSION


def take_tensorrt_bodies(model: onnx.ModelProto) -> None:
    """Replaces, in place, the bodies in a file by those that suit TensorRT."""
    for function in model.functions:
        if (function.domain, function.name) == (op_spec.DOMAIN, op_spec.OP_TYPE):
            bias = op_spec.OPTIONAL_INPUT in function.input
            body = function_body(op_spec.OP_TYPE, bias=bias, moves="outputs")
            function.CopyFrom(ir.serde.serialize_function(body))


def expand_to_plain_ops(model: ir.Model, names: Iterable[str] | None = None) -> None:
    """Replaces the PIFA nodes of these names, or every one, by their function bodies."""
    expanded = None if names is None else set(names)
    kept = [node for node in pifa_nodes(model) if expanded is not None and node.name not in expanded]
    # The pass inlines whatever has a function: the others are taken out of its sight.
    for node in kept:
        node.domain = _HIDDEN
    common.InlinePass()(model)
    for node in kept:
        node.domain = op_spec.DOMAIN
    if kept:
        attach_function_bodies(model)
    else:
        model.graph.opset_imports.pop(op_spec.DOMAIN, None)


def simplify(model: ir.Model) -> None:
    """Folds small constants, merges equal nodes and drops what is unused.

    Weights stay one tensor each, under their own names. onnxscript's `optimize_ir` is not used: it would store
    weights as anonymous transposed copies, and its pattern rewriter is quadratic in the nodes: 40 s for a
    30-layer decoder, to remove slices that select everything.
    """
    weights = set(model.graph.initializers.values())

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value in weights for value in node.inputs) else None

    fold_constants(model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT, should_fold=should_fold)
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)


def make_portable(model: ir.Model, dimension_names: Iterable[Iterable[str | int]]) -> None:
    """Removes what depends on the machine or the run, and names the dynamic dimensions of the interface.

    Args:
        model: changed in place: stack traces, doc strings and intermediate shapes go, initializers are
            sorted by name, the producer is this program.
        dimension_names: for each graph input and then each output, its dimensions.
    """
    common.ClearMetadataAndDocStringPass()(model)
    for value, dimensions in zip([*model.graph.inputs, *model.graph.outputs], dimension_names, strict=True):
        value.shape = ir.Shape(list(dimensions))
    interface = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if value not in interface:
                value.shape = None
                value.type = None
    # The pass above clears nodes and graphs only.
    for value in (*interface, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    ordered = sorted(model.graph.initializers.items())
    model.graph.initializers.clear()
    model.graph.initializers.update(ordered)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "decoder"
    model.producer_name = "pifa-deploy"
    model.producer_version = ""
    model.doc_string = None


def check(path: str) -> None:
    """Runs `onnx.checker` on a saved model with the operators' schemas registered."""
    register_op_schemas()
    onnx.checker.check_model(path)
