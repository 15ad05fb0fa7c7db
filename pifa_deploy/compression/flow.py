"""Calibration tokens on their way through a model, one decoder layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pifa_deploy.calibration import check_vocabulary
from pifa_deploy.compression.activations import ActivationStore
from pifa_deploy.compression.decoder import (
    Halt,
    LayerCall,
    LinearGroup,
    decoder_layers,
    halting,
    input_hooks,
    record_calls,
    returns_tuple,
    same_calls,
)
from pifa_deploy.compression.distributed import Processes
from pifa_deploy.compression.options import CompressOptions
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.model_folder import torch_dtype

DENSE, COMPRESSED = "dense", "compressed"


@dataclass(frozen=True, kw_only=True)
class Flows:
    """This process' calibration batches on their way through the layers.

    Attributes:
        store: what enters the next layer, in the slots DENSE and COMPRESSED as far as the method needs them.
        numbers: of this process' batches among those of all processes.
        shapes: number -> (windows, tokens).
        calls: shape -> how the model calls each of its layers with such a batch.
    """

    store: ActivationStore
    numbers: tuple[int, ...]
    shapes: Mapping[int, tuple[int, int]]
    calls: Mapping[tuple[int, int], Sequence[LayerCall]]

    def call(self, batch: int, layer: int) -> LayerCall:
        """Returns how the model calls a layer with a batch."""
        return self.calls[self.shapes[batch]][layer]


@contextmanager
def open_flows(
    model: PreTrainedModel, windows: torch.Tensor, options: CompressOptions, *, group: Processes
) -> Iterator[Flows]:
    """Yields the flows at the entry of the first layer; what they keep is gone when the block ends.

    Args:
        model: the dense model; not changed.
        windows: int64 [samples, tokens] for all processes together.
        options: which flows are needed, and how activations are kept.
        group: the processes; each takes every count-th batch.

    Raises:
        InputRefusedError: a token that the model does not know, or a model whose layers need more of a token than
            its hidden states.
        ValueError: fewer batches than processes, or windows longer than the model has positions for.
        OutputError: activations cannot be written.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and windows.shape[1] > positions:
        raise ValueError(
            f"the calibration windows have {windows.shape[1]} tokens, the model has positions for {positions}; lower "
            "--sequence-length"
        )
    windows_each = max(1, options.activations.batch_tokens // windows.shape[1])
    batches = dict(enumerate(torch.split(windows, windows_each)))
    mine = group.mine(list(batches))
    if len(batches) < group.count:
        raise ValueError(
            f"{len(windows)} calibration windows make {len(batches)} batches for {group.count} processes; expected at "
            "least one each, give more samples or fewer --batch-tokens"
        )
    needs_dense = options.needs_dense_flow or options.layer_density != "uniform"
    flows = [name for name, needed in ((DENSE, needs_dense), (COMPRESSED, options.needs_compressed_flow)) if needed]
    store = ActivationStore(torch_dtype(options.activations.dtype), folder=options.activations.folder)
    try:
        with _outside_layers_on(model, group.device) as layers:
            entered = _entered(model, layers, {number: batches[number] for number in mine}, store=store, flows=flows)
        yield entered
    finally:
        store.close()


def _entered(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    batches: Mapping[int, torch.Tensor],
    *,
    store: ActivationStore,
    flows: Sequence[str],
) -> Flows:
    embedding = model.get_input_embeddings()
    calls: dict[tuple[int, int], Sequence[LayerCall]] = {}
    as_tuple = returns_tuple(model, layers)
    for number, ids in batches.items():
        check_vocabulary(ids, embedding.num_embeddings)
        hidden, found = record_calls(model, layers, ids.to(embedding.weight.device), as_tuple=as_tuple)
        if not same_calls(calls.setdefault((ids.shape[0], ids.shape[1]), found), found):
            raise InputRefusedError(
                f"{type(model).__name__} passes its decoder layers what depends on the text beside hidden states; such "
                "models cannot be compressed layer by layer"
            )
        for flow in flows:
            store.put(flow, number, hidden, name="what enters the first decoder layer")
    shapes = {number: (ids.shape[0], ids.shape[1]) for number, ids in batches.items()}
    return Flows(store=store, numbers=tuple(batches), shapes=shapes, calls=calls)


@contextmanager
def _outside_layers_on(model: PreTrainedModel, device: torch.device) -> Iterator[nn.ModuleList]:
    """Computes all of a model but its layers in float32 on `device`; the weights in their mapped file are kept."""
    path, layers = decoder_layers(model, "model")

    def move(**to: Any) -> None:
        # Taken out for the move: the layers must stay as they are.
        model.set_submodule(path, nn.ModuleList())
        try:
            model.to(**to)
        finally:
            model.set_submodule(path, layers)

    mapped = {name: parameter.data for name, parameter in model.named_parameters()}
    move(device=device, dtype=torch.float32)
    try:
        yield layers
    finally:
        for name, data in mapped.items():
            model.get_parameter(name).data = data
        move(device=torch.device("cpu"))


def resident(layer: nn.Module, device: torch.device) -> nn.Module:
    """Returns a float32 copy of a layer on `device`; the layer's own weights stay in their mapped file."""
    return copy.deepcopy(layer).to(device=device, dtype=torch.float32)


class LayerFlow:
    """One flow through one decoder layer: passes that stop at a group of linears, and the one to the end."""

    def __init__(self, flows: Flows, name: str, layer: nn.Module, *, number: int) -> None:
        """Takes a resident layer, whose linears may be replaced between passes; `name` is DENSE or COMPRESSED."""
        self._layer, self._number, self._flow = layer, number, name
        self._flows, self._store = flows, flows.store
        self._device = next(layer.parameters()).device
        self._settled: list[str] = []
        self._lengths: dict[str, int] = {}

    def inputs(self, group: LinearGroup) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields (batch, inputs [windows, tokens, n] fp32) of a group of linears, without running them."""
        for batch in self._flows.numbers:
            found: list[torch.Tensor] = []

            def take(value: torch.Tensor, found: list[torch.Tensor] = found) -> None:
                found.append(value)
                raise Halt

            with input_hooks(self._layer, {group.names[0]: take}), halting():
                self._run(batch)
            yield batch, found[0]

    def finish(self, hooks: Callable[[int], Mapping[str, Callable[[torch.Tensor], None]]] | None = None) -> None:
        """Runs the whole layer and puts its output in place of its input.

        Args:
            hooks: batch -> linear's name -> function of its input.
        """
        for batch in self._flows.numbers:
            with input_hooks(self._layer, hooks(batch) if hooks else {}):
                self._store.put(self._flow, batch, self._run(batch), name=f"{self._flow} layer {self._number} output")
        for name in self._settled:
            self._store.drop(self._slot(name))

    def settle(self, name: str) -> None:
        """Takes note that a child module will not change any more: it is computed once, then its output kept."""
        self._settled.append(name)

    def _run(self, batch: int) -> torch.Tensor:
        hidden = self._store.get(self._flow, batch, self._device)
        with torch.no_grad(), self._remembered(batch):
            return self._flows.call(batch, self._number).run(self._layer, hidden)

    def _slot(self, name: str) -> str:
        return f"{self._flow} layer {self._number} {name} output"

    @contextmanager
    def _remembered(self, batch: int) -> Iterator[None]:
        children = [self._layer.get_submodule(name) for name in self._settled]
        for name, child in zip(self._settled, children, strict=True):
            child.forward = self._remembering(name, child.forward, batch)
        try:
            yield
        finally:
            for child in children:
                del child.forward

    def _remembering(self, name: str, forward: Callable[..., Any], batch: int) -> Callable[..., Any]:
        def remembered(*args: Any, **kwargs: Any) -> Any:
            slot = self._slot(name)
            if not self._store.has(slot, batch):
                result = forward(*args, **kwargs)
                if isinstance(result, tuple):
                    self._lengths[name] = len(result)
                self._store.put(slot, batch, result[0] if isinstance(result, tuple) else result)
            # As the store rounds it, the first time too. Attention returns (output, weights); nobody reads the
            # weights, which SDPA does not make.
            value = self._store.get(slot, batch, self._device)
            return (value, *[None] * (self._lengths[name] - 1)) if name in self._lengths else value

        return remembered
