"""The decoder layers of a causal LM: how the model calls each, and its linears in the order of their inputs."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pifa_deploy.compression.linear_shape import LinearShape
from pifa_deploy.errors import InputRefusedError, StageFailedError
from pifa_deploy.sparse_checkpoint import GROUP
from pifa_deploy.transformers_quantizer import factorised_modules


class Halt(Exception):
    """Ends a forward pass at the point where a hook has what it wants."""


@dataclass(frozen=True, kw_only=True)
class LinearGroup:
    """Linears of one decoder layer that read the same tensor.

    Attributes:
        names: module paths within the layer, in call order; the first is called first.
        in_features: n of all of them.
    """

    names: tuple[str, ...]
    in_features: int


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """What the model passes to a decoder layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the layer's new hidden states [batch, tokens, features]."""
        result = layer(hidden, *self.args, **self.kwargs)
        out: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return out


def decoder_layers(model: PreTrainedModel, where: str) -> tuple[str, nn.ModuleList]:
    """Returns the path and the list of a model's decoder layers: the module list with the most linear layers.

    Raises:
        InputRefusedError: the model has no linear layers in a module list, or is factorised already.
    """
    if factorised_modules(model):
        raise InputRefusedError(f"{where}: is factorised already; give the dense model")
    counts = {
        name: sum(isinstance(inner, nn.Linear) for inner in module.modules())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    # A list inside a list (experts) has fewer linears than the outer one, which comes first.
    best = max(counts, key=lambda name: counts[name], default="")
    if not counts.get(best):
        raise InputRefusedError(f"{where}: {type(model).__name__} has no nn.Linear layers to factorise")
    layers = model.get_submodule(best)
    assert isinstance(layers, nn.ModuleList)
    return best, layers


def record_calls(
    model: PreTrainedModel, layers: nn.ModuleList, ids: torch.Tensor, *, as_tuple: bool
) -> tuple[torch.Tensor, list[LayerCall]]:
    """Returns the hidden states that enter the first layer, and how the model calls each layer.

    No layer is computed: each hands its input on, and the pass ends at the last.

    Args:
        model: causal LM in eval mode.
        layers: its decoder layers.
        ids: int64 [batch, tokens]; the calls fit batches of this shape only.
        as_tuple: what `returns_tuple` says.
    """
    hidden: list[torch.Tensor] = []
    calls: list[LayerCall] = []

    def recorder(*args: Any, **kwargs: Any) -> Any:
        kwargs = dict(kwargs)
        first, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        hidden.append(first)
        calls.append(LayerCall(args=rest, kwargs=kwargs))
        if len(calls) == len(layers):
            raise Halt
        return (first,) if as_tuple else first

    with _replaced_forward(layers, recorder), torch.no_grad(), halting():
        model(input_ids=ids, use_cache=False)
    if len(calls) != len(layers):
        raise StageFailedError(
            f"{type(model).__name__} called {len(calls)} of its {len(layers)} decoder layers; expected each once"
        )
    return hidden[0], calls


def same_calls(one: Sequence[LayerCall], other: Sequence[LayerCall]) -> bool:
    """Tells whether two passes give the layers the same tensors beside hidden states."""
    compared: set[tuple[int, int]] = set()

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            # Layers share their masks and positions.
            known = (id(a), id(b)) in compared
            compared.add((id(a), id(b)))
            return known or torch.equal(a, b)
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return isinstance(a, torch.Tensor) == isinstance(b, torch.Tensor)

    return all(same((a.args, a.kwargs), (b.args, b.kwargs)) for a, b in zip(one, other, strict=True))


def linear_groups(layer: nn.Module, call: LayerCall, hidden: torch.Tensor) -> list[LinearGroup]:
    """Returns a decoder layer's linears, grouped by the tensor they read, groups in call order.

    q, k and v form a group; so do gate and up. Linears that are never called are in no group.

    Args:
        layer: the dense layer.
        call: its call for the shape of `hidden`.
        hidden: [batch, tokens, features].
    """
    seen: list[tuple[torch.Tensor, list[str], int]] = []

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
            if any(name in names for _, names, _ in seen):
                return
            for tensor, names, _ in seen:
                if tensor is inputs[0]:
                    names.append(name)
                    return
            # The tensor is kept: the identity of one that is gone may come again.
            seen.append((inputs[0], [name], module.in_features))

        return note

    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        with torch.no_grad():
            call.run(layer, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return [LinearGroup(names=tuple(names), in_features=features) for _, names, features in seen]


def linear_shapes(
    path: str, layers: nn.ModuleList, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[LinearShape]:
    """Returns the linears to compress.

    Args:
        path: of `layers` in the model.
        layers: the decoder layers.
        include: patterns (fnmatch) of full module paths; all linears when empty.
        exclude: patterns of linears to leave out.

    Raises:
        ValueError: the patterns leave none.
    """

    def wanted(name: str) -> bool:
        chosen = not include or any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
        return chosen and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)

    names: dict[str, tuple[int, nn.Module, str, nn.Linear]] = {
        f"{path}.{number}.{name}": (number, layer, name, module)
        for number, layer in enumerate(layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and _maps_vectors(module)
    }
    found = [
        LinearShape(
            name=full,
            layer=number,
            kind=_kind(layer, name),
            out_features=module.out_features,
            in_features=module.in_features,
        )
        for full, (number, layer, name, module) in names.items()
        if wanted(full)
    ]
    if not found:
        raise ValueError(
            f"include {list(include)} and exclude {list(exclude)} leave no linear to compress; expected patterns for "
            f"names like {next(iter(names))}"
        )
    return found


def _maps_vectors(module: nn.Linear) -> bool:
    """Tells a linear from its subclasses that return something else: routers of experts (Llama 4, PhiMoE)."""
    if type(module).forward is nn.Linear.forward:
        return True
    with torch.no_grad():
        found = module(module.weight.new_zeros(1, module.in_features))
    return isinstance(found, torch.Tensor) and found.shape == (1, module.out_features)


def check_prunable(shapes: Sequence[LinearShape]) -> None:
    """Raises ValueError naming a linear whose inputs do not come in groups of four."""
    for shape in shapes:
        if shape.in_features % GROUP:
            raise ValueError(
                f"{shape.name} has {shape.in_features} inputs, 2:4 needs a multiple of {GROUP}; leave it out with "
                "--exclude"
            )


def _kind(layer: nn.Module, name: str) -> str:
    """Returns "attention" when some module around the linear is an attention by its class name, else "mlp"."""
    parts = name.split(".")[:-1]
    owners = (layer.get_submodule(".".join(parts[: depth + 1])) for depth in range(len(parts)))
    return "attention" if any("attention" in type(owner).__name__.lower() for owner in owners) else "mlp"


@contextmanager
def halting() -> Iterator[None]:
    """Lets a block end at `Halt`."""
    try:
        yield
    except Halt:
        return


@contextmanager
def input_hooks(layer: nn.Module, hooks: Mapping[str, Callable[[torch.Tensor], None]]) -> Iterator[None]:
    """Calls `hooks[name](input)` before each named linear of `layer` runs, while the block lasts."""

    def adapted(hook: Callable[[torch.Tensor], None]) -> Callable[..., None]:
        return lambda module, inputs: hook(inputs[0])

    handles = [layer.get_submodule(name).register_forward_pre_hook(adapted(hook)) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced_forward(layers: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    # On the instance, so that whatever else the model asks of a layer (its kind of attention) is there.
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def returns_tuple(model: PreTrainedModel, layers: nn.ModuleList) -> bool:
    """Tells whether the model's decoder layers return a tuple, by computing two tokens in the first one.

    The layers may be on another device and in another dtype than the rest of the model.
    """
    found: list[bool] = []
    entry = model.get_input_embeddings().weight
    first = copy.deepcopy(layers[0]).to(entry)

    def compute(*args: Any, **kwargs: Any) -> Any:
        found.append(isinstance(first(*args, **kwargs), tuple))
        raise Halt

    ids = torch.zeros(1, 2, dtype=torch.int64, device=entry.device)
    with _replaced_forward(layers, compute), torch.no_grad(), halting():
        model(input_ids=ids, use_cache=False)
    return bool(found and found[0])
