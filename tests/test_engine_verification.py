"""verify on engines: which engine belongs to which ONNX folder, and what can be asked of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_fixtures import Outcome

from pifa_deploy.errors import ExitCode
from pifa_deploy.logit_cases import cases
from pifa_deploy.verification import VerifyOptions

pytest_plugins = ("cli_plugin",)


def test_an_engine_of_another_onnx_folder_is_refused_before_the_machine_is_asked(
    engine_folder: Path, onnx_folder: Path, checkpoint: Path, tmp_path: Path, pifa_deploy: Callable[..., Outcome]
) -> None:
    other = shutil.copytree(onnx_folder, tmp_path / "other")
    with (other / "model.onnx.data").open("ab") as data:
        data.write(b"x")
    outcome = pifa_deploy("verify", other, "--reference", checkpoint, "--engine", engine_folder)
    outcome.failed(
        ExitCode.INPUT_REFUSED, r"engine: was built from a model\.onnx\.data with hash \w{12}…, .*\.data has another"
    )


def test_an_engine_without_a_gpu_is_not_decided(
    engine_folder: Path, onnx_folder: Path, checkpoint: Path, pifa_deploy: Callable[..., Outcome]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    pifa_deploy("verify", onnx_folder, "--reference", checkpoint, "--engine", engine_folder).failed(
        ExitCode.NOT_DECIDED, r"GPU"
    )


def test_lengths_that_an_engine_was_not_built_for_are_left_out_or_cut() -> None:
    options = VerifyOptions(prefill_lengths=(1, 17, 128), padded_lengths=(5, 9), decode_prompt=64, decode_steps=32)
    assert options.within(batch=2, tokens=16, past=32) == {
        "prefill_lengths": (1,),
        "padded_lengths": (5, 9),
        "decode_prompt": 16,
        "decode_steps": 17,
        "window": 16,
    }
    assert options.within(batch=1, tokens=512, past=512) == {
        "prefill_lengths": (1, 17, 128),
        "padded_lengths": (),
        "decode_prompt": 64,
        "decode_steps": 32,
        "window": 512,
    }
    for step in cases(np.arange(4000), replace(options, **options.within(batch=2, tokens=16, past=32))):
        assert step.step.input_ids.shape[1] <= 16
        assert step.step.attention_mask.shape[1] <= 16 + 32
        assert step.step.past <= 32


def test_a_plugin_without_an_engine_is_wrong_usage() -> None:
    with pytest.raises(ValueError, match=r"plugin_library is p\.so without an engine"):
        VerifyOptions(plugin_library=Path("p.so"))
