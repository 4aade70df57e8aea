"""NameSet: which names were seen, when there are millions of them. GrowingNames: when they come one by one. NameList: and in
which order.

Memory is 8 bytes a name: its hash. A name that was put in is always found. One that was not is found, too, when its hash of 64
bits is another's: of ten million such names, asked of ten million, one in about 200,000 runs.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from hashlib import blake2b

import numpy as np

from headrace.connectors.spool import FileSpool

_READ_BYTES = 1 << 16
_LOOSE = 1 << 14  # newest names of a GrowingNames: about 1 MB


class NameSet:
    """Some names, as they are when it is made."""

    def __init__(self, names: Iterable[str]) -> None:
        self._hashes = array("q", map(hash, names))
        if self._hashes:
            np.frombuffer(self._hashes, np.int64).sort()

    def __contains__(self, name: object) -> bool:
        return _holds(self._hashes, hash(name))

    def __len__(self) -> int:
        return len(self._hashes)


class GrowingNames:
    """Names that come one after another. What is found is the same in every process, a name taken for another included."""

    def __init__(self) -> None:
        self._loose: set[int] = set()
        self._sorted: list[array[int]] = []  # each more than twice the size of the next

    def add(self, name: str) -> None:
        self._loose.add(_digest(name))
        if len(self._loose) == _LOOSE:
            self._sort()

    def __contains__(self, name: object) -> bool:
        if not self._loose and not self._sorted:
            return False
        wanted = _digest(str(name))
        return wanted in self._loose or any(_holds(digests, wanted) for digests in self._sorted)

    def _sort(self) -> None:
        found = [np.fromiter(self._loose, np.int64, len(self._loose))]
        self._loose.clear()
        while self._sorted and len(self._sorted[-1]) <= 2 * sum(map(len, found)):
            found.append(np.frombuffer(self._sorted.pop(), np.int64))
        merged = np.concatenate(found)
        merged.sort()
        self._sorted.append(array("q", merged.tobytes()))


def _digest(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True)


def _holds(hashes: array[int], wanted: int) -> bool:
    at = bisect_left(hashes, wanted)
    return at < len(hashes) and hashes[at] == wanted


class NameList:
    """Names without control characters, each once, in the order in which they came. They lie in a FileSpool."""

    def __init__(self) -> None:
        self._spool = FileSpool()
        self._known: list[NameSet] = []

    def extend(self, names: Iterable[str]) -> None:
        """Names that are in the list stay where they are. Among those that come now there must be no two of the same name."""

        def new() -> Iterator[str]:
            for name in names:
                if name not in self:
                    self._spool.append(name.encode("utf-8", "surrogatepass") + b"\n")
                    yield name

        self._known.append(NameSet(new()))

    def __contains__(self, name: object) -> bool:
        return any(name in known for known in self._known)

    def __len__(self) -> int:
        return sum(len(known) for known in self._known)

    def __iter__(self) -> Iterator[str]:
        at, rest = 0, b""
        while data := self._spool.read(at, _READ_BYTES):
            at += len(data)
            *names, rest = (rest + data).split(b"\n")
            yield from (name.decode("utf-8", "surrogatepass") for name in names)
