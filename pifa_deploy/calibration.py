"""Text to batches of tokens, for calibration and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from pifa_deploy.errors import InputMissingError, InputRefusedError

CALIBRATION_TEXT = "emma.txt"
HELD_OUT_TEXT = "persuasion.txt"


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Which windows of a text calibrate a model.

    Attributes:
        samples: number of windows.
        sequence_length: tokens a window.
        seed: of the random window starts.
    """

    samples: int = 64
    sequence_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError unless there is at least one window of two tokens."""
        if self.samples < 1 or self.sequence_length < 2:
            raise ValueError(
                f"samples is {self.samples} and sequence_length {self.sequence_length}, expected at least 1 and 2"
            )


def packaged_text(name: str) -> Path:
    """Returns the path of a public-domain text that ships with the package (texts/SOURCES.md)."""
    return Path(str(files("pifa_deploy") / "texts" / name))


def read_texts(paths: Sequence[Path | str]) -> str:
    """Returns UTF-8 files joined by an empty line.

    Raises:
        InputMissingError: no such file.
        InputRefusedError: not UTF-8, or empty.
    """
    parts = []
    for path in map(Path, paths):
        if not path.is_file():
            raise InputMissingError(f"{path}: no such text file; give a UTF-8 file")
        try:
            parts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise InputRefusedError(f"{path}: not UTF-8 at byte {error.start}; convert the text to UTF-8") from None
        if not parts[-1].strip():
            raise InputRefusedError(f"{path}: is empty; give a text of at least one window")
    return "\n\n".join(parts)


def token_ids(text: str, tokenizer: Any) -> torch.Tensor:
    """Returns the tokens of a text, int64 [tokens], without special tokens."""
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    return ids


def random_windows(ids: torch.Tensor, options: CalibrationOptions) -> torch.Tensor:
    """Returns windows at random places, int64 [samples, sequence_length].

    Raises:
        InputRefusedError: the text is shorter than one window.
    """
    last = _last_start(ids, options.sequence_length)
    generator = torch.Generator().manual_seed(options.seed)
    starts = torch.randint(0, last + 1, (options.samples,), generator=generator)
    return torch.stack([ids[start : start + options.sequence_length] for start in starts.tolist()])


def even_windows(ids: torch.Tensor, sequence_length: int, count: int) -> torch.Tensor:
    """Returns at most `count` windows spread evenly over the text, without overlap, int64 [windows, sequence_length].

    Raises:
        ValueError: no window, or windows of fewer than two tokens.
        InputRefusedError: the text is shorter than one window.
    """
    if count < 1 or sequence_length < 2:
        raise ValueError(f"{count} windows of {sequence_length} tokens, expected at least 1 of at least 2")
    last = _last_start(ids, sequence_length)
    count = min(count, len(ids) // sequence_length)
    # In integers: rounded floats can come one token closer than a window is long.
    starts = [number * last // (count - 1) for number in range(count)] if count > 1 else [0]
    return torch.stack([ids[start : start + sequence_length] for start in starts])


def check_vocabulary(windows: torch.Tensor, size: int) -> None:
    """Raises InputRefusedError when a window holds a token that a model with `size` embeddings does not know."""
    largest = int(windows.max())
    if largest >= size:
        raise InputRefusedError(
            f"the tokenizer made token {largest} of the text, the model knows 0 .. {size - 1}; "
            "give the model its own tokenizer"
        )


def _last_start(ids: torch.Tensor, sequence_length: int) -> int:
    if len(ids) < sequence_length:
        raise InputRefusedError(
            f"the text has {len(ids)} tokens, one window needs {sequence_length}; give more text or shorter windows"
        )
    return len(ids) - sequence_length
