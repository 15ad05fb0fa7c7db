"""Commands about the TensorRT plugin: build, info."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pifa_deploy.cli import console


@click.group("plugin")
def plugin_command() -> None:
    """Build the TensorRT plugin in CUDA, or say what a library of it holds. Both commands take --json."""


@plugin_command.command("build")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--archs", default="", help="Compute capabilities without dot, e.g. 86,89; all that nvcc knows if left out."
)
@click.option("--tensorrt-root", type=click.Path(path_type=Path), help="Folder with TensorRT's headers.")
@click.option("--fetch-headers", is_flag=True, help="Download the headers where they are not found.")
@click.option("--source", type=click.Path(path_type=Path), help="Folder plugins of a checkout.")
@click.option("--jobs", type=int, help="Files compiled at once; as many as there are processors if left out.")
@console.json_option
def build_command(
    out: Path,
    archs: str,
    tensorrt_root: Path | None,
    fetch_headers: bool,
    source: Path | None,
    jobs: int | None,
    json_path: Path | None,
) -> None:
    """Compile the plugin in the folder OUT; needs nvcc, no GPU and no TensorRT but its headers."""
    from pifa_deploy.plugin_build import SOURCE, PluginBuildOptions, build_library

    options = PluginBuildOptions(
        source=source or SOURCE,
        architectures=tuple(part.strip() for part in archs.split(",") if part.strip()),
        tensorrt_root=tensorrt_root,
        fetch_headers=fetch_headers,
        jobs=os.cpu_count() or 1 if jobs is None else jobs,
    )
    with console.stage("build the plugin"):
        library = build_library(out, options)
    _show(library, json_path)


@plugin_command.command("info")
@click.argument("library", type=click.Path(path_type=Path), required=False)
@console.json_option
def info_command(library: Path | None, json_path: Path | None) -> None:
    """Say what LIBRARY was built for and from; without it, the one of PIFA_PLUGIN_LIBRARY or of this checkout."""
    from pifa_deploy.plugin_library import find_library

    _show(find_library(library), json_path)


def _show(library: Path, json_path: Path | None) -> None:
    from pifa_deploy.plugin_library import describe_library

    found = describe_library(library)
    console.result({"library": str(library), **found.to_json()}, json_path)
    console.summary(
        f"{library}: operators version {found.op_version}, compute capabilities {', '.join(found.architectures)}, "
        f"CUDA {found.cuda // 1000}.{found.cuda % 1000 // 10}, TensorRT headers {found.tensorrt_headers}, "
        f"{found.bytes / 1e6:.1f} MB",
        json_path,
    )
