"""The C functions of the plugin library's kernels: what the TensorRT plugin calls, called through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from pifa_deploy import op_spec
from pifa_deploy.errors import InputRefusedError, MisfitError, PifaDeployError

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # PifaDtype of pifaLinear.h
FORMS = {"row": 0, "column": 1}  # PifaForm
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
