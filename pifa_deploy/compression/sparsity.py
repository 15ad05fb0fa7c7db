"""2:4 semi-structured pruning of one weight: magnitude, Wanda, RIA and SparseGPT.

In every group of four neighbouring inputs of a row two weights are kept; NVIDIA's sparse tensor cores
(compute capability 8.0 and later) skip the others. These are the published baselines, one-shot and
without training. RIA is its score alone: the channel permutation of the same paper would need the
permutation of the layer before, which a weight does not know.

Written here because no maintained library prunes a bare weight with its moment: llm-compressor and torchao
prune modules inside pipelines of their own, and ModelOpt's SparseGPT gives the mask without the new weights.
"""

from __future__ import annotations

import torch

from pifa_deploy.sparse_checkpoint import GROUP, KEPT
from pifa_deploy.sparse_checkpoint import PATTERN as PATTERN

PRUNING_METHODS = ("magnitude", "wanda", "ria", "sparsegpt")
DAMPING = 0.01
# Inputs pruned before their errors reach the inputs behind them; changes the speed and not the result.
_BLOCK = 128


def prune_2_4(
    weight: torch.Tensor, moment: torch.Tensor | None, method: str, *, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes a linear's weight so that of every four neighbouring inputs of a row two are kept.

    The scores, of which the two largest of each group are kept (the first of equal ones):

    - "magnitude": |W_ij|. The moment is not used.
    - "wanda" (arXiv 2306.11695, equation 1): |W_ij| ||x_j||, the norm over all calibration tokens.
    - "ria" (Plug-and-Play, ICLR 2024, openreview Tr0lPx9woF, with its power a = 0.5):
      (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||x_j||^0.5.
    - "sparsegpt" (arXiv 2301.00774, algorithm 1): W_ij^2 / [H_j^-1]_jj, see `_sparsegpt`; the only one that
      also changes the weights it keeps. All are computed in float64.

    Args:
        weight: W [m, n] floating point, n a multiple of 4; not changed.
        moment: X X^T [n, n] summed over calibration tokens, as `statistics.input_moments` gives it.
        method: one of PRUNING_METHODS.
        damping: share of the mean diagonal of the moment that SparseGPT adds to it.

    Returns:
        The pruned weight [m, n] in the dtype of `weight`, pruned places exactly zero, and the mask bool [m, n],
        True where kept. A kept weight may be zero itself.

    Raises:
        ValueError: unknown method, or a weight, moment or damping that cannot be used; says what was found.
    """
    if method not in PRUNING_METHODS:
        raise ValueError(f"method is {method!r}, expected one of {PRUNING_METHODS}")
    _check_weight(weight)
    matrix = weight.detach().double()
    if method == "magnitude":
        return _pruned(weight, matrix, best_pairs(matrix.abs()))
    inputs = _checked_moment(moment, matrix.shape[1], method)
    if method == "sparsegpt":
        return _pruned(weight, *_sparsegpt(matrix, inputs, damping=damping))
    norms = inputs.diagonal().sqrt()
    scores = matrix.abs() * norms if method == "wanda" else relative_importance(matrix) * norms.sqrt()
    return _pruned(weight, matrix, best_pairs(scores))


def best_pairs(scores: torch.Tensor) -> torch.Tensor:
    """Returns bool [m, n], True at the two largest scores of each group of four, the first of equal ones.

    Args:
        scores: [m, n], n a multiple of 4, no NaN.
    """
    groups = scores.reshape(len(scores), -1, GROUP)
    # topk leaves open which of equal scores it takes.
    order = groups.argsort(dim=-1, descending=True, stable=True)[..., :KEPT]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).flatten(-2)


def relative_importance(weight: torch.Tensor) -> torch.Tensor:
    """Returns |W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|, 0 where a whole row or column is zero."""
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny
    return size / size.sum(0, keepdim=True).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)


def _pruned(weight: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # where() and not a product, which leaves -0.0 and rounds nothing else.
    return torch.where(mask, values, 0.0).to(weight.dtype), mask


def _sparsegpt(
    weight: torch.Tensor, moment: torch.Tensor, *, damping: float, block: int = _BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prunes input by input from the first to the last; each error is made good by the inputs behind it.

    With H = moment + damping mean(diag), F the inputs not yet passed and H_F^-1 = inverse of H on F (its first
    row and column belong to the input j at hand), pruning w_j costs w_j^2 / [H_F^-1]_jj and changes the rest by
    -w_j / [H_F^-1]_jj [H_F^-1]_j (optimal brain surgeon). All H_F^-1 are in one factor: H^-1 = U^T U with U upper
    triangular gives [H_F^-1]_j = U_jj U_j. Which two weights of a group stay is decided when it is reached, with
    the weights as they are by then.

    An input that no calibration token had says nothing about the output: it is pruned first, takes no part in the
    corrections, and keeps its weight where its group has too few others (the published code zeroes it there too).

    float64 costs half as much again as float32 (0.76 s and 0.50 s for 1024 x 2048 on one core) and keeps rounding
    out of the choice: at a condition number of 2e5, near the 100 n that a damping of 1 % allows, float32 chose 0.04 %
    of the mask otherwise, at the same error.

    Returns:
        Weights float64 [m, n], pruned ones not yet zeroed, and the mask bool [m, n].
    """
    factor = _inverse_factor(moment, damping)
    seen = moment.diagonal() > 0
    precision = torch.where(seen, factor.diagonal().square().reciprocal(), 0.0)
    # Transposed, so that the weights of one input lie side by side. contiguous() would not copy a single row.
    work = weight.T.clone(memory_format=torch.contiguous_format)
    mask = torch.empty_like(work, dtype=torch.bool)
    for start in range(0, len(work), block):
        here, behind = slice(start, start + block), slice(start + block, None)
        errors = _prune_block(work[here], mask[here], factor[here, here], precision[here])
        work[behind].addmm_(factor[here, behind].T, errors, alpha=-1)
    return work.T.contiguous(), mask.T.contiguous()


def _prune_block(work: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor, precision: torch.Tensor) -> torch.Tensor:
    """Prunes a block of inputs in place and returns their errors w / U_jj [inputs, m], zero where kept."""
    errors = torch.empty_like(work)
    for start in range(0, len(work), GROUP):
        group, behind = slice(start, start + GROUP), slice(start + GROUP, None)
        mask[group] = best_pairs((work[group].square() * precision[group, None]).T).T
        for j in range(start, start + GROUP):
            errors[j] = torch.where(mask[j], 0.0, work[j] / factor[j, j])
            rest = slice(j + 1, start + GROUP)
            work[rest] -= factor[j, rest, None] * errors[j]
        work[behind].addmm_(factor[group, behind].T, errors[group], alpha=-1)
    return errors


def _inverse_factor(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Returns the upper triangular U [n, n] float64 with (moment + damping mean(diag))^-1 = U^T U."""
    if not 0.0 < damping < float("inf"):
        raise ValueError(f"damping is {damping}, expected a positive number, the published one is {DAMPING}")
    # Turned round, the lower Cholesky factor of H is an upper one, R R^T = H, and U = R^-1: no H^-1 is formed.
    turned = moment.flip(0, 1)
    turned.diagonal().add_(damping * moment.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(turned)
    if int(info):
        raise ValueError(
            "moment is not positive semidefinite, expected X X^T summed over calibration tokens; run calibration again"
        )
    identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    factor: torch.Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return factor


def _check_weight(weight: torch.Tensor) -> None:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}, expected a floating point matrix [m, n]")
    if weight.shape[1] % GROUP:
        raise ValueError(
            f"weight has {weight.shape[1]} inputs, expected a multiple of {GROUP} for {PATTERN}; leave this layer dense"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight has NaN or Inf entries, expected finite weights; check the model")


def _checked_moment(moment: torch.Tensor | None, inputs: int, method: str) -> torch.Tensor:
    """Returns the moment in float64."""
    if moment is None:
        raise ValueError(f"moment is missing, method {method} needs X X^T of calibration tokens; run calibration")
    if tuple(moment.shape) != (inputs, inputs) or not moment.is_floating_point():
        raise ValueError(
            f"moment is {moment.dtype} {tuple(moment.shape)}, expected floating point {(inputs, inputs)} as the weight "
            "has inputs; run calibration for this layer"
        )
    if not bool(torch.isfinite(moment).all()):
        raise ValueError("moment has NaN or Inf entries, expected finite sums; check the calibration activations")
    lowest, highest = (float(value) for value in torch.aminmax(moment.diagonal()))
    if lowest < 0.0 or highest == 0.0:
        found = f"a negative sum of squares ({lowest:.3g})" if lowest < 0.0 else "only zeros"
        raise ValueError(f"moment has {found} on its diagonal, expected X X^T of calibration tokens; run calibration")
    return moment.double()
