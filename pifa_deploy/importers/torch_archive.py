"""The zip file that `torch.save` writes, read member by member: bounds are checked before bytes are read.

Layout (torch/serialization.py): one top folder with `data.pkl` (the object graph), `byteorder`, and one
uncompressed member `data/<key>` per storage. Tensors in the graph name a storage, an offset and strides.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from pifa_deploy.errors import InputRefusedError

# torch.save before 1.6 (and with _use_new_zipfile_serialization=False) begins with this pickled number.
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_MAX_PICKLE_BYTES = 1 << 28
_MAX_EXTENT = 1 << 62
_CHUNK_BYTES = 1 << 24
# A stride of 0 repeats elements; a view may be so many times its storage, and small ones anything below the slack.
_MAX_REPEATS = 16
_REPEAT_SLACK_BYTES = 1 << 20


class TorchArchive:
    """An open `torch.save` file; use it as a context manager."""

    def __init__(self, path: Path) -> None:
        """Opens the file and checks its table of contents.

        Raises:
            InputRefusedError: no zip, cut short, compressed, encrypted, overlapping or duplicate members,
                big-endian, or without exactly one `data.pkl`.
        """
        self.path = path
        self._uses: dict[str, int] = {}
        self._cache: dict[str, torch.UntypedStorage] = {}
        self._zip = _opened(path)
        try:
            self._members = self._checked_members()
            self._prefix = self._top_folder()
            self._check_byte_order()
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> TorchArchive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
        self._cache.clear()

    def pickle_bytes(self) -> bytes:
        """Returns `data.pkl`."""
        info = self._members[f"{self._prefix}/data.pkl"]
        if info.file_size > _MAX_PICKLE_BYTES:
            self._refuse(f"{info.filename} has {info.file_size} bytes", f"at most {_MAX_PICKLE_BYTES}")
        return bytes(self._read(info))

    def storage(self, key: str, dtype: torch.dtype, numel: int) -> PickledStorage:
        """Returns the storage `data/<key>` unread; its size in the file must be that of `numel` elements."""
        name, expected = f"{self._prefix}/data/{key}", numel * dtype.itemsize
        if name not in self._members:
            self._refuse(f"storage {key!r} has no member {name!r}", "one member per storage")
        if self._members[name].file_size != expected:
            self._refuse(
                f"{name} has {self._members[name].file_size} bytes",
                f"{expected}, for the {numel} elements of {dtype} that data.pkl announces",
            )
        return PickledStorage(archive=self, key=key, dtype=dtype, numel=numel)

    def count_use(self, key: str) -> None:
        """Notes one more tensor on a storage; only those that several tensors share are kept once read."""
        self._uses[key] = self._uses.get(key, 0) + 1

    def is_shared(self, key: str) -> bool:
        """Tells whether more than one tensor lies on the storage."""
        return self._uses.get(key, 0) > 1

    def read_storage(self, key: str) -> torch.UntypedStorage:
        """Reads `data/<key>`, once if several tensors share it; its checksum is verified."""
        if key in self._cache:
            return self._cache[key]
        storage: torch.UntypedStorage = self._read(self._members[f"{self._prefix}/data/{key}"]).untyped_storage()
        if self.is_shared(key):
            self._cache[key] = storage
        return storage

    def _read(self, info: zipfile.ZipInfo) -> Any:
        """Returns the member as a uint8 tensor [file_size]."""
        data = torch.empty(info.file_size, dtype=torch.uint8)
        view, at = data.numpy(), 0
        try:
            with self._zip.open(info) as member:
                while chunk := member.read(_CHUNK_BYTES):
                    view[at : at + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
                    at += len(chunk)
        except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            self._refuse(f"{info.filename} is damaged ({error})", "the bytes that torch.save wrote")
        if at != info.file_size:
            self._refuse(f"{info.filename} ends after {at} bytes", f"{info.file_size}")
        return data

    def _checked_members(self) -> dict[str, zipfile.ZipInfo]:
        infos = self._zip.infolist()
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
                self._refuse(f"{info.filename!r} is compressed or encrypted", "stored members, as torch.save writes")
        members = {info.filename: info for info in infos}
        if len(members) != len(infos):
            self._refuse("two members have the same name", "one member per name")
        total, size = sum(info.file_size for info in infos), self.path.stat().st_size
        if total > size:
            self._refuse(f"its members claim {total} bytes", f"at most the {size} bytes of the file")
        return members

    def _top_folder(self) -> str:
        names = [name for name in self._members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            self._refuse(f"it holds {len(names)} members <name>/data.pkl", "exactly one, as torch.save writes")
        return names[0].partition("/")[0]

    def _check_byte_order(self) -> None:
        info = self._members.get(f"{self._prefix}/byteorder")
        if info is None:
            return
        found = bytes(self._read(info))[:16]
        if found != b"little":
            self._refuse(f"its byteorder is {found!r}", "b'little'; save it again on a little-endian machine")

    def _refuse(self, found: str, expected: str) -> NoReturn:
        raise InputRefusedError(f"{self.path}: {found}, expected {expected}")


class _Finished:
    """Base of values that the pickle stream may pass around but not change."""

    def __setstate__(self, state: object) -> None:
        # The pickle opcode BUILD would otherwise write past the checks into __dict__.
        raise TypeError(f"data.pkl sets the state of a {type(self).__name__}, which has none")


@dataclass(frozen=True, kw_only=True)
class PickledStorage(_Finished):
    """One storage of the file, not read yet: `numel` elements of `dtype` in member `data/<key>`."""

    archive: TorchArchive
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, kw_only=True)
class PickledTensor(_Finished):
    """One tensor of the file, not read yet, whose elements are known to lie inside its storage.

    Attributes:
        storage: where the elements are.
        offset: index of the first element.
        shape: size of each dimension.
        stride: step of each dimension, in elements; 0 or more.
    """

    storage: PickledStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Element type."""
        return self.storage.dtype

    def read(self) -> torch.Tensor:
        """Returns a contiguous CPU tensor that shares its memory with no other."""
        archive, key = self.storage.archive, self.storage.key
        whole = torch.empty(0, dtype=self.dtype)
        whole.set_(archive.read_storage(key), self.offset, self.shape, self.stride)
        owns = whole.is_contiguous() and whole.numel() == self.storage.numel and not archive.is_shared(key)
        return whole if owns else whole.clone(memory_format=torch.contiguous_format)


def tensor_on(storage: Any, offset: Any, shape: Any, stride: Any) -> PickledTensor:
    """Places a tensor on a storage, as the file describes it.

    Raises:
        InputRefusedError: not numbers, negative, too large, some element lies outside the storage, or strides of 0
            make it far larger than the storage.
    """
    if not isinstance(storage, PickledStorage):
        raise TypeError(f"a tensor lies on a {type(storage).__name__}, expected a storage")
    where = f"{storage.archive.path}: a tensor on data/{storage.key}"
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise InputRefusedError(f"{where} has no matching size and stride tuples, expected one stride per dimension")
    for number in (offset, *shape, *stride):
        if type(number) is not int or not 0 <= number < _MAX_EXTENT:
            raise InputRefusedError(
                f"{where} has size {shape}, stride {stride}, offset {offset}; expected integers of 0 or more"
            )
    elements = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if elements >= _MAX_EXTENT or (last >= storage.numel if elements else offset > storage.numel):
        raise InputRefusedError(
            f"{where} with size {shape}, stride {stride}, offset {offset} reaches element {last}, "
            f"expected less than the {storage.numel} elements of the storage"
        )
    bytes_asked, bytes_held = elements * storage.dtype.itemsize, storage.numel * storage.dtype.itemsize
    if bytes_asked > _MAX_REPEATS * bytes_held + _REPEAT_SLACK_BYTES:
        raise InputRefusedError(
            f"{where} with size {shape}, stride {stride} repeats the {bytes_held} bytes of the storage into "
            f"{bytes_asked}, expected at most {_MAX_REPEATS} times as many; save a tensor without strides of 0"
        )
    storage.archive.count_use(storage.key)
    return PickledTensor(storage=storage, offset=offset, shape=shape, stride=stride)


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"PK"):
            return zipfile.ZipFile(path)
    except OSError as error:
        raise InputRefusedError(f"{path}: cannot be read ({error.strerror}); expected a readable file") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise InputRefusedError(
            f"{path}: starts as a zip file but is cut short or damaged ({error}); expected a whole torch.save file"
        ) from None
    if _LEGACY_MAGIC in start:
        raise InputRefusedError(
            f"{path}: was saved in the format of torch before 1.6, expected a zip file; "
            "save it again with a current torch.save"
        )
    raise InputRefusedError(f"{path}: begins with {start[:8]!r}, expected a zip file written by torch.save")
