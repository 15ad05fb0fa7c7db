"""How good a language model is on a text: windows of the text, their negative log-likelihood, how sure that is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from pifa_deploy.calibration import check_vocabulary, even_windows
from pifa_deploy.errors import InputRefusedError, StageFailedError

# int64 ids [batch, sequence], no padding -> floating-point logits [batch, sequence, vocabulary]; back when computed.
Logits = Callable[[torch.Tensor], torch.Tensor]

DEVICES = ("cpu", "cuda")
SPREAD_WINDOWS = 20
# A softmax over 128 positions of 150,000 tokens takes 77 MB in float32; over a whole batch it would double the logits.
_POSITIONS = 128


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Which tokens of a text are scored, and how.

    Attributes:
        context: tokens a window.
        stride: distance of the windows; below `context` they overlap and each scores only its last `stride` tokens,
            the first one all. None stands for `context`.
        max_windows: at most this many: spread evenly over the text where they do not overlap (20 when None), the
            first ones where they do (all when None).
        batch_size: windows a forward pass.
        device: "cpu" or "cuda".
    """

    context: int = 512
    stride: int | None = None
    max_windows: int | None = None
    batch_size: int = 4
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that no evaluation can have."""
        if self.context < 2 or (self.max_windows is not None and self.max_windows < 1):
            windows = "all" if self.max_windows is None else self.max_windows
            raise ValueError(f"{windows} windows of {self.context} tokens, expected at least 1 of at least 2")
        if self.stride is not None and not 1 <= self.stride <= self.context:
            raise ValueError(f"stride is {self.stride}, expected 1 <= stride <= context, which is {self.context}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}, expected one of {', '.join(DEVICES)}")


@dataclass(frozen=True, kw_only=True)
class Window:
    """A piece of a text.

    Attributes:
        ids: int64 [tokens].
        scored: how many of its last tokens count; never the first one, which nothing foretells.
    """

    ids: torch.Tensor
    scored: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean negative log-likelihood (nats a token) above another model's on the same windows; None: one window only."""

    mean_nll: float
    standard_error: float | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model on one text.

    Attributes:
        nll: per window, the negative log-likelihood of its scored tokens, summed, in nats.
        tokens: per window, its scored tokens.
        passes: per forward pass, (tokens read, seconds).
    """

    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    passes: tuple[tuple[int, float], ...]

    @property
    def mean_nll(self) -> float:
        """Mean negative log-likelihood of a scored token, nats."""
        return sum(self.nll) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(mean_nll), infinite beyond the largest float."""
        return exp(self.mean_nll)

    @property
    def standard_error(self) -> float | None:
        """Standard error of `mean_nll`, windows taken as independent draws; None with a single one."""
        return _standard_error(self.nll, self.tokens)

    def minus(self, other: Score) -> Difference:
        """Returns how much worse this is than `other`, paired by window: what both find hard cancels out.

        Raises:
            ValueError: the scores are not of the same windows.
        """
        if self.tokens != other.tokens:
            raise ValueError(f"scores of {len(self.tokens)} and {len(other.tokens)} windows, expected the same windows")
        nll = [mine - theirs for mine, theirs in zip(self.nll, other.nll, strict=True)]
        return Difference(mean_nll=sum(nll) / sum(self.tokens), standard_error=_standard_error(nll, self.tokens))

    def to_json(self) -> dict[str, Any]:
        """Returns the figures as JSON values; null for one that is not finite."""
        return {
            "perplexity": finite(self.perplexity),
            "mean_nll": finite(self.mean_nll),
            "standard_error": finite(self.standard_error),
            "windows": len(self.tokens),
            "scored_tokens": sum(self.tokens),
            "window_nll": [finite(total / count) for total, count in zip(self.nll, self.tokens, strict=True)],
            "window_tokens": list(self.tokens),
        }


def windows_of(ids: torch.Tensor, options: EvaluateOptions) -> list[Window]:
    """Returns the windows of a text.

    Overlapping ones are those of Hugging Face's guide "Perplexity of fixed-length models": they start every `stride`
    tokens, and the last one ends with the text, so that it may be shorter.

    Args:
        ids: int64 [tokens].
        options: see EvaluateOptions.

    Raises:
        InputRefusedError: the text is shorter than one window.
    """
    if options.stride is None or options.stride == options.context:
        whole = even_windows(ids, options.context, options.max_windows or SPREAD_WINDOWS)
        return [Window(ids=row, scored=len(row) - 1) for row in whole]
    if len(ids) < options.context:
        raise InputRefusedError(
            f"the text has {len(ids)} tokens, one window needs {options.context}; give more text or shorter windows"
        )
    windows: list[Window] = []
    end = 1  # the first token of the text is read, never scored
    for start in range(0, len(ids), options.stride):
        scored_before, end = end, min(start + options.context, len(ids))
        windows.append(Window(ids=ids[start:end], scored=end - scored_before))
        if end == len(ids) or len(windows) == options.max_windows:
            break
    return windows


def evaluate(logits: Logits, windows: Sequence[Window], *, batch_size: int = 4) -> Score:
    """Scores windows; holds the logits of one batch at a time.

    Args:
        logits: the model.
        windows: at least one.
        batch_size: windows a forward pass, at most; those of one pass have the same length.

    Raises:
        StageFailedError: the negative log-likelihood of a window is not finite: the model is broken.
    """
    nll: list[float] = []
    passes = []
    with tqdm(total=len(windows), desc="perplexity", unit="window", disable=None, leave=False) as bar:
        for batch in _batches(windows, batch_size):
            ids = torch.stack([window.ids for window in batch])
            started = time.perf_counter()
            found = logits(ids)
            passes.append((ids.numel(), time.perf_counter() - started))
            nll += [_nll(row, window) for row, window in zip(found, batch, strict=True)]
            if not all(map(math.isfinite, nll[-len(batch) :])):
                raise StageFailedError(_broken(nll, len(windows)))
            # Otherwise these logits would still be there while the next ones are computed.
            del found
            bar.update(len(batch))
    return Score(nll=tuple(nll), tokens=tuple(window.scored for window in windows), passes=tuple(passes))


def torch_logits(model: PreTrainedModel) -> Logits:
    """Returns the logits of a causal LM in eval mode, on its device, which has finished when they are returned."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
        if found.is_cuda:
            torch.cuda.synchronize(found.device)
        return found

    return logits


def perplexity(model: PreTrainedModel, windows: torch.Tensor, *, batch_size: int = 4) -> float:
    """Returns exp(mean negative log-likelihood) of every token but each window's first.

    Args:
        model: causal LM in eval mode.
        windows: int64 [windows, sequence_length].
        batch_size: windows a forward pass.

    Raises:
        InputRefusedError: a token that the model does not know.
        StageFailedError: see `evaluate`.
    """
    check_vocabulary(windows, model.get_input_embeddings().num_embeddings)
    whole = [Window(ids=row, scored=len(row) - 1) for row in windows]
    return evaluate(torch_logits(model), whole, batch_size=batch_size).perplexity


def exp(value: float) -> float:
    """Returns e to the power of `value`, infinite where no float holds it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def finite(value: float | None) -> float | None:
    """Returns a number as JSON has it: None for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def _batches(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    for _, group in groupby(windows, key=lambda window: len(window.ids)):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _nll(logits: torch.Tensor, window: Window) -> float:
    """Returns the summed negative log-likelihood of a window's scored tokens; logits [tokens, vocabulary]."""
    first = len(window.ids) - window.scored
    targets = window.ids[first:].to(logits.device)
    total = 0.0
    parts = torch.split(logits[first - 1 : -1], _POSITIONS)
    for part, wanted in zip(parts, torch.split(targets, _POSITIONS), strict=True):
        rows = part.float()
        losses = rows.logsumexp(-1) - rows.gather(-1, wanted[:, None])[:, 0]
        total += float(losses.double().sum())
    return total


def _broken(nll: Sequence[float], windows: int) -> str:
    place, value = next((place, value) for place, value in enumerate(nll, 1) if not math.isfinite(value))
    return (
        f"the negative log-likelihood of window {place} of {windows} is {value}, expected a finite number; look for "
        "NaN, Inf or an overflow in the model with `pifa-deploy verify`"
    )


def _standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Returns the standard error of sum(sums) / sum(counts), the ratio estimator of a cluster sample (Cochran 1977)."""
    number, tokens = len(sums), sum(counts)
    if number < 2:
        return None
    mean = sum(sums) / tokens
    squares = sum((total - mean * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return math.sqrt(number / (number - 1) * squares) / tokens
