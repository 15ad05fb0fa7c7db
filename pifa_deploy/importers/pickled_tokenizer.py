"""Tokenizer files out of a pickled tokenizer, as far as its state is plain data."""

from __future__ import annotations

import json
from typing import Any

import torch

from pifa_deploy.importers.restricted_pickle import InertRecord

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SETTINGS = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "chat_template")
_HIDDEN_SETTINGS = ("add_bos_token", "add_eos_token")
_MAX_DEPTH = 16
_MAX_ITEMS = 100_000
_ITEM_CHARACTERS = 64


class PlainCopier:
    """Copies plain values and counts what it visits: shared lists in lists grow exponentially when written out."""

    def __init__(self) -> None:
        """Starts counting."""
        self._visited = 0

    def plain(self, value: Any, depth: int = 0) -> Any:
        """Returns a JSON value equal to `value`; tuples and sets become lists, a dtype its name.

        Raises:
            TypeError: it holds anything else, is nested deeper or, with all values copied before and shared
                parts counted each time, has more items than any configuration.
        """
        if depth > _MAX_DEPTH:
            raise TypeError(f"nested more than {_MAX_DEPTH} deep")
        self._visit(value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.plain(item, depth + 1) for item in value]
        if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
            return {self.plain(key, depth + 1): self.plain(item, depth + 1) for key, item in value.items()}
        raise TypeError(f"found {value.origin if isinstance(value, InertRecord) else type(value).__name__}")

    def _visit(self, value: Any) -> None:
        # A long text counts by its length: it too is written as often as it is referred to.
        self._visited += 1 + (len(value) // _ITEM_CHARACTERS if isinstance(value, str) else 0)
        if self._visited > _MAX_ITEMS:
            raise TypeError(f"more than {_MAX_ITEMS} items when its shared parts are written out")


def tokenizer_files(tokenizer: Any, notes: list[str]) -> dict[str, bytes]:
    """Returns the files that rebuild a pickled tokenizer, name -> content; none if it cannot be had.

    A fast tokenizer carries its `tokenizer.json`, a slow SentencePiece one its `tokenizer.model`.

    Args:
        tokenizer: what the file holds under "tokenizer".
        notes: gets a line when no tokenizer, or only part of one, came along.
    """
    state = tokenizer.attributes if isinstance(tokenizer, InertRecord) else {}
    backend, sentencepiece = state.get("_tokenizer"), state.get("sp_model_proto")
    files: dict[str, bytes] = {}
    kind = "PreTrainedTokenizerFast"
    if isinstance(backend, InertRecord) and backend.origin.startswith("tokenizers.") and _is_json(backend.state):
        files["tokenizer.json"] = backend.state
    elif isinstance(sentencepiece, bytes) and isinstance(tokenizer, InertRecord):
        files["tokenizer.model"] = sentencepiece
        kind = tokenizer.origin.rpartition(".")[2]
        notes.append(f"the tokenizer came along as a SentencePiece model; {kind} needs sentencepiece to read it")
    else:
        notes.append("no tokenizer came along; copy the tokenizer files of the original model into the folder")
        return {}
    settings = {"tokenizer_class": kind, **_settings(state)}
    files["tokenizer_config.json"] = (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
    return files


def _is_json(data: Any) -> bool:
    if not isinstance(data, bytes):
        return False
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


def _settings(state: dict[Any, Any]) -> dict[str, Any]:
    """Returns special tokens and options; transformers before 4.47 kept the tokens in `_bos_token` and so on."""
    kept = state.get("_special_tokens_map")
    tokens = kept if isinstance(kept, dict) else {name: state.get(f"_{name}") for name in _SPECIAL_TOKENS}
    settings: dict[str, Any] = {}
    for name in _SPECIAL_TOKENS:
        token = tokens.get(name)
        text = token.attributes.get("content") if isinstance(token, InertRecord) else token
        if isinstance(text, str):
            settings[name] = text
    for name, key in [*((name, name) for name in _SETTINGS), *((name, f"_{name}") for name in _HIDDEN_SETTINGS)]:
        value = state.get(key)
        if isinstance(value, (bool, int, str)):
            settings[name] = value
    return settings
