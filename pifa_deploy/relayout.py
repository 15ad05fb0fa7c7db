"""A PIFA checkpoint with its pivots elsewhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pifa_deploy.checkpoint import is_checkpoint, validate
from pifa_deploy.errors import InputMissingError, InputRefusedError
from pifa_deploy.layouts import LayoutSummary, apply_layout, check_layout
from pifa_deploy.model_folder import check_finite, load_model, save_tokenizer
from pifa_deploy.output_folder import new_folder
from pifa_deploy.transformers_quantizer import attach


@dataclass(frozen=True, kw_only=True)
class RelayoutOptions:
    """Where the pivots go.

    Attributes:
        layout: see `layouts.apply_layout`.
        force: replace an existing output folder.
    """

    layout: str = "auto"
    force: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown layout."""
        check_layout(self.layout)


def relayout_checkpoint(source: Path | str, target: Path | str, options: RelayoutOptions) -> LayoutSummary:
    """Writes the same model with its pivots where another layout wants them; ranks and dtype stay.

    The stored factors are multiplied out in float64 and pivoted anew, so that the new ones differ from them by the
    rounding of their dtype only.

    Args:
        source: PIFA checkpoint folder.
        target: the folder to write.
        options: see RelayoutOptions.

    Raises:
        InputMissingError: no such checkpoint.
        InputRefusedError: malformed, or not a PIFA checkpoint.
        FactorizationError: the layout is not possible; names the module.
        OutputExistsError, OutputHeldError, OutputError: see `output_folder.new_folder`.
    """
    source = Path(source)
    if not source.is_dir():
        raise InputMissingError(f"{source}: no such folder; give a PIFA checkpoint")
    if not is_checkpoint(source):
        raise InputRefusedError(f"{source}: has no factorised layers; give a folder written by compress or import")
    record = validate(source)
    with new_folder(target, force=options.force) as folder:
        model = load_model(source, dtype=None)
        summary = apply_layout(model, options.layout)
        details = {**record.details, "layout": {"asked": options.layout, **asdict(summary)}}
        attach(model, source=record.source, density=record.density, details=details)
        check_finite(model, str(source))
        model.save_pretrained(folder, save_original_format=False)
        save_tokenizer(source, folder)
        validate(folder)
        return summary
