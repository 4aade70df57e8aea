"""Which run a call begins, goes on with, or refuses to touch."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.runtime.stores import ME, PLAN, committer, differences, opened, splits, work

from headrace.commit import table
from headrace.connectors.spool import FileSpool
from headrace.core.errors import DestinationError, InputChanged, TransientError
from headrace.core.splits import Fragment, Split
from headrace.runtime import ledger
from headrace.runtime.ledger import (
    Identity,
    Listing,
    check_latest,
    check_presence,
    compare_listing,
    leave,
    mark_complete,
    process_alive,
    successor,
    this_process,
    write_heartbeat,
)
from headrace.testing.memory_store import MemoryRunStore

OTHER = {"model": "b"}
YOU = Identity("here", 2, 2.0, "you")
AFAR = Identity("afar", 1, 1.0, "afar")


def show(store: MemoryRunStore, run: Any) -> None:
    """As a sink does."""
    store.write("_manifest.json", f'{{"run": "{run.run}"}}'.encode())
    store.write("_SUCCESS", b"")
    mark_complete(run)


def finished(**more: Any) -> MemoryRunStore:
    store = MemoryRunStore()
    run = opened(store, **more)
    work(store, run, 4, finish=True)
    show(store, run)
    return store


def test_the_first_run() -> None:
    store = MemoryRunStore()
    run = opened(store)
    assert (run.run, run.epoch, run.finished, run.holds, run.after_crash, run.unpublished) == (
        "run-00000",
        1,
        False,
        False,
        False,
        (),
    )


def test_a_number_whose_outputs_are_there_is_not_used_again() -> None:
    store = MemoryRunStore()
    store.objects["part-02-000000.parquet"] = b"left by somebody"
    assert opened(store).run == "run-00003"


@pytest.mark.parametrize("name", ["_SUCCESS", "_manifest.json"])
def test_finished_output_of_unknown_origin_is_kept(name: str) -> None:
    store = MemoryRunStore()
    store.objects[name] = b"{}"
    with pytest.raises(DestinationError, match="not the log"):
        opened(store)
    assert opened(store, fresh=True).holds


def test_the_same_call_goes_on() -> None:
    store = MemoryRunStore()
    work(store, opened(store), 2)
    run = opened(store, identity=YOU)
    assert (run.run, run.epoch, run.after_crash, len(run.state.settled)) == ("run-00000", 2, False, 2)
    assert "2 splits" in run.notes[0]


def test_a_session_that_died_is_known_as_such() -> None:
    store = MemoryRunStore()
    work(store, opened(store), 2, released=False)
    assert opened(store, identity=YOU).after_crash


def test_a_driver_that_was_taken_over_alive_has_not_died() -> None:
    store = MemoryRunStore()
    work(store, opened(store), 1, released=False)
    taken = opened(store, identity=YOU, take_over=True, alive=lambda pid, started: True)
    assert not taken.after_crash
    work(store, taken, 1)
    assert not opened(store).after_crash


def test_a_driver_elsewhere_that_was_taken_over_may_have_died() -> None:
    store = MemoryRunStore()
    work(store, opened(store), 1, released=False)
    taken = opened(store, identity=AFAR, take_over=True)
    assert taken.after_crash
    work(store, taken, 1)
    assert opened(store).after_crash, "for all later sessions of the run"


def test_another_plan_is_refused_with_what_differs() -> None:
    store = MemoryRunStore()
    work(store, opened(store), 2)
    with pytest.raises(DestinationError, match="unfinished run of another plan") as refused:
        opened(store, OTHER, identity=YOU)
    assert ("differs", "model: a -> b") in refused.value.where
    assert "fresh=True" in refused.value.hint


def test_a_finished_run_is_nothing_to_do() -> None:
    store = finished()
    run = opened(store)
    assert (run.finished, run.complete) == (True, True)


@pytest.mark.parametrize("missing", ["_SUCCESS", "_manifest.json", "_headrace/run-00000/complete"])
def test_a_finished_run_that_is_not_all_shown(missing: str) -> None:
    store = finished()
    store.remove(missing)
    run = opened(store)
    assert (run.finished, run.complete) == (True, False)


def test_a_finished_run_of_another_plan() -> None:
    store = finished()
    with pytest.raises(DestinationError, match="finished output of another run") as refused:
        opened(store, OTHER)
    assert ("differs", "model: a -> b") in refused.value.where


@pytest.mark.parametrize("plan", [PLAN, OTHER])
def test_fresh_over_a_finished_run(plan: dict[str, str]) -> None:
    store = finished()
    run = opened(store, plan, fresh=True)
    assert (run.run, run.epoch, run.holds) == ("run-00001", 1, True)
    work(store, run, 2)
    assert "part-01-000000.bin" not in store.objects
    for fresh in (True, False):  # both ways to say it go on with it
        again = opened(store, plan, fresh=fresh, identity=Identity("here", 3, 3.0, f"again {fresh}"))
        assert (again.run, again.holds, len(again.state.settled)) == ("run-00001", True, 2)
        work(store, again, 0)


def test_fresh_again_while_its_end_is_only_to_be_shown() -> None:
    store = finished()
    run = opened(store, fresh=True)
    work(store, run, 4, finish=True)
    again = opened(store, fresh=True)
    assert (again.run, again.finished, again.complete) == ("run-00001", True, False)
    show(store, again)
    assert opened(store, fresh=True).run == "run-00002"


def test_fresh_over_an_unfinished_run_shuts_it() -> None:
    store = MemoryRunStore()
    first = opened(store)
    work(store, first, 2)
    run = opened(store, OTHER, fresh=True, identity=YOU)
    assert (run.run, run.holds) == ("run-00001", True)  # outputs of the first are still there
    with pytest.raises(DestinationError, match="taken over"):
        work(store, first, 2)  # its driver comes back
    with pytest.raises(DestinationError, match="another plan"):
        opened(store, PLAN, identity=ME)


def test_fresh_over_a_run_that_has_shown_nothing_holds_nothing_back() -> None:
    store = MemoryRunStore()
    work(store, opened(store), 0)
    assert not opened(store, OTHER, fresh=True, identity=YOU).holds


def test_a_run_that_settled_nothing_gives_way_to_another_plan() -> None:
    store = MemoryRunStore()
    first = opened(store)
    with pytest.raises(DestinationError, match="at work"):
        opened(store, OTHER, identity=YOU, alive=lambda *_: True)
    run = opened(store, OTHER, identity=YOU)
    assert (run.run, run.epoch, run.holds) == ("run-00001", 1, False)
    work(store, run, 4, finish=True)
    with pytest.raises(DestinationError):
        work(store, first, 1)


def test_over_a_finished_run_nothing_gives_way() -> None:
    store = finished()
    work(store, opened(store, OTHER, fresh=True), 0)
    with pytest.raises(DestinationError, match="another plan"):
        opened(store)


def test_a_driver_that_died_between_two_runs() -> None:
    store = MemoryRunStore()
    work(store, opened(store), 2)
    opened(store, OTHER, fresh=True, identity=YOU)
    for name in [n for n in store.objects if "run-00001" in n]:
        store.remove(name)
    assert opened(store, OTHER, identity=AFAR).run == "run-00001"


def test_a_living_driver_is_left_alone() -> None:
    store = MemoryRunStore()
    opened(store)
    with pytest.raises(DestinationError, match="at work") as refused:
        opened(store, identity=YOU, alive=lambda pid, started: (pid, started) == (ME.pid, ME.started))
    assert "take_over=True" in refused.value.hint
    assert any("process 1 on here" in value for _, value in refused.value.where)
    run = opened(store, identity=YOU, take_over=True, alive=lambda *_: True)
    assert (run.epoch, run.after_crash) == (2, False)


@pytest.mark.parametrize("identity", [AFAR, Identity("here", 1, 1.0, "another run of this process")])
def test_a_driver_that_only_its_heartbeat_tells_of(identity: Identity) -> None:
    store = MemoryRunStore()
    run = opened(store)
    waited: list[float] = []

    def beat(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 4:
            write_heartbeat(store, run.run, 1, ME, 99.0)

    with pytest.raises(DestinationError, match="at work"):
        opened(store, identity=identity, sleep=beat)
    assert len(waited) == 4
    assert opened(store, identity=identity, sleep=waited.append).after_crash
    assert sum(waited[4:]) == 30


def test_a_death_is_remembered_after_sessions_that_left_in_good_order() -> None:
    store = MemoryRunStore()
    run = opened(store)
    assert not run.after_crash
    for _ in range(2):
        run = opened(store, identity=YOU)
        assert run.after_crash
        work(store, run, 1)
    assert not opened(store, OTHER, fresh=True).after_crash, "another run"


def test_a_session_that_leaves_before_any_work() -> None:
    store = MemoryRunStore()
    leave(opened(store))
    run = opened(store, identity=YOU, alive=lambda *_: True)
    assert (run.epoch, run.after_crash) == (2, False)
    opened(store, identity=AFAR, take_over=True, alive=lambda *_: True)
    leave(run)  # too late: the log is another driver's
    assert len(list(store.names("_headrace/run-00000/log"))) == 4
    with pytest.raises(DestinationError, match="at work"):
        opened(store, identity=YOU, alive=lambda *_: True, sleep=lambda _: write_heartbeat(store, run.run, 3, AFAR, 1.0))


def test_two_drivers_at_once() -> None:
    """One begins within the other's every call: one of them gets the run, the other one hears of it."""
    for step in range(40):
        store = MemoryRunStore()
        count, got = 0, []

        def other(_operation: str, _name: str, store: MemoryRunStore = store, step: int = step, got: list[Any] = got) -> None:
            nonlocal count
            count += 1
            if count == step + 1:
                store.before = lambda *_: None
                got.append(opened(store, identity=YOU))

        store.before = other
        refused = ""
        try:
            got.append(opened(store, alive=lambda *_: True))
        except DestinationError as error:
            refused = error.message
        assert sorted(run.epoch for run in got) == ([1] if refused or len(got) == 1 else [1, 2])
        assert refused in ("", "another driver is at work on this run")


def test_a_store_that_is_slow_to_answer() -> None:
    store = MemoryRunStore()
    failed: set[tuple[str, str]] = set()

    def once(operation: str, name: str) -> None:
        if (operation, name) not in failed:
            failed.add((operation, name))
            raise TransientError("try again")

    store.before = once
    store.after = once
    assert opened(store).epoch == 1


def test_staging_is_sorted_at_resume() -> None:
    store = MemoryRunStore()
    run = opened(store)
    kept = dict(store.objects)

    def die(operation: str, _name: str) -> None:
        if operation == "publish":
            raise DestinationError("gone")

    store.before = die
    with pytest.raises(DestinationError, match="gone"):
        work(store, run, 2)
    store.before = lambda *_: None
    store.objects[f"_headrace/{run.run}/staging/1/000003-0.bin"] = b"never logged"
    again = opened(store, identity=YOU)
    staged = [name for name in store.objects if "/staging/" in name]
    assert staged == [f.staged for f in again.unpublished] == [f"_headrace/run-00000/staging/1/{i:06d}-0.bin" for i in range(2)]
    work(store, again, 0)
    assert {name for name in store.objects.keys() - kept.keys() if name.startswith("part-")} == {
        "part-00-000000.bin",
        "part-00-000001.bin",
    }


def test_an_output_that_is_nowhere_is_noticed_at_resume() -> None:
    store = MemoryRunStore()
    work(store, opened(store), 2)
    del store.objects["part-00-000001.bin"]
    with pytest.raises(DestinationError, match="neither published nor staged") as caught:
        opened(store, identity=YOU)
    assert ("missing", "part-00-000001.bin") in caught.value.where


def test_what_is_settled_lies_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that goes on, and is finished, as of one in memory."""
    monkeypatch.setattr(table, "BLOCK_SPLITS", 3)
    monkeypatch.setattr(ledger, "FileSpool", lambda: FileSpool(memory_bytes=16))
    store = MemoryRunStore()
    work(store, opened(store), 7, of=9)
    run = opened(store, identity=YOU)
    names = [f"part-00-{i:06d}.bin" for i in range(9)]
    assert [f.name for f in run.state.settled.files] == names[:7]
    spool = run.state.settled._spool
    assert isinstance(spool, FileSpool)
    assert spool._filed > 0, "it is a file that was read"
    work(store, run, 2, of=9, finish=True)
    show(store, run)
    run = opened(store, identity=YOU)
    check_presence(run, run.state.settled.files)
    assert (run.complete, [f.name for f in run.state.settled.files]) == (True, names)
    del store.objects[names[4]]
    with pytest.raises(DestinationError, match="1 of its output files are no longer there") as caught:
        check_presence(run, run.state.settled.files)
    assert ("missing", names[4]) in caught.value.where


def test_single_writer_mode_is_said_aloud() -> None:
    assert "single-writer" in opened(MemoryRunStore(conditional=False)).notes[0]


def test_a_long_log_is_read_whole() -> None:
    store = MemoryRunStore()
    for session in range(20):
        work(store, opened(store, identity=Identity("here", 5, 5.0, f"s{session}")), 1, of=20)
    run = opened(store, identity=YOU)
    assert (run.epoch, len(run.state.settled), run.state.next) == (21, 20, 61)
    store.remove(f"_headrace/run-00000/log/{30:020d}.json")
    with pytest.raises(DestinationError, match="missing"):
        opened(store, identity=AFAR)


def test_a_damaged_plan() -> None:
    store = MemoryRunStore()
    opened(store)
    for damage in (b"", b"[]", b'{"version": 1}', b'{"version": 1, "fresh": 1, "holds": 0, "replaces": "", "plan": {}}'):
        store.objects["_headrace/run-00000/plan.json"] = damage
        with pytest.raises(DestinationError, match="plan of a run can't be read"):
            opened(store)


def test_a_later_run_is_not_shown_over() -> None:
    store = finished()
    run = opened(store)
    check_latest(run)
    opened(store, fresh=True)
    with pytest.raises(DestinationError, match="later run"):
        check_latest(run)


# ---------------------------------------------------------------- the input


@pytest.fixture(params=["in the log", "an object"])
def listing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "an object":
        monkeypatch.setattr(ledger, "SMALL_LISTING_BYTES", 0)


def test_a_small_listing_is_in_the_log() -> None:
    assert not [name for name in finished().objects if "/listing/" in name]


@pytest.mark.usefixtures("listing")
def test_an_unchanged_input() -> None:
    store = finished()
    compare_listing(opened(store), iter(splits(4)))


def test_a_large_listing_is_an_object() -> None:
    store = MemoryRunStore()
    found = tuple(Split(i, (Fragment(f"s3://b/{i * 7919 % 104729:x}.csv", i, f"{i:x}"),), 10) for i in range(2000))
    listed = Listing(store, opened(store).state).take(found, True)
    assert listed is not None
    assert listed.chunk == b""
    (name,) = [name for name in store.objects if "/listing/" in name]
    assert len(store.objects[name]) > ledger.SMALL_LISTING_BYTES


def test_a_run_that_a_limit_ended_knows_only_what_it_listed() -> None:
    store = MemoryRunStore()
    run = opened(store)
    c = committer(run)
    c.start(lambda error: None)
    c.admit(splits(2), False)
    c.finish({})
    c.close(released=True)
    before = dict(store.objects)
    compare_listing(opened(store), iter(splits(4)))
    assert store.objects == before
    with pytest.raises(InputChanged, match="1 removed"):
        compare_listing(opened(store), iter(splits(1)))


@pytest.mark.parametrize(
    ("found", "what", "named"),
    [
        (splits(4)[:3], "1 removed", ("removed", "s3://bucket/in/3.csv")),
        (splits(5), "1 added", ("added", "s3://bucket/in/4.csv")),
        (splits(2) + splits(4, "v2")[2:], "2 changed", ("changed", "s3://bucket/in/2.csv (10 bytes, written anew)")),
    ],
)
@pytest.mark.usefixtures("listing")
def test_a_changed_input(found: Any, what: str, named: tuple[str, str]) -> None:
    with pytest.raises(InputChanged, match=what) as changed:
        compare_listing(opened(finished()), iter(found))
    assert named in changed.value.where
    assert "secret" not in str(changed.value)


def test_no_secret_is_kept() -> None:
    for data in finished().objects.values():
        assert b"secret" not in data


# ---------------------------------------------------------------- this process


def test_this_process_is_alive() -> None:
    me = this_process()
    assert process_alive(me.pid, me.started)
    assert not process_alive(me.pid, me.started - 100)
    assert me.nonce != this_process().nonce
    assert differences({}, {}) == []


def test_who_has_taken_over_is_named_whatever_else_went_wrong() -> None:
    store = MemoryRunStore()
    first = opened(store)
    assert successor(first) is None
    opened(store, identity=YOU, take_over=True)
    error = successor(first)
    assert error is not None
    assert "taken over" in error.message


# ---------------------------------------------------------------- fresh, whatever is there


def damaged() -> MemoryRunStore:
    store = MemoryRunStore()
    work(store, opened(store), 2)
    last = max(name for name in store.objects if "/log/" in name)
    store.objects[last] = b"garbage"
    return store


def test_fresh_begins_the_run_after_one_whose_log_is_damaged() -> None:
    store = damaged()
    with pytest.raises(DestinationError, match="can't be used"):
        opened(store, identity=YOU)
    run = opened(store, identity=YOU, fresh=True)
    assert (run.run, run.epoch, run.holds) == ("run-00001", 1, True)


def test_not_while_its_driver_is_alive() -> None:
    store = damaged()
    name = next(name for name in store.objects if name.endswith("heartbeat.json"))

    def beat(_: float) -> None:
        store.objects[name] += b" "

    with pytest.raises(DestinationError, match="at work"):
        opened(store, identity=YOU, fresh=True, alive=lambda pid, started: True, sleep=beat)
    assert opened(store, identity=YOU, fresh=True, alive=lambda pid, started: True).run == "run-00001", "it does other things"


def test_fresh_begins_anew_where_settled_files_are_gone() -> None:
    store = MemoryRunStore()
    work(store, opened(store, fresh=True), 2)
    del store.objects["part-00-000000.bin"]
    with pytest.raises(DestinationError, match="neither published nor staged"):
        opened(store, identity=YOU)
    assert opened(store, identity=YOU, fresh=True).run == "run-00001"


def test_what_is_left_of_a_removed_destination_is_in_nobody_s_way() -> None:
    store = MemoryRunStore()
    store.objects["_headrace/run-00004/log/00000000000000000003.json"] = b"by a driver that lived on"
    assert opened(store).run == "run-00005"


@pytest.mark.parametrize("finish", [False, True])
def test_instead_of(finish: bool) -> None:
    store = MemoryRunStore()
    work(store, opened(store, fresh=True), 2 + 2 * finish, finish=finish)
    assert opened(store, fresh=True).run == "run-00000"
    assert opened(store, fresh=True, instead_of="run-00000").run == "run-00001"
