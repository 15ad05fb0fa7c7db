"""Which tokens a verification feeds to all runners: prompts, padded batches, decode steps, long sequences."""

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
    """Which positions are compared; no two cases have a token of the text in common.

    Attributes:
        text: UTF-8 files; the packaged held-out text when empty.
        prefill_lengths: prompts run on their own, in tokens.
        padded_lengths: prompts run as one batch, padded on the left to the longest.
        padded_steps: tokens a row of the steps behind that batch's cache.
        decode_prompt: tokens before the teacher-forced decode steps.
        decode_steps: number of single-token steps through the cache, behind that prompt, and once more before the
            last step of the first long sequence.
        positions: at least so many in all: long sequences make them up.
        window: most tokens of a step in these.
        context: most tokens of each of these, which runs through the cache step by step.
    """

    text: tuple[Path, ...] = ()
    prefill_lengths: tuple[int, ...] = (1, 17, 128, 512)
    padded_lengths: tuple[int, ...] = (40, 96, 71)
    padded_steps: tuple[int, ...] = (7, 1, 1)
    decode_prompt: int = 64
    decode_steps: int = 32
    positions: int = 8192
    window: int = 512
    context: int = 2048

    def __post_init__(self) -> None:
        """Raises ValueError for lengths below 1."""
        lengths = (*self.prefill_lengths, *self.padded_lengths, *self.padded_steps)
        lengths += (self.decode_prompt, self.window, self.context)
        if not self.prefill_lengths or min(lengths) < 1 or self.decode_steps < 0:
            raise ValueError(f"lengths are {lengths} and decode_steps {self.decode_steps}, expected at least 1 and 0")
        if self.positions < 0:
            raise ValueError(f"positions is {self.positions}, expected at least 0")

    def sequences(self) -> list[tuple[int, ...]]:
        """Returns the lengths of the steps of each long sequence."""
        missing = self.positions - self._first_tokens()
        count = -(-missing // self.window) if missing > 0 else 0
        at_once = max(self.context // self.window, 1)
        steps = [(self.window,) * min(at_once, count - first) for first in range(0, count, at_once)]
        if steps and len(steps[0]) > 1:  # the longest cache that any runner with room for these steps has room for
            singles = min(self.decode_steps, self.window)
            rest = (self.window - singles,) if singles < self.window else ()
            steps[0] = (*steps[0][:-2], *rest, *(1,) * singles, steps[0][-1])
        return steps

    def within(self, *, batch: int, tokens: int, past: int) -> dict[str, Any]:
        """Returns the lengths that a runner with limits can take, as changes to the options.

        Args:
            batch: most sequences in one step.
            tokens: most tokens in one step.
            past: most tokens in the cache before a step.
        """
        width = max(self.padded_lengths, default=0)
        padded = len(self.padded_lengths) <= batch and width <= tokens
        continued = padded and max(self.padded_steps, default=0) <= tokens and width + sum(self.padded_steps) <= past
        prompt, window = min(self.decode_prompt, tokens, past), min(self.window, tokens)
        return {
            "prefill_lengths": tuple(length for length in self.prefill_lengths if length <= tokens) or (tokens,),
            "padded_lengths": self.padded_lengths if padded else (),
            "padded_steps": self.padded_steps if continued else (),
            "decode_prompt": prompt,
            "decode_steps": min(self.decode_steps, past - prompt + 1),
            "window": window,
            "context": min(self.context, (past // window + 1) * window),
        }

    def tokens_needed(self) -> int:
        """Returns how long the text must be."""
        return self._first_tokens() + sum(map(sum, self.sequences()))

    def _first_tokens(self) -> int:
        padded = sum(self.padded_lengths) + len(self.padded_lengths) * sum(self.padded_steps)
        return sum(self.prefill_lengths) + padded + (self.decode_prompt + self.decode_steps) * bool(self.decode_steps)


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

    @property
    def kind(self) -> str:
        """What a runner does in it that it does not do in other kinds."""
        if not self.step.attention_mask.all():
            return "padded" if self.step.starts else "padded, cached"
        if self.step.starts:
            return "prefill"
        return "decode" if self.step.input_ids.shape[1] == 1 else "chunk"

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
    """Yields prefills, a padded batch, a prompt and decode steps, then the long sequences; each with its own cache."""
    at = 0
    for length in options.prefill_lengths:
        yield _behind(f"prefill {length}", ids[at : at + length + 1], 0, length)
        at += length
    if options.padded_lengths:
        lengths, steps = options.padded_lengths, options.padded_steps
        yield from _padded(f"padded batch {'+'.join(map(str, lengths))}", ids[at:], lengths, steps)
        at += sum(lengths) + len(lengths) * sum(steps)
    if options.decode_steps:
        text = ids[at : at + options.decode_prompt + options.decode_steps + 1]
        yield _behind(f"prompt {options.decode_prompt}", text, 0, options.decode_prompt)
        for past in range(options.decode_prompt, options.decode_prompt + options.decode_steps):
            yield _behind(f"decode at {past}", text, past, 1)
        at += options.decode_prompt + options.decode_steps
    for sequence in options.sequences():
        past = 0
        for length in sequence:
            name = f"tokens {at + past} to {at + past + length} at {past}"
            yield _behind(name, ids[at : at + sum(sequence) + 1], past, length)
            past += length
        at += past


def _behind(name: str, text: IntArray, past: int, length: int) -> Case:
    """Returns the case of some tokens of a text, the tokens before them in the cache."""
    step = Step.after(past, text[past : past + length])
    return Case(name=name, step=step, labels=_following(text, past, past + length)[None])


def _following(ids: IntArray, start: int, stop: int) -> IntArray:
    """Returns the tokens behind those from `start` to `stop`."""
    found = np.full(stop - start, -1, np.int64)
    known = ids[start + 1 : stop + 1]
    found[: len(known)] = known
    return found


def _padded(name: str, ids: IntArray, lengths: tuple[int, ...], steps: tuple[int, ...]) -> Iterator[Case]:
    """Yields a batch padded on the left to its longest row, then steps behind its cache."""
    width, more = max(lengths), sum(steps)
    inputs = np.full((len(lengths), width + more), ids[0])
    mask, positions = np.zeros((2, *inputs.shape), np.int64)
    labels = np.full(inputs.shape, -1, np.int64)
    start = 0
    for row, length in enumerate(lengths):
        shown, stop = slice(width - length, None), start + length + more
        inputs[row, shown] = ids[start:stop]
        mask[row, shown] = 1
        positions[row, shown] = np.arange(length + more)
        labels[row, shown] = _following(ids, start, stop)
        start = stop
    past = 0
    for length in (width, *steps):
        end = past + length
        step = Step(input_ids=inputs[:, past:end], attention_mask=mask[:, :end], position_ids=positions[:, past:end])
        yield Case(name=f"{name}, {length} at {past}" if past else name, step=step, labels=labels[:, past:end])
        past = end
