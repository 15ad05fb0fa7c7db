"""The CUDA kernels of the plugin library under PyTorch: what the TensorRT plugin calls, called through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pifa_deploy import op_spec
from pifa_deploy.column_linear import pifa_column_linear
from pifa_deploy.errors import InputRefusedError, MisfitError, PifaDeployError
from pifa_deploy.linear import pifa_linear
from pifa_deploy.plugin_library import find_library

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # PifaDtype of pifaLinear.h
FORMS = {"row": 0, "column": 1}  # PifaForm
ALIGNMENT_BYTES = 16  # of both factors
Tensors = dict[str, torch.Tensor | None]


class KernelPath(IntEnum):
    """How the work is done: PifaPath of pifaLinear.h."""

    AUTO = 0
    DECODE = 1
    GEMM = 2
    COOPERATIVE = 3


class KernelError(PifaDeployError):
    """A kernel refused its problem, or CUDA failed."""


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("dtype", "form")),
        *((name, ctypes.c_int64) for name in ("tokens", "in_features", "out_features", "rank")),
        *((name, ctypes.c_int32) for name in ("has_index", "has_bias")),
    )


class _Buffers(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("x", "pivot_weight", "coefficients", "index", "bias", "y", "workspace")
    )


_PROBLEM, _PATH = ctypes.POINTER(_Problem), ctypes.c_int32
_CALL = (_PROBLEM, ctypes.POINTER(_Buffers))
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "Check": (ctypes.c_int32, _PROBLEM, _PATH),
    "WorkspaceBytes": (ctypes.c_int64, _PROBLEM, _PATH),
    "ChosenPath": (ctypes.c_int32, _PROBLEM),
    "Prepare": (ctypes.c_int32, _PROBLEM, _PATH),
    "Enqueue": (ctypes.c_int32, *_CALL, _PATH, ctypes.c_void_p),
    "EnqueueGroup": (ctypes.c_int32, *_CALL, ctypes.c_int32, _PATH, ctypes.c_void_p),
    "StatusString": (ctypes.c_char_p, ctypes.c_int32),
    "OpVersion": (ctypes.c_int32,),
}


@dataclass(frozen=True, kw_only=True)
class KernelProblem:
    """Sizes and kind of one call; `index` is of the outputs in the row form, of the inputs in the column form."""

    dtype: torch.dtype
    form: str = "row"
    tokens: int
    in_features: int
    out_features: int
    rank: int
    index: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a dtype or form that no kernel has; the library itself judges the sizes."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        if self.form not in FORMS:
            raise ValueError(f"form is {self.form!r}, expected one of {', '.join(FORMS)}")


class Kernels:
    """The C functions of pifaLinear.h in one shared library."""

    def __init__(self, path: Path) -> None:
        """Loads the library, which needs no GPU.

        Raises:
            InputRefusedError: it does not load, or lacks a function.
            MisfitError: it implements another version of the operators.
        """
        self.path = path
        try:
            library = ctypes.CDLL(str(path))
            for name, (result, *arguments) in _SIGNATURES.items():
                function = getattr(library, f"pifaLinear{name}")
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise InputRefusedError(f"{path} does not hold the PifaLinear kernels: {error}; build it here") from error
        self._library = library
        if (version := library.pifaLinearOpVersion()) != op_spec.OP_VERSION:
            known = f"{op_spec.DOMAIN}::{op_spec.OP_TYPE}, this program knows version {op_spec.OP_VERSION}"
            raise MisfitError(f"{path} implements version {version} of {known}; build the plugin of this checkout")

    def check(self, problem: KernelProblem, path: KernelPath = KernelPath.AUTO) -> str | None:
        """Returns None when `path` can compute `problem` on this machine, else the library's reason."""
        status = self._library.pifaLinearCheck(_structure(problem), path)
        return None if status == 0 else self._message(status)

    def chosen_path(self, problem: KernelProblem) -> KernelPath:
        """Returns the path that AUTO takes for `problem`."""
        return KernelPath(self._checked(self._library.pifaLinearChosenPath(_structure(problem)), problem))

    def workspace_bytes(self, problem: KernelProblem, path: KernelPath = KernelPath.AUTO) -> int:
        """Returns the bytes of workspace that `path` needs for `problem`."""
        return self._checked(self._library.pifaLinearWorkspaceBytes(_structure(problem), path), problem)

    def prepare(self, problem: KernelProblem, path: KernelPath = KernelPath.AUTO) -> None:
        """Makes what the first call would make, so that it may be captured in a CUDA graph."""
        self._failed(self._library.pifaLinearPrepare(_structure(problem), path), problem)

    def enqueue(self, problem: KernelProblem, buffers: Tensors, *, path: KernelPath, stream: int) -> None:
        """Enqueues the layer on `stream`, a cudaStream_t.

        `buffers` (see `PivotLayer.buffers`) are contiguous, on one device, of the problem's sizes; not checked here.

        Raises:
            KernelError: the library or CUDA refused; an error of the kernels themselves shows at the next synchronise.
        """
        self._failed(self._library.pifaLinearEnqueue(_structure(problem), _pointers(buffers), path, stream), problem)

    def enqueue_group(self, calls: Sequence[tuple[KernelProblem, Tensors]], *, path: KernelPath, stream: int) -> None:
        """Enqueues layers that read the same x, as `enqueue` does; when few tokens decode, in one or two launches."""
        problems = (_Problem * len(calls))(*(_structure(problem) for problem, _ in calls))
        buffers = (_Buffers * len(calls))(*(_pointers(each) for _, each in calls))
        self._failed(self._library.pifaLinearEnqueueGroup(problems, buffers, len(calls), path, stream), calls[0][0])

    def _message(self, status: int) -> str:
        return f"{self._library.pifaLinearStatusString(status).decode()} (status {status})"

    def _checked(self, value: int, problem: KernelProblem) -> int:
        if value < 0:
            raise KernelError(f"{problem}: {self._message(value)}")
        return value

    def _failed(self, status: int, problem: KernelProblem) -> None:
        if status:
            raise KernelError(f"{problem}: {self._message(status)}")


def _structure(problem: KernelProblem) -> _Problem:
    sizes = (problem.tokens, problem.in_features, problem.out_features, problem.rank)
    return _Problem(DTYPES[problem.dtype], FORMS[problem.form], *sizes, problem.index, problem.bias)


def _pointers(buffers: Tensors) -> _Buffers:
    return _Buffers(**{name: None if each is None else each.data_ptr() for name, each in buffers.items()})


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
