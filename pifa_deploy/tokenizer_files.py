"""The files beside a model from which its tokenizer, chat template and end tokens are read."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_FILE,
)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Copies those of the named files that there are from one folder into another; returns their names."""
    found = tuple(name for name in names if (source / name).is_file())
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found
