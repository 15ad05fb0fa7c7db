"""The operators in ONNX: their schemas, their function bodies against the dense product, and the passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from pifa_deploy import onnx_passes, op_spec

# (m, n, pivot rows, or columns): odd shapes, one pivot, every row a pivot (C empty), 1 x n, m x 1, the first ones.
CASES = {
    "scattered": (13, 7, [1, 2, 6, 11]),
    "one pivot": (97, 31, [96]),
    "every row a pivot": (5, 9, [0, 1, 2, 3, 4]),
    "one output": (1, 8, [0]),
    "one input": (8, 1, [3]),
    "first rows": (13, 7, [0, 1, 2]),
    "square": (64, 64, list(range(1, 64, 2))),
}
COLUMNS = {
    "columns": (7, 13, [0, 1, 2]),
    "one column": (5, 9, [0]),
    "every column a pivot": (9, 5, [0, 1, 2, 3, 4]),
    "square, columns": (64, 64, list(range(24))),
}
BATCHES = [(1,), (5,), (2, 3), (1, 1), (2, 1, 3), (0,), (2, 0)]
DTYPES = {"fp32": (np.float32, ir.DataType.FLOAT), "fp16": (np.float16, ir.DataType.FLOAT16)}


def operator_of(case: str) -> str:
    if case in COLUMNS:
        return "PifaColumnLinear"
    pivots = CASES[case][2]
    return "PifaOrderedLinear" if pivots == list(range(len(pivots))) else "PifaLinear"


def operands(case: str, dtype: Any, *, bias: bool) -> dict[str, np.ndarray]:
    m, n, pivots = {**CASES, **COLUMNS}[case]
    rank, random = len(pivots), np.random.default_rng(m * n)
    if case in COLUMNS:
        found = {
            "pivot_weight": random.normal(size=(m, rank)) * rank**-0.5,
            "coefficients": random.normal(size=(rank, n - rank)) * n**-0.5,
        }
    else:
        found = {
            "pivot_weight": random.normal(size=(rank, n)) * n**-0.5,
            "coefficients": random.normal(size=(m - rank, rank)) * rank**-0.5,
        }
    if operator_of(case) == op_spec.OP_TYPE:
        stored = [*pivots, *(row for row in range(m) if row not in pivots)]
        found["output_index"] = np.argsort(stored).astype(np.int32)
    if bias:
        found["bias"] = random.normal(size=m)
    return {name: value if name == "output_index" else value.astype(dtype) for name, value in found.items()}


def dense_product(case: str, x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """x W^T + bias in float64, W written row by row from the definition."""
    m, n, pivots = {**CASES, **COLUMNS}[case]
    w_p, c = weights["pivot_weight"].astype(np.float64), weights["coefficients"].astype(np.float64)
    dense, rest = np.empty((m, n)), 0
    for column in range(n if case in COLUMNS else 0):
        if column in pivots:
            dense[:, column] = w_p[:, pivots.index(column)]
        else:
            dense[:, column] = sum((w_p[:, k] * c[k, rest] for k in range(len(pivots))), np.zeros(m))
            rest += 1
    for row in range(0 if case in COLUMNS else m):
        if row in pivots:
            dense[row] = w_p[pivots.index(row)]
        else:
            dense[row] = sum((c[rest, k] * w_p[k] for k in range(len(pivots))), np.zeros(n))
            rest += 1
    y = np.einsum("...n,mn->...m", x.astype(np.float64), dense)
    return y + weights["bias"].astype(np.float64) if "bias" in weights else y


def one_node_model(case: str, weights: dict[str, np.ndarray], dtype: ir.DataType, dims: int) -> ir.Model:
    m, n, pivots = {**CASES, **COLUMNS}[case]
    op_type = operator_of(case)
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape([*(f"d{i}" for i in range(dims)), n]))
    constants = [ir.Value(name=name, const_value=ir.tensor(value, name=name)) for name, value in weights.items()]
    for value, array in zip(constants, weights.values(), strict=True):
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
    attributes = op_spec.attributes(op_type, rank=len(pivots), out_features=m)
    node = ir.node(op_type, [x, *constants], attributes=attributes, domain=op_spec.DOMAIN, name="model.layers.0.q_proj")
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(dtype), ir.Shape([*(f"d{i}" for i in range(dims)), m])
    opsets = {"": onnx_passes.OPSET, op_spec.DOMAIN: op_spec.OP_VERSION}
    graph = ir.Graph([x], [y], nodes=[node], initializers=constants, opset_imports=opsets, name="one")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, *COLUMNS])
class TestFunctionBody:
    def test_of_large_layers_is_the_dense_product(
        self, case: str, dtype: str, bias: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(onnx_passes, "LARGE", 1)
        self.check(case, dtype, bias, plain=False)

    def test_of_tensorrt_is_the_dense_product(self, case: str, dtype: str, bias: bool) -> None:
        self.check(case, dtype, bias, plain=False, tensorrt=True)

    def check(self, case: str, dtype: str, bias: bool, *, plain: bool, tensorrt: bool = False) -> None:
        numpy_dtype, onnx_dtype = DTYPES[dtype]
        weights = operands(case, numpy_dtype, bias=bias)
        m, n, pivots = {**CASES, **COLUMNS}[case]
        for dims in (1, 2, 3):
            model = one_node_model(case, weights, onnx_dtype, dims)
            onnx_passes.attach_function_bodies(model)
            if tensorrt:
                proto = ir.to_proto(model)
                onnx_passes.take_tensorrt_bodies(proto)
                assert [len(found.node) for found in proto.functions] == [
                    {"PifaLinear": 6, "PifaOrderedLinear": 5, "PifaColumnLinear": 11}[operator_of(case)] + bias
                ]
                model = ir.from_proto(proto)
            if plain:
                onnx_passes.expand_to_plain_ops(model)
                assert not model.functions
                assert not onnx_passes.pifa_nodes(model)
            for batch in (shape for shape in BATCHES if len(shape) == dims):
                x = np.random.default_rng(1).normal(size=(*batch, n)).astype(numpy_dtype)
                found, expected = run(model, x), dense_product(case, x, weights)
                assert found.dtype == numpy_dtype
                assert found.shape == (*batch, m)
                # Sums of n and r terms of about unit scale, three roundings of the result; max and norm alike.
                limit = 4 * (n**0.5 + len(pivots) ** 0.5 + 3) * np.finfo(numpy_dtype).eps
                errors = np.abs(found - expected)
                assert errors.max(initial=0) <= limit * max(np.abs(expected).max(initial=0), 1)
                assert np.linalg.norm(errors) <= limit / 4 * max(np.linalg.norm(expected), errors.size**0.5)

    def test_is_the_dense_product(self, case: str, dtype: str, bias: bool) -> None:
        self.check(case, dtype, bias, plain=False)

    def test_expanded_is_the_dense_product(self, case: str, dtype: str, bias: bool) -> None:
        self.check(case, dtype, bias, plain=True)


@pytest.mark.parametrize("op_type", ["PifaLinear", "PifaOrderedLinear", "PifaColumnLinear"])
def test_bodies_move_no_activations_but_to_join_and_split_them(op_type: str) -> None:
    body = onnx_passes.function_body(op_type, bias=False)
    # What depends on weights alone, a runtime computes once.
    running, made = {"x"}, []
    for node in body:
        if running & {value.name for value in node.inputs if value is not None}:
            running |= {value.name for value in node.outputs}
            made.append(node.op_type)
    expected = {
        "PifaLinear": ["MatMul", "MatMul"],
        "PifaOrderedLinear": ["MatMul", "MatMul", "Concat"],
        "PifaColumnLinear": ["Slice", "Slice", "MatMul", "Add", "MatMul"],
    }
    assert made == expected[op_type]
    assert [node.op_type for node in onnx_passes.function_body(op_type, bias=True)] == [
        *(node.op_type for node in body),
        "Add",
    ]


def test_a_file_of_large_layers_moves_outputs_and_one_of_small_layers_weights() -> None:
    for rows, expected in ((2048, True), (2047, False)):
        model = one_node_model("square", operands("square", np.float32, bias=False), ir.DataType.FLOAT, 2)
        onnx_passes.pifa_nodes(model)[0].attributes["out_features"] = ir.AttrInt64("out_features", rows)
        onnx_passes.attach_function_bodies(model)
        (body,) = model.functions.values()
        assert ("Flatten" in [node.op_type for node in body]) == expected


def test_weights_are_prepared_once_when_a_session_starts(tmp_path: Path) -> None:
    for case, expected in (
        ("scattered", ["MatMul", "MatMul"]),
        ("columns", ["Slice", "Slice", "MatMul", "Add", "MatMul"]),
    ):
        model = one_node_model(case, operands(case, np.float32, bias=False), ir.DataType.FLOAT, 2)
        onnx_passes.attach_function_bodies(model)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 4
        data = ir.to_proto(model).SerializeToString()
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
        assert sorted(node.op_type for node in nodes) == sorted(expected)


def test_body_declares_the_operators_inputs_and_attributes() -> None:
    body = onnx_passes.function_body("PifaLinear", bias=True)
    assert [value.name for value in body.inputs] == ["x", "pivot_weight", "coefficients", "output_index", "bias"]
    assert [value.name for value in body.outputs] == ["y"]
    assert set(body.attributes) == {"rank", "out_features", "form", "plugin_namespace", "plugin_version"}
    assert (body.domain, body.name) == ("pifa", "PifaLinear")
    for op_type in ("PifaOrderedLinear", "PifaColumnLinear"):
        body = onnx_passes.function_body(op_type, bias=False)
        assert [value.name for value in body.inputs] == ["x", "pivot_weight", "coefficients"]
        assert body.name == op_type


def test_a_graph_without_the_operator_stays_as_it_is() -> None:
    model = one_node_model("scattered", operands("scattered", np.float32, bias=False), ir.DataType.FLOAT, 1)
    model.graph.node(0).op_type, model.graph.node(0).domain = "Sum", ""
    onnx_passes.attach_function_bodies(model)
    assert not model.functions


class TestSchema:
    def saved(self, folder: Path, change: Any = None) -> Path:
        model = one_node_model("scattered", operands("scattered", np.float32, bias=True), ir.DataType.FLOAT, 2)
        onnx_passes.attach_function_bodies(model)
        proto = ir.to_proto(model)
        if change:
            change(proto.graph.node[0])
        onnx.save(proto, folder / "model.onnx")
        return folder / "model.onnx"

    def test_the_checker_accepts_the_operator(self, tmp_path: Path) -> None:
        onnx_passes.check(str(self.saved(tmp_path)))
        assert onnx.defs.has("PifaLinear", "pifa")
        onnx_passes.register_op_schemas()  # a second time changes nothing
        assert onnx.defs.get_schema("PifaLinear", domain="pifa").since_version == 1

    @pytest.mark.parametrize("name", ["rank", "out_features", "form", "plugin_namespace", "plugin_version"])
    def test_the_checker_misses_each_attribute(self, name: str, tmp_path: Path) -> None:
        def drop(node: onnx.NodeProto) -> None:
            kept = [attribute for attribute in node.attribute if attribute.name != name]
            del node.attribute[:]
            node.attribute.extend(kept)

        path = self.saved(tmp_path, drop)
        with pytest.raises(onnx.checker.ValidationError, match=name):
            onnx_passes.check(str(path))

    def test_the_checker_refuses_another_attribute(self, tmp_path: Path) -> None:
        path = self.saved(tmp_path, lambda node: node.attribute.append(onnx.helper.make_attribute("alpha", 1)))
        with pytest.raises(onnx.checker.ValidationError, match="alpha"):
            onnx_passes.check(str(path))

    def test_the_checker_refuses_a_missing_input(self, tmp_path: Path) -> None:
        path = self.saved(tmp_path, lambda node: node.input.__delitem__(slice(2, None)))
        with pytest.raises(onnx.checker.ValidationError, match="PifaLinear"):
            onnx_passes.check(str(path))

    def test_types_of_the_operator(self) -> None:
        schema = onnx_passes.op_schema("PifaLinear")
        assert [(value.name, value.type_str) for value in schema.inputs] == [
            ("x", "T"),
            ("pivot_weight", "T"),
            ("coefficients", "T"),
            ("output_index", "tensor(int32)"),
            ("bias", "T"),
        ]
        assert (schema.min_input, schema.max_input) == (4, 5)
        assert set(schema.type_constraints[0].allowed_type_strs) == {
            "tensor(float)",
            "tensor(float16)",
            "tensor(bfloat16)",
        }


class TestPortableForm:
    def test_nothing_of_the_run_stays(self) -> None:
        model = one_node_model("scattered", operands("scattered", np.float32, bias=True), ir.DataType.FLOAT, 2)
        node = onnx_passes.pifa_nodes(model)[0]
        node.metadata_props["pkg.torch.onnx.stack_trace"] = "/home/user/model.py"
        node.doc_string = model.doc_string = model.graph.doc_string = "/home/user/model.py"
        model.metadata_props["host"] = model.graph.metadata_props["host"] = "/home/user"
        model.producer_name, model.producer_version = "pytorch", "2.13"
        model.graph.initializers["bias"].metadata_props["place"] = "/home/user"
        onnx_passes.make_portable(model, [["rows", "columns", 7], ["rows", "columns", 13]])
        text = str(ir.to_proto(model))
        assert "/home" not in text
        assert "pytorch" not in text
        assert list(model.graph.initializers) == sorted(model.graph.initializers)
        assert [str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)] == [
            "[rows,columns,7]",
            "[rows,columns,13]",
        ]

    def test_an_interface_of_another_length_is_an_error(self) -> None:
        model = one_node_model("scattered", operands("scattered", np.float32, bias=True), ir.DataType.FLOAT, 2)
        with pytest.raises(ValueError, match="zip"):
            onnx_passes.make_portable(model, [["rows", "columns", 7]])

    def test_simplifying_keeps_weights_and_result(self) -> None:
        weights = operands("square", np.float32, bias=True)
        model = one_node_model("square", weights, ir.DataType.FLOAT, 1)
        onnx_passes.attach_function_bodies(model)
        x = np.random.default_rng(2).normal(size=(3, 64)).astype(np.float32)
        before = run(model, x)
        onnx_passes.expand_to_plain_ops(model)
        onnx_passes.simplify(model)
        kept = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
        for name, value in weights.items():
            np.testing.assert_array_equal(kept[name], value)
        np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-5)
