"""Committer: what is settled, counted once, logged and published. Receipts and accumulator states come in per split.

`CommitLoop` carries out what the protocol (commit/protocol.py) decides; `Committer` runs it in a thread of its own, so that the
driver never waits for a store. What must not live here: the order of things, which is the protocol's.

Invariants: a split's states join the totals only when it settles, and only those of the attempt that counts; a cancelled split
leaves nothing; a split settles once.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from headrace.commit.listing import without_secrets
from headrace.commit.names import check_file, lineage_name, log_name, quarantine_name
from headrace.commit.protocol import (
    GROUP_SPLITS,
    Append,
    Appended,
    Command,
    Conflicted,
    Event,
    Failed,
    Flush,
    Found,
    Note,
    Protocol,
    Publish,
    Published,
    ReadFrom,
    Redo,
    Stop,
    Sync,
    Synced,
    Tick,
    merge_into,
)
from headrace.commit.records import Divided, Finished, Record, Released, Settled
from headrace.contracts.accumulator import Accumulator
from headrace.contracts.run_store import WatchingStore
from headrace.core.errors import DestinationError, HeadraceError, InternalError, UserCodeError
from headrace.core.receipts import LineageRun, OutputFile, Tally
from headrace.core.splits import Division, Split
from headrace.runtime.ledger import Listing, OpenedRun, read_log, write_heartbeat
from headrace.scheduler.messages import Settle, SplitsListed

HEARTBEAT_S = 5.0
CLOSE_S = 10.0  # what the end of a failed session may spend on logging what it has


def settled_record(run: str, done: Settle) -> Settled:
    """What the log says of a settled split. Raises DestinationError for names that can't be."""
    index = done.split.index
    receipt = done.receipt
    outputs = receipt.outputs if receipt is not None else ()
    files = [f if f.kind != "lineage" else replace(f, name=lineage_name(run, index)) for f in outputs]
    files += [replace(f, name=quarantine_name(run, index, k)) for k, f in enumerate(done.aside)]
    for file in files:
        check_file(run, file)
    return Settled(
        split=index,
        id=done.split.id if receipt is None else receipt.split_id,
        attempt=done.attempt,
        tally=done.tally,
        files=tuple(files),
        rows=receipt.rows if receipt is not None else 0,
        taken=done.taken,
        lineage=tuple(_told(x) for x in (receipt.lineage if receipt is not None else ())),
    )


def _told(run: LineageRun) -> LineageRun:
    uri = without_secrets(run.uri)
    return run if uri == run.uri else replace(run, uri=uri)


class SplitStates:
    """Accumulator states of splits under way, by the attempt that they belong to."""

    def __init__(self, accumulators: Mapping[str, Accumulator]) -> None:
        self._accumulators = dict(accumulators)
        self._open: dict[int, tuple[int, dict[str, Any]]] = {}

    def merge(self, name: str, a: Any, b: Any) -> Any:
        """Raises UserCodeError, or what the accumulator says itself, naming it."""
        return merged(name, self._accumulators[name], a, b)

    def add(self, split: int, attempt: int, states: Mapping[str, Any]) -> None:
        current, known = self._open.get(split, (attempt, {}))  # before any retry there is one attempt only
        if attempt == current and states:
            merge_into(known, states, self.merge)
            self._open[split] = (current, known)

    def retry(self, split: int, attempt: int) -> None:
        self._open[split] = (attempt, {})

    def take(self, split: int, attempt: int) -> dict[str, Any]:
        current, known = self._open.pop(split, (attempt, {}))
        return known if current == attempt else {}


def zero_of(name: str, accumulator: Accumulator) -> Any:
    """Raises UserCodeError, or what the accumulator says itself, naming it."""
    try:
        return accumulator.zero()
    except HeadraceError as error:
        raise error.at(("metric", name)) from None
    except Exception as exc:
        raise _metric_error(name, "zero", exc, "zero takes no arguments and returns the state of no rows") from None


def merged(name: str, accumulator: Accumulator, a: Any, b: Any) -> Any:
    """Raises UserCodeError, or what the accumulator says itself, naming it."""
    try:
        return accumulator.merge(a, b)
    except HeadraceError as error:
        raise error.at(("metric", name)) from None
    except Exception as exc:
        raise _metric_error(name, "merge", exc, "merge must take any two states, zero() among them") from None


def result_of(name: str, accumulator: Accumulator, state: Any) -> Any:
    """Raises UserCodeError, or what the accumulator says itself, naming it."""
    try:
        return accumulator.result(state)
    except HeadraceError as error:
        raise error.at(("metric", name)) from None
    except Exception as exc:
        raise _metric_error(name, "result", exc, "result must take any state, that of no rows among them") from None


def _metric_error(name: str, method: str, exc: Exception, hint: str) -> UserCodeError:
    from headrace.worker.user_code import exception_text, user_frames

    text = exception_text(exc)
    message = f"evaluate({name}): {method} raised {type(exc).__name__}" + (f": {text}" if text else "")
    return UserCodeError(message, where=(("metric", name),), hint=hint, frames=user_frames(exc))


def as_logged(states: Mapping[str, Any]) -> dict[str, Any]:
    """States as a later session will read them, so that totals are the same after any number of resumes, logged or not.

    Raises UserCodeError for one that JSON can't hold, or would change. NumPy's numbers become Python's, tuples lists.
    """
    out: dict[str, Any] = {}
    for name, state in states.items():
        try:
            out[name] = json.loads(json.dumps(state, default=_number))
            lost = _change(state, out[name], "state")
        except (TypeError, ValueError, RecursionError) as exc:
            lost = str(exc)
        if lost:
            raise UserCodeError(
                f"evaluate({name}): its state can't be kept as JSON: {lost}",
                where=(("metric", name),),
                hint="a state is made of numbers, strings, None, lists, and dicts whose keys are strings",
            )
    return out


def _number(value: Any) -> Any:
    """A NumPy scalar as the plain number that it is."""
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        return item()
    raise TypeError(f"it holds a {type(value).__module__}.{type(value).__qualname__}")


def _change(was: Any, now: Any, place: str) -> str:
    """What JSON has made of a value, in words; "" when that is the same. Equal values, which most are, are compared in C."""
    if was == now or (was != was and now != now):  # NaN is not equal to itself
        return ""
    if isinstance(was, list | tuple) and isinstance(now, list) and len(was) == len(now):
        pairs = zip(was, now, strict=True)
        return next((lost for i, (a, b) in enumerate(pairs) if (lost := _change(a, b, f"{place}[{i}]"))), "")
    if isinstance(was, dict) and isinstance(now, dict):
        for key in was:
            if not isinstance(key, str):
                return f"the key {key!r} in {place} would come back as a string"
        return next((lost for key in was if (lost := _change(was[key], now[key], f"{place}[{key!r}]"))), "")
    return f"{place} is {was!r:.100} and would come back as {now!r:.100}"


class CommitLoop:
    """The protocol and a store, one command at a time. Not thread-safe: its owner calls from one thread.

    error: what stopped it. condemned: splits that have to be done again, by a later session.
    """

    def __init__(self, protocol: Protocol, opened: OpenedRun) -> None:
        self.protocol = protocol
        self.error: HeadraceError | None = None
        self.condemned: list[int] = []
        self._store = opened.store
        self._run = opened.run
        self._commands: deque[Command] = deque()

    @property
    def busy(self) -> bool:
        """A command waits to be carried out."""
        return bool(self._commands)

    def tell(self, event: Event, now: float) -> None:
        for command in self.protocol.handle(event, now):
            match command:
                case Stop(error):
                    self.error = error
                    self._commands.clear()
                case Redo(splits, _):
                    self.condemned.extend(splits)
                case _:
                    self._commands.append(command)

    def step(self) -> Event:
        """Carry out the next command. What came of it is the protocol's next event, for `tell`."""
        command = self._commands.popleft()
        try:
            return self._carry(command)
        except HeadraceError as error:
            return Failed(command, error)
        except Exception as error:
            return Failed(command, InternalError(f"the committer failed: {type(error).__name__}: {error}"))

    def _carry(self, command: Command) -> Event:
        store = self._store
        match command:
            case Sync(files):
                return Synced(store.sync(files))
            case Append(index, data):
                return Appended() if store.create(log_name(self._run, index), data) else Conflicted()
            case ReadFrom(index):
                return Found(tuple(read_log(store, self._run, index)))
            case Publish(files):
                store.publish(files)
                return Published()
            case _:
                raise InternalError(f"{command} is nothing to carry out")


class Committer:
    """One run's. opened None: nothing is logged (counts, consumers), and totals are kept in memory alone.

    tally, splits: over all sessions of the run. Memory: states of open splits, a total per metric, a byte a split.
    """

    def __init__(self, accumulators: Mapping[str, Accumulator], opened: OpenedRun | None = None) -> None:
        self.tally = Tally()
        self.splits = 0
        self._accumulators = dict(accumulators)
        self._states = SplitStates(accumulators)
        self._totals: dict[str, Any] = {}
        self._opened = opened
        self._settled_here = bytearray()
        self._loop: CommitLoop | None = None
        self._listing: Listing | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._inbox: deque[Event] = deque()
        self._gathering = False  # records wait for others to be logged with: more of them wake nobody
        self._ending = False
        self._watching = contextlib.ExitStack()  # what the store holds while files are staged
        self._post: Callable[[HeadraceError], None] = _nobody
        if opened is not None:
            self._prepare(opened)

    def _prepare(self, opened: OpenedRun) -> None:
        state = opened.state
        unknown = {name for delta in state.deltas for name in delta} - self._accumulators.keys()
        if unknown:
            raise DestinationError(f"the run log holds metrics that this run does not compute: {', '.join(sorted(unknown))}")
        self.tally, self.splits = state.tally, len(state.settled)
        self._listing = Listing(opened.store, state)
        if opened.finished:
            for delta in state.deltas:
                merge_into(self._totals, delta, self._states.merge)
            state.deltas.clear()
            return
        protocol = Protocol(state, self._states.merge, holds=opened.holds, unpublished=opened.unpublished)
        self._totals = protocol.totals
        self._loop = CommitLoop(protocol, opened)

    # ---------------------------------------------------------------- the driver's thread

    def start(self, post: Callable[[HeadraceError], None]) -> None:
        """Begin. post: how to stop the driver with an error; called from the committer's thread."""
        self._post = post
        if self._loop is not None and self._opened is not None:
            if isinstance(self._opened.store, WatchingStore):
                self._watching.enter_context(self._opened.store.watch())
            self._thread = threading.Thread(target=self._work, name="headrace-committer", daemon=True)
            self._thread.start()

    def add(self, split: int, attempt: int, states: Mapping[str, Any]) -> None:
        """Merge accumulator states that a step of this split answered; ignored unless `attempt` is the split's current one."""
        if states and not self._is_settled(split):
            self._states.add(split, attempt, states)

    def retry(self, split: int, attempt: int) -> None:
        """The split starts again as `attempt`: whatever earlier ones told is dropped."""
        if not self._is_settled(split):
            self._states.retry(split, attempt)

    def settle(self, done: Settle) -> None:
        """Count the split, and see to it that it is logged. Raises DestinationError for names of files that can't be."""
        index = done.split.index
        states = self._states.take(index, done.attempt)
        if done.cancelled or self._is_settled(index):
            return
        self._mark(index)
        self.splits += 1
        self.tally += done.tally
        kept = as_logged(states)
        if self._opened is None:
            merge_into(self._totals, kept, self._states.merge)
            return
        self._note(settled_record(self._opened.run, done), kept)

    def results(self) -> dict[str, Any]:
        """Each accumulator's result over all sessions; that of no rows when none came. After `flush`. Raises HeadraceError."""
        return {
            name: result_of(name, accumulator, self._totals[name] if name in self._totals else zero_of(name, accumulator))
            for name, accumulator in self._accumulators.items()
        }

    def totals(self, names: Iterable[str]) -> dict[str, Any]:
        """States of these accumulators, as earlier sessions settled them. Before `start`, and only to be read."""
        return {name: self._totals[name] for name in names if name in self._totals}

    @property
    def certain(self) -> bool:
        """After `close`: the log will hold no more of this session than it does. Else nothing staged may be removed."""
        return self._loop is None or self._loop.protocol.certain

    @property
    def files(self) -> Sequence[OutputFile]:
        """Of all splits that the log holds, in split order."""
        return self._opened.state.settled.files if self._opened is not None else ()

    def divide(self, division: Division | None) -> None:
        """Log what splits are divided to, unless the log says so already. Before anything is listed."""
        if division is not None and self._opened is not None and self._opened.state.division != division:
            self._note(Divided(division))

    # ---------------------------------------------------------------- the lister's thread

    def admit(self, splits: tuple[Split, ...], done: bool, more: Iterable[Split] = ()) -> SplitsListed:
        """Log what was listed, or compare it with what the run listed before; says which splits are settled already.

        more: the rest of the listing, looked at only to say what differs. Raises InputChanged or DestinationError.
        """
        if self._opened is None or self._listing is None:
            return SplitsListed(splits, done)
        listed = self._listing.take(splits, done, more)
        if listed is not None:
            self._note(listed)  # into the log before any of these splits: what is noted is logged in order
        settled = self._opened.state.settled
        known = tuple((s.index, settled.taken(s.index)) for s in splits if s.index in settled)
        if not known:
            return SplitsListed(splits, done)
        return SplitsListed(tuple(s for s in splits if s.index not in settled), done, known)

    # ---------------------------------------------------------------- the end

    def flush(self) -> None:
        """Block until everything settled is logged, durable and published. Raises what went wrong."""
        loop = self._loop
        if loop is None:
            return
        self._await_clean(None)
        self._raise_trouble(loop)
        self.tally, self.splits = loop.protocol.state.tally, len(loop.protocol.state.settled)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Say in the log that the run is finished; after `flush`. Raises what went wrong."""
        if self._loop is not None:
            self._note(Finished(json.loads(json.dumps(summary))))
            self.flush()

    def close(self, *, released: bool) -> None:
        """End the thread, having logged what is settled if that takes no more than a few seconds. Never raises. Idempotent.

        released: say in the log that this session has left, so that the next one need not ask whether it lives.
        """
        thread, loop = self._thread, self._loop
        if thread is None or loop is None:
            return
        try:
            if self._await_clean(CLOSE_S) and released and loop.protocol.state.finished is None:
                self._note(Released())
                self._await_clean(CLOSE_S)
        finally:
            with self._changed:
                self._ending = True
                self._changed.notify_all()
            thread.join(timeout=CLOSE_S)
            self._thread = None

    def _await_clean(self, timeout_s: float | None) -> bool:
        """False: not clean, and will not be (in that time)."""
        loop = self._loop
        assert loop is not None
        with self._changed:
            self._inbox.append(Flush())
            self._changed.notify_all()
            self._changed.wait_for(lambda: loop.error is not None or self._is_clean(loop), timeout_s)
            return loop.error is None and self._is_clean(loop)

    def _is_clean(self, loop: CommitLoop) -> bool:
        return not self._inbox and loop.protocol.clean

    def _raise_trouble(self, loop: CommitLoop) -> None:
        if loop.error is not None:
            raise loop.error
        if loop.condemned:
            raise _condemned(loop.condemned)

    # ---------------------------------------------------------------- the committer's thread

    def _note(self, record: Record, metrics: Mapping[str, Any] | None = None) -> None:
        with self._changed:
            self._inbox.append(Note(record, metrics or {}))
            if not self._gathering or len(self._inbox) >= GROUP_SPLITS:
                self._changed.notify_all()

    def _work(self) -> None:
        loop, opened = self._loop, self._opened
        assert loop is not None
        assert opened is not None
        try:
            with self._watching:
                self._serve(loop, opened)
        except BaseException as error:  # a fault of ours: whoever waits in `flush` must hear of it
            with self._changed:
                known = isinstance(error, HeadraceError)
                loop.error = error if known else InternalError(f"the committer failed: {type(error).__name__}: {error}")
                self._changed.notify_all()
            self._post(loop.error)

    def _serve(self, loop: CommitLoop, opened: OpenedRun) -> None:
        beat_s = time.monotonic()  # open_run has just written one
        answer: Event = Tick()
        posted = False
        while True:
            with self._changed:
                loop.tell(answer, time.monotonic())
                self._changed.notify_all()
            if not posted and (trouble := self._trouble(loop)) is not None:
                posted = True
                self._post(trouble)
            with self._changed:
                if not (self._inbox or loop.busy or self._ending):
                    now = time.monotonic()
                    self._gathering = loop.protocol.gathering
                    self._changed.wait(max(0.0, min(loop.protocol.due(now), beat_s + HEARTBEAT_S - now)))
                    self._gathering = False
                if self._ending:
                    return
                now = time.monotonic()
                while self._inbox:
                    loop.tell(self._inbox.popleft(), now)
                loop.tell(Tick(), now)
            if now - beat_s >= HEARTBEAT_S and loop.error is None:
                beat_s = now
                write_heartbeat(opened.store, opened.run, opened.epoch, opened.identity, time.time())
            answer = loop.step() if loop.busy else Tick()

    @staticmethod
    def _trouble(loop: CommitLoop) -> HeadraceError | None:
        return loop.error or (_condemned(loop.condemned) if loop.condemned else None)

    # ---------------------------------------------------------------- which splits

    def _is_settled(self, split: int) -> bool:
        return split < len(self._settled_here) and self._settled_here[split] != 0

    def _mark(self, split: int) -> None:
        if split >= len(self._settled_here):
            self._settled_here.extend(bytes(max(1024, split + 1 - len(self._settled_here))))
        self._settled_here[split] = 1


@contextlib.contextmanager
def beating(opened: OpenedRun) -> Iterator[None]:
    """Inside, before there is a committer, other drivers see that this one lives."""
    left = threading.Event()

    def beat() -> None:
        while not left.wait(HEARTBEAT_S):
            write_heartbeat(opened.store, opened.run, opened.epoch, opened.identity, time.time())

    thread = threading.Thread(target=beat, name="headrace-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def _condemned(splits: Sequence[int]) -> DestinationError:
    return DestinationError(
        "files of the output could not be made durable: the storage failed to write them",
        where=(("splits", ", ".join(map(str, splits[:10]))),),
        hint="look at the disk's health; the same call goes on with just these splits",
    )


def _nobody(_error: HeadraceError) -> None:
    """No driver listens."""
