"""What NVIDIA publishes about GPUs: memory, bandwidth and peak rates, each figure with the document that has it.

TFLOP/s count a multiply-add as two. Tensor rates are those of fp16 (and bf16 where the GPU has it) with accumulation in
fp32, which GeForce runs at half the rate of fp16 accumulation. Where a document gives the sparse rate alone, dense is
half of it. A figure that no document of NVIDIA's is known to state, or to give the parts of, is None.
Documents were in part read in copies and quotations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

TURING = "NVIDIA Turing GPU Architecture whitepaper, appendix A (reference card)"
GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper v2"
ADA = "NVIDIA Ada GPU Architecture whitepaper v2.1, appendix A"
BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
RTX_4060 = "NVIDIA GeForce RTX 4060 family announcement"
RTX_4060_RATE = f"{RTX_4060}: an eighth of the tensor rate it gives, sparse FP8 with fp16 accumulation"
RTX_3060_RATE = f"{RTX_4060}: a quarter of the tensor rate it gives, sparse FP16 with fp16 accumulation"
RTX_3060_FP32 = "NVIDIA GeForce RTX 3060 product page: 2 x 3584 cores x 1.78 GHz"
RTX_4060_FP32 = "NVIDIA GeForce RTX 4060 product page: 2 x 3072 cores x 2.46 GHz"
A2 = "NVIDIA A2 datasheet"
L4 = "NVIDIA L4 datasheet"
A100 = "NVIDIA A100 datasheet (80GB SXM)"
H100 = "NVIDIA H100 datasheet (SXM)"
H200 = "NVIDIA H200 datasheet (SXM)"
B200 = "NVIDIA HGX B200 and DGX B200 datasheets, an eighth of the eight-GPU totals"
AGX_ORIN = "NVIDIA Jetson AGX Orin Series technical brief"
AGX_ORIN_RATE = f"{AGX_ORIN}: half of the 170 TOPS sparse INT8 of the GPU alone"
ORIN_NX = "NVIDIA Jetson Orin NX Series datasheet"
ORIN_NX_RATE = f"{ORIN_NX}: half of the 60 TOPS sparse INT8 of the GPU alone"
ORIN_NX_SUPER = "NVIDIA Jetson Linux, nvpmodel_p3767_0000_super.conf: the GPU at 1173 MHz"
ORIN_NX_SUPER_RATE = f"{ORIN_NX_SUPER}; {ORIN_NX_RATE} at 918 MHz"
ORIN_NX_SUPER_FP32 = f"{ORIN_NX_SUPER}: 2 x 1024 cores x 1.173 GHz"
ORIN_NANO = "NVIDIA Jetson Orin Nano Super Developer Kit datasheet"
ORIN_NANO_RATE = f"{ORIN_NANO}: half of its 67 TOPS sparse INT8"
ORIN_NANO_FP32 = f"{ORIN_NANO}: 2 x 1024 cores x 1.02 GHz"
THOR = "NVIDIA Jetson Thor Series Modules datasheet"
THOR_RATE = f"{THOR}: half of 517 TFLOPS dense FP8, which is the sparse FP16 rate"
THOR_FP32 = f"{THOR}: 2 x 2560 cores x 1.575 GHz"
SPARK = "NVIDIA DGX Spark hardware overview"
SPARK_FP32 = "NVIDIA at Hot Chips 2025, GB10"
AGX_XAVIER = "NVIDIA Jetson AGX Xavier Series datasheet"
XAVIER_NX = "NVIDIA Jetson Xavier NX datasheet"
RTX_20_LAPTOP = "NVIDIA GeForce RTX 20 laptop product page"
RTX_30_LAPTOP = "NVIDIA GeForce RTX 30 laptop product page"
RTX_30_LAPTOP_FP32 = f"{RTX_30_LAPTOP}: 2 x CUDA cores x the highest boost clock"
RTX_30_LAPTOP_RATE = f"{RTX_30_LAPTOP_FP32}, and twice that as for the GeForces in the {GA102}"
RTX_40_LAPTOP = "NVIDIA GeForce RTX 40 laptop product page"
RTX_40_LAPTOP_FP32 = f"{RTX_40_LAPTOP}: 2 x CUDA cores x the highest boost clock"
RTX_40_LAPTOP_RATE = f"{RTX_40_LAPTOP}: an eighth of its AI TOPS, sparse FP8 with fp16 accumulation"
RTX_50_LAPTOP = "NVIDIA GeForce RTX 50 laptop announcement"
RTX_50_LAPTOP_RATE = f"{RTX_50_LAPTOP}: a sixteenth of its AI TOPS, sparse FP4"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One published figure and the document that has it."""

    value: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Datasheet:
    """What is published about one GPU; None where nothing is.

    Attributes:
        memory_gb: memory size; of a Jetson or DGX Spark shared with the CPU.
        bandwidth_gb_s: peak memory bandwidth in 1e9 bytes a second.
        tensor_tflops: peak of dense fp16 matrix products with fp32 accumulation.
        sparse_tflops: the same with 2:4 sparse weights; None also where the GPU has no such units.
        fp32_tflops: peak of fp32 outside tensor cores.
    """

    memory_gb: Figure | None = None
    bandwidth_gb_s: Figure | None = None
    tensor_tflops: Figure | None = None
    sparse_tflops: Figure | None = None
    fp32_tflops: Figure | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns name -> {"value", "source"} or None."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: figure and {"value": figure.value, "source": figure.source} for name, figure in found.items()}


def _sheet(
    source: str,
    figures: tuple[float | None, float | None, float | None, float | None, float | None],
    *,
    rate: str = "",
    fp32: str = "",
) -> Datasheet:
    """Returns the datasheet of (memory, bandwidth, tensor, sparse, fp32); `rate` and `fp32` are other sources."""
    sources = (source, source, rate or source, rate or source, fp32 or source)
    found = [
        None if value is None else Figure(value=value, source=where)
        for value, where in zip(figures, sources, strict=True)
    ]
    return Datasheet(
        memory_gb=found[0],
        bandwidth_gb_s=found[1],
        tensor_tflops=found[2],
        sparse_tflops=found[3],
        fp32_tflops=found[4],
    )


# Laptops: clocks follow the power limit that a maker chose; rates are those of the highest one. NVIDIA gives no speed
# of their memory since RTX 30. DGX Spark and Xavier NX: no 16-bit rate of the GPU is published. The AI TOPS of desktop
# GeForces are 8 (RTX 40) and 16 (RTX 50) times the rate that whitepapers give here; so are taken those of laptops.
DATASHEETS: Mapping[str, Datasheet] = {
    #                                   GB    GB/s  fp16  2:4  fp32 TFLOP/s
    "xavier-nx": _sheet(XAVIER_NX, (8, 59.7, None, None, None)),
    "xavier-agx": _sheet(AGX_XAVIER, (32, 136.5, 11, None, 1.4)),
    "orin-nano": _sheet(ORIN_NANO, (8, 102, 16.75, 33.5, 2.09), rate=ORIN_NANO_RATE, fp32=ORIN_NANO_FP32),
    "orin-nx": _sheet(ORIN_NX, (16, 102.4, 15, 30, 1.88), rate=ORIN_NX_RATE),
    "orin-nx-super": _sheet(ORIN_NX, (16, 102.4, 19.2, 38.3, 2.4), rate=ORIN_NX_SUPER_RATE, fp32=ORIN_NX_SUPER_FP32),
    "orin-agx": _sheet(AGX_ORIN, (64, 204.8, 42.5, 85, 5.3), rate=AGX_ORIN_RATE),
    "thor": _sheet(THOR, (128, 273, 258.5, 517, 8.06), rate=THOR_RATE, fp32=THOR_FP32),
    "dgx-spark": _sheet(SPARK, (128, 273, None, None, 31), fp32=SPARK_FP32),
    "rtx2080ti": _sheet(TURING, (11, 616, 53.8, None, 13.4)),
    "rtx3060": _sheet(RTX_4060, (12, 360, 25.5, 51, 12.7), rate=RTX_3060_RATE, fp32=RTX_3060_FP32),
    "rtx3080": _sheet(GA102, (10, 760, 59.5, 119, 29.8)),
    "rtx3090": _sheet(GA102, (24, 936, 71, 142, 35.6)),
    "rtx4060": _sheet(RTX_4060, (8, 272, 30.25, 60.5, 15.1), rate=RTX_4060_RATE, fp32=RTX_4060_FP32),
    "rtx4070": _sheet(BLACKWELL, (12, 504, 58.3, 116.6, 29.1)),
    "rtx4090": _sheet(ADA, (24, 1008, 165.2, 330.4, 82.6)),
    "rtx5070": _sheet(BLACKWELL, (12, 672, 61.7, 123.5, 30.9)),
    "rtx5080": _sheet(BLACKWELL, (16, 960, 112.6, 225.1, 56.3)),
    "rtx5090": _sheet(BLACKWELL, (32, 1792, 209.5, 419, 104.8)),
    "rtx2080-laptop": _sheet(RTX_20_LAPTOP, (8, 448, None, None, None)),
    "rtx3060-laptop": _sheet(
        RTX_30_LAPTOP, (6, None, 26.2, 52.3, 13.1), rate=RTX_30_LAPTOP_RATE, fp32=RTX_30_LAPTOP_FP32
    ),
    "rtx3080-laptop": _sheet(RTX_30_LAPTOP, (16, None, 42, 84, 21), rate=RTX_30_LAPTOP_RATE, fp32=RTX_30_LAPTOP_FP32),
    "rtx4060-laptop": _sheet(
        RTX_40_LAPTOP, (8, None, 29.1, 58.25, 14.6), rate=RTX_40_LAPTOP_RATE, fp32=RTX_40_LAPTOP_FP32
    ),
    "rtx4070-laptop": _sheet(
        RTX_40_LAPTOP, (8, None, 40.1, 80.25, 20), rate=RTX_40_LAPTOP_RATE, fp32=RTX_40_LAPTOP_FP32
    ),
    "rtx4090-laptop": _sheet(
        RTX_40_LAPTOP, (16, None, 85.75, 171.5, 39.7), rate=RTX_40_LAPTOP_RATE, fp32=RTX_40_LAPTOP_FP32
    ),
    "rtx5070-laptop": _sheet(RTX_50_LAPTOP, (8, None, 49.9, 99.75, None), rate=RTX_50_LAPTOP_RATE),
    "rtx5080-laptop": _sheet(RTX_50_LAPTOP, (16, None, 83.4, 166.75, None), rate=RTX_50_LAPTOP_RATE),
    "rtx5090-laptop": _sheet(RTX_50_LAPTOP, (24, None, 114, 228, None), rate=RTX_50_LAPTOP_RATE),
    "a2": _sheet(A2, (16, 200, 18, 36, 4.5)),
    "l4": _sheet(L4, (24, 300, 121, 242, 30.3)),
    "a6000": _sheet(GA102, (48, 768, 154.8, 309.7, 38.7)),
    "a100": _sheet(A100, (80, 2039, 312, 624, 19.5)),
    "h100": _sheet(H100, (80, 3350, 989.5, 1979, 67)),
    "h200": _sheet(H200, (141, 4800, 989.5, 1979, 67)),
    "b200": _sheet(B200, (180, 8000, 2250, 4500, 75)),
}
