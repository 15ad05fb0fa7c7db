"""The CUDA kernels of the plugin library under PyTorch, in place of the layers' plain operators."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pifa_deploy.column_linear import pifa_column_linear
from pifa_deploy.kernel_library import DTYPES, KernelError, KernelPath, KernelProblem, Kernels, Tensors
from pifa_deploy.linear import pifa_linear
from pifa_deploy.plugin_library import find_library

__all__ = [
    "KernelError",
    "KernelPath",
    "KernelProblem",
    "Kernels",
    "PivotLayer",
    "apply",
    "apply_group",
    "disable",
    "enable",
]

ALIGNMENT_BYTES = 16  # of both factors


@dataclass(frozen=True, kw_only=True, eq=False)
class PivotLayer:
    """The constant tensors of a layer, as its kernels take them.

    Attributes:
        form: "row" or "column".
        pivot_weight: W_p [r, n], or W_c [m, r] in the column form.
        coefficients: C [m - r, r], or D [r, n - r].
        index: int32, of the outputs [m] (row form) or the inputs [n] (column form); empty or None without.
        bias: [m] or None.
    """

    form: str = "row"
    pivot_weight: torch.Tensor
    coefficients: torch.Tensor
    index: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def problem(self, tokens: int) -> KernelProblem:
        """Returns the problem of this layer for `tokens` rows."""
        rows, columns = self.pivot_weight.shape
        others = self.coefficients.shape[0 if self.form == "row" else 1]
        return KernelProblem(
            dtype=self.pivot_weight.dtype,
            form=self.form,
            tokens=tokens,
            in_features=columns if self.form == "row" else columns + others,
            out_features=rows + others if self.form == "row" else rows,
            rank=rows if self.form == "row" else columns,
            index=self.index is not None and self.index.numel() > 0,
            bias=self.bias is not None,
        )

    def buffers(self, x: torch.Tensor, y: torch.Tensor, workspace: torch.Tensor) -> Tensors:
        """Returns what `Kernels.enqueue` takes."""
        index = self.index if self.index is not None and self.index.numel() else None
        factors = {"pivot_weight": self.pivot_weight, "coefficients": self.coefficients}
        return {"x": x, **factors, "index": index, "bias": self.bias, "y": y, "workspace": workspace}

    def is_served(self, x: torch.Tensor) -> bool:
        """Returns whether the kernels take these tensors as they are; x itself is copied where it has gaps."""
        constants = [self.pivot_weight, self.coefficients, *([] if self.bias is None else [self.bias])]
        index = self.index if self.index is not None and self.index.numel() else None
        return (
            x.dtype in DTYPES
            and all(each.dtype == x.dtype and each.device == x.device and each.is_contiguous() for each in constants)
            and all(each.data_ptr() % ALIGNMENT_BYTES == 0 for each in constants[:2])
            and (index is None or (index.dtype == torch.int32 and index.device == x.device and index.is_contiguous()))
        )


def apply(kernels: Kernels, layer: PivotLayer, x: torch.Tensor, path: KernelPath = KernelPath.AUTO) -> torch.Tensor:
    """Runs a layer, whose tensors `is_served` accepted, on the current stream of x's device: [..., n] to [..., m]."""
    return apply_group(kernels, [layer], x, path)[0]


def apply_group(
    kernels: Kernels, layers: Sequence[PivotLayer], x: torch.Tensor, path: KernelPath = KernelPath.AUTO
) -> list[torch.Tensor]:
    """Runs up to eight layers in the row form that read the same x: q, k and v. Otherwise as `apply`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    on_gpu = x.device.type == "cuda"
    # A host library, as the tests have, takes host pointers and no stream. The library asks for the current device.
    with torch.cuda.device(x.device) if on_gpu else contextlib.nullcontext():
        if path is not KernelPath.AUTO:
            return _enqueued(kernels, layers, x, (rows, path))
        # Only whether one launch serves may differ from layer to layer.
        chosen = {kernels.chosen_path(layer.problem(rows.shape[0])) for layer in layers}
        path = chosen.pop() if len(chosen) == 1 else KernelPath.DECODE
        try:
            return _enqueued(kernels, layers, x, (rows, path))
        except KernelError:
            # A grid that was to be resident at once, and multiprocessors that somebody else holds.
            if path is not KernelPath.COOPERATIVE:
                raise
            return _enqueued(kernels, layers, x, (rows, KernelPath.DECODE))


def _enqueued(
    kernels: Kernels, layers: Sequence[PivotLayer], x: torch.Tensor, work: tuple[torch.Tensor, KernelPath]
) -> list[torch.Tensor]:
    """Returns the outputs of layers whose kernels were started by one path on the flattened x."""
    rows, path = work
    outputs, calls = [], []
    for layer in layers:
        problem = layer.problem(rows.shape[0])
        if rows.shape[1] != problem.in_features:
            raise ValueError(f"x has {rows.shape[1]} features, expected in_features {problem.in_features}")
        outputs.append(x.new_empty(*x.shape[:-1], problem.out_features))
        workspace = torch.empty(kernels.workspace_bytes(problem, path), dtype=torch.uint8, device=x.device)
        calls.append((problem, layer.buffers(rows, outputs[-1], workspace)))
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.device.type == "cuda" else 0
    if len(calls) == 1:
        kernels.enqueue(*calls[0], path=path, stream=stream)
    else:
        kernels.enqueue_group(calls, path=path, stream=stream)
    return outputs


def _row(
    kernels: Kernels | None,
    x: torch.Tensor,
    pivot_weight: torch.Tensor,
    coefficients: torch.Tensor,
    output_index: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    layer = PivotLayer(pivot_weight=pivot_weight, coefficients=coefficients, index=output_index, bias=bias)
    if kernels is not None and layer.is_served(x):
        return apply(kernels, layer, x)
    y_p = x @ pivot_weight.T
    y = torch.cat([y_p, y_p @ coefficients.T], dim=-1)
    y = y.index_select(-1, output_index) if output_index.numel() else y
    return y if bias is None else y + bias


def _column(
    kernels: Kernels | None,
    x: torch.Tensor,
    pivot_weight: torch.Tensor,
    coefficients: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    layer = PivotLayer(form="column", pivot_weight=pivot_weight, coefficients=coefficients, bias=bias)
    if kernels is not None and layer.is_served(x):
        return apply(kernels, layer, x)
    rank = pivot_weight.shape[1]
    y = (x[..., :rank] + x[..., rank:] @ coefficients.T) @ pivot_weight.T
    return y if bias is None else y + bias


def enable(path: Path | None = None, *, device_type: str = "cuda") -> Kernels:
    """Makes `PifaLinear` and `PifaColumnLinear` on CUDA tensors use the kernels, until `disable`.

    Gradients and `torch.compile` go on as before; what the kernels do not serve (see `is_served`) plain operators do.

    Args:
        path: the library; the one that `plugin_library.find_library` finds if left out.
        device_type: whose tensors; another than "cuda" is for tests with a host library.
    """
    kernels = Kernels(find_library(path))
    pifa_linear.register_kernel(device_type, partial(_row, kernels))
    pifa_column_linear.register_kernel(device_type, partial(_column, kernels))
    return kernels


def disable(*, device_type: str = "cuda") -> None:
    """Makes the layers on `device_type` use plain operators again."""
    pifa_linear.register_kernel(device_type, partial(_row, None))
    pifa_column_linear.register_kernel(device_type, partial(_column, None))
