"""The command `generate`: a model answers, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pifa_deploy.cli import console

if TYPE_CHECKING:
    from pifa_deploy.decoder_step import StepLimits
    from pifa_deploy.generation import Generated


@click.command("generate")
@click.argument("path", metavar="ONNX_OR_ENGINE", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--prompt", "prompt_option", help="The same as the argument.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--chat/--no-chat", default=True, show_default=True, help="Use the chat template, where there is one.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the likeliest token each time.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Draw from the K likeliest tokens; 0: all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from the likeliest P of probability.")
@click.option("--seed", type=int, help="Draw the same tokens again.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), help="Folder of the tokenizer; ONNX_OR_ENGINE if left out."
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Of an ONNX folder."
)
@click.option("--plugin", type=click.Path(path_type=Path), help="Plugin library that an engine was built with.")
@console.json_option
def generate_command(
    path: Path,
    prompt: str | None,
    prompt_option: str | None,
    max_new_tokens: int,
    chat: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    tokenizer: Path | None,
    device: str,
    plugin: Path | None,
    json_path: Path | None,
) -> None:
    """Answer or continue PROMPT, token by token, with an ONNX folder or an engine folder.

    An ONNX folder runs in ONNX Runtime, an engine on the GPU that it was built for.
    """
    from pifa_deploy.generation import GenerateOptions, end_tokens, generate_text, position_limit
    from pifa_deploy.model_folder import load_tokenizer
    from pifa_deploy.runners import open_runner
    from pifa_deploy.sampling import SamplingOptions

    text = _one_prompt(prompt, prompt_option)
    sampling = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    options = GenerateOptions(max_new_tokens=max_new_tokens, chat=chat, sampling=sampling)
    with console.stage(f"load {path}"):
        runner = open_runner(path, device=device, plugin_library=plugin)
        own = path if path.is_dir() else path.parent
        folder = tokenizer or own
        reader = load_tokenizer(folder)
    limits, positions = getattr(runner, "limits", None), position_limit(own)
    free = str(json_path) != "-"
    found = generate_text(
        runner,
        reader,
        text,
        options=options,
        ends=end_tokens(folder, reader),
        limits=limits,
        positions=positions,
        show=_show if free else lambda piece: None,
    )
    if free:
        click.echo()
    console.result(found.to_json(), json_path)
    for line in _remarks(found, limits, positions):
        click.echo(line, err=True)


def _one_prompt(argument: str | None, option: str | None) -> str:
    if argument is not None and option is not None:
        raise click.UsageError("PROMPT and --prompt were both given, expected one of them")
    found = argument if option is None else option
    if found is None:
        raise click.UsageError("Missing argument 'PROMPT'")
    return found


def _show(piece: str) -> None:
    click.echo(piece, nl=False)  # click flushes


def _remarks(found: Generated, limits: StepLimits | None, positions: int | None = None) -> list[str]:
    decode = found.decode_tokens_per_s
    lines = [
        f"prefill: {found.prompt_tokens} tokens, {console.number(found.prefill_tokens_per_s)} tokens/s; decode: "
        f"{found.decode_steps} tokens, {console.number(decode)} tokens/s"
    ]
    if found.stop == "cache" and limits is not None:
        lines.append(
            f"stopped after {len(found.token_ids)} tokens: the engine was built for {limits.past} tokens in the cache; "
            "build it again with a larger --max-cache-len"
        )
    if found.stop == "positions":
        lines.append(
            f"stopped after {len(found.token_ids)} tokens: with the {found.prompt_tokens} of the prompt they fill the "
            f"{positions} positions that the model was made for (max_position_embeddings)"
        )
    return lines
