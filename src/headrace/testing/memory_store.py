"""MemoryRunStore: a RunStore in a dictionary, strict about its lock, with faults on request. For tests."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence

from headrace.core.errors import DestinationError
from headrace.core.receipts import FileKind, OutputFile

Hook = Callable[[str, str], None]
"""(operation, name): may raise, block, or call the store."""


class MemoryRunStore:
    """objects: all there is. before: called before each operation takes effect. after: when it has, before its answer is given
    (an error raised there is a lost answer). Hooks run outside the lock. bad: staged names whose fsync fails.
    """

    def __init__(self, root: str = "memory", *, conditional: bool = True) -> None:
        self.root = root
        self.conditional = conditional
        self.objects: dict[str, bytes] = {}
        self.synced: set[str] = set()
        self.bad: set[str] = set()
        self.before: Hook = _nothing
        self.after: Hook = _nothing
        self._lock = threading.Lock()

    def stage(self, name: str, data: bytes, final: str, *, rows: int = 0, kind: FileKind = "output") -> OutputFile:
        """As a worker would: put bytes under a staged name."""
        with self._lock:
            self.objects[name] = data
        return OutputFile(final, rows, len(data), hashlib.sha256(data).hexdigest(), name, kind)

    def create(self, name: str, data: bytes, folders: Sequence[str] = ()) -> bool:
        self.before("create", name)
        with self._lock:
            there = self.objects.setdefault(name, data)
        self.after("create", name)
        return there == data

    def read(self, name: str) -> bytes | None:
        self.before("read", name)
        with self._lock:
            return self.objects.get(name)

    def chunks(self, name: str) -> Iterator[bytes]:
        data = self.read(name) or b""
        return (data[start : start + 1000] for start in range(0, len(data), 1000))

    def write(self, name: str, data: bytes, *, durable: bool = True) -> None:
        self.before("write", name)
        with self._lock:
            self.objects[name] = data
        self.after("write", name)

    def names(self, folder: str) -> Iterator[str]:
        self.before("names", folder)
        inside = f"{folder}/" if folder else ""
        with self._lock:
            found = sorted(name for name in self.objects if name.startswith(inside))
        return iter(found)

    def sync(self, files: Sequence[OutputFile]) -> tuple[OutputFile, ...]:
        condemned: list[OutputFile] = []
        for file in files:
            self.before("sync", file.staged)
            with self._lock:
                if file.staged not in self.objects:
                    raise DestinationError(f"the staged file {file.staged} is gone")
                if file.staged in self.bad:
                    condemned.append(file)
                else:
                    self.synced.add(file.staged)
        return tuple(condemned)

    def publish(self, files: Sequence[OutputFile]) -> None:
        for file in files:
            self.before("publish", file.name)
            with self._lock:
                self._publish(file)
            self.after("publish", file.name)

    def _publish(self, file: OutputFile) -> None:
        there = self.objects.get(file.name)
        staged = self.objects.pop(file.staged, None)
        if staged is None and there is None:
            raise DestinationError(f"{file.name} is neither staged nor there")
        if staged is not None and there not in (None, staged):
            raise DestinationError(f"{file.name} holds something else")
        if staged is not None:
            self.objects[file.name] = staged

    def remove(self, name: str) -> None:
        self.before("remove", name)
        with self._lock:
            for gone in [n for n in self.objects if n == name or n.startswith(f"{name}/")]:
                del self.objects[gone]
        self.after("remove", name)


def _nothing(_operation: str, _name: str) -> None:
    """No fault."""
