"""The committer's decisions: what is logged together, and what has to have happened before what.

A pure state machine: `handle(event, now_s) -> [command]`. Every command is answered by exactly one event, in any order of
commands; nothing here blocks, reads a clock or knows what a store is.

    waiting --Sync--> durable --Append--> logged --Publish--> visible
                                  | conflict: ReadFrom; a later claim there means Stop

Invariants:
- what a segment names is durable before the segment is appended, and logged before it is published;
- one append is under way at a time, and until its fate is known nothing but its very bytes is tried at its index;
- once another driver's claim is seen, no command follows;
- held files (of a run that replaces a finished one) are never published here;
- metrics in a segment are those of exactly the splits that it settles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from msgspec import Struct, field

from headrace.commit.records import Claim, Record, Segment, Settled, corrupt, decode, encode
from headrace.commit.state import LogState
from headrace.core.errors import DestinationError, HeadraceError, InternalError, TransientError
from headrace.core.receipts import OutputFile

GROUP_S = 1.0  # how long a receipt waits for others: what a crash may cost, against one object (and one fsync) for each
GROUP_SPLITS = 256  # so many don't wait: a few hundred kilobytes of log
GROUP_MOST = 1024  # in one segment
PUBLISH_FILES = 256  # in one command, so that heartbeats come between them
LOOK_S = 5.0  # how often an idle driver looks whether another one has taken over
RETRY_S = 1.0  # between tries, beyond those that the store makes by itself
TRIES = 5

Merge = Callable[[str, Any, Any], Any]
"""(name of the metric, a, b) -> state of both; may change a."""


# --- told


class Note(Struct, frozen=True):
    """Put this into the log. metrics: states that go with it, normalised through JSON; none unless it is a Settled."""

    record: Record
    metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Tick(Struct, frozen=True):
    """Time has passed."""


class Flush(Struct, frozen=True):
    """Don't wait for more."""


class Synced(Struct, frozen=True):
    """The answer to Sync. condemned: files that could not be made durable."""

    condemned: tuple[OutputFile, ...] = ()


class Appended(Struct, frozen=True):
    """The answer to Append: the log holds these bytes there."""


class Conflicted(Struct, frozen=True):
    """The answer to Append: something else is there."""


class Found(Struct, frozen=True):
    """The answer to ReadFrom: the objects there, in order, from the index that was asked for; () for none."""

    objects: tuple[bytes, ...]


class Published(Struct, frozen=True):
    """The answer to Publish."""


class Failed(Struct, frozen=True):
    """Any command's answer: its outcome is unknown. A TransientError may be tried again."""

    command: Command
    error: HeadraceError


Event = Note | Tick | Flush | Synced | Appended | Conflicted | Found | Published | Failed


# --- answered


class Sync(Struct, frozen=True):
    files: tuple[OutputFile, ...]


class Append(Struct, frozen=True):
    index: int
    data: bytes


class ReadFrom(Struct, frozen=True):
    index: int


class Publish(Struct, frozen=True):
    files: tuple[OutputFile, ...]


class Redo(Struct, frozen=True):
    """These splits are not settled: files of theirs can't be made durable. Not answered."""

    splits: tuple[int, ...]
    files: tuple[OutputFile, ...]


class Stop(Struct, frozen=True):
    """Nothing will be logged any more. Not answered; no command follows it."""

    error: HeadraceError


Command = Sync | Append | ReadFrom | Publish | Redo | Stop


class Phase(Enum):
    IDLE = "idle"
    SYNCING = "syncing"
    APPENDING = "appending"
    READING = "reading"  # what is there instead of the segment that was to be appended
    LOOKING = "looking"  # whether another driver has begun
    FAILING = "failing"  # whether another driver's beginning is why something failed
    STOPPED = "stopped"


class Protocol:
    """One driver's committer. state: of the log as this driver knows it, its own claim applied.

    unpublished: files that the log names and earlier sessions may not have published. totals: metrics of all that is logged.
    """

    def __init__(self, state: LogState, merge: Merge, *, holds: bool, unpublished: Sequence[OutputFile] = ()) -> None:
        assert state.owner is not None, "no driver without a claim"
        self.state = state
        self.phase = Phase.IDLE
        self.error: HeadraceError | None = None
        self.totals: dict[str, Any] = {}
        self._merge = merge
        self._holds = holds
        self._nonce = state.owner.nonce
        self._epoch = state.owner.epoch
        self._waiting: deque[Note] = deque()
        self._waiting_since: float | None = None
        self._hurry = False
        self._group: list[Note] = []
        self._append: Append | None = None
        self._segment: Segment | None = None  # what `_append` says, as a later session will read it
        self._refused = False
        self._unpublished: deque[OutputFile] = deque(() if holds else unpublished)
        self._publishing = 0
        self._retries: list[tuple[float, Command]] = []
        self._tries: dict[object, int] = {}  # by command for Publish, by kind for the others: one of a kind is under way
        self._looked_s: float | None = None
        self._redone = False
        self._take_deltas()

    # ---------------------------------------------------------------- what the executor asks

    @property
    def certain(self) -> bool:
        """No segment was to be appended that the log may come to hold later. Else what it names must stay where it is."""
        return self._append is None

    @property
    def clean(self) -> bool:
        """All that was told is logged and visible."""
        return self.phase in (Phase.IDLE, Phase.LOOKING) and not (self._waiting or self._unpublished or self._publishing)

    @property
    def gathering(self) -> bool:
        """What was told waits for more of its kind, until `due` at most."""
        return self.phase is Phase.IDLE and self._waiting_since is not None

    def due(self, now: float) -> float:
        """How many seconds from now a Tick has something to do."""
        times = [at for at, _ in self._retries]
        if self.phase is Phase.IDLE:
            if self._waiting_since is not None:
                times.append(self._waiting_since + GROUP_S)
            times.append((now if self._looked_s is None else self._looked_s) + LOOK_S)
        return max(0.0, min(times, default=now + LOOK_S) - now)

    # ---------------------------------------------------------------- events

    def handle(self, event: Event, now: float) -> list[Command]:
        if self.phase is Phase.STOPPED:
            return []
        out: list[Command] = []
        try:
            self._take(event, now, out)
            self._go_on(now, out)
        except HeadraceError as error:
            self._stop(error, out)
        return out

    def _take(self, event: Event, now: float, out: list[Command]) -> None:
        match event:
            case Note(record):
                if isinstance(record, Settled) and record.split in self.state.settled:
                    raise InternalError(f"split {record.split} is settled already")
                self._waiting.append(event)
                if self._waiting_since is None:
                    self._waiting_since = now
            case _ if self.phase is Phase.FAILING and not isinstance(event, Found | Failed):
                return  # nothing else matters any more
            case Tick():
                self._on_tick(now, out)
            case Flush():
                self._hurry = True
            case Synced(condemned):
                self._tries.pop(Sync, None)
                self._on_synced(condemned, out)
            case Appended():
                self._on_appended(now)
            case Conflicted():
                assert self._append is not None
                self.phase = Phase.READING
                out.append(ReadFrom(self._append.index))
            case Found(objects):
                self._on_found(objects, now)
            case Published():
                self._publishing -= 1
            case Failed(command, error):
                self._on_failed(command, error, now, out)

    def _on_tick(self, now: float, out: list[Command]) -> None:
        due = [command for at, command in self._retries if at <= now]
        self._retries = [(at, command) for at, command in self._retries if at > now]
        out.extend(due)
        if self._looked_s is None:
            self._looked_s = now
        if self.phase is Phase.IDLE and not self._waiting and now - self._looked_s >= LOOK_S:
            self._looked_s = now
            self.phase = Phase.LOOKING
            out.append(ReadFrom(self.state.next))

    def _on_synced(self, condemned: tuple[OutputFile, ...], out: list[Command]) -> None:
        bad = {f.staged for f in condemned}
        lost: list[int] = []
        kept: list[Note] = []
        for told in self._group:
            record = told.record
            if isinstance(record, Settled) and (
                any(f.staged in bad for f in record.files if f.staged)
                # What a limit let through rests on all splits before: if one of those is done again, so is this.
                or (record.taken and (lost or self._redone))
            ):
                lost.append(record.split)
            else:
                kept.append(told)
        self._group = kept
        if lost:
            self._redone = True
            out.append(Redo(tuple(lost), condemned))
        self._append_group(out)

    def _on_appended(self, now: float) -> None:
        segment = self._segment
        assert segment is not None
        self.state.apply(segment)
        self._take_deltas()
        if not self._holds:
            self._unpublished.extend(f for r in segment.records if isinstance(r, Settled) for f in r.files if f.staged)
        self._append = self._segment = None
        self._group = []
        self._tries.pop(Append, None)
        self._looked_s = now
        self.phase = Phase.IDLE

    def _on_found(self, objects: tuple[bytes, ...], now: float) -> None:
        mine = self._append
        self._tries.pop(ReadFrom, None)
        for index, data in enumerate(objects, start=self.state.next):
            if mine is not None and data == mine.data:
                self._on_appended(now)  # it had been done: the answer was lost
                mine = None
                continue
            self._append = None  # its place is taken
            raise self._superseded(index, data)
        if self.error is not None:
            if self._refused:
                self._append = None
            raise self.error
        if mine is None:
            self.phase = Phase.IDLE
        elif self.phase is Phase.READING:  # a conflict with nothing: the store has not made up its mind
            self.phase = Phase.APPENDING
            self._again(mine, DestinationError("the run log can't be appended to", where=(("run", self.state.run),)), now)

    def _superseded(self, index: int, data: bytes) -> HeadraceError:
        segment = decode(self.state.run, index, data)
        for claim in segment.records:
            if isinstance(claim, Claim) and claim.epoch > self._epoch:
                return taken_over(claim)
        return corrupt(self.state.run, index, f"epoch {segment.epoch} wrote it, under the claim of epoch {self._epoch}")

    def _on_failed(self, command: Command, error: HeadraceError, now: float, out: list[Command]) -> None:
        if self.phase is Phase.FAILING:
            if isinstance(command, ReadFrom):
                raise self.error or error
            return
        if isinstance(error, TransientError):
            self._again(command, error, now)
            return
        self._refused = isinstance(command, Append) and Append not in self._tries  # so that no try may still take effect
        # A later driver removes what this one staged and had not logged: then that driver is what people must hear of.
        self.error = error
        self.phase = Phase.FAILING
        self._retries.clear()
        out.append(ReadFrom(self.state.next))

    def _again(self, command: Command, error: HeadraceError, now: float) -> None:
        key = command if isinstance(command, Publish) else type(command)
        tries = self._tries[key] = self._tries.get(key, 1) + 1
        if tries > TRIES:
            raise error
        self._retries.append((now + RETRY_S, command))

    # ---------------------------------------------------------------- what follows

    def _go_on(self, now: float, out: list[Command]) -> None:
        """Begin whatever can begin."""
        if self.phase is Phase.FAILING:
            return
        if self.phase is Phase.IDLE and self._waiting and self._ripe(now):
            self._group = [self._waiting.popleft() for _ in range(min(len(self._waiting), GROUP_MOST))]
            self._waiting_since = now if self._waiting else None
            files = tuple(f for r in self._group if isinstance(r.record, Settled) for f in r.record.files if f.staged)
            if files:
                self.phase = Phase.SYNCING
                out.append(Sync(files))
            else:
                self._append_group(out)
        if not self._waiting:
            self._hurry = False
        while self._unpublished:
            files = tuple(self._unpublished.popleft() for _ in range(min(len(self._unpublished), PUBLISH_FILES)))
            self._publishing += 1
            out.append(Publish(files))

    def _ripe(self, now: float) -> bool:
        since = self._waiting_since
        return self._hurry or len(self._waiting) >= GROUP_SPLITS or (since is not None and now - since >= GROUP_S)

    def _append_group(self, out: list[Command]) -> None:
        if not self._group:
            self.phase = Phase.IDLE
            return
        metrics: dict[str, Any] = {}
        for told in self._group:
            merge_into(metrics, told.metrics, self._merge)
        segment = Segment(self.state.next, self._epoch, self._nonce, tuple(t.record for t in self._group), metrics)
        data = encode(segment)
        self._segment = decode(self.state.run, segment.index, data)  # what can't be read again is not written
        self._append = Append(segment.index, data)
        self.phase = Phase.APPENDING
        out.append(self._append)

    def _take_deltas(self) -> None:
        for delta in self.state.deltas:
            merge_into(self.totals, delta, self._merge)
        self.state.deltas.clear()

    def _stop(self, error: HeadraceError, out: list[Command]) -> None:
        self.error = error
        self.phase = Phase.STOPPED
        self._retries.clear()
        out[:] = [Stop(error)]


def merge_into(totals: dict[str, Any], states: Mapping[str, Any], merge: Merge) -> None:
    for name, state in states.items():
        totals[name] = merge(name, totals[name], state) if name in totals else state


def taken_over(claim: Claim) -> DestinationError:
    return DestinationError(
        "another driver has taken over this run",
        where=(("driver", f"process {claim.pid} on {claim.host}"), ("epoch", str(claim.epoch))),
        hint="leave it to that one; what this one had logged is part of the output",
    )
