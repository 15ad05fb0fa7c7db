"""One PIFA layer in the runtime against float64, in units of a bound that the kernels' tests have too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_fixtures import dense_decoder, export, factorised_decoder, mixed, save_decoder
from kernel_fixtures import Case, random_layer
from kernel_fixtures import expected_and_bound as kernels_bound

from pifa_deploy.column_linear import PifaColumnLinear
from pifa_deploy.cuda_kernels import KernelPath, PivotLayer
from pifa_deploy.errors import StageFailedError
from pifa_deploy.graph_cut import CutGraph
from pifa_deploy.linear import PifaLinear
from pifa_deploy.onnx_folder import open_folder
from pifa_deploy.operator_parity import expected_and_bound, measure_operators, operator_ends
from pifa_deploy.residual_stream import boundaries


def case(form: str, dtype: torch.dtype, *, rank: int = 24, bias: bool = True) -> Case:
    sizes = {"tokens": 9, "in_features": 40, "out_features": 56, "rank": rank}
    return Case(form=form, dtype=dtype, index=False, bias=bias, path=KernelPath.GEMM, **sizes)  # type: ignore[arg-type]


def as_module(layer: PivotLayer, pivots: list[int] | None) -> PifaLinear | PifaColumnLinear:
    if layer.form == "column":
        return PifaColumnLinear.from_factors(layer.pivot_weight, layer.coefficients, layer.bias)
    rank, n = layer.pivot_weight.shape
    found = PifaLinear(n, rank + len(layer.coefficients), rank, bias=layer.bias is not None)
    found.pivot_weight.data, found.coefficients.data = layer.pivot_weight, layer.coefficients
    found.pivot_rows.copy_(torch.tensor(pivots or range(rank)))
    found.derive_output_index()
    if layer.bias is not None:
        found.bias = torch.nn.Parameter(layer.bias)
    return found


class TestBound:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("form", ["row", "column"])
    @pytest.mark.parametrize("rank", [1, 24, 40])
    def test_is_the_one_of_the_kernels(self, rank: int, form: str, dtype: torch.dtype) -> None:
        layer, x = random_layer(case(form, dtype, rank=rank), 1, "cpu")
        found, expected = expected_and_bound(as_module(layer, None), x, dtype), kernels_bound(layer, x)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)

    def test_follows_the_pivot_rows(self) -> None:
        layer, x = random_layer(case("row", torch.float32, bias=False), 2, "cpu")
        pivots = sorted(torch.randperm(56, generator=torch.Generator().manual_seed(0))[:24].tolist())
        y, bound = expected_and_bound(as_module(layer, pivots), x, torch.float32)
        plain_y, plain_bound = expected_and_bound(as_module(layer, None), x, torch.float32)
        others = [row for row in range(56) if row not in pivots]
        assert torch.equal(y[:, pivots + others], plain_y)
        assert torch.equal(bound[:, pivots + others], plain_bound)

    def test_weights_are_rounded_first(self) -> None:
        layer, x = random_layer(case("row", torch.float32, bias=False), 3, "cpu")
        module = as_module(layer, None)
        y, _ = expected_and_bound(module, x.half(), torch.float16)
        w, c = layer.pivot_weight.half().double().numpy(), layer.coefficients.half().double().numpy()
        y_p = x.half().double().numpy() @ w.T
        np.testing.assert_allclose(y.numpy(), np.concatenate([y_p, y_p @ c.T], -1), rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_sums_in_the_narrow_dtype_do_not_fit_and_sums_in_fp32_do(self, dtype: torch.dtype) -> None:
        layer, x = random_layer(case("row", dtype, bias=False), 4, "cpu")
        y, bound = expected_and_bound(as_module(layer, None), x, dtype)
        w, c = layer.pivot_weight, layer.coefficients

        def product(left: torch.Tensor, right: torch.Tensor, held: torch.dtype) -> torch.Tensor:
            total = torch.zeros(len(left), len(right), dtype=held)
            for k in range(left.shape[1]):
                total = (total.float() + left[:, k : k + 1].float() * right[:, k].float()).to(held)
            return total.to(dtype)

        for held, fits in ((torch.float32, True), (dtype, False)):
            y_p = product(x, w, held)
            found = torch.cat([y_p, product(y_p, c, held)], -1).double()
            rho = float(((found - y).abs() / bound).max())
            assert (rho <= 2) is fits, rho


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Ranks of 1, no coefficients, first rows and scattered rows; a bias behind some products."""
    root = tmp_path_factory.mktemp("operators")
    model, _ = factorised_decoder(dense_decoder("qwen2"), mixed)
    export(save_decoder(model, root / "checkpoint"), root / "fp16", dtype="fp16")
    return model, root / "fp16"


class TestInTheRuntime:
    def test_every_form_of_layer_is_run_on_its_own_input(self, folder: tuple[Any, Path]) -> None:
        model, path = folder
        ids = np.random.default_rng(0).integers(3, 60, 50)
        graph = CutGraph(open_folder(path))
        found = measure_operators(model, graph, ids)
        assert len(found) == 14
        assert max(each.rho for each in found) < 1.2
        assert min(each.max_error for each in found) > 0
        assert {each.positions for each in found} == {50}
        kinds = {(node.op_type, node.attributes["rank"].as_int() == 1) for node in nodes(path)}
        assert {kind for kind, _ in kinds} == {"PifaLinear", "PifaOrderedLinear"}

    def test_a_layer_that_is_not_there_counts_as_wrong(self, folder: tuple[Any, Path]) -> None:
        model, path = folder
        graph = CutGraph(open_folder(path))
        for node in graph.nodes:
            if node.name.endswith("1.mlp.up_proj"):
                node.name = "lost"
        graph.initializers = {
            name: value for name, value in graph.initializers.items() if not name.startswith("model.layers.1.mlp.up")
        }
        found = {each.module: each.rho for each in measure_operators(model, graph, np.arange(3, 20))}
        assert found.pop("model.layers.1.mlp.up_proj") == float("inf")
        assert max(found.values()) < 2

    def test_ends_include_a_bias_that_is_added_behind(self, folder: tuple[Any, Path]) -> None:
        graph = CutGraph(open_folder(folder[1]))
        path = "model.layers.0.self_attn.q_proj"
        plain, whole = operator_ends(graph, path), operator_ends(graph, path, biased=True)
        assert plain is not None
        assert whole is not None
        inside = [graph.nodes[i].op_type for i in graph.between({whole[0]}, [whole[1]])]
        assert inside in (["PifaLinear"], ["PifaLinear", "Add"])
        assert operator_ends(graph, "model.layers.9.self_attn.q_proj") is None

    def test_a_cut_that_cannot_run_says_which_value(self, folder: tuple[Any, Path]) -> None:
        graph = CutGraph(open_folder(folder[1]))
        ends = operator_ends(graph, "model.layers.0.mlp.up_proj")
        assert ends is not None
        with pytest.raises(StageFailedError, match=f"could not run the part that makes {ends[1]}"):
            graph.run({ends[0]: np.zeros((2, 3, 5), np.float16)}, [ends[1]])

    def test_the_residual_stream_is_found_by_its_structure(self, folder: tuple[Any, Path]) -> None:
        found = boundaries(CutGraph(open_folder(folder[1])))
        layers = [f"model.layers.{i}.{name}_layernorm" for i in (0, 1) for name in ("input", "post_attention")]
        assert [boundary.norm for boundary in found] == [*layers, "model.norm"]


def nodes(path: Path) -> list[Any]:
    import onnx_ir as ir

    return [node for node in ir.load(path / "model.onnx").graph if node.domain == "pifa"]
