"""Hashes that say whether an artefact is still the one it was made from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pifa_deploy.checkpoint import tensor_files


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def model_sha256(folder: Path) -> str:
    """Returns a hash over config.json and every tensor file of a model folder, independent of its place."""
    digest = hashlib.sha256()
    files = {folder / "config.json", *tensor_files(folder).values()}
    for file in sorted(files, key=lambda path: path.name):
        digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
    return digest.hexdigest()
