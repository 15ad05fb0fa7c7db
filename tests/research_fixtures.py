"""Makes files as the research code would: its two layer classes live in fake modules while a file is saved."""

from __future__ import annotations

import copy
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pifa_deploy.errors import InputRefusedError
from pifa_deploy.importers import ImportOptions, ImportSummary, import_checkpoint

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2, rope_theta=5e4, **changes)).eval()


def tiny_qwen2(**changes: Any) -> Qwen2ForCausalLM:
    """q, k and v have biases, large enough that leaving them out shows."""
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, bos_token_id=1, eos_token_id=2, **changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter)
    return model


def halved(model: PreTrainedModel) -> PreTrainedModel:
    """Rounds the weights to fp16 but, unlike `model.half()`, not the rotary frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"[UNK]": 0, "<s>": 1, "</s>": 2, "pivot": 3, "rows": 4, "are": 5, "kept": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


class SVDLinear(nn.Module):
    """The reconstructed form: y = (x V^T) U^T + bias."""

    def __init__(self, u: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.ALinear = _linear(u, bias)
        self.BLinear = _linear(v, None)
        self.truncation_rank = u.shape[1]


class PivotLinear(nn.Module):
    """The factorised form; its forward in the research code leaves the bias out."""

    def __init__(self, parts: dict[str, torch.Tensor], bias: torch.Tensor | None) -> None:
        super().__init__()
        self.ALinear = _linear(parts["coefficients"], None)
        self.BLinear = _linear(parts["pivot_weight"], None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.register_buffer("true_idx", parts["others"])
        self.register_buffer("false_idx", parts["pivots"])
        self.d_out = len(parts["others"]) + len(parts["pivots"])
        self.inplace = False


SVDLinear.__module__, PivotLinear.__module__ = "utils.utils", "utils.linear_pivot"


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


@contextmanager
def research_modules() -> Iterator[None]:
    """Makes `utils.utils` and `utils.linear_pivot` importable, as pickle wants while it saves."""
    package, layers, pivot = (types.ModuleType(name) for name in ("utils", "utils.utils", "utils.linear_pivot"))
    layers.SVDLinear, pivot.PivotLinear = SVDLinear, PivotLinear  # type: ignore[attr-defined]
    package.utils, package.linear_pivot = layers, pivot  # type: ignore[attr-defined]
    added = {"utils": package, "utils.utils": layers, "utils.linear_pivot": pivot}
    assert not added.keys() & sys.modules.keys()
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def save_research(path: Path, model: nn.Module, tokenizer: object = None) -> Path:
    with research_modules():
        torch.save({"model": model, "tokenizer": tokenizer}, path)
    return path


Layout = Callable[[torch.Tensor], torch.Tensor]


def compressed(
    model: PreTrainedModel, form: str, *, shuffled: bool = False, skip: str = "lm_head", layout: Layout | None = None
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Returns a copy with layers of the given form, and a float64 dense copy with the products in their place.

    Args:
        model: dense model.
        form: "svd" or "pivot".
        shuffled: pivot rows and other rows in random order.
        skip: linears whose name contains this stay dense.
        layout: how a weight lies in memory; must return an equal tensor.
    """
    packed, dense = copy.deepcopy(model), copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(7)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and skip not in name]
    for count, name in enumerate(names):
        linear = model.get_submodule(name)
        rank = 5 + count % 7
        layer, product = _layer(linear, rank, form, shuffled, generator, layout or (lambda weight: weight))
        packed.set_submodule(name, layer)
        dense.get_submodule(name).weight = nn.Parameter(product)
    return packed, dense


def _layer(
    linear: nn.Linear, rank: int, form: str, shuffled: bool, generator: torch.Generator, layout: Layout
) -> tuple[nn.Module, torch.Tensor]:
    dtype, (m, n) = linear.weight.dtype, linear.weight.shape

    def noise(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    bias = None if linear.bias is None else linear.bias.detach().clone()
    if form == "svd":
        u, v = noise(m, rank), noise(rank, n)
        return SVDLinear(layout(u), layout(v), bias), u.double() @ v.double()
    order = torch.randperm(m, generator=generator)
    pivots, others = order[:rank].clone(), order[rank:].clone()
    if not shuffled:
        pivots, others = pivots.sort().values, others.sort().values
    pivot_weight, coefficients = noise(rank, n), noise(m - rank, rank)
    product = torch.empty(m, n, dtype=torch.float64)
    for at, row in enumerate(pivots.tolist()):
        product[row] = pivot_weight[at].double()
    for at, row in enumerate(others.tolist()):
        product[row] = coefficients[at].double() @ pivot_weight.double()
    parts = {
        "pivot_weight": layout(pivot_weight),
        "coefficients": layout(coefficients),
        "pivots": pivots,
        "others": others,
    }
    return PivotLinear(parts, bias), product


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes], **zip_options: Any) -> Path:
    """Copies a zip file member by member through `change(name below the top folder, content)`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **zip_options) as new:
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
    return target


def global_only(module: str, name: str) -> bytes:
    """Returns a pickle of one global."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."


def imported(source: Path, target: Path, **options: Any) -> ImportSummary:
    return import_checkpoint(source, target, options=ImportOptions(**options))


def relative_error(folder: Path, dense: nn.Module) -> float:
    """Relative L2 difference of logits between the imported folder and the dense model, both in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").double().eval()
    with torch.no_grad():
        found, truth = model(input_ids=TOKENS).logits, dense(input_ids=TOKENS).logits
    return float((found - truth).norm() / truth.norm())


def untouched(target: Path) -> bool:
    """Neither the output nor a part of it is there."""
    return not target.exists() and not list(target.parent.glob(f".{target.name}.partial*"))


def refused(source: Path, target: Path, message: str) -> None:
    """Asserts that the import is refused with this message and leaves nothing behind."""
    with pytest.raises(InputRefusedError, match=message):
        imported(source, target)
    assert untouched(target)


def archive_of(path: Path, pickled: bytes, **members: bytes) -> Path:
    """Writes a zip file with this data.pkl and nothing else but `members`."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in {"byteorder": b"little", **members}.items():
            file.writestr(f"archive/{name}", content)
    return path
