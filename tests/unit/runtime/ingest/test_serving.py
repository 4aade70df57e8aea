"""Hub, server and client together, over runs that are lists of batches; consumers are threads of this process."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from headrace.core.errors import DataError, HeadraceError, InternalError, PlanError, UserCodeError, WorkerDied
from headrace.core.tensors import ragged_type
from headrace.runtime.ingest import hub as hub_module
from headrace.runtime.ingest import meeting, private, wire
from headrace.runtime.ingest.channel import Channel, blocks
from headrace.runtime.ingest.client import RemoteChannel
from headrace.runtime.ingest.hub import Hub
from headrace.runtime.ingest.server import LocalChannel
from headrace.runtime.signals import Stopped

CREDITS = 4


class ListRun:
    """Delivers batches as far as it has credits, as the driver does."""

    def __init__(self, deliver: Callable[[Any], None], batches: list[Any], error: BaseException | None = None) -> None:
        self.delivered = 0
        self.stopped = False
        self._deliver = deliver
        self._batches = batches
        self._error = error
        self._credits = CREDITS
        self._changed = threading.Condition()

    def run(self) -> None:
        for batch in self._batches:
            with self._changed:
                self._changed.wait_for(lambda: self._credits > 0 or self.stopped)
                if self.stopped:
                    raise Stopped("stopped")
                self._credits -= 1
                self.delivered += 1
            self._deliver(batch)
        if self._error is not None:
            raise self._error

    def stop(self, why: str = "stopped") -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def took(self, blocks: int) -> None:
        with self._changed:
            self._credits += blocks
            self._changed.notify_all()


class Stand:
    """A split of `batches` in n."""

    def __init__(self, n: int, batches: list[Any], *, equal: bool, error: BaseException | None = None) -> None:
        self.runs: list[ListRun] = []

        def open_run(deliver: Callable[[Any], None]) -> ListRun:
            self.runs.append(ListRun(deliver, batches, error))
            return self.runs[-1]

        self.n = n
        self.hub = Hub(n, equal=equal, open_run=open_run)
        self.local = LocalChannel(self.hub)

    def channel(self, kind: str) -> Channel:
        return self.local if kind == "threads" else pickle.loads(pickle.dumps(self.local))

    def epoch(self, channel: Channel, rank: int, most: int = 1 << 30) -> list[int]:
        """The ids that a rank gets, of `most` blocks."""
        ids: list[int] = []
        for i, block in enumerate(blocks(channel, rank)):
            ids += block["id"].to_pylist()
            if i + 1 >= most:
                break
        return ids

    def epochs(self, channel: Channel) -> list[list[int]]:
        return together([lambda rank=rank: self.epoch(channel, rank) for rank in range(self.n)])


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """What the calls return, or raise, each in a thread."""
    found: list[Any] = [None] * len(calls)

    def work(i: int) -> None:
        try:
            found[i] = calls[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def batches(*rows: int) -> list[pa.RecordBatch]:
    """Batches of so many rows, with consecutive ids."""
    ends = np.cumsum(rows)
    return [pa.record_batch({"id": np.arange(end - n, end)}) for n, end in zip(rows, ends, strict=True)]


@pytest.fixture
def stand() -> Iterator[Callable[..., Stand]]:
    made: list[Stand] = []

    def make(*args: Any, **kwargs: Any) -> Stand:
        made.append(Stand(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.local.close()


@pytest.fixture(params=["threads", "socket"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("equal", [True, False])
def test_epochs_divide_the_rows(stand: Callable[..., Stand], kind: str, equal: bool) -> None:
    made = stand(3, batches(10, 0, 7, 1, 1, 30, 2), equal=equal)
    channel = made.channel(kind)
    for _ in range(3):
        got = made.epochs(channel)
        ids = sorted(i for ids in got for i in ids)
        assert len(set(ids)) == len(ids)
        if equal:
            assert [len(g) for g in got] == [17, 17, 17]
        else:
            assert ids == list(range(51))
    assert len(made.runs) == 3


def test_columns_of_all_kinds_travel(stand: Callable[..., Stand]) -> None:
    """A slice takes its own rows along, whatever the layout; so does a batch without columns."""
    storage = pa.array([[[1, 2], [2]], [[3], [1]], [[4, 5, 6], [3]]], pa.list_(pa.list_(pa.int64())))
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12.0).reshape(3, 2, 2))
    columns = {"s": ["a", None, "ccc"], "l": storage, "t": tensor, "d": pa.array(["x", "y", "x"]).dictionary_encode()}
    ragged = ragged_type(pa.uint8())
    shaped = pa.array([{"data": [1, 2], "shape": [1, 2]}] * 3, ragged.storage_type)
    columns["r"] = pa.ExtensionArray.from_storage(ragged, shaped)
    whole = pa.record_batch(columns)
    made = stand(3, [whole, whole.select([])], equal=True)
    channel = made.channel("socket")
    got = together([lambda rank=rank: list(blocks(channel, rank)) for rank in range(3)])
    for rank, (first, second) in enumerate(got):
        assert first.equals(whole.slice(rank, 1))
        assert (second.num_rows, second.num_columns) == (1, 0)


def test_one_leaves_early_and_the_others_go_on(stand: Callable[..., Stand], kind: str) -> None:
    made = stand(2, batches(*[10] * 20), equal=True)
    channel = made.channel(kind)
    few, all_ = together([lambda: made.epoch(channel, 0, most=2), lambda: made.epoch(channel, 1)])
    assert len(few) == 10
    assert len(all_) == 100
    assert [len(g) for g in made.epochs(channel)] == [100, 100]


def test_the_run_ends_when_all_leave_early_and_they_may_join_again_at_once(stand: Callable[..., Stand], kind: str) -> None:
    made = stand(2, batches(*[10] * 50), equal=False)
    channel = made.channel(kind)

    def train(rank: int) -> list[int]:
        return [len(made.epoch(channel, rank, most=1)) for _ in range(15)]

    for got in together([lambda: train(0), lambda: train(1)]):
        assert got == [10] * 15
    assert len(made.runs) == 15
    assert all(run.delivered < 50 for run in made.runs)


def test_the_error_of_the_run_reaches_all_as_it_is(stand: Callable[..., Stand], kind: str) -> None:
    error = UserCodeError("f failed", where=(("rows", "3-4"),), hint="mend f", frames="line 1\nline 2")
    made = stand(2, batches(10, 10), equal=False, error=error)
    for caught in made.epochs(made.channel(kind)):
        assert type(caught) is UserCodeError
        assert str(caught) == str(error)
        assert caught is not error


def test_what_is_no_error_of_ours_is_an_internal_one(stand: Callable[..., Stand], kind: str) -> None:
    made = stand(2, [], equal=False, error=KeyError("oh"))
    for caught in made.epochs(made.channel(kind)):
        assert type(caught) is InternalError
        assert "KeyError: 'oh'" in str(caught)


def test_errors_travel_as_the_nearest_class_that_is_known() -> None:
    class Special(DataError):
        pass

    found = wire.unpack_error(wire.pack_error(Special("x", where=(("a", "b"),), hint="h")))
    assert type(found) is DataError
    assert str(found) == str(DataError("x", where=(("a", "b"),), hint="h"))
    for nonsense in (b"", b"[]", b"{}", b'{"kind": "redact"}', b'{"kind": "nobody"}'):
        assert type(wire.unpack_error(nonsense)) is InternalError


def test_a_rank_has_one_consumer(stand: Callable[..., Stand], kind: str) -> None:
    made = stand(1, batches(*[10] * 20), equal=False)
    channel = made.channel(kind)
    first = blocks(channel, 0)
    next(first)
    with pytest.raises(PlanError, match="rank 0 of this streaming_split is being read in another consumer"):
        next(blocks(channel, 0))
    with pytest.raises(PlanError, match="there is no rank 3"):
        next(blocks(channel, 3))
    assert sum(b.num_rows for b in first) == 190


def test_memory_is_bounded_while_one_consumer_stalls(stand: Callable[..., Stand], kind: str) -> None:
    """With equal the run is held back; else the others get all the rest."""
    for equal in (True, False):
        made = stand(2, batches(*[100] * 60), equal=equal)
        channel = made.channel(kind)
        one, two = blocks(channel, 0), blocks(channel, 1)
        first = together([lambda one=one: next(one), lambda two=two: next(two)])
        run = made.runs[0]
        if equal:
            got = [next(two) for _ in range(2)]  # there is room for these without the other
            assert len(got) == 2
            assert run.delivered <= 4 * CREDITS
            assert len(made.hub.held()) <= 2 * CREDITS
        else:
            rows = sum(b.num_rows for b in two) + sum(b.num_rows for b in first)
            assert rows >= 6000 - 100 * CREDITS
        one.close()
        two.close()


def test_who_does_not_know_the_token_learns_nothing(stand: Callable[..., Stand]) -> None:
    made = stand(1, batches(10), equal=False)
    channel = made.local.remote()
    stranger = RemoteChannel(channel.address, "00" * wire.TOKEN_BYTES, 1)
    with pytest.raises(WorkerDied):
        stranger.join(0)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(channel.address)
        sock.sendall(b"x" * wire.HELLO.size)
        assert sock.recv(100) == b""
    assert made.runs == []
    assert made.epochs(channel) == [list(range(10))]
    assert os.stat(os.path.dirname(channel.address)).st_mode & 0o077 == 0
    assert channel.token not in repr(channel)


def test_closing_ends_all(stand: Callable[..., Stand], kind: str) -> None:
    made = stand(2, batches(*[10] * 50), equal=True)
    channel = made.channel(kind)
    one, two = blocks(channel, 0), blocks(channel, 1)
    together([lambda: next(one), lambda: next(two)])
    made.local.close()
    with pytest.raises(HeadraceError, match="closed"):
        list(one)
    with pytest.raises(HeadraceError, match="closed"):
        next(blocks(channel, 0))
    with pytest.raises(PlanError, match="closed"):
        made.local.remote().join(0)
    two.close()
    assert made.runs[0].stopped


def test_a_consumer_that_waits_for_the_others_may_be_closed_out(stand: Callable[..., Stand], kind: str) -> None:
    made = stand(2, batches(10), equal=False)
    channel = made.channel(kind)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.extend(together([lambda: made.epoch(channel, 0)])))
    waiting.start()
    while made.hub._coordinator.missing() != [1]:
        pass
    made.local.close()
    waiting.join()
    assert isinstance(found[0], HeadraceError)
    assert "closed" in str(found[0])


def test_it_is_said_who_is_missing(
    stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub_module, "PATIENCE_S", 0.01)
    made = stand(3, batches(10), equal=False)
    said = threading.Event()
    tell = made.hub._tell_missing
    monkeypatch.setattr(made.hub, "_tell_missing", lambda: (tell(), said.set()))

    def late() -> list[int]:
        said.wait()
        return made.epoch(made.local, 1)

    together([lambda: made.epoch(made.local, 0), late, lambda: said.wait() and made.epoch(made.local, 2)])
    assert capfd.readouterr().err == ("headrace: streaming_split: epoch 1 begins when all have joined; missing: rank 1, 2\n")


def test_a_run_that_can_not_be_started_is_told(stand: Callable[..., Stand], monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the end of a process, from Python 3.12 on."""
    made = stand(1, batches(10), equal=False)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(PlanError, match="at its end"):
        next(blocks(made.local, 0))
    monkeypatch.undo()
    assert made.epochs(made.local) == [list(range(10))]


@pytest.fixture
def own_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private folder of the test's own, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:
        monkeypatch.setattr(private.tempfile, "gettempdir", lambda: temporary)
        yield Path(temporary) / f"headrace-{os.getuid()}"


def test_ranks_find_the_one_that_serves_whoever_comes_first(own_folder: Path, stand: Callable[..., Stand]) -> None:
    made = stand(2, batches(*[10] * 4), equal=True)
    path = meeting.place("job|0", 1)
    private.write_note(path, {"address": "/nobody/there", "token": "00", "pid": "1", "facts": "?"})  # of an earlier job
    other = pickle.loads(pickle.dumps(meeting.MeetingChannel(path, "range.streaming_split(2)")))

    def serve() -> list[int]:
        made.local.at_close(meeting.announce(path, made.local.remote(), "range.streaming_split(2)"))
        return made.epoch(made.local, 0)

    assert [len(g) for g in together([serve, lambda: made.epoch(other, 1)])] == [20, 20]
    assert [len(g) for g in made.epochs(other)] == [20, 20]
    made.local.close()
    assert os.listdir(own_folder) == []


def test_ranks_that_call_for_different_things_are_refused(own_folder: Path, stand: Callable[..., Stand]) -> None:
    made = stand(2, [], equal=True)
    path = meeting.place("job|0", 1)
    assert path != meeting.place("job|0", 2)
    assert path != meeting.place("job|1", 1)
    made.local.at_close(meeting.announce(path, made.local.remote(), "a"))
    with pytest.raises(PlanError, match="for different things"):
        meeting.MeetingChannel(path, "b").join(1)


def test_what_the_killed_have_left_is_swept_and_what_lives_is_kept(own_folder: Path, stand: Callable[..., Stand]) -> None:
    lives = stand(1, batches(10), equal=False)
    note = private.note("lives")
    meeting.announce(note, lives.local.remote(), "")
    dead, address = private.listen()
    dead.close()
    private.write_note(private.note("dead"), {"address": address})
    fresh = stand(1, [], equal=False).local.remote()
    expected = {Path(p).name for p in (note, lives.local.remote().address, fresh.address)}
    assert set(os.listdir(own_folder)) == expected
    assert lives.epochs(lives.local.remote()) == [list(range(10))]


def test_a_folder_that_others_may_enter_is_refused(own_folder: Path) -> None:
    own_folder.mkdir(0o755)
    with pytest.raises(PlanError, match="not this user's alone"):
        private.listen()


def test_a_long_temporary_path_is_no_place_for_sockets(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private.tempfile, "gettempdir", lambda: "/tmp/" + "x" * 100)
    assert private.folder() == f"/tmp/headrace-{os.getuid()}"
