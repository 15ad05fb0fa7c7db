"""A PIFA checkpoint with its pivots elsewhere, or without any."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pifa_deploy.checkpoint import is_checkpoint, validate
from pifa_deploy.equal_rank import to_low_rank
from pifa_deploy.errors import InputMissingError, InputRefusedError
from pifa_deploy.layouts import LayoutSummary, apply_layout, check_layout, describe_layout
from pifa_deploy.model_folder import check_finite, load_model, save_tokenizer
from pifa_deploy.output_folder import new_folder
from pifa_deploy.transformers_quantizer import attach

LOW_RANK = "low-rank"


@dataclass(frozen=True, kw_only=True)
class RelayoutOptions:
    """Where the pivots go.

    Attributes:
        layout: see `layouts.apply_layout`; or "low-rank": no pivots, the model as U, V of exactly the same ranks.
        force: replace an existing output folder.
    """

    layout: str = "auto"
    force: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown layout."""
        if self.layout != LOW_RANK:
            check_layout(self.layout)


def relayout_checkpoint(source: Path | str, target: Path | str, options: RelayoutOptions) -> LayoutSummary:
    """Writes the same model with its pivots where another layout wants them; ranks and dtype stay.

    The stored factors are multiplied out in float64 and pivoted anew, so that the new ones differ from them by the
    rounding of their dtype only. "low-rank" takes pairs that share the singular values evenly.

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
        if options.layout == LOW_RANK:
            to_low_rank(model)
            summary = describe_layout(model)
        else:
            summary = apply_layout(model, options.layout)
        details = {**record.details, "layout": {"asked": options.layout, **asdict(summary)}}
        # The requested density was one of PIFA: the same ranks take more as U, V.
        density = None if options.layout == LOW_RANK else record.density
        attach(model, source=record.source, density=density, details=details)
        check_finite(model, str(source))
        model.save_pretrained(folder, save_original_format=False)
        save_tokenizer(source, folder)
        validate(folder)
        return summary
