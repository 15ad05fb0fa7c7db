"""The low-rank model of exactly the same ranks: the same function as a PIFA model, stored as U, V."""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm

from pifa_deploy.errors import FactorizationError
from pifa_deploy.layer_forms import LOW_RANK, as_form
from pifa_deploy.linear import LowRankLinear
from pifa_deploy.transformers_quantizer import factorised_modules


def to_low_rank(model: nn.Module) -> None:
    """Stores every PIFA layer of a model as its balanced pair U, V, in place; ranks, dtypes and biases stay.

    Raises:
        FactorizationError: a pair is not finite in the layer's dtype; names the module.
    """
    layers = {name: layer for name, layer in factorised_modules(model).items() if not isinstance(layer, LowRankLinear)}
    for name, layer in tqdm(layers.items(), desc="low rank", unit="layer", disable=None, leave=False):
        pair = as_form(layer, LOW_RANK)
        if not all(bool(torch.isfinite(factor).all()) for factor in pair.parameters()):
            raise FactorizationError(f"{name}: its low-rank pair is not finite in its dtype; store the model in fp32")
        model.set_submodule(name, pair)
