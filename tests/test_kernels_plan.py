"""What the kernels accept, which path they choose, and how large their launches are."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_fixtures import host_kernels, run_guarded, small_layer

from pifa_deploy.cuda_kernels import KernelError, KernelPath, KernelProblem, Kernels
from pifa_deploy.errors import InputRefusedError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_GRID = 1 << 22


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return host_kernels(tmp_path_factory.getbasetemp())


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


def test_the_workspace_never_shrinks_with_tokens_and_auto_has_room_for_every_path(kernels: Kernels) -> None:
    for form in ("row", "column"):
        for path in KernelPath:
            sizes = [
                kernels.workspace_bytes(problem(tokens=tokens, form=form, index=True), path)
                for tokens in (0, 1, 2, 16, 17, 10**6, 10**9, 10**15)
            ]
            assert sizes == sorted(sizes)
        for tokens in (1, 16, 10**9):
            each = problem(tokens=tokens, form=form, index=True)
            assert kernels.workspace_bytes(each) >= max(kernels.workspace_bytes(each, path) for path in KernelPath)


def test_the_rule_changes_from_decode_to_gemm_once(kernels: Kernels) -> None:
    for dtype in DTYPES:
        chosen = [kernels.chosen_path(replace(problem(tokens=tokens), dtype=dtype)) for tokens in range(100)]
        assert chosen[:2] == [KernelPath.DECODE] * 2
        assert chosen[-1] == KernelPath.GEMM
        assert chosen == sorted(chosen)


@pytest.fixture
def device(kernels: Kernels) -> Iterator[Callable[..., None]]:
    """What the twins take for their GPU: compute capability, whether launches overlap, whether a launch cooperates."""
    set_device = ctypes.CDLL(str(kernels.path)).pifaTestSetDevice
    set_device.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64]
    yield set_device
    set_device(90, 1, 1, 3)


@pytest.mark.parametrize(
    ("traits", "expected"),
    [
        ((90, 1, 1), KernelPath.DECODE),
        ((120, 1, 1), KernelPath.DECODE),
        ((90, 0, 1), KernelPath.COOPERATIVE),
        ((87, 0, 1), KernelPath.COOPERATIVE),
        ((75, 0, 1), KernelPath.COOPERATIVE),
        ((86, 0, 0), KernelPath.DECODE),
        ((70, 0, 1), KernelPath.DECODE),
    ],
)
def test_where_launches_do_not_overlap_both_products_share_one(
    kernels: Kernels, device: Callable[..., None], traits: tuple[int, int, int], expected: KernelPath
) -> None:
    device(*traits, 40)
    assert kernels.chosen_path(problem(tokens=1)) is expected
    assert kernels.chosen_path(problem(tokens=100)) is KernelPath.GEMM
    odd = problem(tokens=1, rank=31)
    assert kernels.chosen_path(odd) is KernelPath.DECODE
    assert (kernels.check(problem(), KernelPath.COOPERATIVE) is None) == (traits[2] == 1)
    assert "does not serve" in (kernels.check(odd, KernelPath.COOPERATIVE) or "")


@pytest.mark.parametrize(
    "changes", [{"rank": 31}, {"in_features": 63}, {"form": "column", "index": True}, {"form": "column", "rank": 30}]
)
def test_the_cooperative_path_wants_whole_loads_and_no_gather(kernels: Kernels, changes: dict[str, int]) -> None:
    assert kernels.check(problem(), KernelPath.COOPERATIVE) is None
    assert kernels.check(problem(form="column"), KernelPath.COOPERATIVE) is None
    assert "does not serve" in (kernels.check(problem(**changes), KernelPath.COOPERATIVE) or "")


def test_the_grid_of_one_launch_fits_the_device_and_reaches_every_tile(kernels: Kernels) -> None:
    grid = ctypes.CDLL(str(kernels.path)).pifaTestOneLaunchGrid
    grid.argtypes, grid.restype = [ctypes.c_int64] * 3, ctypes.c_int64
    draw = random.Random(0)
    for _ in range(2000):
        first, second = (draw.choice([1, 2, 527, 528, 529, 2**31, 2**62, draw.randrange(1, 2**40)]) for _ in range(2))
        resident = draw.choice([1, 16, 528, 2**22, 2**31])
        blocks = grid(first, second, resident)
        assert 1 <= blocks <= min(resident, MAX_GRID)
        # No block is idle in both halves, and none is left out that the device could hold.
        assert blocks <= max(first, second)
        assert blocks in (resident, MAX_GRID, max(first, second))
    assert grid(10, 20, 0) == 0


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
