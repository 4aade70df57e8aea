"""RunStore: a destination as the commit protocol needs it. Names are relative to the destination's root, with "/"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from headrace.core.receipts import OutputFile


@runtime_checkable
class RunStore(Protocol):
    """Every operation may be called by any thread and again after a lost answer. Errors are DestinationError (full disk, no
    permission, a name that leaves the root) or TransientError (the storage's trouble outlasted the retries).

    root: for messages, without secrets. conditional: `create` is atomic against other drivers; False: single-writer mode,
    only one driver may be at work, and nobody checks.
    """

    root: str
    conditional: bool

    def create(self, name: str, data: bytes, folders: Sequence[str] = ()) -> bool:
        """Make the object if it is absent, durable on return. False: another one is there.

        folders: what else will be needed. A store that has folders makes them, and makes them durable, in the same go.

        True also when just these bytes are there already: a lost answer is read back, never guessed. What may conflict
        must therefore differ: callers put a writer's nonce into it.
        """
        ...

    def read(self, name: str) -> bytes | None:
        """The object's bytes; None when there is none."""
        ...

    def chunks(self, name: str) -> Iterator[bytes]:
        """The object's bytes, piece by piece, each of some megabytes at most; nothing when there is none. For large objects."""
        ...

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Atomically over what is there, durable on return. For what comes last (the manifest).

        durable: False for advice (a heartbeat): after a power cut it may be as it was before, or hold anything.
        """
        ...

    def names(self, folder: str) -> Iterator[str]:
        """All objects below `folder`, in any order, in little memory; none when there is no such folder."""
        ...

    def sync(self, files: Sequence[OutputFile]) -> tuple[OutputFile, ...]:
        """Make staged files durable, as a group. Those that could not be (an fsync error condemns a file) are returned.

        Raises DestinationError for a full disk.
        """
        ...

    def publish(self, files: Sequence[OutputFile]) -> None:
        """Give staged files their final names; durable and visible on return. Redo is harmless: a file whose staged bytes are
        gone and whose final name is there has been published.

        Raises DestinationError for a final name that holds something else.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove an object, or all below a folder. Nothing to remove is no error."""
        ...


@runtime_checkable
class WatchingStore(RunStore, Protocol):
    """A store whose `sync` does better when it is told before the first file is staged."""

    def watch(self) -> AbstractContextManager[None]:
        """Until it is left, files may be staged. One at a time; entered and left by any threads."""
        ...
