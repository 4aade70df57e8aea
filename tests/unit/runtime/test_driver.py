from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.unit.runtime.stand import SPLIT, Stand, advance

from headrace.core.errors import DestinationError, WorkerDied
from headrace.core.events import MemorySampled, Noted, SplitRetried, SplitsFound, StepFinished, WorkerReplaced
from headrace.core.receipts import Tally
from headrace.core.refs import BlockRef, PartRef
from headrace.core.resources import WorkerSpec
from headrace.core.steps import Apply, Doing, Share, StepDone, WorkerLost, WorkerUp
from headrace.runtime.signals import Stopped
from headrace.scheduler.messages import (
    AddWorker,
    Command,
    Deliver,
    Drain,
    Event,
    Fail,
    Finish,
    MemoryPressure,
    PartsSpilled,
    Release,
    Retry,
    Settle,
    Spill,
    SplitsListed,
    Start,
    Submit,
)

Answer = Callable[[Event], Sequence[Command] | None]
SETTLED = Settle(SPLIT, 1, None, Tally(rows_in=5, written=5))


def answers(**by_kind: Sequence[Command]) -> Answer:
    """Commands by the name of the event's class."""
    return lambda event: by_kind.get(type(event).__name__)


def test_metrics_and_settled_splits_reach_the_committer_before_the_flush() -> None:
    done = StepDone(1, 0, finished=True, tally=Tally(rows_in=5, written=5), metrics={"n": 5})
    stand = Stand(answers(Start=[Submit(advance(1))], StepDone=[SETTLED, Finish()]), [[done]])
    assert stand.driver.run() == {"n": 1}
    assert stand.committer.calls == [("add", 0, 1, {"n": 5}), ("settle", 0, 1), ("flush", "workers there")]
    assert stand.substrate.stopped
    assert stand.driver.over
    finished = stand.ear.finished
    assert (finished.error, finished.metrics, finished.tally) == ("", {"n": 1}, Tally(rows_in=5, written=5))


def test_answers_of_an_attempt_that_no_longer_counts_count_nothing() -> None:
    first = StepDone(1, 0, tally=Tally(rows_in=3, written=3), metrics={"n": 3})
    late = StepDone(2, 0, tally=Tally(rows_in=4, written=4), metrics={"n": 4})
    again = StepDone(3, 0, finished=True, tally=Tally(rows_in=5, written=5), metrics={"n": 5})
    script: dict[int, Sequence[Command]] = {
        1: [Retry(0, 2, "the disk hiccuped"), Submit(advance(3, attempt=2))],
        3: [Settle(SPLIT, 2, None, Tally(rows_in=5, written=5)), Finish()],
    }

    def answer(event: Event) -> Sequence[Command] | None:
        if isinstance(event, Start):
            return [Submit(advance(1)), Submit(advance(2))]
        return script.get(event.step) if isinstance(event, StepDone) else None

    stand = Stand(answer, [[first], [late], [again]])
    stand.driver.run()
    assert stand.committer.calls[:-1] == [("add", 0, 1, {"n": 3}), ("retry", 0, 2), ("add", 0, 2, {"n": 5}), ("settle", 0, 2)]
    (retried,) = stand.ear.of(SplitRetried)
    assert (retried.index, retried.attempt, retried.why, retried.tally) == (0, 2, "the disk hiccuped", first.tally)
    assert [e.tally for e in stand.ear.of(StepFinished)] == [first.tally, Tally(), again.tally]


def test_an_apply_speaks_for_each_of_its_owners() -> None:
    apply = Apply(9, 0, 1, (), ((0, 1), (1, 1), (2, 1)))
    shares = (
        Share(0, 1, Tally(skipped=1), {"n": 1}),
        Share(1, 1, Tally(skipped=2), {"n": 2}),  # started again meanwhile
        Share(2, 1, Tally(skipped=4)),
    )
    begin = [*(Submit(advance(i, split=i)) for i in range(3)), Retry(1, 2, "its worker died"), Submit(apply)]
    stand = Stand(answers(Start=begin, StepDone=[Finish()]), [[StepDone(9, 0, shares=shares)]])
    stand.driver.run()
    assert [c for c in stand.committer.calls if c[0] == "add"] == [("add", 0, 1, {"n": 1})]
    assert stand.ear.of(StepFinished)[0].tally == Tally(skipped=5)


def test_input_that_was_skipped_uncounted_is_told() -> None:
    first = StepDone(1, 0, unreadable=("skipped a.parquet",))
    late = StepDone(2, 0, unreadable=("skipped it again",))
    script = {1: [Retry(0, 2, "the disk hiccuped")], 2: [Finish()]}
    begin = [Submit(advance(1)), Submit(advance(2))]
    stand = Stand(
        lambda e: begin if isinstance(e, Start) else script[e.step] if isinstance(e, StepDone) else None, [[first], [late]]
    )
    stand.driver.run()
    assert [e.text for e in stand.ear.of(Noted)] == ["skipped a.parquet"]


def test_a_worker_takes_the_place_and_the_device_of_the_one_that_died() -> None:
    stand = Stand(
        answers(Start=[Submit(advance(1))], WorkerLost=[AddWorker(4, "sim", 0, "killed by signal 9"), Finish()]),
        [[WorkerLost(0, "killed by signal 9", Doing(2, "map_batches(f)"))]],
    )
    stand.driver.run()
    assert stand.substrate.started == [WorkerSpec(0, "sim", "sim:0"), WorkerSpec(4, "sim", "sim:0")]
    (replaced,) = stand.ear.of(WorkerReplaced)
    assert (replaced.worker, replaced.replaces, replaced.pool) == (4, 0, "sim")
    assert [e.text for e in stand.ear.of(Noted)] == ["worker 0 (sim) is lost: killed by signal 9, in map_batches(f)"]


def test_a_hung_worker_is_killed_when_its_time_is_up_and_its_stack_shown() -> None:
    up = [WorkerUp(0, "sim")]
    stand = Stand(answers(WorkerUp=[Submit(advance(1))], WorkerLost=[Finish()]), [up], timeout_s=30.0)
    stack = "Thread 1:\n" + "\n".join(f"  line {i}" for i in range(99))
    stand.substrate.when_killed = lambda worker, reason: WorkerLost(worker, reason, Doing(2, "map(slow)"), stack)
    stand.driver.run()
    assert stand.substrate.killed == [(0, "no answer for 30 s to its first step, which loads models too")]
    assert stand.substrate.clock_s == pytest.approx(30.0)
    (note,) = stand.ear.of(Noted)
    assert note.text.startswith("worker 0 (sim) is lost: no answer for 30 s")
    assert "in map(slow)\nThread 1:\n  line 0\n" in note.text
    assert note.text.endswith("... and 60 lines more")


def test_an_answer_gives_the_worker_its_time_again() -> None:
    begin = [Submit(advance(1)), Submit(advance(2))]
    stand = Stand(answers(WorkerUp=begin, WorkerLost=[Finish()]), [[WorkerUp(0, "sim")]], timeout_s=30.0)

    def answered() -> list[Any]:
        stand.substrate.clock_s = 29.0
        return [StepDone(1, 0)]

    stand.substrate.rounds.append(answered)
    stand.driver.run()
    assert stand.substrate.killed == [(0, "no answer for 30 s")]
    assert stand.substrate.clock_s == pytest.approx(59.0)


def test_the_row_that_killed_a_worker_is_kept_and_the_error_names_it(tmp_path: Path) -> None:
    doing = Doing(2, "map_batches(f)", digest="d1", sample=b"arrow")
    error = WorkerDied("worker 0 died")
    stand = Stand(answers(Start=[], WorkerLost=[Fail(error)]), [[WorkerLost(0, "killed by signal 11", doing)]],
                  crash_dir=str(tmp_path / "crashes"))  # fmt: skip
    with pytest.raises(WorkerDied) as caught:
        stand.driver.run()
    path = tmp_path / "crashes" / "2-d1.arrow"
    assert path.read_bytes() == b"arrow"
    assert ("sample", str(path)) in caught.value.where
    assert f"HEADRACE_REPRODUCE={path} " in caught.value.hint
    assert f"HEADRACE_REPRODUCE={path} " in stand.ear.of(Noted)[0].text
    assert stand.substrate.stopped
    assert ("flush", "workers there") not in stand.committer.calls


def test_spilled_parts_are_told_at_once_and_what_that_brings_comes_last() -> None:
    part = PartRef(5, 0, 100, ("x",), "in memory")
    other = PartRef(6, 0, 100, ("x",))
    last = PartRef(7, 0, 100, ("x",))
    stand = Stand(
        answers(Start=[Spill((part,)), Release((other,))], PartsSpilled=[Release((last,)), Finish()]), [[StepDone(1, 0)]]
    )
    stand.driver.run()
    assert stand.scheduler.told[:2] == [Start(), PartsSpilled((PartRef(5, 0, 100, ("x",), "on disk"),))]
    assert stand.substrate.released == [other, last]
    assert stand.substrate.waits == 0


def test_rows_that_were_delivered_before_are_not_delivered_again() -> None:
    pa = pytest.importorskip("pyarrow")
    batch = pa.record_batch({"x": [0, 1, 2, 3]})
    block = BlockRef(4, (PartRef(1, 0, 8, ("x",), batch),))
    got: list[Any] = []
    stand = Stand(answers(Start=[Deliver(0, block), Deliver(0, block, skip=3), Finish()]), deliver=got.append)
    stand.driver.run()
    assert [b["x"].to_pylist() for b in got] == [[0, 1, 2, 3], [3]]


def test_scarce_memory_is_told_to_the_scheduler_and_to_people() -> None:
    def fuller() -> list[Any]:
        stand.substrate.held_bytes = 9_000_000_000
        return []

    def answer(event: Event) -> Sequence[Command] | None:
        return [Finish()] if event == MemoryPressure(0) else None

    def freed() -> list[Any]:
        stand.substrate.held_bytes = 1_000_000_000
        return []

    stand = Stand(answer, budget_bytes=10_000_000_000)
    stand.substrate.rounds.append(fuller)
    real_wait = stand.substrate.wait

    def wait(timeout_s: float | None) -> list[Any]:
        if stand.substrate.clock_s > 1.0:
            freed()
        return real_wait(timeout_s)

    stand.substrate.wait = wait  # type: ignore[method-assign]
    stand.driver.run()
    assert [e for e in stand.scheduler.told if isinstance(e, MemoryPressure)] == [MemoryPressure(1), MemoryPressure(0)]
    assert [e.text for e in stand.ear.of(Noted)] == ["memory 9.0 of 10 GB: no new work until it falls"]
    assert max(e.rss_bytes for e in stand.ear.of(MemorySampled)) == 9_000_000_000


def test_a_drain_finishes_what_is_open_and_then_stops() -> None:
    def interrupted() -> list[Any]:
        stand.driver.drain("stopped by SIGTERM", "SIGTERM: finishing what is open", 20.0)
        return []

    done = StepDone(1, 0, finished=True)
    stand = Stand(answers(Start=[Submit(advance(1))], StepDone=[SETTLED, Finish(drained=True)]))
    stand.substrate.rounds.extend([interrupted, [], [done]])
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        stand.driver.run()
    assert Drain() in stand.scheduler.told
    assert stand.committer.calls == [("settle", 0, 1), ("flush", "workers there")]
    assert stand.driver.drained
    assert stand.ear.of(Noted)[0].text == "SIGTERM: finishing what is open"
    assert stand.ear.finished.error == "stopped by SIGTERM"


def test_a_drain_has_an_end_and_keeps_what_is_settled() -> None:
    stand = Stand(answers(Start=[Submit(advance(1)), SETTLED]))
    stand.driver.drain("stopped by SIGTERM", "finishing", 20.0)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        stand.driver.run()
    assert stand.substrate.clock_s == pytest.approx(20.0)
    assert stand.committer.calls == [("settle", 0, 1), ("flush", "workers ended")]


def test_a_drain_that_leaves_nothing_to_do_is_a_finished_run() -> None:
    stand = Stand(answers(Drain=[Finish()]))
    stand.driver.drain("stopped by SIGTERM", "finishing", 20.0)
    assert stand.driver.run() == {"n": 1}
    assert not stand.driver.drained


def test_stop_is_at_once() -> None:
    stand = Stand(answers(Start=[Submit(advance(1))]))
    stand.driver.stop("stopped by Ctrl-C")
    with pytest.raises(Stopped, match="stopped by Ctrl-C"):
        stand.driver.run()
    assert stand.committer.calls == []
    assert stand.substrate.stopped
    stand.driver.stop()  # a signal that comes late finds nothing to wake


def test_an_error_of_the_committer_ends_the_run() -> None:
    def fails() -> list[Any]:
        assert stand.committer.post is not None
        stand.committer.post(DestinationError("the disk is full"))
        return []

    stand = Stand(answers(Start=[Submit(advance(1))]), [fails])
    with pytest.raises(DestinationError, match="the disk is full"):
        stand.driver.run()
    assert stand.substrate.stopped
    assert stand.ear.finished.error == "the disk is full"


def test_only_user_code_in_this_thread_may_be_interrupted() -> None:
    seen: list[bool] = []
    for engine in ("inline", "processes"):
        stand = Stand(answers(StepDone=[Finish()]), engine=engine)
        stand.substrate.rounds.append(lambda s=stand: [seen.append(s.driver.interruptible), StepDone(1, 0)][1:])
        stand.driver.run()
    assert seen == [True, False]


def test_splits_that_were_settled_before_are_found_too() -> None:
    stand = Stand(answers(SplitsListed=[Finish()]))
    stand.driver.post(SplitsListed((SPLIT,), done=True, settled=((1, ()), (2, ()))))
    stand.driver.run()
    (found,) = stand.ear.of(SplitsFound)
    assert (found.count, found.bytes, found.complete, found.rows) == (3, 100, True, None)
    assert stand.driver.progress() == "0 of 3 splits are committed"


def test_workers_that_do_not_come_up_are_killed() -> None:
    replace = AddWorker(1, "sim", 0, "not up")
    stand = Stand(
        lambda event: {0: [replace], 1: [Finish()]}[event.worker] if isinstance(event, WorkerLost) else None, timeout_s=2.0
    )
    stand.driver.run()
    assert [(worker, reason[:6]) for worker, reason in stand.substrate.killed] == [(0, "not up"), (1, "not up")]
