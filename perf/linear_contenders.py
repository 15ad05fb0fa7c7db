"""The contenders of perf/bench_linear.py: each makes the calls of one layer, with weights of its own.

Speed does not depend on what the weights say, so the factors are random; every contender is checked against float64 of
its own weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import linear

from pifa_deploy import cuda_kernels
from pifa_deploy.cuda_kernels import KernelPath, Kernels, PivotLayer
from pifa_deploy.density import low_rank_rank_for_density, parameter_count, rank_for_density

RANK_MULTIPLE = 16
# Layers that shapes.json has stacked because they read the same x, and what they are stacked of: q·k·v and gate·up.
PARTS = {
    (12288, 4096): (4096, 4096, 4096),
    (22016, 4096): (11008, 11008),
    (6144, 4096): (4096, 1024, 1024),
    (28672, 4096): (14336, 14336),
    (15360, 5120): (5120, 5120, 5120),
    (27648, 5120): (13824, 13824),
    (960, 576): (576, 192, 192),
    (3072, 576): (1536, 1536),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    out_features: int
    in_features: int
    density: float
    dtype: torch.dtype
    device: str
    kernels: Kernels | None

    @property
    def rank(self) -> int:
        return rank_for_density(self.out_features, self.in_features, self.density, multiple=RANK_MULTIPLE)

    @property
    def low_rank_rank(self) -> int:
        return low_rank_rank_for_density(self.out_features, self.in_features, self.density, multiple=RANK_MULTIPLE)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * shape[-1] ** -0.5


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One copy of a layer: `call` maps x [t, n] to y [t, m] or its parts, `exact` to y in float64.

    `weights` is the number of weights that a call multiplies with (2 FLOPs each per token), `weight_bytes` what it
    must read of them, `middle` the width of what lies between two products.
    """

    call: Callable[[torch.Tensor], torch.Tensor | list[torch.Tensor]]
    exact: Callable[[torch.Tensor], torch.Tensor]
    weights: int
    weight_bytes: int
    middle: int = 0
    keep: list[torch.Tensor] = field(default_factory=list)


def dense(s: Setting) -> Instance:
    w = s.random(s.out_features, s.in_features)
    return Instance(
        call=lambda x: linear(x, w),
        exact=lambda x: x.double() @ w.double().T,
        weights=w.numel(),
        weight_bytes=w.numel() * w.element_size(),
    )


def _low_rank(s: Setting, rank: int) -> Instance:
    u, v = s.random(s.out_features, rank), s.random(rank, s.in_features)
    count = u.numel() + v.numel()
    return Instance(
        call=lambda x: linear(linear(x, v), u),
        exact=lambda x: x.double() @ v.double().T @ u.double().T,
        weights=count,
        weight_bytes=count * u.element_size(),
        middle=rank,
    )


def low_rank_equal_density(s: Setting) -> Instance:
    return _low_rank(s, s.low_rank_rank)


def low_rank_equal_rank(s: Setting) -> Instance:
    return _low_rank(s, s.rank)


def two_four_weight(s: Setting, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a dense matrix with two of four weights, and the same in torch's semi-structured form."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

    kind = SparseSemiStructuredTensorCUSPARSELT if backend == "cusparselt" else SparseSemiStructuredTensorCUTLASS
    w = s.random(s.out_features, s.in_features)
    w.view(-1, 4)[:, 2:] = 0
    w = w.view(-1, 4)[:, torch.randperm(4)].reshape(s.out_features, s.in_features).contiguous()
    return w, kind.from_dense(w)


def _two_four(s: Setting, backend: str) -> Instance:
    w, sparse = two_four_weight(s, backend)
    return Instance(
        call=lambda x: linear(x, sparse),
        exact=lambda x: x.double() @ w.double().T,
        weights=w.numel() // 2,
        # Two bits of position come with each weight that is kept.
        weight_bytes=w.numel() // 2 * w.element_size() + w.numel() // 8,
    )


def two_four_cusparselt(s: Setting) -> Instance:
    return _two_four(s, "cusparselt")


def two_four_cutlass(s: Setting) -> Instance:
    return _two_four(s, "cutlass")


def pivot_layer(s: Setting, *, index: bool) -> PivotLayer:
    order = torch.randperm(s.out_features, device=s.device).to(torch.int32)
    return PivotLayer(
        pivot_weight=s.random(s.rank, s.in_features),
        coefficients=s.random(s.out_features - s.rank, s.rank),
        index=order if index else None,
    )


def _pivot(s: Setting, layer: PivotLayer, call: Callable[[torch.Tensor], torch.Tensor]) -> Instance:
    count = parameter_count(s.out_features, s.in_features, s.rank)

    def exact(x: torch.Tensor) -> torch.Tensor:
        y_p = x.double() @ layer.pivot_weight.double().T
        y = torch.cat([y_p, y_p @ layer.coefficients.double().T], dim=-1)
        return y if layer.index is None else y[:, layer.index.long()]

    return Instance(
        call=call, exact=exact, weights=count, weight_bytes=count * layer.pivot_weight.element_size(), middle=s.rank
    )


def pifa_research(s: Setting) -> Instance:
    """Two products and two index copies into a fresh output, as the paper's code does it."""
    layer = pivot_layer(s, index=True)
    assert layer.index is not None
    inverse = torch.argsort(layer.index.long())
    pivots, others = inverse[: s.rank], inverse[s.rank :]

    def call(x: torch.Tensor) -> torch.Tensor:
        y_p = linear(x, layer.pivot_weight)
        y = x.new_empty(x.shape[0], s.out_features)
        y.index_copy_(1, pivots, y_p)
        y.index_copy_(1, others, linear(y_p, layer.coefficients))
        return y

    return _pivot(s, layer, call)


def pifa_plain(s: Setting) -> Instance:
    """The operator's reference: two products, a concatenation and a gather."""
    layer = pivot_layer(s, index=True)
    index = layer.index

    def call(x: torch.Tensor) -> torch.Tensor:
        y_p = linear(x, layer.pivot_weight)
        return torch.cat([y_p, linear(y_p, layer.coefficients)], dim=-1).index_select(-1, index)

    return _pivot(s, layer, call)


def _pifa_kernels(s: Setting, path: KernelPath, *, index: bool) -> Instance:
    if s.kernels is None:
        raise RuntimeError("no kernel library")
    kernels, layer = s.kernels, pivot_layer(s, index=index)
    kernels.prepare(layer.problem(1), path)
    return _pivot(s, layer, lambda x: cuda_kernels.apply(kernels, layer, x, path))


def pifa_decode_index(s: Setting) -> Instance:
    return _pifa_kernels(s, KernelPath.DECODE, index=True)


def pifa_decode(s: Setting) -> Instance:
    return _pifa_kernels(s, KernelPath.DECODE, index=False)


def pifa_cooperative(s: Setting) -> Instance:
    return _pifa_kernels(s, KernelPath.COOPERATIVE, index=False)


def pifa_gemm_index(s: Setting) -> Instance:
    return _pifa_kernels(s, KernelPath.GEMM, index=True)


def pifa_gemm(s: Setting) -> Instance:
    return _pifa_kernels(s, KernelPath.GEMM, index=False)


def pifa_decode_fused(s: Setting) -> Instance:
    """q, k and v (gate and up) as layers of their own, in one pair of launches; a layer without parts runs alone."""
    parts = PARTS.get((s.out_features, s.in_features), (s.out_features,))
    settings = [replace(s, out_features=m) for m in parts]
    layers = [pivot_layer(each, index=False) for each in settings]
    alone = [_pivot(each, layer, torch.clone) for each, layer in zip(settings, layers, strict=True)]
    if s.kernels is None:
        raise RuntimeError("no kernel library")
    kernels = s.kernels
    return Instance(
        call=lambda x: cuda_kernels.apply_group(kernels, layers, x, KernelPath.DECODE),
        exact=lambda x: torch.cat([each.exact(x) for each in alone], dim=-1),
        weights=sum(each.weights for each in alone),
        weight_bytes=sum(each.weight_bytes for each in alone),
        middle=sum(each.middle for each in alone),
    )


DECODE_TOKENS = 128  # beyond, the decode kernels are not a contender

FUSED = "PIFA decode, fused q·k·v and gate·up"

CONTENDERS: dict[str, Callable[[Setting], Instance]] = {
    "dense": dense,
    "low-rank, equal density": low_rank_equal_density,
    "low-rank, equal rank": low_rank_equal_rank,
    "2:4 cuSPARSELt": two_four_cusparselt,
    "2:4 CUTLASS": two_four_cutlass,
    "PIFA, research code": pifa_research,
    "PIFA, plain operators": pifa_plain,
    "PIFA decode, index": pifa_decode_index,
    "PIFA decode": pifa_decode,
    "PIFA decode, one launch": pifa_cooperative,
    FUSED: pifa_decode_fused,
    "PIFA GEMM, index": pifa_gemm_index,
    "PIFA GEMM": pifa_gemm,
}


def contenders_for(tokens: int, density: float, layers: list[list[int]]) -> list[str]:
    """Returns who runs: 2:4 exists at one half only and is compared with 0.5 and 0.55, decode stops at some point."""
    has_parts = any((m, n) in PARTS for m, n in layers)
    return [
        name
        for name in CONTENDERS
        if (density <= 0.55 or not name.startswith("2:4"))
        and (tokens <= DECODE_TOKENS or "decode" not in name)
        and (has_parts or name != FUSED)
    ]
