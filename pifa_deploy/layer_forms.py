"""The forms in which one factorised layer can be computed: as it is stored, as a low-rank pair, or dense."""

from __future__ import annotations

import torch
from torch import nn

from pifa_deploy.layouts import layout_of, low_rank_pair
from pifa_deploy.linear import LowRankLinear
from pifa_deploy.transformers_quantizer import FactorisedLinear, factorised_modules

STORED = "stored"
LOW_RANK = "lowrank"
DENSE = "dense"
FORMS = (STORED, LOW_RANK, DENSE)


def as_form(layer: FactorisedLinear, form: str) -> nn.Module:
    """Returns a layer of the same matrix in another form, its numbers rounded to the stored dtype once.

    Args:
        layer: a factorised layer.
        form: "stored" returns the layer itself; "lowrank" the balanced pair of the same rank; "dense" an nn.Linear.

    Raises:
        ValueError: an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, expected one of {FORMS}")
    if form == STORED:
        return layer
    dtype = next(layer.parameters()).dtype
    u, v = low_rank_pair(layer)
    if form == LOW_RANK:
        left, right = balanced_pair(u, v)
        return LowRankLinear.from_pair(left.to(dtype), right.to(dtype), layer.bias)
    with torch.device("meta"):
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    dense.weight = nn.Parameter((u @ v).to(dtype), requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return dense


def balanced_pair(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the pair [m, r], [r, n] of the same product that shares its singular values evenly between the two."""
    basis, triangle = torch.linalg.qr(left)
    u, s, v = torch.linalg.svd(triangle @ right, full_matrices=False)
    root = s.sqrt()
    # Contiguous: LAPACK's factors are not, and safetensors writes nothing else.
    return ((basis @ u) * root).contiguous(), (root[:, None] * v).contiguous()


def multiplications(layer: FactorisedLinear) -> int:
    """Returns the multiplications a token that a layer takes in a runtime without a plugin.

    An index in the weights makes them those of a low-rank pair, see `onnx_passes`; larger layers take fewer.
    """
    extra = layer.rank if layout_of(layer) in ("lowrank", "pivoted") else 0
    return layer.rank * (layer.out_features + layer.in_features - layer.rank + extra)


def leave_dense(model: nn.Module) -> list[str]:
    """Replaces, in place, each factorised layer that takes no fewer multiplications than a dense one; names them."""
    left = []
    for path, layer in factorised_modules(model).items():
        if multiplications(layer) >= layer.out_features * layer.in_features:
            model.set_submodule(path, as_form(layer, DENSE))
            left.append(path)
    return left
