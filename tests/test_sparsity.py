"""2:4 pruning: the pairs that brute force finds, SparseGPT against its definition, and refused input."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pifa_deploy.compression.sparsity import PATTERN, PRUNING_METHODS, _sparsegpt, best_pairs, prune_2_4
from pifa_deploy.sparse_checkpoint import PATTERN as STORED_PATTERN

NEEDING_MOMENT = [method for method in PRUNING_METHODS if method != "magnitude"]
# One row, one group, fewer outputs than inputs and more, beyond one block of 128 inputs and not a multiple of it.
SHAPES = [(1, 4), (7, 4), (1, 36), (24, 40), (40, 24), (5, 128), (3, 132), (6, 268)]


def inputs(features: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Returns X [n, tokens] float64: correlated features of very different sizes in no order."""
    random = np.random.default_rng(seed)
    mix = np.eye(features) + random.standard_normal((features, features)) / features**0.5
    sizes = random.permutation(np.logspace(1, -1, features))
    return sizes[:, None] * (mix @ random.standard_normal((features, tokens)))


def case(shape: tuple[int, int], seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns W [m, n] float64 and its moment X X^T."""
    x = inputs(shape[1], 3 * shape[1] + 5, seed)
    return np.random.default_rng(seed).standard_normal(shape), x @ x.T


def pruned(weight: np.ndarray, moment: np.ndarray | None, method: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    given = None if moment is None else torch.from_numpy(moment)
    values, mask = prune_2_4(torch.from_numpy(weight), given, method, **options)
    return values.numpy(), mask.numpy()


def best_by_trial(scores: np.ndarray) -> np.ndarray:
    """Tries all six pairs of every group; the first of equal ones wins."""
    mask = np.zeros(scores.shape, bool)
    for row, start in itertools.product(range(scores.shape[0]), range(0, scores.shape[1], 4)):
        best: tuple[float, tuple[int, int]] = (-1.0, (0, 0))
        for pair in itertools.combinations(range(start, start + 4), 2):
            kept = float(scores[row, pair[0]] + scores[row, pair[1]])
            if kept > best[0]:
                best = (kept, pair)
        mask[row, list(best[1])] = True
    return mask


def scores_of(method: str, weight: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """The published scores, entry by entry."""
    m, n = weight.shape
    scores = np.empty((m, n))
    for i, j in itertools.product(range(m), range(n)):
        norm = moment[j, j] ** 0.5
        relative = abs(weight[i, j]) / abs(weight[:, j]).sum() + abs(weight[i, j]) / abs(weight[i]).sum()
        scores[i, j] = {
            "magnitude": abs(weight[i, j]),
            "wanda": abs(weight[i, j]) * norm,
            "ria": relative * norm**0.5,
        }[method]
    return scores


def obs_by_definition(weight: np.ndarray, moment: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT row by row: the Hessian of the inputs that are left is inverted anew at every input."""
    n = len(moment)
    hessian = moment + damping * np.trace(moment) / n * np.eye(n)
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(n)]
    result, mask = weight.copy(), np.zeros(weight.shape, bool)
    for row, kept in zip(result, mask, strict=True):
        for start in range(0, n, 4):
            cost = [row[j] ** 2 / inverses[j][0, 0] for j in range(start, start + 4)]
            kept[start + np.argsort(cost)[2:]] = True
            for j in range(start, start + 4):
                if not kept[j]:
                    row[j:] -= row[j] / inverses[j][0, 0] * inverses[j][0]
                    row[j] = 0.0
    return result, mask


def output_error(weight: np.ndarray, found: np.ndarray, moment: np.ndarray) -> float:
    miss = weight - found
    return float(np.sqrt(np.sum(miss @ moment * miss) / np.sum(weight @ moment * weight)))


def per_group(mask: np.ndarray) -> np.ndarray:
    return mask.reshape(len(mask), -1, 4).sum(-1)


def test_the_pattern_is_the_one_that_is_stored() -> None:
    assert PATTERN == STORED_PATTERN == "2:4"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", PRUNING_METHODS)
def test_two_of_each_four_inputs_are_kept_and_the_others_are_zero(method: str, shape: tuple[int, int]) -> None:
    weight, moment = case(shape)
    values, mask = pruned(weight, moment, method)
    assert values.shape == mask.shape == shape
    assert mask.dtype == bool
    assert (per_group(mask) == 2).all()
    assert (values[~mask] == 0).all()
    assert not np.signbit(values[~mask]).any()  # -0.0 is not the zero that a file compares with
    assert (values[mask] != 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_the_kept_pair_is_the_best_of_all_six_and_unchanged(method: str, shape: tuple[int, int]) -> None:
    weight, moment = case(shape)
    values, mask = pruned(weight, moment, method)
    np.testing.assert_array_equal(mask, best_by_trial(scores_of(method, weight, moment)))
    np.testing.assert_array_equal(values, np.where(mask, weight, 0))


def test_the_scores_choose_differently() -> None:
    weight, moment = case((24, 40))
    masks = {method: pruned(weight, moment, method)[1] for method in PRUNING_METHODS}
    for one, other in itertools.combinations(PRUNING_METHODS, 2):
        assert (masks[one] != masks[other]).any(), (one, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_sparsegpt_is_what_its_definition_gives(shape: tuple[int, int], damping: float) -> None:
    weight, moment = case(shape)
    values, mask = pruned(weight, moment, "sparsegpt", damping=damping)
    expected, expected_mask = obs_by_definition(weight, moment, damping)
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_sparsegpt_damps_by_one_per_cent_unless_told_otherwise() -> None:
    weight, moment = case((24, 40))
    np.testing.assert_array_equal(
        pruned(weight, moment, "sparsegpt")[0], pruned(weight, moment, "sparsegpt", damping=0.01)[0]
    )
    assert (pruned(weight, moment, "sparsegpt")[0] != pruned(weight, moment, "sparsegpt", damping=0.3)[0]).any()


@pytest.mark.parametrize("block", [4, 8, 128, 1024])
def test_the_block_size_does_not_change_what_sparsegpt_finds(block: int) -> None:
    weight, moment = (torch.from_numpy(array) for array in case((6, 268)))
    expected, expected_mask = _sparsegpt(weight, moment, damping=0.01)
    values, mask = _sparsegpt(weight, moment, damping=0.01, block=block)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-11)


def test_sparsegpt_leaves_the_inputs_behind_the_pruned_ones_at_their_least_squares_optimum() -> None:
    _, moment = case((1, 4))
    weight = np.array([[1e-3, -2e-3, 1.0, -0.7], [2e-3, 1e-3, 0.4, 0.9]])
    hessian = moment + 0.01 * np.trace(moment) / 4 * np.eye(4)
    values, mask = pruned(weight, moment, "sparsegpt")
    np.testing.assert_array_equal(mask, [[False, False, True, True]] * 2)
    # min (w - z)^T H (w - z) with z_0 = z_1 = 0
    gain = np.linalg.solve(hessian[2:, 2:], hessian[2:, :2])
    np.testing.assert_allclose(values[:, 2:], weight[:, 2:] + weight[:, :2] @ gain.T, rtol=1e-12)


def test_without_correlation_sparsegpt_keeps_the_weights_that_wanda_keeps() -> None:
    weight, moment = case((24, 40))
    alone = np.diag(np.diag(moment))
    values, mask = pruned(weight, alone, "sparsegpt", damping=1e-12)
    expected, expected_mask = pruned(weight, alone, "wanda")
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("seed", range(5))
def test_on_correlated_inputs_each_method_errs_less_than_the_simpler_one(seed: int) -> None:
    weight, moment = case((48, 64), seed)
    errors = {method: output_error(weight, pruned(weight, moment, method)[0], moment) for method in PRUNING_METHODS}
    assert 0 < errors["sparsegpt"] < errors["wanda"] < errors["magnitude"] < 1
    assert errors["sparsegpt"] < errors["ria"] < errors["magnitude"]


@pytest.mark.parametrize("method", PRUNING_METHODS)
def test_of_equal_scores_the_first_are_kept(method: str) -> None:
    values, mask = pruned(np.ones((3, 8)), np.eye(8), method)
    np.testing.assert_array_equal(mask, np.tile([True, True, False, False], (3, 2)))
    np.testing.assert_array_equal(values, mask.astype(float))


def test_ties_at_the_border_keep_two_and_the_larger_score_wins() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0, 0.0, 3.0, 0.0, 2.0, 5.0, 5.0, 5.0]])
    expected = [True, True, False, False, True, False, True, False, False, True, True, False]
    assert best_pairs(scores).tolist() == [expected]
    assert best_pairs(torch.full((1, 4), torch.inf)).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("method", PRUNING_METHODS)
def test_rows_and_inputs_without_weights_stay_finite(method: str) -> None:
    weight, moment = case((5, 12))
    weight[2], weight[:, 7] = 0, 0
    values, mask = pruned(weight, moment, method)
    assert np.isfinite(values).all()
    assert (per_group(mask) == 2).all()
    assert not mask[[0, 1, 3, 4], 7].any()
    assert (pruned(np.zeros((2, 8)), np.eye(8), method)[1].sum(1) == 4).all()


@pytest.mark.parametrize("method", NEEDING_MOMENT)
def test_inputs_that_no_token_had_are_pruned_first_and_touch_nothing_else(method: str) -> None:
    x = inputs(12, 60)
    dead = [1, 3, 5, 8, 9, 11]  # two, one and three of a group
    x[dead] = 0
    moment = x @ x.T
    weight = np.random.default_rng(3).standard_normal((6, 12))
    weight[:, dead] *= 100
    values, mask = pruned(weight, moment, method)
    assert (per_group(mask) == 2).all()
    assert not mask[:, [1, 3, 5]].any()
    np.testing.assert_array_equal(mask[:, 8:], np.tile([True, False, True, False], (6, 1)))
    np.testing.assert_array_equal(values[:, 8], weight[:, 8])  # kept for want of others, as it was
    changed = weight.copy()
    changed[:, dead] = np.random.default_rng(4).standard_normal((6, len(dead)))
    alive = [j for j in range(12) if j not in dead]
    if method != "ria":  # whose sums over a row see every weight
        again, again_mask = pruned(changed, moment, method)
        np.testing.assert_array_equal(again_mask, mask)
        np.testing.assert_array_equal(again[:, alive], values[:, alive])


def test_a_group_without_inputs_leaves_the_others_as_if_it_were_not_there() -> None:
    x = inputs(12, 60)
    x[4:8] = 0
    weight, alive = np.random.default_rng(3).standard_normal((6, 12)), [0, 1, 2, 3, 8, 9, 10, 11]
    values, mask = pruned(weight, x @ x.T, "sparsegpt")
    # The same damping: a share of the mean over fewer inputs.
    expected, expected_mask = pruned(weight[:, alive], x[alive] @ x[alive].T, "sparsegpt", damping=0.01 * 8 / 12)
    np.testing.assert_array_equal(mask[:, alive], expected_mask)
    np.testing.assert_allclose(values[:, alive], expected, rtol=1e-9)


@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_inputs_leave_sparsegpt_finite_and_better_than_wanda(tokens: int) -> None:
    weight = np.random.default_rng(5).standard_normal((20, 64))
    x = inputs(64, tokens)
    values, _ = pruned(weight, x @ x.T, "sparsegpt")
    assert np.isfinite(values).all()
    assert output_error(weight, values, x @ x.T) < output_error(weight, pruned(weight, x @ x.T, "wanda")[0], x @ x.T)


@pytest.mark.parametrize("method", PRUNING_METHODS)
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_the_size_of_the_inputs_does_not_matter(method: str, factor: float) -> None:
    weight, moment = case((24, 40))
    values, mask = pruned(weight, moment, method)
    scaled, scaled_mask = pruned(weight, moment * factor, method)
    np.testing.assert_array_equal(scaled_mask, mask)
    np.testing.assert_array_equal(scaled, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", PRUNING_METHODS)
@pytest.mark.parametrize("rows", [1, 24])
def test_the_weight_keeps_its_dtype_and_both_inputs_their_values(method: str, dtype: torch.dtype, rows: int) -> None:
    weight, moment = (torch.from_numpy(array) for array in case((rows, 40)))
    weight = weight.to(dtype).requires_grad_()
    before, moment_before = weight.detach().clone(), moment.clone()
    values, mask = prune_2_4(weight, moment, method)
    assert (values.dtype, mask.dtype) == (dtype, torch.bool)
    assert values.is_contiguous()
    assert mask.is_contiguous()
    assert not values.requires_grad
    assert torch.equal(weight.detach(), before)
    assert torch.equal(moment, moment_before)
    exact, exact_mask = prune_2_4(before.double(), moment, method)
    assert torch.equal(mask, exact_mask)
    assert torch.equal(values, exact.to(dtype))


def test_a_moment_in_float32_will_do() -> None:
    weight, moment = (torch.from_numpy(array) for array in case((24, 40)))
    for method in NEEDING_MOMENT:
        expected = prune_2_4(weight, moment.float().double(), method)
        for found, wanted in zip(prune_2_4(weight, moment.float(), method), expected, strict=True):
            assert torch.equal(found, wanted)


GOOD = torch.ones(2, 8)
EYE = torch.eye(8, dtype=torch.float64)


def with_entry(tensor: torch.Tensor, value: float, *at: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an unknown method": (
        lambda: prune_2_4(GOOD, EYE, "random"),
        r"method is 'random', expected one of \('magnitude', 'wanda', 'ria', 'sparsegpt'\)",
    ),
    "a vector": (
        lambda: prune_2_4(torch.ones(8), None, "magnitude"),
        r"weight is torch\.float32 \(8,\), expected a floating point matrix \[m, n\]",
    ),
    "integers": (
        lambda: prune_2_4(torch.ones(2, 8, dtype=torch.int8), None, "magnitude"),
        r"weight is torch\.int8 \(2, 8\), expected a floating point matrix",
    ),
    "inputs that are no multiple of 4": (
        lambda: prune_2_4(torch.ones(2, 6), None, "magnitude"),
        "weight has 6 inputs, expected a multiple of 4 for 2:4; leave this layer dense",
    ),
    "a weight that is not finite": (
        lambda: prune_2_4(with_entry(GOOD, float("nan"), 1, 3), None, "magnitude"),
        "weight has NaN or Inf entries, expected finite weights; check the model",
    ),
    **{
        f"no moment for {method}": (
            lambda method=method: prune_2_4(GOOD, None, method),
            f"moment is missing, method {method} needs X X\\^T of calibration tokens; run calibration",
        )
        for method in NEEDING_MOMENT
    },
    "a moment of another layer": (
        lambda: prune_2_4(GOOD, torch.eye(4, dtype=torch.float64), "wanda"),
        r"moment is torch\.float64 \(4, 4\), expected floating point \(8, 8\) as the weight has inputs; run",
    ),
    "a moment that is a vector": (lambda: prune_2_4(GOOD, torch.ones(8), "ria"), r"moment is torch\.float32 \(8,\)"),
    "a moment of integers": (lambda: prune_2_4(GOOD, EYE.long(), "wanda"), r"moment is torch\.int64 \(8, 8\)"),
    "a moment that is not finite": (
        lambda: prune_2_4(GOOD, with_entry(EYE, float("inf"), 2, 3), "sparsegpt"),
        "moment has NaN or Inf entries, expected finite sums; check the calibration activations",
    ),
    "a moment of no tokens": (
        lambda: prune_2_4(GOOD, 0 * EYE, "wanda"),
        r"moment has only zeros on its diagonal, expected X X\^T of calibration tokens; run calibration",
    ),
    "a negative sum of squares": (
        lambda: prune_2_4(GOOD, with_entry(EYE, -2.0, 3, 3), "ria"),
        r"moment has a negative sum of squares \(-2\) on its diagonal",
    ),
    "a moment that no inputs have": (
        lambda: prune_2_4(GOOD, with_entry(with_entry(EYE, 9.0, 0, 1), 9.0, 1, 0), "sparsegpt"),
        "moment is not positive semidefinite, expected X X\\^T summed over calibration tokens; run calibration again",
    ),
    **{
        f"damping {damping}": (
            lambda damping=damping: prune_2_4(GOOD, EYE, "sparsegpt", damping=damping),
            f"damping is {damping}, expected a positive number, the published one is 0.01",
        )
        for damping in (0.0, -0.01, float("nan"), float("inf"))
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pruned_is_refused_with_the_reason(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_magnitude_looks_at_no_moment() -> None:
    expected = prune_2_4(GOOD, None, "magnitude")
    for found, wanted in zip(prune_2_4(GOOD, torch.full((3,), torch.nan), "magnitude"), expected, strict=True):
        assert torch.equal(found, wanted)
