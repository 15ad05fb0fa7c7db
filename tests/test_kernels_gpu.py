"""The kernels on a CUDA GPU. They want a built library; see `plugin_library.find_library`."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
import torch
from kernel_fixtures import POISON, Case, random_layer, run_group_guarded, run_guarded, worst_error

from pifa_deploy import cuda_kernels
from pifa_deploy.cuda_kernels import KernelPath, Kernels, PivotLayer
from pifa_deploy.errors import PifaDeployError
from pifa_deploy.linear import PifaLinear
from pifa_deploy.plugin_library import find_library

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="there is no CUDA GPU; nothing is decided about the kernels"
    ),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PATHS = (KernelPath.DECODE, KernelPath.GEMM, KernelPath.COOPERATIVE)
TOKENS = (0, 1, 2, 15, 16, 17, 128, 1000)
SIZES = (1, 7, 8, 15, 16, 17, 31, 33, 64, 576, 1000, 1536)
BIG_BYTES = 60 << 30


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    try:
        return Kernels(find_library())
    except PifaDeployError as error:
        pytest.skip(str(error))


def cases(dtype: torch.dtype, form: str) -> Iterator[Case]:
    draw = random.Random(0)
    for tokens in TOKENS:
        for number in range(12):
            n, m = draw.choice(SIZES), draw.choice(SIZES)
            least = min(n, m)
            yield Case(
                dtype=dtype,
                form=form,
                tokens=tokens,
                in_features=n,
                out_features=m,
                rank=draw.choice(sorted({1, max(1, least // 2), max(1, least - 1), least})),
                index=number % 2 == 1,
                bias=number % 4 >= 2,
                path=PATHS[number % 3],
            )


def this_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


@pytest.mark.parametrize("form", ["row", "column"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_stay_within_the_rounding_bound(kernels: Kernels, dtype: torch.dtype, form: str) -> None:
    for seed, case in enumerate(cases(dtype, form)):
        layer, x = random_layer(case, seed, "cuda")
        # Odd sizes have no cooperative kernel.
        served = kernels.check(layer.problem(case.tokens), case.path) is None
        path = case.path if served or case.path is KernelPath.GEMM else KernelPath.DECODE
        y, untouched = run_guarded(kernels, layer, x, path, this_stream())
        assert worst_error(layer, x, y) <= 2, case
        assert untouched, case


def real_case(path: KernelPath, tokens: int, *, index: bool = True) -> Case:
    sizes = {"in_features": 4096, "out_features": 4096, "rank": 1200}
    return Case(dtype=torch.bfloat16, form="row", tokens=tokens, index=index, bias=True, path=path, **sizes)


@pytest.mark.parametrize("path", PATHS)
def test_a_layer_of_a_real_model_is_the_same_every_time(kernels: Kernels, path: KernelPath) -> None:
    layer, x = random_layer(real_case(path, 8), 0, "cuda")
    first, _ = run_guarded(kernels, layer, x, path, this_stream())
    assert worst_error(layer, x, first) <= 2
    for _ in range(200):
        again, untouched = run_guarded(kernels, layer, x, path, this_stream())
        assert torch.equal(first, again)
        assert untouched


def layers_of_one_x(tokens: int, dtype: torch.dtype) -> tuple[list[PivotLayer], torch.Tensor]:
    """q, k and v of a LLaMA-3-8B, the last without an index."""
    common = {"in_features": 4096, "tokens": tokens, "dtype": dtype, "form": "row", "path": KernelPath.DECODE}
    sizes = ((4096, 1200), (1024, 512), (1024, 520))
    cases = [Case(**common, out_features=m, rank=r, index=r != 520, bias=r > 512) for m, r in sizes]  # type: ignore[arg-type]
    made = [random_layer(case, seed, "cuda") for seed, case in enumerate(cases)]
    return [layer for layer, _ in made], made[0][1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_one_x_give_in_one_call_what_each_gives_alone(
    kernels: Kernels, dtype: torch.dtype, tokens: int, path: KernelPath
) -> None:
    layers, x = layers_of_one_x(tokens, dtype)
    alone = [cuda_kernels.apply(kernels, layer, x, path) for layer in layers]
    for _ in range(20):
        together, untouched = run_group_guarded(kernels, layers, x, path, this_stream())
        assert untouched
        assert all(torch.equal(y, expected) for y, expected in zip(together, alone, strict=True))
    assert all(worst_error(layer, x, y) <= 2 for layer, y in zip(layers, alone, strict=True))


@pytest.mark.parametrize("form", ["row", "column"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_cooperative_launch_gives_the_bits_of_two(kernels: Kernels, dtype: torch.dtype, form: str) -> None:
    draw = random.Random(0)
    for seed in range(24):
        n, m = (8 * draw.choice((1, 2, 5, 72, 192, 512)) for _ in range(2))
        case = Case(
            dtype=dtype,
            form=form,
            tokens=draw.choice((1, 2, 3, 8, 17)),
            in_features=n,
            out_features=m + (seed % 7 if form == "row" else 0),
            rank=8 * draw.randint(1, min(n, m) // 8),
            index=form == "row" and seed % 2 == 0,
            bias=seed % 3 == 0,
            path=KernelPath.COOPERATIVE,
        )
        layer, x = random_layer(case, seed, "cuda")
        kernels.prepare(layer.problem(case.tokens), case.path)
        y, untouched = run_guarded(kernels, layer, x, case.path, this_stream())
        assert untouched, case
        assert torch.equal(y, run_guarded(kernels, layer, x, KernelPath.DECODE, this_stream())[0]), case


@pytest.mark.parametrize("path", [KernelPath.DECODE, KernelPath.COOPERATIVE])
def test_a_graph_of_groups_replays_what_the_stream_gives(kernels: Kernels, path: KernelPath) -> None:
    layers, x = layers_of_one_x(1, torch.bfloat16)
    eager = cuda_kernels.apply_group(kernels, layers, x, path)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [y for _ in range(8) for y in cuda_kernels.apply_group(kernels, layers, x, path)]
    for _ in range(20):
        for output in outputs:
            output.fill_(POISON)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(output, eager[i % 3]) for i, output in enumerate(outputs))


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 64])
@pytest.mark.parametrize("path", PATHS)
def test_a_graph_replays_what_the_stream_gives(kernels: Kernels, path: KernelPath, tokens: int, index: bool) -> None:
    layer, x = random_layer(real_case(path, tokens, index=index), 0, "cuda")
    kernels.prepare(layer.problem(tokens), path)
    eager = cuda_kernels.apply(kernels, layer, x, path)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Several in a row, so that a launch that overlaps the wrong grid shows.
        outputs = [cuda_kernels.apply(kernels, layer, x, path) for _ in range(8)]
    for _ in range(20):
        for output in outputs:
            output.fill_(POISON)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(output, eager) for output in outputs)
    _, other = random_layer(real_case(path, tokens, index=index), 1, "cuda")
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(output, cuda_kernels.apply(kernels, layer, other, path)) for output in outputs)


# Four cooperative launches at once each want the whole machine.
@pytest.mark.parametrize("paths", [(*PATHS, KernelPath.DECODE), (KernelPath.COOPERATIVE,) * 4])
def test_four_threads_on_four_streams_do_not_disturb_each_other(
    kernels: Kernels, paths: tuple[KernelPath, ...]
) -> None:
    work = [random_layer(real_case(paths[i], (1, 8, 16, 64)[i]), i, "cuda") for i in range(4)]
    alone = [cuda_kernels.apply(kernels, layer, x, paths[i]) for i, (layer, x) in enumerate(work)]
    torch.cuda.synchronize()
    wrong: list[str] = []

    def repeat(number: int) -> None:
        layer, x = work[number]
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(50):
                    y = cuda_kernels.apply(kernels, layer, x, paths[number])
                    if not torch.equal(y, alone[number]):
                        wrong.append(f"thread {number}, turn {turn}")
        except Exception as error:
            wrong.append(f"thread {number}: {error}")

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def judge_some_tokens(layer: PivotLayer, x: torch.Tensor, y: torch.Tensor) -> None:
    some = torch.tensor([0, 1, x.shape[0] // 2, x.shape[0] - 2, x.shape[0] - 1], device=x.device).clamp(min=0)
    assert worst_error(layer, x[some], y[some]) <= 2
    # Row by row: a mask of the whole would be another gigabyte, and isnan of 2^31 elements is what is in question.
    assert not any(bool(part.isnan().any()) for part in y.split(4096))


@pytest.mark.parametrize("path", PATHS)
def test_more_than_two_to_the_31_outputs(kernels: Kernels, path: KernelPath) -> None:
    if torch.cuda.mem_get_info()[0] < BIG_BYTES:
        pytest.skip("needs 60 GB of free GPU memory")
    case = Case(
        dtype=torch.float16,
        form="row",
        tokens=55_001,
        in_features=64,
        out_features=40_000,
        rank=40,
        index=True,
        bias=False,
        path=path,
    )
    layer, x = random_layer(case, 0, "cuda")
    assert case.tokens * case.out_features > 2**31
    y = torch.full((case.tokens, case.out_features), POISON, dtype=x.dtype, device="cuda")
    y.copy_(cuda_kernels.apply(kernels, layer, x, path))
    judge_some_tokens(layer, x, y)


def test_more_than_two_to_the_31_weights(kernels: Kernels) -> None:
    if torch.cuda.mem_get_info()[0] < BIG_BYTES:
        pytest.skip("needs 60 GB of free GPU memory")
    rank, m = 24_000, 115_000
    generator = torch.Generator("cuda").manual_seed(0)
    coefficients = torch.empty(m - rank, rank, dtype=torch.float16, device="cuda").uniform_(-1, 1, generator=generator)
    weight = torch.empty(rank, 64, dtype=torch.float16, device="cuda").uniform_(-1, 1, generator=generator)
    # r <= n is asked for, so the pivots read a wide x.
    wide = torch.nn.functional.pad(weight, (0, rank - 64))
    x = torch.randn(2, rank, generator=generator, device="cuda").half() / 64
    assert coefficients.numel() > 2**31
    y = cuda_kernels.apply(kernels, PivotLayer(pivot_weight=wide, coefficients=coefficients), x, KernelPath.DECODE)
    y_p = x[:, :64].float() @ weight.float().T
    for first in (0, (m - rank) // 2, m - rank - 100):
        rows = coefficients[first : first + 100].float()
        expected = y_p @ rows.T
        found = y[:, rank + first : rank + first + 100].float()
        assert float((found - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_module_uses_the_kernels_and_gives_the_same(kernels: Kernels, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = PifaLinear(1024, 768, 256, bias=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    layer.pivot_rows.copy_(torch.randperm(768)[:256].sort().values.int())
    layer.derive_output_index()
    layer = layer.to("cuda", dtype)
    x = torch.randn(2, 9, 1024, device="cuda", dtype=dtype)
    with torch.no_grad():
        plain = layer(x)
        cuda_kernels.enable(kernels.path)
        try:
            fast = layer(x)
        finally:
            cuda_kernels.disable()
    assert fast.shape == plain.shape
    error = (fast.double() - plain.double()).norm() / plain.double().norm()
    assert float(error) <= 8 * torch.finfo(dtype).eps
