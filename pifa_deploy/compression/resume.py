"""The state of an unfinished compression, beside its output: one file a layer, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from pifa_deploy.compression.allocation import Allocation
from pifa_deploy.compression.replacement import Replacement
from pifa_deploy.errors import InputRefusedError, MisfitError
from pifa_deploy.output_folder import write_json

_STATE = "state.json"
_ALLOCATION = "allocation.json"


class ResumeFolder:
    """Finished layers of one compression; on disk from the first one on.

    Attributes:
        path: the folder, `.NAME.resume` beside the output NAME.
        allocation: ranks that come from scores, as the first run found them; set before the first layer is saved.
    """

    def __init__(self, target: Path | str, identity: Mapping[str, Any], *, restart: bool = False) -> None:
        """Opens the folder that an earlier run left, if there is one.

        Args:
            target: output of the compression.
            identity: JSON values of all that decides the result; an earlier run must have had the same.
            restart: begin anew whatever is there.

        Raises:
            MisfitError: the folder belongs to another model or other options; names the first that differs.
            InputRefusedError: one of its files is damaged.
        """
        self.path = _path(target)
        # As JSON gives it back: tuples are lists.
        self._identity = json.loads(json.dumps(dict(identity)))
        self.allocation: Allocation | None = None
        if restart:
            self.remove()
        if self.path.exists():
            self._check()

    def _check(self) -> None:
        state = self.path / _STATE
        try:
            found = json.loads(state.read_text(encoding="utf-8"))
        except FileNotFoundError:
            # Killed before the first layer was written.
            if not self.finished():
                return
            raise InputRefusedError(
                f"{state}: missing, nothing says what these layers are of; pass --restart to begin anew"
            ) from None
        except ValueError as error:
            raise InputRefusedError(f"{state}: not JSON ({error}); pass --restart to begin anew") from None
        if not isinstance(found, dict):
            raise InputRefusedError(f"{state}: is no JSON object; pass --restart to begin anew")
        difference = _difference(found, self._identity)
        if difference:
            raise MisfitError(
                f"{self.path}: is of another compression, with {difference}; run the same command again, or pass "
                "--restart to begin anew"
            )
        # Now, and not after hours of earlier layers.
        for layer in range(self.finished()):
            self.load(layer)
        self.allocation = self._load_allocation()

    def _load_allocation(self) -> Allocation | None:
        path = self.path / _ALLOCATION
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            found["layer_densities"] = {int(layer): density for layer, density in found["layer_densities"].items()}
            return Allocation(**found)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputRefusedError(f"{path}: damaged ({error}); pass --restart to begin anew") from None

    def finished(self) -> int:
        """Returns how many layers are done, counted from the first."""
        return _finished(self.path)

    def save(self, layer: int, replacements: Mapping[str, Replacement]) -> None:
        """Writes one finished layer: linear's path within it -> what replaces it."""
        tensors = {
            f"{name}.{suffix}": tensor.contiguous()
            for name, entry in replacements.items()
            for suffix, tensor in entry.tensors.items()
        }
        about = {name: {"kind": entry.kind, "error": entry.error} for name, entry in replacements.items()}
        partial = self.path / "layer.partial"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / _STATE).is_file():
                if self.allocation is not None:
                    write_json(self.path / _ALLOCATION, asdict(self.allocation))
                write_json(self.path / _STATE, self._identity)
            save_file(tensors, partial, metadata={"replacements": json.dumps(about)})
            # The rename must not reach the disk before the bytes do.
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            partial.replace(_file(self.path, layer))
        except BaseException:
            # It may be what fills the disk.
            partial.unlink(missing_ok=True)
            if not self.finished():
                self.remove()
            raise

    def load(self, layer: int, *, copy: bool = False) -> dict[str, Replacement]:
        """Returns one finished layer; its tensors are views of the mapped file.

        Args:
            layer: its number.
            copy: return copies, aligned as fresh tensors are: the last bits of a product of MKL may depend on that.

        Raises:
            InputRefusedError: the file is damaged.
        """
        path = _file(self.path, layer)
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["replacements"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            tensors = {name: tensor.clone() for name, tensor in tensors.items()} if copy else tensors
            return {name: Replacement(tensors=_own(name, tensors), **entry) for name, entry in about.items()}
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputRefusedError(
                f"{path}: damaged ({error}); remove it to go on from there, or pass --restart to begin anew"
            ) from None

    def settle(self, path: str, layer: nn.Module) -> None:
        """Moves a layer's parameters into a file and maps it, so that the model never is in memory as a whole."""
        file = self.path / f"{path}.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in layer.named_parameters()}, file)
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                setattr(layer, name, nn.Parameter(stored.get_tensor(name), requires_grad=False))

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def finished_layers(target: Path | str) -> int:
    """Returns how many layers of an unfinished compression to `target` are done."""
    return _finished(_path(target))


def _path(target: Path | str) -> Path:
    target = Path(os.path.realpath(target))
    return target.with_name(f".{target.name}.resume")


def _file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05d}.safetensors"


def _finished(folder: Path) -> int:
    count = 0
    while _file(folder, count).is_file():
        count += 1
    return count


def _difference(found: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """Returns "NAME VALUE, now it is VALUE" of the first entry that differs, with dots in it; "" if none does."""
    for name in (*now, *(found.keys() - now.keys())):
        before, after = found.get(name), now.get(name)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            return _difference(before, after, f"{prefix}{name}.")
        return f"{prefix}{name} {before}, now it is {after}"
    return ""


def _own(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name}
