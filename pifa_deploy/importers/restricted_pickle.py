"""Reads the object graph of a `torch.save` file without importing or running anything that the file names.

Every global of the pickle must be in `ALLOWED` or in one of the `NAMESPACES`, and none is imported: it
resolves to a class of this module that only remembers what the file says. Tensors become `PickledTensor`.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from pifa_deploy.errors import InputRefusedError
from pifa_deploy.importers.pickle_stream import check_stream
from pifa_deploy.importers.torch_archive import PickledTensor, TorchArchive, tensor_on


class _Sealed(type):
    """Keeps the classes below as they are: the opcode BUILD also sets attributes of classes."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError(f"data.pkl sets {name!r} on a class")


class InertRecord(metaclass=_Sealed):
    """What the file says about one object; neither its class nor a function of it exists here.

    Attributes:
        origin: "module.qualname" of the class, or of the function that the file would have called.
        arguments: positional arguments of that call.
        state: what the file would have passed to `__setstate__` or put into `__dict__`.
        elements: what it appended or added.
        entries: what it set by key.
    """

    __slots__ = ("arguments", "elements", "entries", "state")
    origin = ""
    arguments: tuple[Any, ...]
    state: Any
    elements: list[Any]
    entries: dict[Any, Any]

    def __new__(cls, *arguments: Any, **_: Any) -> InertRecord:
        """Remembers the positional arguments."""
        record = object.__new__(cls)
        record.arguments, record.state, record.elements, record.entries = arguments, None, [], {}
        return record

    def __init__(self, *_: Any, **__: Any) -> None:
        """Takes any arguments; `__new__` keeps them."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        """Remembers a list element."""
        self.elements.append(value)

    def extend(self, values: Any) -> None:
        """Remembers list elements."""
        self.elements.extend(values)

    def add(self, value: Any) -> None:
        """Remembers a set element."""
        self.elements.append(value)

    @property
    def attributes(self) -> dict[Any, Any]:
        """The instance attributes that the file gives, whether in `__dict__` or in slots."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        merged: dict[Any, Any] = {}
        for part in parts:
            if isinstance(part, dict):
                merged.update(part)
        return merged


class _PlainDict(dict[Any, Any], metaclass=_Sealed):
    """An ordered dictionary whose extra attributes (`_metadata` of a state dict) are left aside."""

    def __setstate__(self, state: Any) -> None:
        """Takes nothing over."""


class _PlainSet(metaclass=_Sealed):
    def __new__(cls, elements: Any = ()) -> Any:
        return set(_sequence(elements))


class _PlainFrozenSet(metaclass=_Sealed):
    def __new__(cls, elements: Any = ()) -> Any:
        return frozenset(_sequence(elements))


class _Latin1Bytes(metaclass=_Sealed):
    """How pickle protocol 2 writes bytes: text whose code points are the bytes."""

    def __new__(cls, text: Any, encoding: Any) -> Any:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise TypeError(f"_codecs.encode with encoding {encoding!r}, expected text and 'latin1'")
        return text.encode("latin-1")


class _Size(metaclass=_Sealed):
    def __new__(cls, sizes: Any = ()) -> Any:
        return tuple(_sequence(sizes))


class _Device(metaclass=_Sealed):
    def __new__(cls, *parts: Any) -> Any:
        return ":".join(str(part) for part in parts if isinstance(part, (str, int)))


class _TensorV2(metaclass=_Sealed):
    def __new__(cls, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        # rest: requires_grad, backward hooks, and flags such as "conj" or "neg" that change the values.
        if len(rest) > 2 and rest[2]:
            raise TypeError(f"a tensor carries flags {sorted(map(str, rest[2]))}, expected none")
        return tensor_on(storage, offset, size, stride)


class _Parameter(metaclass=_Sealed):
    def __new__(cls, data: Any, *_: Any) -> Any:
        if not isinstance(data, PickledTensor):
            raise TypeError(f"a parameter wraps a {type(data).__name__}, expected a tensor")
        return data


class _FromType(metaclass=_Sealed):
    """A tensor with Python attributes; the attributes are left aside."""

    def __new__(cls, rebuild: Any, _: Any, arguments: Any, *__: Any) -> Any:
        if rebuild is not _TensorV2 and rebuild is not _Parameter:
            raise TypeError("a tensor is rebuilt by something other than torch._utils, expected _rebuild_tensor_v2")
        return rebuild(*_sequence(arguments))


class _StorageType(metaclass=_Sealed):
    """Says the dtype of a storage; never called."""

    dtype = torch.uint8


def _sequence(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"found a {type(value).__name__} where a list or tuple was expected")
    return value


_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

# Global -> (what it becomes here, why a checkpoint may name it).
ALLOWED: dict[str, tuple[Any, str]] = {
    "collections.OrderedDict": (_PlainDict, "holds parameters, buffers, modules and hooks of a torch module"),
    "builtins.dict": (_PlainDict, "a dictionary subclass is built from it"),
    "builtins.set": (_PlainSet, "holds the names of non-persistent buffers"),
    "builtins.frozenset": (_PlainFrozenSet, "holds constants of some configurations"),
    "_codecs.encode": (_Latin1Bytes, "protocol 2 writes the tokenizer's bytes so; only latin-1, done here"),
    "torch.Size": (_Size, "a shape kept as an attribute; a tuple here"),
    "torch.device": (_Device, "a device kept as an attribute; a string here"),
    "torch._utils._rebuild_tensor_v2": (_TensorV2, "every tensor; bounds are checked against its storage"),
    "torch._utils._rebuild_parameter": (_Parameter, "every parameter; the tensor it wraps"),
    "torch._utils._rebuild_parameter_with_state": (_Parameter, "a parameter with Python attributes"),
    "torch._tensor._rebuild_from_type_v2": (_FromType, "a tensor with Python attributes"),
    "torch.Tensor": (None, "names the type of such a tensor; a record here"),
    "functools.partial": (None, "activation functions with options; a record here, never called"),
    "torch.storage.UntypedStorage": (_StorageType, "a storage without dtype: bytes"),
    **{
        f"torch.{name}": (_Sealed("_StorageType", (_StorageType,), {"dtype": dtype}), f"a storage of {dtype}")
        for name, dtype in _STORAGE_DTYPES.items()
    },
    **{str(dtype): (dtype, "a dtype kept in the configuration") for dtype in _STORAGE_DTYPES.values()},
}
# Package -> why a checkpoint may name what is in it. All of it becomes `InertRecord`s.
NAMESPACES = {
    "transformers": "the model, its configuration and its tokenizer",
    "tokenizers": "the Rust tokenizer, whose state is JSON",
    "torch.nn": "modules and activation functions",
    "torch._C._nn": "activation functions implemented in C++",
    "utils": "the factorised layers of the research code: utils.utils, utils.linear_pivot",
}


class _Unpickler(pickle.Unpickler):
    """pickle's own machine, cut off from every import: globals and storages resolve to the classes above."""

    def __init__(self, archive: TorchArchive, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._archive = archive
        self._records: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Returns the stand-in for a global; raises InputRefusedError when the allow-list lacks it."""
        module = "builtins" if module == "__builtin__" else module
        origin = f"{module}.{name}"
        found, _ = ALLOWED.get(origin, (None, ""))
        if found is not None:
            return found
        inside = any(module == package or module.startswith(f"{package}.") for package in NAMESPACES)
        if origin not in ALLOWED and not inside:
            raise InputRefusedError(
                f"{self._archive.path}: data.pkl names the global {_short(origin)}, which is not on the allow-list; "
                "expected a model of the research code saved by torch.save; nothing of the file was run"
            )
        if origin not in self._records:
            self._records[origin] = _Sealed("InertRecord", (InertRecord,), {"origin": origin, "__slots__": ()})
        return self._records[origin]

    def persistent_load(self, pid: Any) -> Any:
        """Returns the storage that the file names as ('storage', type, key, location, numel)."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise TypeError("a persistent id is no ('storage', type, key, location, numel) tuple")
        _, kind, key, _, numel = pid
        if not (isinstance(kind, type) and issubclass(kind, _StorageType)):
            raise TypeError("a storage has no type of torch")
        if not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise TypeError(f"a storage has key {_short(str(key))!r} and numel {_short(str(numel))}")
        return self._archive.storage(key, kind.dtype, numel)


def load(archive: TorchArchive) -> Any:
    """Returns the object graph of `data.pkl`: plain values, `PickledTensor`s and `InertRecord`s.

    Raises:
        InputRefusedError: names the file and what was found: a global off the allow-list, bytes after the
            pickle, a tensor outside its storage, or a stream that is no sound pickle.
    """
    data = archive.pickle_bytes()
    try:
        check_stream(data, str(archive.path))
        return _Unpickler(archive, data).load()
    except InputRefusedError:
        raise
    # Whatever else fails on the way, the cause is the file.
    except Exception as error:
        raise InputRefusedError(
            f"{archive.path}: data.pkl is no sound pickle of a checkpoint ({type(error).__name__}: "
            f"{_short(str(error))}); expected a file written by torch.save"
        ) from None


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:120]}..."
