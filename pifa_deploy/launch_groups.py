"""Layers that read the same tensor share their kernel launches: q·k·v and gate·up, found by watching a model run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import nn

from pifa_deploy.cuda_kernels import PivotLayer
from pifa_deploy.linear import PifaLinear

MAX_GROUP = 8  # PIFA_MAX_GROUP of pifaLinear.h
Apply = Callable[[Sequence[PivotLayer], torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True, kw_only=True, eq=False)
class LaunchGroups:
    """Layers of a model that now share launches.

    Attributes:
        paths: the paths of each group's layers, in the order in which the model calls them.
    """

    paths: tuple[tuple[str, ...], ...]
    _modules: tuple[PifaLinear, ...] = field(repr=False)

    def remove(self) -> None:
        """Lets every layer run alone again."""
        for module in self._modules:
            module.__dict__.pop("forward", None)


def group_launches(model: nn.Module, apply: Apply, *, example: Mapping[str, Any] | None = None) -> LaunchGroups:
    """Makes layers that read the same tensor run together: the first that is called runs all, the others take theirs.

    The model runs once to see who reads what. A group is up to eight `PifaLinear` of one parent module that are
    each called once, with one and the same tensor. Outside of inference (gradients, `torch.compile`, export), and for
    tensors that the kernels do not take, every layer runs as before; so does one that gets another tensor than its
    group. All layers of a group run in the stream in which the first is called.

    Args:
        model: in evaluation mode, on the device where it will run; its layers are changed in place.
        apply: runs layers on one x: `partial(cuda_kernels.apply_group, kernels)`.
        example: keyword arguments of a forward pass; two tokens as `input_ids` if left out.

    Raises:
        ValueError: layers of the model are in groups already.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PifaLinear)}
    for path, module in layers.items():
        if "forward" in module.__dict__:
            raise ValueError(f"{path} shares launches already; call remove() of the earlier groups first")
    paths = _find_groups(model, layers, example)
    for members in paths:
        group = _Group([layers[path] for path in members], apply)
        for place, path in enumerate(members):
            layers[path].forward = partial(group.forward, place)  # type: ignore[method-assign]
    grouped = tuple(layers[path] for members in paths for path in members)
    return LaunchGroups(paths=paths, _modules=grouped)


@torch.no_grad()
def _find_groups(
    model: nn.Module, layers: Mapping[str, PifaLinear], example: Mapping[str, Any] | None
) -> tuple[tuple[str, ...], ...]:
    seen: list[tuple[str, torch.Tensor, int | None]] = []

    def note(path: str, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        # The list keeps the tensor alive, so that no later one has its id.
        seen.append((path, arguments[0], _version(arguments[0])))

    hooks = [layer.register_forward_pre_hook(partial(note, path)) for path, layer in layers.items()]
    try:
        device = next(model.parameters()).device
        model(**(example or {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=device)}))
    finally:
        for hook in hooks:
            hook.remove()
    calls = [path for path, _, _ in seen]
    readers: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for path, x, version in seen:
        if calls.count(path) == 1:
            readers[path.rpartition(".")[0], id(x), version].append(path)
    parts = [tuple(paths[i : i + MAX_GROUP]) for paths in readers.values() for i in range(0, len(paths), MAX_GROUP)]
    return tuple(part for part in parts if len(part) > 1)


def _version(x: torch.Tensor) -> int | None:
    return None if x.is_inference() else x._version


@dataclass(kw_only=True)
class _Shares:
    """What was computed for `x` and not yet taken, by place in the group; `next` is the place behind the last taken."""

    x: torch.Tensor
    version: int | None
    outputs: dict[int, torch.Tensor]
    next: int = 0


class _Group:
    def __init__(self, members: list[PifaLinear], apply: Apply) -> None:
        self.members, self.apply = members, apply
        self.device_type = members[0].pivot_weight.device.type
        self.shares: dict[int, _Shares] = {}  # by thread

    def forward(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Stands in for `forward` of the member at `place`."""
        # Kernels of a GPU must not be given what was moved to the CPU since.
        if not self._is_inference(x) or x.device.type != self.device_type:
            return PifaLinear.forward(self.members[place], x)
        thread = get_ident()
        shares = self.shares.get(thread)
        # The first member always begins anew: what an interrupted pass left behind is not trusted.
        current = shares is not None and place > 0 and place in shares.outputs
        # A tensor of inference mode does not count its changes: its shares go in the order of the members only.
        if shares is not None and x.is_inference():
            current = current and place == shares.next
        if shares is None or not current or shares.x is not x or shares.version != _version(x):
            layers = [_pivot_layer(member) for member in self.members]
            if not all(layer.is_served(x) for layer in layers):
                return PifaLinear.forward(self.members[place], x)
            shares = _Shares(x=x, version=_version(x), outputs=dict(enumerate(self.apply(layers, x))))
            self.shares[thread] = shares
        y = shares.outputs.pop(place)
        shares.next = place + 1
        if not shares.outputs:
            del self.shares[thread]
        return y

    def _is_inference(self, x: torch.Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return False
        wants = x.requires_grad or any(each.requires_grad for member in self.members for each in member.parameters())
        return not (torch.is_grad_enabled() and wants)


def _pivot_layer(module: PifaLinear) -> PivotLayer:
    return PivotLayer(
        pivot_weight=module.pivot_weight,
        coefficients=module.coefficients,
        index=module.output_index,
        bias=module.bias,
    )
