"""Time and peak memory of an export, in a process of its own: perf/bench_export.py CHECKPOINT [--json FILE].

The bound: peak resident memory <= 600 MB + 2.5 x the bytes of the exported weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

_CHILD = """
import json, resource, sys, time
from pifa_deploy.onnx_export import ExportOptions, export_checkpoint
started = time.monotonic()
summary = export_checkpoint(sys.argv[1], sys.argv[2], ExportOptions(dtype=sys.argv[3]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"dtype": sys.argv[3], "seconds": round(time.monotonic() - started, 1),
                  "weight_bytes": summary.bytes, "peak_rss_bytes": peak}))
"""


def measure(checkpoint: Path, dtype: str) -> dict[str, float | str | bool]:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-c", _CHILD, str(checkpoint), f"{scratch}/onnx", dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr.strip().splitlines()[-1])
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    figures["bound_bytes"] = int(600e6 + 2.5 * figures["weight_bytes"])
    figures["within_bound"] = figures["peak_rss_bytes"] <= figures["bound_bytes"]
    return figures


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(checkpoint: Path, json_path: Path | None) -> None:
    rows = [measure(checkpoint, dtype) for dtype in ("fp32", "fp16")]
    for row in rows:
        click.echo(
            f"{row['dtype']}: {row['seconds']} s, peak {row['peak_rss_bytes'] / 1e6:.0f} MB, "
            f"bound {row['bound_bytes'] / 1e6:.0f} MB for {row['weight_bytes'] / 1e6:.0f} MB of weights"
        )
    if json_path:
        json_path.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(not all(row["within_bound"] for row in rows))


if __name__ == "__main__":
    main()
