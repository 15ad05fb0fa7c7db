"""One linear layer as an ONNX model, written as the exporter writes it inside a decoder."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import torch
from torch import nn

from pifa_deploy import onnx_passes, op_spec
from pifa_deploy.column_linear import PifaColumnLinear
from pifa_deploy.linear import LowRankLinear, PifaLinear

_IR_VERSION = 10


def layer_model(layer: nn.Module) -> onnx.ModelProto:
    """Returns a model that maps x [tokens, n] to y [tokens, m], both in the dtype of the layer's weights.

    Args:
        layer: nn.Linear, LowRankLinear, PifaLinear or PifaColumnLinear, on the CPU.
    """
    weights = {name: value.detach() for name, value in layer.named_parameters()}
    bias = weights.pop("bias", None)
    constants = {name: _constant(name, value) for name, value in weights.items()}
    dtype = ir.tensor(next(iter(weights.values()))).dtype
    n = int(layer.in_features)  # type: ignore[arg-type]
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["tokens", n]))
    nodes: list[ir.Node] = []
    if isinstance(layer, PifaLinear | PifaColumnLinear):
        given = [None if bias is None else _constant("bias", bias)]
        y = _pifa_node(layer, x, constants, given, nodes)
        bias = None
    else:
        order = ("low_rank_v", "low_rank_u") if isinstance(layer, LowRankLinear) else ("weight",)
        y = x
        for name in order:
            turned = _emit(nodes, "Transpose", [constants[name]], perm=[1, 0])
            y = _emit(nodes, "MatMul", [y, turned])
    if bias is not None:
        y = _emit(nodes, "Add", [y, _constant("bias", bias)])
    y.name, y.type, y.shape = "y", ir.TensorType(dtype), ir.Shape(["tokens", int(layer.out_features)])  # type: ignore[arg-type]
    held = {value.name: value for node in nodes for value in node.inputs if value is not None and value.const_value}
    opsets = {"": onnx_passes.OPSET, op_spec.DOMAIN: op_spec.OP_VERSION}
    graph = ir.Graph([x], [y], nodes=nodes, initializers=list(held.values()), opset_imports=opsets, name="layer")
    model = ir.Model(graph, ir_version=_IR_VERSION)
    onnx_passes.attach_function_bodies(model)
    proto: onnx.ModelProto = ir.to_proto(model)
    return proto


def _pifa_node(
    layer: PifaLinear | PifaColumnLinear,
    x: ir.Value,
    constants: dict[str, ir.Value],
    bias: list[ir.Value | None],
    nodes: list[ir.Node],
) -> ir.Value:
    op_type = op_spec.COLUMN_OP_TYPE
    inputs: list[ir.Value | None] = [x, constants["pivot_weight"], constants["coefficients"]]
    if isinstance(layer, PifaLinear):
        index = layer.output_index
        moved = index is not None and len(index) > 0
        op_type = op_spec.OP_TYPE if moved else op_spec.ORDERED_OP_TYPE
        inputs += [_constant(op_spec.INDEX_INPUT, index)] if moved and index is not None else []
    inputs += [value for value in bias if value is not None]
    attributes = op_spec.attributes(op_type, rank=layer.rank, out_features=layer.out_features)
    return _emit(nodes, op_type, inputs, op_spec.DOMAIN, **attributes)


def _constant(name: str, value: torch.Tensor) -> ir.Value:
    tensor = ir.tensor(value.detach().contiguous(), name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(list(value.shape)))


def _emit(
    nodes: list[ir.Node], op_type: str, inputs: list[ir.Value | None], domain: str = "", **attributes: object
) -> ir.Value:
    node = ir.node(op_type, inputs, attributes=attributes, domain=domain)  # type: ignore[arg-type]
    nodes.append(node)
    return node.outputs[0]
