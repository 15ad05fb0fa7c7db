"""The same function with its matrices stored as low-rank pairs: what rounding costs the format that PIFA replaces."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn
from tqdm import tqdm

from pifa_deploy.engine import BuildOptions, build_engines
from pifa_deploy.engine_record import EngineRecord
from pifa_deploy.graph_cut import CutGraph
from pifa_deploy.layer_forms import balanced_pair
from pifa_deploy.layouts import low_rank_pair
from pifa_deploy.model_folder import torch_dtype
from pifa_deploy.onnx_folder import DATA_FILE, MODEL_FILE, OnnxFolder
from pifa_deploy.operator_parity import PivotLinear, operator_ends, pivot_layers


@contextmanager
def low_rank_twin(model: nn.Module, folder: OnnxFolder) -> Iterator[OnnxFolder | None]:
    """Yields a temporary ONNX folder with a low-rank pair in the place of each PIFA layer.

    The pairs come from the reference, not from the folder, and share their singular values evenly, as U S^1/2 and
    S^1/2 V; all else is the folder's own graph. It takes as much disk as the low-rank model.

    Args:
        model: the fp32 reference.
        folder: what is verified; its dtype is the twin's.

    Yields:
        None for a model without PIFA layers in its graph.
    """
    graph = CutGraph(folder)
    layers = pivot_layers(model)
    ends = {path: operator_ends(graph, path, biased=layer.bias is not None) for path, layer in layers.items()}
    found = {path: pair for path, pair in ends.items() if pair is not None}
    if not found:
        yield None
        return
    edited = ir.load(folder.model_path)
    for name, value in edited.graph.initializers.items():
        # onnx_ir reads no file that has two names in the file system; the arrays are mapped, not copied.
        value.const_value = ir.Tensor(graph.array(name), name=name)
    values = {value.name: value for node in edited.graph for value in node.outputs}
    values |= {value.name: value for value in edited.graph.inputs}
    dtype = torch_dtype(folder.dtype)
    for path in tqdm(found, desc="low-rank twin", unit="layer", disable=None, leave=False):
        x, y = (values[name] for name in found[path])
        nodes = _pair_nodes(edited, path, layers[path], x=x, dtype=dtype)
        maker = y.producer()
        assert maker is not None  # `operator_ends` names a node's output
        edited.graph.insert_after(maker, nodes)
        ir.convenience.replace_all_uses_with(y, nodes[-1].outputs[0], replace_graph_outputs=True)
    common.RemoveUnusedNodesPass()(edited)
    with tempfile.TemporaryDirectory(prefix="pifa-twin-") as name:
        place = Path(name)
        ir.save(edited, place / MODEL_FILE, external_data=DATA_FILE, max_workers=1)
        saved = onnx.load(place / MODEL_FILE, load_external_data=False)
        yield OnnxFolder(path=place, model=saved, manifest={"dtype": folder.dtype})


def build_twin_engine(twin: OnnxFolder, record: EngineRecord) -> Path:
    """Builds the engine of a twin as another engine was built, in the twin's folder; returns its folder.

    It has no plugin: the twin has no PIFA layers. With the plugin in the other engine the two still differ in nothing
    but how the same functions are stored and computed.

    Args:
        twin: what `low_rank_twin` yields.
        record: of the engine that it is the twin of: backend, GPUs, sizes, TF32 and leave for sparse kernels.

    Raises:
        As `build_engines`.
    """
    names = ("max_batch_size", "max_input_len", "max_cache_len", "tf32")
    options = BuildOptions(
        backend=record.backend,
        compute_capabilities=record.compute_capabilities,
        sparsity="enable" if record.sparse_weights else "disable",
        **{name: record.options[name] for name in names if name in record.options},
    )
    place = twin.path / "engine"
    build_engines(twin.path, place, options)
    return place


def _pair_nodes(model: ir.Model, path: str, layer: PivotLinear, *, x: ir.Value, dtype: torch.dtype) -> list[ir.Node]:
    u, v = balanced_pair(*low_rank_pair(layer))
    nodes = [ir.node("MatMul", [x, _initializer(model, f"{path}.low_rank_v_t", v.T.to(dtype))])]
    u_t = _initializer(model, f"{path}.low_rank_u_t", u.T.to(dtype))
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], u_t]))
    if layer.bias is not None:
        bias = _initializer(model, f"{path}.low_rank_bias", layer.bias.detach().to(dtype))
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias]))
    return nodes


def _initializer(model: ir.Model, name: str, tensor: torch.Tensor) -> ir.Value:
    value = ir.Value(name=name, const_value=TorchTensor(tensor.contiguous(), name=name))
    model.graph.register_initializer(value)
    return value
