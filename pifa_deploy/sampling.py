"""How the next token is chosen from logits: the likeliest, or drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pifa_deploy.errors import StageFailedError

Logits = npt.NDArray[np.float32]
Choose = Callable[[Logits], int]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a token is chosen; the words and their order are those of transformers.

    Attributes:
        temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
        top_k: draw from this many likeliest tokens, and those as likely as the last of them; 0: from all.
        top_p: draw from the fewest likeliest tokens whose probabilities add up to this, of those that top_k left.
        seed: of the drawing; None: another one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a number outside its range, or one that a temperature of 0 would ignore."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, expected 0 (the likeliest token) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected a probability above 0, up to 1")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more")
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.seed is not None):
            raise ValueError(
                "top_k, top_p or seed was given with temperature 0, which takes the likeliest token; give a temperature"
            )


def chooser(options: SamplingOptions) -> Choose:
    """Returns logits [vocabulary] -> token; it remembers where in the drawing it is.

    The function that is returned raises StageFailedError for logits among which no token is the likeliest: NaN or
    infinity in them, or nothing but -infinity.
    """
    generator = np.random.default_rng(options.seed)

    def choose(logits: Logits) -> int:
        if not np.isfinite(logits.max()):  # NaN, where there is one
            raise StageFailedError(
                f"the model gave {np.isnan(logits).sum()} NaN and {np.isinf(logits).sum()} infinite of {len(logits)} "
                "logits, so that no token is the likeliest; look for the layer with `pifa-deploy verify`"
            )
        if options.temperature == 0:
            return int(logits.argmax())
        return int(generator.choice(len(logits), p=probabilities(logits, options)))

    return choose


def probabilities(logits: Logits, options: SamplingOptions) -> npt.NDArray[np.float64]:
    """Returns the probability of every token, 0 for those that top_k or top_p leave out.

    Args:
        logits: float32 [vocabulary].
        options: with a temperature above 0.
    """
    scores = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature makes -infinity of all but the likeliest
        scores = (scores - scores.max()) / options.temperature
    if 0 < options.top_k < len(scores):
        scores[scores < np.partition(scores, -options.top_k)[-options.top_k]] = -np.inf
    found = _softmax(scores)
    if options.top_p < 1:
        order = np.argsort(-found, kind="stable")
        before = np.cumsum(found[order]) - found[order]
        found[order[before >= options.top_p]] = 0
        found /= found.sum()
    return found


def _softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers: npt.NDArray[np.float64] = np.exp(scores - scores.max())
    powers /= powers.sum()
    return powers
