"""The "pifa" quantization method of transformers: factorised modules in place of `nn.Linear` on load and save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pifa_deploy.checkpoint import FactorizationRecord, ModuleSpec, check_names, tensor_files, validate
from pifa_deploy.column_linear import PifaColumnLinear
from pifa_deploy.errors import InputRefusedError
from pifa_deploy.linear import LowRankLinear, PifaLinear

FactorisedLinear = PifaLinear | PifaColumnLinear | LowRankLinear
KINDS: dict[str, type[PifaLinear] | type[PifaColumnLinear] | type[LowRankLinear]] = {
    "pifa": PifaLinear,
    "pifa-column": PifaColumnLinear,
    "lowrank": LowRankLinear,
}


class PifaConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`config.quantization_config` of a PIFA checkpoint; keyword arguments as in `FactorizationRecord.to_json`."""

    def __init__(self, **fields: Any) -> None:
        """Parses the JSON object; raises InputRefusedError when it breaks the contract."""
        fields.setdefault("quant_method", "pifa")
        self.record = FactorizationRecord.from_json(fields, "config.json")
        self.quant_method = "pifa"

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object."""
        return self.record.to_json()

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the JSON object."""
        return self.record.to_json()


class PifaQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the recorded linears on the skeleton, checks every tensor, finishes the layers after loading."""

    quantization_config: PifaConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        replace_linears(model, self.quantization_config.record)
        files = [Path(file) for file in kwargs.get("checkpoint_files") or []]
        if not files:
            return
        folder = files[0].parent
        validate(folder)
        state = model.state_dict()
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        tensors = tensor_files(folder)
        check_names(tensors, state, tied, str(folder))
        other = {file.name for file in files} - {file.name for file in tensors.values()}
        if other:
            raise InputRefusedError(f"{folder}: {min(other)} would be loaded, which is not what was checked")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, PifaLinear):
                # Integers are not cast: as views of the mapped file they would keep all of it in memory.
                module.pivot_rows = module.pivot_rows.clone()
                module.derive_output_index()
        unset = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if unset:
            raise InputRefusedError(f"{unset[0]} was not loaded ({len(unset)} in all); it would stay uninitialised")
        return model

    def is_serializable(self, **_: Any) -> bool:
        """Factorised models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors are parameters with a gradient."""
        return True


def replace_linears(model: nn.Module, record: FactorizationRecord) -> None:
    """Puts uninitialised factorised layers, on the meta device, in the places that `record` names.

    Raises:
        InputRefusedError: a recorded module does not exist, is no linear layer, or has another shape.
    """
    for name, spec in record.modules.items():
        try:
            found = model.get_submodule(name)
        except AttributeError:
            raise InputRefusedError(
                f"config.json lists {name} as factorised, but the model has no such module"
            ) from None
        if not isinstance(found, nn.Linear) or (found.out_features, found.in_features) != (
            spec.out_features,
            spec.in_features,
        ):
            raise InputRefusedError(
                f"config.json says {name} is {spec.out_features} x {spec.in_features}, the model has {found} there"
            )
        kind = KINDS[spec.format]
        with torch.device("meta"):
            layer = kind(spec.in_features, spec.out_features, spec.rank, bias=found.bias is not None)
        model.set_submodule(name, layer.to(found.weight.dtype))


def factorised_modules(model: nn.Module) -> dict[str, FactorisedLinear]:
    """Returns path -> layer of every factorised linear."""
    kinds = tuple(KINDS.values())
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def spec_of(layer: FactorisedLinear) -> ModuleSpec:
    """Returns the record entry of a factorised layer."""
    return ModuleSpec(
        rank=layer.rank,
        in_features=layer.in_features,
        out_features=layer.out_features,
        format=next(name for name, kind in KINDS.items() if isinstance(layer, kind)),
    )


def attach(
    model: PreTrainedModel, *, source: str, density: float | None, details: dict[str, Any]
) -> FactorizationRecord:
    """Makes `model.save_pretrained` write a PIFA checkpoint of a model that holds factorised layers.

    Returns:
        The record that config.json will hold.
    """
    modules = {name: spec_of(module) for name, module in factorised_modules(model).items()}
    record = FactorizationRecord(modules=modules, source=source, density=density, details=details)
    config = PifaConfig(**record.to_json())
    model.config.quantization_config = config
    model.hf_quantizer = PifaQuantizer(config)
    model.is_quantized = True
    model.quantization_method = "pifa"
    return record


if "pifa" not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config("pifa")(PifaConfig)
    register_quantizer("pifa")(PifaQuantizer)
