"""Text generation through a runner: one step for the prompt, one for each token, text as soon as it is whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pifa_deploy.checkpoint import read_json_object
from pifa_deploy.decoder_step import FloatArray, IntArray, Runner, Step, StepLimits
from pifa_deploy.sampling import SamplingOptions, chooser
from pifa_deploy.tokenizer_files import CONFIG_FILE, GENERATION_FILE

_BROKEN = "\ufffd"  # what a decoder makes of bytes that are no character, or not yet


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How a text is continued.

    Attributes:
        max_new_tokens: at most this many tokens.
        chat: send the prompt as one user message where the tokenizer has a chat template; else continue it.
        sampling: how each token is chosen.
    """

    max_new_tokens: int = 64
    chat: bool = True
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        """Raises ValueError for fewer tokens than one."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A continuation.

    Attributes:
        prompt: as given.
        text: of the new tokens, special ones left out.
        token_ids: the new tokens, without the one that ended the text.
        prompt_tokens: tokens of the prompt, chat template included.
        stop: "end" (an end token), "length" (max_new_tokens) or "cache" (the engine holds no more).
        prefill_seconds: of the steps that read the prompt, up to the first token.
        decode_seconds: of all later steps.
        decode_steps: their number.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    stop: str
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of the prompt read in a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens made in a second after the first one; None when there were none."""
        return self.decode_steps / self.decode_seconds if self.decode_steps else None

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object."""
        rates = {
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }
        return {"artefact": "generate", "schema": 1, **asdict(self), **rates, "token_ids": list(self.token_ids)}


class TextStream:
    """Turns tokens into text piece by piece, holding back bytes until they make a character."""

    def __init__(self, tokenizer: Any) -> None:
        """Takes the tokenizer of the model."""
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """Returns the text that a token makes whole, "" while a character lacks bytes."""
        self._tokens.append(token)
        text = self._text()
        return "" if text.endswith(_BROKEN) else self._rest(text)

    def flush(self) -> str:
        """Returns what was held back, bytes that make no character included."""
        return self._rest(self._text())

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return text

    def _rest(self, text: str) -> str:
        piece, self._shown = text[len(self._shown) :], text
        return piece


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool) -> IntArray:
    """Returns the tokens [sequence] of a prompt; raises ValueError when there are none."""
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = np.array(tokenizer(prompt, add_special_tokens=False).input_ids, np.int64)
    if not len(ids):
        raise ValueError(f"the prompt {prompt!r} holds no token; give some text")
    return ids


def end_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Returns the tokens that end a text: generation_config.json's, else config.json's, and the tokenizer's own."""
    found: set[int] = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in (GENERATION_FILE, CONFIG_FILE):
        named = read_json_object(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        if named is not None:
            return frozenset(found | {int(token) for token in (named if isinstance(named, list) else [named])})
    return frozenset(found)


def generate(runner: Runner, tokenizer: Any, prompt: str, *, max_new_tokens: int = 48, chat: bool = True) -> str:
    """Returns the greedy continuation of a prompt, ended by the tokenizer's end token; see `generate_text`."""
    options = GenerateOptions(max_new_tokens=max_new_tokens, chat=chat)
    ends = {tokenizer.eos_token_id}
    return generate_text(runner, tokenizer, prompt, options=options, ends=ends).text.strip()


def generate_text(
    runner: Runner,
    tokenizer: Any,
    prompt: str,
    *,
    options: GenerateOptions,
    ends: Collection[int],
    limits: StepLimits | None = None,
    show: Callable[[str], object] = lambda piece: None,
) -> Generated:
    """Continues a prompt.

    Args:
        runner: answers decoder steps.
        tokenizer: of the same model.
        prompt: plain text.
        options: how much, and how tokens are chosen.
        ends: tokens that end the text; see `end_tokens`.
        limits: what the runner takes at most; a longer prompt is read in parts.
        show: called with each piece of text.

    Raises:
        ValueError: the prompt holds no token.
        MisfitError: the prompt does not fit into the engine.
    """
    ids = prompt_ids(tokenizer, prompt, chat=options.chat)
    choose, limits = chooser(options.sampling), limits or StepLimits()
    stream, produced, text = TextStream(tokenizer), list[int](), list[str]()

    def emit(piece: str) -> None:
        if piece:
            text.append(piece)
            show(piece)

    started = time.perf_counter()
    logits, cache, past = _read(runner, ids, limits.tokens)
    token = choose(logits)
    prefill_seconds, decode_seconds, steps, stop = time.perf_counter() - started, 0.0, 0, "end"
    while token not in ends:
        produced.append(token)
        emit(stream.push(token))
        if len(produced) == options.max_new_tokens:
            stop = "length"
            break
        if limits.past is not None and past > limits.past:
            stop = "cache"
            break
        started = time.perf_counter()
        found, cache = runner.step(Step.after(past, np.array([token], np.int64)), cache)
        token = choose(found[0, -1])
        decode_seconds += time.perf_counter() - started
        past, steps = past + 1, steps + 1
    emit(stream.flush())
    return Generated(
        prompt=prompt,
        text="".join(text),
        token_ids=tuple(produced),
        prompt_tokens=len(ids),
        stop=stop,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        decode_steps=steps,
    )


def _read(runner: Runner, ids: IntArray, most: int | None) -> tuple[FloatArray, Any, int]:
    """Reads a prompt, at most `most` tokens a step; returns the last logits, the cache and its length."""
    cache, part = None, most or len(ids)
    for start in range(0, len(ids), part):
        logits, cache = runner.step(Step.after(start, ids[start : start + part]), cache)
    return logits[0, -1], cache, len(ids)
