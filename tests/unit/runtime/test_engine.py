"""What a probe's numbers lead to."""

from __future__ import annotations

import gzip
import itertools
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace
from PIL import Image

import headrace as hr
from headrace.api.planning import _PoolChoice, choose, lay_out, prepare
from headrace.connectors.sinks.parquet import ParquetSink
from headrace.core.errors import PlanError, UserCodeError
from headrace.core.options import Engine, OnError, RunOptions
from headrace.core.resources import Machine
from headrace.plan.nodes import Predict, Write
from headrace.runtime import engine
from headrace.runtime.engine import Probe, Work, _watch, _work

FOUR_CORES = Machine(cores=4, memory_bytes=1 << 30, devices=())


def probe(*, wall_s: float, cpu_s: float, models_s: float) -> Probe:
    return Probe(held=0.0, rows=10, wall_s=wall_s, bytes=1000, cpu_s=cpu_s, models_s=models_s)


@pytest.mark.parametrize(
    ("wall_s", "cpu_s", "models_s", "waits"),
    [
        (1.0, 0.75, 0.25, True),  # decode, then sleep
        (1.0, 1.0, 0.9, False),  # a model that computes
        (1.0, 0.9, 0.9, False),  # the same on a machine with other work
        (1.0, 0.5, 0.0, False),  # slow storage, no model
        (1.0, 0.95, 0.05, False),  # a wait too short to matter
    ],
)
def test_models_that_wait(wall_s: float, cpu_s: float, models_s: float, waits: bool) -> None:
    assert probe(wall_s=wall_s, cpu_s=cpu_s, models_s=models_s).models_wait is waits


def test_a_sleeping_model_has_workers_of_its_own_and_the_same_answers(tmp_path: Path) -> None:
    def model(x: np.ndarray) -> np.ndarray:
        time.sleep(0.01)
        return x + 1

    ds = hr.range(300).predict(model, input="id", output="y")
    run = ds.write_parquet(str(tmp_path / "out"), progress="quiet")
    assert "waiting" in {pool.name for pool in run.pools}
    assert ds.to_arrow()["y"].to_pylist() == list(range(1, 301))


def add_one(x: np.ndarray) -> np.ndarray:
    return x + 1


def held_workers(rows: int, fn: Any, **options: Any) -> tuple[int, int]:
    """CPU workers that are planned for so many rows, and calls of the function before the run."""
    calls: list[int] = []

    def counted(x: np.ndarray) -> np.ndarray:
        calls.append(len(x))
        return fn(x)

    prepared = prepare(hr.range(rows).predict(counted, input="id", output="y")._plan, RunOptions(**options))
    assert prepared.engine == "threads"
    return len(prepared.workers), len(calls)


def test_little_work_gets_one_worker_and_a_short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.api.planning.detect_machine", lambda: FOUR_CORES)
    monkeypatch.setattr("headrace.runtime.engine.SMALL_S", 60.0)  # whatever else the machine does
    workers, calls = held_workers(500, add_one)
    assert workers == 1
    assert calls <= 6
    assert held_workers(500, add_one, cpus=3)[0] == 3, "what was asked for"


@pytest.mark.parametrize("on_error", ["skip", "quarantine"])
def test_functions_are_tried_where_bad_rows_are_no_end(monkeypatch: pytest.MonkeyPatch, on_error: OnError) -> None:
    monkeypatch.setattr("headrace.api.planning.detect_machine", lambda: FOUR_CORES)
    monkeypatch.setattr("headrace.runtime.engine.SMALL_S", 60.0)

    def fails_first(x: np.ndarray) -> np.ndarray:
        if 0 in x:
            raise ValueError("the first row")
        return x

    assert held_workers(500, add_one, on_error=on_error)[0] == 1
    assert held_workers(500, fails_first, on_error=on_error)[0] == 1


def for_main_threads(row: dict[str, int]) -> dict[str, int]:
    signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))  # as functions that limit their own time do
    return {"y": row["id"] + 1}


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_functions_for_main_threads_are_called_in_those_of_processes(on_error: Any) -> None:
    ds = hr.range(10).map(for_main_threads)
    prepared = prepare(ds._plan, RunOptions(on_error=on_error))
    assert prepared.engine == "processes"
    assert "map(for_main_threads) can be called in main threads only" in prepared.notes[-1]
    assert sorted(ds.to_arrow(on_error=on_error)["y"].to_pylist()) == list(range(1, 11))


def test_functions_for_main_threads_that_do_not_pickle_are_called_in_the_callers() -> None:
    lock = threading.Lock()

    def locked(row: dict[str, int]) -> dict[str, int]:
        with lock:
            return for_main_threads(row)

    ds = hr.range(10).map(locked)
    assert prepare(ds._plan, RunOptions()).engine == "inline"
    assert sorted(ds.to_arrow()["y"].to_pylist()) == list(range(1, 11))


def test_an_engine_that_was_asked_for_is_kept_and_the_error_names_another() -> None:
    with pytest.raises(UserCodeError, match='next: engine="processes" calls it in the main threads'):
        hr.range(10).map(for_main_threads).to_arrow(engine="threads")


def test_functions_that_fail_on_the_first_row_are_said_to_be_untried() -> None:
    prepared = prepare(hr.range(10).map(never_run)._plan, RunOptions())
    assert "map(never_run) could not be tried" in prepared.notes[-1]


@pytest.mark.parametrize("broken", ["footer", "data"])
def test_a_first_input_that_can_not_be_read_is_left_to_the_run(tmp_path: Path, broken: str) -> None:
    for i in range(2):
        pq.write_table(pa.table({"id": np.arange(1000) + 1000 * i}), tmp_path / f"{i}.parquet")
    data = bytearray((tmp_path / "0.parquet").read_bytes())
    data[-8:] = b"" if broken == "footer" else data[-8:]
    data[4:1000] = bytes(996)
    (tmp_path / "0.parquet").write_bytes(data)
    ds = hr.read_parquet(str(tmp_path / "*.parquet")).predict(add_one, input="id", output="y")
    run = ds.write_parquet(str(tmp_path / "out"), on_error="skip", progress="quiet")
    assert run.rows == 1000
    assert "one worker is enough" in run.notes[0]


def test_work_that_takes_long_gets_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.api.planning.detect_machine", lambda: FOUR_CORES)
    monkeypatch.setattr("headrace.runtime.engine.SMALL_S", 0.0)
    monkeypatch.setattr("headrace.runtime.engine.SHORT_SPLIT_S", 0.0)
    assert held_workers(500, add_one)[0] == 4


MB = 1 << 20
SMALL_SPLITS = Work(400, 400, 4 * MB, 40_000, all=True, remote=False)


@pytest.mark.parametrize(
    ("work", "functions_s", "held", "engine", "workers"),
    [
        (SMALL_SPLITS, 0.1, 0.1, "threads", 1),  # two threads would read and write them in turn
        (replace(SMALL_SPLITS, remote=True), 0.1, 0.1, "threads", 4),  # they wait for the network at once
        (replace(SMALL_SPLITS, all=False), 0.1, 0.1, "threads", 4),  # nobody knows how many follow
        (SMALL_SPLITS, 1.5, 0.1, "threads", 4),  # functions take most of the time, outside of the lock
        (SMALL_SPLITS, 0.5, 0.9, "processes", 4),
        (replace(SMALL_SPLITS, bytes=40 * MB), 0.1, 0.0, "processes", 4),  # more to read and write than one worker is for
        (Work(4, 4, 80 * MB, 40_000, all=True, remote=False), 0.1, 0.1, "threads", 4),  # long splits
        (Work(4, 1000, 3 * MB, 100_000, all=True, remote=False), 0.1, 0.1, "threads", 1),  # of tiny inputs
        (Work(4, 1000, 3 * MB, 100_000, all=True, remote=False), 1.5, 0.1, "threads", 4),
        (Work(4, 1000, 80 * MB, 100_000, all=True, remote=False), 0.1, 0.1, "threads", 4),  # that are not tiny
    ],
)
def test_small_splits_are_not_for_several_threads(
    monkeypatch: pytest.MonkeyPatch, work: Work, functions_s: float, held: float, engine: str, workers: int
) -> None:
    monkeypatch.setattr("headrace.api.planning.detect_machine", lambda: FOUR_CORES)
    monkeypatch.setattr("headrace.runtime.engine._work", lambda program: work)
    tried = Probe(held, work.rows, functions_s, work.bytes, functions_s, 0.0)
    monkeypatch.setattr("headrace.runtime.engine._probe", lambda program, ops, work: tried)
    prepared = prepare(hr.range(10).predict(add_one, input="id", output="y")._plan, RunOptions())
    assert (prepared.engine, len(prepared.workers)) == (engine, workers)


def workers(ds: hr.Dataset, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    monkeypatch.setattr("headrace.api.planning.detect_machine", lambda: FOUR_CORES)
    prepared = prepare(ds._plan, RunOptions())
    return prepared.engine, len(prepared.workers)


def spin_1ms(row: dict[str, Any]) -> dict[str, Any]:
    end = time.perf_counter() + 0.001
    while time.perf_counter() < end:
        pass
    return {"y": row["id"]}


def test_first_rows_that_are_filtered_away_do_not_end_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"id": np.arange(8000), "text": [f"{i:0>1000}" for i in range(8000)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    ds = hr.read_parquet(tmp_path / "a.parquet").filter(lambda row: row["id"] >= 400).map(spin_1ms)
    assert workers(ds, monkeypatch) == ("processes", 4)


def test_tiny_images_are_decoded_by_all_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("L", (8, 8))
    for i in range(200):
        image.save(tmp_path / f"{i:03d}.png")
    ds = hr.read_images(tmp_path).apply(hr.images.decode("bytes", resize=8, output="pixels"))
    assert workers(ds, monkeypatch) == ("threads", 4)


def test_tiny_compressed_inputs_are_as_much_work_as_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(200):
        lines = "".join(f'{{"id": {i * 500 + j}, "text": "{"x" * 400}"}}\n' for j in range(500))
        (tmp_path / f"{i:03d}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))

    def waits(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(len(batch["id"]) * 1e-5)
        return batch

    assert workers(hr.read_json(tmp_path).map_batches(waits), monkeypatch) == ("threads", 4)


@pytest.mark.parametrize(
    ("work", "wall_s", "cpu_s", "decided"),
    [
        (SMALL_SPLITS, 0.1, 0.1, True),
        (SMALL_SPLITS, 0.3, 0.3, False),  # one worker or several, as the lock is held
        (SMALL_SPLITS, 0.1, 0.03, False),  # the model seems to wait: a longer sample will tell
        (replace(SMALL_SPLITS, bytes=40 * MB), 0.1, 0.1, False),  # threads or processes
        (replace(SMALL_SPLITS, all=False), 0.1, 0.1, False),  # nobody knows how many follow
    ],
)
def test_a_sample_that_would_change_nothing_is_enough(work: Work, wall_s: float, cpu_s: float, decided: bool) -> None:
    tried = Probe(0.5, work.rows, wall_s, work.bytes, cpu_s, models_s=0.9 * wall_s)
    assert work.decided(tried) is decided


@pytest.mark.parametrize(
    ("known", "small"),
    [
        (Work(1, 1, 1000, 10, all=True, remote=True), True),
        (Work(2, 2, 1000, 10, all=True, remote=True), False),  # they wait for the network at once
        (Work(2, 2, 1000, 10, all=True, remote=False), True),
        (Work(2, 2, 1000, 10, all=False, remote=False), False),
        (Work(1, 1, 1 << 30, 10, all=True, remote=False), False),
        (Work(200, 200, 1000, 10, all=True, remote=False), False),
    ],
)
def test_what_is_read_and_written_quickly(known: Work, small: bool) -> None:
    assert known.small is small


def never_run(row: dict[str, Any]) -> dict[str, Any]:
    raise AssertionError("run in the driver's process")


def chosen(options: RunOptions, *, after_crash: bool = False, fn: Any = never_run) -> tuple[str, str]:
    prepared = choose(lay_out(hr.range(10).map(fn)._plan, options), after_crash=after_crash)
    return prepared.engine, prepared.notes[-1]


def test_a_timeout_needs_processes_and_no_probe() -> None:
    engine, note = chosen(RunOptions(timeout=2.5))
    assert engine == "processes"
    assert "timeout=2.5" in note
    assert chosen(RunOptions(engine="processes", timeout=2.5))[0] == "processes"


@pytest.mark.parametrize("engine", ["threads", "inline"])
def test_a_timeout_is_refused_where_nothing_can_be_ended(engine: Engine) -> None:
    with pytest.raises(PlanError, match=f'timeout=3 can\'t be kept with engine="{engine}"'):
        chosen(RunOptions(engine=engine, timeout=3))


def test_a_timeout_is_refused_for_a_plan_that_can_not_be_sent() -> None:
    lock = threading.Lock()
    with pytest.raises(PlanError, match="does not pickle"):
        chosen(RunOptions(timeout=3), fn=lambda row: {**row, "y": lock.locked()})


def test_after_a_crash_user_code_runs_in_processes() -> None:
    engine, note = chosen(RunOptions(), after_crash=True)
    assert engine == "processes"
    assert "map(never_run)" in note
    assert chosen(RunOptions(engine="threads"), after_crash=True)[0] == "threads"


def test_after_a_crash_a_plan_without_user_code_is_as_ever() -> None:
    prepared = choose(lay_out(hr.range(10).select("id")._plan, RunOptions()), after_crash=True)
    assert prepared.engine == "threads"


def test_rows_that_fail_make_no_long_trial() -> None:
    calls = [0]

    def work(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls[0] += 1
        if batch["id"].max() >= 4200:
            raise ValueError("bad")
        return batch

    plan = hr.range(200_000).map_batches(work)._plan
    prepare(plan, RunOptions(on_error="skip"))
    assert calls[0] < 5000, "each of the bad rows was looked for"


def test_a_sample_after_a_bad_row_tells_as_well() -> None:
    def work(row: dict[str, int]) -> dict[str, int]:
        if row["id"] == 0:
            raise ValueError("bad")
        return {"y": sum(range(20_000))}

    prepared = prepare(hr.range(200_000).map(work)._plan, RunOptions(on_error="skip", cpus=2))
    assert "could not be tried" not in prepared.notes[-1]


def test_outputs_that_travel_are_not_for_one_worker(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2]}), tmp_path / "in.parquet")
    ds = hr.read_parquet(str(tmp_path / "in.parquet"))
    far, near = (replace(ds._plan, write=Write(ParquetSink(to))) for to in ("s3://bucket/out", str(tmp_path / "out")))
    assert _work(lay_out(far, RunOptions()).program).remote
    assert not _work(lay_out(near, RunOptions()).program).remote


@pytest.mark.parametrize("deterministic", [False, True])
def test_batches_are_the_same_whatever_the_workers(tmp_path: Path, deterministic: bool) -> None:
    def sizes(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"id": batch["id"], "rows": np.full(len(batch["id"]), len(batch["id"]))}

    pq.write_table(pa.table({"id": np.arange(8000)}), tmp_path / "in.parquet")
    ds = hr.read_parquet(str(tmp_path / "in.parquet")).map_batches(sizes)
    options: list[Any] = [{"engine": "inline"}, {"engine": "threads", "cpus": 1}, {"engine": "threads", "cpus": 2}, {}]
    found: list[Any] = []
    for i, option in enumerate(options):
        ds.write_parquet(str(tmp_path / f"{i}"), progress="quiet", deterministic=deterministic, **option)
        found.append(hr.read_parquet(str(tmp_path / f"{i}")).to_arrow().sort_by("id"))
    assert all(table == found[0] for table in found)


def test_sigterm_while_a_function_is_tried_ends_the_action(tmp_path: Path) -> None:
    def work(row: dict[str, int]) -> dict[str, int]:
        signal.raise_signal(signal.SIGTERM)
        return row

    with pytest.raises(SystemExit) as ended:
        hr.range(1_000_000).map(work).write_parquet(str(tmp_path / "out"), progress="quiet")
    assert ended.value.code == 143


def test_a_lock_that_is_held_for_less_than_a_millisecond_at_a_time_is_held() -> None:
    def loops() -> None:
        for _ in range(30):
            sum(i * i for i in range(20_000))
            time.sleep(0)  # as most calls of NumPy and Arrow do, it lets others have the lock

    busy = _watch(loops, watched=True).held
    idle = _watch(lambda: time.sleep(0.02), watched=True).held
    assert busy > 2 * idle
    assert busy > 0.1


@pytest.mark.parametrize(("told", "expected"), [([0.9, 0.3, 0.0], "threads"), ([0.9, 0.9, 0.9], "processes")])
def test_a_function_that_waits_is_looked_at_again(monkeypatch: pytest.MonkeyPatch, told: list[float], expected: str) -> None:
    """It seemed to hold the lock, as its watcher had to wait for something else. One that always does, does hold it."""
    shares, watch = itertools.cycle(told), engine._watch

    def watched(call: Any, watched: bool) -> Any:
        seen = watch(call, watched)
        return replace(seen, held=next(shares)) if watched else seen

    def waits(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(0.0001 * len(batch["id"]))
        return batch

    monkeypatch.setattr("headrace.api.planning.detect_machine", lambda: FOUR_CORES)
    monkeypatch.setattr(engine, "_watch", watched)
    prepared = prepare(hr.range(1_000_000).map_batches(waits)._plan, RunOptions())
    assert prepared.engine == expected


@pytest.mark.parametrize(
    ("disturbed", "told", "expected", "looks"),
    [
        (0.2, [0.5, 0.1, 0.9], "threads", 2),
        (0.2, [0.5, 0.6, 0.5], "processes", 3),
        (0.2, [0.1, 0.9, 0.9], "threads", 1),
        (0.0, [0.5, 0.1, 0.1], "processes", 1),
    ],
)
def test_a_function_that_computes_is_looked_at_again_where_others_have_the_cores(
    monkeypatch: pytest.MonkeyPatch, disturbed: float, told: list[float], expected: str, looks: int
) -> None:
    """It may be without a core while it holds the lock for a moment: the watcher waited long, and threads would have done."""
    shares, watch, asked = itertools.cycle(told), engine._watch, itertools.count()

    def watched(call: Any, watched: bool) -> Any:
        seen = watch(call, watched)
        if not watched or seen.wall_s < engine.PROBE_S:  # a smaller sample
            return replace(seen, held=0.0)
        next(asked)
        return replace(seen, held=next(shares), disturbed=disturbed)

    def computes(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        until = time.thread_time() + 0.0001 * len(batch["id"])
        while time.thread_time() < until:
            pass
        return batch

    monkeypatch.setattr("headrace.api.planning.detect_machine", lambda: FOUR_CORES)
    monkeypatch.setattr(engine, "_watch", watched)
    prepared = prepare(hr.range(1_000_000).map_batches(computes)._plan, RunOptions())
    assert prepared.engine == expected
    assert next(asked) == looks


def test_a_second_look_that_fails_leaves_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, watch = [0], engine._watch

    def watched(call: Any, watched: bool) -> Any:
        seen = watch(call, watched)
        return replace(seen, held=0.95) if watched else seen

    def fails_once(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(0.05)
        calls[0] += 1
        if calls[0] == 3:
            raise ValueError("now and then")
        return batch

    monkeypatch.setattr("headrace.api.planning.detect_machine", lambda: FOUR_CORES)
    monkeypatch.setattr(engine, "_watch", watched)
    prepared = prepare(hr.range(1_000_000).map_batches(fails_once)._plan, RunOptions())
    assert prepared.engine == "processes"
    assert calls[0] <= 4


def test_a_sample_takes_time_whatever_the_clocks_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a core between reading one clock and the other made samples of no, or of negative time."""
    waited_s = itertools.count(0, 0.02)
    monkeypatch.setattr(engine, "_queued_s", lambda: next(waited_s))
    assert _watch(lambda: None, watched=False).wall_s > 0


def test_a_wait_between_two_clocks_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([0.0, 0.0, 5.0, 5.0, 5.0])  # at the end, between the two
    times = iter([1.0, 1.0, 2.0, 7.0, 7.0])
    monkeypatch.setattr(engine, "_queued_s", lambda: next(waits))
    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert engine._running_s() == 1.0
    assert engine._running_s() == 2.0


@pytest.mark.parametrize(
    ("amount", "shown"), [(1_073_741_824, "1073741824"), (1_073_741_825.0, "1073741825"), (0.1, "0.1"), (2, "2")]
)
def test_pools_are_named_by_all_digits_of_what_their_workers_hold(amount: float, shown: str) -> None:
    ds = hr.range(3).predict(len, input="id", output="p", resources={"memory": amount})
    (op,) = ds._plan.ops
    assert isinstance(op, Predict)
    assert _PoolChoice(Machine(1, 1 << 30))(op) == f"cpu(memory={shown})"
