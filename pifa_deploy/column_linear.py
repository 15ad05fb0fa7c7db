"""The torch operator `pifa::column_linear` and its module: pivot factors of a matrix's columns.

W [m, n] = [W_c, W_c D] with the first r columns W_c as pivots, so that y = W_c (x_p + D x_np): what has to be in
order is the input, and the output is in its own. For a layer whose inputs may be numbered at will (see `layouts`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.library.custom_op("pifa::column_linear", mutates_args=())
def pifa_column_linear(
    x: torch.Tensor,
    pivot_weight: torch.Tensor,
    coefficients: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies a linear layer in column form: the reference of `pifa::PifaColumnLinear` version 1.

    Args:
        x: [..., n]; the first r inputs are the pivots.
        pivot_weight: W_c [m, r], dtype of x.
        coefficients: D [r, n - r], dtype of x.
        bias: [m], dtype of x, or None.

    Returns:
        [..., m] with z = x[..., :r] + x[..., r:] D^T, y = z W_c^T + bias.
    """
    rank = pivot_weight.shape[1]
    y = (x[..., :rank] + x[..., rank:] @ coefficients.T) @ pivot_weight.T
    return y if bias is None else y + bias


@pifa_column_linear.register_fake
def _(
    x: torch.Tensor, pivot_weight: torch.Tensor, coefficients: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], pivot_weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, pivot_weight, coefficients, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, pivot_weight, coefficients)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, pivot_weight, coefficients = ctx.saved_tensors
    rank = pivot_weight.shape[1]
    rows_x, rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    # torch drops an absent bias from the arguments, and from needs_input_grad with them.
    grad_bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
    rows_z = rows @ pivot_weight
    grad_x = torch.cat([rows_z, rows_z @ coefficients], dim=-1).reshape(x.shape) if ctx.needs_input_grad[0] else None
    z = rows_x[:, :rank] + rows_x[:, rank:] @ coefficients.T if ctx.needs_input_grad[1] else None
    grad_w = None if z is None else rows.T @ z
    grad_d = rows_z.T @ rows_x[:, rank:] if ctx.needs_input_grad[2] else None
    return grad_x, grad_w, grad_d, grad_bias


pifa_column_linear.register_autograd(_backward, setup_context=_setup_context)


class PifaColumnLinear(nn.Module):
    """A linear layer in column form.

    Parameters `pivot_weight` [m, r], `coefficients` [r, n - r], optional `bias` [m].
    """

    bias: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = False) -> None:
        """Makes an uninitialised layer; `from_factors` or loading a state dict fills it."""
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank is {rank}, expected 1 <= rank <= {min(in_features, out_features)}")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.pivot_weight = nn.Parameter(torch.empty(out_features, rank))
        self.coefficients = nn.Parameter(torch.empty(rank, in_features - rank))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    @classmethod
    def from_factors(
        cls, pivot_weight: torch.Tensor, coefficients: torch.Tensor, bias: torch.Tensor | None = None
    ) -> PifaColumnLinear:
        """Wraps W_c [m, r] and D [r, n - r] without copying them; `bias` [m] is cast to their dtype."""
        out_features, rank = pivot_weight.shape
        with torch.device("meta"):
            layer = cls(rank + coefficients.shape[1], out_features, rank, bias=bias is not None)
        layer.pivot_weight, layer.coefficients = nn.Parameter(pivot_weight), nn.Parameter(coefficients)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(pivot_weight))
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., n] to [..., m]."""
        y: torch.Tensor = torch.ops.pifa.column_linear(x, self.pivot_weight, self.coefficients, self.bias)
        return y

    def extra_repr(self) -> str:
        """Shape summary for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
