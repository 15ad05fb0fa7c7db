"""What a GPU's datasheet allows a model: bounds by variant, layers better left dense, ranks that fill tiles."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from pifa_deploy.checkpoint import FactorizationRecord, read_config
from pifa_deploy.compression.allocation import AllocationOptions, allocate
from pifa_deploy.compression.decoder import decoder_layers, linear_shapes
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.gpu_limits import LimitOptions, Limits, limits_of
from pifa_deploy.importers.assembly import linear_at, skeleton
from pifa_deploy.roofline import (
    DENSE,
    PIFA,
    PIFA_FUSED,
    PIFA_PLAIN,
    SPARSE,
    VARIANTS,
    DecoderBound,
    Layer,
    break_even_density,
    decoder_bound,
    layer_seconds,
    padded_seconds,
    paying_tokens,
)
from pifa_deploy.targets import Target

NOTICE = "These are bounds from datasheets, not measurements; the cost of a kernel launch is an assumption."
MULTIPLES = (8, 16, 32, 64, 128)
# Linears that read one tensor and that builders merge into one product while they are dense.
_MERGED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
# No model has more layers; a configuration that claims so is refused before anything is built.
_MOST_LAYERS = 4096


@dataclass(frozen=True, kw_only=True)
class AdviseOptions:
    """What to bound.

    Attributes:
        tokens: tokens of one pass; 1 is decode.
        density: of a dense model's linears, had they been factorised; None for a factorised checkpoint.
        limits: dtype, and figures instead of the datasheet's.
    """

    tokens: tuple[int, ...] = (1, 512, 2048)
    density: float | None = None
    limits: LimitOptions = field(default_factory=LimitOptions)

    def __post_init__(self) -> None:
        """Raises ValueError for a value outside its range."""
        if not self.tokens or min(self.tokens) < 1 or len(set(self.tokens)) < len(self.tokens):
            raise ValueError(f"tokens are {list(self.tokens)}, expected different counts of at least 1")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise ValueError(f"density is {self.density}, expected 0 < density <= 1")


@dataclass(frozen=True, kw_only=True)
class LayerAdvice:
    """What the bounds say of one factorised layer, alone; sequences follow `Advice.tokens`.

    Attributes:
        layer: its shape and rank.
        dense_us: bounds when dense, microseconds.
        pifa_us: bounds as PIFA.
        break_even_density: largest density at which PIFA is faster than dense; 0 when none is.
        paying_tokens: ranges of token counts in which it is faster; a last of None is no end.
        leave_dense: the asked counts at which PIFA is not faster than dense.
    """

    layer: Layer
    dense_us: tuple[float, ...]
    pifa_us: tuple[float, ...]
    break_even_density: tuple[float, ...]
    paying_tokens: tuple[tuple[int, int | None], ...]
    leave_dense: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class RankMultiple:
    """All ranks rounded down to a multiple, tiles padded; sequences follow `Advice.tokens`.

    Attributes:
        multiple: of every rank; 1 is the ranks as they are.
        density: of the factorised layers then.
        seconds: PIFA bounds of all layers.
    """

    multiple: int
    density: float
    seconds: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Bounds for one model on one GPU.

    Attributes:
        target: the GPU.
        options: what was asked.
        limits: what the bounds were computed from.
        density: of the factorised layers.
        decoder: bounds by variant and token count.
        layers: factorised layers.
        kept: layers that are dense in every variant.
        multiples: ranks as they are, then rounded down to each multiple that fits every layer.
    """

    target: Target
    options: AdviseOptions
    limits: Limits
    density: float
    decoder: tuple[DecoderBound, ...]
    layers: tuple[LayerAdvice, ...]
    kept: tuple[Layer, ...]
    multiples: tuple[RankMultiple, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Token counts of the bounds."""
        return self.options.tokens

    def bound(self, variant: str, tokens: int) -> DecoderBound | None:
        """Returns the decoder's bound, None for a variant that this GPU does not run."""
        return next((one for one in self.decoder if (one.variant, one.tokens) == (variant, tokens)), None)

    def speed_up(self, variant: str, tokens: int, *, over: str = DENSE) -> float | None:
        """Returns how many times faster than another variant one can be, both at their bounds."""
        one, other = self.bound(variant, tokens), self.bound(over, tokens)
        return other.seconds / one.seconds if one and other else None

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {
            "notice": NOTICE,
            "target": {
                "name": self.target.name,
                "title": self.target.title,
                "compute_capability": self.target.compute_capability,
                "datasheet": self.target.datasheet.to_json(),
            },
            "options": asdict(self.options),
            "limits": self.limits.to_json(),
            "density": self.density,
            "decoder": [{**one.to_json(), "speed_up": self.speed_up(one.variant, one.tokens)} for one in self.decoder],
            "plugin_speed_up": [
                {"tokens": count, **{over: self.speed_up(PIFA, count, over=over) for over in (PIFA_PLAIN, PIFA_FUSED)}}
                for count in self.tokens
            ],
            "layers": [one.to_json() for one in self.layers],
            "kept": [asdict(one) for one in self.kept],
            "multiples": [one.to_json() for one in self.multiples],
        }


def advise(folder: Path, target: Target, options: AdviseOptions) -> Advice:
    """Returns the bounds for a model folder; reads config.json only.

    Args:
        folder: PIFA or low-rank checkpoint, or a dense model with `options.density`.
        target: the GPU.
        options: see AdviseOptions.

    Raises:
        InputMissingError: no such folder.
        InputRefusedError: config.json is malformed or describes no model.
        MissingCapabilityError: a figure that the bounds need is neither published nor given.
        MisfitError: bf16 on a GPU without it.
        ValueError: `options.density` is missing or too much.
    """
    limits = limits_of(target, options.limits)
    layers = read_layers(folder, options.density)
    factorised = [layer for layer in layers if layer.rank is not None]
    variants = [variant for variant in VARIANTS if variant != SPARSE or limits.sparse_peak is not None]
    return Advice(
        target=target,
        options=options,
        limits=limits,
        density=_density(factorised),
        decoder=tuple(
            decoder_bound(layers, variant, tokens, limits) for variant in variants for tokens in options.tokens
        ),
        layers=tuple(_layer_advice(layer, options.tokens, limits) for layer in factorised),
        kept=tuple(layer for layer in layers if layer.rank is None),
        multiples=_multiples(layers, options.tokens, limits),
    )


def read_layers(folder: Path, density: float | None) -> tuple[Layer, ...]:
    """Returns all linears of a model folder in the order of its modules; raises as `advise` does."""
    config = read_config(folder)
    where = str(folder / "config.json")
    found = config.pop("quantization_config", None)
    record = None if found is None else FactorizationRecord.from_json(found, where)
    if record is not None and density is not None:
        raise ValueError(f"{folder} is factorised already; --density is for a dense model")
    if record is None and density is None:
        raise ValueError(f"{folder} is a dense model; give the --density to bound it at, such as 0.5")
    model = skeleton(config, where=where, tensors=_MOST_LAYERS)
    ranks: Mapping[str, int]
    columns: set[str] = set()
    if record is not None:
        _check_shapes(model, record, where)
        ranks = {name: spec.rank for name, spec in record.modules.items()}
        columns = {name for name, spec in record.modules.items() if spec.format == "pifa-column"}
    else:
        assert density is not None
        path, decoder = decoder_layers(model, str(folder))
        ranks = allocate(linear_shapes(path, decoder), AllocationOptions(density=density)).ranks
    return linears_of(model, ranks, columns)


def linears_of(model: PreTrainedModel, ranks: Mapping[str, int], columns: Collection[str]) -> tuple[Layer, ...]:
    """Returns all linears of a model in the order of its modules; those without a rank are dense.

    Args:
        model: its shapes are all that is read.
        ranks: module -> rank.
        columns: modules in the column form.
    """
    return tuple(
        Layer(
            name=name,
            out_features=linear.out_features,
            in_features=linear.in_features,
            rank=ranks.get(name),
            column=name in columns,
            group=_merged_group(name),
        )
        for name, linear in model.named_modules()
        if isinstance(linear, nn.Linear)
    )


def _check_shapes(model: PreTrainedModel, record: FactorizationRecord, where: str) -> None:
    for name, spec in record.modules.items():
        linear = linear_at(model, name, where)
        if (linear.out_features, linear.in_features) != (spec.out_features, spec.in_features):
            raise InputRefusedError(
                f"{where}: {name} is recorded as {spec.out_features} x {spec.in_features}, the model has "
                f"{linear.out_features} x {linear.in_features} there"
            )


def _merged_group(name: str) -> str | None:
    """Returns the group of linears that builders merge into one product while they are dense, None for none."""
    parent, _, last = name.rpartition(".")
    return f"{parent}.{_MERGED[last]}" if last in _MERGED else None


def _density(layers: Sequence[Layer]) -> float:
    sizes = [layer.out_features * layer.in_features for layer in layers]
    stored = sum(layer.density * size for layer, size in zip(layers, sizes, strict=True))
    return stored / sum(sizes) if sizes else 1.0


def _layer_advice(layer: Layer, tokens: Sequence[int], limits: Limits) -> LayerAdvice:
    dense = tuple(layer_seconds(layer, DENSE, count, limits) * 1e6 for count in tokens)
    pifa = tuple(layer_seconds(layer, PIFA, count, limits) * 1e6 for count in tokens)
    return LayerAdvice(
        layer=layer,
        dense_us=dense,
        pifa_us=pifa,
        break_even_density=tuple(break_even_density(layer, count, limits) for count in tokens),
        paying_tokens=paying_tokens(layer, limits),
        leave_dense=tuple(count for count, one, other in zip(tokens, pifa, dense, strict=True) if one >= other),
    )


def _multiples(layers: Sequence[Layer], tokens: Sequence[int], limits: Limits) -> tuple[RankMultiple, ...]:
    smallest = min((layer.rank for layer in layers if layer.rank is not None), default=1)
    found = []
    for multiple in (1, *(one for one in MULTIPLES if one <= smallest)):
        rounded = [
            layer if layer.rank is None else replace(layer, rank=layer.rank // multiple * multiple) for layer in layers
        ]
        found.append(
            RankMultiple(
                multiple=multiple,
                density=_density([layer for layer in rounded if layer.rank is not None]),
                seconds=tuple(sum(padded_seconds(layer, count, limits) for layer in rounded) for count in tokens),
            )
        )
    return tuple(found)
