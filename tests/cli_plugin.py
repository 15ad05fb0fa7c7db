"""Artefacts of a small model, made once, and the command line in this process. Do not change them, copy them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_fixtures import Outcome, passage, save_dense

from pifa_deploy.calibration import HELD_OUT_TEXT
from pifa_deploy.cli.main import run

SMALL = 96 * 1024  # bytes


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
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with less space than any artefact of the small model needs."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL}", "none", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def pifa_deploy(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`pifa_deploy("compress", ...)` runs the command line in this process."""

    def command(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return command


@pytest.fixture(scope="session")
def engine_folder(onnx_folder: Path) -> Path:
    """A TensorRT-RTX engine of the small model for 8.6 and 8.9: batch 2, 16 tokens behind at most 32."""
    for module in ("tensorrt_rtx", "polygraphy"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'pifa-deploy[rtx]'")
    from pifa_deploy.engine import BuildOptions, build_engines

    options = BuildOptions(
        compute_capabilities=("8.6", "8.9"), max_batch_size=2, max_input_len=16, max_cache_len=32, sparsity="disable"
    )
    build_engines(onnx_folder, onnx_folder.parent / "engine", options)
    return onnx_folder.parent / "engine"
