"""Text to batches of tokens, for calibration and evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from pifa_deploy.errors import InputMissingError, InputRefusedError, MissingCapabilityError, first_line

CALIBRATION_TEXT = "emma.txt"
HELD_OUT_TEXT = "persuasion.txt"
OTHER_DOMAIN_TEXT = "genesis.txt"
MIXTURE = "mixture"
MIXTURE_TEXTS = ("prose", "documentation", "code", "dialogue", "expository")
DATASETS_PREFIX = "datasets:"


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """Which windows of a text calibrate a model.

    Attributes:
        samples: number of windows.
        sequence_length: tokens a window.
        seed: of the random window starts.
    """

    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError unless there is at least one window of two tokens."""
        if self.samples < 1 or self.sequence_length < 2:
            raise ValueError(
                f"samples is {self.samples} and sequence_length {self.sequence_length}, expected at least 1 and 2"
            )


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Calibration tokens and where they come from.

    Attributes:
        windows: int64 [samples, sequence_length].
        record: JSON values for the manifest: of each source its name, SHA-256, tokens and window starts.
    """

    windows: torch.Tensor
    record: tuple[Mapping[str, Any], ...]


def calibration_set(sources: Sequence[str | Path], tokenizer: Any, options: CalibrationOptions) -> CalibrationSet:
    """Returns random windows, the same number from each source as far as that goes.

    Args:
        sources: each a UTF-8 file, a folder (its .txt and .md files, by name), "datasets:NAME" with optional
            ":CONFIG" and ":SPLIT" (column "text"), or "mixture" for the texts that ship with the package.
        tokenizer: of the model.
        options: how many windows, and the seed of their places.

    Raises:
        InputMissingError, InputRefusedError: see `source_texts`; a source shorter than one window.
        ValueError: fewer windows than sources.
    """
    texts = [part for source in sources for part in source_texts(source)]
    if options.samples < len(texts):
        raise ValueError(
            f"samples is {options.samples} for {len(texts)} calibration sources; expected at least one window each"
        )
    generator = torch.Generator().manual_seed(options.seed)
    windows, record = [], []
    for number, (name, text) in enumerate(texts):
        ids = token_ids(text, tokenizer)
        try:
            last = _last_start(ids, options.sequence_length)
        except InputRefusedError as error:
            raise InputRefusedError(f"{name}: {error}") from None
        count = options.samples // len(texts) + (number < options.samples % len(texts))
        starts = torch.randint(0, last + 1, (count,), generator=generator).tolist()
        windows += [ids[start : start + options.sequence_length] for start in starts]
        digest = hashlib.sha256(text.encode()).hexdigest()
        record.append({"name": name, "sha256": digest, "tokens": len(ids), "windows": starts})
    return CalibrationSet(windows=torch.stack(windows), record=tuple(record))


def source_texts(source: str | Path) -> list[tuple[str, str]]:
    """Returns (name, text) of the texts that a calibration source stands for; see `calibration_set`.

    A folder and a data set are one text, the mixture is one for each kind.

    Raises:
        InputMissingError: no such file or data set.
        InputRefusedError: not UTF-8, empty, or a folder without text files.
        MissingCapabilityError: a data set without the `datasets` package.
    """
    if str(source) == MIXTURE:
        return [(f"{MIXTURE}/{name}", read_texts([packaged_text(f"{MIXTURE}/{name}.txt")])) for name in MIXTURE_TEXTS]
    if str(source).startswith(DATASETS_PREFIX):
        return [(str(source), _dataset_text(str(source)))]
    path = Path(source)
    if not path.is_dir():
        return [(path.name, read_texts([path]))]
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md") and file.is_file())
    if not files:
        raise InputRefusedError(f"{path}: has no .txt or .md files; give a folder of UTF-8 text")
    # "." has no name of its own.
    return [(path.resolve().name, read_texts(files))]


def _dataset_text(source: str) -> str:
    name, config, split = [*source.removeprefix(DATASETS_PREFIX).split(":"), "", ""][:3]
    try:
        import datasets
    except ImportError:
        raise MissingCapabilityError(f"{source} needs the package datasets; pip install datasets") from None
    try:
        found = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:
        raise InputMissingError(f"{source}: could not be loaded ({first_line(error)}); check name and split") from error
    if "text" not in (found.column_names or ()):
        raise InputRefusedError(f"{source}: has the columns {found.column_names}, expected one named text")
    # WikiText and its like have one line a row.
    text = "\n".join(found["text"])
    if not text.strip():
        raise InputRefusedError(f"{source}: is empty; give a split with text")
    return text


def packaged_text(name: str) -> Path:
    """Returns the path of a text that ships with the package (texts/SOURCES.md)."""
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
