"""Artefacts of a small model, made once, and the command line in this process. Do not change them, copy them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_fixtures import Outcome, passage, save_dense

from pifa_deploy.calibration import HELD_OUT_TEXT
from pifa_deploy.cli.main import run


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("small") / "dense")


@pytest.fixture(scope="session")
def checkpoint(dense: Path) -> Path:
    from pifa_deploy.compression import CompressOptions, compress_model

    compress_model(dense, dense.parent / "pifa", CompressOptions(density=0.5, method="svd"))
    return dense.parent / "pifa"


@pytest.fixture(scope="session")
def onnx_folder(checkpoint: Path) -> Path:
    from pifa_deploy.onnx_export import ExportOptions, export_checkpoint

    export_checkpoint(checkpoint, checkpoint.parent / "onnx", ExportOptions(dtype="fp32"))
    return checkpoint.parent / "onnx"


@pytest.fixture(scope="session")
def text(dense: Path) -> Path:
    path = dense.parent / "held-out.txt"
    path.write_text(passage(HELD_OUT_TEXT, 6000), encoding="utf-8")
    return path


@pytest.fixture
def pifa_deploy(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`pifa_deploy("compress", ...)` runs the command line in this process."""

    def command(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return command
