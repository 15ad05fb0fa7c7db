"""Layers of one x in shared launches, and both products in one launch: the host twins of the kernels."""

from __future__ import annotations

import ctypes

import pytest
import torch
from kernel_fixtures import Case, host_kernels, random_layer, run_group_guarded, small_layer, worst_error

from pifa_deploy import cuda_kernels
from pifa_deploy.cuda_kernels import KernelError, KernelPath, Kernels, PivotLayer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return host_kernels(tmp_path_factory.getbasetemp())


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


@pytest.mark.parametrize("path", KernelPath)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_one_x_share_their_launches_and_give_what_each_gives_alone(
    kernels: Kernels, dtype: torch.dtype, path: KernelPath
) -> None:
    for number, (group, tokens) in enumerate(zip(GROUPS, (1, 2, 4, 9), strict=True)):
        layers, xs = group_of(group, dtype, tokens, in_features=576 if number < 2 else 40)
        each = KernelPath.DECODE if path is KernelPath.COOPERATIVE else path
        alone = [cuda_kernels.apply(kernels, layer, xs[0], each) for layer in layers]
        launches(kernels)
        together, untouched = run_group_guarded(kernels, layers, xs[0], path)
        gemm = path is KernelPath.GEMM or (path is KernelPath.AUTO and tokens > 8 and dtype != torch.float32)
        assert launches(kernels) == (0 if gemm else 1 if path is KernelPath.COOPERATIVE else 2)
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
    with pytest.raises(KernelError, match="this path does not serve this problem"):
        cuda_kernels.apply_group(kernels, layers, x, KernelPath.COOPERATIVE)
    assert launches(kernels) == 0
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


def test_where_one_launch_is_the_rule_it_is_taken_and_an_odd_layer_takes_the_others_to_two(kernels: Kernels) -> None:
    set_device = ctypes.CDLL(str(kernels.path)).pifaTestSetDevice
    set_device.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64]
    layers, (x, *_) = group_of(((40, 16, False), (33, 8, True), (33, 7, True)), torch.float16, 3, 576)
    expected = [cuda_kernels.apply(kernels, layer, x, KernelPath.DECODE) for layer in layers]
    launches(kernels)
    set_device(86, 0, 1, 5)
    try:
        first = cuda_kernels.apply_group(kernels, layers[:2], x)
        assert launches(kernels) == 1
        alone = cuda_kernels.apply(kernels, layers[2], x)
        assert launches(kernels) == 2
        together = cuda_kernels.apply_group(kernels, layers, x)
        assert launches(kernels) == 6  # an odd rank takes every layer to launches of its own
    finally:
        set_device(90, 1, 1, 3)
    for found in (first, together):
        assert all(torch.equal(y, exact) for y, exact in zip(found, expected, strict=False))
    assert torch.equal(alone, expected[2])
