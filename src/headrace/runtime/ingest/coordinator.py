"""Coordinator: who of n ranks is in which epoch, and which rows of its run are whose. Pure: no I/O, no lock, no clock.

A rank's seat: AWAY, then WAITING (joined, the epoch has not begun), then READING, then AWAY again when it has got all, left, or
died. An epoch begins when all n are WAITING and the run of the one before has ended.

Blocks are opaque: what is handed out are pieces of them, ranges of rows. So the same coordinator serves whether blocks are
Arrow batches in this process or references to a store.

Invariants:
- The pieces that ranks are given in an epoch are disjoint. With `equal` none gets a row more than another, fewer than n rows
  are given to nobody, and those of a rank that leaves are dropped; otherwise every row goes to one that reads.
- At most AHEAD pieces and what one more block makes wait for a rank; what lies beyond that in `arrived` is bounded by the
  credits of the run: a Took for each block that went out of it.
- A rank that is not READING holds nothing.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import Any, Final

from msgspec import Struct, field

from headrace.core.errors import PlanError

AHEAD = 2  # pieces that may wait for a rank before the run is held back: one to take, and one meanwhile


class Piece(Struct, frozen=True):
    """`rows` rows of a block from `start` on."""

    block: Any
    start: int
    rows: int


class Answer(Enum):
    """What `take` answers instead of a piece. WAIT: ask again after the next change. END: the epoch is over for this rank."""

    WAIT = "wait"
    END = "end"


class Place(Enum):
    AWAY = "away"
    WAITING = "waiting"
    READING = "reading"


# --- what the owner of the run is told


class Begin(Struct, frozen=True):
    """Start the run of this epoch: `arrived` for each of its blocks, `ended` when it is over."""

    epoch: int


class Took(Struct, frozen=True):
    """The run may deliver so many blocks more; -1: one that was counted has come back."""

    blocks: int


class Stop(Struct, frozen=True):
    """Nobody reads any more: end the run early. `ended` is still due."""


Command = Begin | Took | Stop


class _Seat(Struct):
    """ticket: the consumer's that has it, None when AWAY. waiting: what is dealt to it and not taken yet (with `equal`). sent:
    what it has taken, and may not have got.
    """

    place: Place = Place.AWAY
    ticket: int | None = None
    waiting: deque[Piece] = field(default_factory=deque)
    sent: Piece | None = None


class Coordinator:
    """All n ranks of one split. Every method may leave commands, to be carried out in order; `commands` gives them."""

    def __init__(self, ranks: int, *, equal: bool) -> None:
        self.ranks: Final = ranks
        self.equal: Final = equal
        self.epoch = 0  # the last one that began, from 1
        self._seats = [_Seat() for _ in range(ranks)]
        self._running = False  # a Begin without its `ended`
        self._stopping = False
        self._arrived: deque[Piece] = deque()
        self._rest: list[Piece] = []  # with `equal`: dealt from, fewer than n rows
        self._error: BaseException | None = None
        self._commands: list[Command] = []

    def commands(self) -> list[Command]:
        """What is to be done since the last call."""
        made, self._commands = self._commands, []
        return made

    # ---------------------------------------------------------------- consumers

    def join(self, ticket: int, rank: int) -> None:
        """A consumer wants the next epoch. ticket: never used before. Raises PlanError when the rank is not free."""
        if not 0 <= rank < self.ranks:
            raise PlanError(f"there is no rank {rank} in a split of {self.ranks}", hint=f"ranks are 0 to {self.ranks - 1}")
        seat = self._seats[rank]
        if seat.place is not Place.AWAY:
            does = "is being read" if seat.place is Place.READING else "waits for its epoch to begin"
            raise PlanError(
                f"rank {rank} of this streaming_split {does} in another consumer",
                hint="give each worker an iterator of its own, and leave (or close) one loop before the next begins",
            )
        seat.place, seat.ticket = Place.WAITING, ticket
        self._begin_if_all_wait()

    def place(self, ticket: int) -> Place:
        """Where the consumer is; AWAY once it has left."""
        seat = self._seat(ticket)
        return Place.AWAY if seat is None else seat.place

    def take(self, ticket: int, *, sent: bool = False) -> Piece | Answer:
        """The consumer's next piece; it has got the one before. END, and the raising of the run's error, end the epoch for it.

        sent: the piece goes a long way, and has arrived when `reached` says so. Until then no other consumer's epoch ends:
        should this one leave, the piece is somebody else's.
        """
        seat = self._seat(ticket)
        if seat is None or seat.place is Place.WAITING:
            return Answer.END if seat is None else Answer.WAIT
        seat.sent = None
        if self._error is not None:
            error = self._error
            self._away(seat)
            raise error
        if self.equal:
            piece = seat.waiting.popleft() if seat.waiting else None
            self._deal()
            if piece is None and seat.waiting:
                piece = seat.waiting.popleft()
        else:
            piece = self._arrived.popleft() if self._arrived else None
            if piece is not None:
                self._commands.append(Took(1))
        if piece is not None:
            seat.sent = piece if sent else None
            return piece
        if self._running or self._arrived:  # with `equal` blocks may wait for a rank that is behind
            return Answer.WAIT
        if not self.equal and any(s.sent is not None for s in self._seats):
            return Answer.WAIT
        self._away(seat)
        return Answer.END

    def reached(self, ticket: int) -> None:
        """The consumer has got what it took last."""
        seat = self._seat(ticket)
        if seat is not None:
            seat.sent = None

    def give_back(self, epoch: int, piece: Piece) -> None:
        """The consumer was gone before the piece reached it: somebody else's now; with `equal` it is dropped."""
        if not self.equal and epoch == self.epoch and self._anyone_reads():
            self._arrived.appendleft(piece)
            self._commands.append(Took(-1))

    def leave(self, ticket: int) -> None:
        """The consumer has left its loop, or died; harmless to say twice. What was dealt to it is dropped."""
        seat = self._seat(ticket)
        if seat is not None:
            self._away(seat)

    def missing(self) -> list[int]:
        """While some ranks wait for an epoch: those that have not joined."""
        if not any(s.place is Place.WAITING for s in self._seats):
            return []
        return [rank for rank, s in enumerate(self._seats) if s.place is not Place.WAITING]

    # ---------------------------------------------------------------- the run

    def arrived(self, block: Any, rows: int) -> None:
        """The run has delivered a block."""
        if not rows or not self._anyone_reads():
            self._commands.append(Took(1))
            return
        self._arrived.append(Piece(block, 0, rows))
        if self.equal:
            self._deal()

    def ended(self, error: BaseException | None = None) -> None:
        """The run is over. With an error, all that read get it instead of what was waiting."""
        self._running = self._stopping = False
        if error is not None and self._anyone_reads():
            self._error = error
            self._drop()
        self._begin_if_all_wait()

    # ---------------------------------------------------------------- inside

    @property
    def held(self) -> list[Any]:
        """The blocks held here, each once."""
        pieces = [*self._arrived, *self._rest, *(p for s in self._seats for p in s.waiting)]
        return list({id(p.block): p.block for p in pieces}.values())

    def _seat(self, ticket: int) -> _Seat | None:
        return next((s for s in self._seats if s.ticket == ticket), None)

    def _anyone_reads(self) -> bool:
        return any(s.place is Place.READING for s in self._seats)

    def _begin_if_all_wait(self) -> None:
        if self._running or any(s.place is not Place.WAITING for s in self._seats):
            return
        self._drop()
        self._error = None
        self._running = True
        self.epoch += 1
        for seat in self._seats:
            seat.place = Place.READING
        self._commands.append(Begin(self.epoch))

    def _away(self, seat: _Seat) -> None:
        was, sent = seat.place, seat.sent
        seat.place, seat.ticket, seat.sent = Place.AWAY, None, None
        seat.waiting.clear()
        if was is not Place.READING:
            return
        if sent is not None:
            self.give_back(self.epoch, sent)
        if self._anyone_reads():
            if self.equal:
                self._deal()  # it may have been the one that held the others up
            return
        self._drop()
        if self._running and not self._stopping:
            self._stopping = True
            self._commands.append(Stop())

    def _drop(self) -> None:
        self._arrived.clear()
        self._rest.clear()
        for seat in self._seats:
            seat.waiting.clear()

    def _deal(self) -> None:
        """Blocks that have arrived, as far as there is room: each rank gets the same number of their rows, in ranges; the rest
        (fewer than n rows) goes with the next block.
        """
        reading = [s for s in self._seats if s.place is Place.READING]
        taken = 0
        while self._arrived and all(len(s.waiting) < AHEAD for s in reading):
            pieces = [*self._rest, self._arrived.popleft()]
            taken += 1
            share = sum(p.rows for p in pieces) // self.ranks
            for seat in self._seats:
                mine, pieces = _cut(pieces, share)
                if seat.place is Place.READING:
                    seat.waiting.extend(mine)
            self._rest = pieces
        if taken:
            self._commands.append(Took(taken))


def _cut(pieces: list[Piece], rows: int) -> tuple[list[Piece], list[Piece]]:
    """The first `rows` rows, and what is left."""
    first: list[Piece] = []
    for i, piece in enumerate(pieces):
        if rows == 0:
            return first, pieces[i:]
        if piece.rows > rows:
            first.append(Piece(piece.block, piece.start, rows))
            return first, [Piece(piece.block, piece.start + rows, piece.rows - rows), *pieces[i + 1 :]]
        first.append(piece)
        rows -= piece.rows
    return first, []
