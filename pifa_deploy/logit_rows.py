"""Figures of logits row by row, in float64 and in chunks that stay in the cache, and how sure a mean of them is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

FloatRows = npt.NDArray[np.float64]
# A reference whose two best tokens are closer than this has no winner to agree with.
TOP1_GAP = 1e-3
FIGURES = ("finite", "max_abs", "cosine", "kl", "agree", "decided", "nll")
_CHUNK_BYTES = 2 << 20
_RESAMPLES = 2000


def row_figures(
    reference: npt.NDArray[Any], candidate: npt.NDArray[Any], labels: npt.NDArray[np.int64] | None = None
) -> dict[str, FloatRows]:
    """Returns name -> [positions] for each of FIGURES.

    Args:
        reference: logits [positions, vocabulary].
        candidate: as `reference`.
        labels: int64 [positions], the token that follows in the text; -1 where there is none.

    Returns:
        finite, agree and decided are 0 or 1; kl is KL(reference || candidate) in nats; nll is the candidate's
        negative log-likelihood of the label minus the reference's, NaN without a label. A row with a logit that is not
        finite, on either side, has NaN everywhere but in `finite`.

    Raises:
        ValueError: another number of positions or tokens.
    """
    if reference.shape != candidate.shape:
        raise ValueError(
            f"logits are {list(reference.shape)} and {list(candidate.shape)}; expected as many positions and tokens "
            "on both sides"
        )
    count, vocabulary = reference.shape
    labels = np.full(count, -1, np.int64) if labels is None else labels
    size = max(1, _CHUNK_BYTES // (8 * vocabulary))
    chunks = [slice(start, start + size) for start in range(0, count, size)]
    parts = [_chunk(reference[part].astype(np.float64), candidate[part], labels[part]) for part in chunks]
    return {key: np.concatenate([part[key] for part in parts]) if parts else np.empty(0) for key in FIGURES}


def _chunk(expected: FloatRows, candidate: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> dict[str, FloatRows]:
    found = candidate.astype(np.float64)
    finite = np.logical_and(np.isfinite(expected).all(-1), np.isfinite(found).all(-1))
    if not finite.all():
        # Zeros keep numpy quiet; what comes of them is replaced below.
        expected, found = (np.where(finite[:, None], side, 0.0) for side in (expected, found))
    log_p, log_q = _log_softmax(expected), _log_softmax(found)
    rows = np.arange(len(expected))
    norms = np.linalg.norm(expected, axis=-1) * np.linalg.norm(found, axis=-1)
    best = expected.argmax(-1)
    figures = {
        "max_abs": np.abs(expected - found).max(-1),
        "cosine": np.einsum("ij,ij->i", expected, found) / np.where(norms > 0, norms, 1.0),
        "kl": np.maximum(np.einsum("ij,ij->i", np.exp(log_p), log_p - log_q), 0.0),
        "agree": (best == found.argmax(-1)).astype(np.float64),
        "nll": np.where(labels >= 0, log_p[rows, labels] - log_q[rows, labels], math.nan),
    }
    winner = expected[rows, best]
    expected[rows, best] = -math.inf
    figures["decided"] = (winner - expected.max(-1, initial=-math.inf) > TOP1_GAP).astype(np.float64)
    figures = {key: np.where(finite, values, math.nan) for key, values in figures.items()}
    return {"finite": finite.astype(np.float64), **figures}


def _log_softmax(rows: FloatRows) -> FloatRows:
    shifted = rows - rows.max(-1, keepdims=True)
    result: FloatRows = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def blocks(values: FloatRows, length: int) -> FloatRows:
    """Returns (sum, count) of runs of `length` neighbours, NaN left out, [blocks, 2]; empty blocks are dropped."""
    starts = range(0, len(values), length)
    parts = [values[start : start + length] for start in starts]
    known = [part[~np.isnan(part)] for part in parts]
    found: FloatRows = np.array([(part.sum(), len(part)) for part in known if len(part)], np.float64).reshape(-1, 2)
    return found


def bootstrap_interval(found: FloatRows, *, seed: int = 0, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of a mean over blocks (Künsch 1989, blocks that do not overlap).

    Positions of one text depend on each other, so that blocks and not positions are drawn.

    Args:
        found: (sum, count) of each block, at least one.
        seed: of the draws.
        confidence: of the interval.
    """
    draws = np.random.default_rng(seed).integers(0, len(found), (_RESAMPLES, len(found)))
    sums = found[draws].sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(sums[:, 0] / sums[:, 1], (tail, 1 - tail))
    return float(low), float(high)
