"""What the kernels compute, on the CPU: host twins compiled from the kernels' own source."""

from __future__ import annotations

import ctypes
import os
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_fixtures import (
    ODD_SIZES,
    Case,
    compile_host,
    expected_and_bound,
    host_kernels,
    random_layer,
    run_guarded,
    small_layer,
    worst_error,
)

from pifa_deploy.cuda_kernels import KernelPath, Kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATHS = (KernelPath.DECODE, KernelPath.GEMM)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return host_kernels(tmp_path_factory.getbasetemp())


def sampled_cases(sizes: tuple[int, ...], tokens: tuple[int, ...], count: int) -> Iterator[Case]:
    draw = random.Random(0)
    kinds = [
        (dtype, form, path, index, bias)
        for dtype in DTYPES
        for form in ("row", "column")
        for path in PATHS
        for index in (False, True)
        for bias in (False, True)
    ]
    for number in range(count):
        dtype, form, path, index, bias = kinds[number % len(kinds)]
        n, m = draw.choice(sizes), draw.choice(sizes)
        ranks = {1, min(n, m), max(1, min(n, m) // 2), max(1, min(n, m) - 1)}
        yield Case(
            dtype=dtype,
            form=form,
            tokens=draw.choice(tokens),
            in_features=n,
            out_features=m,
            rank=draw.choice(sorted(ranks)),
            index=index,
            bias=bias,
            path=path,
        )


SMALL = sampled_cases(tuple(size for size in ODD_SIZES if size < 100), (1, 2, 3, 5, 8, 9, 17), 240)


LARGE = sampled_cases((33, 576, 1536), (1, 4, 9), 48)


def whole_loads_cases() -> Iterator[Case]:
    """Sizes that the cooperative path serves; its twin runs three blocks, which loop."""
    draw = random.Random(1)
    for number in range(72):
        n, m = (8 * draw.choice((1, 2, 5, 9, 72, 192)) for _ in range(2))
        form = ("row", "column")[number % 2]
        yield Case(
            dtype=DTYPES[number % 3],
            form=form,
            tokens=draw.choice((1, 2, 3, 8, 9)),
            in_features=n,
            # In the column form only what x is multiplied with must be whole loads.
            out_features=m + number % 7 if form == "row" else m,
            rank=8 * draw.randint(1, min(n, m) // 8),
            index=form == "row" and number % 4 == 0,
            bias=number % 5 < 2,
            path=KernelPath.COOPERATIVE,
        )


@pytest.mark.parametrize("kind", ["small", "large", "cooperative"])
def test_every_path_form_and_dtype_stays_within_the_rounding_bound(kernels: Kernels, kind: str) -> None:
    cases = {"small": SMALL, "large": LARGE, "cooperative": whole_loads_cases()}[kind]
    for seed, case in enumerate(cases):
        layer, x = random_layer(case, seed, "cpu")
        y, untouched = run_guarded(kernels, layer, x, case.path)
        assert worst_error(layer, x, y) <= 2, case
        assert untouched, case


def test_the_bound_is_not_loose(kernels: Kernels) -> None:
    case = Case(
        dtype=torch.float16,
        form="row",
        tokens=3,
        in_features=576,
        out_features=576,
        rank=168,
        index=True,
        bias=True,
        path=KernelPath.DECODE,
    )
    layer, x = random_layer(case, 0, "cpu")
    y, _ = run_guarded(kernels, layer, x, case.path)
    assert layer.index is not None
    swapped = layer.index.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert worst_error(replace(layer, index=swapped), x, y) > 2
    _, bound = expected_and_bound(layer, x)
    assert float((bound / y.double().abs().mean()).mean()) < 0.05


@pytest.mark.parametrize("path", PATHS)
def test_an_index_may_name_an_output_twice_and_leave_others_out(kernels: Kernels, path: KernelPath) -> None:
    layer, x = small_layer(torch.tensor([11, 0, 0, 3, 3, 9, 9, 4, 4, 4, 1, 11], dtype=torch.int32))
    y, _ = run_guarded(kernels, layer, x, path)
    assert worst_error(layer, x, y) <= 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [-1, 12, 2**31 - 1, -(2**31)])
def test_an_index_out_of_range_gives_nan_there_and_reads_nothing_else(
    kernels: Kernels, path: KernelPath, bad: int
) -> None:
    index = torch.arange(12, dtype=torch.int32)
    good, x = small_layer(index)
    broken = index.clone()
    broken[5] = bad
    y, _ = run_guarded(kernels, replace(good, index=broken), x, path)
    assert y[:, 5].isnan().all()
    assert not torch.cat([y[:, :5], y[:, 6:]], dim=1).isnan().any()
    column, x = small_layer(broken, "column")
    y, _ = run_guarded(kernels, column, x, path)
    assert y.isnan().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", ["row", "column"])
def test_the_gemm_path_takes_many_tokens_in_parts(kernels: Kernels, path: KernelPath, form: str) -> None:
    set_chunk = ctypes.CDLL(str(kernels.path)).pifaTestSetChunkTokens
    set_chunk.argtypes = [ctypes.c_int64]
    layer, x = small_layer(torch.randperm(12).to(torch.int32), form)
    set_chunk(2)
    try:
        y, untouched = run_guarded(kernels, layer, x, path)
    finally:
        set_chunk(0)
    assert worst_error(layer, x, y) <= 2
    assert untouched


@pytest.mark.parametrize("path", [*PATHS, KernelPath.AUTO])
def test_no_tokens_are_no_work(kernels: Kernels, path: KernelPath) -> None:
    layer, x = small_layer()
    y, untouched = run_guarded(kernels, layer, x[:0], path)
    assert y.shape == (0, 12)
    assert untouched


@pytest.mark.slow
def test_twins_and_cublaslt_calls_are_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    # The real calls go into a cuBLASLt on the CPU, which refuses layouts and alignments that do not fit.
    compile_host(tmp_path / "libcublasLt.so.13", "tests/cublasLtFake.cpp")
    program = compile_host(
        tmp_path / "twins",
        *("tests/kernelsSanitizer.cu", "tests/kernelsHost.cpp", "tests/kernelsHostMemory.cpp"),
        "pifaLinear/cublasLtProduct.cu",
        flags=("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DPIFA_TEST_CUBLASLT"),
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([program, "600"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "600 cases, 0 failed" in done.stdout
    found = re.search(r"no cuBLASLt; (\d+) cooperative", done.stdout)
    assert found
    assert int(found[1]) == 192
