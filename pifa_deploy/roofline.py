"""Bounds on the time of a linear layer from datasheets: dense, 2:4, low-rank and PIFA. Nothing here is measured.

time = max(bytes / bandwidth, FLOPs / peak) + launches x overhead, for T tokens, weights [m, n] and b bytes a number:

| variant | weights, numbers | activations a token | launches |
|---|---|---|---|
| dense | m n | m + n | 1 |
| 2:4 | m n / 2, and 2 bits for each kept one | m + n | 1 |
| low-rank | r (m + n) | m + n + 2 r | 2 |
| PIFA | P = r (m + n) - r^2 | m + n + r, both products written into the output | 2 |
| PIFA, plain operators fused | P | as PIFA: what follows reads both products | 2 |
| PIFA, plain operators | P | 2 m more: Concat, with the Gather in it, passes over the output | 3 |
| PIFA, scattered | P | 2 m more: rows are moved in a pass of their own | 4 |

The first product of layers that read one tensor (q, k, v; gate, up) is one kernel for them all, of dense and 2:4 the
only one; PIFA as it stands and scattered, which a plugin or a module computes layer by layer, share nothing.
FLOPs are 2 T times the weights; 2:4 has those of dense at the sparse rate. Column-form PIFA moves 2 r like low-rank,
and 2 r more for the Add in plain operators. Everything else is left out: attention, norms, cache misses, the 4 m bytes
of an index in each pass, and tiles that no matrix fills (see `padded_seconds`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pifa_deploy.density import density_for_rank, parameter_count
from pifa_deploy.gpu_limits import Limits

DENSE, SPARSE = "dense", "2:4"
LOW_RANK_DENSITY, LOW_RANK_RANK = "low-rank, same size", "low-rank, same rank"
PIFA, PIFA_SCATTERED = "pifa", "pifa, scattered"
PIFA_FUSED, PIFA_PLAIN = "pifa, plain operators fused", "pifa, plain operators"
VARIANTS = (DENSE, SPARSE, LOW_RANK_DENSITY, LOW_RANK_RANK, PIFA, PIFA_FUSED, PIFA_PLAIN, PIFA_SCATTERED)
MAX_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One linear W [out_features, in_features].

    Attributes:
        name: module path.
        out_features: m.
        in_features: n.
        rank: of its factors; None: it is dense in every variant.
        column: its PIFA factors are columns, not rows.
        group: layers of one group read the same tensor, so that builders merge their first products.
    """

    name: str
    out_features: int
    in_features: int
    rank: int | None
    column: bool = False
    group: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a shape or rank that no layer has."""
        smallest = min(self.out_features, self.in_features)
        if smallest < 1 or (self.rank is not None and not 1 <= self.rank <= smallest):
            raise ValueError(
                f"{self.name}: rank {self.rank} of {self.out_features} x {self.in_features}; expected a rank from 1 "
                "to the smaller side"
            )

    @property
    def density(self) -> float:
        """Numbers in its PIFA factors relative to the dense matrix; 1 for a dense layer."""
        return 1.0 if self.rank is None else density_for_rank(self.out_features, self.in_features, self.rank)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one layer has to do.

    Attributes:
        weight_bytes: read once a pass.
        token_bytes: activations read and written for each token.
        token_flops: for each token.
        launches: kernels.
        merges: whether the first of them serves all layers of a group.
        sparse: whether the sparse rate applies.
    """

    weight_bytes: float
    token_bytes: float
    token_flops: float
    launches: int
    merges: bool = True
    sparse: bool = False

    def seconds(self, tokens: int, limits: Limits) -> float:
        """Returns the least time this takes for a number of tokens."""
        return max(self.moving(tokens, limits), self.computing(tokens, limits)) + self.launches * limits.launch_seconds

    def moving(self, tokens: int, limits: Limits) -> float:
        """Returns the seconds of memory traffic."""
        return (self.weight_bytes + tokens * self.token_bytes) / limits.bandwidth

    def computing(self, tokens: int, limits: Limits) -> float:
        """Returns the seconds of arithmetic."""
        rate = limits.sparse_peak if self.sparse and limits.sparse_peak else limits.peak
        return tokens * self.token_flops / rate


def work(layer: Layer, variant: str, itemsize: int) -> Work:
    """Returns what a layer has to do as one of VARIANTS; a layer without rank is dense in all."""
    m, n, r = layer.out_features, layer.in_features, layer.rank
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    outer = itemsize * (m + n)
    if r is None or variant == DENSE:
        return Work(weight_bytes=itemsize * m * n, token_bytes=outer, token_flops=2 * m * n, launches=1)
    if variant == SPARSE:
        # Every kept number has two bits that say which of four it is.
        kept = m * n / 2
        weights = kept * itemsize + kept / 4
        return Work(weight_bytes=weights, token_bytes=outer, token_flops=2 * m * n, launches=1, sparse=True)
    if variant in (LOW_RANK_DENSITY, LOW_RANK_RANK):
        rank = r if variant == LOW_RANK_RANK else max(parameter_count(m, n, r) // (m + n), 1)
        numbers, between = rank * (m + n), 2 * rank
    else:
        numbers, between = parameter_count(m, n, r), 2 * r if layer.column else r
    passed, passes = _passes(layer, variant)
    return Work(
        weight_bytes=itemsize * numbers,
        token_bytes=outer + itemsize * (between + passed),
        token_flops=2 * numbers,
        launches=2 + passes,
        merges=variant not in (PIFA, PIFA_SCATTERED),
    )


def _passes(layer: Layer, variant: str) -> tuple[int, int]:
    """Returns the numbers a token, and the kernels, that move outputs or add partial ones behind the products."""
    if variant == PIFA_SCATTERED:
        return 2 * layer.out_features, 2
    if variant == PIFA_PLAIN:
        return 2 * (layer.rank or 0) if layer.column else 2 * layer.out_features, 1
    return 0, 0


def layer_seconds(layer: Layer, variant: str, tokens: int, limits: Limits) -> float:
    """Returns the bound for one layer alone."""
    return work(layer, variant, limits.itemsize).seconds(tokens, limits)


@dataclass(frozen=True, kw_only=True)
class DecoderBound:
    """The bound for all layers of a decoder, one after the other.

    Attributes:
        variant: one of VARIANTS.
        tokens: in one pass.
        seconds: the sum over layers.
        weight_bytes: of all layers.
        launches: kernels; layers of one group share the first where `Work.merges`.
        limit: "bandwidth", "compute" or "launches", whichever takes longest.
    """

    variant: str
    tokens: int
    seconds: float
    weight_bytes: float
    launches: int
    limit: str

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


def decoder_bound(layers: Sequence[Layer], variant: str, tokens: int, limits: Limits) -> DecoderBound:
    """Returns the bound for the layers of a decoder.

    Raises:
        ValueError: 2:4 on hardware without sparse units, or no layers.
    """
    if not layers:
        raise ValueError("there are no layers, expected at least one")
    if variant == SPARSE and limits.sparse_peak is None:
        raise ValueError("2:4 was asked of hardware without sparse units")
    works = [work(layer, variant, limits.itemsize) for layer in layers]
    merged = [layer.group for layer, one in zip(layers, works, strict=True) if one.merges and layer.group]
    launches = sum(one.launches for one in works) - len(merged) + len(set(merged))
    shares = {"bandwidth": 0.0, "compute": 0.0, "launches": launches * limits.launch_seconds}
    for one in works:
        moving, computing = one.moving(tokens, limits), one.computing(tokens, limits)
        shares["bandwidth" if moving >= computing else "compute"] += max(moving, computing)
    return DecoderBound(
        variant=variant,
        tokens=tokens,
        seconds=sum(shares.values()),
        weight_bytes=sum(one.weight_bytes for one in works),
        launches=launches,
        limit=max(shares, key=lambda name: shares[name]),
    )


def break_even_density(layer: Layer, tokens: int, limits: Limits) -> float:
    """Returns the largest density at which PIFA is faster than dense for this shape; 0 when none is."""
    m, n = layer.out_features, layer.in_features
    dense = layer_seconds(layer, DENSE, tokens, limits)

    def pays(rank: int) -> bool:
        tried = Layer(name=layer.name, out_features=m, in_features=n, rank=rank, column=layer.column)
        return layer_seconds(tried, PIFA, tokens, limits) < dense

    # Bytes and FLOPs grow with the rank up to the smaller side.
    rank = _largest(1, min(m, n), pays)
    return density_for_rank(m, n, rank) if rank else 0.0


def paying_tokens(layer: Layer, limits: Limits) -> tuple[tuple[int, int | None], ...]:
    """Returns the ranges (first, last) of token counts up to MAX_TOKENS in which PIFA is faster than dense.

    A last of None means no end was found. Both bounds are the larger of two straight lines in T, so that their
    difference is straight between the tokens where either changes from memory to arithmetic.
    """
    dense, pifa = (work(layer, variant, limits.itemsize) for variant in (DENSE, PIFA))

    def pays(tokens: int) -> bool:
        return pifa.seconds(tokens, limits) < dense.seconds(tokens, limits)

    bends = sorted({1, MAX_TOKENS, *_bends((dense, pifa), limits)})
    ranges: list[tuple[int, int]] = []
    for first, last in itertools.pairwise(bends):
        if pays(first):
            end = _largest(first, last, pays)
            ranges.append((first, end))
        elif pays(last):
            ranges.append((_largest(first, last, lambda tokens: not pays(tokens)) + 1, last))
    joined: list[tuple[int, int]] = []
    for first, last in ranges:
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return tuple((first, None if last == MAX_TOKENS else last) for first, last in joined)


def _bends(works: Iterable[Work], limits: Limits) -> list[int]:
    """Returns the tokens beside which a layer changes from memory to arithmetic."""
    found = []
    for one in works:
        slope = one.computing(1, limits) - one.token_bytes / limits.bandwidth
        if slope > 0:
            bend = one.weight_bytes / limits.bandwidth / slope
            found += [math.floor(bend), math.floor(bend) + 1]
    return [bend for bend in found if 1 < bend < MAX_TOKENS]


def _largest(first: int, last: int, holds: Callable[[int], bool]) -> int:
    """Returns the largest number in first .. last for which `holds`, which does not come back once false; 0: none."""
    if not holds(first):
        return 0
    while first < last:
        middle = (first + last + 1) // 2
        first, last = (middle, last) if holds(middle) else (first, middle - 1)
    return first


def padded_seconds(layer: Layer, tokens: int, limits: Limits) -> float:
    """Returns the PIFA bound with ranks as tensor cores see them: r and m - r padded to whole tiles.

    The first product has r outputs, the second sums over r and has m - r outputs. Memory traffic is not padded.
    """
    if layer.rank is None:
        return layer_seconds(layer, DENSE, tokens, limits)

    def padded(size: int) -> int:
        return math.ceil(size / limits.tile) * limits.tile

    one = work(layer, PIFA, limits.itemsize)
    whole, rest = (layer.in_features, layer.out_features)[:: -1 if layer.column else 1]
    rank = padded(layer.rank)
    flops = max(2 * rank * (whole + padded(rest - layer.rank)), one.token_flops)
    arithmetic = tokens * flops / limits.peak
    return max(one.moving(tokens, limits), arithmetic) + one.launches * limits.launch_seconds
