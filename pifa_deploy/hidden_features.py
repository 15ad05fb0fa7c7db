"""Where a model's features may be numbered at will: between linears with nothing but elementwise steps in between."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pifa_deploy.transformers_quantizer import KINDS, FactorisedLinear

_LINEARS = (nn.Linear, *KINDS.values())
_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class HiddenFeatures:
    """Features that one module's linears make and consume, and that no one else sees.

    Attributes:
        module: path of the module, "" for the root.
        producers: names of its linears whose outputs are the features.
        consumer: name of its linear whose inputs they are.
    """

    module: str
    producers: tuple[str, ...]
    consumer: str

    def paths(self) -> tuple[str, ...]:
        """Returns the paths of the producers and then of the consumer."""
        prefix = f"{self.module}." if self.module else ""
        return tuple(f"{prefix}{name}" for name in (*self.producers, self.consumer))


def hidden_features(model: nn.Module) -> list[HiddenFeatures]:
    """Finds the hidden features of every MLP of a model, of whatever architecture.

    A module qualifies when it maps one tensor [..., n] and renumbering the outputs of some of its direct linears
    together with the inputs of another changes nothing: that is tried out, with random weights, once for all modules
    of a kind. Attention fails the trial (its heads and rotations have places), a gated or plain MLP passes it.
    """
    tried: dict[tuple[Any, ...], bool] = {}
    found = []
    for path, module in model.named_modules():
        for candidate in _candidates(path, module):
            shapes = tuple(_shape(getattr(module, name)) for name in (*candidate.producers, candidate.consumer))
            kind = (type(module), candidate.producers, candidate.consumer, shapes)
            if kind not in tried:
                tried[kind] = _renumbering_is_free(module, candidate)
            if tried[kind]:
                found.append(candidate)
    return found


def _shape(linear: nn.Linear | FactorisedLinear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _candidates(path: str, module: nn.Module) -> list[HiddenFeatures]:
    linears = {name: child for name, child in module.named_children() if isinstance(child, _LINEARS)}
    found = []
    for consumer, child in linears.items():
        producers = tuple(
            name for name, other in linears.items() if name != consumer and other.out_features == child.in_features
        )
        if producers:
            found.append(HiddenFeatures(module=path, producers=producers, consumer=consumer))
    return found


@torch.no_grad()
def _renumbering_is_free(module: nn.Module, candidate: HiddenFeatures) -> bool:
    """Tells whether the module gives the same outputs after its hidden features are renumbered."""
    generator = torch.Generator().manual_seed(0)
    linears = {name: child for name, child in module.named_children() if isinstance(child, _LINEARS)}
    # What is replaced below must not be copied, nor what it holds.
    trial = copy.deepcopy(module, {id(child): child for child in linears.values()}).eval()
    weights = {}
    for name, child in linears.items():
        dense = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device="cpu")
        for parameter in dense.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * child.in_features**-0.5)
        weights[name] = dense
        setattr(trial, name, dense)
    x = torch.randn(1, 5, weights[candidate.producers[0]].in_features, generator=generator)
    try:
        before = trial(x)
        order = torch.randperm(weights[candidate.consumer].in_features, generator=generator)
        for name in candidate.producers:
            for parameter in weights[name].parameters():
                parameter.copy_(parameter[order])
        weights[candidate.consumer].weight.copy_(weights[candidate.consumer].weight[:, order])
        after = trial(x)
    except Exception:  # a foreign module may fail in any way when it is called so, and then it is no MLP
        return False
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    size = float(before.norm())
    return size > 0 and float((after - before).norm()) <= _TOLERANCE * size
