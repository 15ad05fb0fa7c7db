"""The least time that a contender's linears take on a GPU, from its datasheet or from figures that a user gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pifa_deploy.advice import linears_of
from pifa_deploy.checkpoint import read_config
from pifa_deploy.gpu_limits import ITEMSIZES, LimitOptions, Limits, limits_of
from pifa_deploy.importers.assembly import skeleton
from pifa_deploy.roofline import DENSE, LOW_RANK_RANK, PIFA_FUSED, SPARSE, Layer, decoder_bound
from pifa_deploy.sparse_checkpoint import PATTERN
from pifa_deploy.targets import Target
from pifa_deploy.timed_contenders import TimedContender

# The rows of fewest launches: a bound holds for whatever runs the contender.
_VARIANTS = {"dense": DENSE, PATTERN: SPARSE, "lowrank": LOW_RANK_RANK, "pifa": PIFA_FUSED}
# No model has more layers; a configuration that claims so is refused before anything is built.
_MOST_LAYERS = 4096


@dataclass(frozen=True, kw_only=True)
class BoundOptions:
    """What to bound by; without a target both figures are needed.

    Attributes:
        target: a GPU of known figures.
        bandwidth_gb_s: instead of the datasheet's.
        peak_tflops: dense rate in the contender's dtype, instead of the datasheet's.
        launch_us: cost of one more kernel; assumed for a target and 0 without one when None.
        measured: whether the two figures were measured on this machine, not stated.
    """

    target: Target | None = None
    bandwidth_gb_s: float | None = None
    peak_tflops: float | None = None
    launch_us: float | None = None
    measured: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError where something is given that bounds nothing by itself, or is out of its range."""
        given = (self.bandwidth_gb_s, self.peak_tflops)
        if self.target is None and None in given and (*given, self.launch_us) != (None, None, None):
            raise ValueError("a bound needs --target, or both --bandwidth and --peak-tflops")
        self._limit_options("fp32")

    @property
    def asked(self) -> bool:
        """Whether there is anything to bound by."""
        return self.target is not None or self.bandwidth_gb_s is not None

    def limits(self, dtype: str) -> Limits:
        """Returns the rates for a dtype; raises as `limits_of`."""
        if self.target is not None:
            return limits_of(self.target, self._limit_options(dtype))
        assert self.bandwidth_gb_s is not None
        assert self.peak_tflops is not None
        return Limits(
            bandwidth=self.bandwidth_gb_s * 1e9,
            peak=self.peak_tflops * 1e12,
            sparse_peak=None,
            launch_seconds=(self.launch_us or 0.0) * 1e-6,
            itemsize=ITEMSIZES[dtype],
            tile=1,
            sources=dict.fromkeys(("bandwidth", "peak", "launch_seconds"), "measured" if self.measured else "given"),
        )

    def _limit_options(self, dtype: str) -> LimitOptions:
        return LimitOptions(
            dtype=dtype, bandwidth_gb_s=self.bandwidth_gb_s, peak_tflops=self.peak_tflops, launch_us=self.launch_us
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values, the target by its name."""
        return {**asdict(self), "target": self.target.name if self.target else None}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The bounds of one contender.

    Attributes:
        ms: for each number of tokens the least milliseconds of the linears, None where there is no bound.
        reason: why there is none although one was asked for.
    """

    ms: tuple[float | None, ...]
    reason: str | None = None


def bounds_of(contender: TimedContender, tokens: Sequence[int], options: BoundOptions) -> Bounds:
    """Returns the least time that passes of so many tokens, over all sequences, take in the linears.

    `advise` says what a bound leaves out.

    Raises:
        As `limits_of` and `read_config`.
    """
    nothing = (None,) * len(tokens)
    if not options.asked:
        return Bounds(ms=nothing)
    place = Path(contender.path)
    folder = place if place.is_dir() else place.parent
    reason = _unbounded(contender, folder, options)
    if reason:
        return Bounds(ms=nothing, reason=reason)
    limits, layers = options.limits(contender.dtype), _layers(contender, folder)
    variant = _VARIANTS[contender.kind]
    return Bounds(ms=tuple(decoder_bound(layers, variant, count, limits).seconds * 1e3 for count in tokens))


def _unbounded(contender: TimedContender, folder: Path, options: BoundOptions) -> str | None:
    """Returns why the time of a contender has no bound, None where it has one; raises as `limits_of`."""
    if contender.kind not in _VARIANTS:
        return f"its kind is {contender.kind}, and {', '.join(_VARIANTS)} are bounded"
    if contender.dtype not in ITEMSIZES:
        return f"its dtype is {contender.dtype}, and {', '.join(ITEMSIZES)} have rates"
    if not (folder / "config.json").is_file():
        return f"there is no config.json in {folder}, which tells the sizes of its linears"
    if contender.kind != PATTERN:
        return None
    if not contender.pruned:
        return "nothing beside it says which of its linears are 2:4"
    if options.limits(contender.dtype).sparse_peak is None:
        return f"no rate of 2:4 products in {contender.dtype} is known here"
    return None


def _layers(contender: TimedContender, folder: Path) -> tuple[Layer, ...]:
    """Returns all linears of the model, with ranks; a pruned one has rank 1, which 2:4 does not look at."""
    config = read_config(folder)
    config.pop("quantization_config", None)
    model = skeleton(config, where=str(folder / "config.json"), tensors=_MOST_LAYERS)
    ranks = {**contender.ranks, **dict.fromkeys(contender.pruned, 1)}
    columns = {name for name, spec in contender.modules.items() if spec.format == "pifa-column"}
    return linears_of(model, ranks, columns)
