"""One linear layer at a time: from its weight and what flows into it to what replaces it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pifa_deploy.compression.clock import StepClock
from pifa_deploy.compression.options import CompressOptions
from pifa_deploy.compression.reconstruction import Reconstruction
from pifa_deploy.compression.replacement import Replacement, stored_pair
from pifa_deploy.compression.sparsity import prune_2_4
from pifa_deploy.compression.statistics import InputMoments, damped_root
from pifa_deploy.compression.truncation import truncated_svd, whitened_svd
from pifa_deploy.errors import FactorizationError, StageFailedError
from pifa_deploy.model_folder import torch_dtype


@dataclass(frozen=True, kw_only=True)
class Target:
    """A linear to replace.

    Attributes:
        path: within the model, for messages.
        layer: the dense linear, float32, on the device that computes.
        rank: of its factors; 0 for 2:4 pruning.
    """

    path: str
    layer: nn.Linear
    rank: int


def solve_group(
    targets: Mapping[str, Target], moments: InputMoments | None, options: CompressOptions, *, clock: StepClock
) -> dict[str, Replacement]:
    """Returns name -> replacement of linears that read the same tensor.

    Args:
        targets: name -> linear.
        moments: of what they read; None for methods that look at weights alone.
        options: method, format, dtype.
        clock: gets the steps "solves" and "pivoting".

    Raises:
        FactorizationError: a linear has no usable pivot factors; names it.
        StageFailedError: the statistics are singular; names the linear.
    """
    if not targets:
        return {}
    with clock.step("solves"):
        shared = _reconstruction(moments, options, next(iter(targets.values())).path)
    with clock.step("pivoting"):
        pivots = moments is not None and options.format == "pifa" and not options.is_pruning
        root = damped_root(moments.gram) if pivots and moments else None
    found = {}
    for name, target in targets.items():
        try:
            found[name] = _solved(target, moments, options, shared=shared, root=root, clock=clock)
        except FactorizationError as error:
            raise FactorizationError(f"{target.path}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{target.path}: {error}") from None
        except LinAlgError as error:
            raise StageFailedError(
                f"{target.path}: could not be solved ({error}); give more calibration text"
            ) from None
    return found


def _reconstruction(moments: InputMoments | None, options: CompressOptions, path: str) -> Reconstruction | None:
    if options.method != "mpifa":
        return None
    assert moments is not None
    try:
        return Reconstruction(moments, options.reconstruction)
    except LinAlgError as error:
        raise StageFailedError(
            f"{path}: its statistics are singular ({error}); give more calibration text or a larger --ridge"
        ) from None


def _solved(
    target: Target,
    moments: InputMoments | None,
    options: CompressOptions,
    *,
    shared: Reconstruction | None,
    root: torch.Tensor | None,
    clock: StepClock,
) -> Replacement:
    weight, dtype = target.layer.weight.detach(), torch_dtype(options.dtype)
    gram = None if moments is None else moments.gram
    with clock.step("solves"):
        if options.is_pruning:
            pruned, mask = prune_2_4(weight, gram, options.method)
            pruned = pruned.to("cpu", dtype)
            error = output_error(weight, pruned, gram)
            return Replacement(kind="2:4", tensors={"weight": pruned, "mask": mask.cpu()}, error=error)
        if shared is not None:
            pair = shared.solve(weight, target.rank)
        elif options.method == "svd" or gram is None:
            pair = truncated_svd(weight, target.rank)
        else:
            pair = whitened_svd(weight, gram, target.rank)
        error = output_error(weight, pair[0] @ pair[1], gram)
    with clock.step("pivoting"):
        return stored_pair(pair, options.format, dtype, error=error, root=root)


def output_error(weight: torch.Tensor, found: torch.Tensor, gram: torch.Tensor | None) -> float:
    """Returns ||(W - Z) X||_F / ||W X||_F for X X^T = gram; of the weights themselves when that is None."""
    exact = weight.double()
    miss = exact - found.to(exact)
    if gram is None:
        return float(miss.norm() / exact.norm().clamp_min(1e-300))
    return float(((miss @ gram * miss).sum() / (exact @ gram * exact).sum().clamp_min(1e-300)).clamp_min(0).sqrt())


def merged(parts: Sequence[Mapping[str, Replacement]], order: Sequence[str]) -> dict[str, Replacement]:
    """Returns the replacements of all processes in a given order of names."""
    everything = {name: entry for part in parts for name, entry in part.items()}
    return {name: everything[name] for name in order}
