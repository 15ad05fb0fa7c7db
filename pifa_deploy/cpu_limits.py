"""What this processor itself reaches, reading memory and multiplying matrices: what bounds `bench` on a CPU.

No datasheet says what a few cores of a machine that others use too can do. Products are tried in PyTorch and, where it
is installed, in ONNX Runtime, whose kernels are twice as fast on some processors.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from pifa_deploy.contender_bounds import BoundOptions
from pifa_deploy.layer_graph import layer_model

# Beyond any cache; the matrices of the product are within it.
_READ_BYTES = 512 << 20
_SIDE = 1536
_SECONDS = 1.0


def measured_bounds(threads: int) -> BoundOptions:
    """Returns bounds by the best rates of a few seconds, in fp32.

    Bytes a second are those of a matrix-vector product or a sum in PyTorch, whichever reads faster; the peak is that of
    the product of two square matrices.

    Args:
        threads: of each library meanwhile.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        read_s, multiply_s = _reading_s(), _multiplying_s(threads)
    finally:
        torch.set_num_threads(before)
    return BoundOptions(
        bandwidth_gb_s=_READ_BYTES / read_s / 1e9, peak_tflops=2 * _SIDE**3 / multiply_s / 1e12, measured=True
    )


def _reading_s() -> float:
    matrix = torch.ones(_READ_BYTES // 4 // 8192, 8192)
    vector, result = torch.ones(8192), torch.empty(len(matrix))
    return min(_best_s(matrix.sum), _best_s(lambda: torch.mv(matrix, vector, out=result)))


def _multiplying_s(threads: int) -> float:
    left, right = torch.ones(_SIDE, _SIDE), torch.ones(_SIDE, _SIDE)
    result = torch.empty(_SIDE, _SIDE)
    times = [_best_s(lambda: torch.mm(left, right, out=result))]
    try:
        import onnxruntime
    except ImportError:
        return times[0]
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    model = layer_model(nn.Linear(_SIDE, _SIDE, bias=False)).SerializeToString()
    session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    given = {"x": np.ones((_SIDE, _SIDE), np.float32)}
    return min(*times, _best_s(lambda: session.run(["y"], given)))


def _best_s(call: Callable[[], object]) -> float:
    """Returns the least seconds of a call: others on the machine only add to it."""
    call()
    times: list[float] = []
    end = time.perf_counter() + _SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
