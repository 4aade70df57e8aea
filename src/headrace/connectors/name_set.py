"""NameSet: which names were seen, when there are millions of them. NameList: and in which order.

Memory is 8 bytes a name: its hash. A name that was put in is always found. One that was not is found, too, when its hash of 64
bits is another's: of ten million such names, asked of ten million, one in about 200,000 runs.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator

import numpy as np

from headrace.connectors.spool import FileSpool

_READ_BYTES = 1 << 16


class NameSet:
    """Some names, as they are when it is made."""

    def __init__(self, names: Iterable[str]) -> None:
        self._hashes = array("q", map(hash, names))
        if self._hashes:
            np.frombuffer(self._hashes, np.int64).sort()

    def __contains__(self, name: object) -> bool:
        wanted = hash(name)
        at = bisect_left(self._hashes, wanted)
        return at < len(self._hashes) and self._hashes[at] == wanted

    def __len__(self) -> int:
        return len(self._hashes)


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
