"""One pass over the opcodes of a pickle, before anything executes them."""

from __future__ import annotations

import pickletools
from typing import Any

from pifa_deploy.errors import InputRefusedError

# Opcodes that torch.save never writes: the copyreg extension registry, text ids, out-of-band buffers.
_REFUSED = {"EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_NESTING = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}
# A model nests its modules about ten deep.
_MAX_NESTING = 400
_MARK = -1


def check_stream(data: bytes, where: str) -> None:
    """Refuses streams that torch.save never writes and that could exhaust or crash the reader.

    Args:
        data: the whole pickle.
        where: the file, for messages.

    Raises:
        InputRefusedError: an opcode that torch.save never writes, a memo index beyond the length of the
            stream, objects nested too deep, or bytes after the end.
        ValueError: no pickle stream at all.
    """
    nesting, end = _Nesting(), 0
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name in _REFUSED:
            raise InputRefusedError(
                f"{where}: data.pkl uses opcode {opcode.name}, expected only those that torch.save writes"
            )
        # pickle allocates its memo up to the largest index it is told.
        if opcode.name in _PUT and isinstance(argument, int) and argument > len(data):
            raise InputRefusedError(
                f"{where}: data.pkl has memo index {argument}, expected at most one per byte of its {len(data)}"
            )
        if nesting.after(opcode, argument) > _MAX_NESTING:
            raise InputRefusedError(
                f"{where}: data.pkl nests objects more than {_MAX_NESTING} deep, expected the few levels of a model"
            )
        end = (position or 0) + 1
    if end != len(data):
        raise InputRefusedError(
            f"{where}: data.pkl has {len(data) - end} bytes after its end, expected none; the file was altered"
        )


class _Nesting:
    """An upper bound of how deep the value on top of pickle's stack is nested.

    Hashing a tuple recurses in C with no limit: a tuple nested some hundred thousand deep, used as a
    dictionary key, would end the process.
    """

    def __init__(self) -> None:
        self._stack: list[int] = []
        self._memo: dict[Any, int] = {}

    def after(self, opcode: pickletools.OpcodeInfo, argument: Any) -> int:
        """Applies one opcode and returns the depth of what it leaves on top."""
        name = opcode.name
        if name == "MARK":
            self._stack.append(_MARK)
            return 0
        if name in _PUT or name == "MEMOIZE":
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = self._stack[-1]
            return 0
        if name in _GET:
            self._stack.append(self._memo[argument])
            return 0
        depth = max(self._popped(opcode), default=0) + (name in _NESTING)
        self._stack.extend([depth] * len(opcode.stack_after))
        return depth

    def _popped(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        count, popped = len(opcode.stack_before), list[int]()
        if pickletools.markobject in opcode.stack_before:
            while (depth := self._stack.pop()) != _MARK:
                popped.append(depth)
            count = opcode.stack_before.index(pickletools.markobject)
        for _ in range(count):
            popped.append(self._stack.pop())
        return popped
