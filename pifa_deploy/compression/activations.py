"""Activations of one layer at a time, for all calibration tokens: in memory or in files, in a chosen dtype."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

from pifa_deploy.errors import OutputError, StageFailedError


class ActivationStore:
    """Tensors by (slot, batch number): a slot is one kind of activation, a batch some calibration windows.

    Attributes:
        peak_bytes: most bytes that were stored at once.
    """

    def __init__(self, dtype: torch.dtype, *, folder: Path | None = None) -> None:
        """Opens an empty store.

        Args:
            dtype: of what is stored, fp32, fp16 or bf16.
            folder: keep each slot in a file here instead of in memory. The files have no names: whatever ends the
                process, nothing is left of them.

        Raises:
            OutputError: no file can be made in the folder.
        """
        self._dtype, self._folder = dtype, folder
        self._held: dict[tuple[str, int], torch.Tensor | tuple[int, torch.Size]] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._bytes = 0
        self.peak_bytes = 0
        if folder is not None:
            with self._writing():
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()

    def put(self, slot: str, batch: int, value: torch.Tensor, *, name: str | None = None) -> None:
        """Stores a tensor, in place of an earlier one; `name` is what an error calls it instead of the slot.

        Raises:
            StageFailedError: it has NaN or Inf, perhaps only in the store's dtype.
            OutputError: the disk is full.
        """
        stored = value.detach().to("cpu", self._dtype)
        # Of NaN both are NaN; unlike isfinite() this makes no second array.
        if stored.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(stored)):
            advice = "check the model"
            if self._dtype != torch.float32 and bool(torch.isfinite(value).all()):
                advice = "store activations as fp32"
            raise StageFailedError(f"{name or slot} has NaN or Inf in {self._dtype}; {advice}")
        before = self._held.get((slot, batch))
        self._forget(slot, batch)
        self._bytes += stored.nbytes
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        if self._folder is None:
            self._held[slot, batch] = stored.clone() if stored.data_ptr() == value.data_ptr() else stored
            return
        if slot not in self._files:
            with self._writing():
                self._files[slot] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - `drop` closes it
        file = self._files[slot]
        with self._writing():
            if isinstance(before, tuple) and before[1] == stored.shape:
                start = file.seek(before[0])
            else:
                start = file.seek(0, os.SEEK_END)
            file.write(stored.contiguous().view(torch.uint8).numpy().data)
            file.flush()
        self._held[slot, batch] = (start, stored.shape)

    def get(self, slot: str, batch: int, device: torch.device) -> torch.Tensor:
        """Returns a stored tensor as fp32 on `device`."""
        held = self._held[slot, batch]
        if isinstance(held, tuple):
            start, shape = held
            held = torch.empty(shape, dtype=self._dtype)
            self._files[slot].seek(start)
            self._files[slot].readinto(held.view(torch.uint8).numpy())  # type: ignore[attr-defined]
        return held.to(device, torch.float32)

    def has(self, slot: str, batch: int) -> bool:
        """Tells whether the slot holds that batch."""
        return (slot, batch) in self._held

    def drop(self, slot: str) -> None:
        """Forgets all batches of a slot."""
        for key in [key for key in self._held if key[0] == slot]:
            self._forget(*key)
        if slot in self._files:
            # What a full disk kept back is tried once more here.
            with contextlib.suppress(OSError):
                self._files.pop(slot).close()

    def close(self) -> None:
        """Forgets everything."""
        for slot in {slot for slot, _ in self._held} | set(self._files):
            self.drop(slot)

    def _forget(self, slot: str, batch: int) -> None:
        held = self._held.pop((slot, batch), None)
        if isinstance(held, torch.Tensor):
            self._bytes -= held.nbytes
        elif held is not None:
            self._bytes -= held[1].numel() * self._dtype.itemsize

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = errno.errorcode.get(error.errno or 0, str(error))
            raise OutputError(
                f"{self._folder}: activations could not be written ({reason}); free some space or choose another "
                "--activation-folder"
            ) from error
