"""The decoder layers of a model one after the other: statistics, solves, and on to the next with what was stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from pifa_deploy.compression.clock import StepClock
from pifa_deploy.compression.decoder import LinearGroup, linear_groups
from pifa_deploy.compression.distributed import Processes
from pifa_deploy.compression.flow import COMPRESSED, DENSE, Flows, LayerFlow, resident
from pifa_deploy.compression.options import CompressOptions
from pifa_deploy.compression.replacement import Replacement
from pifa_deploy.compression.resume import ResumeFolder
from pifa_deploy.compression.solving import Target, merged, solve_group
from pifa_deploy.compression.statistics import InputMoments
from pifa_deploy.errors import StageFailedError


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """How one decoder layer went.

    Attributes:
        layer: number of the layer, from 0.
        layers: number of layers.
        error: mean relative output error of its linears on the inputs that they have in the compressed model.
        drift: relative difference of its output between the compressed and the dense model; None without both.
        seconds: spent on this layer; 0 when an earlier run had finished it.
        seconds_left: at the pace so far.
    """

    layer: int
    layers: int
    error: float
    drift: float | None
    seconds: float
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """What all layers share.

    Attributes:
        path: of the decoder layers in the model.
        layers: the dense decoder layers, in their mapped file.
        ranks: full path of each linear to replace -> rank; 0 for 2:4 pruning.
        options: method and what belongs to it.
        group: the processes.
        flows: calibration tokens on their way; None for methods that look at weights alone.
        clock: where time goes.
        groups: linears that read the same tensor, by the names of a layer's linears.
    """

    path: str
    layers: nn.ModuleList
    ranks: Mapping[str, int]
    options: CompressOptions
    group: Processes
    flows: Flows | None
    clock: StepClock
    groups: dict[tuple[str, ...], list[LinearGroup]] = field(default_factory=dict)

    def run(self, resume: ResumeFolder | None, report: Callable[[LayerReport], None]) -> None:
        """Replaces layer after layer; each is in `resume` when it is done.

        Args:
            resume: the state; the main process has it, the others None.
            report: called by the main process after each layer.

        Raises:
            StageFailedError: NaN or Inf activations, a linear that is never called, a process that died.
            FactorizationError: a linear has no usable pivot factors; names it.
        """
        finished: int = self.group.from_main(resume.finished() if resume else 0)
        began = self.clock.total()
        for number in range(len(self.layers)):
            started = self.clock.total()
            known = number < finished
            found = self.group.from_main(resume.load(number, copy=True) if resume else None) if known else None
            replacements = self._layer(number, found)
            if resume and not known:
                resume.save(number, replacements)
            drift = self._drift()
            now = self.clock.total()
            pace = (now - began) / (number + 1 - finished) if number >= finished else 0.0
            began = began if number >= finished else now
            if self.group.is_main:
                errors = [entry.error for entry in replacements.values()]
                report(
                    LayerReport(
                        layer=number,
                        layers=len(self.layers),
                        error=sum(errors) / max(len(errors), 1),
                        drift=drift,
                        seconds=0.0 if known else now - started,
                        seconds_left=pace * (len(self.layers) - number - 1),
                    )
                )

    def _layer(self, number: int, known: dict[str, Replacement] | None) -> dict[str, Replacement]:
        """Replaces one layer's linears, or takes what is known, and moves the flows past it."""
        if self.flows is None:
            if known is not None:
                return known
            dense = resident(self.layers[number], self.group.device)
            targets = self._targets(number, dense)
            mine = {name: targets[name] for name in self.group.mine(list(targets))}
            parts = self.group.gather(solve_group(mine, None, self.options, clock=self.clock))
            return merged(parts, list(targets))
        dense = resident(self.layers[number], self.group.device)
        targets = self._targets(number, dense)
        groups = self._groups(number, dense, targets)
        if self.options.needs_compressed_flow:
            self._dense_pass(number, dense, groups if known is None else [])
            return self._compressed_pass(number, targets, groups, known=known)
        moments = self._dense_moments(number, dense, groups if known is None else [])
        return known if known is not None else self._solved(groups, targets, moments)

    def _targets(self, number: int, dense: nn.Module) -> dict[str, Target]:
        found = {}
        for name, module in dense.named_modules():
            path = f"{self.path}.{number}.{name}"
            if path in self.ranks and isinstance(module, nn.Linear):
                found[name] = Target(path=path, layer=module, rank=self.ranks[path])
        return found

    def _groups(self, number: int, dense: nn.Module, targets: Mapping[str, Target]) -> list[LinearGroup]:
        """Returns the groups of linears to replace; layers with the same linears have the same groups."""
        assert self.flows is not None
        names = tuple(name for name, module in dense.named_modules() if isinstance(module, nn.Linear))
        if names not in self.groups:
            batch = self.flows.numbers[0]
            flow = COMPRESSED if self.options.needs_compressed_flow else DENSE
            hidden = self.flows.store.get(flow, batch, self.group.device)
            with self.clock.step("forward"):
                self.groups[names] = linear_groups(dense, self.flows.call(batch, number), hidden)
        called = {name for group in self.groups[names] for name in group.names}
        for name, target in targets.items():
            if name not in called:
                raise StageFailedError(f"{target.path} was never called in calibration; leave it out with --exclude")
        restricted = [
            LinearGroup(names=tuple(name for name in group.names if name in targets), in_features=group.in_features)
            for group in self.groups[names]
        ]
        return [group for group in restricted if group.names]

    def _dense_pass(self, number: int, dense: nn.Module, groups: Sequence[LinearGroup]) -> None:
        """Moves the dense flow past the layer and keeps what enters each group of linears."""
        if not self.options.needs_dense_flow:
            return
        assert self.flows is not None
        store, path = self.flows.store, f"{self.path}.{number}"

        def hooks(batch: int) -> dict[str, Callable[[torch.Tensor], None]]:
            def keep(name: str) -> Callable[[torch.Tensor], None]:
                return lambda value: store.put(f"{path}.{name} input", batch, value)

            return {group.names[0]: keep(group.names[0]) for group in groups}

        with self.clock.step("forward"):
            LayerFlow(self.flows, DENSE, dense, number=number).finish(hooks)

    def _dense_moments(self, number: int, dense: nn.Module, groups: Sequence[LinearGroup]) -> list[InputMoments]:
        """Moves the dense flow past the layer and returns the moments of each group's inputs."""
        assert self.flows is not None
        moments = [InputMoments(group.in_features, self.group.device, cross=False) for group in groups]
        taken = {group.names[0]: moment.add for group, moment in zip(groups, moments, strict=True)}
        with self.clock.step("forward and statistics"):
            LayerFlow(self.flows, DENSE, dense, number=number).finish(lambda batch: taken)
        for group, moment in zip(groups, moments, strict=True):
            moment.reduce(self.group, f"{self.path}.{number}.{group.names[0]}")
        return moments

    def _solved(
        self, groups: Sequence[LinearGroup], targets: Mapping[str, Target], moments: Sequence[InputMoments]
    ) -> dict[str, Replacement]:
        found: dict[str, Replacement] = {}
        for group, moment in zip(groups, moments, strict=True):
            mine = {name: targets[name] for name in self.group.mine(group.names)}
            parts = self.group.gather(solve_group(mine, moment, self.options, clock=self.clock))
            found |= merged(parts, group.names)
        return found

    def _compressed_pass(
        self,
        number: int,
        targets: Mapping[str, Target],
        groups: Sequence[LinearGroup],
        *,
        known: dict[str, Replacement] | None,
    ) -> dict[str, Replacement]:
        """Moves the compressed flow past the layer, group by group: what is solved is what the next group sees."""
        assert self.flows is not None
        layer = resident(self.layers[number], self.group.device)
        flow = LayerFlow(self.flows, COMPRESSED, layer, number=number)
        found: dict[str, Replacement] = {}
        for group in groups:
            if known is None:
                solved = self._solved([group], targets, [self._group_moments(number, group, flow)])
            else:
                solved = {name: known[name] for name in group.names}
            self._put_in(layer, solved)
            found |= solved
            # After the last group the layer runs once more, and nothing would be read again. What is known is kept
            # and rounded alike: the next layer must see the same bits.
            for name in _settled_children(layer, targets, found, group) if group is not groups[-1] else ():
                flow.settle(name)
        with self.clock.step("forward"):
            flow.finish()
        return found

    def _group_moments(self, number: int, group: LinearGroup, flow: LayerFlow) -> InputMoments:
        assert self.flows is not None
        slot = f"{self.path}.{number}.{group.names[0]} input"
        cross = self.options.needs_dense_flow
        moments = InputMoments(group.in_features, self.group.device, cross=cross)
        items = flow.inputs(group)
        while True:
            with self.clock.step("forward"):
                item = next(items, None)
            if item is None:
                break
            with self.clock.step("statistics"):
                moments.add(item[1], self.flows.store.get(slot, item[0], self.group.device) if cross else None)
        self.flows.store.drop(slot)
        moments.reduce(self.group, f"{self.path}.{number}.{group.names[0]}")
        return moments

    def _put_in(self, layer: nn.Module, replacements: Mapping[str, Replacement]) -> None:
        for name, entry in replacements.items():
            dense = layer.get_submodule(name)
            assert isinstance(dense, nn.Linear)
            layer.set_submodule(name, entry.flow_module(dense))

    def _drift(self) -> float | None:
        """Returns the relative difference between the two flows."""
        if self.flows is None or not (self.options.needs_dense_flow and self.options.needs_compressed_flow):
            return None
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in self.flows.numbers:
            dense, found = (self.flows.store.get(flow, batch, torch.device("cpu")) for flow in (DENSE, COMPRESSED))
            sums += torch.stack([(dense - found).double().square().sum(), dense.double().square().sum()])
        miss, size = self.group.sum(sums.to(self.group.device)).tolist()
        return float((miss / size) ** 0.5) if size else 0.0


def _settled_children(
    layer: nn.Module, targets: Mapping[str, Target], found: Mapping[str, Replacement], group: LinearGroup
) -> list[str]:
    """Returns the direct children that `group` completed: all their targets are replaced now."""
    settled = []
    for child in dict.fromkeys(name.partition(".")[0] for name in group.names):
        inside = [name for name in targets if name.partition(".")[0] == child and name != child]
        if inside and all(name in found for name in inside):
            settled.append(child)
    return settled
