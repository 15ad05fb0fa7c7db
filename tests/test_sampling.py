"""Tokens are drawn with the probabilities that transformers' processors give."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pifa_deploy.errors import StageFailedError
from pifa_deploy.sampling import SamplingOptions, chooser, probabilities

LOGITS = np.random.default_rng(8).normal(0, 3, 67).astype(np.float32)


def reference(logits: np.ndarray, options: SamplingOptions) -> np.ndarray:
    processors: list[Any] = [TemperatureLogitsWarper(options.temperature)]
    processors += [TopKLogitsWarper(options.top_k)] if options.top_k else []
    processors += [TopPLogitsWarper(options.top_p)] if options.top_p < 1 else []
    scores = LogitsProcessorList(processors)(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits)[None])
    return scores.double().softmax(-1)[0].numpy()


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 12, 67, 100])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    found, expected = probabilities(LOGITS, options), reference(LOGITS, options)
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)
    assert found.sum() == pytest.approx(1)


def test_tokens_as_likely_as_the_last_one_of_top_k_stay() -> None:
    logits = np.array([1, 3, 2, 2, 0], np.float32)
    assert (probabilities(logits, SamplingOptions(temperature=1, top_k=2)) > 0).tolist() == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_temperature_0_takes_the_likeliest() -> None:
    choose = chooser(SamplingOptions())
    assert {choose(LOGITS) for _ in range(5)} == {int(np.argmax(LOGITS))}


def test_draws_follow_the_probabilities() -> None:
    options = SamplingOptions(temperature=1.5, top_k=4, seed=1)
    choose, expected = chooser(options), probabilities(LOGITS, options)
    drawn = Counter(choose(LOGITS) for _ in range(4000))
    assert set(drawn) == set(np.flatnonzero(expected))
    for token, count in drawn.items():  # five standard deviations of a binomial count
        chance = expected[token]
        assert abs(count - 4000 * chance) < 5 * (4000 * chance * (1 - chance)) ** 0.5


def test_a_seed_draws_the_same_tokens_again() -> None:
    draws = [
        [chooser_(LOGITS) for _ in range(20)]
        for chooser_ in (chooser(SamplingOptions(temperature=3, seed=seed)) for seed in (7, 7, 8))
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("top_p", [1.0, 0.5])
@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-300])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float, top_k: int, top_p: float) -> None:
    found = probabilities(LOGITS, SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p))
    assert found.tolist() == [float(place == np.argmax(LOGITS)) for place in range(len(LOGITS))]


def test_a_token_that_the_model_rules_out_is_never_drawn() -> None:
    logits = np.array([1, -np.inf, 1], np.float32)
    assert probabilities(logits, SamplingOptions(temperature=1)).tolist() == [0.5, 0, 0.5]
    assert chooser(SamplingOptions())(logits) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bad", "told"),
    [([np.nan], "1 NaN and 0 inf"), ([np.inf], "0 NaN and 1 inf"), ([-np.inf] * 67, "67 infinite of 67")],
)
def test_logits_without_a_likeliest_token_fail(temperature: float, bad: list[float], told: str) -> None:
    logits = LOGITS.copy()
    logits[-len(bad) :] = bad
    with pytest.raises(StageFailedError, match=f"{told}.* logits, so that no token is the likeliest"):
        chooser(SamplingOptions(temperature=temperature))(logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1, expected 0"),
        ({"temperature": float("nan")}, "temperature is nan, expected 0"),
        ({"temperature": 1, "top_k": -1}, "top_k is -1, expected 0"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0, expected a probability above 0"),
        ({"temperature": 1, "top_p": 1.5}, "top_p is 1.5, expected a probability above 0"),
        ({"temperature": 1, "seed": -2}, "seed is -2, expected 0 or more"),
        ({"top_k": 5}, "with temperature 0, which takes the likeliest token; give a temperature"),
        ({"seed": 5}, "with temperature 0, which takes the likeliest token; give a temperature"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)
