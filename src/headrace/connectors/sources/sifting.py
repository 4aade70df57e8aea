"""The lines of a chunk that can be parsed, found with few calls of the parser: one takes longer than a hundred lines.

Bad lines are found by halving. Where that pays, a guess says which of the lines behind them are doubtful: those are parsed a
few at a time, the others together. Invariant: the guess costs or saves time, and changes nothing else. So it is made only where
lines are apart: those that can be parsed together can be parsed one by one, too, each to one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from headrace.connectors.sources.unreadable import halves
from headrace.core.errors import DataError

T = TypeVar("T")
WORTH_A_BAD_LINE = 10_000  # so many lines are guessed at in the time that finding a bad line by halving takes


class Guess(NamedTuple):
    """What a format tells of lines without parsing them.

    apart: of these lines, one after another, can none end more than one row, whatever comes before it? It has to be certain:
    then lines that are parsed together, to as many rows, can't have gone on behind their ends.
    doubtful: is it likely that this line can't be parsed?
    blanks: a line of nothing else has no row.
    """

    apart: Callable[[bytes], bool]
    doubtful: Callable[[bytes], bool]
    blanks: bytes


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

    def rest(self, line: int) -> bytes:
        return self._chunk[self._starts[line] :]

    def filled(self, blanks: bytes) -> Any:
        """Which lines hold more than blanks, for all lines."""
        counts = np.ones(256, dtype=bool)
        counts[list(blanks)] = False
        return np.logical_or.reduceat(counts[np.frombuffer(self._chunk, np.uint8)], self._starts[:-1])


class _Guessing(Exception): ...


def sifted(
    some: Lines, read: Callable[[Any], T], bad: Callable[[int, DataError], None], guess: Guess, found: int
) -> Iterator[tuple[Any, T]]:
    """(which, read(which)) for lines of which it raises no DataError, all together; the single lines that fail go to `bad`.

    In no order. Lines that do not adjoin are read together only where they are apart. found: so many bad lines came before.
    """
    left, asked = 0, False

    def is_guess_worth() -> bool:
        nonlocal asked
        if asked or not 0 < len(some) - left <= found * WORTH_A_BAD_LINE:
            return False
        asked = True
        return guess.apart(some.rest(left))

    def counted(line: int, error: DataError) -> None:
        nonlocal found, left
        bad(line, error)
        found, left = found + 1, line + 1
        if is_guess_worth():
            raise _Guessing

    try:
        if is_guess_worth():
            raise _Guessing
        yield from halves(0, len(some), lambda start, stop: _read(read, np.arange(start, stop)), counted)
    except _Guessing:
        yield from _guessed(some, left, read, bad, guess.doubtful)


def _guessed(
    some: Lines, left: int, read: Callable[[Any], T], bad: Callable[[int, DataError], None], doubtful: Callable[[bytes], bool]
) -> Iterator[tuple[Any, T]]:
    """The lines from number `left` on."""

    def tried(which: Any) -> Iterator[tuple[Any, T]]:
        yield from halves(
            0,
            len(which),
            lambda start, stop: _read(read, which[start:stop]),
            lambda i, error: bad(int(which[i]), error),
        )

    doubts = np.array([doubtful(some[line]) for line in range(left, len(some))], dtype=bool)
    if not doubts.all():
        yield from tried(left + np.flatnonzero(~doubts))
    doubted = left + np.flatnonzero(doubts)
    at, size = 0, 1
    while at < len(doubted):
        which = doubted[at : at + size]
        good = 0
        for made in tried(which):
            good += len(made[0])
            yield made
        at += size
        size = 2 * size if good == len(which) else 1  # where the guess is wrong it is often wrong


def _read(read: Callable[[Any], T], which: Any) -> tuple[Any, T]:
    return which, read(which)


def adjacent(which: Any) -> bool:
    return int(which[-1] - which[0]) == len(which) - 1


def line_starts(chunk: bytes, newline: bytes = b"\n") -> list[int]:
    """Where each line of the chunk begins, and the chunk's length."""
    ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == newline[0]) + 1
    starts = [0, *ends.tolist()]
    return starts if starts[-1] == len(chunk) else [*starts, len(chunk)]
