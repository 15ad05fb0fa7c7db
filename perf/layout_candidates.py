"""Every place for the pivots that was tried, on the layers of a real checkpoint: perf/layout_candidates.py CHECKPOINT.

For each PIFA layer the same matrix is factorised anew with other pivots. Reported are the coefficients and the error
of y = W x in float16 and bfloat16 (weights, y_p and y rounded, sums in float32) against float64, for random x. The
oversampled candidates store as much as the others, so that their matrix has less rank: `rank` says how much.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import click
import torch
from scipy.linalg import qr

from pifa_deploy.hidden_features import hidden_features
from pifa_deploy.layouts import low_rank_pair
from pifa_deploy.model_folder import load_model
from pifa_deploy.refit import refitted_coefficients
from pifa_deploy.shared_pivots import removal_cost, shared_pivots
from pifa_deploy.transformers_quantizer import factorised_modules

Rows = torch.Tensor
SMALL = 4.0  # coefficients that `swapped` is content with
BLOCK = 8
ERRORS = ("float16 error", "float16 worst row", "bfloat16 error", "bfloat16 worst row")
FIGURES = ("row norm", "max |C|", *ERRORS, "moved rows", "basis", "rank")


def basis(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(matrix).Q


def others(rows: Rows, count: int) -> Rows:
    mask = torch.ones(count, dtype=torch.bool)
    mask[rows] = False
    return mask.nonzero()[:, 0]


def qr_pivots(space: torch.Tensor) -> Rows:
    order = qr(space.numpy().T, mode="r", pivoting=True)[1]
    return torch.from_numpy(order[: space.shape[1]].copy()).long().sort().values


def swapped(space: torch.Tensor) -> Rows:
    """The first rows, exchanged one by one where a coefficient is largest (maximal volume) until all are small."""
    rows = torch.arange(space.shape[1])
    for _ in range(4 * len(rows)):
        rest = others(rows, len(space))
        found = torch.linalg.solve(space[rows].T, space[rest].T).T.abs()
        at = int(found.argmax())
        if float(found.flatten()[at]) <= SMALL:
            break
        rows[at % len(rows)] = rest[at // len(rows)]
    return rows.sort().values


def blocks(space: torch.Tensor) -> Rows:
    """Whole aligned blocks of rows, the blocks that cost least taken away first."""
    kept = torch.arange(len(space) // BLOCK)
    wanted = -(-space.shape[1] // BLOCK)
    while len(kept) > wanted:
        rows = (kept[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        part = space[rows].view(len(kept), BLOCK, -1)
        solved = torch.linalg.solve(space[rows].T @ space[rows], part.mT).mT
        # ||rows^+||^2 grows by the trace of solved^T (1 - leverage)^-1 solved when a block goes.
        leverage = torch.eye(BLOCK, dtype=torch.float64) - part @ solved.mT
        cost = (torch.linalg.pinv(leverage, hermitian=True) * (solved @ solved.mT)).sum(dim=(1, 2))
        number = max(1, (len(kept) - wanted) // 20)
        kept = kept[torch.argsort(cost)[number:].sort().values]
    return (kept[:, None] * BLOCK + torch.arange(BLOCK)).flatten()


def by_leverage(space: torch.Tensor, count: int) -> Rows:
    """The first k rows of a space of k columns, and those others that lower ||rows^+|| most, `count` in all."""
    kept = torch.arange(len(space))
    while len(kept) > count:
        cost = removal_cost(space[kept])
        cost[kept < space.shape[1]] = torch.inf
        number = max(1, (len(kept) - count) // 10)
        kept = kept[torch.argsort(cost)[number:].sort().values]
    return kept


def judged(
    weight: torch.Tensor, rows: Rows, pair: tuple[torch.Tensor, torch.Tensor], *, refit: bool
) -> dict[str, float]:
    """Returns the coefficients' size in float16 and the errors of y = weight x with these pivots."""
    rest, (u, v) = others(rows, len(weight)), pair
    x = torch.randn(weight.shape[1], 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found: dict[str, float] = {"moved rows": int((rows >= len(rows)).sum()), "basis": len(rows)}
    for dtype in (torch.float16, torch.bfloat16):
        stored = weight[rows].to(dtype)
        if refit:
            coefficients = refitted_coefficients(stored, u[rest], v)
        else:
            coefficients = torch.linalg.lstsq(weight[rows].T, weight[rest].T, driver="gelsd").solution.T
        seen = x.to(dtype)
        y_p = (stored.float() @ seen.float()).to(dtype)
        y_np = (coefficients.to(dtype).float() @ y_p.float()).to(dtype)
        miss = torch.cat([y_p, y_np]).double() - weight[torch.cat([rows, rest])] @ seen.double()
        size = weight[torch.cat([rows, rest])] @ seen.double()
        name = str(dtype).removeprefix("torch.")
        found[f"{name} error"] = float(miss.norm() / size.norm())
        found[f"{name} worst row"] = float((miss.norm(dim=1) / size.norm(dim=1)).max())
        if dtype == torch.float16:
            found["max |C|"] = float(coefficients.abs().max())
            found["row norm"] = float(coefficients.norm(dim=1).square().mean().sqrt())
    return found


def affordable(shape: torch.Size, rank: int, share: float) -> int:
    """Returns the largest rank that stores no more with `share` of it as extra rows, which are computed twice."""
    (m, n), budget = shape, rank * (sum(shape) - rank)
    for lower in range(rank, 0, -1):
        rows = lower + max(1, round(share * lower))
        if rows * n + (m - lower) * rows <= budget:
            return lower
    raise ValueError(f"nothing fits {budget} numbers")


def candidates(u: torch.Tensor, v: torch.Tensor, shared: Rows | None) -> dict[str, dict[str, float]]:
    """Returns candidate -> its figures for W = u v."""
    weight, space, rank = u @ v, basis(u), u.shape[1]
    choices: dict[str, Callable[[], Rows]] = {
        "QR": lambda: qr_pivots(space),
        "first rows": lambda: torch.arange(rank),
        "first rows, few swaps": lambda: swapped(space),
        "aligned blocks of 8": lambda: blocks(space),
    }
    if shared is not None:
        choices["shared in the MLP"] = lambda: shared
    made = {}
    for name, choose in choices.items():
        rows = choose()
        made[name] = judged(weight, rows, (u, v), refit=True)
        if name in ("QR", "first rows"):
            made[f"{name}, no refit"] = judged(weight, rows, (u, v), refit=False)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    for share in (0.02, 0.05):
        lower = affordable(weight.shape, rank, share)
        pair = (left[:, :lower] * values[:lower], right[:lower])
        rows = by_leverage(basis(pair[0]), lower + max(1, round(share * lower)))
        figures = judged(pair[0] @ pair[1], rows, pair, refit=True)
        made[f"first rows and {share:.0%} by leverage"] = figures | {"rank": lower / rank}
    for share in (0.03, 0.05, 0.1):
        lower = int(rank / (1 + share))
        pair = (left[:, :lower] * values[:lower], right[:lower])
        figures = judged(pair[0] @ pair[1], torch.arange(rank), pair, refit=True)
        made[f"first rows, oversampled {share:.0%}"] = figures | {"rank": lower / rank}
    return made


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--every", type=int, default=1, show_default=True, help="Take each n-th decoder layer only.")
@click.option("--json", "path", type=click.Path(path_type=Path))
def main(checkpoint: Path, every: int, path: Path | None) -> None:
    """Try every place for the pivots on the layers of CHECKPOINT."""
    model = load_model(checkpoint, dtype=None)
    layers = factorised_modules(model)
    rows = []
    for number, group in enumerate(hidden_features(model)):
        if number % every:
            continue
        paths = group.paths()
        pairs = {path: low_rank_pair(layers[path]) for path in paths}
        features = {path: u if path != paths[-1] else v.T for path, (u, v) in pairs.items()}
        shared = shared_pivots([basis(matrix) for matrix in features.values()], layers[paths[0]].rank)
        beside = [
            name for name in layers if name.rpartition(".")[0].rpartition(".")[0] == group.module.rpartition(".")[0]
        ]
        for name in sorted({*beside, *paths}):
            u, v = low_rank_pair(layers[name])
            # The columns of the last are what has to be in order.
            found = (
                candidates(v.T, u.T, shared)
                if name == paths[-1]
                else candidates(u, v, shared if name in paths else None)
            )
            rows += [{"layer": name, "candidate": candidate, **figures} for candidate, figures in found.items()]
        click.echo(f"{group.module}: done", err=True)
    click.echo(table(rows))
    if path:
        path.write_text(json.dumps(columns(rows), separators=(",", ":")) + "\n", encoding="utf-8")


def columns(rows: list[dict[str, object]]) -> dict[str, object]:
    """Returns the figures without a name repeated: for each candidate one row a layer, None where it does not apply."""
    layers = sorted({str(row["layer"]) for row in rows})
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        figures = [float(f"{row.get(name, 1.0):.3g}") for name in FIGURES]
        found.setdefault(str(row["candidate"]), {})[str(row["layer"])] = figures
    table = {candidate: [by_layer.get(layer) for layer in layers] for candidate, by_layer in found.items()}
    return {"schema": 1, "columns": FIGURES, "layers": layers, "candidates": table}


def table(rows: list[dict[str, object]]) -> str:
    """Returns medians and extremes over the layers as a Markdown table."""
    columns = {
        "median row norm": lambda found: statistics.median(row["row norm"] for row in found),
        "largest row norm": lambda found: max(row["row norm"] for row in found),
        "largest |C|": lambda found: max(row["max |C|"] for row in found),
        "fp16 error": lambda found: statistics.median(row["float16 error"] for row in found),
        "its worst layer": lambda found: max(row["float16 error"] for row in found),
        "bf16 error": lambda found: statistics.median(row["bfloat16 error"] for row in found),
        "moved rows": lambda found: statistics.median(row["moved rows"] / row["basis"] for row in found),
        "rank": lambda found: statistics.median(row.get("rank", 1.0) for row in found),
    }
    lines = ["| pivots | layers | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for name in dict.fromkeys(row["candidate"] for row in rows):
        found = [row for row in rows if row["candidate"] == name]
        figures = " | ".join(f"{figure(found):.3g}" for figure in columns.values())
        lines.append(f"| {name} | {len(found)} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
