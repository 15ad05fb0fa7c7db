"""Models held against each other on the same windows of the same texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pifa_deploy.calibration import check_vocabulary, read_texts, token_ids
from pifa_deploy.contenders import Entry, check_runnable, open_contender, tokenizer_place
from pifa_deploy.errors import InputRefusedError, StageFailedError
from pifa_deploy.evaluation import EvaluateOptions, Score, Window, evaluate, exp, finite, windows_of
from pifa_deploy.model_folder import load_tokenizer

Stage = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model on all texts.

    Attributes:
        name: what it is called.
        entry: the model.
        scores: label of the text -> score.
    """

    name: str
    entry: Entry
    scores: Mapping[str, Score]

    @property
    def tokens_per_second(self) -> float:
        """Tokens read a second of forward passes, without the very first one where there are more."""
        passes = [each for score in self.scores.values() for each in score.passes]
        tokens, seconds = zip(*(passes[1:] or passes), strict=True)
        return float(sum(tokens) / sum(seconds))

    def against(self, first: Row, label: str) -> dict[str, float | None]:
        """Returns how this row differs from another on one text, as JSON values."""
        difference = self.scores[label].minus(first.scores[label])
        return {
            "ratio": finite(exp(difference.mean_nll)),
            "nll_difference": finite(difference.mean_nll),
            "nll_difference_standard_error": finite(difference.standard_error),
        }


@dataclass(frozen=True, kw_only=True)
class EvaluateReport:
    """All rows; the first is what the others are held against.

    Attributes:
        texts: label -> file.
        options: what was asked for.
        rows: one per model, in the order asked for.
    """

    texts: Mapping[str, Path]
    options: EvaluateOptions
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON values, with the figures of every window."""
        return {
            "schema": 1,
            "artefact": "evaluation",
            "texts": {label: str(file) for label, file in self.texts.items()},
            "options": asdict(self.options),
            "rows": [self._row(row) for row in self.rows],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        texts = {label: score.to_json() | row.against(self.rows[0], label) for label, score in row.scores.items()}
        return {"name": row.name, **asdict(row.entry), "tokens_per_second": row.tokens_per_second, "texts": texts}


def evaluate_all(
    models: Mapping[str, str] | Sequence[str],
    texts: Mapping[str, Path],
    options: EvaluateOptions,
    *,
    stage: Stage = nullcontext,
) -> EvaluateReport:
    """Evaluates models one after the other; one at a time is in memory.

    Args:
        models: name -> place, or places, which are then their names too; see `open_contender`.
        texts: label -> UTF-8 file.
        options: see EvaluateOptions.
        stage: context manager that shows what is under way.

    Raises:
        ValueError: no model or no text.
        InputMissingError: a model or text is not there.
        InputRefusedError: one is malformed, has no tokenizer or no whole window, or models have tokenizers that make
            different tokens of a text.
        MissingCapabilityError: an engine folder, no such device, or no ONNX Runtime that runs the graph.
        StageFailedError: a model that gives NaN. There is no report then: with nulls in it, it would not be a failure
            to those who read it.
    """
    named = models if isinstance(models, Mapping) else {place: place for place in models}
    places = list(named.values())
    if not places or not texts:
        raise ValueError(f"{len(places)} models and {len(texts)} texts, expected at least one of each")
    # All that can be wrong with the last place before minutes go into the first one.
    for place in places:
        check_runnable(place, options.device)
    windows = _windows(places, texts, options)
    rows = []
    for name, place in named.items():
        with stage(f"evaluate {name}"):
            rows.append(_row(name, place, windows, options))
    return EvaluateReport(texts=texts, options=options, rows=tuple(rows))


def _windows(places: Sequence[str], texts: Mapping[str, Path], options: EvaluateOptions) -> dict[str, list[Window]]:
    """Returns the windows of each text, the same for all models."""
    contents = {label: read_texts([file]) for label, file in texts.items()}
    found: dict[str, torch.Tensor] = {}
    for place in places:
        tokenizer = load_tokenizer(tokenizer_place(place))
        for label, content in contents.items():
            ids = token_ids(content, tokenizer)
            if not torch.equal(found.setdefault(label, ids), ids):
                raise InputRefusedError(
                    f"{places[0]} and {place} make different tokens of {texts[label]}, {len(found[label])} and "
                    f"{len(ids)}: their perplexities cannot be compared; evaluate them one by one"
                )
    windows = {}
    for label, ids in found.items():
        try:
            windows[label] = windows_of(ids, options)
        except InputRefusedError as error:
            raise InputRefusedError(f"{texts[label]}: {error}") from None
    return windows


def _row(name: str, place: str, windows: Mapping[str, list[Window]], options: EvaluateOptions) -> Row:
    contender = open_contender(place, device=options.device)
    scores = {}
    for label, each in windows.items():
        if contender.vocabulary is not None:
            check_vocabulary(torch.cat([window.ids for window in each]), contender.vocabulary)
        try:
            scores[label] = evaluate(contender.logits, each, batch_size=options.batch_size)
        except StageFailedError as error:
            raise StageFailedError(f"{name} on {label}: {error}") from None
    return Row(name=name, entry=contender.entry, scores=scores)
