"""The linears that ranks are given to, by their shapes."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """One linear W [out_features, in_features]: module path, decoder layer and "attention" or "mlp"."""

    name: str
    layer: int
    kind: str
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown kind or an empty matrix."""
        if self.kind not in KINDS:
            raise ValueError(f"{self.name}: kind is {self.kind!r}, expected one of {KINDS}")
        if min(self.out_features, self.in_features) < 1:
            raise ValueError(f"{self.name}: is {self.out_features} x {self.in_features}, expected at least 1 x 1")

    @property
    def size(self) -> int:
        """Numbers in the dense matrix."""
        return self.out_features * self.in_features
