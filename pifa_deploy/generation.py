"""Text generation through a runner: one step for the prompt, one for each token, text as soon as it is whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pifa_deploy.checkpoint import read_json_object
from pifa_deploy.decoder_step import IntArray, Runner, Step, StepLimits
from pifa_deploy.sampling import Choose, SamplingOptions, chooser
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
        stop: "end" (an end token), "length" (max_new_tokens), "cache" (the engine holds no more) or "positions" (the
            model was made for no more).
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
    """Returns the tokens [sequence] of a prompt; raises ValueError when there are none, or when it is no Unicode."""
    # What Python makes of a byte of the command line that is not UTF-8.
    strange = next((place for place, letter in enumerate(prompt) if "\ud800" <= letter <= "\udfff"), None)
    if strange is not None:
        raise ValueError(
            f"the prompt has {prompt[strange]!a} at character {strange}, expected Unicode; give it in UTF-8"
        )
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


def position_limit(folder: Path) -> int | None:
    """Returns how many positions the model in a folder was made for; None where its config.json does not say.

    `max_position_embeddings` counts as transformers takes it: with rotary scaling it is the extended number already,
    but "linear" and "dynamic" scaling stretch it, and configurations of "yarn" may still name the original one.
    """
    config = read_json_object(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    # transformers before 5 writes rope_scaling, and older ones "type" in it.
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind, factor = rotary.get("rope_type", rotary.get("type")), rotary.get("factor") or 1
    if kind in ("linear", "dynamic"):
        return int(positions * factor)
    original = rotary.get("original_max_position_embeddings") or positions
    return max(positions, int(original * factor)) if kind == "yarn" else positions


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
    positions: int | None = None,
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
        positions: that the model was made for, see `position_limit`; the text ends there. None: no limit.
        show: called with each piece of text.

    Raises:
        ValueError: the prompt holds no token, or more than the model has positions.
        MisfitError: the prompt does not fit into the engine.
        StageFailedError: logits that are not finite, see `chooser`.
    """
    ids = prompt_ids(tokenizer, prompt, chat=options.chat)
    if positions is not None and len(ids) > positions:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and the model was made for {positions} positions "
            "(max_position_embeddings); shorten it"
        )
    run = _Run(runner, chooser(options.sampling), limits or StepLimits(), positions=positions)
    stream, text = TextStream(tokenizer), list[str]()

    def emit(piece: str) -> None:
        if piece:
            text.append(piece)
            show(piece)

    for token in run.tokens(ids, ends=ends, most=options.max_new_tokens):
        emit(stream.push(token))
    emit(stream.flush())
    return run.generated(prompt, "".join(text))


class _Run:
    """The steps of one continuation, timed."""

    def __init__(self, runner: Runner, choose: Choose, limits: StepLimits, *, positions: int | None) -> None:
        self._runner, self._choose, self._limits, self._positions = runner, choose, limits, positions
        self._cache: Any = None
        self._past = self._prompt_tokens = self._decode_steps = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._produced: list[int] = []
        self._stop = "end"

    def tokens(self, ids: IntArray, *, ends: Collection[int], most: int) -> Iterator[int]:
        """Yields the tokens behind a prompt: at most `most`, without the one that ends the text."""
        token = self._read(ids)
        while token not in ends:
            self._produced.append(token)
            yield token
            if len(self._produced) == most:
                self._stop = "length"
                return
            if self._limits.past is not None and self._past > self._limits.past:
                self._stop = "cache"
                return
            if self._positions is not None and self._past >= self._positions:
                self._stop = "positions"
                return
            token = self._step(token)

    def generated(self, prompt: str, text: str) -> Generated:
        """Returns the result after the last token."""
        return Generated(
            prompt=prompt,
            text=text,
            token_ids=tuple(self._produced),
            prompt_tokens=self._prompt_tokens,
            stop=self._stop,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
            decode_steps=self._decode_steps,
        )

    def _read(self, ids: IntArray) -> int:
        """Reads the prompt, as much a step as the runner takes; returns the first token behind it."""
        started = time.perf_counter()
        part = self._limits.tokens or len(ids)
        for start in range(0, len(ids), part):
            logits, self._cache = self._runner.step(Step.after(start, ids[start : start + part]), self._cache)
        token = self._choose(logits[0, -1])
        self._past = self._prompt_tokens = len(ids)
        self._prefill_seconds = time.perf_counter() - started
        return token

    def _step(self, token: int) -> int:
        started = time.perf_counter()
        logits, self._cache = self._runner.step(Step.after(self._past, np.array([token], np.int64)), self._cache)
        following = self._choose(logits[0, -1])
        self._decode_seconds += time.perf_counter() - started
        self._past, self._decode_steps = self._past + 1, self._decode_steps + 1
        return following
