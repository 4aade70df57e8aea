"""Opening a run: which one it is to be, whether somebody else is at it, and what its log says.

What must not live here: what is logged when (commit/protocol.py), the committer's thread. Invariants: nobody writes to a run
without a claim of the next epoch in its log; whatever two drivers do at once, the log decides between them, never a clock:
heartbeats only make a driver ask before it takes over.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import chain, islice
from typing import Any, TypeVar

from msgspec import Struct

from headrace.commit.listing import Entry, changed, decode_chunk, encode_chunk, entry_of
from headrace.commit.names import (
    MANIFEST,
    PRIVATE,
    SUCCESS,
    complete_name,
    generation_of,
    heartbeat_name,
    listing_name,
    log_folder,
    log_name,
    output_generation,
    plan_name,
    run_name,
    staged_epoch,
    staging_folder,
)
from headrace.commit.protocol import taken_over
from headrace.commit.records import Claim, DamagedLog, Listed, Record, Released, Replaced, Segment, corrupt, decode, encode
from headrace.commit.state import LogState
from headrace.connectors.name_set import NameSet
from headrace.connectors.sinks.manifest import value_in
from headrace.connectors.spool import FileSpool
from headrace.contracts.run_store import RunStore
from headrace.core.errors import DestinationError, HeadraceError, TransientError
from headrace.core.receipts import OutputFile
from headrace.core.splits import Split

VERSION = 1
WATCH_S = 30  # a heartbeat comes every 5 s; six of them missing is a dead driver, or one in deep trouble
TRIES = 5  # for what the store itself has given up on
ROUNDS = 20  # other drivers that may be quicker than this one
READ_AHEAD = 16  # log objects read at once when there are many: each costs an object store's latency
SMALL_LISTING_BYTES = 2 << 10  # the whole of it then lies in the log, which every session reads whole: no object of its own
NAMED = 5  # missing files that a message names

Differences = Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]]
T = TypeVar("T")


class Identity(Struct, frozen=True):
    """Who a driver is. started: when its process began, seconds since 1970. nonce: no two drivers have the same."""

    host: str
    pid: int
    started: float
    nonce: str


def this_process() -> Identity:
    """A new identity for a driver in this process."""
    return Identity(_host(), os.getpid(), _start_of(os.getpid()), secrets.token_hex(8))


@lru_cache(maxsize=1)
def _start_of(pid: int) -> float:
    """When this process began, whose number is that: a forked one has another."""
    import psutil

    return psutil.Process(pid).create_time()


def _host() -> str:
    """The machine; in a container with process numbers of its own, that too."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    first = "pid:[4026531836]"  # the kernel's number of the machine's own process space
    return socket.gethostname() if space in ("", first) else f"{socket.gethostname()} {space}"


def process_alive(pid: int, started: float) -> bool:
    """Is the process that began then still there, on this machine?"""
    import psutil

    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


class OpenedRun(Struct):
    """A run that this driver may write to, or that is finished.

    run: "run-00000". epoch: this driver's. state: of the log, this driver's claim applied. holds: its files stay staged until
    the run is finished. unpublished: files that the log names and that may not be visible yet. finished: the log is complete,
    and nothing is claimed; complete: and so is the destination. after_crash: a session before died at work.
    """

    store: RunStore
    run: str
    epoch: int
    identity: Identity
    state: LogState
    fresh: bool
    holds: bool
    finished: bool = False
    complete: bool = False
    after_crash: bool = False
    unpublished: tuple[OutputFile, ...] = ()
    notes: tuple[str, ...] = ()


def open_run(
    store: RunStore,
    plan: Mapping[str, Any],
    *,
    fresh: bool,
    take_over: bool,
    identity: Identity,
    differences: Differences,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.time,
    alive: Callable[[int, float], bool] = process_alive,
    instead_of: str = "",
) -> OpenedRun:
    """Begin a run with this plan, go on with the one that is there, or say that it is finished.

    plan: JSON-able, what the output depends on. differences(old, new): lines for people, none when both mean the same.
    alive(pid, started): of a process on this machine. instead_of: a run that is not to be gone on with, though
    `fresh` would.

    Raises DestinationError when the destination holds splits of another run (and not `fresh`), when another driver is at work
    (and not `take_over`), or when the log is damaged or files that it names are gone (and not `fresh`).
    """
    opening = _Opening(
        store, json.loads(json.dumps(plan)), fresh, take_over, identity, differences, sleep, now, alive, instead_of
    )
    for _ in range(ROUNDS):
        opened = opening.attempt()
        if opened is not None:
            return opened
    raise DestinationError("other drivers keep claiming this destination", where=(("destination", store.root),))


class _Header(Struct, frozen=True):
    """plan.json of a run."""

    fresh: bool
    holds: bool
    replaces: str
    plan: Mapping[str, Any]

    def encode(self) -> bytes:
        body = {"version": VERSION, "fresh": self.fresh, "holds": self.holds, "replaces": self.replaces, "plan": self.plan}
        return (json.dumps(body) + "\n").encode()  # on one line: with indent= it takes ten times as long


class _Opening(Struct, frozen=True):
    store: RunStore
    plan: Mapping[str, Any]
    fresh: bool
    take_over: bool
    identity: Identity
    differences: Differences
    sleep: Callable[[float], None]
    now: Callable[[], float]
    alive: Callable[[int, float], bool]
    instead_of: str

    def attempt(self) -> OpenedRun | None:
        """None: things have changed, by this driver or by another; look again."""
        newest, run = self._patiently(self._latest)
        if run is None:
            self._begin_first(newest + 1)
            return None
        header = self._header(run)
        try:
            state = self._patiently(lambda: replay(self.store, run))
        except DamagedLog:
            if not self.fresh:
                raise
            self._leave_behind(run)
            return None
        differing = self.differences(header.plan, self.plan)
        # What is visible stays until the new output is complete; names of per-input outputs are taken until then, too.
        holds = header.holds or len(state.settled) > 0
        if state.replaced:
            self._begin(generation_of(state.replaced), holds=holds, replaces=run)
            return None
        if state.finished is not None:
            return self._finished(run, header, state, differing)
        goes_on = not differing and (not self.fresh or header.fresh) and run != self.instead_of
        if not goes_on and not self.fresh and holds:  # else nobody loses anything: the run failed before its first split
            raise self._other(run, "an unfinished run of another plan", differing)
        dead = self._check_owner(run, state)
        if goes_on:
            try:
                return self._go_on(run, header, state, dead)
            except OutputGone:
                if not self.fresh:
                    raise
        successor = run_name(generation_of(run) + 1)
        if self._claim(state, Replaced(successor)):
            self._begin(generation_of(successor), holds=holds, replaces=run)
        return None

    # ---------------------------------------------------------------- which run

    def _latest(self) -> tuple[int, str | None]:
        """(the newest generation that there is anything of, -1 for none; the newest run that has a plan). Walks over all that
        runs keep, in little memory.
        """
        newest = planned = -1
        for name in self.store.names(PRIVATE):
            parts = name.split("/")
            if len(parts) > 2:
                newest = max(newest, generation_of(parts[1]))
                if parts[2:] == ["plan.json"]:
                    planned = max(planned, generation_of(parts[1]))
        return newest, run_name(planned) if planned >= 0 else None

    def _begin_first(self, least: int) -> None:
        """least: its generation: where a destination was removed, a driver that lived on may have left something."""
        finished = self._read(SUCCESS) is not None or self._read(MANIFEST) is not None
        if finished and not self.fresh:
            raise DestinationError(
                "the destination holds finished output, but not the log of the run that wrote it",
                where=(("destination", self.store.root),),
                hint="fresh=True replaces it once the new output is complete; another path keeps both",
            )
        used = self._patiently(lambda: max((output_generation(name) for name in self.store.names("")), default=-1))
        self._begin(max(used + 1, least), holds=finished, replaces="")

    def _leave_behind(self, run: str) -> None:
        """Begin the run after one whose log can't be used, unless its driver still beats. What it may have made visible stays
        until then.
        """
        if not self.take_over and self._may_live(run):
            raise self._at_work((("run", run),))
        self._begin(generation_of(run) + 1, holds=True, replaces=run)

    def _begin(self, generation: int, *, holds: bool, replaces: str) -> None:
        """Two drivers may do this at once: the one who comes first decides, and both look again."""
        header, run = _Header(self.fresh, holds, replaces, self.plan), run_name(generation)
        folders = (log_folder(run), staging_folder(run))  # which no run does without
        self._patiently(lambda: self.store.create(plan_name(run), header.encode(), folders))

    def _header(self, run: str) -> _Header:
        where = (("plan", plan_name(run)),)
        try:
            body = json.loads(self._read(plan_name(run)) or b"")
            if body["version"] > VERSION:
                raise DestinationError("the run was begun by a newer version of Headrace", where=where)
            fresh, holds, replaces, plan = body["fresh"], body["holds"], body["replaces"], body["plan"]
            if not (
                isinstance(fresh, bool) and isinstance(holds, bool) and isinstance(replaces, str) and isinstance(plan, dict)
            ):
                raise TypeError("a value of the wrong type")
            return _Header(fresh, holds, replaces, plan)
        except (ValueError, KeyError, TypeError, RecursionError) as problem:
            hint = "remove that run's folder, or write to another path"
            raise DestinationError(f"the plan of a run can't be read: {problem!r}", where=where, hint=hint) from None

    def _other(self, run: str, what: str, differing: list[str]) -> DestinationError:
        lines = tuple(("differs", line) for line in differing)
        return DestinationError(
            f"the destination holds {what}",
            where=(("destination", self.store.root), ("run", run), *lines),
            hint="fresh=True replaces it once the new output is complete; another path keeps both",
        )

    def _finished(self, run: str, header: _Header, state: LogState, differing: list[str]) -> OpenedRun | None:
        complete = self._complete(run)
        # A fresh run that had only to be shown: calling it again is no wish for yet another one.
        unshown = header.fresh and not complete and not differing and run != self.instead_of
        if self.fresh and not unshown:
            self._begin(generation_of(run) + 1, holds=True, replaces=run)
            return None
        if differing:
            raise self._other(run, "the finished output of another run", differing)
        return OpenedRun(
            self.store, run, state.epoch, self.identity, state, header.fresh, header.holds, finished=True, complete=complete
        )

    def _complete(self, run: str) -> bool:
        """Does the destination say that this run is its output, and has all been done that belongs to it?"""
        if self._read(complete_name(run)) is None:
            return False
        shown = self._patiently(lambda: value_in(self.store.chunks(MANIFEST), "run"))
        return shown == run and self._read(SUCCESS) is not None

    # ---------------------------------------------------------------- whose run

    def _check_owner(self, run: str, state: LogState) -> bool:
        """True when the driver before died at work, or may have. Raises DestinationError when it is alive and must not be
        stopped.
        """
        owner = state.owner
        if owner is None or state.released:
            return False
        me = self.identity
        if owner.host == me.host and (owner.pid, owner.started) != (me.pid, me.started):
            living = self.alive(owner.pid, owner.started)
        elif self.take_over:
            return True
        else:  # on another machine, or a run of this very process: only its heartbeat tells
            living = self._beats(run)
        if living and not self.take_over:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.at))
            raise self._at_work((("driver", f"process {owner.pid} on {owner.host}, since {since}"),))
        return not living

    def _at_work(self, where: tuple[tuple[str, str], ...]) -> DestinationError:
        return DestinationError(
            "another driver is at work on this run",
            where=(("destination", self.store.root), *where),
            hint="wait for it; or take_over=True stops it and goes on from what it has settled",
        )

    def _may_live(self, run: str) -> bool:
        """Does the driver of a run, of which only the heartbeat tells?"""
        try:
            last = json.loads(self._read(heartbeat_name(run)) or b"")
            host, who = last["host"], (int(last["pid"]), float(last["started"]))
        except (ValueError, KeyError, TypeError):
            return False
        me = self.identity
        gone = host == me.host and who != (me.pid, me.started) and not self.alive(*who)
        return not gone and self._beats(run)

    def _beats(self, run: str) -> bool:
        """Does the heartbeat change while we watch?"""
        first = self._read(heartbeat_name(run))
        for _ in range(WATCH_S):
            self.sleep(1.0)
            if self._read(heartbeat_name(run)) != first:
                return True
        return False

    def _claim(self, state: LogState, *more: Record, died: bool = False) -> bool:
        """False: another driver was quicker. died: see Claim."""
        me = self.identity
        claim = Claim(state.epoch + 1, me.nonce, me.host, me.pid, me.started, self.now(), died)
        segment = Segment(state.next, claim.epoch, me.nonce, (claim, *more))
        name, data = log_name(state.run, state.next), encode(segment)
        if not self._patiently(lambda: self.store.create(name, data)):
            return False
        state.apply(segment)
        return True

    def _go_on(self, run: str, header: _Header, state: LogState, dead: bool) -> OpenedRun | None:
        if not self._claim(state, died=dead):
            return None
        write_heartbeat(self.store, run, state.epoch, self.identity, self.now())
        unpublished = self._sort_staging(run, state, held=header.holds)
        notes: list[str] = []
        if len(state.settled):
            notes.append(f"going on with {run}: {len(state.settled)} splits were settled before")
        if not self.store.conditional:
            notes.append("single-writer mode: this store can't tell drivers apart, so only one may write there at a time")
        return OpenedRun(
            self.store,
            run,
            state.epoch,
            self.identity,
            state,
            header.fresh,
            header.holds,
            after_crash=state.deserted,
            unpublished=unpublished,
            notes=tuple(notes),
        )

    def _sort_staging(self, run: str, state: LogState, *, held: bool) -> tuple[OutputFile, ...]:
        """Files that the log names, that are still staged and are to be published now; others of earlier epochs are removed:
        nobody can log them any more. Raises OutputGone for one that is neither staged nor there. held: all are published at
        the end; what has their names until then is older.

        After the claim only: until then their driver might log and publish.
        """
        staged = set(self._patiently(lambda: list(self.store.names(staging_folder(run)))))
        kept = self._still_staged(run, state, staged, held=held)
        named = {f.staged for f in kept}
        for name in staged:
            if name not in named and 0 <= staged_epoch(run, name) < state.epoch:
                try:
                    self.store.remove(name)
                except HeadraceError:
                    break  # litter; the end of the run removes it
        return () if held else kept

    def _still_staged(self, run: str, state: LogState, staged: set[str], *, held: bool) -> tuple[OutputFile, ...]:
        """Files that the log names and that are staged. The others have to be there under their final names.

        staged: listed before, so that a file which moves meanwhile is seen in one place at least.
        """
        if not len(state.settled):
            return ()
        there = () if held else self._patiently(lambda: NameSet(self.store.names("")))
        kept: list[OutputFile] = []
        missing = _Missing()
        for file in state.settled.files:
            if file.staged in staged:
                kept.append(file)
            elif file.staged and file.name not in there:
                missing.add(file.name)
        if missing.count:
            raise OutputGone(
                f"{missing.count:,} files that the run log names are neither published nor staged",
                where=(("destination", self.store.root), ("run", run), ("missing", ", ".join(missing.first))),
                hint="was the destination cleaned up? fresh=True begins a new run, another path keeps what is there",
            )
        return tuple(kept)

    # ---------------------------------------------------------------- the store

    def _read(self, name: str) -> bytes | None:
        return self._patiently(lambda: self.store.read(name))

    def _patiently(self, action: Callable[[], T]) -> T:
        for _ in range(TRIES - 1):
            try:
                return action()
            except TransientError:
                self.sleep(1.0)
        return action()


class OutputGone(DestinationError):
    """What a run has settled is not there any more."""


class _Missing:
    """Names, counted; the first few kept."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(name)


def check_presence(opened: OpenedRun, files: Sequence[OutputFile]) -> None:
    """files: of a finished run. Raises OutputGone when outputs among them have been removed since, staged ones too."""
    there = NameSet(opened.store.names(""))
    missing = _Missing()
    for file in files:
        made = opened.complete or file.staged  # some are made in the end
        if file.kind == "output" and made and file.name not in there and file.staged not in there:
            missing.add(file.name)
    if missing.count:
        raise OutputGone(
            f"the run was finished, but {missing.count:,} of its output files are no longer there",
            where=(("destination", opened.store.root), ("missing", ", ".join(missing.first))),
            hint="fresh=True writes the output anew; headrace.verify tells what is left of it",
        )


def check_latest(opened: OpenedRun) -> None:
    """Before a finished run is shown: raises DestinationError when a later one has been begun since.

    It narrows, and does not close, the window in which a driver that was paused here shows its run over a later one; the next
    call of that later run puts it right.
    """
    later = run_name(generation_of(opened.run) + 1)
    if opened.store.read(plan_name(later)) is not None:
        where = (("destination", opened.store.root), ("run", opened.run), ("later run", later))
        raise DestinationError("a later run has been begun here", where=where, hint="leave it to that one")


def leave(opened: OpenedRun) -> None:
    """Say in the log that this session has left before any work, so that the next one need not ask whether it lives. Never
    raises.
    """
    segment = Segment(opened.state.next, opened.epoch, opened.identity.nonce, (Released(),))
    with contextlib.suppress(HeadraceError):
        opened.store.create(log_name(opened.run, opened.state.next), encode(segment))


def mark_complete(opened: OpenedRun) -> None:
    """After the sink has finished: nothing is left to redo. Should a power cut take the mark away, it is redone."""
    opened.store.write(complete_name(opened.run), b"", durable=False)


def successor(opened: OpenedRun) -> HeadraceError | None:
    """The error to raise in place of any other when another driver has taken over; None when none has, or nobody can tell.

    A later driver removes what this one staged and had not logged: what this one then meets are only its effects. To be called
    when the committer's thread has ended.
    """
    try:
        for index, data in enumerate(read_log(opened.store, opened.run, opened.state.next), start=opened.state.next):
            for record in decode(opened.run, index, data).records:
                if isinstance(record, Claim) and record.epoch > opened.epoch:
                    return taken_over(record)
    except HeadraceError:
        return None
    return None


def write_heartbeat(store: RunStore, run: str, epoch: int, identity: Identity, at: float) -> None:
    """Advice to others; never raises."""
    body = {
        "version": VERSION,
        "host": identity.host,
        "pid": identity.pid,
        "started": identity.started,
        "epoch": epoch,
        "at": at,
    }
    try:
        store.write(heartbeat_name(run), json.dumps(body).encode(), durable=False)
    except HeadraceError:
        return


# ---------------------------------------------------------------- the log


def replay(store: RunStore, run: str) -> LogState:
    """What the log amounts to. Raises DestinationError for a damaged one."""
    state = LogState(run, FileSpool())
    for data in read_log(store, run, 0):
        state.apply(decode(run, state.next, data))
    return state


def read_log(store: RunStore, run: str, start: int) -> Iterator[bytes]:
    """The objects of a log from `start` on, in order, to its end."""
    index = start
    known = sum(1 for _ in store.names(log_folder(run))) if start == 0 else 0
    if known > READ_AHEAD:
        with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="headrace-log") as pool:
            while index < known:
                names = [log_name(run, i) for i in range(index, min(index + 16 * READ_AHEAD, known))]
                for data in pool.map(store.read, names):
                    if data is None:
                        raise corrupt(run, index, "it is missing")
                    yield data
                    index += 1
    while (data := store.read(log_name(run, index))) is not None:
        yield data
        index += 1
    if index < known:
        raise corrupt(run, index, "it is missing")


# ---------------------------------------------------------------- the listing


class Listing:
    """The listing of a run against what its log says of it: the same as far as that goes, and then what is to be logged.

    Memory: one chunk. Splits come in order, each once.
    """

    def __init__(self, store: RunStore, state: LogState) -> None:
        self._store = store
        self._run = state.run
        self._chunks = iter(tuple(state.listing))
        self._entries: Iterator[Entry] = iter(())
        self._known = state.listed
        self._done = state.listing_done
        self._next = 0

    def take(self, splits: tuple[Split, ...], done: bool, more: Iterable[Split] = ()) -> Listed | None:
        """What to log for these splits, its object written already where it has one; None for splits that the log has.

        more: the rest of the listing, looked at to say what differs. Raises InputChanged.
        """
        first_new = max(self._next, self._known)
        new: list[Entry] = []
        for i, split in enumerate(splits):
            entry = entry_of(split)
            if self._next < self._known:
                logged = self._logged()
                if logged != entry:
                    raise self._differs(logged, chain(splits[i:], more))
            elif self._done:
                raise self._differs(None, chain(splits[i:], more))
            else:
                new.append(entry)
            self._next += 1
        if done and self._next < self._known:
            raise self._differs(None, ())
        if not new and (self._done or not done):
            return None
        self._done = done
        if not new:
            return Listed(first_new, 0, "", done)
        data, digest = encode_chunk(new)
        if done and not first_new and len(data) <= SMALL_LISTING_BYTES:
            return Listed(0, len(new), digest, done, data)
        self._store.create(listing_name(self._run, first_new, digest), data)
        return Listed(first_new, len(new), digest, done)

    def _logged(self) -> Entry:
        for entry in self._entries:
            return entry
        chunk = next(self._chunks)
        self._entries = iter(self._chunk(chunk))
        return next(self._entries)

    def _chunk(self, chunk: Listed) -> list[Entry]:
        name = listing_name(self._run, chunk.first, chunk.digest)
        return decode_chunk(name, chunk.chunk or self._store.read(name), chunk.digest, chunk.count)

    def _differs(self, logged: Entry | None, found: Iterable[Split]) -> HeadraceError:
        later = (entry for chunk in self._chunks for entry in self._chunk(chunk))
        before = chain(() if logged is None else (logged,), self._entries, later)
        return changed(self._next, before, (entry_of(split) for split in found))


def compare_listing(opened: OpenedRun, splits: Iterator[Split]) -> None:
    """Is the input still what the (finished) run read? Lists it, as far as the run did; raises InputChanged."""
    listing = Listing(opened.store, opened.state)
    if not opened.state.listing_done:  # a limit was reached before the end of the input
        splits = islice(splits, opened.state.listed)
    while True:
        found = tuple(islice(splits, 1000))
        listing.take(found, len(found) < 1000, splits)
        if len(found) < 1000:
            return
