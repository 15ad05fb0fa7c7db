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


def model_sha256(source: Path) -> str:
    """Returns a hash of a GGUF file, or over config.json and every tensor file of a model folder.

    It does not depend on where the model stands.
    """
    if source.is_file():
        return file_sha256(source)
    digest = hashlib.sha256()
    files = {source / "config.json", *tensor_files(source).values()}
    for file in sorted(files, key=lambda path: path.name):
        digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def sha256_if_there(path: Path) -> str | None:
    """Returns `file_sha256`, None where there is no such file."""
    return file_sha256(path) if path.is_file() else None
