"""Are the files beside an exported graph still those of the export?"""

from __future__ import annotations

from pathlib import Path

from pifa_deploy.digest import sha256_if_there
from pifa_deploy.genai_config import GENAI_FILE
from pifa_deploy.onnx_folder import DATA_FILE, MODEL_FILE, OnnxFolder
from pifa_deploy.tokenizer_files import CONFIG_FILE, TOKENIZER_FILES

# The tensors are compared one by one instead.
_NOT_COMPARED = (MODEL_FILE, DATA_FILE, GENAI_FILE)


def changed_files(folder: OnnxFolder, reference: Path | str | None = None) -> tuple[str, ...] | None:
    """Returns "file: why" for each file beside the graph that is not the one that the export wrote.

    These files (config.json, generation_config.json, tokenizer, chat template) decide which text goes in and comes out.
    pifa.json has their hashes. The tokenizer's, unlike config.json, were copied from the checkpoint where that is a
    folder; those of a GGUF file or of the hub are written by transformers. genai_config.json is left out: its user
    chooses providers there.

    Args:
        folder: the ONNX folder.
        reference: the checkpoint that it was exported from; None: unknown.

    Returns:
        None where neither pifa.json lists them, as in earlier exports, nor a folder of the checkpoint has them.
    """
    listed = folder.manifest.get("files", {})
    written = {name: entry["sha256"] for name, entry in listed.items() if name not in _NOT_COMPARED}
    # An export from the hub has no hash of its source, and a GGUF file is no folder: neither has copies.
    source = Path(reference) if reference is not None and folder.manifest.get("source_sha256") else None
    copied = TOKENIZER_FILES if source is not None and source.is_dir() else ()
    if not written and not copied:
        return None
    found: dict[str, str] = {}
    for name in sorted({*written, CONFIG_FILE, *TOKENIZER_FILES}):
        digest = sha256_if_there(folder.path / name)
        if written and digest != written.get(name):
            known = "is not as the export wrote it" if name in written else "was not there at the export"
            found[name] = known if digest else "is not there"
        elif source and name in copied and digest and sha256_if_there(source / name) not in (digest, None):
            found[name] = f"is not as in {reference}"
    return tuple(f"{name}: {why}" for name, why in found.items())
