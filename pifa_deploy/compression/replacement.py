"""What stands in a dense linear's place: as stored, and as the calibration of later layers sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pifa_deploy.checkpoint import ModuleSpec
from pifa_deploy.factorization import factors_from_low_rank, output_index
from pifa_deploy.linear import LowRankLinear, PifaLinear


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """The stored tensors of one linear, without its bias.

    Attributes:
        kind: "pifa", "lowrank" or "2:4".
        tensors: suffix -> tensor on the CPU as the checkpoint has it; for "2:4" `weight` and bool `mask`.
        error: relative error of its outputs on the calibration inputs, or of its weight where there were none.
    """

    kind: str
    tensors: Mapping[str, torch.Tensor]
    error: float

    def spec(self) -> ModuleSpec:
        """Returns the record entry of a factorised linear."""
        if self.kind == "pifa":
            rank, in_features = self.tensors["pivot_weight"].shape
            out_features = rank + self.tensors["coefficients"].shape[0]
        else:
            out_features, rank = self.tensors["low_rank_u"].shape
            in_features = self.tensors["low_rank_v"].shape[1]
        return ModuleSpec(rank=rank, in_features=in_features, out_features=out_features, format=self.kind)

    def module(self, dense: nn.Linear) -> nn.Module:
        """Returns the module to save in place of `dense`."""
        dtype = next(tensor.dtype for tensor in self.tensors.values() if tensor.is_floating_point())
        with torch.device("meta"):
            if self.kind == "2:4":
                layer: nn.Module = nn.Linear(dense.in_features, dense.out_features, bias=dense.bias is not None)
            else:
                kind = PifaLinear if self.kind == "pifa" else LowRankLinear
                layer = kind(dense.in_features, dense.out_features, self.spec().rank, bias=dense.bias is not None)
        for suffix, tensor in self.tensors.items():
            if suffix == "pivot_rows":
                layer.register_buffer(suffix, tensor)
            elif suffix != "mask":
                setattr(layer, suffix, nn.Parameter(tensor, requires_grad=False))
        if dense.bias is not None:
            layer.bias = nn.Parameter(dense.bias.detach().to(dtype), requires_grad=False)
        if isinstance(layer, PifaLinear):
            layer.derive_output_index()
        return layer

    def weight(self) -> torch.Tensor:
        """Returns the matrix [m, n] that the stored tensors stand for, float32."""
        if self.kind == "2:4":
            return self.tensors["weight"].float()
        u, v = self._pair()
        return u @ v

    def flow_module(self, dense: nn.Linear) -> nn.Module:
        """Returns a float32 module that computes what the stored one will, in the device of `dense`.

        PIFA runs as the low-rank pair U = [I; C] (rows in place), V = W_p: the same numbers, and no scatter.
        """
        if self.kind == "2:4":
            layer: nn.Module = nn.Linear(dense.in_features, dense.out_features, device="meta")
            layer.weight = nn.Parameter(self.weight().to(dense.weight.device), requires_grad=False)
            layer.bias = dense.bias
            return layer
        u, v = self._pair()
        return LowRankLinear.from_pair(u.to(dense.weight.device), v.to(dense.weight.device), dense.bias)

    def _pair(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kind == "lowrank":
            return self.tensors["low_rank_u"].float(), self.tensors["low_rank_v"].float()
        coefficients = self.tensors["coefficients"].float()
        stacked = torch.cat([torch.eye(coefficients.shape[1]), coefficients])
        index = output_index(self.tensors["pivot_rows"], len(stacked)).long()
        return stacked[index], self.tensors["pivot_weight"].float()


def stored_pair(
    pair: tuple[torch.Tensor, torch.Tensor],
    kind: str,
    dtype: torch.dtype,
    *,
    error: float,
    root: torch.Tensor | None = None,
) -> Replacement:
    """Returns U [m, r], V [r, n] as they are stored: as pivot factors, best for inputs of `root`, or as they are.

    Raises:
        FactorizationError: there are no usable pivot factors.
    """
    if kind == "lowrank":
        u, v = (matrix.to("cpu", dtype).contiguous() for matrix in pair)
        return Replacement(kind=kind, tensors={"low_rank_u": u, "low_rank_v": v}, error=error)
    factors = factors_from_low_rank(pair[0].cpu(), pair[1].cpu(), dtype=dtype, root=root)
    return Replacement(
        kind=kind,
        tensors={
            "pivot_weight": factors.pivot_weight,
            "coefficients": factors.coefficients,
            "pivot_rows": factors.pivot_rows,
        },
        error=error,
    )
