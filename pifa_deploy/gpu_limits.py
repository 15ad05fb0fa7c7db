"""What a GPU can do at most, from its datasheet or from figures that a user gives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pifa_deploy.datasheets import Figure
from pifa_deploy.errors import MisfitError, MissingCapabilityError
from pifa_deploy.targets import Target

ITEMSIZES = {"fp16": 2, "bf16": 2, "fp32": 4}
# Microseconds that one more kernel of a CUDA graph costs, by compute capability. No datasheet has it: assumed.
LAUNCH_US = {"7.2": 3.5, "8.7": 3.5, "11.0": 2.0, "12.1": 2.0}
LAUNCH_US_ELSEWHERE = 1.3
# Tensor instructions take 8 of a product's depth on Volta and Turing, 16 from Ampere on; those of Hopper and of
# data-centre Blackwell (also Thor) take 64 outputs at a time.
_TILES = {"7": 8, "8": 16, "12": 16, "9": 64, "10": 64, "11": 64}


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What to bound by.

    Attributes:
        dtype: "fp16", "bf16" or "fp32".
        bandwidth_gb_s: instead of the datasheet's.
        peak_tflops: dense rate instead of the datasheet's; the sparse rate is then twice that.
        launch_us: microseconds that one more kernel costs; assumed by compute capability when None.
    """

    dtype: str = "fp16"
    bandwidth_gb_s: float | None = None
    peak_tflops: float | None = None
    launch_us: float | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        if self.dtype not in ITEMSIZES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(ITEMSIZES)}")
        for name in ("bandwidth_gb_s", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, expected a positive number")
        if self.launch_us is not None and not 0 <= self.launch_us < math.inf:
            raise ValueError(f"launch_us is {self.launch_us}, expected at least 0")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Rates of one GPU in bytes, FLOPs and seconds.

    Attributes:
        bandwidth: bytes a second.
        peak: dense FLOPs a second.
        sparse_peak: the same with 2:4 weights, None without such units.
        launch_seconds: cost of one more kernel.
        itemsize: bytes a number.
        tile: what tensor cores pad a rank to.
        sources: where bandwidth, peak, sparse_peak and launch_seconds come from.
    """

    bandwidth: float
    peak: float
    sparse_peak: float | None
    launch_seconds: float
    itemsize: int
    tile: int
    sources: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


def limits_of(target: Target, options: LimitOptions) -> Limits:
    """Returns what a GPU can do at most.

    Raises:
        MissingCapabilityError: a figure that bounds need is neither published nor given; names all of them.
        MisfitError: bf16 on a GPU without it.
    """
    sheet, capability = target.datasheet, target.compute_capability
    half, turing = options.dtype != "fp32", capability.startswith("7.")
    if options.dtype == "bf16" and turing:
        raise MisfitError(f"{target.title} has compute capability {capability}, bf16 needs 8.0; take --dtype fp16")
    bandwidth = _chosen(options.bandwidth_gb_s, sheet.bandwidth_gb_s)
    peak = _chosen(options.peak_tflops, sheet.tensor_tflops if half else sheet.fp32_tflops)
    if bandwidth is None or peak is None:
        missing = ["memory bandwidth (give --bandwidth GB/s)"] if bandwidth is None else []
        missing += [f"peak {options.dtype} rate (give --peak-tflops TFLOP/s)"] if peak is None else []
        raise MissingCapabilityError(
            f"{target.title}: no document of NVIDIA's is known here for the {' and for the '.join(missing)}, so "
            "nothing is bounded"
        )
    sparse = None
    if half and not turing:
        published = sheet.sparse_tflops if options.peak_tflops is None else None
        sparse = published or Figure(value=2 * peak.value, source="twice the dense rate")
    launch_us = LAUNCH_US.get(capability, LAUNCH_US_ELSEWHERE) if options.launch_us is None else options.launch_us
    sources = {"bandwidth": bandwidth.source, "peak": peak.source}
    if sparse is not None:
        sources["sparse_peak"] = sparse.source
    return Limits(
        bandwidth=bandwidth.value * 1e9,
        peak=peak.value * 1e12,
        sparse_peak=None if sparse is None else sparse.value * 1e12,
        launch_seconds=launch_us * 1e-6,
        itemsize=ITEMSIZES[options.dtype],
        tile=_TILES[capability.partition(".")[0]],
        sources={**sources, "launch_seconds": "assumed" if options.launch_us is None else "given"},
    )


def _chosen(given: float | None, published: Figure | None) -> Figure | None:
    return published if given is None else Figure(value=given, source="given")
