"""Parts of an ONNX folder's graph, cut out and run on their own in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from pifa_deploy.errors import MissingCapabilityError, StageFailedError, first_line
from pifa_deploy.layer_forms import DENSE, LOW_RANK, STORED
from pifa_deploy.onnx_folder import OnnxFolder

Array = npt.NDArray[Any]


def numpy_dtype(flag: str) -> np.dtype[Any]:
    """Returns the array dtype of "fp32", "fp16" or "bf16"; the last comes from ml_dtypes, as onnx has it."""
    kinds = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kinds[flag]))


class CutGraph:
    """A folder's graph, its tensors mapped from their files: a cut copies none of them.

    Attributes:
        nodes: in the file's order, which is one of execution.
        initializers: name -> tensor.
        producers: value -> number of the node that makes it.
        consumers: value -> numbers of the nodes that read it.
    """

    def __init__(self, folder: OnnxFolder) -> None:
        """Indexes the graph."""
        self.folder = folder
        self.nodes = list(folder.model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in folder.model.graph.initializer}
        self.producers = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.consumers: dict[str, list[int]] = defaultdict(list)
        for i, node in enumerate(self.nodes):
            for name in dict.fromkeys(filter(None, node.input)):
                self.consumers[name].append(i)
        self._files: dict[str, Array] = {}

    def form(self, module: str) -> str:
        """Returns in which of `layer_forms.FORMS` a factorised layer of the checkpoint stands in the graph."""
        if f"{module}.low_rank_u" in self.initializers:
            return LOW_RANK
        return DENSE if f"{module}.weight" in self.initializers else STORED

    def array(self, name: str) -> Array:
        """Returns an initializer, read-only where it lies in an external file."""
        tensor = self.initializers[name]
        if not uses_external_data(tensor):
            return onnx.numpy_helper.to_array(tensor)
        info = ExternalDataInfo(tensor)
        if info.location not in self._files:
            self._files[info.location] = np.memmap(Path(self.folder.path) / info.location, mode="r")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        count = int(np.prod(tensor.dims))
        if not count:
            return np.empty(tensor.dims, dtype)
        flat = np.frombuffer(self._files[info.location], dtype, count=count, offset=info.offset or 0)
        return flat.reshape(tensor.dims)

    def between(self, inputs: Collection[str], outputs: Sequence[str]) -> list[int]:
        """Returns the nodes that `outputs` need beyond the values `inputs`, in order."""
        pending, found = [name for name in outputs if name not in inputs], set[int]()
        while pending:
            i = self.producers.get(pending.pop())
            if i is None or i in found:
                continue
            found.add(i)
            pending += [name for name in self.nodes[i].input if name and name not in inputs]
        return sorted(found)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Computes some values of the graph from others, with the operators' function bodies and weights of the file.

        Args:
            feeds: value -> array; what the cut does not read is left out, graph inputs that it reads must be there.
            outputs: names of values that nodes of the graph make.

        Raises:
            MissingCapabilityError: ONNX Runtime is not installed or has no kernel for a part of the cut.
            StageFailedError: it cannot load or run the cut.
        """
        chosen = [self.nodes[i] for i in self.between(feeds, outputs)]
        read = {name for node in chosen for name in node.input}
        used = {name: array for name, array in feeds.items() if name in read}
        session = self._session(chosen, used, outputs, [name for name in sorted(read) if name in self.initializers])
        try:
            results: list[Array] = session.run(list(outputs), used)
        except Exception as error:
            raise StageFailedError(
                f"{self.folder.model_path}: ONNX Runtime could not run the part that makes {outputs[0]}: "
                f"{first_line(error)}"
            ) from error
        return results

    def _session(
        self, nodes: list[onnx.NodeProto], feeds: Mapping[str, Array], outputs: Sequence[str], weights: list[str]
    ) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingCapabilityError(
                "ONNX Runtime is not installed; pip install 'pifa-deploy[cpu]' (or [gpu])"
            ) from error
        tensors = [self.initializers[name] for name in weights]
        # What a feed replaces must not be an initializer too.
        tensors = [tensor for tensor in tensors if tensor.name not in feeds]
        held = {tensor.name: self.array(tensor.name) for tensor in tensors if uses_external_data(tensor)}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
        values = [make(array, self.initializers[name].data_type) for name, array in held.items()]
        options.add_external_initializers(list(held), values)
        data = self._model(nodes, feeds, outputs, tensors).SerializeToString()
        try:
            return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            reason = first_line(error)
            kind = MissingCapabilityError if "NOT_IMPLEMENTED" in reason else StageFailedError
            raise kind(
                f"ONNX Runtime {onnxruntime.__version__} cannot run the part of {self.folder.model_path} that makes "
                f"{outputs[0]}: {reason}"
            ) from error

    def _model(
        self,
        nodes: list[onnx.NodeProto],
        feeds: Mapping[str, Array],
        outputs: Sequence[str],
        tensors: list[onnx.TensorProto],
    ) -> onnx.ModelProto:
        declared = {value.name: value for value in self.folder.model.graph.input}
        inputs = [declared.get(name) or _declared(name, array) for name, array in feeds.items()]
        # ONNX Runtime infers what is left out.
        results = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = onnx.helper.make_graph(nodes, "part", inputs, results, tensors)
        whole = self.folder.model
        return onnx.helper.make_model(
            graph, opset_imports=whole.opset_import, functions=whole.functions, ir_version=whole.ir_version
        )


def _declared(name: str, array: Array) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [None] * array.ndim)
