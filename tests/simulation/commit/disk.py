"""A destination that forgets: files and directory entries that were not synced may be lost or torn by a power cut.

`Disk` is shared; each driver holds a `Handle`, a RunStore whose every step passes a point at which the world may interrupt it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from random import Random

from headrace.core.errors import DestinationError, TransientError
from headrace.core.receipts import OutputFile

TORN = b"torn"


class Inode:
    __slots__ = ("data", "durable")

    def __init__(self, data: bytes, durable: bool) -> None:
        self.data = data
        self.durable = durable


class Disk:
    """live: what processes see. safe: directory entries that would survive a power cut. version: counts changes of `live`."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.live: dict[str, Inode] = {}
        self.safe: dict[str, Inode] = {}
        self.version = 0
        self.sync_directories = True

    def put(self, name: str, data: bytes, *, durable: bool) -> None:
        self.live[name] = inode = Inode(data, durable)
        if durable:
            self.safe[name] = inode
        self.version += 1

    def drop(self, name: str) -> None:
        if self.live.pop(name, None) is not None:
            self.version += 1

    def sync_folder(self) -> None:
        """An fsync of the root: what was removed there stays so."""
        for name in [n for n in self.safe if "/" not in n and n not in self.live]:
            del self.safe[name]

    def power_cut(self) -> None:
        """Unsynced changes of directories happen or don't, one by one; unsynced files are torn or whole."""
        for name in sorted(self.live.keys() | self.safe.keys()):
            now, then = self.live.get(name), self.safe.get(name)
            if now is not then and self.rng.random() < 0.5:
                now = then
            if now is None:
                self.live.pop(name, None)
                self.safe.pop(name, None)
                continue
            if not now.durable and self.rng.random() < 0.7:
                now.data = TORN
            self.live[name] = self.safe[name] = now
        for inode in self.live.values():
            inode.durable = True
        self.version += 1


class Handle:
    """A RunStore. point(operation): may raise, and may let others run meanwhile. fault(operation): "", "lost" (done, and
    reported as failed), "failed" (not done), "full" (the disk), "bad" (an fsync that fails).
    """

    root = "simulated"
    conditional = True

    def __init__(self, disk: Disk, point: Callable[[str], None], fault: Callable[[str], str]) -> None:
        self.disk = disk
        self._point = point
        self._fault = fault

    def _begin(self, operation: str) -> str:
        self._point(operation)
        fault = self._fault(operation)
        if fault == "failed":
            raise TransientError(f"{operation} failed")
        if fault == "full":
            raise DestinationError("no space left")
        return fault

    def _end(self, fault: str, operation: str) -> None:
        if fault == "lost":
            raise TransientError(f"the answer to {operation} was lost")
        self._point(operation)

    def create(self, name: str, data: bytes, folders: Sequence[str] = ()) -> bool:
        fault = self._begin("create")
        there = self.disk.live.get(name)
        if there is None:
            self.disk.put(name, data, durable=True)
        self._end(fault, "create")
        return there is None or there.data == data

    def read(self, name: str) -> bytes | None:
        self._begin("read")
        there = self.disk.live.get(name)
        return None if there is None else there.data

    def chunks(self, name: str) -> Iterator[bytes]:
        data = self.read(name)
        return iter(() if data is None else (data,))

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        fault = self._begin("write")
        self.disk.put(name, data, durable=durable)
        self._end(fault, "write")

    def names(self, folder: str) -> Iterator[str]:
        self._begin("names")
        inside = f"{folder}/" if folder else ""
        return iter(sorted(name for name in self.disk.live if name.startswith(inside)))

    def sync(self, files: Sequence[OutputFile]) -> tuple[OutputFile, ...]:
        condemned: list[OutputFile] = []
        for file in files:
            fault = self._begin("sync")
            inode = self.disk.live.get(file.staged)
            if inode is None:
                raise DestinationError(f"{file.staged} is gone")
            if fault == "bad":
                condemned.append(file)
                continue
            inode.durable = True
            self.disk.safe[file.staged] = inode
            self._end(fault, "sync")
        return tuple(condemned)

    def publish(self, files: Sequence[OutputFile]) -> None:
        for file in files:
            fault = self._begin("publish")
            self._link(file)
            self._point("publish")
            if self.disk.sync_directories and file.name in self.disk.live:
                self.disk.safe[file.name] = self.disk.live[file.name]
            self._point("publish")
            self.disk.drop(file.staged)
            if not self.disk.sync_directories:  # the removal gets to the disk before the new name
                self.disk.safe.pop(file.staged, None)
            self._end(fault, "publish")

    def _link(self, file: OutputFile) -> None:
        staged, there = self.disk.live.get(file.staged), self.disk.live.get(file.name)
        if there is None:
            if staged is None:
                raise DestinationError(f"{file.name} is neither staged nor there")
            self.disk.live[file.name] = staged
            self.disk.version += 1
        elif staged is not None and hashlib.sha256(there.data).digest() != hashlib.sha256(staged.data).digest():
            raise DestinationError(f"{file.name} holds something else")

    def remove(self, name: str) -> None:
        fault = self._begin("remove")
        for gone in [n for n in self.disk.live if n == name or n.startswith(f"{name}/")]:
            self.disk.drop(gone)
        self._end(fault, "remove")
