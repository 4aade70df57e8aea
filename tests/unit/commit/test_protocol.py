"""The committer's decisions, event by event."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.commit.protocol import (
    GROUP_S,
    GROUP_SPLITS,
    LOOK_S,
    TRIES,
    Append,
    Appended,
    Conflicted,
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
)
from headrace.commit.records import Claim, Finished, Listed, Released, Segment, Settled, decode, encode
from headrace.commit.state import LogState
from headrace.core.errors import DestinationError, InternalError, TransientError
from headrace.core.receipts import OutputFile, Tally

RUN = "run-00000"


def merge(_name: str, a: Any, b: Any) -> Any:
    return {"sum": a["sum"] + b["sum"]}


def protocol(*, holds: bool = False, unpublished: tuple[OutputFile, ...] = ()) -> Protocol:
    state = LogState(RUN)
    state.apply(Segment(0, 1, "n1", (Claim(1, "n1", "h", 1, 0.0, 0.0), Listed(0, 1000, "d", True))))
    return Protocol(state, merge, holds=holds, unpublished=unpublished)


def file(split: int) -> OutputFile:
    return OutputFile(f"part-00-{split:06d}.bin", 1, 1, "ab" * 32, f"_headrace/{RUN}/staging/1/{split:06d}-0.bin")


def settled(split: int, *, taken: tuple[tuple[int, int], ...] = ()) -> Note:
    return Note(Settled(split, "id", 0, Tally(rows_in=1, written=1), (file(split),), 1, taken), {"m": {"sum": 10**split}})


def appended(p: Protocol, *splits: int) -> Append:
    """Settle them, and go on to the append."""
    for split in splits:
        p.handle(settled(split), 0.0)
    assert p.handle(Flush(), 0.0) == [Sync(tuple(file(s) for s in splits))]
    [command] = p.handle(Synced(), 0.0)
    assert isinstance(command, Append)
    return command


def test_durable_then_logged_then_published() -> None:
    p = protocol()
    assert p.handle(settled(0), 0.0) == []
    assert p.due(0.0) == GROUP_S
    assert p.handle(Tick(), GROUP_S / 2) == []
    assert p.handle(settled(1), GROUP_S / 2) == []
    assert p.handle(Tick(), GROUP_S) == [Sync((file(0), file(1)))]
    [append] = p.handle(Synced(), 1.1)
    assert isinstance(append, Append)
    assert append.index == 1
    assert decode(RUN, 1, append.data).metrics == {"m": {"sum": 11}}
    assert 0 not in p.state.settled
    assert p.handle(Appended(), 1.2) == [Publish((file(0), file(1)))]
    assert 0 in p.state.settled
    assert p.totals == {"m": {"sum": 11}}
    assert not p.clean
    assert p.handle(Published(), 1.3) == []
    assert p.clean


def test_many_receipts_do_not_wait() -> None:
    p = protocol()
    for split in range(GROUP_SPLITS - 1):
        assert p.handle(settled(split), 0.0) == []
    assert [type(c) for c in p.handle(settled(GROUP_SPLITS - 1), 0.0)] == [Sync]


def test_one_append_at_a_time_while_publishes_lag() -> None:
    p = protocol()
    appended(p, 0)
    assert p.handle(settled(1), 0.0) == []
    assert p.handle(Flush(), 0.0) == []
    assert p.handle(Appended(), 0.1) == [Sync((file(1),)), Publish((file(0),))]
    [append] = p.handle(Synced(), 0.2)
    assert isinstance(append, Append)
    assert append.index == 2
    assert p.handle(Appended(), 0.3) == [Publish((file(1),))]
    p.handle(Published(), 0.4)
    assert not p.clean
    p.handle(Published(), 0.5)
    assert p.clean


def test_records_without_files_need_no_sync() -> None:
    p = protocol()
    p.handle(Note(Finished({})), 0.0)
    assert [type(c) for c in p.handle(Flush(), 0.0)] == [Append]


def test_held_files_are_not_published() -> None:
    p = protocol(holds=True, unpublished=(file(5),))
    appended(p, 0)
    assert p.handle(Appended(), 0.0) == []
    assert p.clean


def test_what_an_earlier_session_left_is_published_first() -> None:
    p = protocol(unpublished=(file(5),))
    assert not p.clean
    assert p.handle(Tick(), 0.0) == [Publish((file(5),))]


def test_a_lost_answer_is_asked_again_with_the_same_bytes() -> None:
    p = protocol()
    append = appended(p, 0)
    p.handle(settled(1), 0.0)
    assert p.handle(Failed(append, TransientError("lost")), 0.0) == []
    assert p.handle(Flush(), 0.0) == []
    assert p.handle(Tick(), 5.0) == [append]


def test_trouble_that_lasts_ends_the_run() -> None:
    p = protocol()
    append = appended(p, 0)
    error = TransientError("gone")
    for again in range(1, TRIES):
        assert p.handle(Failed(append, error), 10.0 * again) == []
        assert p.handle(Tick(), 10.0 * again + 5) == [append]
    assert p.handle(Failed(append, error), 1000.0) == [Stop(error)]
    assert p.handle(settled(1), 1001.0) == []


def claim_of_another(epoch: int = 2) -> bytes:
    return encode(Segment(1, epoch, "n2", (Claim(epoch, "n2", "elsewhere", 42, 0.0, 0.0),)))


def test_a_conflict_with_a_later_driver_stops() -> None:
    p = protocol()
    append = appended(p, 0)
    assert p.handle(Conflicted(), 0.0) == [ReadFrom(append.index)]
    [stop] = p.handle(Found((claim_of_another(),)), 0.0)
    assert isinstance(stop, Stop)
    assert "taken over" in stop.error.message
    assert ("driver", "process 42 on elsewhere") in stop.error.where
    assert p.handle(Appended(), 0.0) == []
    assert 0 not in p.state.settled


def test_a_conflict_with_ones_own_bytes_is_no_conflict() -> None:
    p = protocol()
    append = appended(p, 0)
    p.handle(Conflicted(), 0.0)
    assert p.handle(Found((append.data,)), 0.0) == [Publish((file(0),))]
    assert p.totals == {"m": {"sum": 1}}


def test_a_conflict_with_anything_else_is_damage() -> None:
    p = protocol()
    appended(p, 0)
    p.handle(Conflicted(), 0.0)
    [stop] = p.handle(Found((encode(Segment(1, 1, "n9", (Released(),))),)), 0.0)
    assert isinstance(stop, Stop)
    assert "can't be used" in stop.error.message


def test_an_idle_driver_notices_a_later_one() -> None:
    p = protocol()
    assert p.handle(Tick(), 0.0) == []
    assert p.due(0.0) == LOOK_S
    assert p.handle(Tick(), LOOK_S) == [ReadFrom(1)]
    assert p.clean
    assert p.handle(Found(()), LOOK_S) == []
    assert p.handle(Tick(), 2 * LOOK_S) == [ReadFrom(1)]
    [stop] = p.handle(Found((claim_of_another(),)), 2 * LOOK_S)
    assert isinstance(stop, Stop)


def test_a_failure_that_a_later_driver_caused_is_told_as_that() -> None:
    p = protocol()
    p.handle(settled(0), 0.0)
    [sync] = p.handle(Flush(), 0.0)
    assert p.handle(Failed(sync, DestinationError("staged file gone")), 0.0) == [ReadFrom(1)]
    assert p.handle(Flush(), 0.0) == []
    [stop] = p.handle(Found((claim_of_another(),)), 0.0)
    assert isinstance(stop, Stop)
    assert "taken over" in stop.error.message


@pytest.mark.parametrize("answer", [Found(()), Failed(ReadFrom(1), TransientError("no answer"))])
def test_any_other_failure_is_told_as_it_is(answer: Found | Failed) -> None:
    p = protocol()
    p.handle(settled(0), 0.0)
    [sync] = p.handle(Flush(), 0.0)
    full = DestinationError("no space left")
    p.handle(Failed(sync, full), 0.0)
    assert p.handle(answer, 0.0) == [Stop(full)]


def test_what_may_still_land_in_the_log_is_known() -> None:
    """What such a segment names must not be removed: an earlier request of an append may take effect after its last one."""
    gone = TransientError("gone")
    lasting = protocol()
    append = appended(lasting, 0)
    for again in range(TRIES):
        assert not lasting.certain
        lasting.handle(Failed(append, gone), 10.0 * again)
        lasting.handle(Tick(), 10.0 * again + 5)
    assert lasting.error is gone
    assert not lasting.certain
    refused = protocol()
    append = appended(refused, 0)
    refused.handle(Failed(append, DestinationError("no space left")), 0.0)
    assert not refused.certain
    refused.handle(Found(()), 0.0)
    assert refused.certain
    at_last_refused = protocol()
    append = appended(at_last_refused, 0)
    at_last_refused.handle(Failed(append, gone), 0.0)
    at_last_refused.handle(Failed(append, DestinationError("no space left")), 5.0)
    at_last_refused.handle(Found(()), 5.0)
    assert not at_last_refused.certain
    superseded = protocol()
    appended(superseded, 0)
    superseded.handle(Conflicted(), 0.0)
    superseded.handle(Found((claim_of_another(),)), 0.0)
    assert superseded.certain
    through = protocol()
    append = appended(through, 0)
    through.handle(Failed(append, DestinationError("answered with an error, and done")), 0.0)
    through.handle(Found((append.data,)), 0.0)
    assert through.certain
    assert 0 in through.state.settled


def test_a_condemned_file_leaves_its_split_out() -> None:
    p = protocol()
    for split in range(3):
        p.handle(settled(split), 0.0)
    p.handle(Flush(), 0.0)
    redo, append = p.handle(Synced((file(1),)), 0.0)
    assert redo == Redo((1,), (file(1),))
    assert isinstance(append, Append)
    logged = decode(RUN, 1, append.data)
    assert [r.split for r in logged.records if isinstance(r, Settled)] == [0, 2]
    assert logged.metrics == {"m": {"sum": 101}}


def test_what_a_limit_let_through_goes_with_the_split_before_it() -> None:
    p = protocol()
    for split in range(3):
        p.handle(settled(split, taken=((0, 5),)), 0.0)
    p.handle(Flush(), 0.0)
    redo, append = p.handle(Synced((file(1),)), 0.0)
    assert redo == Redo((1, 2), (file(1),))
    assert isinstance(append, Append)
    p.handle(Appended(), 0.0)
    p.handle(settled(3, taken=((0, 5),)), 0.0)
    p.handle(Flush(), 0.0)
    assert p.handle(Synced(), 0.0) == [Redo((3,), ())]


def test_a_group_of_condemned_splits_logs_nothing() -> None:
    p = protocol()
    p.handle(settled(0), 0.0)
    p.handle(Flush(), 0.0)
    assert p.handle(Synced((file(0),)), 0.0) == [Redo((0,), (file(0),))]
    assert p.clean


def test_a_split_that_is_logged_is_not_told_again() -> None:
    p = protocol()
    appended(p, 0)
    p.handle(Appended(), 0.0)
    [stop] = p.handle(settled(0), 0.0)
    assert isinstance(stop, Stop)
    assert isinstance(stop.error, InternalError)
