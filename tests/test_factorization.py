"""Pivot factors against references computed another way, in float64."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from pifa_deploy.conditioning import MAX_COEFFICIENT, WARN_COEFFICIENT, ConditioningWarning
from pifa_deploy.density import density_for_rank, low_rank_rank_for_density, parameter_count, rank_for_density
from pifa_deploy.errors import ExitCode, FactorizationError
from pifa_deploy.factorization import (
    LossyFactorizationWarning,
    PivotFactors,
    RankRoundingWarning,
    assembled_factors,
    factors_from_low_rank,
    factors_from_weight,
    output_index,
    rounded_rank,
)

# Relative Frobenius error of the factors as stored. Rounding C and W_p to the unit roundoff u (1.1e-16,
# 6e-8, 4.9e-4, 3.9e-3) perturbs C W_p by about u |C| |W_p|, and column pivoting keeps |C| near 1, so the
# error is a small multiple of u; the limits are 4 u in the narrow dtypes and what the format promises in the wide.
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

SHAPES = [(1, 1), (1, 97), (97, 1), (2, 3), (7, 97), (97, 7), (31, 64), (64, 31), (96, 97), (97, 97), (50, 50)]


def low_rank(m: int, n: int, rank: int, spectrum: str = "random") -> tuple[torch.Tensor, torch.Tensor]:
    """Returns float64 U [m, r], V [r, n]; "decaying" has singular values 1/i and orthonormal factors."""
    generator = torch.Generator().manual_seed(1000 * m + 10 * n + rank)
    u = torch.randn(m, rank, dtype=torch.float64, generator=generator)
    v = torch.randn(rank, n, dtype=torch.float64, generator=generator)
    if spectrum == "random":
        return u, v
    scale = 1 / torch.arange(1, rank + 1, dtype=torch.float64)
    return torch.linalg.qr(u).Q * scale, torch.linalg.qr(v.T).Q.T.contiguous()


def rebuilt(factors: PivotFactors) -> np.ndarray:
    """Returns W in float64 from the definition: the pivot rows, and C W_p in the rows between."""
    w_p, c = factors.pivot_weight.double().numpy(), factors.coefficients.double().numpy()
    pivots = factors.pivot_rows.tolist()
    dense = np.full((w_p.shape[0] + c.shape[0], w_p.shape[1]), np.nan)
    others = [row for row in range(len(dense)) if row not in set(pivots)]
    for place, row in enumerate(pivots):
        dense[row] = w_p[place]
    for place, row in enumerate(others):
        dense[row] = c[place] @ w_p
    return dense


def relative_error(found: np.ndarray, truth: torch.Tensor) -> float:
    exact = truth.double().numpy()
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def greedy_pivots(weight: np.ndarray, rank: int) -> list[int]:
    """Returns the rows that greedy Gram-Schmidt picks: each time the one farthest from the span so far."""
    rest, picked = weight.copy(), []
    for _ in range(rank):
        row = int(np.argmax(np.linalg.norm(rest, axis=1)))
        picked.append(row)
        direction = rest[row] / np.linalg.norm(rest[row])
        for _ in range(2):  # twice is enough
            rest -= np.outer(rest @ direction, direction)
    return sorted(picked)


def kahan(size: int, c: float = 0.3) -> torch.Tensor:
    """Returns a matrix of rank size - 1 on which column pivoting of its transpose is known to do badly.

    R = diag(1, s, s^2, ...) (I - c N), N strictly upper ones, last diagonal entry zero: the last column is
    a combination of the others with coefficients up to c (1 + c)^(size - 2). The slight scaling of columns
    keeps pivoting from reordering what would be ties.
    """
    s = math.sqrt(1 - c * c)
    upper = np.triu(np.full((size, size), -c), 1) + np.eye(size)
    upper[-1, -1] = 0
    triangle = np.diag(s ** np.arange(size)) @ upper @ np.diag((1 - 1e-3) ** np.arange(size))
    return torch.from_numpy(triangle.T.copy())


def separated(m: int, n: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (U, V) whose rows differ so much in norm that the order of pivots is no matter of rounding."""
    u, v = low_rank(m, n, rank)
    scale = torch.logspace(0, -2, m, dtype=torch.float64)
    shuffled = torch.randperm(m, generator=torch.Generator().manual_seed(5))
    return u * scale[shuffled][:, None], v


@pytest.mark.parametrize(("m", "n", "rank"), [(12, 9, 4), (40, 60, 7), (97, 31, 13), (64, 64, 20)])
class TestPivotRows:
    def test_are_those_of_qr_with_column_pivoting_of_the_product(self, m: int, n: int, rank: int) -> None:
        u, v = separated(m, n, rank)
        order = scipy.linalg.qr((u @ v).numpy().T, mode="r", pivoting=True)[1]
        assert factors_from_low_rank(u, v).pivot_rows.tolist() == sorted(order[:rank].tolist())
        assert factors_from_weight(u @ v, rank).pivot_rows.tolist() == sorted(order[:rank].tolist())

    def test_are_those_of_greedy_selection(self, m: int, n: int, rank: int) -> None:
        u, v = separated(m, n, rank)
        assert factors_from_low_rank(u, v).pivot_rows.tolist() == greedy_pivots((u @ v).numpy(), rank)
        assert factors_from_weight(u @ v, rank).pivot_rows.tolist() == greedy_pivots((u @ v).numpy(), rank)

    def test_ignore_how_the_product_is_split(self, m: int, n: int, rank: int) -> None:
        # (U M^-1, M V) is the same matrix; a badly scaled M must not change the choice.
        u, v = separated(m, n, rank)
        mix = torch.diag(torch.logspace(-2, 2, rank, dtype=torch.float64))
        mixed = factors_from_low_rank(u @ torch.linalg.inv(mix), mix @ v)
        assert torch.equal(mixed.pivot_rows, factors_from_low_rank(u, v).pivot_rows)


@pytest.mark.parametrize("spectrum", ["random", "decaying"])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_stored_factors_rebuild_the_matrix_within_the_rounding_of_their_dtype(
    m: int, n: int, dtype: torch.dtype, spectrum: str
) -> None:
    smallest = min(m, n)
    for rank in sorted({1, min(2, smallest), (smallest + 1) // 2, smallest}):
        u, v = low_rank(m, n, rank, spectrum)
        truth = u @ v
        for factors in (factors_from_weight(truth, rank, dtype=dtype), factors_from_low_rank(u, v, dtype=dtype)):
            assert factors.rank == rank
            assert (factors.pivot_weight.shape, factors.pivot_weight.dtype) == ((rank, n), dtype)
            assert (factors.coefficients.shape, factors.coefficients.dtype) == ((m - rank, rank), dtype)
            assert factors.pivot_rows.dtype == torch.int32
            assert relative_error(rebuilt(factors), truth) <= LIMIT[dtype]
            # The pivot rows are the matrix's own rows, rounded once and nothing else.
            own = truth[factors.pivot_rows.long()]
            unit = torch.finfo(dtype).eps / 2
            tiny = torch.finfo(dtype).smallest_normal * unit  # below the normal range spacing is absolute
            rounding = 0 if dtype == torch.float64 else unit * own.abs() + 2 * tiny
            slack = 1e-12 * float(truth.abs().max())  # U V may be formed in another summation order
            assert bool(((factors.pivot_weight.double() - own).abs() <= rounding + slack).all())


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(("m", "n"), [(576, 576), (1536, 576)])
def test_layers_of_a_real_model_stay_within_the_rounding_of_their_dtype(m: int, n: int, dtype: torch.dtype) -> None:
    rank = rank_for_density(m, n, 0.5)
    for spectrum in ("random", "decaying"):
        u, v = low_rank(m, n, rank, spectrum)
        factors = factors_from_weight(u @ v, rank, dtype=dtype)
        assert relative_error(rebuilt(factors), u @ v) <= LIMIT[dtype]
        assert factors.conditioning.max_coefficient <= WARN_COEFFICIENT


def test_a_weight_of_the_full_row_rank_has_no_coefficients() -> None:
    weight = low_rank(5, 9, 5)[0] @ low_rank(5, 9, 5)[1]
    factors = factors_from_weight(weight, 5)
    assert factors.coefficients.shape == (0, 5)
    assert factors.pivot_rows.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(factors.pivot_weight, weight)
    assert factors.conditioning.max_coefficient == factors.conditioning.max_row_norm == 0.0


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_conditioning_figures_describe_the_factors_as_stored(dtype: torch.dtype) -> None:
    u, v = low_rank(61, 43, 11)
    factors = factors_from_low_rank(u, v, dtype=dtype)
    c = factors.coefficients.double().numpy()
    norms = [math.sqrt(math.fsum(entry * entry for entry in row)) for row in c.tolist()]
    found = factors.conditioning
    assert found.max_coefficient == max(abs(entry) for row in c.tolist() for entry in row)
    # float64 sums of 11 or 50 terms: a few units in the last place
    assert found.max_row_norm == pytest.approx(max(norms), rel=1e-13)
    assert found.rms_row_norm == pytest.approx(math.sqrt(math.fsum(x * x for x in norms) / len(norms)), rel=1e-13)
    expected = relative_error(rebuilt(factors), u @ v)
    # In float64 the error is itself rounding noise: only its size can agree.
    assert found.relative_error == pytest.approx(expected, rel=1e-6, abs=1e-14)


def test_dense_gives_back_the_matrix() -> None:
    u, v = low_rank(23, 17, 5)
    factors = factors_from_low_rank(u, v, dtype=torch.float16)
    assert factors.dense().dtype == torch.float64
    # The same product, summed in another order: 5 terms of magnitude |C| |W_p|.
    assert np.allclose(factors.dense().numpy(), rebuilt(factors), rtol=0, atol=1e-13)


def test_output_index_puts_every_row_in_its_place() -> None:
    for pivots, m in [([1, 4, 5], 7), ([0], 1), ([2], 3), ([0, 1, 2], 3), ([0, 1], 5), ([3, 4], 5)]:
        stored = pivots + [row for row in range(m) if row not in pivots]
        index = output_index(torch.tensor(pivots, dtype=torch.int32), m)
        assert index.dtype == torch.int32
        assert [stored[at] for at in index.tolist()] == list(range(m))


def test_two_calls_give_the_same_bits() -> None:
    u, v = low_rank(200, 150, 40)
    for make in (lambda: factors_from_weight(u @ v, 40), lambda: factors_from_low_rank(u, v)):
        first, second = make(), make()
        for name in ("pivot_weight", "coefficients", "pivot_rows"):
            assert torch.equal(getattr(first, name), getattr(second, name))
        assert first.conditioning == second.conditioning


def test_the_global_random_state_is_left_alone() -> None:
    u, v = low_rank(200, 150, 40)
    before = torch.random.get_rng_state()
    factors_from_weight(u @ v, 40)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_weight_is_not_changed() -> None:
    u, v = low_rank(30, 20, 5)
    weight = (u @ v).float()
    copy = weight.clone()
    factors_from_weight(weight, 5).pivot_weight.zero_()
    assert torch.equal(weight, copy)


@pytest.mark.parametrize(("m", "n"), [(9, 7), (7, 9), (40, 60)])
def test_a_zero_matrix_gives_zero_factors(m: int, n: int) -> None:
    factors = factors_from_weight(torch.zeros(m, n), 3)
    assert not rebuilt(factors).any()
    assert factors.conditioning.relative_error == 0.0


@pytest.mark.parametrize(("m", "n"), [(9, 7), (7, 9), (1, 5), (60, 80)])
def test_a_matrix_of_lower_rank_than_asked_for_gives_finite_exact_factors(m: int, n: int) -> None:
    u, v = low_rank(m, n, 1)
    rank = min(3, m, n)
    for factors in (factors_from_weight(u @ v, rank), factors_from_low_rank(u, v, rank)):
        assert factors.rank == rank
        assert np.isfinite(rebuilt(factors)).all()
        assert relative_error(rebuilt(factors), u @ v) <= LIMIT[torch.float64]


def test_a_matrix_of_repeated_rows_gives_coefficients_of_one() -> None:
    row = low_rank(1, 8, 1)[1]
    factors = factors_from_weight(row.expand(6, 8).contiguous(), 2)
    assert relative_error(rebuilt(factors), row.expand(6, 8)) <= LIMIT[torch.float64]
    assert factors.conditioning.max_coefficient <= 1 + 1e-12


class TestRefusedArguments:
    @pytest.mark.parametrize("rank", [0, -1, 6, 100])
    def test_a_rank_that_no_factors_can_have(self, rank: int) -> None:
        with pytest.raises(ValueError, match=rf"rank is {rank}, expected 1 <= rank <= 5 for a 5 x 8 matrix"):
            factors_from_weight(torch.ones(5, 8), rank)
        with pytest.raises(ValueError, match=rf"rank is {rank}, expected 1 <= rank <= 5 for a 5 x 8 matrix"):
            factors_from_low_rank(torch.ones(5, 6), torch.ones(6, 8), rank)

    def test_a_rank_that_is_no_integer(self) -> None:
        with pytest.raises(TypeError, match="float"):
            factors_from_weight(torch.ones(5, 8), 2.5)  # type: ignore[arg-type]

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_entries_that_are_not_finite(self, bad: float) -> None:
        weight = torch.ones(4, 6)
        weight[2, 5] = bad
        with pytest.raises(ValueError, match=rf"weight has NaN or Inf entries \({bad} at \[2, 5\]\)"):
            factors_from_weight(weight, 2)
        with pytest.raises(ValueError, match="v has NaN or Inf entries"):
            factors_from_low_rank(torch.ones(3, 4), weight)
        with pytest.raises(ValueError, match="u has NaN or Inf entries"):
            factors_from_low_rank(weight, torch.ones(6, 4))

    @pytest.mark.parametrize("shape", [(6,), (2, 3, 4), (), (0, 4), (4, 0)])
    def test_something_that_is_no_matrix(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"weight is torch\.float32 .*expected a non-empty floating-point matrix"):
            factors_from_weight(torch.ones(shape), 1)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
    def test_entries_that_are_no_floats(self, dtype: torch.dtype) -> None:
        with pytest.raises(ValueError, match=rf"weight is {dtype} \(3, 4\)"):
            factors_from_weight(torch.ones(3, 4).to(dtype), 1)

    def test_a_pair_that_does_not_fit_together(self) -> None:
        with pytest.raises(ValueError, match=r"u is \(5, 3\) and v is \(4, 8\); expected \[m, k\] and \[k, n\]"):
            factors_from_low_rank(torch.ones(5, 3), torch.ones(4, 8))

    def test_a_rank_multiple_below_one(self) -> None:
        with pytest.raises(ValueError, match="rank multiple is 0, expected at least 1"):
            factors_from_weight(torch.ones(5, 8), 2, rank_multiple=0)
        with pytest.raises(ValueError, match="rank multiple is -8, expected at least 1"):
            rank_for_density(50, 80, 0.5, multiple=-8)


class TestLossyInput:
    def test_a_full_rank_weight_warns_with_its_error(self) -> None:
        weight = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
        with pytest.warns(LossyFactorizationWarning, match=r"40 x 60 weight is not of rank 8.*SVD first") as caught:
            factors = factors_from_weight(weight, 8)
        assert relative_error(rebuilt(factors), weight) == pytest.approx(factors.conditioning.relative_error, rel=1e-6)
        assert f"{factors.conditioning.relative_error:.2e}" in str(caught[0].message)
        assert caught[0].filename == __file__

    def test_a_pair_cut_below_its_rank_warns(self) -> None:
        u, v = low_rank(40, 60, 20)
        with pytest.warns(LossyFactorizationWarning, match=r"rank 8 is below the rank 20 of \(u, v\)") as caught:
            factors_from_low_rank(u, v, 8)
        assert caught[0].filename == __file__

    @pytest.mark.parametrize("dtype", LIMIT, ids=str)
    def test_a_low_rank_weight_rounded_to_its_dtype_does_not_warn(self, dtype: torch.dtype) -> None:
        u, v = low_rank(97, 64, 12)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            factors_from_weight((u @ v).to(dtype), 12)
            factors_from_weight((u @ v).to(dtype), 12, dtype=torch.float32)
            factors_from_low_rank(u.to(dtype), v.to(dtype))

    def test_a_pair_wider_than_the_matrix_does_not_warn(self) -> None:
        u, v = low_rank(12, 9, 30)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            factors = factors_from_low_rank(u, v)
        assert factors.rank == 9
        assert relative_error(rebuilt(factors), u @ v) <= LIMIT[torch.float64]


class TestLargeCoefficients:
    def test_above_four_warn(self) -> None:
        weight = kahan(20)
        with pytest.warns(ConditioningWarning, match=r"max \|C\| of a 20 x 20 matrix is .*, above 4"):
            factors = factors_from_weight(weight, 19)
        assert WARN_COEFFICIENT < factors.conditioning.max_coefficient < MAX_COEFFICIENT
        assert relative_error(rebuilt(factors), weight) <= LIMIT[torch.float64]

    def test_above_a_thousand_are_refused(self) -> None:
        with pytest.raises(FactorizationError, match=r"max \|C\| is .*, expected at most 1000") as caught:
            factors_from_weight(kahan(40), 39)
        assert caught.value.exit_code == ExitCode.STAGE_FAILED

    @pytest.mark.parametrize(("largest", "warns"), [(3.999, False), (4.0, False), (4.001, True), (1000.0, True)])
    def test_are_judged_by_the_largest_entry(self, largest: float, warns: bool) -> None:
        pivot = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        truth = torch.cat([pivot, -largest * pivot])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            factors = assembled_factors(
                pivot, torch.tensor([[-largest]], dtype=torch.float64), torch.tensor([0], dtype=torch.int32), truth
            )
        assert [type(w.message) for w in caught] == [ConditioningWarning] * warns
        assert factors.conditioning.max_coefficient == largest
        assert factors.conditioning.relative_error == 0.0

    @pytest.mark.parametrize("bad", [1000.1, math.nan, math.inf])
    def test_just_above_a_thousand_or_not_finite_are_refused(self, bad: float) -> None:
        pivot = torch.ones(1, 2, dtype=torch.float64)
        with pytest.raises(FactorizationError, match="no usable pivot factors"):
            assembled_factors(
                pivot,
                torch.tensor([[bad]], dtype=torch.float64),
                torch.tensor([0], dtype=torch.int32),
                torch.ones(2, 2, dtype=torch.float64),
            )

    def test_weights_beyond_the_range_of_the_stored_dtype_are_refused(self) -> None:
        u, v = low_rank(8, 6, 2)
        with pytest.raises(FactorizationError, match=r"torch\.float16.*wider dtype"):
            factors_from_low_rank(1e6 * u, v, dtype=torch.float16)


def fitting_rank(m: int, n: int, budget: int) -> int:
    """Returns the largest r on the rising branch with r (m + n + 1) - r^2 <= budget, by trying each."""
    best = 0
    for rank in range(1, min(m, n) + 1):
        if rank * (m + n + 1) - rank * rank <= budget:
            best = rank
    return best


class TestRankForDensity:
    def test_equals_a_search_over_all_ranks(self) -> None:
        for m, n in [(1, 1), (1, 9), (9, 1), (5, 8), (16, 16), (31, 64), (97, 13), (40, 40)]:
            for density in [k / 37 for k in range(1, 38)]:
                expected = fitting_rank(m, n, math.floor(density * m * n))
                if expected:
                    assert rank_for_density(m, n, density) == expected
                else:
                    with pytest.raises(ValueError, match="allows rank 0"):
                        rank_for_density(m, n, density)

    def test_is_exact_where_the_budget_is_met_to_the_number(self) -> None:
        # There the root of the formula is a whole number, and one unit less must give one rank less.
        for m, n in [(5, 8), (64, 48), (576, 1536), (4096, 4096), (4096, 11008)]:
            for rank in range(2, min(m, n) * 3 // 4, max(1, min(m, n) // 50)):
                budget = rank * (m + n + 1) - rank * rank
                at, below = (budget + 0.5) / (m * n), (budget - 0.5) / (m * n)
                if at <= 1:
                    assert rank_for_density(m, n, at) == rank
                    assert rank_for_density(m, n, below) == rank - 1

    @pytest.mark.parametrize(("m", "n"), [(2**27 + 1, 2**27 - 1), (2**30, 2**30), (10**9 + 7, 3), (3, 10**9 + 7)])
    @pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
    def test_is_exact_where_floats_hold_no_more_integers(self, m: int, n: int, density: float) -> None:
        budget = math.floor(density * m * n)
        rank = rank_for_density(m, n, density) if fits(m, n, 1, budget) else 0
        assert rank == 0 or fits(m, n, rank, budget)
        assert rank == min(m, n) or not fits(m, n, rank + 1, budget)

    @pytest.mark.parametrize("density", [0.0, -0.5, 1.0001, 7, math.nan, math.inf])
    def test_refuses_a_density_that_is_none(self, density: float) -> None:
        with pytest.raises(ValueError, match=rf"density is {density}, expected 0 < density <= 1"):
            rank_for_density(8, 8, density)
        with pytest.raises(ValueError, match=rf"density is {density}, expected 0 < density <= 1"):
            low_rank_rank_for_density(8, 8, density)

    @pytest.mark.parametrize("multiple", [1, 8, 16, 64])
    @pytest.mark.parametrize("density", [0.3, 0.5, 0.75, 1.0])
    def test_rounds_only_when_told_and_stays_within_the_budget(self, multiple: int, density: float) -> None:
        for m, n in [(576, 576), (1536, 576), (192, 576), (97, 300)]:
            exact = fitting_rank(m, n, math.floor(density * m * n))
            assert rank_for_density(m, n, density) == exact
            if exact >= multiple:
                rank = rank_for_density(m, n, density, multiple=multiple)
                assert rank % multiple == 0
                assert exact - multiple < rank <= exact

    def test_refuses_a_multiple_that_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"density 0.5 of a 20 x 20 matrix allows rank 5, .* multiple of 8"):
            rank_for_density(20, 20, 0.5, multiple=8)


def fits(m: int, n: int, rank: int, budget: int) -> bool:
    return rank * (m + n + 1) - rank * rank <= budget


def test_density_counts_the_numbers_that_are_stored() -> None:
    for m, n, rank in [(1, 1, 1), (9, 5, 3), (5, 9, 5), (31, 64, 7)]:
        u, v = low_rank(m, n, rank)
        factors = factors_from_low_rank(u, v)
        stored = factors.pivot_weight.numel() + factors.coefficients.numel()
        assert parameter_count(m, n, rank) == stored
        assert density_for_rank(m, n, rank) == stored / (m * n)


def test_the_rank_of_a_density_has_at_most_that_density() -> None:
    for density in (0.2, 0.5, 0.9):
        rank = rank_for_density(576, 1536, density)
        assert density_for_rank(576, 1536, rank) <= density
        low = low_rank_rank_for_density(576, 1536, density)
        assert low * (576 + 1536) <= density * 576 * 1536 < (low + 1) * (576 + 1536)


class TestRankMultiple:
    def test_is_off_unless_asked_for(self) -> None:
        u, v = low_rank(40, 60, 11)
        assert factors_from_weight(u @ v, 11).rank == 11
        assert factors_from_low_rank(u, v).rank == 11

    @pytest.mark.filterwarnings("ignore::pifa_deploy.factorization.RankRoundingWarning")
    @pytest.mark.parametrize(("multiple", "expected"), [(8, 16), (16, 16), (64, 40)])
    def test_raises_the_rank_but_never_above_the_smaller_side(self, multiple: int, expected: int) -> None:
        u, v = low_rank(40, 60, 11)
        for factors in (
            factors_from_weight(u @ v, 11, rank_multiple=multiple),
            factors_from_low_rank(u, v, rank_multiple=multiple),
        ):
            assert factors.rank == expected
            assert relative_error(rebuilt(factors), u @ v) <= LIMIT[torch.float64]

    def test_says_so_when_it_changes_the_rank(self) -> None:
        u, v = low_rank(40, 60, 11)
        with pytest.warns(RankRoundingWarning, match="rank 11 became 16"):
            factors_from_low_rank(u, v, rank_multiple=8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            factors_from_low_rank(u, v, rank_multiple=11)

    @pytest.mark.filterwarnings("ignore::pifa_deploy.factorization.RankRoundingWarning")
    def test_is_the_next_multiple_for_every_rank(self) -> None:
        for multiple in (1, 8, 16, 64):
            for rank in range(1, 98):
                expected = next(r for r in range(rank, 1000) if r % multiple == 0)
                assert rounded_rank(rank, multiple, torch.Size((97, 128))) == min(expected, 97)


@pytest.mark.slow
def test_a_layer_of_a_seven_billion_model_factorises_within_two_minutes() -> None:
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    spent = 0.0
    generator = torch.Generator().manual_seed(0)
    for m, n in shapes:
        rank = rank_for_density(m, n, 0.5)
        u, v = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, rank), (rank, n)))
        weight = (u @ v / n).float()
        started = time.perf_counter()
        factors = factors_from_weight(weight, rank)
        spent += time.perf_counter() - started
        assert factors.rank == rank
        # Rounding W to float32 (u = 6e-8) perturbs the other rows by u and C W_p by u |C|; rounding C by u |C| more.
        row_norm = float(factors.coefficients.double().norm(dim=1).max())
        assert factors.conditioning.relative_error <= 6e-8 * (1 + 2 * row_norm)
    assert spent < 120, f"took {spent:.0f} s"
