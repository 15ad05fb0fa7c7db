"""From a checkpoint to an ONNX folder that any runtime can run and TensorRT can speed up."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import PreTrainedModel

from pifa_deploy import onnx_passes, op_spec
from pifa_deploy.decoder_graph import cache_shape, graph_from_model, interface
from pifa_deploy.digest import file_sha256, model_sha256
from pifa_deploy.genai_config import write_genai_config
from pifa_deploy.layer_forms import DENSE, STORED, leave_dense
from pifa_deploy.layer_plan import PLUGIN, apply_plan, read_plan
from pifa_deploy.model_folder import HUB_PREFIX, load_model, save_tokenizer, torch_dtype
from pifa_deploy.onnx_folder import DATA_FILE, MANIFEST_FILE, MODEL_FILE, SCHEMA
from pifa_deploy.output_folder import new_folder, write_json
from pifa_deploy.sparse_checkpoint import PATTERN, is_sparse, read_sparsity
from pifa_deploy.transformers_quantizer import factorised_modules, spec_of

FORMATS = ("pifa", "auto")
_INLINE_BYTES = 1024
_TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How to export.

    Attributes:
        dtype: "fp32", "fp16" or "bf16": weights, activations and cache; norms and softmax compute in fp32.
        format: "pifa" exports every layer as it is stored; "auto" writes a layer dense where its factors take no fewer
            multiplications than the dense weight: faster on a CPU, and larger.
        plain_ops: expand every PIFA node into MatMul, Concat and the like.
        plan: a file of `bench --choose`: each layer is written in the form that it has there. Where the plan has layers
            for the plugin, the others that stay PIFA become plain operators, so that the plugin does not take them.
        force: replace an existing output folder.
    """

    dtype: str = "fp16"
    format: str = "pifa"
    plain_ops: bool = False
    plan: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown dtype or format."""
        torch_dtype(self.dtype)
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}, expected one of {FORMATS}")
        if self.plan is not None and self.format == "auto":
            raise ValueError("format is 'auto' and there is a plan, expected one of them to choose the forms")


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """What an export wrote.

    Attributes:
        path: the ONNX folder.
        dtype: as in ExportOptions.
        nodes: nodes of the graph.
        pifa_nodes: PIFA nodes in it (0 with plain_ops or for a dense model).
        left_dense: layers written dense because of format "auto" or a plan.
        bytes: size of model.onnx and its data.
        tokenizer: whether tokenizer files were found and copied.
    """

    path: str
    dtype: str
    nodes: int
    pifa_nodes: int
    left_dense: tuple[str, ...]
    bytes: int
    tokenizer: bool


def export_checkpoint(checkpoint: Path | str, target: Path | str, options: ExportOptions) -> ExportSummary:
    """Writes the ONNX folder of a PIFA checkpoint, a dense or a 2:4-pruned model.

    The same checkpoint, options and tool versions give the same bytes.

    Args:
        checkpoint: as `model_folder.load_model` takes it.
        target: the folder to write.
        options: see ExportOptions.

    Raises:
        InputRefusedError: the checkpoint or the plan is malformed, or a weight overflows the dtype.
        MisfitError: the plan is of another checkpoint.
        ExportError: the architecture cannot be traced.
        OutputExistsError, OutputHeldError, OutputError: see `output_folder.new_folder`.
    """
    with new_folder(target, force=options.force) as folder:
        model = load_model(checkpoint, dtype=torch_dtype(options.dtype))
        left_dense, plain = _choose_forms(model, checkpoint, options)
        graph = graph_from_model(model)
        onnx_passes.attach_function_bodies(graph)
        if options.plain_ops or plain:
            onnx_passes.expand_to_plain_ops(graph, None if options.plain_ops else plain)
        onnx_passes.simplify(graph)
        onnx_passes.make_portable(graph, interface(model.config)[2])
        save_graph(graph, folder)
        tokenizer = save_tokenizer(checkpoint, folder)
        model.config.save_pretrained(folder)
        write_genai_config(model.config, folder)
        content = {
            "modules": _modules(model, graph),
            "left_dense": left_dense,
            "sparsity": _sparsity(checkpoint, graph),
            "source_sha256": _source_hash(checkpoint),
            **_manifest(model, folder, options),
        }
        write_json(folder / MANIFEST_FILE, content)
        onnx_passes.check(str(folder / MODEL_FILE))
        return ExportSummary(
            path=str(target),
            dtype=options.dtype,
            nodes=len(graph.graph),
            pifa_nodes=len(onnx_passes.pifa_nodes(graph)),
            left_dense=tuple(left_dense),
            bytes=sum((folder / name).stat().st_size for name in (MODEL_FILE, DATA_FILE)),
            tokenizer=tokenizer,
        )


def _choose_forms(
    model: PreTrainedModel, checkpoint: Path | str, options: ExportOptions
) -> tuple[list[str], list[str]]:
    """Gives the layers, in place, the forms asked for; returns those made dense and those to become plain operators."""
    if options.plan is None:
        return leave_dense(model) if options.format == "auto" else [], []
    taken = apply_plan(model, read_plan(options.plan), _source_hash(checkpoint), str(options.plan))
    return taken.get(DENSE, []), taken[STORED] if PLUGIN in taken else []


def save_graph(graph: ir.Model, folder: Path) -> None:
    """Writes model.onnx and model.onnx.data; tensors are written one at a time."""
    ir.save(graph, folder / MODEL_FILE, external_data=DATA_FILE, size_threshold_bytes=_INLINE_BYTES, max_workers=1)


def _modules(model: PreTrainedModel, graph: ir.Model) -> dict[str, Any]:
    """Returns, for each factorised module, its spec and the initializers of the graph that hold it."""
    return {
        name: {**asdict(spec_of(module)), "tensors": _tensors(name, graph)}
        for name, module in factorised_modules(model).items()
    }


def _sparsity(checkpoint: Path | str, graph: ir.Model) -> dict[str, Any] | None:
    """Returns what is known of a 2:4-pruned model, None for another.

    Weights stay as they are in the checkpoint, [m, n] behind a Transpose, so that each four are neighbours still.
    """
    if not is_sparse(checkpoint):
        return None
    record = read_sparsity(checkpoint)
    modules = {name: {**asdict(spec), "tensors": _tensors(name, graph)} for name, spec in record.modules.items()}
    return {"pattern": PATTERN, "method": record.method, "modules": modules}


def _tensors(module: str, graph: ir.Model) -> list[str]:
    """Returns the initializers of the graph that hold a module's tensors."""
    return [tensor for tensor in graph.graph.initializers if tensor.rpartition(".")[0] == module]


def _source_hash(checkpoint: Path | str) -> str | None:
    if str(checkpoint).startswith(HUB_PREFIX):
        return None
    return model_sha256(Path(checkpoint))


def _manifest(model: PreTrainedModel, folder: Path, options: ExportOptions) -> dict[str, Any]:
    """Returns pifa.json but for what it says of the checkpoint."""
    layers, kv_heads, head_dim = cache_shape(model.config)
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.iterdir())
        if file.is_file()
    }
    return {
        "schema": SCHEMA,
        "artefact": "onnx",
        "dtype": options.dtype,
        "plain_ops": options.plain_ops,
        "plan": None if options.plan is None else file_sha256(options.plan),
        "op": {"domain": op_spec.DOMAIN, "types": list(op_spec.FORMS), "version": op_spec.OP_VERSION},
        "opset": onnx_passes.OPSET,
        "cache": {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim},
        "files": files,
        "tools": {name: version(name) for name in _TOOLS},
    }
