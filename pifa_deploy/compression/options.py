"""How to compress: everything that decides the result, and how the work is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pifa_deploy.calibration import CalibrationOptions
from pifa_deploy.compression.allocation import AllocationOptions
from pifa_deploy.compression.reconstruction import ReconstructionOptions
from pifa_deploy.compression.sparsity import PRUNING_METHODS
from pifa_deploy.layouts import check_layout
from pifa_deploy.model_folder import torch_dtype

LOW_RANK_METHODS = ("svd", "whitened", "mpifa")
METHODS = (*LOW_RANK_METHODS, *PRUNING_METHODS)
# These look at the weights alone.
WITHOUT_TEXT = ("svd", "magnitude")


@dataclass(frozen=True, kw_only=True)
class ActivationOptions:
    """How the activations of one layer are kept between its passes.

    Attributes:
        dtype: "fp32", "fp16" or "bf16".
        folder: keep them in files in a new folder inside this one; in memory when None.
        batch_tokens: about as many tokens are computed at once.
    """

    dtype: str = "fp32"
    folder: Path | None = None
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        torch_dtype(self.dtype)
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """How to compress.

    Attributes:
        density: 0 < density < 1, stored numbers of the factorised linears relative to the dense ones. The 2:4
            methods have one density, 0.5.
        method: "svd" (plain truncation), "whitened" (truncation on the inputs of the dense model), "mpifa"
            (truncation and reconstruction on the inputs of the compressed model), or a 2:4 pruning baseline
            "magnitude", "wanda", "ria", "sparsegpt".
        format: "pifa" or "lowrank" (U, V: fewer ranks for the same density); not for the 2:4 methods.
        layout: where the pivots of format "pifa" lie, see `layouts`: "auto", "pivoted" or "shared-mlp".
        dtype: dtype of the stored weights, "fp32", "fp16" or "bf16".
        include: patterns (fnmatch) of the linears to compress; all in the decoder layers when empty.
        exclude: patterns of linears to leave dense.
        rank_multiple: ranks are multiples of this, rounded down within the budget.
        attention_density: density of the attention linears, the MLP has what the budget leaves; None: the same.
        layer_density: "uniform", or "owl" or "effective-rank": layers that the statistic calls for get more.
        reconstruction: of method "mpifa".
        calibration: where the text comes from, see `calibration.calibration_set`; all methods but "svd" and
            "magnitude" need it.
        windows: which parts of the text.
        activations: how activations are kept.
        device: "cpu" or "cuda"; the GPU when there is one if None.
        force: replace an existing output folder.
        restart: forget what an interrupted run has done.
    """

    density: float = 0.5
    method: str = "mpifa"
    format: str = "pifa"
    layout: str = "auto"
    dtype: str = "fp32"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rank_multiple: int = 1
    attention_density: float | None = None
    layer_density: str = "uniform"
    reconstruction: ReconstructionOptions = field(default_factory=ReconstructionOptions)
    calibration: tuple[str, ...] = ()
    windows: CalibrationOptions = field(default_factory=CalibrationOptions)
    activations: ActivationOptions = field(default_factory=ActivationOptions)
    device: str | None = None
    force: bool = False
    restart: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        _ = self.allocation
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, expected one of {METHODS}")
        if self.is_pruning and self.density != 0.5:
            raise ValueError(f"density is {self.density}, method {self.method} prunes 2:4, which is 0.5; leave it out")
        spread = {"attention_density": None, "layer_density": "uniform", "rank_multiple": 1, "format": "pifa"}
        for name, neutral in spread.items():
            if self.is_pruning and getattr(self, name) != neutral:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, method {self.method} prunes all linears alike; leave it out"
                )
        if self.method != "mpifa" and self.reconstruction != ReconstructionOptions():
            raise ValueError(
                f"reconstruction is {self.reconstruction}, but method {self.method} has no reconstruction; leave out "
                "--dense-share, --ridge, --ridge-shape, --solver and --steps"
            )
        if self.needs_text and not self.calibration:
            raise ValueError(f"method {self.method} needs calibration text; pass --calibration FILE")
        check_layout(self.layout)
        torch_dtype(self.dtype)

    @property
    def allocation(self) -> AllocationOptions:
        """How the density is spread over the linears."""
        return AllocationOptions(
            density=self.density,
            attention_density=self.attention_density,
            layer_density=self.layer_density,
            rank_multiple=self.rank_multiple,
            format=self.format,
        )

    @property
    def is_pruning(self) -> bool:
        """Whether the result is a 2:4-sparse dense model."""
        return self.method in PRUNING_METHODS

    @property
    def needs_text(self) -> bool:
        """Whether activations decide anything."""
        return self.method not in WITHOUT_TEXT or self.layer_density != "uniform"

    @property
    def needs_dense_flow(self) -> bool:
        """Whether the dense model's activations are needed at each layer."""
        return self.method == "whitened" or (self.method == "mpifa" and self.reconstruction.dense_share > 0)

    @property
    def needs_compressed_flow(self) -> bool:
        """Whether the compressed model's activations are needed at each layer."""
        return self.method in ("mpifa", "wanda", "ria", "sparsegpt")
