"""Random layers for the kernels, and the rounding error that a correct kernel may show."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from pifa_deploy.cuda_kernels import KernelPath, Kernels, PivotLayer

ODD_SIZES = (1, 7, 8, 15, 16, 17, 31, 33, 576, 1536)
POISON = float("nan")
WORKSPACE_POISON = 1 << 20
GUARD = 64  # elements on either side of y that nobody may touch


PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
SHARED = ("-fPIC", "-shared", "-fvisibility=hidden")


def cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), *Path("/usr/local").glob("cuda-*")]
    if nvcc:
        folders.insert(0, Path(nvcc).resolve().parents[1])
    return next((folder / "include" for folder in folders if (folder / "include" / "cuda_fp16.h").is_file()), None)


def compile_host(output: Path, *sources: str, flags: tuple[str, ...] = SHARED) -> Path:
    """Compiles files of plugins/ with g++, or skips with what is missing."""
    headers, compiler = cuda_headers(), shutil.which("g++")
    if headers is None or compiler is None:
        pytest.skip("the host twins of the kernels are compiled with g++ and cuda_fp16.h; install the CUDA toolkit")
    always = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-isystem", str(headers), "-x", "c++"]
    files = [str(PLUGINS / source) for source in sources]
    command = [compiler, *always, *flags, *files, "-ldl", "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def host_kernels(folder: Path) -> Kernels:
    """Returns the host twins, compiled once into `folder`."""
    library = folder / "libpifa_kernels_host.so"
    return Kernels(library if library.is_file() else compile_host(library, "tests/kernelsHost.cpp"))


@dataclass(frozen=True, kw_only=True)
class Case:
    dtype: torch.dtype
    form: str
    tokens: int
    in_features: int
    out_features: int
    rank: int
    index: bool
    bias: bool
    path: KernelPath

    def __str__(self) -> str:
        kind = f"{str(self.dtype).removeprefix('torch.')}-{self.form}-{self.path.name.lower()}"
        size = f"t{self.tokens}-n{self.in_features}-m{self.out_features}-r{self.rank}"
        return f"{kind}-{size}{'-index' * self.index}{'-bias' * self.bias}"


def random_layer(case: Case, seed: int, device: str) -> tuple[PivotLayer, torch.Tensor]:
    """Returns a layer and x on `device`; coefficients are about as large as well chosen pivots make them."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(case.dtype)

    n, m, r = case.in_features, case.out_features, case.rank
    row = case.form == "row"
    permuted = torch.randperm(m if row else n, generator=generator, device=device).to(torch.int32)
    layer = PivotLayer(
        form=case.form,
        pivot_weight=normal(*((r, n) if row else (m, r)), scale=n**-0.5),
        coefficients=normal(*((m - r, r) if row else (r, n - r)), scale=0.5),
        index=permuted if case.index else None,
        bias=normal(m) if case.bias else None,
    )
    return layer, normal(case.tokens, n)


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


def expected_and_bound(layer: PivotLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns y in float64 and the componentwise error that one rounding of each stored result explains.

    With u the rounding unit of the dtype and gamma = K 2^-24 for fp32 sums of K terms, the intermediate is off by
    u |y_p| + gamma |W_p| |x|, which the second product passes on; u |bias| is the rounding before a bias is added.
    """
    dtype = layer.pivot_weight.dtype
    weight, coefficients, x = (each.double() for each in (layer.pivot_weight, layer.coefficients, x))
    unit = torch.finfo(dtype).eps / 2
    index = None if layer.index is None else layer.index.long()
    gamma = max(*weight.shape, *coefficients.shape) * 2.0**-24
    if layer.form == "row":
        y_p, size = x @ weight.T, x.abs() @ weight.abs().T
        inner = gamma * size
        y = torch.cat([y_p, y_p @ coefficients.T], dim=-1)
        bound = torch.cat([inner, (unit * y_p.abs() + inner) @ coefficients.abs().T], dim=-1)
        if index is not None:
            y, bound = y[:, index], bound[:, index]
    else:
        x = x if index is None else x[:, index]
        rank = weight.shape[1]
        z = x[:, :rank] + x[:, rank:] @ coefficients.T
        size = x[:, :rank].abs() + x[:, rank:].abs() @ coefficients.abs().T
        y = z @ weight.T
        bound = (unit * z.abs() + gamma * size) @ weight.abs().T
    if layer.bias is not None:
        y = y + layer.bias.double()
        bound = bound + unit * layer.bias.double().abs()
    return y, bound + unit * y.abs() + torch.finfo(dtype).smallest_normal * unit


def worst_error(layer: PivotLayer, x: torch.Tensor, y: torch.Tensor) -> float:
    """Returns the largest error in units of its bound: at most 2 for a correct kernel, NaN where y was not written."""
    if not y.numel():
        return 0.0
    expected, bound = expected_and_bound(layer, x)
    return float(((y.double() - expected).abs() / bound).max())


def run_guarded(
    kernels: Kernels, layer: PivotLayer, x: torch.Tensor, path: KernelPath, stream: int = 0
) -> tuple[torch.Tensor, bool]:
    """Runs a layer into poisoned memory; returns y and whether everything around y and the workspace is as it was."""
    (y,), untouched = run_group_guarded(kernels, [layer], x, path, stream)
    return y, untouched


def run_group_guarded(
    kernels: Kernels, layers: list[PivotLayer], x: torch.Tensor, path: KernelPath, stream: int = 0
) -> tuple[list[torch.Tensor], bool]:
    """The same for layers that read one x, in one call."""
    calls, outputs, guards, bounds = [], [], [], []
    for layer in layers:
        problem = layer.problem(x.shape[0])
        elements = x.shape[0] * problem.out_features
        around = torch.full((elements + 2 * GUARD,), POISON, dtype=x.dtype, device=x.device)
        y = around[GUARD : GUARD + elements].view(x.shape[0], problem.out_features)
        size = kernels.workspace_bytes(problem, path)
        workspace = torch.empty(size + GUARD, dtype=torch.uint8, device=x.device)
        workspace[-(GUARD + WORKSPACE_POISON) :] = 0xFF  # NaN in every dtype; what is staged lies at the end
        calls.append((problem, layer.buffers(x, y, workspace)))
        outputs.append(y)
        guards += [around[:GUARD], around[GUARD + elements :]]
        bounds.append(workspace[size:])
    if len(calls) == 1:
        kernels.enqueue(*calls[0], path=path, stream=stream)
    else:
        kernels.enqueue_group(calls, path=path, stream=stream)
    untouched = all(bool(each.isnan().all()) for each in guards)
    return outputs, untouched and all(bool((each == 0xFF).all()) for each in bounds)
