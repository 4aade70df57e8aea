"""The committer's thread, over a store in memory."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
from tests.unit.runtime.stores import committer, opened, settle, splits, work

from headrace.core.errors import DestinationError, HeadraceError, InputChanged, TransientError, UserCodeError
from headrace.core.receipts import LineageRun, OutputFile, Receipt, Tally
from headrace.core.splits import Fragment, Split
from headrace.runtime.committer import as_logged, settled_record
from headrace.runtime.ledger import Identity
from headrace.scheduler.messages import Settle, SplitsListed
from headrace.testing.memory_store import MemoryRunStore

YOU = Identity("here", 2, 2.0, "you")


def test_settled_splits_are_durable_logged_and_visible_after_flush() -> None:
    store = MemoryRunStore()
    run = opened(store)
    order: list[str] = []
    store.before = lambda operation, name: order.append(operation if "heartbeat" not in name else "")
    work(store, run, 3, finish=True)
    assert [name for name in store.objects if name.startswith("part-")] == [f"part-00-{i:06d}.bin" for i in range(3)]
    assert order.index("sync") < order.index("publish")
    again = opened(store)
    c = committer(again)
    assert again.finished
    assert (c.tally.written, c.splits, c.results(), [f.name for f in c.files]) == (
        15,
        3,
        {"rows": 15},
        [f"part-00-{i:06d}.bin" for i in range(3)],
    )


def test_totals_go_over_all_sessions() -> None:
    store = MemoryRunStore()
    work(store, opened(store), 1)
    run = opened(store, identity=YOU)
    c = committer(run)
    c.start(lambda error: None)
    try:
        assert (c.tally.written, c.splits) == (5, 1)
        listed = c.admit(splits(4), True)
        assert [s.index for s in listed.splits] == [1, 2, 3]
        assert listed.settled == ((0, ()),)
        settle(store, run, c, listed.splits[0])
        c.flush()
        assert (c.tally.written, c.splits, c.results()) == (10, 2, {"rows": 10})
    finally:
        c.close(released=True)


def test_states_of_the_attempt_that_counts() -> None:
    c = committer(None)
    c.add(0, 0, {"rows": {"rows": 100}})
    c.retry(0, 1)
    c.add(0, 0, {"rows": {"rows": 1000}})  # a late answer
    c.add(0, 1, {"rows": {"rows": 2}})
    c.add(0, 1, {"rows": {"rows": 3}})
    c.settle(Settle(splits(1)[0], 1, None, Tally(rows_in=5, written=5)))
    c.settle(Settle(splits(1)[0], 1, None, Tally(rows_in=5, written=5)))
    c.add(0, 1, {"rows": {"rows": 7}})
    assert (c.results(), c.tally.written, c.splits) == ({"rows": 5}, 5, 1)


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ({"n": np.int64(3), "x": [np.float32(0.5), (1, None)], "ok": np.True_}, {"n": 3, "x": [0.5, [1, None]], "ok": True}),
        ([math.inf, 1 << 70, "\ud800", {"a": (0.1,)}], [math.inf, 1 << 70, "\ud800", {"a": [0.1]}]),
    ],
)
def test_a_state_is_kept_as_the_log_will_give_it_back(state: Any, kept: Any) -> None:
    logged = as_logged({"m": state})
    assert logged == {"m": kept}
    assert type(logged["m"][0] if isinstance(kept, list) else logged["m"]["n"]) in (int, float)
    (nan,) = as_logged({"m": (math.nan,)})["m"]
    assert math.isnan(nan)


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"a": [0, {1: 2}]}, r"the key 1 in state\['a'\]\[1\] would come back as a string"),
        ({None: 1}, "the key None in state"),
        ({np.int64(1): 1}, "keys must be str"),
        ([{1, 2}], "it holds a builtins.set"),
        (np.arange(3), "it holds a numpy.ndarray"),
        (1j, "it holds a builtins.complex"),
        (b"x", "it holds a builtins.bytes"),
    ],
)
def test_a_state_that_would_not_come_back_is_refused(state: Any, why: str) -> None:
    with pytest.raises(UserCodeError, match=r"evaluate\(m\): its state can't be kept as JSON: " + why) as caught:
        as_logged({"m": state})
    assert caught.value.where == (("metric", "m"),)


def test_a_cancelled_split_leaves_nothing() -> None:
    c = committer(None)
    c.add(0, 0, {"rows": {"rows": 100}})
    c.settle(Settle(splits(1)[0], 0, None, Tally(rows_in=5, cut=5), cancelled=True))
    assert (c.results(), c.tally, c.splits, list(c.files)) == ({"rows": 0}, Tally(), 0, [])


def test_without_a_log_everything_is_admitted() -> None:
    c = committer(None)
    c.start(lambda error: None)
    assert c.admit(splits(2), True) == SplitsListed(splits(2), True)
    c.flush()
    c.close(released=True)


def test_a_changed_input_is_refused_as_it_is_listed() -> None:
    store = MemoryRunStore()
    work(store, opened(store), 1)
    c = committer(opened(store, identity=YOU))
    assert [s.index for s in c.admit(splits(2), False).splits] == [1]
    with pytest.raises(InputChanged, match="2 changed"):
        c.admit(splits(4, "v2")[2:3], False, iter(splits(4, "v2")[3:]))


def test_another_driver_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.commit.protocol.LOOK_S", 0.01)
    store = MemoryRunStore()
    heard: list[Any] = []
    told = threading.Event()
    c = committer(opened(store))

    def hear(error: HeadraceError) -> None:
        heard.append(error)
        told.set()

    c.start(hear)
    try:
        opened(store, identity=YOU, take_over=True)
        assert told.wait(30)
        assert "taken over" in heard[0].message
        with pytest.raises(DestinationError, match="taken over"):
            c.flush()
    finally:
        c.close(released=True)
    assert len([name for name in store.objects if "/log/" in name]) == 2


def test_a_full_disk_is_told_and_leaves_no_trace() -> None:
    store = MemoryRunStore()
    run = opened(store)
    heard: list[Any] = []
    c = committer(run)
    c.start(heard.append)

    def full(operation: str, _name: str) -> None:
        if operation == "sync":
            raise DestinationError("no space left")

    store.before = full
    try:
        settle(store, run, c, c.admit(splits(1), True).splits[0])
        with pytest.raises(DestinationError, match="no space left"):
            c.flush()
    finally:
        c.close(released=True)
    assert [e.message for e in heard] == ["no space left"]
    assert not [name for name in store.objects if name.startswith("part-")]
    store.before = lambda *_: None
    work(store, opened(store, identity=YOU), 1, of=1, finish=True)


def test_a_condemned_file_is_told_and_the_rest_is_logged() -> None:
    store = MemoryRunStore()
    run = opened(store)
    store.bad.add(f"_headrace/{run.run}/staging/1/000001-0.bin")
    heard: list[Any] = []
    c = committer(run)
    c.start(heard.append)
    try:
        for split in c.admit(splits(3), True).splits:
            settle(store, run, c, split)
        with pytest.raises(DestinationError, match="durable"):
            c.flush()
    finally:
        c.close(released=True)
    assert len(heard) == 1
    store.bad.clear()
    again = opened(store, identity=YOU)
    assert list(again.state.settled.splits()) == [0, 2]
    work(store, again, 1, of=3, finish=True)


def test_lost_answers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.commit.protocol.RETRY_S", 0.0)
    store = MemoryRunStore()
    run = opened(store)
    lost: set[tuple[str, str]] = set()

    def lose_once(operation: str, name: str) -> None:
        if (operation, name) not in lost and "listing" not in name:
            lost.add((operation, name))
            raise TransientError("no answer")

    store.after = lose_once
    c = committer(run)
    c.start(lambda error: None)
    try:
        listed = c.admit(splits(3), True)
        for split in listed.splits:
            settle(store, run, c, split)
        c.flush()
        assert (c.results(), c.splits, len(list(c.files))) == ({"rows": 15}, 3, 3)
    finally:
        c.close(released=False)
    assert {"create", "publish"} <= {operation for operation, _ in lost}


def test_a_session_that_fails_logs_what_it_has() -> None:
    store = MemoryRunStore()
    run = opened(store)
    c = committer(run)
    c.start(lambda error: None)
    for split in c.admit(splits(3), True).splits:
        settle(store, run, c, split)
    c.close(released=True)  # no flush: an error has ended the driver
    c.close(released=True)
    again = opened(store, identity=YOU)
    assert (len(again.state.settled), again.after_crash) == (3, False)


def test_a_fault_of_the_committer_reaches_whoever_waits() -> None:
    store = MemoryRunStore()
    run = opened(store)
    c = committer(run)
    heard: list[Any] = []

    def broken(operation: str, _name: str) -> None:
        if operation == "sync":
            raise ZeroDivisionError

    store.before = broken
    c.start(heard.append)
    try:
        settle(store, run, c, c.admit(splits(1), True).splits[0])
        with pytest.raises(Exception, match="ZeroDivisionError"):
            c.flush()
    finally:
        c.close(released=False)
    assert heard


def test_files_set_aside_and_lineage_get_their_names() -> None:
    split = Split(12, (Fragment("a", 1, "v"),), 1)
    staged = "_headrace/run-00000/staging/1/x"
    lineage = OutputFile("anything", 0, 1, "ab" * 32, f"{staged}l", "lineage")
    aside = (OutputFile("", 1, 1, "ab" * 32, f"{staged}q", "quarantine"),) * 2
    rows = (LineageRun(0, 1, "s3://user:secret@b/k?token=1", 0, 1),)
    done = Settle(split, 0, Receipt(12, split.id, 0, (lineage,), 1, rows), Tally(), aside=aside)
    record = settled_record("run-00000", done)
    assert [f.name for f in record.files] == [
        "_headrace/run-00000/lineage/000012.parquet",
        "_headrace/run-00000/quarantine/000012-0000.parquet",
        "_headrace/run-00000/quarantine/000012-0001.parquet",
    ]
    assert record.lineage[0].uri == "s3://b/k"


def test_a_name_that_leaves_the_destination_is_never_logged() -> None:
    file = OutputFile("../x", 1, 1, "ab" * 32, "_headrace/run-00000/staging/1/x")
    with pytest.raises(DestinationError, match="can't be the name"):
        settled_record("run-00000", Settle(splits(1)[0], 0, Receipt(0, "id", 0, (file,), 1), Tally()))
