"""Ranks within one budget, and the scores that layer densities are made of, against independent counts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from pifa_deploy.checkpoint import ModuleSpec
from pifa_deploy.compression.allocation import (
    Allocation,
    AllocationOptions,
    allocate,
)
from pifa_deploy.compression.layer_density import (
    effective_rank,
    effective_rank_densities,
    outlier_ratio,
    owl_densities,
    pooled_outlier_ratio,
)
from pifa_deploy.compression.linear_shape import LinearShape
from pifa_deploy.density import low_rank_rank_for_density, rank_for_density

FORMATS = ("pifa", "lowrank")
DENSITIES = (0.3, 0.4, 0.5, 0.55, 0.7, 0.85, 0.95)
RANK_OF = {"pifa": rank_for_density, "lowrank": low_rank_rank_for_density}


def decoder(layers: int, attention: dict[str, tuple[int, int]], mlp: dict[str, tuple[int, int]]) -> list[LinearShape]:
    """Returns the linears of a model in the order of its modules."""
    return [
        LinearShape(name=f"layers.{i}.{name}", layer=i, kind=kind, out_features=shape[0], in_features=shape[1])
        for i in range(layers)
        for kind, group in (("attention", attention), ("mlp", mlp))
        for name, shape in group.items()
    ]


def llama(layers: int, hidden: int, middle: int, *, values: int) -> list[LinearShape]:
    """Returns LLaMA's seven linears a layer; `values` is the width of k and v."""
    attention = {"q": (hidden, hidden), "k": (values, hidden), "v": (values, hidden), "o": (hidden, hidden)}
    return decoder(layers, attention, {"gate": (middle, hidden), "up": (middle, hidden), "down": (hidden, middle)})


def mixed() -> list[LinearShape]:
    """Returns layers that differ in their shapes, wide and tall and odd."""
    random = np.random.default_rng(3)
    shapes = []
    for layer in range(12):
        for place, kind in enumerate(("attention", "attention", "mlp", "mlp")):
            m, n = (int(size) for size in random.integers(257, 1999, size=2))
            shapes.append(LinearShape(name=f"{layer}.{place}", layer=layer, kind=kind, out_features=m, in_features=n))
    return shapes


MODELS = {
    "llama-7b": llama(32, 4096, 11008, values=4096),
    "smollm2-135m": llama(30, 576, 1536, values=192),
    "mistral-7b": llama(32, 4096, 14336, values=1024),
    "fused": decoder(24, {"qkv": (1536, 1024), "o": (1024, 1024)}, {"gate_up": (5632, 1024), "down": (1024, 2816)}),
    "mixed": mixed(),
}
MODES: dict[str, dict[str, Any]] = {
    "attention": {"attention_sparsity": 1.1},
    "owl": {"layer_density": "owl"},
    "effective-rank": {"layer_density": "effective-rank"},
    "owl-attention": {"layer_density": "owl", "attention_sparsity": 0.9},
    "effective-rank-attention": {"layer_density": "effective-rank", "attention_sparsity": 1.1},
}


def options(density: float, *, attention_sparsity: float | None = None, **changes: Any) -> AllocationOptions:
    """Returns options; attention is this many times as sparse as the whole, which leaves the MLP a density below 1."""
    if attention_sparsity is not None:
        changes["attention_density"] = 1.0 - attention_sparsity * (1.0 - density)
    return AllocationOptions(density=density, **changes)


def budget(shapes: Sequence[LinearShape], density: float) -> Fraction:
    """Returns the numbers that the density allows, read as the decimal that was written: 0.7 is seven tenths."""
    return Fraction(str(density)) * dense_total(shapes)


def scores(shapes: Sequence[LinearShape], seed: int = 0) -> dict[int, float]:
    """Returns scores that grow towards the first layers, as OWL's do, with one far out."""
    random = np.random.default_rng(seed)
    layers = sorted({shape.layer for shape in shapes})
    found = {layer: 1.0 + 3.0 * (len(layers) - place) / len(layers) for place, layer in enumerate(layers)}
    found = {layer: score * float(random.uniform(0.7, 1.3)) for layer, score in found.items()}
    return {**found, layers[1]: 9.0}


def stored(shape: LinearShape, rank: int, format_: str) -> int:
    """Returns the numbers in the tensors that a checkpoint has for this module, without pivot rows."""
    tensors = ModuleSpec(
        rank=rank, in_features=shape.in_features, out_features=shape.out_features, format=format_
    ).tensors()
    return sum(math.prod(size) for name, size in tensors.items() if name != "pivot_rows")


def total(found: Allocation, shapes: Sequence[LinearShape], format_: str) -> int:
    return sum(
        shape.out_features * shape.in_features
        if shape.name in found.dense
        else stored(shape, found.ranks[shape.name], format_)
        for shape in shapes
    )


def dense_total(shapes: Sequence[LinearShape]) -> int:
    return sum(shape.out_features * shape.in_features for shape in shapes)


def raisable(found: Allocation, shapes: Sequence[LinearShape], asked: AllocationOptions) -> list[str]:
    """Returns the linears whose rank could be one multiple higher within the budget, by trying each."""
    now = total(found, shapes, asked.format)
    names = []
    for shape in shapes:
        rank = found.ranks.get(shape.name, 0)
        if shape.name in found.dense or rank + asked.rank_multiple > min(shape.out_features, shape.in_features):
            continue
        higher = stored(shape, rank + asked.rank_multiple, asked.format)
        fits = now - stored(shape, rank, asked.format) + higher <= budget(shapes, asked.density)
        if fits and higher < shape.out_features * shape.in_features:
            names.append(shape.name)
    return names


def check(found: Allocation, shapes: Sequence[LinearShape], asked: AllocationOptions) -> None:
    """Asserts what holds for every allocation."""
    assert {*found.ranks, *found.dense} == {shape.name for shape in shapes}
    assert not found.ranks.keys() & found.dense.keys()
    numbers, size = total(found, shapes, asked.format), dense_total(shapes)
    assert found.density == numbers / size
    assert numbers <= budget(shapes, asked.density)
    for shape in shapes:
        if shape.name in found.ranks:
            rank = found.ranks[shape.name]
            assert rank >= 1
            assert rank % asked.rank_multiple == 0
            assert stored(shape, rank, asked.format) < shape.out_features * shape.in_features
    # Targets are the densities that the budget is shared by.
    for targets, key in ((found.layer_densities, "layer"), (found.kind_densities, "kind")):
        assert all(0.0 < target <= 1.0 for target in targets.values())
        weights = {value: dense_total([s for s in shapes if getattr(s, key) == value]) for value in targets}
        assert math.fsum(weights[value] * targets[value] for value in targets) / size == pytest.approx(asked.density)


# The budget


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_the_budget_is_met_within_a_thousandth_and_never_exceeded(model: str, mode: str, format_: str) -> None:
    shapes = MODELS[model]
    for density in DENSITIES:
        asked = options(density, format=format_, **MODES[mode])
        found = allocate(shapes, asked, scores=scores(shapes))
        check(found, shapes, asked)
        assert asked.density - found.density <= 1e-3
        assert raisable(found, shapes, asked) == []


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("multiple", [8, 16, 64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", ["llama-7b", "smollm2-135m", "mistral-7b", "fused"])
def test_rank_multiples_leave_no_rank_that_could_be_raised(model: str, mode: str, multiple: int, format_: str) -> None:
    shapes = MODELS[model]
    for density in (0.5, 0.7, 0.9):
        asked = options(density, format=format_, rank_multiple=multiple, **MODES[mode])
        found = allocate(shapes, asked, scores=scores(shapes))
        check(found, shapes, asked)
        assert raisable(found, shapes, asked) == []
        steps = [
            multiple * (shape.out_features + shape.in_features) / dense_total(shapes)
            for shape in shapes
            if shape.name in found.ranks
        ]
        assert asked.density - found.density <= max(steps)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("seed", range(20))
def test_small_models_of_any_shape_keep_the_budget(seed: int, format_: str) -> None:
    random = np.random.default_rng(seed)
    shapes = [
        LinearShape(
            name=f"{i}",
            layer=i // 3,
            kind=("attention", "mlp")[i % 2],
            out_features=int(random.integers(1, 60)),
            in_features=int(random.integers(1, 60)),
        )
        for i in range(12)
    ]
    for density in (0.5, 0.62, 0.8, 0.97):
        for multiple in (1, 3, 8):
            for mode in ("owl", "effective-rank"):
                asked = options(density, format=format_, rank_multiple=multiple, layer_density=mode)
                try:
                    found = allocate(shapes, asked, scores=scores(shapes, seed))
                except ValueError as error:
                    assert "raise the density above" in str(error)  # noqa: PT017
                    continue
                check(found, shapes, asked)
                assert raisable(found, shapes, asked) == []


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(("density", "multiple"), [(0.6, 16), (0.45, 8), (0.5, 1)])
def test_the_rest_goes_to_the_linear_farthest_below_its_share(density: float, multiple: int, format_: str) -> None:
    shapes = llama(6, 256, 704, values=64)
    # Scores all alike: every share is the density.
    asked = options(density, layer_density="owl", rank_multiple=multiple, format=format_)
    found = allocate(shapes, asked, scores=dict.fromkeys(range(6), 1.0))
    ranks = [RANK_OF[format_](s.out_features, s.in_features, density, multiple=multiple) for s in shapes]
    start = list(ranks)
    while True:
        numbers = [stored(s, rank, format_) for s, rank in zip(shapes, ranks, strict=True)]
        left = budget(shapes, density) - sum(numbers)
        steps = [stored(s, r + multiple, format_) - now for s, r, now in zip(shapes, ranks, numbers, strict=True)]
        fitting = [place for place, step in enumerate(steps) if step <= left]
        if not fitting:
            break
        ranks[min(fitting, key=lambda place: (numbers[place] / shapes[place].size, place))] += multiple
    assert ranks != start
    assert list(found.ranks.values()) == ranks


# Uniform densities


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_uniform_ranks_are_those_of_the_formula(model: str, format_: str) -> None:
    shapes = MODELS[model]
    for density in DENSITIES:
        for multiple in (1, 8):
            asked = options(density, format=format_, rank_multiple=multiple)
            found = allocate(shapes, asked)
            expected = {
                s.name: RANK_OF[format_](s.out_features, s.in_features, density, multiple=multiple) for s in shapes
            }
            assert found.ranks == expected
            assert found.dense == {}
            check(found, shapes, asked)
            assert list(found.layer_densities.values()) == pytest.approx([density] * len(found.layer_densities))


def test_uniform_ranks_are_exact_where_the_density_is_met_exactly() -> None:
    # 0.7 of both sizes is a whole number of ranks; a density that is off by rounding would lose one.
    shapes = [
        LinearShape(name=f"{size}", layer=size, kind="mlp", out_features=size, in_features=size) for size in (100, 40)
    ]
    found = allocate(shapes, options(0.7, format="lowrank"))
    assert found.ranks == {"100": 35, "40": 14}
    assert found.density == 0.7


def test_the_ranks_of_llama_7b_are_those_of_the_paper() -> None:
    found = allocate(MODELS["llama-7b"], options(0.5))
    # (m + n + 1 - sqrt((m + n + 1)^2 - 4 m n / 2)) / 2, rounded down
    for name, (m, n) in {"q": (4096, 4096), "gate": (11008, 4096), "down": (4096, 11008)}.items():
        expected = int((m + n + 1 - math.sqrt((m + n + 1) ** 2 - 4 * int(m * n * 0.5))) / 2)
        assert found.ranks[f"layers.31.{name}"] == expected


@pytest.mark.parametrize("format_", FORMATS)
def test_what_stays_dense_is_paid_for_by_the_others(format_: str) -> None:
    shapes = [
        *llama(4, 128, 352, values=128),
        LinearShape(name="router", layer=0, kind="mlp", out_features=1, in_features=4096),
        LinearShape(name="narrow", layer=3, kind="attention", out_features=128, in_features=7),
    ]
    for density in (0.5, 0.7):
        asked = options(density, format=format_, rank_multiple=8)
        found = allocate(shapes, asked)
        check(found, shapes, asked)
        assert found.dense == {
            "router": "1 x 4096 has no multiple of 8 as rank whose factors and indices take less than the dense matrix",
            "narrow": "128 x 7 has no multiple of 8 as rank whose factors and indices take less than the dense matrix",
        }
        rest = shapes[:-2]
        left = (density * dense_total(shapes) - 4096 - 128 * 7) / dense_total(rest)
        assert left < density
        assert found.ranks == {s.name: RANK_OF[format_](s.out_features, s.in_features, left, multiple=8) for s in rest}


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("mode", ["uniform", "owl"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 50), (50, 1), (2, 2)])
def test_matrices_too_small_for_any_rank_stay_dense(m: int, n: int, mode: str, format_: str) -> None:
    shapes = [
        LinearShape(name="small", layer=0, kind="mlp", out_features=m, in_features=n),
        LinearShape(name="large", layer=0, kind="mlp", out_features=97, in_features=61),
    ]
    asked = options(0.6, format=format_, layer_density=mode)
    found = allocate(shapes, asked, scores={0: 1.0})
    check(found, shapes, asked)
    assert list(found.dense) == ["small"]


# Attention and MLP


@pytest.mark.parametrize("model", ["llama-7b", "smollm2-135m", "mistral-7b", "fused"])
@pytest.mark.parametrize("format_", FORMATS)
def test_the_mlp_has_what_attention_leaves(model: str, format_: str) -> None:
    shapes = MODELS[model]
    for density, attention in ((0.5, 0.4), (0.55, 0.6), (0.7, 0.9)):
        found = allocate(shapes, AllocationOptions(density=density, attention_density=attention, format=format_))
        sizes = {kind: dense_total([s for s in shapes if s.kind == kind]) for kind in ("attention", "mlp")}
        mlp = (density * dense_total(shapes) - attention * sizes["attention"]) / sizes["mlp"]
        assert found.kind_densities == {"attention": pytest.approx(attention), "mlp": pytest.approx(mlp)}
        for shape in shapes:
            reached = stored(shape, found.ranks[shape.name], format_) / shape.size
            step = (shape.out_features + shape.in_features) / shape.size
            assert abs(reached - found.kind_densities[shape.kind]) <= 1.5 * step


def test_attention_of_density_one_stays_dense() -> None:
    shapes = MODELS["smollm2-135m"]
    asked = AllocationOptions(density=0.7, attention_density=1.0)
    found = allocate(shapes, asked)
    check(found, shapes, asked)
    assert found.dense == {s.name: "its share of the budget is density 1" for s in shapes if s.kind == "attention"}
    assert found.kind_densities["attention"] == 1.0


def test_an_mlp_density_that_cannot_be_is_refused_with_the_range_that_can() -> None:
    shapes = llama(2, 100, 200, values=100)  # 4 : 6
    with pytest.raises(
        ValueError,
        match=r"density 0\.9 with attention_density 0\.5 needs an mlp density of 1\.1667, expected 0 < density <= 1; "
        r"choose an attention_density between 0\.7500 and 1\.0000",
    ):
        allocate(shapes, AllocationOptions(density=0.9, attention_density=0.5))
    with pytest.raises(ValueError, match=r"needs an mlp density of -0\.1667, .* between 0\.0000 and 0\.7500"):
        allocate(shapes, AllocationOptions(density=0.3, attention_density=1.0))
    allocate(shapes, AllocationOptions(density=0.9, attention_density=0.76))


def test_an_attention_density_needs_both_kinds() -> None:
    shapes = [shape for shape in MODELS["fused"] if shape.kind == "mlp"]
    with pytest.raises(
        ValueError, match=r"attention_density is 0\.5, but there are 0 attention and 48 mlp linears; .* leave .* out"
    ):
        allocate(shapes, AllocationOptions(density=0.5, attention_density=0.5))


def test_kind_and_layer_densities_multiply_as_in_the_research_code() -> None:
    shapes, given = MODELS["llama-7b"], scores(MODELS["llama-7b"])
    asked = AllocationOptions(density=0.5, attention_density=0.4, layer_density="owl")
    found = allocate(shapes, asked, scores=given)
    raw = np.array([given[layer] for layer in range(32)])
    layer = (raw - raw.min()) / (raw.max() - raw.min()) * 2 * 0.08
    layer = layer - layer.mean() + 0.5
    for shape in shapes:
        kind = found.kind_densities[shape.kind]
        target = kind * layer[shape.layer] / layer.mean()
        rank = rank_for_density(shape.out_features, shape.in_features, float(target))
        assert abs(found.ranks[shape.name] - rank) <= 2  # the greedy step


# Layer densities


@pytest.mark.parametrize("density", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("spread", [0.0, 0.08, 0.15])
def test_owl_densities_are_those_of_its_published_code_on_equal_layers(density: float, spread: float) -> None:
    given = scores(MODELS["smollm2-135m"])
    raw = np.array([given[layer] for layer in range(30)])
    expected = (raw - raw.min()) * (1 / (raw.max() - raw.min()) * spread * 2)
    expected = expected - np.mean(expected) + density
    found = owl_densities(given, dict.fromkeys(range(30), 100), density=density, spread=spread)
    np.testing.assert_allclose(list(found.values()), expected, atol=1e-12)


@pytest.mark.parametrize("given", [{0: 0.0, 1: 1.0, 2: 1.0, 3: 1.0}, {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}], ids=str)
def test_owl_densities_stay_between_a_tenth_of_the_density_and_one(given: dict[int, float]) -> None:
    sizes = {0: 10, 1: 20, 2: 30, 3: 40}
    for density, spread in ((0.97, 0.08), (0.5, 0.4), (0.05, 0.08)):
        found = owl_densities(given, sizes, density=density, spread=spread)
        assert all(0.1 * density - 1e-12 <= d <= 1.0 for d in found.values())
        assert sum(sizes[layer] * found[layer] for layer in sizes) / 100 == pytest.approx(density, abs=1e-12)


def test_effective_rank_densities_are_proportional_within_their_limits() -> None:
    sizes = {0: 10, 1: 20, 2: 30, 3: 40}
    found = effective_rank_densities({0: 0.5, 1: 0.6, 2: 0.7, 3: 0.8}, sizes, density=0.5)
    ratios = [found[0] / 0.5, found[1] / 0.6, found[2] / 0.7, found[3] / 0.8]
    assert ratios == pytest.approx([ratios[0]] * 4, rel=1e-12)
    found = effective_rank_densities({0: 0.01, 1: 0.6, 2: 0.7, 3: 5.0}, sizes, density=0.6)
    assert (found[0], found[3]) == (pytest.approx(0.3), pytest.approx(0.9))
    assert found[1] / 0.6 == pytest.approx(found[2] / 0.7)
    assert sum(sizes[layer] * found[layer] for layer in sizes) / 100 == pytest.approx(0.6, abs=1e-12)
    assert max(effective_rank_densities({0: 1.0, 1: 9.0}, {0: 9, 1: 1}, density=0.9).values()) <= 1.0


@pytest.mark.parametrize("mode", ["owl", "effective-rank"])
def test_a_higher_score_never_means_a_lower_rank(mode: str) -> None:
    shapes, given = MODELS["llama-7b"], scores(MODELS["llama-7b"])
    found = allocate(shapes, options(0.5, layer_density=mode), scores=given)
    order = sorted(given, key=lambda layer: given[layer])
    for name in ("q", "o", "gate", "down"):
        ranks = [found.ranks[f"layers.{layer}.{name}"] for layer in order]
        assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(ranks))  # the greedy step
        assert ranks[-1] > ranks[0] + 50


@pytest.mark.parametrize("format_", FORMATS)
def test_layers_whose_share_is_all_of_it_stay_dense(format_: str) -> None:
    shapes = MODELS["smollm2-135m"]
    asked = options(0.93, layer_density="owl", format=format_)
    found = allocate(shapes, asked, scores={**dict.fromkeys(range(30), 1.0), 4: 2.0, 5: 2.0})
    check(found, shapes, asked)
    assert found.dense == {s.name: "its share of the budget is density 1" for s in shapes if s.layer in (4, 5)}
    assert found.layer_densities[4] == found.layer_densities[5] == 1.0


def test_a_score_may_lead_a_linear_below_its_smallest_rank_and_the_others_pay() -> None:
    shapes = MODELS["smollm2-135m"]
    asked = options(0.42, layer_density="effective-rank", rank_multiple=64)
    found = allocate(shapes, asked, scores={layer: 1.0 + layer for layer in range(30)})
    check(found, shapes, asked)
    assert found.ranks["layers.0.k"] == 64


# What is refused


def test_a_density_below_the_smallest_rank_names_the_first_linear_and_what_would_do() -> None:
    shapes = MODELS["smollm2-135m"]
    message = (
        r"layers\.0\.k: density 0\.3 of a 192 x 576 matrix allows rank 4\d, which holds no positive multiple of 64; "
        r"raise the density or lower the rank multiple; density (0\.\d+) is the least that would do"
    )
    with pytest.raises(ValueError, match=message) as caught:
        allocate(shapes, options(0.3, rank_multiple=64))
    least = float(str(caught.value).partition("; density ")[2].split()[0])
    assert allocate(shapes, options(least, rank_multiple=64)).ranks["layers.0.k"] == 64
    with pytest.raises(ValueError, match=r"layers\.0\.k: density"):
        allocate(shapes, options(least - 2e-4, rank_multiple=64))
    with pytest.raises(ValueError, match=r"layers\.0\.k: density"):
        allocate(shapes, AllocationOptions(density=0.6, attention_density=0.3, rank_multiple=64))


def test_smallest_ranks_and_dense_linears_beyond_the_budget_are_refused() -> None:
    shapes = llama(2, 64, 128, values=16)
    # k [16, 64] has no rank 16 below the dense size; rank 32 of the others is more than a tenth.
    with pytest.raises(
        ValueError,
        match=r"layers\.0\.k \(16 x 64\) has no rank at density 0\.1000: with rank_multiple 32 the smallest ranks and "
        r"dense linears take 0\.\d+ of it all; raise the density above that or lower rank_multiple",
    ) as caught:
        allocate(shapes, options(0.1, layer_density="effective-rank", rank_multiple=32), scores={0: 1.0, 1: 2.0})
    least = float(str(caught.value).partition("linears take ")[2].split()[0])
    asked = options(least + 1e-4, layer_density="effective-rank", rank_multiple=32)
    check(allocate(shapes, asked, scores={0: 1.0, 1: 2.0}), shapes, asked)
    with pytest.raises(ValueError, match=r"large \(1 x 900\) has no rank at density 0\.5000"):
        allocate(
            [
                LinearShape(name="small", layer=0, kind="mlp", out_features=20, in_features=20),
                LinearShape(name="large", layer=0, kind="mlp", out_features=1, in_features=900),
            ],
            options(0.5),
        )


@pytest.mark.parametrize("mode", ["owl", "effective-rank"])
def test_scores_must_cover_every_layer(mode: str) -> None:
    shapes, asked = llama(3, 64, 128, values=64), options(0.5, layer_density=mode)
    for given in (None, {}, {0: 1.0, 2: 1.0}):
        with pytest.raises(
            ValueError, match=rf"score of layer [01] is None, expected a finite .* layer_density {mode}"
        ):
            allocate(shapes, asked, scores=given)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"score of layer 1 is {bad}, expected a finite number"):
            allocate(shapes, asked, scores={0: 1.0, 1: bad, 2: 1.0})


def test_an_effective_rank_of_zero_is_refused() -> None:
    shapes = llama(2, 64, 128, values=64)
    with pytest.raises(ValueError, match=r"score of layer 0 is 0\.0, .* positive for effective-rank"):
        allocate(shapes, options(0.5, layer_density="effective-rank"), scores={0: 0.0, 1: 1.0})
    allocate(shapes, options(0.5, layer_density="owl"), scores={0: 0.0, 1: 1.0})


def test_names_that_do_not_tell_linears_apart_are_refused() -> None:
    shapes = llama(1, 64, 128, values=64)
    with pytest.raises(ValueError, match=r"layers\.0\.q is listed 2 times; expected distinct names"):
        allocate([*shapes, shapes[0]], options(0.5))
    with pytest.raises(ValueError, match="no linears to allocate ranks to; expected at least one"):
        allocate([], options(0.5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.0}, "density is 0.0, expected 0 < density < 1"),
        ({"density": 1.0}, "density is 1.0, expected"),
        ({"density": math.nan}, "density is nan, expected"),
        ({"attention_density": 0.0}, "attention_density is 0.0, expected 0 < attention_density <= 1"),
        ({"attention_density": 1.5}, "attention_density is 1.5, expected"),
        ({"layer_density": "magic"}, "layer_density is 'magic', expected one of"),
        ({"owl_multiple": 0.0}, "owl_multiple is 0.0, expected a positive number"),
        ({"owl_multiple": math.inf}, "owl_multiple is inf, expected a positive number"),
        ({"owl_spread": -0.1}, "owl_spread is -0.1, expected 0 <= owl_spread < 1"),
        ({"rank_multiple": 0}, "rank_multiple is 0, expected at least 1"),
        ({"format": "zip"}, "format is 'zip', expected one of"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AllocationOptions(**{"density": 0.5, **fields})


def test_shapes_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.b: kind is 'head', expected one of"):
        LinearShape(name="a.b", layer=0, kind="head", out_features=4, in_features=4)
    with pytest.raises(ValueError, match=r"a\.b: is 0 x 4, expected at least 1 x 1"):
        LinearShape(name="a.b", layer=0, kind="mlp", out_features=0, in_features=4)


# Order and growth


@pytest.mark.parametrize("mode", MODES)
def test_the_same_input_gives_the_same_ranks_in_the_order_given(mode: str) -> None:
    shapes = MODELS["smollm2-135m"]
    asked = options(0.6, rank_multiple=8, **MODES[mode])
    first, second = (allocate(shapes, asked, scores=scores(shapes)) for _ in range(2))
    assert first == second
    names = [shape.name for shape in shapes]
    assert list(first.ranks) == [name for name in names if name in first.ranks]
    assert list(first.dense) == [name for name in names if name in first.dense]
    # Scores are looked up, their own order is no matter.
    backwards = dict(reversed(scores(shapes).items()))
    assert allocate(shapes, asked, scores=backwards) == first


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("mode", ["uniform", "owl", "effective-rank"])
@pytest.mark.parametrize("model", ["smollm2-135m", "mistral-7b", "mixed"])
def test_more_density_never_lowers_the_total(model: str, mode: str, format_: str) -> None:
    shapes = MODELS[model]
    before = 0
    for density in np.arange(0.2, 0.99, 0.02):
        asked = options(float(density), layer_density=mode, format=format_)
        numbers = total(allocate(shapes, asked, scores=scores(shapes)), shapes, format_)
        assert numbers > before
        before = numbers


# Scores


def weights(shape: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns W [m, n] with heavy tails and X [n, tokens] with features of very different sizes."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((shape[1], 3 * shape[1] + 2)) * np.logspace(0.7, -0.7, shape[1])[:, None]
    return random.standard_t(2.5, shape), inputs


def outliers(pairs: Sequence[tuple[np.ndarray, np.ndarray]], multiple: float) -> float:
    """Returns the share of outliers by the definition, entry for entry."""
    values = []
    for weight, inputs in pairs:
        for row in weight.tolist():
            for entry, feature in zip(row, inputs.tolist(), strict=True):
                values.append(abs(entry) * math.sqrt(math.fsum(x * x for x in feature)))
    limit = multiple * math.fsum(values) / len(values)
    return sum(value > limit for value in values) / len(values)


@pytest.mark.parametrize("multiple", [1.0, 3.0, 5.0, 10.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (31, 17), (17, 31)])
def test_outliers_are_counted_by_the_definition(shape: tuple[int, int], multiple: float) -> None:
    weight, inputs = weights(shape)
    found = outlier_ratio(torch.from_numpy(weight), torch.from_numpy((inputs**2).sum(1)), multiple=multiple)
    if shape == (1, 1):
        assert found == 0.0
        return
    assert found == outliers([(weight, inputs)], multiple)


def test_outliers_of_a_layer_share_one_mean() -> None:
    pairs = [weights((23, 12), 1), weights((12, 29), 2), weights((7, 12), 3)]
    pairs[1] = (pairs[1][0] * 4, pairs[1][1])
    tensors = [(torch.from_numpy(w), torch.from_numpy((x**2).sum(1))) for w, x in pairs]
    found = pooled_outlier_ratio(tensors, multiple=4.0)
    assert found == outliers(pairs, 4.0)
    apart = [outlier_ratio(*tensor, multiple=4.0) * tensor[0].numel() for tensor in tensors]
    assert found != pytest.approx(sum(apart) / sum(tensor[0].numel() for tensor in tensors))


def test_outliers_do_not_depend_on_blocks_of_rows_dtype_or_the_scale_of_inputs() -> None:
    weight = torch.randn(2500, 8, generator=torch.Generator().manual_seed(1)).half()
    diagonal = torch.linspace(0.0, 3.0, 8)
    exact = (weight.double().abs() * diagonal.double().sqrt()).numpy()
    expected = float((exact > 2.5 * exact.mean()).mean())
    assert 0.0 < expected < 0.5
    for scale in (1.0, 4096.0):
        assert outlier_ratio(weight, diagonal * scale, multiple=2.5) == expected
        assert outlier_ratio(weight.double(), diagonal * scale, multiple=2.5) == expected


def test_nothing_is_an_outlier_of_nothing() -> None:
    assert outlier_ratio(torch.zeros(4, 6), torch.ones(6)) == 0.0
    assert outlier_ratio(torch.ones(4, 6), torch.zeros(6)) == 0.0


@pytest.mark.parametrize(
    "diagonal", [torch.ones(5), torch.ones(6, 6), torch.tensor([1.0, -1.0, 1, 1, 1, 1]), torch.full((6,), math.nan)]
)
def test_a_diagonal_that_is_none_is_refused(diagonal: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"the moment diagonal of a \(4, 6\) weight is .*; expected one finite number"):
        outlier_ratio(torch.ones(4, 6), diagonal)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (30, 30), (40, 24), (24, 40), (97, 31)])
def test_the_effective_rank_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    weight, inputs = weights(shape)
    moment = inputs @ inputs.T
    sigma = np.linalg.svd(weight @ np.linalg.cholesky(moment), compute_uv=False)
    share = sigma / sigma.sum()
    expected = math.exp(-math.fsum(p * math.log(p) for p in share))
    found = effective_rank(torch.from_numpy(weight), torch.from_numpy(moment))
    # Squaring halves the digits of the smallest singular values, 1e-8 of the largest each at worst.
    assert found == pytest.approx(expected, rel=1e-7)
    assert 1.0 - 1e-12 <= found <= min(shape) + 1e-9
    half = effective_rank(torch.from_numpy(weight).float(), torch.from_numpy(moment).float())
    assert half == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25)])
@pytest.mark.parametrize("rank", [1, 4, 20])
def test_equal_singular_values_have_their_number_as_effective_rank(shape: tuple[int, int], rank: int) -> None:
    random = np.random.default_rng(7)
    left = np.linalg.qr(random.standard_normal((shape[0], shape[0])))[0][:, :rank]
    right = np.linalg.qr(random.standard_normal((shape[1], shape[1])))[0][:rank]
    weight = torch.from_numpy(left @ right)
    # Rounding must not count as rank.
    assert effective_rank(weight, torch.eye(shape[1])) == pytest.approx(rank, rel=1e-9)


def test_no_input_has_no_effective_rank() -> None:
    assert effective_rank(torch.ones(4, 6), torch.zeros(6, 6)) == 0.0
    assert effective_rank(torch.zeros(6, 4), torch.eye(4)) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_entries_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"W moment W\^T has NaN or Inf entries; expected a finite weight and moment"):
        effective_rank(torch.full((3, 4), bad), torch.eye(4))
    with pytest.raises(ValueError, match="has NaN or Inf entries"):
        effective_rank(torch.ones(6, 4), torch.full((4, 4), bad))


def test_results_cannot_be_changed() -> None:
    found = allocate(llama(1, 64, 128, values=64), options(0.5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.density = 1.0  # type: ignore[misc]
