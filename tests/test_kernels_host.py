"""The kernels' index and tiling logic on the CPU: host twins compiled from the kernels' own source."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from kernel_fixtures import (
    ODD_SIZES,
    PLUGINS,
    Case,
    compile_host,
    expected_and_bound,
    host_kernels,
    random_layer,
    run_group_guarded,
    run_guarded,
    worst_error,
)

from pifa_deploy import cuda_kernels
from pifa_deploy.cuda_kernels import KernelError, KernelPath, KernelProblem, Kernels, PivotLayer
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.linear import PifaLinear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATHS = (KernelPath.DECODE, KernelPath.GEMM)
MAX_GRID = 1 << 22


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


@pytest.mark.parametrize("kind", ["small", "large"])
def test_every_path_form_and_dtype_stays_within_the_rounding_bound(kernels: Kernels, kind: str) -> None:
    for seed, case in enumerate(SMALL if kind == "small" else LARGE):
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


def small_layer(index: torch.Tensor | None = None, form: str = "row") -> tuple[PivotLayer, torch.Tensor]:
    case = Case(
        dtype=torch.float32,
        form=form,
        tokens=3,
        in_features=12,
        out_features=12,
        rank=4,
        index=False,
        bias=False,
        path=KernelPath.DECODE,
    )
    layer, x = random_layer(case, 1, "cpu")
    return replace(layer, index=index), x


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


def launches(kernels: Kernels) -> int:
    """Launches of the decode kernel since the last question."""
    return int(ctypes.CDLL(str(kernels.path)).pifaTestLaunches())


# out_features, rank and whether there is an index, for layers of one x.
GROUPS = (
    ((576, 168, True), (192, 64, True), (192, 64, False)),
    ((1536, 200, False), (1536, 200, True)),
    ((40, 40, True),),
    tuple((8 * m, 8, m % 2 == 0) for m in range(1, 9)),
)


@pytest.mark.parametrize("path", [*PATHS, KernelPath.AUTO])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_one_x_share_their_launches_and_give_what_each_gives_alone(
    kernels: Kernels, dtype: torch.dtype, path: KernelPath
) -> None:
    for number, (group, tokens) in enumerate(zip(GROUPS, (1, 2, 4, 9), strict=True)):
        layers, xs = group_of(group, dtype, tokens, in_features=576 if number < 2 else 40)
        alone = [cuda_kernels.apply(kernels, layer, xs[0], path) for layer in layers]
        launches(kernels)
        together, untouched = run_group_guarded(kernels, layers, xs[0], path)
        gemm = path is KernelPath.GEMM or (path is KernelPath.AUTO and tokens > 8 and dtype != torch.float32)
        assert launches(kernels) == (0 if gemm else 2)
        assert untouched
        for layer, y, expected in zip(layers, together, alone, strict=True):
            assert worst_error(layer, xs[0], y) <= 2
            # The number of rows that a thread holds depends on the launch; the order of a sum does not.
            assert torch.equal(y, expected)


def group_of(
    group: tuple[tuple[int, int, bool], ...], dtype: torch.dtype, tokens: int, in_features: int
) -> tuple[list[PivotLayer], list[torch.Tensor]]:
    made = [
        random_layer(
            Case(
                dtype=dtype,
                form="row",
                tokens=tokens,
                in_features=in_features,
                out_features=m,
                rank=rank,
                index=index,
                bias=number % 2 == 0,
                path=KernelPath.DECODE,
            ),
            number,
            "cpu",
        )
        for number, (m, rank, index) in enumerate(group)
    ]
    return [layer for layer, _ in made], [x for _, x in made]


def test_a_group_with_an_odd_rank_or_without_tokens_is_right_too(kernels: Kernels) -> None:
    layers, (x, *_) = group_of(((33, 7, True), (40, 16, False)), torch.float16, 3, 576)
    launches(kernels)
    for layer, y in zip(layers, cuda_kernels.apply_group(kernels, layers, x, KernelPath.DECODE), strict=True):
        assert worst_error(layer, x, y) <= 2
    assert launches(kernels) == 4
    assert [y.shape for y in cuda_kernels.apply_group(kernels, layers, x[:0])] == [(0, 33), (0, 40)]


def test_a_group_that_is_none_is_refused(kernels: Kernels) -> None:
    layers, (x, *_) = group_of(((16, 8, False),) * 9, torch.float32, 2, 32)
    assert len(cuda_kernels.apply_group(kernels, layers[:8], x)) == 8
    with pytest.raises(KernelError, match="a size is out of range"):
        cuda_kernels.apply_group(kernels, layers, x)
    (other,), _ = group_of(((16, 8, False),), torch.float32, 2, 40)
    with pytest.raises(ValueError, match="x has 32 features, expected in_features 40"):
        cuda_kernels.apply_group(kernels, [layers[0], other], x)
    (half,), _ = group_of(((16, 8, False),), torch.float16, 2, 32)
    with pytest.raises(KernelError, match="a size is out of range"):
        cuda_kernels.apply_group(kernels, [layers[0], half], x, KernelPath.DECODE)
    column, _ = small_layer(form="column")
    with pytest.raises(KernelError, match="this path does not serve this problem"):
        cuda_kernels.apply_group(kernels, [column, column], torch.randn(3, 12), KernelPath.DECODE)


def problem(**changes: int | str | bool) -> KernelProblem:
    sizes = {"tokens": 4, "in_features": 64, "out_features": 96, "rank": 32} | changes
    return KernelProblem(dtype=torch.float16, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": -1},
        {"tokens": 2**63 - 1},
        {"in_features": 0},
        {"out_features": 2**31},
        {"rank": 0},
        {"rank": 65},
        {"in_features": -(2**63)},
    ],
)
def test_sizes_out_of_range_are_refused_with_a_reason(kernels: Kernels, changes: dict[str, int]) -> None:
    assert kernels.check(problem()) is None
    reason = kernels.check(problem(**changes))
    assert reason is not None
    assert "a size is out of range" in reason
    with pytest.raises(KernelError, match="a size is out of range"):
        kernels.workspace_bytes(problem(**changes))


def test_factors_that_are_not_aligned_are_refused(kernels: Kernels) -> None:
    layer, x = small_layer()
    moved = torch.empty(layer.pivot_weight.numel() + 1)[1:].view_as(layer.pivot_weight).copy_(layer.pivot_weight)
    broken = replace(layer, pivot_weight=moved)
    assert not broken.is_served(x)
    with pytest.raises(KernelError, match="not aligned to 16 bytes"):
        run_guarded(kernels, broken, x, KernelPath.DECODE)


def test_an_unknown_dtype_or_form_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch\.float64, expected one of"):
        KernelProblem(dtype=torch.float64, tokens=1, in_features=1, out_features=1, rank=1)
    with pytest.raises(ValueError, match="form is 'diagonal', expected one of row, column"):
        problem(form="diagonal")


def test_another_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(InputRefusedError, match="does not hold the PifaLinear kernels"):
        Kernels(tmp_path / "text.so")


def test_the_workspace_never_shrinks_with_tokens_and_auto_has_room_for_both_paths(kernels: Kernels) -> None:
    for form in ("row", "column"):
        for path in KernelPath:
            sizes = [
                kernels.workspace_bytes(problem(tokens=tokens, form=form, index=True), path)
                for tokens in (0, 1, 2, 16, 17, 10**6, 10**9, 10**15)
            ]
            assert sizes == sorted(sizes)
        for tokens in (1, 16, 10**9):
            each = problem(tokens=tokens, form=form, index=True)
            assert kernels.workspace_bytes(each) >= max(kernels.workspace_bytes(each, path) for path in PATHS)


def test_the_rule_changes_from_decode_to_gemm_once(kernels: Kernels) -> None:
    for dtype in DTYPES:
        chosen = [kernels.chosen_path(replace(problem(tokens=tokens), dtype=dtype)) for tokens in range(100)]
        assert chosen[:2] == [KernelPath.DECODE] * 2
        assert chosen[-1] == KernelPath.GEMM
        assert chosen == sorted(chosen)


class RowPlan:
    """planRows and tilePosition of the library for one product."""

    def __init__(self, kernels: Kernels, *sizes: int) -> None:
        self.library, self.sizes = ctypes.CDLL(str(kernels.path)), [ctypes.c_int64(size) for size in sizes]
        out = (ctypes.c_int64 * 8)()
        self.library.pifaTestPlanRows(*self.sizes, out)
        self.tile_tokens, self.vector, self.group_threads, self.group_rows = out[:4]
        self.row_tiles, self.token_tiles, self.tiles, self.grid = out[4:]
        self.groups = 128 // self.group_threads

    def position(self, tile: int, group: int) -> tuple[int, int]:
        out = (ctypes.c_int64 * 2)()
        self.library.pifaTestTilePosition(*self.sizes, ctypes.c_int64(tile), ctypes.c_int32(group), out)
        return out[0], out[1]


def test_tiles_cover_every_output_exactly_once(kernels: Kernels) -> None:
    for rows, depth, tokens in [(1, 1, 1), (7, 33, 3), (33, 1536, 17), (1100, 8, 9), (576, 4096, 2), (1500, 2000, 5)]:
        for weight_bytes in (2, 4):
            plan = RowPlan(kernels, rows, depth, tokens, weight_bytes)
            counts = torch.zeros(rows, tokens, dtype=torch.int32)
            for tile in range(plan.tiles):
                for group in range(plan.groups):
                    row, token = plan.position(tile, group)
                    counts[row : row + plan.group_rows, token : token + plan.tile_tokens] += 1
            assert (counts == 1).all(), (rows, depth, tokens, weight_bytes)


def test_launch_sizes_hold_to_the_limits_of_int64(kernels: Kernels) -> None:
    draw = random.Random(0)
    edges = [1, 2, 3, 4, 5, 8, 9, 31, 32, 33, 2**15, 2**16 + 1]
    limits = [2**31 - 2, 2**31 - 1]
    for _ in range(2000):
        rows, depth = (draw.choice([*edges, *limits, draw.randrange(1, 2**31)]) for _ in range(2))
        most = (2**63 - 1) // (8 * (rows + depth + 64))
        tokens = min(most, draw.choice([*edges, most, most - 1, draw.randrange(1, most)]))
        plan = RowPlan(kernels, rows, depth, tokens, draw.choice([2, 4]))
        per_tile = plan.groups * plan.group_rows
        assert 1 <= plan.grid <= min(plan.tiles, MAX_GRID)
        assert plan.row_tiles * plan.token_tiles == plan.tiles < 2**63
        assert (plan.row_tiles - 1) * per_tile < rows <= plan.row_tiles * per_tile
        assert (plan.token_tiles - 1) * plan.tile_tokens < tokens <= plan.token_tiles * plan.tile_tokens
        assert depth % plan.vector == 0
        assert plan.group_threads in (32, 128)
        assert 1 <= plan.group_rows <= 4
        row, token = plan.position(plan.tiles - 1, 0)
        assert rows - per_tile <= row < rows
        assert tokens - plan.tile_tokens <= token < tokens


@pytest.fixture
def enabled(kernels: Kernels) -> Iterator[Kernels]:
    yield cuda_kernels.enable(kernels.path, device_type="cpu")
    cuda_kernels.disable(device_type="cpu")


def module(dtype: torch.dtype) -> PifaLinear:
    torch.manual_seed(0)
    layer = PifaLinear(33, 17, 7, bias=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer.pivot_rows.copy_(torch.tensor([0, 2, 3, 8, 9, 15, 16]))
    layer.derive_output_index()
    return layer.to(dtype)


@pytest.mark.parametrize("shape", [(33,), (0, 33), (5, 33), (2, 3, 33)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_module_gives_the_same_with_and_without_the_kernels(
    kernels: Kernels, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    layer, x = module(dtype), torch.randn(shape).to(dtype)
    with torch.no_grad():
        plain = layer(x)
        cuda_kernels.enable(kernels.path, device_type="cpu")
        try:
            fast = layer(x)
        finally:
            cuda_kernels.disable(device_type="cpu")
        again = layer(x)
    assert fast.shape == plain.shape
    torch.testing.assert_close(fast, plain, rtol=4 * torch.finfo(dtype).eps, atol=40 * torch.finfo(dtype).eps)
    assert torch.equal(plain, again)


def test_the_kernels_are_really_called(enabled: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[KernelProblem] = []
    real = Kernels.enqueue

    def counted(self: Kernels, problem: KernelProblem, *arguments: object, **options: object) -> None:
        calls.append(problem)
        real(self, problem, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Kernels, "enqueue", counted)
    with torch.no_grad():
        module(torch.float16)(torch.randn(2, 3, 33).half())
        module(torch.float64)(torch.randn(2, 33).double())
    assert [call.tokens for call in calls] == [6]


def test_gradients_pass_through_the_kernels(enabled: Kernels) -> None:
    layer = module(torch.float32)
    x = torch.randn(4, 33, requires_grad=True)
    layer(x).square().sum().backward()
    found = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    cuda_kernels.disable(device_type="cpu")
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    layer(x).square().sum().backward()
    for got, expected in zip(found, chain([x], layer.parameters()), strict=True):
        torch.testing.assert_close(got, expected.grad, rtol=1e-4, atol=1e-3)


def test_the_operator_keeps_its_contract_with_the_kernels(enabled: Kernels) -> None:
    layer = module(torch.float32)
    arguments = (torch.randn(3, 33), layer.pivot_weight, layer.coefficients, layer.output_index, layer.bias)
    torch.library.opcheck(torch.ops.pifa.linear.default, arguments)


def test_x_of_another_width_is_refused(kernels: Kernels) -> None:
    layer, x = small_layer()
    with pytest.raises(ValueError, match="x has 11 features, expected in_features 12"):
        cuda_kernels.apply(kernels, layer, x[:, :11])


def test_the_benchmark_checks_and_times_every_contender_that_runs_here(kernels: Kernels, tmp_path: Path) -> None:
    # The second layer is q, k and v of SmolLM2, stacked.
    entry = {"name": "small", "layers": [[96, 80], [960, 576]]}
    (tmp_path / "shapes.json").write_text(json.dumps({"entries": [entry], "densities": [0.7], "tokens": [1, 9]}))
    program = [sys.executable, str(PLUGINS.parent / "perf" / "bench_linear.py"), "--device", "cpu", "--rounds", "2"]
    options = ["--shapes", str(tmp_path / "shapes.json"), "--library", str(kernels.path), "--out", str(tmp_path)]
    done = subprocess.run([*program, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_linear.json").read_text())
    assert [(result["tokens"], result["density"]) for result in report["results"]] == [(1, 0.7), (9, 0.7)]
    for result in report["results"]:
        assert len(result["rows"]) == 10
        assert all(row["median_us"] > 0 for row in result["rows"].values()), result["rows"]
    assert "| small | 0.7 | 9 |" in done.stdout
    plotted = importlib.util.find_spec("matplotlib") is not None
    assert (tmp_path / "bench_linear.png").is_file() == plotted
    assert ("plots: bench_linear.png" if plotted else "no plots: matplotlib is not installed") in done.stdout


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
