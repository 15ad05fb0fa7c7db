"""Perplexity against its definition, computed independently in float64."""

from __future__ import annotations

import json
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import SIZES, passage, small_model, small_tokenizer

from pifa_deploy.calibration import HELD_OUT_TEXT, even_windows, token_ids
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.evaluation import (
    EvaluateOptions,
    Score,
    Window,
    evaluate,
    perplexity,
    torch_logits,
    windows_of,
)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return token_ids(passage(HELD_OUT_TEXT, 4000), small_tokenizer())


@pytest.fixture(scope="module")
def windows(ids: torch.Tensor) -> torch.Tensor:
    return even_windows(ids, 48, 7)


def token_losses(exact: Any, window: torch.Tensor) -> list[float]:
    """-log softmax at each next token of one window, in float64."""
    losses = []
    with torch.no_grad():
        logits = exact(input_ids=window[None]).logits[0].numpy()
    for position in range(len(window) - 1):
        row = logits[position] - logits[position].max()
        losses.append(float(np.log(np.exp(row).sum()) - row[window[position + 1]]))
    return losses


def by_definition(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean of all token losses, each window on its own."""
    exact = model.double()
    return math.exp(np.mean([loss for window in windows for loss in token_losses(exact, window)]))


def by_the_guide(model: Any, ids: torch.Tensor, context: int, stride: int) -> list[list[float]]:
    """Token losses per window, by the loop of Hugging Face's guide: label -100 hides what was scored before."""
    exact, found, end_before = model.double(), [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        labels = ids[begin:end].clone()
        labels[: len(labels) - (end - end_before)] = -100
        losses = token_losses(exact, ids[begin:end])
        found.append([loss for loss, label in zip(losses, labels[1:].tolist(), strict=True) if label != -100])
        end_before = end
        if end == len(ids):
            return found
    raise AssertionError("the last window ends with the text")


# A float32 logit of size L is off by about eps * L, grown by the layers; perplexity turns that into a relative error.
FLOAT32 = 1e-4


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_perplexity_is_what_its_definition_says(windows: torch.Tensor, batch_size: int) -> None:
    found = perplexity(small_model(), windows, batch_size=batch_size)
    assert found == pytest.approx(by_definition(small_model(), windows), rel=FLOAT32)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(windows: torch.Tensor) -> None:
    model = small_model()
    model.lm_head.weight.data.zero_()
    assert perplexity(model, windows) == pytest.approx(SIZES["vocab_size"], rel=1e-6)


def test_evaluating_changes_nothing(windows: torch.Tensor) -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert perplexity(model, windows) == perplexity(model, windows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tokens_of_another_model_are_refused() -> None:
    with pytest.raises(InputRefusedError, match="token 384"):
        perplexity(small_model(), torch.tensor([[1, 384, 2]]))


def test_the_held_out_text_must_fill_one_window() -> None:
    with pytest.raises(InputRefusedError, match="one window needs 512"):
        even_windows(token_ids("Captain Wentworth", small_tokenizer()), 512, 20)


# Windows


@pytest.mark.parametrize("stride", [None, 48])
def test_windows_that_do_not_overlap_are_spread_evenly_and_score_all_but_their_first_token(
    ids: torch.Tensor, stride: int | None
) -> None:
    found = windows_of(ids, EvaluateOptions(context=48, stride=stride, max_windows=7))
    assert torch.equal(torch.stack([window.ids for window in found]), even_windows(ids, 48, 7))
    assert [window.scored for window in found] == [47] * 7
    assert len(windows_of(ids, EvaluateOptions(context=48, stride=stride))) == 20


@pytest.mark.parametrize(("length", "context", "stride"), [(150, 32, 8), (100, 32, 31), (41, 16, 1), (64, 32, 16)])
def test_overlapping_windows_score_what_the_guide_scores(
    ids: torch.Tensor, length: int, context: int, stride: int
) -> None:
    text = ids[:length]
    found = windows_of(text, EvaluateOptions(context=context, stride=stride))
    expected = by_the_guide(small_model(), text, context, stride)
    score = evaluate(torch_logits(small_model()), found, batch_size=3)
    assert score.tokens == tuple(map(len, expected))
    assert sum(score.tokens) == length - 1  # every token once, but the first one
    np.testing.assert_allclose(score.nll, list(map(sum, expected)), rtol=FLOAT32)
    assert score.perplexity == pytest.approx(math.exp(np.concatenate(expected).mean()), rel=FLOAT32)


def test_at_most_so_many_overlapping_windows_are_the_first_ones(ids: torch.Tensor) -> None:
    every = windows_of(ids, EvaluateOptions(context=32, stride=8))
    some = windows_of(ids, EvaluateOptions(context=32, stride=8, max_windows=5))
    assert len(every) > 20
    assert [window.scored for window in some] == [31, 8, 8, 8, 8]
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(some, every, strict=False))


def test_a_text_of_exactly_one_window_has_one_and_a_shorter_one_is_refused(ids: torch.Tensor) -> None:
    for stride in (None, 8):
        options = EvaluateOptions(context=32, stride=stride)
        assert [window.scored for window in windows_of(ids[:32], options)] == [31]
        with pytest.raises(InputRefusedError, match="the text has 31 tokens, one window needs 32"):
            windows_of(ids[:31], options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "all windows of 1 tokens, expected at least 1 of at least 2"),
        ({"max_windows": 0}, "0 windows of 512 tokens"),
        ({"stride": 0}, "stride is 0, expected 1 <= stride <= context, which is 512"),
        ({"stride": -3}, "stride is -3"),
        ({"context": 64, "stride": 65}, "stride is 65, expected 1 <= stride <= context, which is 64"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"device": "tpu"}, "device is 'tpu', expected one of cpu, cuda"),
    ],
)
def test_options_that_no_evaluation_can_have_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateOptions(**options)


# One batch at a time


class Recorder:
    """Answers with random logits and remembers the batches; asserts that earlier logits are gone by then."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.shapes: list[tuple[int, ...]] = []
        self.given: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        assert [ref for ref in self.given if ref() is not None] == []
        self.shapes.append(tuple(ids.shape))
        logits = torch.randn(*ids.shape, 384, generator=torch.Generator().manual_seed(len(self.shapes))).to(self.dtype)
        self.given.append(weakref.ref(logits))
        return logits


def test_the_logits_of_one_batch_are_held_at_a_time_and_batches_have_one_length(ids: torch.Tensor) -> None:
    recorder = Recorder()
    found = windows_of(ids[:110], EvaluateOptions(context=32, stride=12))
    assert [len(window.ids) for window in found] == [32] * 7 + [26]
    score = evaluate(recorder, found, batch_size=3)
    assert recorder.shapes == [(3, 32), (3, 32), (1, 32), (1, 26)]
    assert [tokens for tokens, _ in score.passes] == [96, 96, 32, 26]
    assert all(seconds >= 0 for _, seconds in score.passes)


def test_half_precision_logits_are_summed_up_in_full_precision(ids: torch.Tensor) -> None:
    # 300 positions: more than one block of them.
    window = Window(ids=ids[:300], scored=299)
    half, full = Recorder(torch.float16), Recorder(torch.float16)
    found = evaluate(half, [window]).nll[0]
    exact = torch.log_softmax(full(ids[None, :300])[0, :-1].double(), -1)
    assert found == pytest.approx(-float(exact.gather(1, ids[1:300, None]).sum()), rel=1e-6)


# How sure


def score_of(nll: Any, tokens: Any) -> Score:
    return Score(nll=tuple(map(float, nll)), tokens=tuple(map(int, tokens)), passes=((1, 1.0),))


def test_the_standard_error_of_equal_windows_is_that_of_a_mean() -> None:
    means = np.random.default_rng(0).normal(3, 0.5, 12)
    score = score_of(means * 47, [47] * 12)
    assert score.mean_nll == pytest.approx(means.mean())
    assert score.standard_error == pytest.approx(means.std(ddof=1) / 12**0.5)


def test_the_standard_error_of_unequal_windows_is_that_of_the_jackknife() -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(10, 60, 2000)
    nll = tokens * rng.normal(3, 0.5, 2000)
    without = (nll.sum() - nll) / (tokens.sum() - tokens)
    jackknife = (1999 / 2000 * ((without - without.mean()) ** 2).sum()) ** 0.5
    assert score_of(nll, tokens).standard_error == pytest.approx(jackknife, rel=0.01)


def test_a_difference_is_paired_by_window_and_can_be_told_from_the_json() -> None:
    rng = np.random.default_rng(2)
    hard, tokens = rng.normal(3, 1.0, 30), np.full(30, 100)
    first = score_of(hard * tokens, tokens)
    second = score_of((hard + rng.normal(0.02, 0.01, 30)) * tokens, tokens)
    found = second.minus(first)
    a, b = (np.array(score.to_json()["window_nll"]) for score in (first, second))
    assert found.mean_nll == pytest.approx((b - a).mean())
    assert found.standard_error == pytest.approx((b - a).std(ddof=1) / 30**0.5)
    # The windows differ a hundred times as much as the models: unpaired, nothing could be told.
    assert found.mean_nll > 5 * found.standard_error
    assert found.mean_nll < first.standard_error


def test_a_model_does_not_differ_from_itself_and_not_from_one_on_other_windows() -> None:
    score = score_of([10, 20, 33], [5, 9, 12])
    assert (score.minus(score).mean_nll, score.minus(score).standard_error) == (0, 0)
    with pytest.raises(ValueError, match="scores of 3 and 2 windows, expected the same windows"):
        score.minus(score_of([10, 20], [5, 9]))


def test_one_window_says_nothing_about_how_sure_it_is() -> None:
    score = score_of([10], [5])
    assert score.standard_error is None
    assert score.minus(score).standard_error is None


@pytest.mark.parametrize(("nll", "shown"), [(5e6, math.inf), (math.inf, math.inf), (math.nan, math.nan)])
def test_a_broken_model_has_figures_that_json_can_hold(nll: float, shown: float) -> None:
    score = score_of([nll, 20.0], [5, 5])
    assert score.perplexity == pytest.approx(shown, nan_ok=True)
    figures = score.to_json()
    assert figures["perplexity"] is None
    json.dumps(figures, allow_nan=False)
