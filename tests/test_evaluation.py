"""Perplexity against its definition, computed independently in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cli_fixtures import SIZES, passage, small_model, small_tokenizer

from pifa_deploy.calibration import HELD_OUT_TEXT, even_windows, token_ids
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.evaluation import perplexity


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return even_windows(token_ids(passage(HELD_OUT_TEXT, 4000), small_tokenizer()), 48, 7)


def by_definition(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean of -log softmax at the next token, each window on its own."""
    exact, losses = model.double(), []
    for window in windows:
        with torch.no_grad():
            logits = exact(input_ids=window[None]).logits[0].numpy()
        for position in range(len(window) - 1):
            row = logits[position] - logits[position].max()
            losses.append(np.log(np.exp(row).sum()) - row[window[position + 1]])
    return math.exp(np.mean(losses))


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
