"""Polygraphy's Comparator takes our runners, and sees what is wrong with them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decoder_fixtures import SIZES, dense_decoder, export, factorised_decoder, plain_step, save_decoder

from pifa_deploy.errors import MissingCapabilityError
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.onnx_runner import OnnxRuntimeRunner
from pifa_deploy.polygraphy_runners import _runner_class, onnxruntime_runner, polygraphy_runner, prefill_feed
from pifa_deploy.torch_runner import TorchRunner

REASON = "Polygraphy is not installed: pip install 'pifa-deploy[rtx]'"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    pytest.importorskip("polygraphy", reason=REASON)
    folder = tmp_path_factory.mktemp("polygraphy")
    model, _ = factorised_decoder(dense_decoder())
    export(save_decoder(model, folder / "checkpoint"), folder / "onnx", dtype="fp32")
    return model, folder / "onnx"


@pytest.fixture(scope="module")
def feed(decoder: tuple[Any, Path]) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(2).integers(3, SIZES["vocab_size"], (2, 7))
    return prefill_feed(TorchRunner(decoder[0]), plain_step(ids))


def compared(runners: list[Any], feed: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """Returns the results of all runners and whether they agree."""
    from polygraphy.comparator import Comparator, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(runners, data_loader=[feed])
        return results, Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=1e-3, rtol=1e-3))


def test_the_comparator_finds_torch_and_onnx_runtime_equal(
    decoder: tuple[Any, Path], feed: dict[str, np.ndarray]
) -> None:
    model, folder = decoder
    runners = [
        polygraphy_runner(TorchRunner(model), name="torch"),
        onnxruntime_runner(open_folder(folder), threads=1),
        polygraphy_runner(OnnxRuntimeRunner(open_folder(folder), threads=1), name="ours"),
    ]
    results, verdict = compared(runners, feed)
    assert bool(verdict)
    names = {"logits", *(f"present.{i}.{part}" for i in range(2) for part in ("key", "value"))}
    for name in ("torch", "onnxruntime cpu", "ours"):
        (result,) = results[name]
        assert set(result.keys()) == names
        assert result["logits"].shape == (2, 7, SIZES["vocab_size"])
        assert 0 < result.runtime < 60


def test_the_comparator_sees_another_model(decoder: tuple[Any, Path], feed: dict[str, np.ndarray]) -> None:
    runners = [
        polygraphy_runner(TorchRunner(dense_decoder(seed=4)), name="other"),
        onnxruntime_runner(open_folder(decoder[1]), threads=1),
    ]
    assert not bool(compared(runners, feed)[1])


def test_a_step_behind_a_cache_is_the_whole_pass(decoder: tuple[Any, Path]) -> None:
    ids = np.random.default_rng(3).integers(3, SIZES["vocab_size"], (1, 6))
    torch_runner = TorchRunner(decoder[0])
    with polygraphy_runner(torch_runner, name="torch") as runner:
        whole = runner.infer(prefill_feed(torch_runner, plain_step(ids)))
        first = runner.infer(prefill_feed(torch_runner, plain_step(ids[:, :4])))
        step = plain_step(ids[:, 4:], 4)
        past = {name.replace("present", "past_key_values"): array for name, array in first.items() if name != "logits"}
        feed = {name: getattr(step, name) for name in ("input_ids", "attention_mask", "position_ids")}
        rest = runner.infer({**feed, **past})
    np.testing.assert_allclose(rest["logits"], whole["logits"][:, 4:], atol=1e-4)
    np.testing.assert_allclose(rest["present.1.key"], whole["present.1.key"], atol=1e-4)


def test_an_input_that_is_missing_is_named(decoder: tuple[Any, Path], feed: dict[str, np.ndarray]) -> None:
    from polygraphy.exception import PolygraphyException

    with (
        polygraphy_runner(TorchRunner(decoder[0]), name="torch") as runner,
        pytest.raises(PolygraphyException, match=re.escape("past_key_values.1.key")),
    ):
        runner.infer({name: array for name, array in feed.items() if name != "past_key_values.1.key"})


def test_without_polygraphy_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _runner_class.cache_clear()
    monkeypatch.setitem(sys.modules, "polygraphy.backend.base", None)
    with pytest.raises(MissingCapabilityError, match=re.escape("pip install 'pifa-deploy[rtx]'")):
        polygraphy_runner(TorchRunner(dense_decoder()), name="torch")
