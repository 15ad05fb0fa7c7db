"""How much density each decoder layer calls for, from the dense model's activations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pifa_deploy.compression.decoder import linear_groups
from pifa_deploy.compression.distributed import Processes
from pifa_deploy.compression.flow import DENSE, Flows, LayerFlow, resident
from pifa_deploy.compression.layer_density import effective_rank, pooled_outlier_ratio
from pifa_deploy.compression.linear_shape import LinearShape
from pifa_deploy.compression.options import CompressOptions
from pifa_deploy.compression.statistics import InputMoments

_ENTRY = "entry of the first layer"


def layer_scores(
    layers: nn.ModuleList, shapes: Sequence[LinearShape], options: CompressOptions, *, group: Processes, flows: Flows
) -> dict[int, float]:
    """Returns decoder layer -> score: its outlier ratio (OWL), or the effective rank of its linears.

    The effective rank is the mean over a layer's linears, weighed by their size, of exp(entropy) / min(m, n).
    All layers are run once; `flows` then stands at the entry of the first layer again, without a DENSE slot if the
    method does not need it.

    Args:
        layers: the decoder layers.
        shapes: the linears to compress.
        options: `layer_density` says which score.
        group: the processes, which share batches.
        flows: with a DENSE slot.

    Raises:
        StageFailedError: NaN or Inf activations; names the linear.
    """
    for batch in flows.numbers:
        flows.store.put(_ENTRY, batch, flows.store.get(DENSE, batch, group.device))
    scores = {}
    for number, layer in enumerate(layers):
        paths = [shape.name for shape in shapes if shape.layer == number]
        scores[number] = _score(resident(layer, group.device), paths, options, group=group, flows=(flows, number))
    flows.store.drop(DENSE)
    if options.needs_dense_flow or not options.needs_compressed_flow:
        for batch in flows.numbers:
            flows.store.put(DENSE, batch, flows.store.get(_ENTRY, batch, group.device))
    flows.store.drop(_ENTRY)
    return {number: score for number, score in scores.items() if any(shape.layer == number for shape in shapes)}


def _score(
    layer: nn.Module,
    paths: Sequence[str],
    options: CompressOptions,
    *,
    group: Processes,
    flows: tuple[Flows, int],
) -> float:
    flow, number = flows
    batch = flow.numbers[0]
    hidden = flow.store.get(DENSE, batch, group.device)
    moments: dict[str, InputMoments] = {}
    hooks = {}
    for found in linear_groups(layer, flow.call(batch, number), hidden):
        shared = InputMoments(found.in_features, group.device, cross=False)
        hooks[found.names[0]] = shared.add
        moments |= {path: shared for path in paths for name in found.names if path.endswith(f".{number}.{name}")}
    LayerFlow(flow, DENSE, layer, number=number).finish(lambda _: hooks)
    for path, shared in {id(moment): (path, moment) for path, moment in moments.items()}.values():
        shared.reduce(group, path)
    linears = [
        (layer.get_parameter(f"{path.partition(f'.{number}.')[2]}.weight").detach(), moment.gram)
        for path, moment in moments.items()
    ]
    if not linears:
        return 0.0
    if options.layer_density == "owl":
        diagonals = [(weight, gram.diagonal()) for weight, gram in linears]
        return pooled_outlier_ratio(diagonals, multiple=options.allocation.owl_multiple)
    ranks = [effective_rank(weight, gram) / min(weight.shape) for weight, gram in linears]
    sizes = [weight.numel() for weight, _ in linears]
    return sum(rank * size for rank, size in zip(ranks, sizes, strict=True)) / sum(sizes)
