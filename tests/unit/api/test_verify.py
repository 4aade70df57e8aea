"""verify: every kind of damage is told, nothing that lies in a destination is trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from headrace.api.verify import verify
from headrace.connectors.sinks import inspect
from headrace.connectors.sinks.csv import CsvSink
from headrace.connectors.sinks.json import JsonSink
from headrace.connectors.sinks.parquet import ParquetSink
from headrace.core.errors import DestinationError
from headrace.testing.check_sink import Session, a_batch, a_split


@pytest.fixture(scope="session", autouse=True)
def arrow_signal_pipe() -> None:
    """Arrow's CSV reader opens a pipe for Ctrl-C at its first use and keeps it for the life of the process."""
    pyarrow.csv.read_csv(pa.BufferReader(b"a\n1\n"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished destination of three files, ten rows each."""
    session = Session(ParquetSink(tmp_path))
    for i in range(3):
        session.write(a_split(i), [a_batch(i * 10, 10)])
    session.finish()
    return tmp_path


@pytest.mark.parametrize("sink", [ParquetSink, CsvSink, JsonSink])
@pytest.mark.parametrize("outputs", ["packed", "per_input"])
def test_what_is_whole_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink: Any, outputs: str) -> None:
    session = Session(sink(tmp_path, outputs=outputs))
    for i in range(3):
        session.write(a_split(i, f"d/{i}.x"), [a_batch(i * 10, 10 * i)] if i else [])
    running = verify(tmp_path)
    assert running.ok, running
    assert not running.finished
    assert "unfinished: 3 splits committed" in str(running)
    session.finish()
    for whole in (1 << 20, 0):
        monkeypatch.setattr(inspect, "WHOLE_BYTES", whole)
        report = verify(str(tmp_path))
        assert report.ok, report
        assert (report.finished, report.rows, report.splits, report.tally.written) == (True, 30, 3, 30)
        assert "ok" in str(report)


def test_one_column_with_nulls_in_csv(tmp_path: Path) -> None:
    session = Session(CsvSink(tmp_path), schema=None)
    session.write(a_split(0), [pa.record_batch({"x": pa.array([1, None, 3, None])})])
    session.write(a_split(1), [pa.record_batch({"x": pa.array(["a\nb", None, "", "c"])})])
    session.finish()
    report = verify(tmp_path)
    assert report.ok, report
    assert report.rows == 8


def test_nothing_to_verify(tmp_path: Path) -> None:
    (tmp_path / "mine.parquet").write_bytes(b"x")
    with pytest.raises(DestinationError, match="nothing to verify"):
        verify(tmp_path)
    with pytest.raises(DestinationError, match="nothing to verify"):
        verify(tmp_path / "nowhere")


def _replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    _replace(path, bytes(data))


def _rewrite(path: Path) -> None:
    table = pq.read_table(path)
    path.unlink()
    pq.write_table(table.slice(1), path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: (p / "part-00-000001.parquet").unlink(), "part-00-000001.parquet: it is missing"),
    "cut": (lambda p: _replace(p / "part-00-000001.parquet", b"PAR1"), "4 bytes, not"),
    "flipped": (lambda p: _flip(p / "part-00-000001.parquet"), "not those that were written"),
    "rewritten": (lambda p: _rewrite(p / "part-00-000001.parquet"), "9 rows, not 10"),
    "added": (lambda p: (p / "part-00-000007.parquet").write_bytes(b""), "part-00-000007.parquet: it is not in the manifest"),
    "foreign": (lambda p: (p / "other.csv").write_bytes(b""), "other.csv: it is not in the manifest"),
    "no success": (lambda p: (p / "_SUCCESS").unlink(), "no _SUCCESS"),
    "log gone": (lambda p: next(p.glob("_headrace/*/log/*2.json")).unlink(), "missing"),
    "log torn": (lambda p: _replace(next(p.glob("_headrace/*/log/*2.json")), b'{"version"'), "can't be used"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told(out: Path, damage: str) -> None:
    act, told = DAMAGE[damage]
    act(out)
    report = verify(out)
    assert not report.ok
    assert any(told in problem for problem in report.problems), report


def _manifest(out: Path, **changes: Any) -> None:
    path = out / "_manifest.json"
    _replace(path, json.dumps({**json.loads(path.read_text()), **changes}).encode())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rows": 31}, "says 31 rows, its files have 30"),
        ({"rows": "x" * 10_000}, "..."),
        ({"tally": {"rows_in": 31, "written": 30}}, "rows are missing"),
        ({"tally": {"rows_in": 20, "written": 20}}, "20 rows were written, the files have 30"),
        ({"tally": {"rows_in": -1}}, "no row counts"),
        ({"tally": [1]}, "no row counts"),
        ({"files": 7}, "'files' is no list"),
        ({"files": [7, None, [], {"name": 3}]}, "lists 7 as a file"),
        ({"files": [{"name": "../../etc/passwd", "rows": 1, "bytes": 1, "digest": ""}]}, "outside of the destination"),
        ({"files": [{"name": "/etc/passwd", "rows": 1, "bytes": 1, "digest": ""}]}, "outside of the destination"),
        ({"quarantine": [{"name": "_headrace/../../x", "rows": 1, "bytes": 1, "digest": ""}]}, "outside of the destination"),
        ({"files": [{"name": "a\x1b[31m.csv", "rows": 1, "bytes": 1, "digest": ""}]}, "outside of the destination"),
        ({"run": "../run-00000"}, "names no run"),
        ({"run": {"a": 1}}, "names no run"),
        ({"version": True}, "version is True"),
        ({"version": 99}, "version is 99"),
        ({"schema": "x: int64"}, "the manifest says ['x: int64']"),
    ],
)
def test_a_poisoned_manifest_is_a_problem(out: Path, changes: dict[str, Any], told: str) -> None:
    _manifest(out, **changes)
    report = verify(out)
    assert any(told in problem for problem in report.problems), report
    assert "\x1b" not in str(report)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b'"x"', b"{" + b'"a":{' * 100_000, b"1e999"])
def test_a_manifest_that_is_none(out: Path, data: bytes) -> None:
    _replace(out / "_manifest.json", data)
    report = verify(out)
    assert not report.ok
    assert "_manifest.json can't be read" in report.problems[0]
    assert report.rows == 30, "the log still tells what there should be"


def test_a_link_out_of_the_destination_is_not_followed(out: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    os.symlink(elsewhere, out / "sub")
    _manifest(out, files=[{"name": "sub/x.parquet", "rows": 1, "bytes": 1, "digest": ""}])
    assert any("leads out" in problem for problem in verify(out).problems)


def test_log_and_manifest_must_agree(out: Path) -> None:
    body = json.loads((out / "_manifest.json").read_text())
    (out / "part-00-000001.parquet").unlink()
    _manifest(out, files=[f for f in body["files"] if "000001" not in f["name"]], rows=20)
    assert any("the log holds it, the manifest does not" in p for p in verify(out).problems)


def test_a_later_run_under_way_is_noted(out: Path) -> None:
    fresh = Session(ParquetSink(out, fresh=True), 1, holds=True)
    fresh.write(a_split(0), [a_batch(0, 1)])
    report = verify(out)
    assert report.ok, report
    assert report.notes == ("run-00001 is to replace it, and is unfinished: 1 splits committed",)


def test_a_staged_file_of_an_unfinished_run_is_read_where_it_is(tmp_path: Path) -> None:
    session = Session(ParquetSink(tmp_path))
    receipt = session.stage(a_split(0), [a_batch(0, 10)])
    session.log(receipt)
    assert verify(tmp_path).ok
    (tmp_path / receipt.outputs[0].staged).unlink()
    assert "it is missing" in verify(tmp_path).problems[0]
