"""The processes of a `torchrun` that compress one model together; a single process is a group of one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import distributed

from pifa_deploy.errors import StageFailedError, first_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# A rank may wait this long for another one's largest solve.
_PATIENCE = timedelta(hours=2)
# Who fails waits this long for the first process to tell: torchrun ends all processes as soon as one has ended.
_GRACE = 5.0  # seconds
_FAILURE, _TOLD = "pifa-deploy failure", "pifa-deploy failure told"


class PeerError(StageFailedError):
    """A failure in a process other than the first one, which tells it: nothing is left to say here."""


class PeerGoneError(StageFailedError):
    """Another process of the group is gone."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that share the work.

    Attributes:
        rank: number of this process.
        count: number of processes.
        device: where this process computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def mine(self, items: Sequence[Any]) -> list[Any]:
        """Returns every `count`-th item, beginning with the `rank`-th."""
        return list(items[self.rank :: self.count])

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum of the processes' tensors, in place."""
        if self.count > 1:
            with _peers():
                distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _peers():
            distributed.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Returns the main process' value."""
        if self.count == 1:
            return value
        values = [value]
        with _peers():
            distributed.broadcast_object_list(values, src=0)
        return values[0]


@contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """Yields the group that `torchrun` started, or a group of one.

    A failure of any process ends all of them, and the first one tells it.

    Args:
        device: "cpu" or "cuda"; the GPU when there is one if left out.

    Raises:
        ValueError: a device that this machine lacks.
        PeerGoneError: another process died without a word.
        PeerError: in all processes but the first, for every exception of the block.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device is {device!r}, expected cpu{', or cuda' if torch.cuda.is_available() else ''}")
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(rank=0, count=1, device=place)
        return
    if kind == "cuda":
        # Before there is a group: NCCL sends objects through the current device.
        torch.cuda.set_device(place)
    with _peers():
        # Here, because a build of torch may come without: those for Jetson did.
        from torch.distributed.rendezvous import rendezvous

        store, rank, count = next(rendezvous("env://", timeout=_PATIENCE))
        backend = "nccl" if kind == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE)
    try:
        yield Processes(rank=rank, count=count, device=place)
    except (Exception, KeyboardInterrupt) as error:
        _raise_told(error, rank, store)
    distributed.destroy_process_group()


def _raise_told(error: BaseException, rank: int, store: Store) -> NoReturn:
    """Ends the group and raises what this process has to say about a failure, perhaps another process' fault.

    Raises:
        PeerError: this is not the first process.
        StageFailedError: what another process said, where this error only follows from its end.
        BaseException: `error` itself otherwise.
    """
    follows = isinstance(error, (PeerGoneError, KeyboardInterrupt))
    cause = None
    # The store may be gone with the process that held it; one more signal to end changes nothing.
    with contextlib.suppress(RuntimeError, KeyboardInterrupt):
        store.set_timeout(timedelta(seconds=_GRACE))
        if not follows:
            # Before the group ends, which is when the others notice.
            store.compare_set(_FAILURE, "", f"process {rank}: {error}")
        elif rank == 0 and store.check([_FAILURE]):
            cause = store.get(_FAILURE).decode()
        # With NCCL the end of a group waits for all its processes, and some may never come.
        if distributed.get_backend() == "gloo":
            distributed.destroy_process_group()
        if rank == 0:
            store.set(_TOLD, "")
        # Asked again and again: a wait of torch that comes to its end is two more lines.
        until = time.monotonic() + _GRACE
        while rank != 0 and not store.check([_TOLD]) and time.monotonic() < until:
            time.sleep(0.1)
    if rank != 0:
        raise PeerError(str(error)) from error
    if cause is not None:
        raise StageFailedError(cause) from error
    raise error


@contextmanager
def _peers() -> Iterator[None]:
    """Turns what torch raises when a peer is gone into one line."""
    try:
        yield
    except RuntimeError as error:
        raise PeerGoneError(
            f"another process of this torchrun is gone ({first_line(error)}); run the same command again to go on"
        ) from error
