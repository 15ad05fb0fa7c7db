"""Puts the TensorRT 10.14 headers into a folder: `python fetch_headers.py FOLDER`. Needs pip and the package index.

NVIDIA publishes them (Apache-2.0) in packages and on GitHub; on PyPI the wheel of kernel-lens carries a copy.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "kernel-lens==2.0.1"
SHA256 = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
HEADERS = "kernel_lens/include/tensorrt/"


def main(folder: Path) -> None:
    """Fills `folder`; an earlier complete one is kept. Ends the process with a message when it cannot."""
    if (folder / "NvInferRuntime.h").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = _download(Path(scratch))
        unpacked = Path(scratch) / "headers"
        unpacked.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(HEADERS) and name.endswith(".h"):
                    (unpacked / Path(name).name).write_bytes(archive.read(name))
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        sys.exit(f"{WHEEL} could not be downloaded; set TENSORRT_ROOT instead. pip said: {done.stderr.strip()[-500:]}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"{wheels[0].name} has SHA-256 {digest}, expected {SHA256}; set TENSORRT_ROOT instead")
    return wheels[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
