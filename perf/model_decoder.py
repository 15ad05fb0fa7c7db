"""A LLaMA decoder's layers in plain PyTorch, whose linears may be of several kinds: for perf/bench_model.py.

The linears that read the same input are made together, so that each kind can share what it can: dense and 2:4 stack
q·k·v and gate·up into one matrix, low-rank stacks the first factors, our kernels share their launches or, in a row of
their own, do not. There is no embedding and no output head: they are dense in every contender.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from linear_contenders import Setting, pivot_layer, two_four_weight
from torch import nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from pifa_deploy.cuda_kernels import Kernels, PivotLayer, apply, apply_group
from pifa_deploy.launch_groups import group_launches
from pifa_deploy.linear import PifaLinear

Together = Callable[[torch.Tensor], list[torch.Tensor]]
EPSILON = 1e-5
ROPE_BASE = 10000.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int  # of them are measured
    whole_layers: int  # that the real model has
    head_dim: int

    def linears(self) -> list[tuple[int, tuple[int, ...]]]:
        """Returns (in_features, out_features of the linears that read it), in the order of a layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, (q, kv, kv)),
            (q, (self.hidden,)),
            (self.hidden, (self.intermediate, self.intermediate)),
            (self.intermediate, (self.hidden,)),
        ]


def _dense(settings: list[Setting]) -> Together:
    weight = torch.cat([s.random(s.out_features, s.in_features) for s in settings])
    sizes = [s.out_features for s in settings]
    return lambda x: list(linear(x, weight).split(sizes, dim=-1))


def _two_four(settings: list[Setting], backend: str) -> Together:
    sizes = [s.out_features for s in settings]
    _, sparse = two_four_weight(
        Setting(
            out_features=sum(sizes),
            in_features=settings[0].in_features,
            density=settings[0].density,
            dtype=settings[0].dtype,
            device=settings[0].device,
            kernels=None,
        ),
        backend,
    )
    return lambda x: list(linear(x, sparse).split(sizes, dim=-1))


def _low_rank(settings: list[Setting]) -> Together:
    ranks = [s.low_rank_rank for s in settings]
    first = torch.cat([s.random(r, s.in_features) for s, r in zip(settings, ranks, strict=True)])
    seconds = [s.random(s.out_features, r) for s, r in zip(settings, ranks, strict=True)]
    return lambda x: [linear(part, u) for part, u in zip(linear(x, first).split(ranks, dim=-1), seconds, strict=True)]


def _pivot_plain(settings: list[Setting]) -> Together:
    layers = [pivot_layer(s, index=False) for s in settings]

    def call(x: torch.Tensor) -> list[torch.Tensor]:
        pivots = [linear(x, layer.pivot_weight) for layer in layers]
        return [
            torch.cat([y_p, linear(y_p, layer.coefficients)], dim=-1) for y_p, layer in zip(pivots, layers, strict=True)
        ]

    return call


def _module(layer: PivotLayer) -> PifaLinear:
    rank, n = layer.pivot_weight.shape
    with torch.device("meta"):
        module = PifaLinear(n, rank + layer.coefficients.shape[0], rank)
    module.pivot_weight = nn.Parameter(layer.pivot_weight, requires_grad=False)
    module.coefficients = nn.Parameter(layer.coefficients, requires_grad=False)
    module.pivot_rows = torch.arange(rank, dtype=torch.int32, device=layer.pivot_weight.device)
    module.derive_output_index()
    return module


class _Siblings(nn.Module):
    """Modules that read the same x, as a model has them."""

    def __init__(self, layers: list[PivotLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_module(layer) for layer in layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


def _prepared(settings: list[Setting]) -> tuple[Kernels, list[PivotLayer]]:
    kernels = settings[0].kernels
    if kernels is None:
        raise RuntimeError("no kernel library")
    layers = [pivot_layer(s, index=False) for s in settings]
    for layer in layers:
        for tokens in (1, 2048):
            kernels.prepare(layer.problem(tokens))
    return kernels, layers


def _pivot_kernels(settings: list[Setting]) -> Together:
    kernels, layers = _prepared(settings)
    if len(layers) == 1:
        return lambda x: apply_group(kernels, layers, x)
    siblings = _Siblings(layers)
    # Not drawn: every kind has the same weights for the same seed.
    x = layers[0].pivot_weight.new_zeros(1, settings[0].in_features)
    groups = group_launches(siblings, partial(apply_group, kernels), example={"x": x})
    assert [len(paths) for paths in groups.paths] == [len(layers)]
    return siblings


def _pivot_kernels_alone(settings: list[Setting]) -> Together:
    kernels, layers = _prepared(settings)
    return lambda x: [apply(kernels, layer, x) for layer in layers]


KINDS: dict[str, Callable[[list[Setting]], Together]] = {
    "dense": _dense,
    "2:4 cuSPARSELt": lambda settings: _two_four(settings, "cusparselt"),
    "2:4 CUTLASS": lambda settings: _two_four(settings, "cutlass"),
    "low-rank, equal density": _low_rank,
    "PIFA, plain operators": _pivot_plain,
    "PIFA, our kernels": _pivot_kernels,
    "PIFA, our kernels, a launch each": _pivot_kernels_alone,
}


@dataclass(kw_only=True)
class Decoder:
    """Layers with random weights, and a key-value cache for one sequence.

    `length` is the number of tokens that the cache has room for.
    """

    shape: Shape
    length: int
    dtype: torch.dtype
    device: str
    layers: list[list[Together]] = field(default_factory=list)

    def fill(self, kind: str, *, density: float, kernels: Kernels | None, seed: int = 0) -> Decoder:
        """Makes the weights; kinds with the same factors have the same ones for the same seed."""
        torch.manual_seed(seed)
        for _ in range(self.shape.layers):
            made = []
            for n, outs in self.shape.linears():
                common = {"in_features": n, "density": density, "dtype": self.dtype, "device": self.device}
                made.append(KINDS[kind]([Setting(**common, out_features=m, kernels=kernels) for m in outs]))  # type: ignore[arg-type]
            self.layers.append(made)
        s = self.shape
        room = (s.layers, 2, 1, s.kv_heads, self.length, s.head_dim)
        self.cache = torch.zeros(room, dtype=self.dtype, device=self.device)
        half = torch.arange(0, s.head_dim, 2, device=self.device) / s.head_dim
        angles = torch.arange(self.length, device=self.device)[:, None] * ROPE_BASE**-half
        self.cos, self.sin = (f(torch.cat([angles, angles], dim=-1)).to(self.dtype) for f in (torch.cos, torch.sin))
        return self

    def forward(self, x: torch.Tensor, past: int) -> torch.Tensor:
        """Takes hidden states [t, hidden] behind `past` cached tokens through all layers."""
        for number, (qkv, out, up, down) in enumerate(self.layers):
            x = x + out(self._attention(qkv(self._norm(x)), number, past))[0]
            gate, other = up(self._norm(x))
            x = x + down(silu(gate) * other)[0]
        return x

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (x.shape[-1],), eps=EPSILON)

    def _rotated(self, x: torch.Tensor, past: int) -> torch.Tensor:
        cos, sin = (each[past : past + x.shape[-2]] for each in (self.cos, self.sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def _attention(self, qkv: list[torch.Tensor], number: int, past: int) -> torch.Tensor:
        tokens = qkv[0].shape[0]
        q, k, v = (each.view(1, tokens, -1, self.shape.head_dim).transpose(1, 2) for each in qkv)
        end = past + tokens
        keys, values = self.cache[number]
        keys[:, :, past:end] = self._rotated(k, past)
        values[:, :, past:end] = v
        q = self._rotated(q, past)
        grouped = self.shape.heads != self.shape.kv_heads
        # A prompt comes first and alone, a later token sees everything: no other mask is needed.
        y = scaled_dot_product_attention(
            q, keys[:, :, :end], values[:, :, :end], is_causal=tokens > 1, enable_gqa=grouped
        )
        return y.transpose(1, 2).reshape(tokens, -1)
