"""A causal language model as one traced graph with an explicit, flat key-value cache."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18, values
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from pifa_deploy import op_spec
from pifa_deploy.column_linear import PifaColumnLinear
from pifa_deploy.errors import ExportError, first_line
from pifa_deploy.linear import PifaLinear
from pifa_deploy.onnx_passes import OPSET, op_schema

_ATTENTION = "pifa_export"
_WRAPPED = "decoder"


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention in plain operations that every ONNX runtime has.

    Masked scores are replaced, not added to: a row with every key masked (padding) stays finite in float16 too.

    Args:
        module: the attention module; not used.
        query: [batch, heads, sequence, head_dim].
        key: [batch, kv_heads, total, head_dim].
        value: as `key`.
        attention_mask: bool [batch, 1, sequence, total], True where attended to.
        scaling: factor of the scores; 1 / sqrt(head_dim) when None.
        softcap: Gemma 2's bound of the scores, softcap * tanh(score / softcap).

    Returns:
        [batch, sequence, heads, head_dim] and None, as transformers expects of an attention function.
    """
    groups = query.shape[1] // key.shape[1]
    # Scaled before the product: large queries and keys would overflow float16 behind it.
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = query @ _repeated(key, groups).transpose(2, 3)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = torch.where(attention_mask, scores, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    # clone() and not contiguous(), which asks for the strides and makes torch.export guard on sizes.
    mixed = (weights @ _repeated(value, groups)).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return mixed, None


def _repeated(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeats key or value heads [batch, kv_heads, total, head_dim] for the query heads that share them."""
    if groups == 1:
        return heads
    batch, kv_heads, total, head_dim = heads.shape
    return heads.unsqueeze(2).expand(-1, -1, groups, -1, -1).reshape(batch, kv_heads * groups, total, head_dim)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    kwargs["allow_is_causal_skip"] = False
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


AttentionInterface.register(_ATTENTION, attention)
AttentionMaskInterface.register(_ATTENTION, _mask)


class _FlatCacheDecoder(nn.Module):
    """(input_ids, attention_mask, position_ids, key 0, value 0, ...) -> (logits, key 0, value 0, ...)."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        setattr(self, _WRAPPED, model)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        output = getattr(self, _WRAPPED)(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *present)


def cache_shape(config: Any) -> tuple[int, int, int]:
    """Returns (layers, kv_heads, head_dim) of a decoder's key-value cache."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or heads, head_dim


def interface(config: Any) -> tuple[list[str], list[str], list[list[str | int]]]:
    """Returns input names, output names and the dimensions of all of them in order (optimum's conventions)."""
    layers, kv_heads, head_dim = cache_shape(config)
    pairs = [(layer, part) for layer in range(layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{i}.{part}" for i, part in pairs)]
    outputs = ["logits", *(f"present.{i}.{part}" for i, part in pairs)]
    dimensions: list[list[str | int]] = [
        ["batch_size", "sequence_length"],
        ["batch_size", "total_sequence_length"],
        ["batch_size", "sequence_length"],
    ]
    dimensions += [["batch_size", kv_heads, "past_sequence_length", head_dim]] * len(pairs)
    dimensions += [["batch_size", "sequence_length", config.get_text_config(decoder=True).vocab_size]]
    dimensions += [["batch_size", kv_heads, "total_sequence_length", head_dim]] * len(pairs)
    return inputs, outputs, dimensions


def graph_from_model(model: PreTrainedModel) -> ir.Model:
    """Traces a causal LM into an ONNX graph that serves prefill and decode.

    Args:
        model: on the CPU, in eval mode, in the dtype to export; its attention implementation is changed.

    Returns:
        Graph with dynamic batch, sequence and past, initializers named as the model's parameters (sharing
        their storage), one node per PifaLinear or PifaColumnLinear module, no function body yet.

    Raises:
        ExportError: torch.export cannot trace the architecture.
    """
    model.set_attn_implementation(_ATTENTION)
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, (PifaLinear, PifaColumnLinear))
    }
    biased: dict[str, bool] = {}
    for layer in layers.values():
        biased[_operator(layer)] = biased.get(_operator(layer), True) and layer.bias is not None
    inputs, outputs, _ = interface(model.config)
    try:
        with _quiet(), _collector_paused(), torch.no_grad():
            program = _exported(model)
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                custom_translation_table={
                    torch.ops.pifa.linear.default: _row_translation(biased),
                    torch.ops.pifa.column_linear.default: _column_translation(biased),
                },
            )
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} could not be traced for ONNX: {first_line(error)}; see the traceback with --debug"
        ) from error
    assert onnx_program is not None
    _name_after_modules(onnx_program.model, set(layers), getattr(model, "all_tied_weights_keys", None) or {})
    return onnx_program.model


def _exported(model: PreTrainedModel) -> torch.export.ExportedProgram:
    layers, kv_heads, head_dim = cache_shape(model.config)
    # Sizes that are distinct and not 0 or 1, which torch.export would take for constants.
    batch, sequence, past = 2, 3, 5
    ids = torch.zeros(batch, sequence, dtype=torch.long)
    mask = torch.ones(batch, past + sequence, dtype=torch.long)
    positions = torch.arange(past, past + sequence).repeat(batch, 1)
    cache = [torch.zeros(batch, kv_heads, past, head_dim, dtype=model.dtype) for _ in range(2 * layers)]
    dim = torch.export.Dim
    rows, columns, old = dim("batch_size"), dim("sequence_length"), dim("past_sequence_length")
    shapes = (
        {0: rows, 1: columns},
        {0: rows, 1: dim.DYNAMIC},
        {0: rows, 1: columns},
        tuple({0: rows, 2: old} for _ in cache),
    )
    return torch.export.export(
        _FlatCacheDecoder(model), (ids, mask, positions, *cache), dynamic_shapes=shapes, strict=False
    )


def _operator(layer: PifaLinear | PifaColumnLinear) -> str:
    if isinstance(layer, PifaColumnLinear):
        return op_spec.COLUMN_OP_TYPE
    moves = layer.output_index is not None and len(layer.output_index) > 0
    return op_spec.OP_TYPE if moves else op_spec.ORDERED_OP_TYPE


def _row_translation(biased: Mapping[str, bool]) -> Any:
    """Returns the translation of `pifa::linear`; `biased`: operator -> whether the bias is among its inputs."""

    def translate(x: Any, pivot_weight: Any, coefficients: Any, output_index: Any, bias: Any = None) -> Any:
        moves = output_index.shape[0] != 0
        op_type = op_spec.OP_TYPE if moves else op_spec.ORDERED_OP_TYPE
        rank = pivot_weight.shape[0]
        sizes = {"rank": rank, "out_features": rank + coefficients.shape[0]}
        inputs = [x, pivot_weight, coefficients, *([output_index] if moves else [])]
        return _node(op_type, inputs, bias, sizes=sizes, inside=biased[op_type])

    return translate


def _column_translation(biased: Mapping[str, bool]) -> Any:
    """Returns the translation of `pifa::column_linear`; `biased` as in `_row_translation`."""

    def translate(x: Any, pivot_weight: Any, coefficients: Any, bias: Any = None) -> Any:
        out_features, rank = pivot_weight.shape
        sizes = {"rank": rank, "out_features": out_features}
        inside = biased[op_spec.COLUMN_OP_TYPE]
        return _node(op_spec.COLUMN_OP_TYPE, [x, pivot_weight, coefficients], bias, sizes=sizes, inside=inside)

    return translate


def _node(op_type: str, inputs: list[Any], bias: Any, *, sizes: dict[str, int], inside: bool) -> Any:
    """Emits one node, its bias among the inputs or added behind it."""
    operator = values.Op(values.Opset(op_spec.DOMAIN, op_spec.OP_VERSION), op_type, op_schema(op_type))
    y = operator(*inputs, *([bias] if inside else []), **op_spec.attributes(op_type, **sizes))
    return y if bias is None or inside else opset18.Add(y, bias)


def _name_after_modules(model: ir.Model, modules: set[str], tied: Mapping[str, str]) -> None:
    """Names initializers as the checkpoint's tensors (`tied`: alias -> stored name) and nodes as their modules."""
    prefix = f"{_WRAPPED}."
    held = {name.removeprefix(prefix): name for name in model.graph.initializers if name.startswith(prefix)}
    for parameter, name in held.items():
        value = model.graph.initializers.pop(name)
        stored = tied.get(parameter, parameter)
        value.name = parameter if stored in held else stored
        model.graph.initializers[value.name] = value
    for node in model.graph:
        if node.domain == op_spec.DOMAIN and node.inputs[1] is not None and node.inputs[1].name:
            node.name = node.inputs[1].name.removesuffix(".pivot_weight")
            if node.name not in modules:
                raise ExportError(f"node {node.name} leads back to no factorised module")


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Pauses Python's garbage collector: tracing makes millions of objects that live, a quarter of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
        gc.collect()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back the exporter's progress prints and its warnings about torchvision and deprecated trees."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
