"""Ranks for all linears of a model within one budget of stored numbers.

MPIFA_NS (arXiv 2501.19090) gives a linear of kind k in decoder layer l the density d_k d_l / mean(d): one
density for attention and one for the MLP, times a density of the layer. Here layer densities come from a score:
the outlier ratio of OWL (arXiv 2310.05175), or the effective rank of what the layer's linears compute.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pifa_deploy.checkpoint import FORMATS
from pifa_deploy.compression.layer_density import effective_rank_densities, largest, owl_densities, spent
from pifa_deploy.compression.linear_shape import KINDS, LinearShape
from pifa_deploy.density import low_rank_rank_for_density, parameter_count, rank_for_density

LAYER_DENSITIES = ("uniform", "owl", "effective-rank")
_Key = TypeVar("_Key", int, str)


@dataclass(frozen=True, kw_only=True)
class AllocationOptions:
    """How to share one budget among linears.

    Attributes:
        density: 0 < density < 1, stored numbers of all linears together relative to the dense ones.
        attention_density: 0 < density <= 1 of the attention linears, the MLP has what the budget leaves;
            None: the same for both.
        layer_density: "uniform", or "owl" or "effective-rank", which need scores.
        owl_multiple: M, an entry is an outlier when its score exceeds M times the mean of its layer.
        owl_spread: lambda, layer densities lie in an interval of width 2 lambda.
        rank_multiple: all ranks are multiples of this.
        format: "pifa" or "lowrank".
    """

    density: float
    attention_density: float | None = None
    layer_density: str = "uniform"
    owl_multiple: float = 5.0
    owl_spread: float = 0.08
    rank_multiple: int = 1
    format: str = "pifa"

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        if not 0.0 < self.density < 1.0:
            raise ValueError(f"density is {self.density}, expected 0 < density < 1")
        if self.attention_density is not None and not 0.0 < self.attention_density <= 1.0:
            raise ValueError(f"attention_density is {self.attention_density}, expected 0 < attention_density <= 1")
        if self.layer_density not in LAYER_DENSITIES:
            raise ValueError(f"layer_density is {self.layer_density!r}, expected one of {LAYER_DENSITIES}")
        if not 0.0 < self.owl_multiple < math.inf:
            raise ValueError(f"owl_multiple is {self.owl_multiple}, expected a positive number")
        if not 0.0 <= self.owl_spread < 1.0:
            raise ValueError(f"owl_spread is {self.owl_spread}, expected 0 <= owl_spread < 1")
        if self.rank_multiple < 1:
            raise ValueError(f"rank_multiple is {self.rank_multiple}, expected at least 1")
        if self.format not in FORMATS:
            raise ValueError(f"format is {self.format!r}, expected one of {FORMATS}")


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What each linear gets; `ranks` and `dense` together name every linear once, in the order given.

    Attributes:
        ranks: name -> rank of each linear to factorise.
        dense: name -> why it stays dense.
        density: stored numbers of all linears relative to the dense ones; a dense linear stores all of its own.
        layer_densities: decoder layer -> density aimed at, before ranks are whole.
        kind_densities: "attention" or "mlp" -> density aimed at; kinds without linears are absent.
    """

    ranks: Mapping[str, int]
    dense: Mapping[str, str]
    density: float
    layer_densities: Mapping[int, float]
    kind_densities: Mapping[str, float]


def allocate(
    shapes: Sequence[LinearShape], options: AllocationOptions, *, scores: Mapping[int, float] | None = None
) -> Allocation:
    """Returns ranks whose stored numbers, over all linears together, are at most `density` of the dense ones.

    A linear stays dense when density 1 is its share, or when no multiple of `rank_multiple` stores less than the
    dense matrix. It counts as dense, and the others have that much less.

    Uniform layers without an attention density: every rank is what the paper's formula (Eq. 6) gives for
    `density`, or for what dense linears leave of it. It stays up to one rank a linear below the budget.

    Otherwise the rest of the budget goes, one `rank_multiple` at a time, to the linear farthest below its share,
    until no rank can be raised. The density reached then falls short by less than the cheapest step,
    `rank_multiple` (m + n) numbers of the smallest linear that is not at its largest rank. With a large multiple on
    a small model that can be much; the density reached is in the result.

    Args:
        shapes: the linears, names distinct.
        options: see AllocationOptions.
        scores: decoder layer -> score, higher deserves more density; not read for uniform layers.

    Raises:
        ValueError: names or scores do not fit, the attention density leaves the MLP no possible density, or
            the density leaves no rank to a linear; names it and says what would do. Linears below their smallest
            rank get that rank instead, and the others less, where layer densities come from scores.
    """
    _check_names(shapes)
    targets = _targets(shapes, options, scores)
    ranks = {shape.name: _rank(shape, targets[shape.name], options) for shape in shapes if targets[shape.name] < 1.0}
    if options.layer_density != "uniform" or options.attention_density is not None:
        ranks = _raised(shapes, options, ranks=ranks, targets=targets)
    stored = sum(_stored(shape, ranks[shape.name], options) if shape.name in ranks else shape.size for shape in shapes)
    return Allocation(
        ranks=ranks,
        dense={shape.name: _dense_reason(shape, options) for shape in shapes if shape.name not in ranks},
        density=stored / sum(shape.size for shape in shapes),
        layer_densities=_mean_targets(shapes, targets, lambda shape: shape.layer),
        kind_densities=_mean_targets(shapes, targets, lambda shape: shape.kind),
    )


def _check_names(shapes: Sequence[LinearShape]) -> None:
    if not shapes:
        raise ValueError("no linears to allocate ranks to; expected at least one")
    name, times = Counter(shape.name for shape in shapes).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{name} is listed {times} times; expected distinct names")


def _targets(
    shapes: Sequence[LinearShape], options: AllocationOptions, scores: Mapping[int, float] | None
) -> dict[str, float]:
    """Returns name -> density to aim at; 1 means dense."""
    uniform = options.layer_density == "uniform" and options.attention_density is None
    if uniform and all(_smallest_density(shape, options) < 1.0 for shape in shapes):
        # Not by way of the budget, whose rounding could cost the paper's formula a rank.
        return {shape.name: options.density for shape in shapes}
    layers = _layer_densities(shapes, options, scores)
    targets: dict[str, float] = {}
    for group, density in _groups(shapes, options):
        targets |= _shares(group, options, density=density, layers=layers)
    return targets


def _layer_densities(
    shapes: Sequence[LinearShape], options: AllocationOptions, scores: Mapping[int, float] | None
) -> dict[int, float]:
    sizes = {shape.layer: 0 for shape in shapes}
    for shape in shapes:
        sizes[shape.layer] += shape.size
    if options.layer_density == "uniform":
        return dict.fromkeys(sizes, options.density)
    given = scores or {}
    for layer in sizes:
        score = given.get(layer, math.nan)
        if not math.isfinite(score) or (options.layer_density == "effective-rank" and score <= 0.0):
            raise ValueError(
                f"the score of layer {layer} is {given.get(layer)}, expected a finite number for every layer, positive "
                f"for effective-rank; layer_density {options.layer_density} is made of them"
            )
    if options.layer_density == "owl":
        return owl_densities(given, sizes, density=options.density, spread=options.owl_spread)
    return effective_rank_densities(given, sizes, density=options.density)


def _groups(shapes: Sequence[LinearShape], options: AllocationOptions) -> list[tuple[Sequence[LinearShape], float]]:
    """Returns the linears that share a budget, with its density; the MLP's follows from the overall budget."""
    if options.attention_density is None:
        return [(shapes, options.density)]
    attention, mlp = ([shape for shape in shapes if shape.kind == kind] for kind in KINDS)
    given, overall = options.attention_density, options.density
    if not attention or not mlp:
        raise ValueError(
            f"attention_density is {given}, but there are {len(attention)} attention and {len(mlp)} mlp linears; "
            "expected some of both, leave attention_density out"
        )
    ours, theirs = (sum(shape.size for shape in group) for group in (attention, mlp))
    rest = (overall * (ours + theirs) - given * ours) / theirs
    if not 0.0 < rest <= 1.0:
        lowest = max(0.0, (overall * (ours + theirs) - theirs) / ours)
        highest = min(1.0, overall * (ours + theirs) / ours)
        raise ValueError(
            f"density {overall} with attention_density {given} needs an mlp density of {rest:.4f}, expected "
            f"0 < density <= 1; choose an attention_density between {lowest:.4f} and {highest:.4f}"
        )
    return [(attention, given), (mlp, rest)]


def _shares(
    group: Sequence[LinearShape], options: AllocationOptions, *, density: float, layers: Mapping[int, float]
) -> dict[str, float]:
    """Returns name -> clip(c d_l, smallest, 1) with the c that spends `density` of the group."""
    least = {shape.name: _smallest_density(shape, options) for shape in group}
    if options.layer_density == "uniform":
        # A density that was asked for is met or refused; one that a score led to may give way.
        least = {name: float(smallest >= 1.0) for name, smallest in least.items()}

    def at(c: float) -> dict[str, float]:
        return {shape.name: min(1.0, max(least[shape.name], c * layers[shape.layer])) for shape in group}

    sizes = {shape.name: shape.size for shape in group}
    budget, smallest = density * sum(sizes.values()), spent(least, sizes)
    if smallest >= budget and density < 1.0:
        worst = max(group, key=lambda shape: least[shape.name])
        raise ValueError(
            f"{worst.name} ({worst.out_features} x {worst.in_features}) has no rank at density {density:.4f}: with "
            f"rank_multiple {options.rank_multiple} the smallest ranks and dense linears take "
            f"{_ceiled(smallest / sum(sizes.values()))} of it all; raise the density above that or lower rank_multiple"
        )
    return at(largest(lambda c: spent(at(c), sizes), budget, (0.0, 1.0 / min(layers.values()))))


def _smallest_density(shape: LinearShape, options: AllocationOptions) -> float:
    """Returns the density at which the formulas give a first rank; 1 when no smaller one does."""
    rank = options.rank_multiple
    if rank > min(shape.out_features, shape.in_features):
        return 1.0
    indices = rank if options.format == "pifa" else 0
    return min(1.0, (_stored(shape, rank, options) + indices) / shape.size)


def _stored(shape: LinearShape, rank: int, options: AllocationOptions) -> int:
    if options.format == "pifa":
        return parameter_count(shape.out_features, shape.in_features, rank)
    return rank * (shape.out_features + shape.in_features)


def _rank(shape: LinearShape, density: float, options: AllocationOptions) -> int:
    rank_of = rank_for_density if options.format == "pifa" else low_rank_rank_for_density
    try:
        return rank_of(shape.out_features, shape.in_features, density, multiple=options.rank_multiple)
    except ValueError as error:
        if options.layer_density != "uniform":
            return options.rank_multiple
        least = _ceiled(_smallest_density(shape, options))
        raise ValueError(f"{shape.name}: {error}; density {least} is the least that would do") from None


def _ceiled(density: float) -> float:
    return math.ceil(density * 1e4) / 1e4


def _raised(
    shapes: Sequence[LinearShape], options: AllocationOptions, *, ranks: Mapping[str, int], targets: Mapping[str, float]
) -> dict[str, int]:
    """Returns the ranks after the rest of the budget went to the linears farthest below their targets."""
    ranks = dict(ranks)
    left = math.floor(options.density * sum(shape.size for shape in shapes))
    left -= sum(_stored(shape, ranks[shape.name], options) if shape.name in ranks else shape.size for shape in shapes)

    def excess(shape: LinearShape) -> float:
        return _stored(shape, ranks[shape.name], options) / shape.size - targets[shape.name]

    queue = [(excess(shape), place) for place, shape in enumerate(shapes) if shape.name in ranks]
    heapq.heapify(queue)
    while queue:
        place = heapq.heappop(queue)[1]
        shape = shapes[place]
        rank = ranks[shape.name] + options.rank_multiple
        if rank > min(shape.out_features, shape.in_features) or _stored(shape, rank, options) >= shape.size:
            continue
        step = _stored(shape, rank, options) - _stored(shape, ranks[shape.name], options)
        # What does not fit now never will: the rest only shrinks.
        if step <= left:
            left -= step
            ranks[shape.name] = rank
            heapq.heappush(queue, (excess(shape), place))
    return ranks


def _dense_reason(shape: LinearShape, options: AllocationOptions) -> str:
    if _smallest_density(shape, options) < 1.0:
        return "its share of the budget is density 1"
    return (
        f"{shape.out_features} x {shape.in_features} has no multiple of {options.rank_multiple} as rank whose "
        "factors and indices take less than the dense matrix"
    )


def _mean_targets(
    shapes: Sequence[LinearShape], targets: Mapping[str, float], key: Callable[[LinearShape], _Key]
) -> dict[_Key, float]:
    groups: dict[_Key, list[LinearShape]] = {}
    for shape in shapes:
        groups.setdefault(key(shape), []).append(shape)
    return {
        value: math.fsum(shape.size * targets[shape.name] for shape in group) / sum(shape.size for shape in group)
        for value, group in groups.items()
    }
