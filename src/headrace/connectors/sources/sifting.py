"""The lines of a chunk that can be parsed, found with few calls of the parser: one takes longer than a hundred lines.

A guess says which lines are doubtful. The others are parsed together, doubtful ones a few at a time. Invariant: the guess costs
or saves time, and changes nothing else; what can be parsed is for the parser alone to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from headrace.connectors.sources.unreadable import halves
from headrace.core.errors import DataError

T = TypeVar("T")
Doubtful = Callable[[bytes, int], bool]  # (a line with its end, its offset): is it likely that it can't be parsed?


class Lines:
    """The lines of a chunk. Which of them: an ascending array of their numbers."""

    def __init__(self, chunk: bytes, at: int, newline: bytes = b"\n") -> None:
        self._chunk = chunk
        self._at = at
        self._starts = line_starts(chunk, newline)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, line: int) -> bytes:
        return self._chunk[self._starts[line] : self._starts[line + 1]]

    def offset(self, line: int) -> int:
        return self._at + self._starts[line]

    def joined(self, which: Any) -> bytes:
        if adjacent(which):
            return self._chunk[self._starts[which[0]] : self._starts[which[-1] + 1]]
        return b"".join([self[line] for line in which.tolist()])

    def filled(self, which: Any) -> Any:
        """Those that hold more than blanks."""
        return which[[not self[line].isspace() for line in which.tolist()]]


def sifted(
    some: Lines, read: Callable[[Any], T], bad: Callable[[int, DataError], None], doubtful: Doubtful
) -> Iterator[tuple[Any, T]]:
    """(which, read(which)) for lines of which it raises no DataError, all together; the single lines that fail go to `bad`.

    In no order.
    """
    doubts = np.array([doubtful(some[line], some.offset(line)) for line in range(len(some))], dtype=bool)

    def tried(which: Any) -> Iterator[tuple[Any, T]]:
        def part(start: int, stop: int) -> tuple[Any, T]:
            return which[start:stop], read(which[start:stop])

        yield from halves(0, len(which), part, lambda i, error: bad(int(which[i]), error))

    if not doubts.all():
        yield from tried(np.flatnonzero(~doubts))
    doubted = np.flatnonzero(doubts)
    at, size = 0, 1
    while at < len(doubted):
        which = doubted[at : at + size]
        good = 0
        for made in tried(which):
            good += len(made[0])
            yield made
        at += size
        size = 2 * size if good == len(which) else 1  # where the guess is wrong it is often wrong


def adjacent(which: Any) -> bool:
    return int(which[-1] - which[0]) == len(which) - 1


def line_starts(chunk: bytes, newline: bytes = b"\n") -> list[int]:
    """Where each line of the chunk begins, and the chunk's length."""
    ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == newline[0]) + 1
    starts = [0, *ends.tolist()]
    return starts if starts[-1] == len(chunk) else [*starts, len(chunk)]
