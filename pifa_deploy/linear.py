"""The torch operator `pifa::linear` and the modules that stand where an `nn.Linear` stood."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pifa_deploy.factorization import PivotFactors, output_index


@torch.library.custom_op("pifa::linear", mutates_args=())
def pifa_linear(
    x: torch.Tensor,
    pivot_weight: torch.Tensor,
    coefficients: torch.Tensor,
    output_index: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies a pivot-factorised linear layer: the reference of `pifa::PifaLinear` version 1.

    Args:
        x: [..., n].
        pivot_weight: W_p [r, n], dtype of x.
        coefficients: C [m - r, r], dtype of x.
        output_index: int32 [m], or [0] when the pivots are the first r rows.
        bias: [m], dtype of x, or None.

    Returns:
        [..., m] with y_p = x W_p^T, y_np = y_p C^T, y = concat(y_p, y_np)[..., output_index] + bias.
    """
    y_p = x @ pivot_weight.T
    y = torch.cat([y_p, y_p @ coefficients.T], dim=-1)
    if output_index.numel():
        y = y.index_select(-1, output_index)
    return y if bias is None else y + bias


@pifa_linear.register_fake
def _(
    x: torch.Tensor,
    pivot_weight: torch.Tensor,
    coefficients: torch.Tensor,
    output_index: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], pivot_weight.shape[0] + coefficients.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, pivot_weight, coefficients, output_index, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, pivot_weight, coefficients, output_index)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, pivot_weight, coefficients, index = ctx.saved_tensors
    rank = pivot_weight.shape[0]
    vector = x.dim() == 1
    if vector:
        x, grad = x[None], grad[None]
    # torch drops an absent bias from the arguments, and from needs_input_grad with them.
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.has_bias and ctx.needs_input_grad[4] else None
    if index.numel():
        grad = torch.zeros_like(grad).index_add(-1, index, grad)
    grad_p, grad_np = grad[..., :rank], grad[..., rank:]
    grad_p = grad_p + grad_np @ coefficients
    rows_x, rows_p, rows_np = x.flatten(0, -2), grad_p.flatten(0, -2), grad_np.flatten(0, -2)
    grad_x = (grad_p[0] if vector else grad_p) @ pivot_weight if ctx.needs_input_grad[0] else None
    grad_w = rows_p.T @ rows_x if ctx.needs_input_grad[1] else None
    grad_c = rows_np.T @ (rows_x @ pivot_weight.T) if ctx.needs_input_grad[2] else None
    return grad_x, grad_w, grad_c, None, grad_bias


pifa_linear.register_autograd(_backward, setup_context=_setup_context)


_UNSET_ROW = -1


def _after_load(layer: PifaLinear, _: Any) -> None:
    # A state dict may come in parts: only what has been filled can be checked.
    if not layer.pivot_rows.is_meta and int(layer.pivot_rows[0]) != _UNSET_ROW:
        layer.derive_output_index()


class PifaLinear(nn.Module):
    """A linear layer stored as pivot factors.

    Parameters `pivot_weight` [r, n], `coefficients` [m - r, r], optional `bias` [m]; buffer `pivot_rows`
    int32 [r]. The operator's `output_index` follows from `pivot_rows` and is not saved.
    """

    pivot_rows: torch.Tensor
    output_index: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = False) -> None:
        """Makes an uninitialised layer; `from_factors` or loading a state dict fills it."""
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank is {rank}, expected 1 <= rank <= {min(in_features, out_features)}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.pivot_weight = nn.Parameter(torch.empty(rank, in_features))
        self.coefficients = nn.Parameter(torch.empty(out_features - rank, rank))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)
        self.register_buffer("pivot_rows", torch.full((rank,), _UNSET_ROW, dtype=torch.int32))
        self.register_buffer("output_index", None, persistent=False)
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    @classmethod
    def from_factors(cls, factors: PivotFactors, bias: torch.Tensor | None = None) -> PifaLinear:
        """Wraps factors without copying them; `bias` [m] is cast to their dtype."""
        rank, in_features = factors.pivot_weight.shape
        out_features = rank + factors.coefficients.shape[0]
        with torch.device("meta"):
            layer = cls(in_features, out_features, rank, bias=bias is not None)
        layer.pivot_weight = nn.Parameter(factors.pivot_weight)
        layer.coefficients = nn.Parameter(factors.coefficients)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(factors.pivot_weight))
        layer.pivot_rows = factors.pivot_rows
        layer.derive_output_index()
        return layer

    def derive_output_index(self) -> None:
        """Sets `output_index` from `pivot_rows`: empty when the pivots are the first r rows.

        Raises:
            ValueError: `pivot_rows` are not strictly ascending rows of the layer.
        """
        rows = self.pivot_rows.to("cpu")
        if int(rows[0]) < 0 or int(rows[-1]) >= self.out_features or bool((rows.diff() <= 0).any()):
            raise ValueError(
                f"pivot_rows are {rows.tolist()}, expected strictly ascending rows within 0 .. {self.out_features - 1}"
            )
        first = torch.equal(rows, torch.arange(self.rank, dtype=rows.dtype))
        index = torch.empty(0, dtype=torch.int32) if first else output_index(rows, self.out_features)
        self.output_index = index.to(self.pivot_rows.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., n] to [..., m]."""
        if self.output_index is None:
            raise RuntimeError("output_index is not set; call derive_output_index() after filling pivot_rows")
        y: torch.Tensor = torch.ops.pifa.linear(x, self.pivot_weight, self.coefficients, self.output_index, self.bias)
        return y

    def extra_repr(self) -> str:
        """Shape summary for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankLinear(nn.Module):
    """A linear layer stored as U [m, r], V [r, n]: the format PIFA is compared with."""

    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = False) -> None:
        """Makes an uninitialised layer."""
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.low_rank_u = nn.Parameter(torch.empty(out_features, rank))
        self.low_rank_v = nn.Parameter(torch.empty(rank, in_features))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    @classmethod
    def from_pair(cls, u: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> LowRankLinear:
        """Wraps U and V without copying them; `bias` [m] is cast to their dtype."""
        with torch.device("meta"):
            layer = cls(v.shape[1], u.shape[0], v.shape[0], bias=bias is not None)
        layer.low_rank_u, layer.low_rank_v = nn.Parameter(u), nn.Parameter(v)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(u))
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., n] to [..., m]."""
        return nn.functional.linear(nn.functional.linear(x, self.low_rank_v), self.low_rank_u, self.bias)

    def extra_repr(self) -> str:
        """Shape summary for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
