"""Passes over the exported graph: the PifaLinear schema and function body, and a deterministic, portable form.

TensorRT-RTX's parser finds a local function by its name alone, whatever its domain or overload, so one
file holds one body: the bias is an input of the operator only when every node has one, and an empty
`output_index` is kept only when no node needs a gather.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from pifa_deploy import op_spec
from pifa_deploy.errors import ExportError

OPSET = 18
# Only what is computed from shapes and scalars is folded.
_FOLD_LIMIT = 1024


def op_schema() -> onnx.defs.OpSchema:
    """Returns the ONNX schema of `pifa::PifaLinear` version 1."""
    schema = onnx.defs.OpSchema
    option = schema.FormalParameterOption
    types = dict.fromkeys(op_spec.INPUTS, "T") | {op_spec.INDEX_INPUT: f"tensor({op_spec.INDEX_DTYPE})"}
    inputs = [schema.FormalParameter(name, kind) for name, kind in types.items()]
    inputs.append(schema.FormalParameter(op_spec.OPTIONAL_INPUT, "T", param_option=option.Optional))
    kinds = dict.fromkeys(op_spec.INT_ATTRIBUTES, schema.AttrType.INT)
    kinds |= dict.fromkeys(op_spec.STRING_ATTRIBUTES, schema.AttrType.STRING)
    return schema(
        op_spec.OP_TYPE,
        op_spec.DOMAIN,
        op_spec.OP_VERSION,
        doc="y = concat(y_p, y_np)[..., output_index] + bias; y_p = x pivot_weight^T, y_np = y_p coefficients^T",
        inputs=inputs,
        outputs=[schema.FormalParameter(op_spec.OUTPUT, "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "weights and activations")],
        attributes=[schema.Attribute(name, kind, required=True) for name, kind in kinds.items()],
    )


def register_op_schema() -> None:
    """Makes `onnx.checker` know the operator; calling it again changes nothing."""
    if not onnx.defs.has(op_spec.OP_TYPE, op_spec.DOMAIN):
        onnx.defs.register_schema(op_schema())


def function_body(*, gather: bool, bias: bool) -> ir.Function:
    """Returns the plain-op body of PifaLinear that any ONNX runtime can run.

    Args:
        gather: whether outputs are moved by `output_index`.
        bias: whether the operator has its optional bias input.
    """
    names = [*op_spec.INPUTS, *([op_spec.OPTIONAL_INPUT] if bias else [])]
    values = {name: ir.Value(name=name) for name in names}
    nodes: list[ir.Node] = []

    def emit(op_type: str, output: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes, name=f"{op_spec.OP_TYPE}_{output}")
        node.outputs[0].name = output
        nodes.append(node)
        return node.outputs[0]

    pivots = emit("Transpose", "pivot_weight_t", [values["pivot_weight"]], perm=[1, 0])
    y_p = emit("MatMul", "y_p", [values["x"], pivots])
    rest = emit("Transpose", "coefficients_t", [values["coefficients"]], perm=[1, 0])
    y_np = emit("MatMul", "y_np", [y_p, rest])
    result = emit("Concat", "y_cat", [y_p, y_np], axis=-1)
    if gather:
        result = emit("Gather", "y_rows", [result, values["output_index"]], axis=-1)
    if bias:
        result = emit("Add", "y_bias", [result, values[op_spec.OPTIONAL_INPUT]])
    result.name = op_spec.OUTPUT
    graph = ir.Graph(list(values.values()), [result], nodes=nodes, opset_imports={"": OPSET})
    declared = [ir.Attr(name, ir.AttributeType.INT, None) for name in op_spec.INT_ATTRIBUTES]
    declared += [ir.Attr(name, ir.AttributeType.STRING, None) for name in op_spec.STRING_ATTRIBUTES]
    return ir.Function(op_spec.DOMAIN, op_spec.OP_TYPE, graph=graph, attributes=declared)


def pifa_nodes(model: ir.Model) -> list[ir.Node]:
    """Returns the PifaLinear nodes in graph order."""
    return [node for node in model.graph if node.domain == op_spec.DOMAIN and node.op_type == op_spec.OP_TYPE]


def attach_function_body(model: ir.Model) -> None:
    """Gives the model the function body that fits its PifaLinear nodes; none without such nodes."""
    nodes = pifa_nodes(model)
    if not nodes:
        return
    index = nodes[0].inputs[op_spec.INPUTS.index(op_spec.INDEX_INPUT)]
    if index is None or index.shape is None:
        raise ExportError(f"{nodes[0].name}: output_index has no static shape")
    body = function_body(gather=index.shape[0] != 0, bias=len(nodes[0].inputs) > len(op_spec.INPUTS))
    model.functions[body.identifier()] = body
    model.graph.opset_imports[op_spec.DOMAIN] = op_spec.OP_VERSION


def expand_to_plain_ops(model: ir.Model) -> None:
    """Replaces every PifaLinear node by its function body."""
    common.InlinePass()(model)
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
    """Runs `onnx.checker` on a saved model with the operator's schema registered."""
    register_op_schema()
    onnx.checker.check_model(path)
