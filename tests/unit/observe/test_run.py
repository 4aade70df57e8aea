from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from tests.unit.observe.script import START_S, finished, found, memory, noted, replaced, retried, settled, started, step

from headrace.core.events import WorkerGone
from headrace.core.receipts import Tally
from headrace.core.steps import OpTime
from headrace.observe.run import MOST_NOTES, Bottleneck, Run, RunRecorder


def record(*events: object) -> Run:
    recorder = RunRecorder()
    for event in events:
        recorder.on_event(event)  # type: ignore[arg-type]
    recorder.close()
    return recorder.run()


def typical() -> list[object]:
    """10 s: both CPU workers half busy, the simulated device busy for 9 s."""
    decode = (OpTime(-1, 1.0, 0, 1000), OpTime(0, 4.0, 1000, 1000))
    return [
        started(notes=("threads: two threads run at once",)),
        found(0, 2, 200),
        *step(0, 5, worker=0, stage=0, rows=1000, ops=decode, cpu_s=4.5, tally=Tally(rows_in=1000)),
        *step(0, 5, worker=1, stage=0, rows=1000, ops=decode, cpu_s=4.5, tally=Tally(rows_in=1000, filtered=100)),
        *step(1, 10, worker=2, pool="sim", stage=1, rows=1900, ops=(OpTime(1, 9.0, 1900, 1900),), cpu_s=0.1),
        *step(6, 6.2, worker=0, stage=2, rows=1900, ops=(OpTime(-2, 0.2, 1900, 1900),), tally=Tally(written=1900)),
        memory(3, 50, 700),
        memory(6, 90, 600),
        settled(7, 0, 100, 1000),
        settled(9, 1, 100, 900),
        finished(10, metrics={"accuracy": 0.5}, rows_in=2000, written=1900, filtered=100),
    ]


def test_counts_and_peaks() -> None:
    run = record(*typical())
    assert (run.rows, run.splits, run.wall_s, run.rows_per_s) == (1900, 2, 10.0, 190.0)
    assert run.tally == Tally(rows_in=2000, written=1900, filtered=100)
    assert run.tally.balanced
    assert run.first_output_s == pytest.approx(6.2)
    assert (run.peak_in_flight_bytes, run.peak_rss_bytes) == (90, 700)
    assert (run.output_files, run.output_bytes) == (2, 1900 * 7)
    assert run.metrics == {"accuracy": 0.5}


def test_stages_and_operators() -> None:
    prepare, predict, write = record(*typical()).stages
    assert (prepare.name, prepare.workers, prepare.steps, prepare.busy_s, prepare.cpu_s) == ("prepare", 2, 2, 10.0, 9.0)
    assert (prepare.rows, prepare.bytes, prepare.rows_per_s) == (2000, 20_000, 200.0)
    assert [(o.name, o.wall_s, o.rows_out) for o in prepare.operators] == [("read", 2.0, 2000), ("images.decode", 8.0, 2000)]
    assert predict.pool == "sim"
    assert [o.name for o in write.operators] == ["write"]


def test_bottleneck_is_the_busiest_pool() -> None:
    run = record(*typical())
    assert {p.name: round(p.busy, 3) for p in run.pools} == {"cpu": 0.51, "sim": 0.9}
    # With two devices these need 4.5 s, and the CPUs 5.1 s: 9 - 5.1 s less.
    assert run.bottleneck == Bottleneck(
        "pool", "sim", 1, pytest.approx(0.9), "predict(Net)", "predict(Net)", 1.0, pytest.approx(6.1)
    )


def test_bottleneck_may_be_a_stage_in_few_workers() -> None:
    """One replica of a model in a pool of two: the pool is half idle, its one worker is the limit."""
    run = record(
        started(pools={"cpu": 2}, stages={0: ("read", "cpu"), 1: ("predict(Big)", "cpu")}, ops={0: "predict(Big)"}),
        *step(0, 1, worker=0, stage=0),
        *step(0, 1, worker=1, stage=0),
        *step(1, 10, worker=1, stage=1, ops=(OpTime(0, 9.0, 10, 10),)),
        finished(10),
    )
    assert run.bottleneck is not None
    assert (run.bottleneck.kind, run.bottleneck.name, run.bottleneck.workers) == ("stage", "predict(Big)", 1)
    assert run.bottleneck.share == pytest.approx(0.9)
    assert run.bottleneck.what_if_s == pytest.approx(1.0 + 5.5)  # then the pool limits: 11 s of work in 2 workers


def test_nothing_ran() -> None:
    run = record(started(), finished(0.5))
    assert run.bottleneck is None
    assert run.first_output_s is None
    assert "0 rows in 0.50 s" in str(run)


def test_a_recorder_without_events_still_answers() -> None:
    assert record().rows == 0


def test_failed_run_keeps_what_was_measured() -> None:
    run = record(*typical()[:-1], finished(10, error="UserCodeError: no\nframes", rows_in=2000, written=500))
    assert run.error.startswith("UserCodeError")
    assert str(run).splitlines()[0] == "images → out  failed: UserCodeError: no"
    assert run.rows == 500


def test_to_dict_is_json() -> None:
    metrics = {"auc": math.nan, "n": np.int64(3), "curve": np.array([0.5, math.inf]), "inner": {"a": (1, None)}}
    run = record(*typical()[:-1], finished(10, metrics=metrics, rows_in=2000, written=2000))
    out = json.loads(json.dumps(run.to_dict(), allow_nan=False))
    assert out["metrics"] == {"auc": None, "n": 3, "curve": [0.5, None], "inner": {"a": [1, None]}}
    assert out["tally"]["written"] == 2000
    assert out["rows_per_s"] == 200.0
    assert out["stages"][0]["operators"][1]["name"] == "images.decode"
    assert out["bottleneck"]["name"] == "sim"


def test_a_run_is_plain_data_to_dataclasses() -> None:
    out = dataclasses.asdict(record(*typical()))
    assert out["tally"]["written"] == record(*typical()).tally.written
    assert isinstance(out["stages"][0]["operators"][0], dict)


def test_report() -> None:
    assert str(record(*typical())) == EXPECTED


EXPECTED = """\
images → out  1,900 rows in 10.0 s  (190 rows/s)
  engine threads · 2 splits · first output after 6.20 s · 2 files, 13 kB written
  of 2,000 rows read: 100 filtered
  memory at its peak: 90 B in flight of a budget of 1.0 GB, 700 B in all

  pool  workers  busy  busy time  cpu time
  cpu         2   51%     10.2 s    9.20 s
  sim         1   90%     9.00 s    0.10 s

  stage            pool  busy time   rows  rows/s a worker
  prepare          cpu      10.0 s  2,000              200
    read                    2.00 s  2,000            1,000
    images.decode           8.00 s  2,000              250
  predict(Net)     sim      9.00 s  1,900              211
    predict(Net)            9.00 s  1,900              211
  write            cpu      0.20 s  1,900            9,500
    write                   0.20 s  1,900            9,500

  bottleneck: sim, at 90% of its limit
  one more sim worker: about 6.10 s (39% less)

  metrics
    accuracy  0.5
  note: threads: two threads run at once"""


def test_report_names_the_operator_that_limits() -> None:
    run = record(
        started(pools={"cpu": 1}, stages={0: ("read→write", "cpu")}),
        *step(0, 10, ops=(OpTime(-1, 2.0, 0, 9), OpTime(0, 8.0, 9, 9))),
        finished(10),
    )
    assert "bottleneck: cpu, at 100% of its limit; images.decode takes 80% of that" in str(run)
    assert "one more cpu worker: about 5.00 s (50% less)" in str(run)


def test_report_leaves_out_reading_and_writing_that_cost_nothing() -> None:
    ops = (OpTime(-1, 0.001, 0, 9), OpTime(0, 9.9, 9, 9), OpTime(-2, 0.01, 9, 9))
    text = str(record(started(), *step(0, 10, ops=ops), finished(10)))
    assert "    images.decode" in text
    assert "    read" not in text
    assert "    write" not in text


def test_html_is_escaped() -> None:
    assert "&lt;b&gt;" in Run(name="<b>", engine="inline")._repr_html_()


def test_memory_does_not_grow_with_splits() -> None:
    recorder = RunRecorder()
    recorder.on_event(started())
    for i in range(1000):
        for event in step(i, i + 1, tally=Tally(written=1), ops=(OpTime(0, 1.0, 1, 1),)):
            recorder.on_event(event)
        recorder.on_event(settled(i, i, 1, 1))
    assert recorder.run().splits == 1000
    sizes = [len(v) for v in vars(recorder).values() if hasattr(v, "__len__")]
    assert max(sizes) < 10


def resumed() -> list[object]:
    """The second session of a run: 37 of 38 splits were done; a worker died on the last."""
    return [
        started(
            settled=37,
            tally=Tally(rows_in=3700, written=3698, quarantined=2),
            run="run-00000",
            sessions=2,
            quarantine="out/_headrace/run-00000/quarantine",
        ),
        found(0, 38, 100),
        *step(0, 5, worker=0, tally=Tally(rows_in=60, written=60)),
        noted(5, "worker 0 (cpu) is lost: killed by signal 9\nThread 1:"),
        WorkerGone(START_S + 5.0, 0, "cpu"),
        replaced(5, 3, 0),
        retried(5, 37, Tally(rows_in=60, written=60)),
        *step(5, 10, worker=3, tally=Tally(rows_in=100, written=100)),
        settled(10, 37, 100, 100),
        finished(10, rows_in=3800, written=3798, quarantined=2),
    ]


def test_workers_that_went_with_their_node_are_lost_once() -> None:
    gone = [WorkerGone(START_S + 1.0, worker, "cpu") for worker in (0, 1)]
    assert record(started(), *gone, replaced(1.0, 7, 1), finished(2)).workers_lost == 2


def test_a_resumed_run_counts_everything_and_measures_itself() -> None:
    run = record(*resumed())
    assert (run.rows, run.splits, run.resumed_splits, run.resumed_rows) == (3798, 38, 37, 3698)
    assert run.rows_per_s == 10.0
    assert (run.run_id, run.sessions, run.retries, run.workers_lost, run.finished) == ("run-00000", 2, 1, 1, True)
    assert run.stages[0].workers == 1  # the second took the first one's place
    assert run.notes == ("worker 0 (cpu) is lost: killed by signal 9",)


def test_report_of_a_resumed_run() -> None:
    assert str(record(*resumed())).splitlines()[:6] == [
        "images → out  100 of 3,798 rows in 10.0 s  (10.0 rows/s)",
        "  engine threads · 38 splits · first output after 5.00 s · 1 file, 700 B written",
        "  resumed: 37 of 38 splits were done (session 2 of run-00000)",
        "  of 3,800 rows read: 2 quarantined",
        "  set aside in out/_headrace/run-00000/quarantine",
        "  1 worker lost · 1 split started again",
    ]


def test_to_dict_says_only_what_there_is_to_say() -> None:
    usual = {"run_id", "sessions", "resumed_splits", "resumed_rows", "retries", "workers_lost", "quarantine", "finished"}
    assert not (usual | {"already_done"}) & record(*typical()).to_dict().keys()
    out = record(*resumed()).to_dict()
    assert {name: out[name] for name in usual & out.keys()} == {
        "run_id": "run-00000",
        "sessions": 2,
        "resumed_splits": 37,
        "resumed_rows": 3698,
        "retries": 1,
        "workers_lost": 1,
        "quarantine": "out/_headrace/run-00000/quarantine",
    }


def test_a_stopped_run_did_not_fail_and_is_not_finished() -> None:
    run = record(*resumed()[:-1], finished(10, error="stopped by SIGTERM", rows_in=3800, written=3798, quarantined=2))
    assert not run.finished
    assert str(run).splitlines()[:2] == [
        "images → out  stopped by SIGTERM",
        "  100 of 3,798 rows in 10.0 s until then; the same call goes on from there",
    ]


def test_nothing_to_do() -> None:
    tally = Tally(rows_in=200, written=199, skipped=1)
    run = Run("a > b", "", rows=199, tally=tally, output_files=2, metrics={"n": 199}, run_id="run-00001", already_done=True)
    assert str(run).splitlines() == [
        "a > b  nothing to do: finished before (run-00001), 199 rows in 2 files",
        "  of 200 rows read: 1 skipped",
        "",
        "  metrics",
        "    n  199",
    ]
    assert run.to_dict()["already_done"] is True


def test_notes_do_not_grow_with_the_run() -> None:
    run = record(started(), *(noted(1, f"note {i}") for i in range(10 * MOST_NOTES)), finished(2))
    assert len(run.notes) == MOST_NOTES
