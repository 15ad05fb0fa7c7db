"""The operator and its module against the dense product in float64."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from pifa_deploy.factorization import factors_from_low_rank
from pifa_deploy.linear import LowRankLinear, PifaLinear, pifa_linear

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# (m, n, pivot rows): pivots scattered, the first rows (no index), all rows (C empty), a single one, 1 x n, m x 1
CASES = {
    "scattered": (13, 7, [1, 2, 6, 11]),
    "first": (13, 7, [0, 1, 2]),
    "all": (5, 9, [0, 1, 2, 3, 4]),
    "one": (97, 31, [96]),
    "row": (1, 8, [0]),
    "column": (8, 1, [3]),
    "square": (64, 64, list(range(1, 64, 2))),
}
BATCHES = [(), (1,), (5,), (0,), (2, 3), (1, 1), (0, 4), (2, 1, 3)]


def operands(case: str, dtype: torch.dtype, *, batch: tuple[int, ...] = (3,), bias: bool = True) -> tuple[Any, ...]:
    """Returns (x, pivot_weight, coefficients, output_index, bias or None), |C| about 1."""
    m, n, pivots = CASES[case]
    rank = len(pivots)
    generator = torch.Generator().manual_seed(m * n + rank)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    others = [row for row in range(m) if row not in pivots]
    stored = pivots + others
    index = [] if stored == list(range(m)) else [stored.index(row) for row in range(m)]
    return (
        normal(*batch, n),
        normal(rank, n),
        normal(m - rank, rank),
        torch.tensor(index, dtype=torch.int32),
        normal(m) if bias else None,
    )


def dense_weight(case: str, pivot_weight: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Returns W [m, n] in float64: the definition, one row at a time."""
    m, n, pivots = CASES[case]
    w_p, c = pivot_weight.double(), coefficients.double()
    rows, rest = [], 0
    for row in range(m):
        if row in pivots:
            rows.append(w_p[pivots.index(row)])
        else:
            rows.append(sum(c[rest, k] * w_p[k] for k in range(len(pivots))))
            rest += 1
    return torch.stack(rows).reshape(m, n)


def forward_bound(case: str, args: tuple[Any, ...], *, probable: bool) -> torch.Tensor:
    """Returns the componentwise error bound of the two products in their own dtype.

    A product of k terms errs by at most gamma_k |a||b|, gamma_k = k u / (1 - k u), in any summation order
    (Higham, Accuracy and Stability, 3.5); y_p's error is then carried by |C|; every stored value and the
    sum with the bias round once more. `probable`: sqrt(k) for k, times 2 (Higham and Mary, SISC 2019), which
    holds for the norm of the error.
    """
    x, w_p, c, _, bias = (None if arg is None else arg.double() for arg in args)
    m, n, pivots = CASES[case]
    unit = torch.finfo(args[0].dtype).eps / 2

    def gamma(terms: int) -> float:
        k = 2 * math.sqrt(terms + 1) if probable else terms + 1
        return k * unit / (1 - k * unit)

    size_p, size_c = x.abs() @ w_p.abs().T, c.abs()
    error_p = gamma(n) * size_p
    error_np = (error_p + gamma(len(pivots)) * (size_p + error_p)) @ size_c.T
    size, error = torch.cat([size_p, size_p @ size_c.T], -1), torch.cat([error_p, error_np], -1)
    order = pivots + [row for row in range(m) if row not in pivots]
    place = torch.tensor([order.index(row) for row in range(m)])
    size, error = size[..., place], error[..., place]
    if bias is not None:
        error = error + unit * (size + error + bias.abs())
    # Below the normal range of float16 spacing is absolute.
    return error + (n + len(pivots) + 2) * torch.finfo(args[0].dtype).smallest_normal * unit


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_dense_product_within_rounding(case: str, dtype: torch.dtype, bias: bool) -> None:
    for batch in BATCHES:
        args = operands(case, dtype, batch=batch, bias=bias)
        exact = args[0].double() @ dense_weight(case, args[1], args[2]).T
        if bias:
            exact = exact + args[4].double()
        y = torch.ops.pifa.linear(*args)
        assert (y.shape, y.dtype) == ((*batch, CASES[case][0]), dtype)
        error = (y.double() - exact).abs()
        assert bool((error <= forward_bound(case, args, probable=False)).all())
        assert float(error.norm()) <= float(forward_bound(case, args, probable=True).norm())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("case", "batch"),
    [("scattered", batch) for batch in [(), (1,), (0,), (2, 3), (0, 4), (2, 1, 3)]]
    + [(case, (5,)) for case in ("first", "all")],
    ids=str,
)
def test_operator_passes_opcheck(case: str, batch: tuple[int, ...], bias: bool) -> None:
    args = operands(case, torch.float32, batch=batch, bias=bias)
    for tensor in (*args[:3], args[4]):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(torch.ops.pifa.linear.default, args)


def test_operator_passes_opcheck_on_an_input_that_is_not_contiguous() -> None:
    x, *rest = operands("scattered", torch.float32, batch=(2, 5, 3))
    for view in (x.transpose(0, 1), x.permute(2, 0, 1, 3), x[:, ::2], x.mT.contiguous().mT):
        torch.library.opcheck(torch.ops.pifa.linear.default, (view, *rest))


def test_operator_has_the_inputs_of_the_contract() -> None:
    from pifa_deploy import op_spec

    names = [argument.name for argument in torch.ops.pifa.linear.default._schema.arguments]
    assert names == [*op_spec.INPUTS, op_spec.OPTIONAL_INPUT]
    assert torch.ops.pifa.linear.default._schema.name == "pifa::linear"


class TestGradients:
    @pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3), (2, 1, 2)], ids=str)
    @pytest.mark.parametrize("case", ["scattered", "first", "all", "row", "column"])
    def test_agree_with_finite_differences(self, case: str, batch: tuple[int, ...]) -> None:
        x, w_p, c, index, bias = operands(case, torch.float64, batch=batch)
        inputs = [tensor.requires_grad_() for tensor in (x, w_p, c, bias)]
        assert torch.autograd.gradcheck(lambda x, w_p, c, b: pifa_linear(x, w_p, c, index, b), inputs)

    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("case", CASES)
    def test_agree_with_autograd_through_the_dense_product(self, case: str, bias: bool, batch: tuple[int, ...]) -> None:
        args = operands(case, torch.float64, batch=batch, bias=bias)
        leaves = [t for t in (args[0], args[1], args[2], args[4]) if t is not None]
        for leaf in leaves:
            leaf.requires_grad_()
        dense = args[0] @ dense_weight(case, args[1], args[2]).T
        dense = dense if args[4] is None else dense + args[4]
        upstream = torch.randn(dense.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        expected = torch.autograd.grad(dense, leaves, upstream, materialize_grads=True)
        found = torch.autograd.grad(torch.ops.pifa.linear(*args), leaves, upstream, materialize_grads=True)
        for have, want in zip(found, expected, strict=True):
            assert have.shape == want.shape
            # Both are float64 sums of at most 97 * 64 terms of order 1 to 100.
            assert torch.allclose(have, want, rtol=1e-11, atol=1e-11)

    def test_flow_only_to_what_requires_them(self) -> None:
        x, w_p, c, index, bias = operands("scattered", torch.float64)
        c.requires_grad_()
        pifa_linear(x, w_p, c, index, bias).sum().backward()
        assert c.grad is not None
        assert x.grad is None
        assert w_p.grad is None


def module_of(case: str, dtype: torch.dtype = torch.float64, *, bias: bool = True) -> PifaLinear:
    m, n, _ = CASES[case]
    generator = torch.Generator().manual_seed(4)
    rank = len(CASES[case][2])
    u = torch.randn(m, rank, dtype=torch.float64, generator=generator)
    v = torch.randn(rank, n, dtype=torch.float64, generator=generator)
    return PifaLinear.from_factors(factors_from_low_rank(u, v, dtype=dtype), torch.randn(m) if bias else None)


def only_call(graph: torch.fx.Graph) -> Any:
    calls = [node.target for node in graph.nodes if node.op.startswith("call")]
    assert len(calls) == 1, calls
    return calls[0]


class TestTracing:
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("case", ["scattered", "first", "all"])
    def test_export_sees_one_node(self, case: str, bias: bool) -> None:
        layer = module_of(case, torch.float32, bias=bias)
        x = torch.randn(4, CASES[case][1])
        tokens = torch.export.Dim("tokens", min=1, max=64)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},))
        assert only_call(program.graph) is torch.ops.pifa.linear.default
        more = torch.randn(9, CASES[case][1])
        assert torch.equal(program.module()(more), layer(more))

    def test_compile_sees_one_node_without_graph_breaks(self) -> None:
        layer = module_of("scattered", torch.float32)
        graphs: list[torch.fx.Graph] = []

        def eager(module: torch.fx.GraphModule, _: Any) -> Any:
            graphs.append(module.graph)
            return module.forward

        x = torch.randn(4, 7)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend=eager)(x), layer(x))
        assert len(graphs) == 1
        assert only_call(graphs[0]) is torch.ops.pifa.linear
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))

    def test_forward_runs_the_same_few_kernels_whatever_the_size(self) -> None:
        # A Python loop over rows or tokens would show as calls that grow with the size.
        counts = []
        for case, tokens in (("scattered", 1), ("square", 50)):
            with torch.profiler.profile() as profile:
                torch.ops.pifa.linear(*operands(case, torch.float32, batch=(tokens,)))
            counts.append(sum(event.count for event in profile.key_averages() if event.key.startswith("aten::")))
        assert counts[0] == counts[1]


class TestPifaLinear:
    @pytest.mark.parametrize("case", CASES)
    def test_state_dict_round_trip_derives_the_output_index(self, case: str) -> None:
        layer = module_of(case)
        state = layer.state_dict()
        assert sorted(state) == ["bias", "coefficients", "pivot_rows", "pivot_weight"]
        for assign in (False, True):
            with torch.device("meta" if assign else "cpu"):
                other = PifaLinear(layer.in_features, layer.out_features, layer.rank, bias=True)
            other = other.to(torch.float64)
            other.load_state_dict(state, assign=assign)
            x = torch.randn(3, layer.in_features, dtype=torch.float64)
            assert torch.equal(other(x), layer(x))
            assert torch.equal(other.output_index, layer.output_index)

    def test_round_trip_inside_a_model_derives_the_output_index(self) -> None:
        first, second = nn.Sequential(module_of("scattered")), nn.Sequential(PifaLinear(7, 13, 4, bias=True).double())
        second.load_state_dict(first.state_dict())
        x = torch.randn(3, 7, dtype=torch.float64)
        assert torch.equal(first(x), second(x))

    def test_forward_before_loading_is_refused(self) -> None:
        layer = PifaLinear(7, 13, 4)
        with pytest.raises(RuntimeError, match="output_index is not set; call derive_output_index"):
            layer(torch.randn(2, 7))

    def test_a_part_of_a_state_dict_does_not_make_it_ready(self) -> None:
        layer, state = PifaLinear(7, 13, 4), module_of("scattered", torch.float32, bias=False).state_dict()
        layer.load_state_dict({"pivot_weight": state.pop("pivot_weight")}, strict=False)
        with pytest.raises(RuntimeError, match="output_index is not set"):
            layer(torch.randn(2, 7))
        layer.load_state_dict(state, strict=False)
        assert layer(torch.randn(2, 7)).shape == (2, 13)

    @pytest.mark.parametrize("rows", [[0, 2, 2, 5], [3, 1, 4, 5], [0, 1, 2, 13], [-1, 0, 1, 2], [-2, 0, 1, 2]], ids=str)
    def test_pivot_rows_that_are_no_rows_in_order_are_refused(self, rows: list[int]) -> None:
        layer = PifaLinear(7, 13, 4)
        layer.pivot_rows.copy_(torch.tensor(rows))
        with pytest.raises(ValueError, match=r"pivot_rows are \[.*\], expected strictly ascending rows within 0 .. 12"):
            layer.derive_output_index()

    @pytest.mark.parametrize("rank", [0, -1, 8])
    def test_a_rank_that_no_layer_can_have_is_refused(self, rank: int) -> None:
        with pytest.raises(ValueError, match=rf"rank is {rank}, expected 1 <= rank <= 7"):
            PifaLinear(7, 13, rank)

    def test_pivots_that_are_the_first_rows_need_no_index(self) -> None:
        layer = PifaLinear(7, 13, 4)
        layer.pivot_rows.copy_(torch.arange(4))
        layer.derive_output_index()
        assert layer.output_index is not None
        assert layer.output_index.shape == (0,)

    def test_casting_and_copying_keep_the_index(self) -> None:
        layer = module_of("scattered")
        x = torch.randn(3, 7)
        half = copy.deepcopy(layer).half()
        assert half.pivot_rows.dtype == half.output_index.dtype == torch.int32
        assert half(x.half()).dtype == torch.float16
        assert torch.equal(copy.deepcopy(layer)(x.double()), layer(x.double()))

    def test_a_pickled_layer_computes_the_same(self) -> None:
        layer, file = module_of("scattered"), io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        x = torch.randn(3, 7, dtype=torch.float64)
        assert torch.equal(torch.load(file, weights_only=False)(x), layer(x))

    def test_from_factors_shares_memory_and_casts_the_bias(self) -> None:
        u, v = torch.randn(9, 3), torch.randn(3, 6)
        factors = factors_from_low_rank(u, v)
        layer = PifaLinear.from_factors(factors, torch.ones(9, dtype=torch.float64))
        assert layer.pivot_weight.data_ptr() == factors.pivot_weight.data_ptr()
        assert layer.coefficients.data_ptr() == factors.coefficients.data_ptr()
        assert layer.bias.dtype == torch.float32
        assert "in_features=6, out_features=9, rank=3" in repr(layer)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_low_rank_linear_is_the_product_of_its_pair(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    u, v, x, b = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in [(9, 3), (3, 6), (2, 5, 6), (9,)])
    layer = LowRankLinear.from_pair(u, v, b if bias else None)
    expected = torch.einsum("abn,rn,mr->abm", x, v, u) + (b if bias else 0)
    assert torch.allclose(layer(x), expected, rtol=1e-13, atol=1e-13)  # float64 sums of 18 terms of order 1
    assert (layer.in_features, layer.out_features, layer.rank) == (6, 9, 3)
