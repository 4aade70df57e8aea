"""Runs that are cut short and go on: what a second call of the same program does, through the public verbs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.connectors.run_store import LocalRunStore
from headrace.core.errors import DestinationError, HeadraceError, InputChanged, UserCodeError

from .conftest import outputs, read_back

Options = dict[str, Any]


def breaking_at(marker: Path, row_id: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that fails at a row as long as the marker file is there. Its code stays the same."""
    path = str(marker)

    def score(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == row_id and os.path.exists(path):
            raise ValueError("not now")
        return {**row, "y": row["x"] * 2}

    return score


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return read_back(folder).to_pylist()


@pytest.mark.on_ray
def test_a_failed_run_goes_on_where_it_was(data: Path, tmp_path: Path, quiet: Options) -> None:
    marker = tmp_path / "marker"
    score = breaking_at(marker, 150)
    ds = hr.read_parquet(data).map(score)
    ds.write_parquet(tmp_path / "clean", outputs="per_input", **quiet)
    marker.touch()
    with pytest.raises(UserCodeError):
        ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    marker.unlink()
    run = ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "clean")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "clean")
    assert run.rows == 200
    assert run.tally.written == 200
    assert hr.verify(str(tmp_path / "out")).ok


def test_a_finished_run_is_a_no_op_that_says_so(data: Path, tmp_path: Path, quiet: Options) -> None:
    ds = hr.read_parquet(data).evaluate(n=hr.metrics.Count())
    first = ds.write_parquet(tmp_path / "out", **quiet)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.parquet")}
    again = ds.write_parquet(tmp_path / "out", **quiet)
    assert again.already_done
    assert again.rows == first.rows == 200
    assert dict(again.metrics) == dict(first.metrics)
    assert "nothing to do" in str(again)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.parquet")} == before


def test_changed_code_is_refused_and_shown(data: Path, tmp_path: Path, quiet: Options) -> None:
    hr.read_parquet(data).map(lambda row: {"y": row["x"] * 2}).write_parquet(tmp_path / "out", **quiet)
    with pytest.raises(DestinationError) as caught:
        hr.read_parquet(data).map(lambda row: {"y": row["x"] * 3}).write_parquet(tmp_path / "out", **quiet)
    assert "code" in str(caught.value)
    assert "fresh=True" in str(caught.value)
    assert read_back(tmp_path / "out")["y"].to_pylist() == (np.arange(200) * 1.0).tolist()


def test_changed_options_are_refused_and_named(data: Path, tmp_path: Path, quiet: Options) -> None:
    ds = hr.read_parquet(data)
    ds.limit(100).write_parquet(tmp_path / "out", **quiet)
    with pytest.raises(DestinationError, match=r"100.*120"):
        ds.limit(120).write_parquet(tmp_path / "out", **quiet)


def test_changed_input_is_refused_and_named(data: Path, tmp_path: Path, quiet: Options) -> None:
    ds = hr.read_parquet(data)
    ds.write_parquet(tmp_path / "out", **quiet)
    pq.write_table(pq.read_table(data / "f0.parquet"), data / "f9.parquet")
    with pytest.raises(HeadraceError, match=r"f9\.parquet"):
        hr.read_parquet(data).write_parquet(tmp_path / "out", **quiet)


def test_changed_input_of_an_unfinished_run_is_refused(data: Path, tmp_path: Path, quiet: Options) -> None:
    marker = tmp_path / "marker"
    marker.touch()
    ds = hr.read_parquet(data).map(breaking_at(marker, 150))
    with pytest.raises(UserCodeError):
        ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    marker.unlink()
    pq.write_table(pq.read_table(data / "f1.parquet").slice(1), data / "f1.parquet")
    with pytest.raises(InputChanged, match=r"f1\.parquet"):
        ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    ds.write_parquet(tmp_path / "out", outputs="per_input", fresh=True, **quiet)
    assert len(rows_of(tmp_path / "out")) == 199


def test_fresh_destroys_nothing_before_the_new_output_is_complete(data: Path, tmp_path: Path, quiet: Options) -> None:
    marker = tmp_path / "marker"
    ds = hr.read_parquet(data).map(breaking_at(marker, 150))
    for how in ("packed", "per_input"):
        out = tmp_path / how
        ds.write_parquet(out, outputs=how, **quiet)
        old = rows_of(out)
        marker.touch()
        with pytest.raises(UserCodeError):
            ds.write_parquet(out, outputs=how, fresh=True, **quiet)
        assert (out / "_SUCCESS").exists()
        assert rows_of(out) == old
        assert hr.verify(str(out)).ok
        marker.unlink()
        run = ds.write_parquet(out, outputs=how, fresh=True, **quiet)
        assert not run.already_done
        assert rows_of(out) == old
        assert hr.verify(str(out)).ok
        assert json.loads((out / "_manifest.json").read_text())["generation"] == 1


@pytest.mark.parametrize("verb", ["write_csv", "write_json"])
def test_other_sinks_resume_too(data: Path, tmp_path: Path, quiet: Options, verb: str) -> None:
    marker = tmp_path / "marker"
    ds = hr.read_parquet(data).map(breaking_at(marker, 150)).select("id", "y")
    getattr(ds, verb)(tmp_path / "clean", outputs="per_input", **quiet)
    marker.touch()
    with pytest.raises(UserCodeError):
        getattr(ds, verb)(tmp_path / "out", outputs="per_input", **quiet)
    marker.unlink()
    getattr(ds, verb)(tmp_path / "out", outputs="per_input", **quiet)
    clean = {p.name: p.read_bytes() for p in (tmp_path / "clean").glob("f*")}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").glob("f*")} == clean
    assert len(clean) == 5


@pytest.mark.on_ray
def test_metrics_after_resumes_equal_those_of_one_run(data: Path, tmp_path: Path, quiet: Options) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    one, two = breaking_at(first, 70), breaking_at(second, 170)
    ds = (
        hr.read_parquet(data)
        .map(one)
        .map(two)
        .filter(lambda row: row["id"] % 7 != 0)
        .evaluate(n=hr.metrics.Count(), mean=hr.metrics.Mean("y"), auc=hr.metrics.AUCROC("x", "label"))
    )
    clean = ds.write_parquet(tmp_path / "clean", outputs="per_input", **quiet)
    first.touch()
    second.touch()
    for marker in (first, second):
        with pytest.raises(UserCodeError):
            ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
        marker.unlink()
    run = ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    assert dict(run.metrics) == dict(clean.metrics)
    assert run.tally == clean.tally
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "clean")


def test_limit_resumes_to_the_first_rows(data: Path, tmp_path: Path, quiet: Options) -> None:
    marker = tmp_path / "marker"
    ds = hr.read_parquet(data).map(breaking_at(marker, 90)).filter(pc.field("x") >= 5).limit(120)
    ds.write_parquet(tmp_path / "clean", outputs="per_input", **quiet)
    marker.touch()
    with pytest.raises(UserCodeError):
        ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    marker.unlink()
    ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "clean")
    assert [r["id"] for r in rows_of(tmp_path / "out")] == list(range(10, 130))


def test_flat_map_resumes(data: Path, tmp_path: Path, quiet: Options) -> None:
    marker = tmp_path / "marker"
    ds = (
        hr.read_parquet(data)
        .map(breaking_at(marker, 130))
        .flat_map(lambda r: [{"id": r["id"], "k": k} for k in range(r["id"] % 4)])
    )
    ds.write_parquet(tmp_path / "clean", outputs="per_input", **quiet)
    marker.touch()
    with pytest.raises(UserCodeError):
        ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    marker.unlink()
    run = ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "clean")
    assert run.tally.balanced


def test_why_leads_back_to_the_source(data: Path, tmp_path: Path, quiet: Options) -> None:
    ds = hr.read_parquet(data).filter(lambda row: row["id"] % 3 == 0).map(lambda row: {"id": row["id"], "y": row["x"]})
    ds.write_parquet(tmp_path / "out", **quiet)
    ids = read_back(tmp_path / "out")["id"].to_pylist()
    for row in (0, 17, len(ids) - 1):
        trace = hr.why(str(tmp_path / "out"), row)
        assert trace.source_uri.endswith(f"f{ids[row] // 40}.parquet")
        assert trace.source_row == ids[row] % 40
    with pytest.raises(HeadraceError):
        hr.why(str(tmp_path / "out"), len(ids))


def test_deterministic_runs_write_the_same_bytes(data: Path, tmp_path: Path) -> None:
    ds = hr.read_parquet(data).predict(lambda b: b["x"].cumsum() * 0 + b["x"], input=["x"], output="p")
    found: list[dict[str, bytes]] = []
    for i, (engine, cpus) in enumerate([("inline", 1), ("threads", 3), ("processes", 2)]):
        out = tmp_path / str(i)
        ds.write_parquet(out, engine=engine, cpus=cpus, deterministic=True, progress="quiet")
        found.append({p.name: p.read_bytes() for p in out.glob("part-*")})
    assert found[0] == found[1] == found[2]
    assert found[0]


def test_verify_finds_what_was_changed(data: Path, tmp_path: Path, quiet: Options) -> None:
    hr.read_parquet(data).write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    assert hr.verify(str(tmp_path / "out")).ok
    victim = tmp_path / "out" / "f2.parquet"
    content = victim.read_bytes()
    victim.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    report = hr.verify(str(tmp_path / "out"))
    assert not report.ok
    assert "f2.parquet" in str(report)
    victim.unlink()
    assert not hr.verify(str(tmp_path / "out")).ok


def test_only_whole_files_and_nothing_private_is_left(data: Path, tmp_path: Path, quiet: Options) -> None:
    hr.read_parquet(data).write_parquet(tmp_path / "out", **quiet)
    hr.read_parquet(data).write_parquet(tmp_path / "out", fresh=True, **quiet)
    hr.read_parquet(data).write_parquet(tmp_path / "out", take_over=True, **quiet)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_dir() and not any(p.iterdir())]
    left = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert not [name for name in left if name.startswith("_headrace/tmp")]
    assert not [name for name in left if "staging" in name]
    assert not [name for name in left if name.endswith(".tmp")]
    assert pa.concat_tables([pq.read_table(p) for p in sorted((tmp_path / "out").glob("part-*"))]).num_rows == 200


def test_files_of_others_stay(data: Path, tmp_path: Path, quiet: Options) -> None:
    out = tmp_path / "out"
    out.mkdir()
    pq.write_table(pa.table({"theirs": [1]}), out / "part-00-000000.parquet")
    theirs = (out / "part-00-000000.parquet").read_bytes()
    hr.read_parquet(data).write_parquet(out, **quiet)
    hr.read_parquet(data).limit(50).write_parquet(out, fresh=True, **quiet)
    assert (out / "part-00-000000.parquet").read_bytes() == theirs
    assert sorted(p.name for p in out.glob("part-*")) == ["part-00-000000.parquet", "part-02-000000.parquet"]


def test_a_finished_run_whose_files_are_gone_says_so(data: Path, tmp_path: Path, quiet: Options) -> None:
    hr.read_parquet(data).write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    (tmp_path / "out" / "f2.parquet").unlink()
    with pytest.raises(DestinationError, match=r"f2\.parquet"):
        hr.read_parquet(data).write_parquet(tmp_path / "out", outputs="per_input", **quiet)


def test_a_failed_run_may_go_on_setting_rows_aside(data: Path, tmp_path: Path, quiet: Options) -> None:
    def fussy(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == 150:
            raise ValueError("never")
        return row

    ds = hr.read_parquet(data).map(fussy)
    with pytest.raises(UserCodeError):
        ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    run = ds.write_parquet(tmp_path / "out", outputs="per_input", on_error="quarantine", **quiet)
    assert read_back(tmp_path / "out")["id"].to_pylist() == [i for i in range(200) if i != 150]
    assert run.tally.quarantined == 1


def test_an_append_that_lands_when_the_session_is_over(
    data: Path, tmp_path: Path, quiet: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a put to a slow store may: what it names must still be there for the next session."""
    marker, out = tmp_path / "marker", tmp_path / "out"
    marker.touch()
    over, landed = threading.Event(), threading.Event()
    create = LocalRunStore.create

    def slow(store: LocalRunStore, name: str, content: bytes, folders: Sequence[str] = ()) -> bool:
        late = b'"settled"' in content and not over.is_set()
        if late:
            over.wait()
        done = create(store, name, content, folders)
        if late:
            landed.set()
        return done

    monkeypatch.setattr(LocalRunStore, "create", slow)
    monkeypatch.setattr("headrace.runtime.committer.CLOSE_S", 1.5)
    monkeypatch.setattr("headrace.runtime.ledger.WATCH_S", 1)
    ds = hr.read_parquet(data).map(breaking_at(marker, 199))
    monkeypatch.setattr("headrace.commit.protocol.GROUP_SPLITS", 1)
    with pytest.raises(UserCodeError):
        ds.write_parquet(out, outputs="per_input", **quiet)
    over.set()
    assert landed.wait(10)
    marker.unlink()
    ds.write_parquet(out, outputs="per_input", **quiet)
    assert rows_of(out) == [{**row, "y": row["x"] * 2} for row in read_back(data).to_pylist()]


def test_a_function_that_failed_at_once_may_be_mended(data: Path, tmp_path: Path) -> None:
    def work(row: dict[str, Any]) -> dict[str, Any]:
        raise ValueError("not yet")

    ds = hr.read_parquet(data)
    with pytest.raises(hr.UserCodeError):
        ds.map(work).write_parquet(tmp_path / "out", progress="quiet")
    run = ds.map(lambda row: {"id": row["id"]}).write_parquet(tmp_path / "out", progress="quiet")
    assert run.rows == 200
    assert read_back(tmp_path / "out")["id"].to_pylist() == list(range(200))
    assert hr.verify(str(tmp_path / "out")).ok


def test_a_stop_while_the_functions_are_tried_is_no_death(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = hr.read_parquet(data).map(lambda row: {"id": row["id"]})

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("headrace.api.session.choose", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ds.write_parquet(tmp_path / "out", progress="quiet")
    run = ds.write_parquet(tmp_path / "out", progress="quiet")  # waits for nobody's heartbeat
    assert (run.sessions, run.engine, run.rows) == (2, "threads", 200)


def test_the_functions_of_a_finished_run_are_not_called(data: Path, tmp_path: Path) -> None:
    marker = str(tmp_path / "calls")

    def work(row: dict[str, Any]) -> dict[str, Any]:
        with open(marker, "a") as file:
            file.write(".")
        return {"id": row["id"]}

    ds = hr.read_parquet(data).map(work)
    ds.write_parquet(tmp_path / "out", progress="quiet")
    os.unlink(marker)
    assert ds.write_parquet(tmp_path / "out", progress="quiet").already_done
    assert not os.path.exists(marker)


def test_fresh_goes_past_an_unfinished_fresh_run_whose_input_has_changed(data: Path, tmp_path: Path, quiet: Options) -> None:
    marker, out = tmp_path / "marker", tmp_path / "out"
    ds = hr.read_parquet(data).map(breaking_at(marker, 150))
    marker.touch()
    with pytest.raises(UserCodeError):
        ds.write_parquet(out, outputs="per_input", fresh=True, **quiet)
    marker.unlink()
    pq.write_table(pq.read_table(data / "f0.parquet").slice(0, 3), data / "f00.parquet")
    run = ds.write_parquet(out, outputs="per_input", fresh=True, **quiet)
    assert run.rows == 203
    assert len(rows_of(out)) == 203
    assert hr.verify(str(out)).ok


def test_fresh_goes_past_a_finished_run_that_was_never_shown(data: Path, tmp_path: Path, quiet: Options) -> None:
    out = tmp_path / "out"
    hr.read_parquet(data).write_parquet(out, fresh=True, **quiet)
    (out / "_headrace" / "run-00000" / "complete").unlink()
    (data / "f4.parquet").unlink()
    run = hr.read_parquet(data).write_parquet(out, fresh=True, **quiet)
    assert run.rows == 160
    assert [row["id"] for row in rows_of(out)] == list(range(160))


def test_a_held_output_that_is_gone_is_made_again(data: Path, tmp_path: Path, quiet: Options) -> None:
    marker, out = tmp_path / "marker", tmp_path / "out"
    hr.read_parquet(data).write_parquet(out, outputs="per_input", **quiet)
    ds = hr.read_parquet(data).map(breaking_at(marker, 190))
    marker.touch()
    with pytest.raises(UserCodeError):
        ds.write_parquet(out, outputs="per_input", fresh=True, **quiet)
    marker.unlink()
    for file in (out / "_headrace" / "run-00001" / "staging").rglob("*.parquet"):
        file.unlink()
    ds.write_parquet(out, outputs="per_input", fresh=True, **quiet)
    assert [row["y"] for row in rows_of(out)] == [row["x"] * 2 for row in rows_of(data)]
    assert hr.verify(str(out)).ok


def test_fresh_makes_outputs_again_that_were_removed_before_they_were_shown(data: Path, tmp_path: Path, quiet: Options) -> None:
    out = tmp_path / "out"
    hr.read_parquet(data).write_parquet(out, fresh=True, outputs="per_input", **quiet)
    (out / "_headrace" / "run-00000" / "complete").unlink()
    (out / "f2.parquet").unlink()
    hr.read_parquet(data).write_parquet(out, fresh=True, outputs="per_input", **quiet)
    assert [row["id"] for row in rows_of(out)] == list(range(200))


@pytest.mark.parametrize("damage", ["garbage", "missing"])
def test_fresh_goes_past_a_damaged_listing(tmp_path: Path, engine: str, damage: str) -> None:
    source, out, marker = tmp_path / "in", tmp_path / "out", tmp_path / "marker"
    source.mkdir()
    for i in range(300):
        (source / f"{i:03d}-{os.urandom(16).hex()}.jsonl").write_text(f'{{"id": {i}, "x": 1}}\n')
    ds = hr.read_json(source).map(breaking_at(marker, 290))
    options: Options = {"fresh": True, "outputs": "per_input", "progress": "quiet", "engine": engine}
    marker.touch()
    with pytest.raises(UserCodeError):
        ds.write_json(out, **options)
    marker.unlink()
    chunks = list((out / "_headrace" / "run-00000" / "listing").iterdir())
    assert chunks
    for chunk in chunks:
        chunk.unlink() if damage == "missing" else chunk.write_bytes(b"garbage")
    assert ds.write_json(out, **options).rows == 300


@pytest.mark.parametrize("damage", ["garbage", "gap"])
def test_fresh_goes_past_a_damaged_log(data: Path, tmp_path: Path, quiet: Options, damage: str) -> None:
    marker, out = tmp_path / "marker", tmp_path / "out"
    ds = hr.read_parquet(data).map(breaking_at(marker, 150))
    marker.touch()
    with pytest.raises(UserCodeError):
        ds.write_parquet(out, **quiet)
    marker.unlink()
    log = out / "_headrace" / "run-00000" / "log"
    segments = sorted(log.iterdir())
    if damage == "garbage":
        segments[-1].write_bytes(b"garbage")
    else:
        segments[0].unlink()
    (out / "_headrace" / "run-00000" / "heartbeat.json").unlink(missing_ok=True)
    (out / "part-00-000009.parquet").write_bytes((data / "f0.parquet").read_bytes())  # published, and not known any more
    with pytest.raises(DestinationError, match="run log"):
        ds.write_parquet(out, **quiet)
    ds.write_parquet(out, fresh=True, **quiet)
    assert [row["id"] for row in rows_of(out)] == list(range(200))
    assert hr.verify(str(out)).ok


def test_a_destination_that_is_removed_at_work_can_be_used_again(data: Path, tmp_path: Path, quiet: Options) -> None:
    marker, out = tmp_path / "marker", tmp_path / "out"
    place, path = str(out), str(marker)

    def score(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == 150 and os.path.exists(path):
            shutil.rmtree(place)
            os.unlink(path)
        return row

    marker.touch()
    ds = hr.read_parquet(data).map(score)
    with contextlib.suppress(HeadraceError):  # a split may be written whole before it is looked for
        ds.write_parquet(out, **quiet)
    assert not marker.exists()
    assert ds.write_parquet(out, **quiet).rows == 200
    assert [row["id"] for row in rows_of(out)] == list(range(200))
    assert hr.verify(str(out)).ok
