"""The reconstruction M and its statistics against explicit inputs: reduced-rank regression, the paper's formulas."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reconstruction_fixtures import Problem

from pifa_deploy.compression.distributed import Processes
from pifa_deploy.compression.reconstruction import RIDGES, SOLVERS, Reconstruction, ReconstructionOptions
from pifa_deploy.compression.statistics import InputMoments
from pifa_deploy.errors import StageFailedError

CPU = torch.device("cpu")
ALONE = Processes(rank=0, count=1, device=CPU)
# m < n, m > n, square, one row, one column.
SHAPES = [(24, 40), (40, 24), (32, 32), (1, 9), (9, 1)]
# Rounding of float64 work on moments, which square the spectrum of the inputs.
ROUNDING = 1e-8


def problem(shape: tuple[int, int], tokens: int | None = None, seed: int = 0) -> Problem:
    """Features of different sizes, mixed; the compressed model's inputs are off by a tenth and by a linear map."""
    random = np.random.default_rng(seed)
    m, n = shape
    tokens = 5 * n + 3 if tokens is None else tokens
    mix = random.standard_normal((n, n)) * np.logspace(0.5, -1, n)
    x_dense = mix @ random.standard_normal((n, tokens))
    map_ = np.eye(n) + 0.1 * random.standard_normal((n, n)) / n**0.5
    x = map_ @ x_dense + 0.1 * x_dense.std() * random.standard_normal((n, tokens))
    return Problem(random.standard_normal((m, n)), x, x_dense)


def ranks(shape: tuple[int, int]) -> list[int]:
    return sorted({1, min(shape) // 2 or 1, min(shape)})


CASES = [(shape, rank) for shape in SHAPES for rank in ranks(shape)]


@pytest.mark.parametrize("ridge_shape", RIDGES)
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_the_closed_solution_is_the_optimum(shape: tuple[int, int], rank: int, share: float, ridge_shape: str) -> None:
    given = problem(shape)
    options = ReconstructionOptions(dense_share=share, ridge_shape=ridge_shape)
    found, best = given.solved(rank, options), given.optimum(rank, options)
    scale = given.scale(options)
    assert abs(given.objective(found, options) - given.objective(best, options)) <= ROUNDING**1.5 * scale
    # The matrix itself, measured on the inputs: they have no two equal singular values here.
    x = given.rows(options)[0]
    assert np.linalg.norm((found - best) @ x) <= ROUNDING * scale**0.5


@pytest.mark.parametrize("tokens", [1, 5, 23])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_it_is_the_optimum_with_fewer_tokens_than_features(shape: tuple[int, int], tokens: int) -> None:
    given, options = problem(shape, tokens), ReconstructionOptions()
    for rank in (1, 4, min(shape)):
        found, best = given.solved(rank, options), given.optimum(rank, options)
        assert np.isfinite(found).all()
        excess = given.objective(found, options) - given.objective(best, options)
        assert abs(excess) <= ROUNDING**1.5 * given.scale(options)


@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_more_alternating_steps_come_closer_to_the_closed_solution_and_never_below(
    shape: tuple[int, int], rank: int
) -> None:
    given, options = problem(shape), ReconstructionOptions(dense_share=0.5)
    closed, scale = given.objective(given.solved(rank, options), options), given.scale(options)
    errors = [
        given.objective(given.solved(rank, replace(options, solver="alternating", steps=steps)), options)
        for steps in (1, 2, 4, 50)
    ]
    assert all(closed <= error + ROUNDING**1.5 * scale for error in errors)
    assert all(later <= earlier + ROUNDING**1.5 * scale for earlier, later in itertools.pairwise(errors))
    assert errors[-1] <= 1.01 * closed + ROUNDING**1.5 * scale


def whitened(given: Problem, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns U, V of the truncation that the paper starts from: SVD of W S with S the Cholesky factor of X X^T."""
    factor = np.linalg.cholesky(given.x @ given.x.T)
    u, s, v = np.linalg.svd(given.weight @ factor, full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank] @ np.linalg.inv(factor)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_alternating_steps_are_the_formulas_of_the_paper(shape: tuple[int, int], rank: int, share: float) -> None:
    given = problem(shape)
    options = ReconstructionOptions(dense_share=share, ridge_shape="identity", solver="alternating")
    alpha = options.ridge * np.square(given.x).sum(1).mean() * np.eye(shape[1])
    y = given.weight @ (share * given.x_dense + (1 - share) * given.x)
    gram, target = given.x @ given.x.T + alpha, y @ given.x.T + given.weight @ alpha
    u, v = whitened(given, rank)
    for steps in (1, 2, 3):
        u = target @ v.T @ np.linalg.inv(v @ gram @ v.T)
        v = np.linalg.inv(u.T @ u) @ u.T @ target @ np.linalg.inv(gram)
        found = given.solved(rank, replace(options, steps=steps))
        assert np.linalg.norm(found - u @ v) <= ROUNDING * np.linalg.norm(u @ v)


def test_one_alternating_step_leaves_something_to_the_closed_solution() -> None:
    given, options = problem((24, 40)), ReconstructionOptions(dense_share=1.0)
    closed, one = (given.objective(given.solved(8, replace(options, solver=solver)), options) for solver in SOLVERS)
    assert closed < 0.9999 * one


@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_without_a_dense_share_it_is_the_truncation_of_the_weight_on_its_inputs(
    shape: tuple[int, int], rank: int
) -> None:
    given, options = problem(shape), ReconstructionOptions(dense_share=0.0)
    x = given.rows(options)[0]
    u, s, v = np.linalg.svd(given.weight @ x, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert np.linalg.norm(given.solved(rank, options) @ x - best) <= ROUNDING * np.linalg.norm(best)


def test_without_the_dense_models_inputs_the_share_plays_no_part() -> None:
    given = problem((24, 40))
    alone = InputMoments(40, CPU, cross=False)
    alone.gram = given.moments.gram
    u, v = Reconstruction(alone, ReconstructionOptions(dense_share=0.7)).solve(torch.from_numpy(given.weight), 9)
    expected = given.solved(9, ReconstructionOptions(dense_share=0.0))
    np.testing.assert_allclose((u @ v).numpy(), expected, atol=1e-12)


def test_a_dense_share_of_one_aims_at_the_outputs_of_the_dense_model() -> None:
    given = problem((12, 20), tokens=500)
    # No rank and nearly no ridge: what is left is plain regression of W X_o on X.
    found = given.solved(12, ReconstructionOptions(dense_share=1.0, ridge=1e-12))
    expected = np.linalg.lstsq(given.x.T, (given.weight @ given.x_dense).T, rcond=None)[0].T
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)
    assert np.linalg.norm(found - given.weight) > 1e-2 * np.linalg.norm(given.weight)  # the comparison can fail


@pytest.mark.parametrize("ridge_shape", RIDGES)
@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_a_large_ridge_gives_the_truncation_of_the_weight_itself(
    shape: tuple[int, int], rank: int, ridge_shape: str
) -> None:
    given = problem(shape)
    energy = np.square(given.x).sum(1)
    root = np.sqrt(energy if ridge_shape == "diagonal" else np.ones_like(energy))
    u, s, v = np.linalg.svd(given.weight * root, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ v[:rank] / root
    found = given.solved(rank, ReconstructionOptions(dense_share=1.0, ridge=1e12, ridge_shape=ridge_shape))
    assert np.linalg.norm((found - expected) * root) <= ROUNDING * np.linalg.norm(given.weight * root)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_with_full_rank_and_no_earlier_error_the_weight_comes_back(shape: tuple[int, int], solver: str) -> None:
    given = problem(shape)
    given.x_dense = given.x
    found = given.solved(min(shape), ReconstructionOptions(dense_share=0.5, solver=solver))
    assert np.linalg.norm(found - given.weight) <= ROUNDING * np.linalg.norm(given.weight)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("own", [0, 3])
@pytest.mark.parametrize("format_rank", [3, 6])
def test_a_weight_of_lower_rank_than_asked_for_is_no_obstacle(own: int, format_rank: int, solver: str) -> None:
    random, given = np.random.default_rng(1), problem((16, 24))
    given.weight = random.standard_normal((16, own)) @ random.standard_normal((own, 24))
    options = ReconstructionOptions(solver=solver)
    u, v = Reconstruction(given.moments, options).solve(torch.from_numpy(given.weight), format_rank)
    assert max(float(u.abs().max()), float(v.abs().max())) < 1e3  # fits any dtype
    excess = given.objective((u @ v).numpy(), options) - given.objective(given.optimum(format_rank, options), options)
    assert abs(excess) <= ROUNDING**1.5 * (given.scale(options) or 1.0)


@pytest.mark.parametrize("ridge_shape", RIDGES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_an_input_that_was_always_zero_keeps_its_weight_as_far_as_the_rank_goes(solver: str, ridge_shape: str) -> None:
    given = problem((16, 24))
    given.x[5] = given.x_dense[5] = 0
    found = given.solved(16, ReconstructionOptions(solver=solver, ridge_shape=ridge_shape))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 5], given.weight[:, 5], atol=1e-6)


def test_linears_that_share_inputs_are_solved_one_by_one() -> None:
    one, other = problem((24, 40)), problem((10, 40), seed=1)
    other.x, other.x_dense = one.x, one.x_dense
    shared = Reconstruction(one.moments, ReconstructionOptions())
    for given in (one, other, one):
        u, v = shared.solve(torch.from_numpy(given.weight), 5)
        np.testing.assert_array_equal((u @ v).numpy(), given.solved(5, ReconstructionOptions()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dense_share": -0.1}, "dense_share is -0.1, expected 0 <= dense_share <= 1"),
        ({"dense_share": 1.5}, "dense_share is 1.5, expected"),
        ({"dense_share": float("nan")}, "dense_share is nan, expected"),
        ({"ridge": 0.0}, "ridge is 0.0, expected a positive number"),
        ({"ridge": float("inf")}, "ridge is inf, expected"),
        ({"ridge_shape": "round"}, "ridge_shape is 'round', expected one of"),
        ({"solver": "magic"}, "solver is 'magic', expected one of"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReconstructionOptions(**fields)


# Statistics


def test_moments_are_the_sums_over_all_tokens() -> None:
    random, n, tokens = np.random.default_rng(3), 20, 64
    batches = [random.standard_normal((2, 3, tokens, n)).astype(np.float32) for _ in range(5)]
    found = InputMoments(n, CPU, cross=True)
    for inputs, dense in batches:
        found.add(torch.from_numpy(inputs), torch.from_numpy(dense))
    found.reduce(ALONE, "layer")
    x, x_dense = (
        np.concatenate([batch[side].reshape(-1, n) for batch in batches]).T.astype(np.float64) for side in (0, 1)
    )
    for moment, left in ((found.gram, x), (found.cross, x_dense)):
        assert moment is not None
        assert moment.dtype == torch.float64
        # A float32 sum of products over one batch is off by at most its length times eps times their sizes.
        bound = 3 * tokens * np.finfo(np.float32).eps * np.abs(left) @ np.abs(x.T)
        assert (np.abs(moment.numpy() - left @ x.T) <= bound).all()


def test_moments_without_a_dense_model_have_no_cross_term() -> None:
    found = InputMoments(4, CPU, cross=False)
    found.add(torch.ones(2, 4))
    found.reduce(ALONE, "layer")
    assert found.cross is None
    assert torch.equal(found.gram, torch.full((4, 4), 2.0, dtype=torch.float64))


def test_the_targets_on_the_inputs_follow_from_the_two_moments() -> None:
    given, share = problem((24, 40)), 0.3
    y = given.weight @ (share * given.x_dense + (1 - share) * given.x)
    moments = given.moments
    assert moments.cross is not None
    mixed = share * moments.cross + (1 - share) * moments.gram
    np.testing.assert_allclose(given.weight @ mixed.numpy(), y @ given.x.T, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_name_the_linear(bad: float, side: int) -> None:
    found, inputs = InputMoments(4, CPU, cross=True), [torch.ones(3, 4), torch.ones(3, 4)]
    inputs[side][1, 2] = bad
    found.add(*inputs)
    with pytest.raises(StageFailedError, match="up_proj saw NaN or Inf activations in calibration; check the model"):
        found.reduce(ALONE, "up_proj")


def test_inputs_that_are_all_zero_name_the_linear() -> None:
    found = InputMoments(4, CPU, cross=False)
    found.add(torch.zeros(3, 4))
    with pytest.raises(StageFailedError, match=r"up_proj saw only zeros in calibration.*leave it out with --exclude"):
        found.reduce(ALONE, "up_proj")
