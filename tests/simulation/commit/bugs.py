"""Bugs to plant in the commit protocol, the committer and the ledger: what the simulation has to catch.

Each is a small change that someone might make. `plant(name)` is a context in which the production code has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from msgspec.structs import replace
from tests.simulation.commit.disk import Disk

from headrace.commit.protocol import Append, Appended, Failed, Phase, Protocol, ReadFrom, Sync, Synced
from headrace.commit.records import Segment, Settled, decode, encode
from headrace.commit.state import LogState
from headrace.core.errors import TransientError
from headrace.runtime.committer import CommitLoop, Committer, SplitStates
from headrace.runtime.ledger import _Opening

BUGS: dict[str, Callable[[], Any]] = {}


def bug(plant: Callable[[], Any]) -> Callable[[], Any]:
    BUGS[plant.__name__] = plant
    return plant


@contextmanager
def plant(name: str) -> Iterator[None]:
    with BUGS[name]():
        yield


def _group_files(protocol: Protocol) -> list[Any]:
    return [f for r in protocol._group if isinstance(r.record, Settled) for f in r.record.files]


@bug
def published_before_logged() -> Any:
    real = Protocol._on_synced

    def on_synced(self: Protocol, condemned: Any, out: Any) -> None:
        self._unpublished.extend(() if self._holds else _group_files(self))
        real(self, condemned, out)

    return patch.object(Protocol, "_on_synced", on_synced)


@bug
def log_written_over() -> Any:
    """`write` where `create` is due."""
    real = CommitLoop._carry

    def carry(self: CommitLoop, command: Any) -> Any:
        if isinstance(command, Append):
            self._store.write(f"_headrace/{self._run}/log/{command.index:020d}.json", command.data)
            return Appended()
        return real(self, command)

    return patch.object(CommitLoop, "_carry", carry)


@bug
def conflict_stepped_over() -> Any:
    """A conflict is taken for somebody's ordinary segment: go on behind it."""
    real = Protocol._on_found

    def on_found(self: Protocol, objects: Any, now: float) -> None:
        if self._append is None or not objects or self._append.data in objects:
            real(self, objects, now)
            return
        for data in objects:
            segment = decode(self.state.run, self.state.next, data)
            self.state.apply(segment)
        self._take_deltas()
        self._append = None
        self._waiting.extendleft(reversed(self._group))
        self._waiting_since = now
        self.phase = Phase.IDLE

    def check_owner(self: LogState, segment: Segment) -> None:
        self.epoch = segment.epoch

    both = patch.multiple(LogState, _check_owner=check_owner)
    return _both(both, patch.object(Protocol, "_on_found", on_found))


@contextmanager
def _both(a: Any, b: Any) -> Iterator[None]:
    with a, b:
        yield


@bug
def lost_answer_appended_again() -> Any:
    """A lost answer is taken for a failure: the same receipts go to the next index."""
    real = Protocol._on_failed

    def on_failed(self: Protocol, command: Any, error: Any, now: float, out: Any) -> None:
        if not isinstance(command, Append) or not isinstance(error, TransientError):
            real(self, command, error, now, out)
            return
        self.phase = Phase.APPENDING
        out.append(ReadFrom(command.index))

    real_found = Protocol._on_found

    def on_found(self: Protocol, objects: Any, now: float) -> None:
        if self._append is None or self._append.data not in objects:
            real_found(self, objects, now)
            if self._append is not None and self.phase is Phase.APPENDING and not objects:
                self._again(self._append, TransientError("again"), now)
            return
        segment = decode(self.state.run, self._append.index, self._append.data)
        self.state.next += 1
        self._append = Append(self.state.next, encode(replace(segment, index=self.state.next)))
        self._retries.append((now, self._append))
        self.phase = Phase.APPENDING

    return _both(patch.object(Protocol, "_on_failed", on_failed), patch.object(Protocol, "_on_found", on_found))


@bug
def counted_twice_after_a_lost_answer() -> Any:
    real = Protocol._on_appended

    def on_appended(self: Protocol, now: float) -> None:
        again = Append in self._tries
        data = self._append.data if self._append else b""
        real(self, now)
        if again:
            self.state.deltas.append(decode(self.state.run, self.state.next - 1, data).metrics)
            self._take_deltas()

    return patch.object(Protocol, "_on_appended", on_appended)


@bug
def fsync_skipped() -> Any:
    real = CommitLoop._carry

    def carry(self: CommitLoop, command: Any) -> Any:
        return Synced() if isinstance(command, Sync) else real(self, command)

    return patch.object(CommitLoop, "_carry", carry)


@bug
def failed_fsync_ignored() -> Any:
    real = Protocol._on_synced
    return patch.object(Protocol, "_on_synced", lambda self, condemned, out: real(self, (), out))


@bug
def metrics_of_a_condemned_split_kept() -> Any:
    real = Protocol._append_group

    def on_synced(self: Protocol, condemned: Any, out: Any) -> None:
        every = list(self._group)
        bad = {f.staged for f in condemned}
        good = [r for r in every if not (isinstance(r.record, Settled) and any(f.staged in bad for f in r.record.files))]
        if good and len(good) < len(every):
            lost = [r for r in every if r not in good]
            good[0] = replace(good[0], metrics={**good[0].metrics, **lost[0].metrics})
        self._group = good
        real(self, out)

    return patch.object(Protocol, "_on_synced", on_synced)


@bug
def directory_not_synced_before_unlink() -> Any:
    """In a store: the staged name goes before the final name is safe."""
    real = Disk.__init__

    def init(self: Disk, *args: Any) -> None:
        real(self, *args)
        self.sync_directories = False

    return patch.object(Disk, "__init__", init)


@bug
def staged_removed_at_take_over() -> Any:
    """Everything of earlier epochs goes, what the log names as well."""
    real = _Opening._sort_staging

    def sort_staging(self: _Opening, run: str, state: Any, *, held: bool) -> Any:
        for epoch in range(state.epoch):
            self.store.remove(f"_headrace/{run}/staging/{epoch}")
        return real(self, run, state, held=held)

    return patch.object(_Opening, "_sort_staging", sort_staging)


@bug
def staging_sorted_before_the_claim() -> Any:
    """While the driver before may still log what it has staged."""
    sort, real = _Opening._sort_staging, _Opening._go_on

    def go_on(self: _Opening, run: str, header: Any, state: Any, dead: bool) -> Any:
        state.epoch += 1
        kept = sort(self, run, state, held=header.holds)
        state.epoch -= 1
        with patch.object(_Opening, "_sort_staging", lambda *_, **__: kept):
            return real(self, run, header, state, dead)

    return patch.object(_Opening, "_go_on", go_on)


@bug
def metrics_of_a_retried_attempt_kept() -> Any:
    def retry(self: SplitStates, split: int, attempt: int) -> None:
        self._open[split] = (attempt, self._open.get(split, (0, {}))[1])

    return patch.object(SplitStates, "retry", retry)


@bug
def second_receipt_counted() -> Any:
    """The first no longer wins."""
    return patch.object(Committer, "_is_settled", lambda self, split: False)


@bug
def settled_splits_given_out_again() -> Any:
    real = Committer.admit

    def admit(self: Committer, splits: Any, done: bool, more: Any = ()) -> Any:
        return replace(real(self, splits, done, more), splits=splits)

    return patch.object(Committer, "admit", admit)


@bug
def hold_ignored() -> Any:
    real = Protocol.__init__

    def init(self: Protocol, *args: Any, holds: bool, **more: Any) -> None:
        real(self, *args, holds=False, **more)

    return patch.object(Protocol, "__init__", init)


@bug
def finished_before_all_is_published() -> Any:
    clean = property(lambda self: self.phase in (Phase.IDLE, Phase.LOOKING) and not self._waiting)
    return patch.object(Protocol, "clean", clean)


@bug
def redo_skipped_at_resume() -> Any:
    real = _Opening._sort_staging

    def sort_staging(self: _Opening, run: str, state: Any, *, held: bool) -> Any:
        real(self, run, state, held=held)
        return ()

    return patch.object(_Opening, "_sort_staging", sort_staging)


@bug
def claim_not_logged() -> Any:
    """A later driver begins at the log's end without a claim of its own."""
    real = _Opening._claim

    def claim(self: _Opening, state: Any, *more: Any, died: bool = False) -> bool:
        if state.owner is None or more:
            return real(self, state, *more, died=died)
        state.owner = replace(state.owner, pid=self.identity.pid)
        return True

    return patch.object(_Opening, "_claim", claim)


@bug
def metrics_of_the_session_only() -> Any:
    """What earlier sessions logged is left out of the totals."""
    real = Protocol.__init__

    def init(self: Protocol, state: Any, *args: Any, **more: Any) -> None:
        state.deltas.clear()
        real(self, state, *args, **more)

    return patch.object(Protocol, "__init__", init)


@bug
def given_up_publishing() -> Any:
    """A failed publish is forgotten rather than tried again."""
    from headrace.commit.protocol import Publish

    real = Protocol._take

    def take(self: Protocol, event: Any, now: float, out: Any) -> None:
        if isinstance(event, Failed) and isinstance(event.command, Publish):
            self._publishing -= 1
            return
        real(self, event, now, out)

    return patch.object(Protocol, "_take", take)
