"""What a processor reaches by itself."""

import time

import click.testing
import numpy as np
import pytest
import torch

from pifa_deploy import cpu_limits
from pifa_deploy.cli.bench import bench_command
from pifa_deploy.cpu_limits import measured_bounds


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    # A tenth of the memory and the time: these tests ask what is measured, not how well.
    monkeypatch.setattr(cpu_limits, "_SECONDS", 0.1)
    monkeypatch.setattr(cpu_limits, "_READ_BYTES", 64 << 20)
    monkeypatch.setattr(cpu_limits, "_SIDE", 512)


def test_no_single_try_beats_them_by_much() -> None:
    before = torch.get_num_threads()
    bounds = measured_bounds(1)
    assert torch.get_num_threads() == before
    assert bounds.measured
    assert bounds.limits("fp32").sources["peak"] == "measured"
    read, left = np.ones(16 << 20, np.float32), torch.ones(512, 512)
    torch.set_num_threads(1)
    start = time.perf_counter()
    read.max()
    middle = time.perf_counter()
    left @ left
    end = time.perf_counter()
    torch.set_num_threads(before)
    assert bounds.bandwidth_gb_s is not None
    assert bounds.peak_tflops is not None
    # Another library and a cold product: both are slower than the best, by no more than a busy machine makes them.
    assert 0.8 * read.nbytes / (middle - start) < bounds.bandwidth_gb_s * 1e9 < 1000e9
    assert 0.8 * 2 * 512**3 / (end - middle) < bounds.peak_tflops * 1e12 < 10e12


@pytest.mark.parametrize("other", [["--device", "cuda"], ["--bandwidth", "10", "--peak-tflops", "1"]])
def test_beside_other_limits_they_are_refused(other: list[str], tmp_path: object) -> None:
    result = click.testing.CliRunner().invoke(bench_command, [str(tmp_path), "--measure-limits", *other])
    assert isinstance(result.exception, ValueError)
    assert "--measure-limits measures this CPU; leave it out" in str(result.exception)
