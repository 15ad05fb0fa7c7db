"""Which part of a graph goes wrong first: each is replayed on the reference's own inputs.

The residual stream cuts a decoder into parts, attention and MLP by turns (see `residual_stream`). Errors do not travel:
a part that is given what the reference had there, and does not return what the reference returns, is wrong itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from pifa_deploy.decoder_step import PRESENT, IntArray, Step
from pifa_deploy.graph_cut import Array, CutGraph, numpy_dtype
from pifa_deploy.operator_parity import measure_operators, pivot_layers
from pifa_deploy.residual_stream import boundaries
from pifa_deploy.torch_runner import TorchRunner

HEAD, EMBEDDING = "head", "embedding"
# Clean parts of whole models stay below 1 (docs/parity.md).
LIMIT = 4.0
_PROMPT, _PADDING, _NEW = 48, 16, 16
BISECTION_TOKENS = 2 * (_PROMPT + _NEW)
_UNITS = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


@dataclass(frozen=True, kw_only=True)
class PartFigures:
    """One part of the graph on the reference's inputs.

    Attributes:
        part: "embedding", "model.layers.3.self_attn", ..., "head".
        ratio: largest error of a position, or of a cached key or value, in units of the dtype's rounding noise.
        worst: the output that it belongs to: "hidden", "present.3.key", ..., "logits".
    """

    part: str
    ratio: float
    worst: str


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """All parts in order.

    Attributes:
        parts: in the order of the graph.
        limit: a larger ratio is bad.
        operators: module -> rho, the PIFA layers of the first bad part; all where every part is good.
        rho_limit: a larger rho is bad.
    """

    parts: tuple[PartFigures, ...]
    limit: float
    operators: Mapping[str, float]
    rho_limit: float

    def first_bad(self) -> PartFigures | None:
        """Returns the first part beyond the limit; one that is not a number is."""
        return next((part for part in self.parts if not part.ratio <= self.limit), None)

    def first_bad_operator(self) -> str | None:
        """Returns the first PIFA layer beyond its limit."""
        return next((module for module, rho in self.operators.items() if not rho <= self.rho_limit), None)

    def first_bad_module(self) -> str:
        """Returns the name of the first bad PIFA layer, else of the first bad part, else nothing."""
        part = self.first_bad()
        return self.first_bad_operator() or (part.part if part else "")

    def line(self) -> str:
        """Returns the result in one line."""
        part, module = self.first_bad(), self.first_bad_operator()
        if module is not None:
            rho = self.operators[module]
            return f"first bad layer: {module} (error {rho:.3g} times its rounding bound, limit {self.rho_limit:g})"
        if part is None:
            return (
                "every layer replays well on the reference's inputs, and so do embedding, head and cache: logits that "
                f"differ all the same do so because of what happens between steps, or of what these {BISECTION_TOKENS} "
                "tokens do not reach"
            )
        operators = "; its PIFA layers replay well one by one" if self.operators else ""
        return (
            f"first bad layer: {part.part} ({part.worst} is off by {part.ratio:.3g} times the rounding noise, limit "
            f"{self.limit:g}{operators})"
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the result as JSON values."""
        finite = [{**asdict(each), "ratio": each.ratio if np.isfinite(each.ratio) else None} for each in self.parts]
        return {
            "parts": finite,
            "limit": self.limit,
            "operators": {name: rho if np.isfinite(rho) else None for name, rho in self.operators.items()},
            "rho_limit": self.rho_limit,
            "first_bad": self.first_bad_module() or None,
            "line": self.line(),
        }


def bisection_from_json(value: Mapping[str, Any]) -> Bisection:
    """Returns what `Bisection.to_json` wrote; null stands for what is not finite.

    Raises:
        KeyError, TypeError, ValueError: it did not write that.
    """
    parts = tuple(PartFigures(**{**part, "ratio": _number(part["ratio"])}) for part in value["parts"])
    operators = {str(name): _number(rho) for name, rho in value["operators"].items()}
    limits = {name: float(value[name]) for name in ("limit", "rho_limit")}
    return Bisection(parts=parts, operators=operators, **limits)


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def replay(model: PreTrainedModel, graph: CutGraph, ids: IntArray) -> list[PartFigures]:
    """Replays every part behind a cache that the reference filled, one row of it padded on the left.

    Args:
        model: the fp32 reference.
        graph: of the folder.
        ids: int64, at least BISECTION_TOKENS of a text.

    Raises:
        MissingCapabilityError, StageFailedError: see `CutGraph.run`.
    """
    found = boundaries(graph)
    prompt, step = _steps(ids)
    runner = TorchRunner(model)
    _, cache = runner.step(prompt, None)
    past = {
        name.replace(PRESENT, "past_key_values", 1): held.clone() for name, held in runner.read_cache(cache).items()
    }
    hidden, logits, present = _reference(model, step, cache, norms=[boundary.norm for boundary in found])
    dtype = numpy_dtype(graph.folder.dtype)
    feeds: dict[str, Array] = {name: getattr(step, name) for name in ("input_ids", "attention_mask", "position_ids")}
    feeds |= {name: tensor.numpy().astype(dtype) for name, tensor in past.items()}
    values = [boundary.value for boundary in found]
    expected = dict(zip(values, (hidden[boundary.norm] for boundary in found), strict=True)) | {"logits": logits}
    ends = [(None, EMBEDDING), *((value, None) for value in values)]
    owners = _cache_owners(graph, feeds, values)
    # Sums of n terms in fp32 round n times, up as often as down.
    unit = max(_UNITS[graph.folder.dtype], _UNITS["fp32"] * model.config.get_text_config().hidden_size ** 0.5)
    results = []
    for (start, name), stop in zip(ends, [*values, "logits"], strict=True):
        part = name or (HEAD if stop == "logits" else _part_name(graph, start or "", stop))
        given = dict(feeds) if start is None else {**feeds, start: expected[start].astype(dtype)}
        outputs = [stop, *(cache for cache, owner in owners.items() if owner == start)]
        made = dict(zip(outputs, graph.run(given, outputs), strict=True))
        results.append(_part(part, made, {**expected, **present}, start=start, unit=unit))
    return results


def _steps(ids: IntArray) -> tuple[Step, Step]:
    """Returns a prompt, the second row padded on the left, and the tokens that follow it in both rows."""
    total = _PROMPT + _NEW
    rows = np.stack([ids[:total], ids[total : 2 * total]])
    mask = np.ones((2, total), np.int64)
    mask[1, :_PADDING] = 0
    positions = np.stack([np.arange(total), np.maximum(np.arange(total) - _PADDING, 0)])
    prompt = Step(input_ids=rows[:, :_PROMPT], attention_mask=mask[:, :_PROMPT], position_ids=positions[:, :_PROMPT])
    return prompt, Step(input_ids=rows[:, _PROMPT:], attention_mask=mask, position_ids=positions[:, _PROMPT:])


def _reference(
    model: PreTrainedModel, step: Step, cache: Any, *, norms: list[str]
) -> tuple[dict[str, Array], Array, dict[str, Array]]:
    """Returns the inputs of the norms, the logits and the grown cache of one step of the reference."""
    hidden: dict[str, Array] = {}

    def hook(path: str) -> Any:
        def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            hidden[path] = arguments[0].detach().float().numpy().copy()

        return keep

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in norms]
    runner = TorchRunner(model)
    try:
        logits, cache = runner.step(step, cache)
    finally:
        for handle in handles:
            handle.remove()
    present = {name: tensor.float().numpy() for name, tensor in runner.read_cache(cache).items()}
    return hidden, logits, present


def _cache_owners(graph: CutGraph, given: Collection[str], starts: list[str]) -> dict[str, str | None]:
    """Returns grown cache -> the boundary behind which it is made, the last where a fault reads several."""
    owners: dict[str, str | None] = {}
    for output in graph.folder.model.graph.output:
        if output.name.startswith(f"{PRESENT}."):
            nodes = graph.between({*given, *starts}, [output.name])
            read = {name for i in nodes for name in graph.nodes[i].input}
            owners[output.name] = next((value for value in reversed(starts) if value in read), None)
    return owners


def _part_name(graph: CutGraph, start: str, stop: str) -> str:
    """Returns what the weights of a part have in common: "model.layers.3.mlp"; norms do not count."""
    names = {
        name for i in graph.between({start}, [stop]) for name in graph.nodes[i].input if name in graph.initializers
    }
    modules = sorted(name.rpartition(".")[0] for name in names if name.count(".") > 1)
    inner = [module for module in modules if "norm" not in module.rpartition(".")[2]] or modules
    inner = [module for module in inner if "layers." in module] or inner
    parents = {module.rpartition(".")[0] for module in inner}
    return parents.pop() if len(parents) == 1 else _common(sorted(parents)) or start


def _common(paths: list[str]) -> str:
    split = [path.split(".") for path in paths]
    shared = []
    for words in zip(*split, strict=False):
        if len(set(words)) > 1:
            break
        shared.append(words[0])
    return ".".join(shared)


def _part(
    part: str, made: Mapping[str, Array], expected: Mapping[str, Array], *, start: str | None, unit: float
) -> PartFigures:
    before = expected[start] if start else None
    ratios = {name: _ratio(array, expected[name], before=before, unit=unit) for name, array in made.items()}
    worst = max(ratios, key=lambda name: np.inf if np.isnan(ratios[name]) else ratios[name])
    shown = worst if worst.startswith(PRESENT) or worst == "logits" else "hidden"
    return PartFigures(part=part, ratio=ratios[worst], worst=shown)


def _ratio(found: Array, expected: Array, *, before: Array | None, unit: float) -> float:
    """Returns the largest error of a position in units of its rounding noise.

    The noise is that of rounding what goes in and what comes out, u (|before| + |after|), and as much for each of the
    eight or so roundings on the way, of the size of what the part adds: 8 u |after - before|. Norms over the features.
    """
    if found.shape != expected.shape:
        return float("inf")
    expected = expected.astype(np.float64)
    error = np.linalg.norm(found.astype(np.float64) - expected, axis=-1)
    size = np.linalg.norm(expected, axis=-1)
    noise = size.copy()
    if before is not None and before.shape == expected.shape:
        start = before.astype(np.float64)
        noise += np.linalg.norm(start, axis=-1) + 8 * np.linalg.norm(expected - start, axis=-1)
    else:
        noise += 8 * size
    return float((error / (unit * noise + np.finfo(np.float32).tiny)).max())


def bisect(model: PreTrainedModel, graph: CutGraph, ids: IntArray, *, rho_limit: float) -> Bisection:
    """Replays every part, and the PIFA layers of the first bad one, alone; all of them where no part is bad.

    A PIFA layer has a bound of its own, which sees what is lost in the noise of a whole part.

    Args:
        model: the fp32 reference.
        graph: of the folder.
        ids: int64, at least BISECTION_TOKENS of a text.
        rho_limit: of a PIFA layer.
    """
    parts = replay(model, graph, ids)
    result = Bisection(parts=tuple(parts), limit=LIMIT, operators={}, rho_limit=rho_limit)
    bad = result.first_bad()
    prefix = f"{bad.part}." if bad else ""
    inside = [path for path in pivot_layers(model) if path.startswith(prefix)]
    figures = (
        measure_operators(model, graph, ids[:BISECTION_TOKENS], only=lambda path: path in inside) if inside else []
    )
    return replace(result, operators={each.module: each.rho for each in figures})
