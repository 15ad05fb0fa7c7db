"""Bounds from datasheets: the reference numbers come out again, and break-even points are where bounds cross."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest

from pifa_deploy.density import rank_for_density
from pifa_deploy.errors import ExitCode, MisfitError, MissingCapabilityError
from pifa_deploy.gpu_limits import LimitOptions, Limits, limits_of
from pifa_deploy.roofline import (
    DENSE,
    LOW_RANK_DENSITY,
    LOW_RANK_RANK,
    MAX_TOKENS,
    PIFA,
    PIFA_FUSED,
    PIFA_PLAIN,
    PIFA_SCATTERED,
    SPARSE,
    VARIANTS,
    Layer,
    break_even_density,
    decoder_bound,
    layer_seconds,
    padded_seconds,
    paying_tokens,
    work,
)
from pifa_deploy.targets import TARGETS

MLP = 11008
PROJECTIONS = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)} | {
    "gate": (MLP, 4096),
    "up": (MLP, 4096),
    "down": (4096, MLP),
}
STACKED = {"qkv": (3 * 4096, 4096), "o": (4096, 4096), "gate_up": (2 * MLP, 4096), "down": (4096, MLP)}
GROUPS = dict.fromkeys("qkv", "qkv") | {"gate": "gate_up", "up": "gate_up"}


def gpu(name: str = "h200", **changes: float | str) -> Limits:
    return limits_of(TARGETS[name], LimitOptions(**changes))  # type: ignore[arg-type]


def layer(m: int, n: int, density: float = 0.5, name: str = "layer") -> Layer:
    return Layer(name=name, out_features=m, in_features=n, rank=rank_for_density(m, n, density), group=GROUPS.get(name))


def block(shapes: dict[str, tuple[int, int]]) -> list[Layer]:
    return [layer(m, n, name=name) for name, (m, n) in shapes.items()]


def speed_up(layers: Sequence[Layer], variant: str, tokens: int, limits: Limits) -> float:
    dense = decoder_bound(layers, DENSE, tokens, limits)
    return dense.seconds / decoder_bound(layers, variant, tokens, limits).seconds


@pytest.mark.parametrize("name", ["orin-agx", "rtx4090", "h200"])
def test_without_launches_decode_gains_what_weights_shrink(name: str) -> None:
    limits = gpu(name, launch_us=0)
    one = [layer(4096, 4096)]
    assert speed_up(one, SPARSE, 1, limits) == pytest.approx(1.78, rel=0.005)
    assert speed_up(one, PIFA, 1, limits) == pytest.approx(1 / one[0].density, rel=0.005)
    assert speed_up(one, LOW_RANK_DENSITY, 1, limits) == pytest.approx(1 / one[0].density, rel=0.005)


def test_without_launches_long_prefill_gains_what_arithmetic_shrinks() -> None:
    limits, one = gpu("rtx4090", launch_us=0), [layer(4096, 4096)]
    assert speed_up(one, SPARSE, 8192, limits) == pytest.approx(2.0, rel=1e-3)
    assert speed_up(one, PIFA, 8192, limits) == pytest.approx(1 / one[0].density, rel=1e-3)


def test_at_half_the_side_as_rank_pifa_is_a_quarter_cheaper_than_low_rank() -> None:
    one = Layer(name="a", out_features=2048, in_features=2048, rank=1024)
    assert work(one, PIFA, 2).weight_bytes == 0.75 * work(one, LOW_RANK_RANK, 2).weight_bytes
    assert work(one, LOW_RANK_RANK, 2).weight_bytes == work(one, DENSE, 2).weight_bytes


@pytest.mark.parametrize(
    ("name", "launch_us", "separate", "stacked", "sparse"),
    # The launch costs are those that the reference table's own columns imply.
    [
        ("h200", 1.27, 1.49, 1.71, 1.69),
        ("rtx4090", 1.45, 1.84, 1.92, 1.76),
        ("orin-agx", 3.5, 1.91, 1.96, 1.77),
        ("thor", 2.0, 1.93, 1.97, 1.77),
    ],
)
def test_a_llama_7b_block_decodes_as_in_the_reference_table(
    name: str, launch_us: float, separate: float, stacked: float, sparse: float
) -> None:
    limits = gpu(name, launch_us=launch_us)
    assert decoder_bound(block(PROJECTIONS), DENSE, 1, limits).launches == 4
    assert decoder_bound(block(PROJECTIONS), PIFA, 1, limits).launches == 14
    assert decoder_bound(block(STACKED), PIFA, 1, limits).launches == 8
    assert speed_up(block(PROJECTIONS), PIFA, 1, limits) == pytest.approx(separate, rel=0.02)
    assert speed_up(block(STACKED), PIFA, 1, limits) == pytest.approx(stacked, rel=0.02)
    assert speed_up(block(PROJECTIONS), SPARSE, 1, limits) == pytest.approx(sparse, rel=0.02)


def test_the_research_layout_pays_for_its_28_launches() -> None:
    limits = gpu("h200", launch_us=1.27)
    assert decoder_bound(block(PROJECTIONS), PIFA_SCATTERED, 1, limits).launches == 28
    assert speed_up(block(PROJECTIONS), PIFA_SCATTERED, 1, limits) == pytest.approx(1.18, rel=0.04)


def test_plain_operators_merge_first_products_and_pass_over_the_outputs() -> None:
    limits = gpu("rtx4090", launch_us=1.3)
    shares = {variant: decoder_bound(block(PROJECTIONS), variant, 1, limits) for variant in VARIANTS}
    # q k v and gate up: one first product each, five second ones; o and down two products each.
    assert shares[PIFA_FUSED].launches == 2 + 5 + 4
    assert shares[PIFA_PLAIN].launches == 2 + 5 + 4 + 7
    assert shares[PIFA_FUSED].seconds == pytest.approx(shares[PIFA].seconds - 3 * 1.3e-6)
    rows = sum(m for m, _ in PROJECTIONS.values())
    moved = shares[PIFA_PLAIN].seconds - shares[PIFA_FUSED].seconds - 7 * 1.3e-6
    assert moved == pytest.approx(2 * rows * 2 / limits.bandwidth)


def test_a_layer_of_a_group_that_stays_dense_is_merged_with_the_others() -> None:
    gate, up = (layer(11008, 4096, name=name) for name in ("gate", "up"))
    mixed = [replace(gate, rank=None), up]
    assert decoder_bound(mixed, PIFA_FUSED, 1, gpu()).launches == 2
    assert decoder_bound(mixed, PIFA, 1, gpu()).launches == 3


@pytest.mark.parametrize(
    ("name", "launch_us", "millions"), [("h200", 1.2, 5.5), ("rtx4090", 1.3, 1.3), ("thor", 2.0, 0.55)]
)
def test_a_layer_breaks_even_at_the_reference_size(name: str, launch_us: float, millions: float) -> None:
    limits = gpu(name, launch_us=launch_us)

    def pays(side: int) -> bool:
        return layer_seconds(layer(side, side), PIFA, 1, limits) < layer_seconds(layer(side, side), DENSE, 1, limits)

    smallest = next(side for side in range(64, 8192, 8) if pays(side))
    assert smallest * smallest / 1e6 == pytest.approx(millions, rel=0.1)


def by_hand(m: int, n: int, rank: int, variant: str, tokens: int) -> tuple[float, float, int]:
    """Returns (bytes, FLOPs, launches) in fp16 by counting the numbers of every tensor that is moved."""
    x, y, hidden = n, m, rank
    if variant == DENSE:
        return 2 * (m * n + tokens * (x + y)), 2 * tokens * m * n, 1
    if variant == LOW_RANK_RANK:
        return 2 * (rank * n + m * rank + tokens * (x + 2 * hidden + y)), 2 * tokens * rank * (m + n), 2
    # The pivot outputs are written as a part of y, and read once more.
    weights = rank * n + (m - rank) * rank
    return 2 * (weights + tokens * (x + hidden + y)), 2 * tokens * weights, 2


@pytest.mark.parametrize("variant", [DENSE, LOW_RANK_RANK, PIFA])
@pytest.mark.parametrize("tokens", [1, 7, 512, 4096])
@pytest.mark.parametrize(("m", "n", "rank"), [(1024, 4096, 300), (4096, 1024, 1), (513, 511, 511), (96, 4096, 96)])
def test_a_bound_is_that_of_counted_tensors(variant: str, tokens: int, m: int, n: int, rank: int) -> None:
    one = Layer(name="a", out_features=m, in_features=n, rank=rank)
    moved, flops, launches = by_hand(m, n, rank, variant, tokens)
    sheet = TARGETS["orin-agx"].datasheet
    assert sheet.bandwidth_gb_s
    assert sheet.tensor_tflops
    expected = max(moved / sheet.bandwidth_gb_s.value / 1e9, flops / sheet.tensor_tflops.value / 1e12)
    found = layer_seconds(one, variant, tokens, gpu("orin-agx", launch_us=5))
    assert found == pytest.approx(expected + launches * 5e-6, rel=1e-12)


@pytest.mark.parametrize(("name", "tokens"), list(product(["orin-nano", "h200"], [1, 100, 3000])))
def test_the_break_even_density_is_where_the_bounds_cross(name: str, tokens: int) -> None:
    limits, shape = gpu(name), layer(1024, 4096)
    dense = layer_seconds(shape, DENSE, tokens, limits)
    faster = [layer_seconds(replace(shape, rank=rank), PIFA, tokens, limits) < dense for rank in range(1, 1025)]
    found = break_even_density(shape, tokens, limits)
    assert found == max(
        (replace(shape, rank=place + 1).density for place, wins in enumerate(faster) if wins), default=0
    )


def test_a_layer_too_small_to_pay_has_no_break_even() -> None:
    assert break_even_density(layer(64, 64), 1, gpu("h200")) == 0
    assert paying_tokens(layer(1024, 1024), gpu("h200", launch_us=1e6)) == ()


@pytest.mark.parametrize("name", ["orin-agx", "rtx4090", "h200"])
@pytest.mark.parametrize(
    ("m", "n", "density"), [(1024, 4096, 0.5), (512, 512, 0.9), (4096, 4096, 0.97), (2048, 2048, 0.55)]
)
def test_paying_tokens_are_those_that_pay(name: str, m: int, n: int, density: float) -> None:
    limits, one = gpu(name), layer(m, n, density)
    ranges = paying_tokens(one, limits)
    for tokens in [*range(1, 5000), 20_000, MAX_TOKENS]:
        inside = any(first <= tokens and (last is None or tokens <= last) for first, last in ranges)
        wins = layer_seconds(one, PIFA, tokens, limits) < layer_seconds(one, DENSE, tokens, limits)
        assert inside == wins, (tokens, ranges)


def test_a_small_gqa_projection_loses_at_few_tokens_on_a_fast_gpu() -> None:
    ((first, last),) = paying_tokens(layer(1024, 4096), gpu("h200"))
    assert 128 < first <= 512
    assert last is None


def test_ranks_between_tiles_cost_as_much_as_the_next_tile() -> None:
    limits = gpu("h200")
    times = [padded_seconds(replace(layer(4096, 4096), rank=rank), 4096, limits) for rank in (1152, 1153, 1216)]
    assert limits.tile == 64
    assert times[0] < times[1] >= times[2]
    aligned = replace(layer(4096, 4096), rank=1152)
    assert padded_seconds(aligned, 4096, limits) == layer_seconds(aligned, PIFA, 4096, limits)


def test_the_other_outputs_are_padded_too() -> None:
    one = Layer(name="a", out_features=4100, in_features=4096, rank=1152)
    flops = 2 * 4096 * 1152 * (4096 + 2944 + 64)
    assert 4100 - 1152 == 2944 + 4
    assert padded_seconds(one, 4096, gpu("h200", launch_us=0)) == pytest.approx(flops / 989.5e12, rel=1e-12)


def test_a_column_layer_moves_its_pivots_twice_and_pads_its_inputs() -> None:
    row, column = layer(4096, 11008), replace(layer(4096, 11008), column=True)
    assert work(column, PIFA, 2).token_bytes == work(row, PIFA, 2).token_bytes + 2 * (row.rank or 0)
    assert work(column, PIFA, 2).weight_bytes == work(row, PIFA, 2).weight_bytes
    assert padded_seconds(column, 4096, gpu()) >= layer_seconds(column, PIFA, 4096, gpu())


def test_a_layer_without_rank_is_dense_in_every_variant() -> None:
    head = Layer(name="lm_head", out_features=32000, in_features=4096, rank=None)
    assert {work(head, variant, 2) for variant in VARIANTS} == {work(head, DENSE, 2)}
    assert head.density == 1
    assert padded_seconds(head, 9, gpu()) == layer_seconds(head, DENSE, 9, gpu())


@pytest.mark.parametrize(
    ("tokens", "launch_us", "limit"), [(1, 0, "bandwidth"), (4096, 0, "compute"), (1, 1000, "launches")]
)
def test_the_limit_is_what_takes_longest(tokens: int, launch_us: float, limit: str) -> None:
    bound = decoder_bound(block(PROJECTIONS), PIFA, tokens, gpu("orin-agx", launch_us=launch_us))
    assert bound.limit == limit
    assert bound.to_json()["limit"] == limit


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Layer(name="a", out_features=4, in_features=8, rank=5), "a: rank 5 of 4 x 8; expected a rank from 1"),
        (lambda: Layer(name="a", out_features=4, in_features=8, rank=0), "rank 0"),
        (lambda: work(layer(64, 64), "4:8", 2), "variant is '4:8', expected one of dense, 2:4"),
        (lambda: decoder_bound([], DENSE, 1, gpu()), "no layers"),
        (lambda: decoder_bound([layer(64, 64)], SPARSE, 1, gpu("rtx2080ti")), "without sparse units"),
        (lambda: LimitOptions(dtype="int8"), "dtype is 'int8', expected one of fp16, bf16, fp32"),
        (lambda: LimitOptions(bandwidth_gb_s=0), "bandwidth_gb_s is 0, expected a positive number"),
        (lambda: LimitOptions(peak_tflops=float("inf")), "peak_tflops is inf"),
        (lambda: LimitOptions(launch_us=-1), "launch_us is -1, expected at least 0"),
    ],
)
def test_what_nothing_can_have_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_figure_is_named_and_can_be_given() -> None:
    with pytest.raises(
        MissingCapabilityError, match=r"RTX 5090 laptop: .*memory bandwidth \(give --bandwidth.*peak fp32"
    ):
        gpu("rtx5090-laptop", dtype="fp32")
    with pytest.raises(MissingCapabilityError, match=r"RTX 5090 laptop: .*memory bandwidth \(give --bandwidth GB/s\),"):
        gpu("rtx5090-laptop")
    with pytest.raises(MissingCapabilityError, match=r"GB10.*peak fp16 rate \(give --peak-tflops") as e:
        gpu("dgx-spark")
    assert "bandwidth" not in str(e.value)
    assert e.value.exit_code is ExitCode.NOT_DECIDED
    given = gpu("rtx4090-laptop", bandwidth_gb_s=500, peak_tflops=50)
    assert (given.bandwidth, given.peak, given.sparse_peak) == (500e9, 50e12, 100e12)
    assert given.sources == {
        "bandwidth": "given",
        "peak": "given",
        "sparse_peak": "twice the dense rate",
        "launch_seconds": "assumed",
    }


def test_dtypes_take_their_rates_and_sizes() -> None:
    assert (gpu("a100", dtype="bf16").peak, gpu("a100").sparse_peak) == (312e12, 624e12)
    fp32 = gpu("a100", dtype="fp32")
    assert (fp32.peak, fp32.sparse_peak, fp32.itemsize) == (19.5e12, None, 4)
    assert gpu("dgx-spark", dtype="fp32").peak == 31e12
    assert gpu("rtx2080ti").sparse_peak is None
    with pytest.raises(
        MisfitError, match=r"RTX 2080 Ti has compute capability 7\.5, bf16 needs 8\.0; take --dtype fp16"
    ):
        gpu("rtx2080ti", dtype="bf16")
    assert set(gpu().to_json()) >= {"bandwidth", "peak", "sources"}
