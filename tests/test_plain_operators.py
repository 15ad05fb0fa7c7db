"""What bounds say of PIFA in plain operators, against the exported function bodies and a built engine."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import inliner

from pifa_deploy import op_spec
from pifa_deploy.advice import read_layers
from pifa_deploy.engine_record import read_engine_json
from pifa_deploy.gpu_limits import LimitOptions, limits_of
from pifa_deploy.onnx_passes import take_tensorrt_bodies
from pifa_deploy.roofline import PIFA_FUSED, PIFA_PLAIN, Layer, decoder_bound, work
from pifa_deploy.targets import TARGETS

pytest_plugins = ("cli_plugin",)

# What takes no kernel: constants, shapes, weights that stay as they are, and parts of x that a product reads in place.
VIEWS = {"Constant", "Shape", "Transpose", "Slice"}
FP32 = 4


class PlainBody:
    """One PIFA node of an exported graph, its body written out for a number of tokens.

    Attributes:
        sizes: value -> bytes.
        kernels: (operator, inputs, output) of everything but views.
    """

    def __init__(self, exported: onnx.ModelProto, node: onnx.NodeProto, tokens: int) -> None:
        stored = {tensor.name: tensor for tensor in exported.graph.initializer}
        weights = [stored[name] for name in node.input[1:]]
        column, (first, second) = node.op_type == op_spec.COLUMN_OP_TYPE, (one.dims for one in weights[:2])
        features = first[1] + second[1] * column
        drawn = np.random.default_rng(0).normal
        feed = {node.input[0]: drawn(size=(tokens, features)).astype(np.float32)}
        for one in weights:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(one.data_type)
            index = np.arange(math.prod(one.dims), dtype=dtype)
            feed[one.name] = index if dtype == np.int32 else drawn(size=tuple(one.dims)).astype(dtype)
        inputs = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feed.items()
        ]
        graph = onnx.helper.make_graph([node], "one", inputs, [])
        model = onnx.helper.make_model(
            graph, functions=list(exported.functions), opset_imports=list(exported.opset_import), ir_version=10
        )
        take_tensorrt_bodies(model)
        model = inliner.inline_local_functions(model)
        names = [inner.output[0] for inner in model.graph.node]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        onnxruntime = pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'pifa-deploy[cpu]'")
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        values = {**feed, **dict(zip(names, session.run(names, feed), strict=True))}
        self.sizes = {name: value.nbytes for name, value in values.items()}
        self.kernels = [
            (inner.op_type, list(inner.input), inner.output[0])
            for inner in model.graph.node
            if inner.op_type not in VIEWS
        ]

    def counted(self, *, fused: bool) -> tuple[int, int]:
        """Returns the bytes that kernels read and write, and their number.

        A Gather and the Concat before it are one. Where operators are fused, an Add joins the product before it, and
        what puts outputs in order joins whatever reads them.
        """
        total, count, before = 0, 0, ("", "")
        for op_type, inputs, output in self.kernels:
            joins = (before[0], op_type) == ("Concat", "Gather") or (fused and op_type == "Add")
            if not fused or op_type in ("MatMul", "Add"):
                total += sum(self.sizes[name] for name in (*inputs, output))
                # What one kernel hands itself is neither written nor read.
                total -= 2 * self.sizes[before[1]] if joins else 0
                count += not joins
            before = (op_type, output)
        return total, count


@pytest.fixture(scope="module")
def exported(onnx_folder: Path) -> onnx.ModelProto:
    return onnx.load(onnx_folder / "model.onnx", load_external_data=False)


@pytest.fixture(scope="module")
def layers(checkpoint: Path) -> dict[str, Layer]:
    return {layer.name: layer for layer in read_layers(checkpoint, None)}


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("op_type", sorted(op_spec.FORMS))
def test_bounds_of_plain_operators_are_counted_from_the_exported_body(
    exported: onnx.ModelProto, layers: dict[str, Layer], op_type: str, tokens: int
) -> None:
    nodes = [node for node in exported.graph.node if node.op_type == op_type]
    assert nodes
    for node in nodes:
        layer = layers[node.name]
        body = PlainBody(exported, node, tokens)
        # The bounds leave an index out, which is read in every pass whatever the number of tokens.
        index = FP32 * layer.out_features if op_type == op_spec.OP_TYPE else 0
        for variant, left_out in ((PIFA_PLAIN, index), (PIFA_FUSED, 0)):
            bound = work(layer, variant, FP32)
            moved = bound.weight_bytes + tokens * bound.token_bytes + left_out
            assert body.counted(fused=variant == PIFA_FUSED) == (moved, bound.launches), (node.name, variant)


@pytest.mark.tensorrt
def test_tensorrt_rtx_builds_as_many_products_as_the_fused_row_launches(engine_folder: Path, checkpoint: Path) -> None:
    layers = [layer for layer in read_layers(checkpoint, None) if layer.rank is not None]
    built = read_engine_json(engine_folder).layers
    products = [one for one in built if one.modules or one.type == "runtime_fusion"]
    assert len(products) == decoder_bound(layers, PIFA_FUSED, 1, limits_of(TARGETS["l4"], LimitOptions())).launches
