"""The command that bounds a model on a GPU from its datasheet: advise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pifa_deploy.cli import console

if TYPE_CHECKING:
    from pifa_deploy.advice import Advice, LayerAdvice


def _counts(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    """Returns the token counts of "1,512,2048"."""
    try:
        return tuple(int(count) for count in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}, expected token counts such as 1,512,2048") from None


@click.command("advise")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="A GPU, such as orin-agx or rtx4090.")
@click.option("--tokens", callback=_counts, default="1,512,2048", show_default=True, help="Of one pass; 1 is decode.")
@click.option("--density", type=float, help="For a dense model: as if its linears were factorised at this density.")
@click.option("--dtype", type=click.Choice(["fp16", "bf16", "fp32"]), default="fp16", show_default=True)
@click.option("--bandwidth", "bandwidth_gb_s", type=float, help="GB/s, instead of the datasheet's.")
@click.option("--peak-tflops", type=float, help="Dense rate, instead of the datasheet's.")
@click.option("--launch-us", type=float, help="What one more kernel costs; assumed by GPU if left out.")
@click.option("--layers", is_flag=True, help="Also show each kind of layer.")
@console.json_option
def advise_command(
    checkpoint: Path,
    target: str,
    tokens: tuple[int, ...],
    density: float | None,
    layers: bool,
    json_path: Path | None,
    **limits: Any,
) -> None:
    """Bound what CHECKPOINT can gain on a GPU: decode and prefill, dense, 2:4, low-rank and PIFA.

    The bounds come from datasheets, they are not measurements. CHECKPOINT is a PIFA or low-rank checkpoint, or a dense
    model with --density; only its config.json is read. Exit code 3 when a figure of the GPU is not published.
    """
    from pifa_deploy.targets import targets_named

    (gpu,) = targets_named([target], otherwise="")
    # torch and transformers take seconds to load: after the name has been found.
    from pifa_deploy.advice import AdviseOptions, advise
    from pifa_deploy.gpu_limits import LimitOptions

    advice = advise(checkpoint, gpu, AdviseOptions(tokens=tokens, density=density, limits=LimitOptions(**limits)))
    if console.result(advice.to_json(), json_path):
        click.echo(_heading(advice))
        click.echo()
        click.echo(_variants(advice))
        click.echo()
        click.echo(_plugin(advice))
        click.echo()
        if layers:
            click.echo(_layers(advice))
            click.echo()
    console.summary(_summary(checkpoint, advice), json_path)


def _heading(advice: Advice) -> str:
    from pifa_deploy.advice import NOTICE

    limits, memory = advice.limits, advice.target.datasheet.memory_gb
    figures = [
        f"{limits.bandwidth / 1e9:.4g} GB/s ({limits.sources['bandwidth']})",
        f"{limits.peak / 1e12:.4g} TFLOP/s {advice.options.limits.dtype} ({limits.sources['peak']})",
        f"{limits.launch_seconds * 1e6:.3g} us a launch ({limits.sources['launch_seconds']})",
    ]
    if memory is not None:
        figures.insert(0, f"{memory.value:.4g} GB memory ({memory.source})")
    if advice.kept:
        names = ", ".join(sorted({layer.name.rpartition(".")[2] for layer in advice.kept}))
        figures.append(f"dense in every row: {len(advice.kept)} linears ({names})")
    return "\n".join([f"{advice.target.title}. {NOTICE}", *(f"  {figure}" for figure in figures)])


def _variants(advice: Advice) -> str:
    columns = ["linears as", "weights MB", "launches"]
    for count in advice.tokens:
        columns += [f"{count} tokens us" if count > 1 else "1 token us", "x dense", "limit"]
    rows = []
    for variant in dict.fromkeys(one.variant for one in advice.decoder):
        bounds = [one for one in advice.decoder if one.variant == variant]
        row: list[Any] = [variant, bounds[0].weight_bytes / 1e6, bounds[0].launches]
        for one in bounds:
            row += [one.seconds * 1e6, advice.speed_up(variant, one.tokens), one.limit]
        rows.append(row)
    return console.table(columns, rows)


def _plugin(advice: Advice) -> str:
    """Returns what the plugin, whose kernels put outputs where they belong, can be worth."""
    from pifa_deploy.roofline import PIFA, PIFA_FUSED, PIFA_PLAIN

    gains = [
        f"{advice.speed_up(PIFA, count, over=PIFA_PLAIN):.2f} x at {count} "
        f"({advice.speed_up(PIFA, count, over=PIFA_FUSED):.2f} x)"
        for count in advice.tokens
    ]
    return (
        f"The plugin over plain operators, a kernel each (fused as TensorRT-RTX does): {', '.join(gains)}. "
        "Beyond a few tokens an index costs the plugin the pass that plain operators make."
    )


def _layers(advice: Advice) -> str:
    columns = ["layers", "how many", "out", "in", "ranks", "density"]
    for count in advice.tokens:
        columns += [f"x dense at {count}", "pays below density"]
    kinds: dict[tuple[str, int, int], list[LayerAdvice]] = {}
    for one in advice.layers:
        kinds.setdefault((_kind(one), one.layer.out_features, one.layer.in_features), []).append(one)
    rows = []
    for (kind, out_features, in_features), members in kinds.items():
        ranks = [one.layer.rank or 0 for one in members]
        shown = str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)}..{max(ranks)}"
        density = sum(one.layer.density for one in members) / len(members)
        row: list[Any] = [kind, len(members), out_features, in_features, shown, density]
        for place in range(len(advice.tokens)):
            dense, pifa = (sum(one.dense_us[place] for one in members), sum(one.pifa_us[place] for one in members))
            row += [dense / pifa, members[0].break_even_density[place]]
        rows.append([*row, _ranges(members[0])])
    return console.table([*columns, "pays at tokens"], rows)


def _kind(one: LayerAdvice) -> str:
    return one.layer.name.rpartition(".")[2]


def _ranges(one: LayerAdvice) -> str:
    spans = [f"{first}.." if last is None else f"{first}..{last}" for first, last in one.paying_tokens]
    return ", ".join(spans) or "none"


def _summary(checkpoint: Path, advice: Advice) -> str:
    from pifa_deploy.roofline import PIFA, PIFA_FUSED

    best = {count: max(advice.speed_up(each, count) or 0 for each in (PIFA, PIFA_FUSED)) for count in advice.tokens}
    gains = ", ".join(f"{gain:.2f} x at {count}" for count, gain in best.items())
    return (
        f"{checkpoint}: at density {advice.density:.3f} PIFA on {advice.target.name} is at most, over dense, {gains} "
        f"tokens; {_left_dense(advice)}; {_multiple(advice)}"
    )


def _left_dense(advice: Advice) -> str:
    """Returns which layers are better left dense, and at which of the asked counts."""
    losing: dict[tuple[int, ...], list[LayerAdvice]] = {}
    for one in advice.layers:
        if one.leave_dense:
            losing.setdefault(one.leave_dense, []).append(one)
    texts = []
    for counts, members in losing.items():
        kinds = ", ".join(sorted({_kind(one) for one in members}))
        at = ", ".join(map(str, counts))
        texts.append(f"{len(members)} of {len(advice.layers)} layers ({kinds}) are better left dense at {at}")
    return " and ".join(texts) or "no layer alone loses"


def _multiple(advice: Advice) -> str:
    """Returns what ranks that fill tiles would save at the largest token count, in the padded model."""
    tile, last = advice.limits.tile, advice.tokens.index(max(advice.tokens))
    found = {one.multiple: one for one in advice.multiples}
    if tile not in found:
        return f"ranks are smaller than a tile of {tile}"
    saved = 1 - found[tile].seconds[last] / found[1].seconds[last]
    return (
        f"ranks in multiples of {tile} save {saved:.1%} of {advice.tokens[last]} tokens "
        f"for {found[1].density - found[tile].density:.4f} of density"
    )
