"""What a processor reaches by itself."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import click.testing
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pifa_deploy import cpu_limits
from pifa_deploy.cli.bench import bench_command
from pifa_deploy.cpu_limits import measured_bounds


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    # A tenth of the memory and the time: these tests ask what is measured, not how well.
    monkeypatch.setattr(cpu_limits, "_SECONDS", 0.1)
    monkeypatch.setattr(cpu_limits, "_READ_BYTES", 64 << 20)
    monkeypatch.setattr(cpu_limits, "_SIDE", 512)


def test_they_are_measured_and_the_threads_stay_as_they_were() -> None:
    before = torch.get_num_threads()
    bounds = measured_bounds(1)
    assert torch.get_num_threads() == before
    assert bounds.measured
    assert bounds.limits("fp32").sources["peak"] == "measured"
    assert bounds.bandwidth_gb_s is not None
    assert bounds.peak_tflops is not None
    assert 0 < bounds.bandwidth_gb_s * 1e9 < 1000e9
    assert 0 < bounds.peak_tflops * 1e12 < 10e12


class Work(TorchDispatchMode):
    """Notes what an operator of PyTorch reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.read += [value for value in args if isinstance(value, torch.Tensor)]
        return func(*args, **(kwargs or {}))


def test_the_rates_are_the_work_over_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'pifa-deploy[cpu]'")
    seconds = iter([0.5, 0.25, 0.125, 0.0625])
    read_bytes, operations, products = [], [], []

    def timed(call: Callable[[], Any]) -> float:
        with Work() as work, FlopCounterMode(display=False) as counter:
            result = call()
        if work.read:
            read_bytes.append(max(tensor.nbytes for tensor in work.read))
            operations.append(counter.get_total_flops())
        else:  # ONNX Runtime's
            products.append(result[0])
        return next(seconds)

    monkeypatch.setattr(cpu_limits, "_best_s", timed)
    bounds = measured_bounds(1)
    assert read_bytes[:2] == [64 << 20] * 2
    assert operations[2:] == [2 * 512**3]
    assert [product.shape for product in products] == [(512, 512)]
    assert bounds.bandwidth_gb_s == pytest.approx(read_bytes[0] / 0.25 / 1e9)
    assert bounds.peak_tflops == pytest.approx(operations[2] / 0.0625 / 1e12)


def test_the_least_of_the_tries_of_a_second_counts_and_the_first_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(cpu_limits, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(cpu_limits, "_SECONDS", 1.0)
    times = iter([0.03125, 0.5, 0.0625, 0.5, 0.001])

    def call() -> None:
        now[0] += next(times)

    assert cpu_limits._best_s(call) == 0.0625
    assert next(times) == 0.001  # not tried any more


@pytest.mark.parametrize("other", [["--device", "cuda"], ["--bandwidth", "10", "--peak-tflops", "1"]])
def test_beside_other_limits_they_are_refused(other: list[str], tmp_path: object) -> None:
    result = click.testing.CliRunner().invoke(bench_command, [str(tmp_path), "--measure-limits", *other])
    assert isinstance(result.exception, ValueError)
    assert "--measure-limits measures this CPU; leave it out" in str(result.exception)
