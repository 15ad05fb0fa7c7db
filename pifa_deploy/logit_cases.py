"""Which tokens a verification feeds to all runners: prompts, padded batches, decode steps, long prefills."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pifa_deploy.calibration import HELD_OUT_TEXT, packaged_text, read_texts, token_ids
from pifa_deploy.decoder_step import FloatArray, IntArray, Step
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.model_folder import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class CaseOptions:
    """Which positions are compared.

    Attributes:
        text: UTF-8 files; the packaged held-out text when empty.
        prefill_lengths: prompts run on their own, in tokens.
        padded_lengths: prompts run as one batch, padded on the left to the longest.
        decode_prompt: tokens before the teacher-forced decode steps.
        decode_steps: number of single-token steps through the cache.
        positions: at least so many in all: further prefills, of tokens behind those of the other cases, make them up.
        window: tokens of each of those prefills.
    """

    text: tuple[Path, ...] = ()
    prefill_lengths: tuple[int, ...] = (1, 17, 128, 512)
    padded_lengths: tuple[int, ...] = (40, 96, 71)
    decode_prompt: int = 64
    decode_steps: int = 32
    positions: int = 8192
    window: int = 512

    def __post_init__(self) -> None:
        """Raises ValueError for lengths below 1."""
        lengths = (*self.prefill_lengths, *self.padded_lengths, self.decode_prompt, self.window)
        if not self.prefill_lengths or min(lengths) < 1 or self.decode_steps < 0:
            raise ValueError(f"lengths are {lengths} and decode_steps {self.decode_steps}, expected at least 1 and 0")
        if self.positions < 0:
            raise ValueError(f"positions is {self.positions}, expected at least 0")

    def windows(self) -> list[tuple[int, int]]:
        """Returns (start, stop) of the long prefills."""
        decoded = self.decode_prompt + self.decode_steps if self.decode_steps else 0
        first = self._first_tokens()
        missing = self.positions - sum(self.prefill_lengths) - sum(self.padded_lengths) - decoded
        count = -(-missing // self.window) if missing > 0 else 0
        return [(first + i * self.window, first + (i + 1) * self.window) for i in range(count)]

    def within(self, *, batch: int, tokens: int, past: int) -> dict[str, Any]:
        """Returns the lengths that a runner with limits can take, as changes to the options.

        Args:
            batch: most sequences in one step.
            tokens: most tokens in one step.
            past: most tokens in the cache before a step.
        """
        padded = len(self.padded_lengths) <= batch and max(self.padded_lengths, default=0) <= tokens
        prompt = min(self.decode_prompt, tokens, past)
        return {
            "prefill_lengths": tuple(length for length in self.prefill_lengths if length <= tokens) or (tokens,),
            "padded_lengths": self.padded_lengths if padded else (),
            "decode_prompt": prompt,
            "decode_steps": min(self.decode_steps, past - prompt + 1),
            "window": min(self.window, tokens),
        }

    def tokens_needed(self) -> int:
        """Returns how long the text must be."""
        return max((stop for _, stop in self.windows()), default=self._first_tokens())

    def _first_tokens(self) -> int:
        return max(*self.prefill_lengths, sum(self.padded_lengths), self.decode_prompt + self.decode_steps)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step of all runners.

    Attributes:
        name: of the case.
        step: what is fed.
        labels: int64 [batch, sequence], the token that follows in the text; -1 where there is none.
    """

    name: str
    step: Step
    labels: IntArray

    def visible(self, logits: FloatArray) -> FloatArray:
        """Returns the logits [positions, vocabulary] of the tokens that are not padding."""
        rows: FloatArray = logits[self._mask()]
        return rows

    def visible_labels(self) -> IntArray:
        """Returns the labels [positions] of the tokens that are not padding."""
        rows: IntArray = self.labels[self._mask()]
        return rows

    def _mask(self) -> IntArray:
        mask: IntArray = self.step.attention_mask[:, -self.step.input_ids.shape[1] :] == 1
        return mask


def text_tokens(reference: Path | str, options: CaseOptions) -> IntArray:
    """Returns the tokens of the text, int64 [tokens].

    Raises:
        InputRefusedError: fewer than the cases need.
    """
    paths = options.text or (packaged_text(HELD_OUT_TEXT),)
    ids = token_ids(read_texts(paths), load_tokenizer(reference))
    if len(ids) < options.tokens_needed():
        raise InputRefusedError(
            f"{', '.join(map(str, paths))}: {len(ids)} tokens, verification needs {options.tokens_needed()}; "
            "give more text or fewer positions"
        )
    tokens: IntArray = ids.numpy()
    return tokens


def cases(ids: IntArray, options: CaseOptions) -> Iterator[Case]:
    """Yields prefills, a padded batch, a prompt and decode steps that share one cache, then the long prefills."""
    for length in options.prefill_lengths:
        yield _plain(f"prefill {length}", ids, 0, length)
    if options.padded_lengths:
        yield _padded(f"padded batch {'+'.join(map(str, options.padded_lengths))}", ids, options.padded_lengths)
    if options.decode_steps:
        yield _plain(f"prompt {options.decode_prompt}", ids, 0, options.decode_prompt)
        for past in range(options.decode_prompt, options.decode_prompt + options.decode_steps):
            step = Step.after(past, ids[past : past + 1])
            yield Case(name=f"decode at {past}", step=step, labels=_following(ids, past, past + 1)[None])
    for start, stop in options.windows():
        yield _plain(f"tokens {start} to {stop}", ids, start, stop)


def _plain(name: str, ids: IntArray, start: int, stop: int) -> Case:
    return Case(name=name, step=Step.after(0, ids[start:stop]), labels=_following(ids, start, stop)[None])


def _following(ids: IntArray, start: int, stop: int) -> IntArray:
    """Returns the tokens behind those from `start` to `stop`."""
    found = np.full(stop - start, -1, np.int64)
    known = ids[start + 1 : stop + 1]
    found[: len(known)] = known
    return found


def _padded(name: str, ids: IntArray, lengths: tuple[int, ...]) -> Case:
    width, count = max(lengths), len(lengths)
    inputs = np.full((count, width), ids[0])
    mask, positions = np.zeros((2, count, width), np.int64)
    labels = np.full((count, width), -1, np.int64)
    start = 0
    for row, length in enumerate(lengths):
        inputs[row, width - length :] = ids[start : start + length]
        mask[row, width - length :] = 1
        positions[row, width - length :] = np.arange(length)
        labels[row, width - length :] = _following(ids, start, start + length)
        start += length
    step = Step(input_ids=inputs, attention_mask=mask, position_ids=positions)
    return Case(name=name, step=step, labels=labels)
