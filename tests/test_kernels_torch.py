"""The kernels behind `PifaLinear` in PyTorch, with host twins in place of the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import pytest
import torch
from kernel_fixtures import host_kernels, small_layer

from pifa_deploy import cuda_kernels
from pifa_deploy.cuda_kernels import KernelProblem, Kernels
from pifa_deploy.linear import PifaLinear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return host_kernels(tmp_path_factory.getbasetemp())


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
