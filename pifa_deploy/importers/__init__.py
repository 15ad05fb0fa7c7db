"""Foreign checkpoints to PIFA checkpoints; the only code of this package that opens a pickle."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pifa_deploy.errors import InputMissingError
from pifa_deploy.op_spec import DTYPE_FLAGS

__all__ = ["ImportOptions", "ImportSummary", "import_checkpoint"]

RESEARCH, LOW_RANK = "pifa-research", "low-rank"


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """How to import.

    Attributes:
        force: replace an existing artefact folder.
        dtype: "fp32", "fp16" or "bf16"; None keeps what the input has.
    """

    force: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown dtype."""
        if self.dtype is not None and self.dtype not in DTYPE_FLAGS:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPE_FLAGS)}")


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What was imported.

    Attributes:
        kind: "pifa-research" or "low-rank".
        modules: factorised layers.
        dense_linears: linear layers kept dense.
        biases_added: layers whose bias the research forward leaves out and this program applies.
        dtype: dtype of the written model ("float16", ...).
        max_coefficient: largest |C| entry of any layer.
        notes: what else a user should know, one sentence each.
    """

    kind: str
    modules: int
    dense_linears: int
    biases_added: int
    dtype: str
    max_coefficient: float
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


def import_checkpoint(source: Path | str, target: Path | str, *, options: ImportOptions) -> ImportSummary:
    """Turns a foreign checkpoint into a PIFA checkpoint folder.

    Args:
        source: a file that the research code of arXiv 2501.19090 saved with torch.save, or a model folder of
            safetensors with low-rank pairs; told apart by what is there.
        target: the folder to write; it appears whole or not at all.
        options: see `ImportOptions`.

    Raises:
        InputMissingError: nothing at `source`.
        InputRefusedError: `source` is hostile, damaged or of another kind.
        OutputExistsError: `target` exists and `options.force` is off.
        FactorizationError: a layer has no usable pivot factors.
        StageFailedError: a value that the asked dtype cannot hold.
    """
    # torch and transformers are loaded when a checkpoint is: naming the options costs nothing.
    from torch import nn

    from pifa_deploy import checkpoint
    from pifa_deploy.output_folder import new_folder
    from pifa_deploy.transformers_quantizer import attach

    source, target = Path(source), Path(target)
    kind = _kind(source)
    with new_folder(target, force=options.force) as folder:
        imported = _read(source, kind, options)
        record = attach(imported.model, source=f"import:{kind}", density=None, details=imported.details)
        imported.model.save_pretrained(folder)
        for name, content in imported.files.items():
            (folder / name).write_bytes(content)
        checkpoint.validate(folder)
    return ImportSummary(
        kind=kind,
        modules=len(record.modules),
        dense_linears=sum(isinstance(module, nn.Linear) for module in imported.model.modules()),
        biases_added=imported.biases_added,
        dtype=str(imported.dtype).removeprefix("torch."),
        max_coefficient=imported.max_coefficient,
        notes=imported.notes,
    )


def _kind(source: Path) -> str:
    if source.is_dir():
        return LOW_RANK
    if source.is_file():
        return RESEARCH
    raise InputMissingError(f"{source}: no such file or folder; give a research checkpoint or a model folder")


def _read(source: Path, kind: str, options: ImportOptions) -> Any:
    """Returns the `ImportedModel`."""
    import torch

    from pifa_deploy.importers.low_rank import read_low_rank
    from pifa_deploy.importers.research import read_research

    dtype = None if options.dtype is None else getattr(torch, DTYPE_FLAGS[options.dtype])
    return read_research(source, dtype) if kind == RESEARCH else read_low_rank(source, dtype)
