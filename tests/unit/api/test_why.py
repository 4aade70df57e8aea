"""why(): from a row of the output back to its source, out of records written as a run writes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.api.why import Place, why
from headrace.commit.names import log_name, plan_name
from headrace.commit.records import Claim, Finished, Listed, Record, Segment, Settled, encode
from headrace.connectors.run_store import LocalRunStore
from headrace.core.errors import DestinationError, PlanError
from headrace.core.receipts import LineageRun, OutputFile, Tally

RUN = "run-00000"
NONCE = "n"


class Written:
    """A destination of three splits: 4 rows one to one, 2 rows from among 10, and 3 rows whose lineage is a file."""

    def __init__(self, root: Path, *, finished: bool = True, run: str = RUN, part: str = "part-00") -> None:
        self.root = root
        self.run = run
        self.store = LocalRunStore(str(root))
        self.index = 0
        plan = {
            "steps": [
                {"kind": "predict", "name": "predict(Churn)", "function": {"(class)": "Churn", "version": "7"}, "digest": "d"}
            ]
        }
        body = {"version": 1, "fresh": False, "holds": False, "replaces": "", "plan": plan}
        self.store.create(plan_name(run), json.dumps(body).encode())
        self.log(Claim(1, NONCE, "host", 1, 0.0, 1_600_000_000.0))
        self.log(Listed(0, 3, "0" * 64, True))
        one = self.file(f"{part}-000000.parquet", 4)
        self.settle(0, (one,), 4, lineage=(LineageRun(0, 3, "/in/a.csv", 5, 3), LineageRun(3, 1, "/in/b.csv", 0, 1)))
        two = self.file(f"{part}-000001.parquet", 2)
        self.settle(1, (two,), 2, lineage=(LineageRun(0, 2, "/in/b.csv", 1, 10),), attempt=2)
        three = self.file(f"{part}-000002.parquet", 3)
        runs = {"row": [0, 1], "rows": [1, 2], "uri": ["/in/c.csv", "/in/c.csv"], "source_row": [8, 3], "source_rows": [1, 1]}
        lineage = self.table(f"_headrace/{run}/lineage/000002.parquet", {**runs, "exact": [True, True]}, "lineage")
        aside = self.table(f"_headrace/{run}/quarantine/000002-0000.parquet", QUARANTINE, "quarantine")
        self.settle(2, (three, lineage, aside), 3)
        if finished:
            self.log(Finished({}))

    def log(self, record: Record) -> None:
        data = encode(Segment(self.index, 1, NONCE, (record,), {}))
        assert self.store.create(log_name(self.run, self.index), data)
        self.index += 1

    def settle(self, split: int, files: tuple[OutputFile, ...], rows: int, **more: Any) -> None:
        record = {"attempt": 0, **more}
        self.log(Settled(split, "id", tally=Tally(rows, written=rows), files=files, rows=rows, **record))

    def file(self, name: str, rows: int) -> OutputFile:
        self.store.write(name, b"x")
        return OutputFile(name, rows, 1, hashlib.sha256(b"x").hexdigest())

    def table(self, name: str, columns: dict[str, Any], kind: Any) -> OutputFile:
        sink = pa.BufferOutputStream()
        table = pa.table(columns)
        pq.write_table(table, sink)
        data = sink.getvalue().to_pybytes()
        self.store.write(name, data)
        return OutputFile(name, table.num_rows, len(data), hashlib.sha256(data).hexdigest(), kind=kind)


QUARANTINE = {
    "text": ["bad", "worse"],
    "_stage": ["a user's column", "of that name"],
    "_source_uri": ["/in/c.csv", "/in/c.csv"],
    "_source_row": pa.array([4, None], pa.int64()),
    "_rows": [1, 1],
    "_stage_": ["map(f)", "map(f)"],
    "_exception": ["ValueError: no", "KeyError: 'x'"],
    "_traceback": ["  File job.py, line 3\n", ""],
    "_attempt": [1, 1],
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    Written(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("row", "file", "place"),
    [
        (0, 0, Place("/in/a.csv", 5)),
        (2, 0, Place("/in/a.csv", 7)),
        (3, 0, Place("/in/b.csv", 0)),
        (5, 1, Place("/in/b.csv", 1, 10, False)),
        (6, 2, Place("/in/c.csv", 8)),
        (8, 2, Place("/in/c.csv", 3)),
    ],
)
def test_rows_count_over_the_whole_output(out: Path, row: int, file: int, place: Place) -> None:
    found = why(str(out), row)
    assert found.file == f"part-00-{file:06d}.parquet"
    assert found.sources == (place,)
    assert (found.run, found.split, found.session, found.session_began_s) == (RUN, file, 1, 1_600_000_000.0)
    assert found.models == {"predict(Churn)": "version 7"}


def test_a_row_of_a_file_is_found_by_path_and_by_name(out: Path) -> None:
    by_path = why(str(out / "part-00-000001.parquet"), 1)
    assert by_path == why(str(out), 1, file="part-00-000001.parquet") == why(out, 5)
    assert by_path.attempt == 2
    text = str(by_path)
    assert "from: among rows 1-10 of /in/b.csv" in text
    assert "model: predict(Churn): version 7" in text
    assert "run-00000, split 1, attempt 2, session 1" in text


def test_a_whole_file(out: Path) -> None:
    found = why(out / "part-00-000000.parquet")
    assert found.row is None
    assert found.sources == (Place("/in/a.csv", 5, 3), Place("/in/b.csv", 0))


def test_rows_that_were_set_aside(out: Path) -> None:
    found = why(out, 0, quarantined=True)
    assert found.sources == (Place("/in/c.csv", 4),)
    assert (found.stage, found.exception, found.attempt) == ("map(f)", "ValueError: no", 1)
    assert "File job.py, line 3" in str(found)
    by_path = why(out / "_headrace" / RUN / "quarantine" / "000002-0000.parquet", 1)
    assert by_path.exception == "KeyError: 'x'"
    assert str(by_path.sources[0]) == "/in/c.csv"


def test_an_unfinished_run_tells_of_what_is_committed(tmp_path: Path) -> None:
    Written(tmp_path / "out", finished=False)
    found = why(tmp_path / "out", 0)
    assert "not finished" in found.note
    with pytest.raises(PlanError, match="so far"):
        why(tmp_path / "out", 9)


def test_a_generation_is_found_by_its_file_and_by_the_manifest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = Written(out)
    Written(out, run="run-00001", part="part-01")
    assert why(out, 0).run == "run-00001"
    assert why(out / "part-00-000000.parquet", 0).run == RUN
    old.store.write("_manifest.json", json.dumps({"run": RUN}).encode())
    assert why(out, 0).run == RUN


def test_wrong_questions(out: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is no row 9: there are 9 rows"):
        why(out, 9)
    with pytest.raises(PlanError, match="there are 4 rows in part-00-000000"):
        why(out / "part-00-000000.parquet", 4)
    with pytest.raises(PlanError, match="row is -1"):
        why(out, -1)
    with pytest.raises(PlanError, match="which row"):
        why(out)
    with pytest.raises(DestinationError, match="is not a file that a run has committed"):
        why(out / "part-00-000009.parquet", 0)
    with pytest.raises(DestinationError, match="no output of Headrace"):
        why(tmp_path / "elsewhere", 0)
    with pytest.raises(DestinationError):
        why(out, 0, file="../../etc/passwd")


def _overwrite(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda out: (out / name).write_bytes(data) and None


def _link(name: str) -> Callable[[Path], None]:
    def replace(out: Path) -> None:
        target = out.parent / "elsewhere"
        target.write_bytes((out / name).read_bytes())
        (out / name).unlink()
        os.symlink(target, out / name)

    return replace


FILE = {"name": "../x", "rows": 9, "bytes": 1, "digest": ""}
SETTLED = {"kind": "settled", "split": 0, "id": "i", "attempt": 0, "rows": 9, "tally": {}, "files": [FILE]}
EVIL = json.dumps({"version": 1, "index": 2, "epoch": 1, "nonce": NONCE, "records": [SETTLED]}).encode()


@pytest.mark.parametrize(
    "harm",
    [
        _overwrite(log_name(RUN, 2), b"\x80\x04cos\nsystem\n"),
        _overwrite(log_name(RUN, 2), EVIL),
        _overwrite(log_name(RUN, 2), b"[" * 100_000),
        _overwrite(f"_headrace/{RUN}/lineage/000002.parquet", b"PAR1"),
        _link(log_name(RUN, 1)),
        _link(f"_headrace/{RUN}/lineage/000002.parquet"),
    ],
)
def test_damaged_records_are_refused(out: Path, harm: Callable[[Path], None]) -> None:
    harm(out)
    with pytest.raises(DestinationError):
        why(out, 7)


@pytest.mark.parametrize(
    "plan", [b"", b"3", b'{"plan": 3}', b'{"plan": {"steps": [3, {"kind": "predict", "code": []}]}}', b"["]
)
def test_a_damaged_plan_only_hides_the_models(out: Path, plan: bytes) -> None:
    (out / plan_name(RUN)).write_bytes(plan)
    assert why(out, 0).sources == (Place("/in/a.csv", 5),)


def test_a_terminal_is_not_at_the_mercy_of_what_is_shown(tmp_path: Path) -> None:
    made = Written(tmp_path / "out", finished=False)
    made.settle(
        3, (made.file("part-00-000003.parquet", 1),), 1, lineage=(LineageRun(0, 1, "s3://u:hunter2@b/\x1b[2J\nx", 0, 1),)
    )
    text = str(why(tmp_path / "out" / "part-00-000003.parquet", 0))
    assert "\x1b" not in text
    assert "hunter2" not in text


def test_one_of_several_places_is_not_exact(tmp_path: Path) -> None:
    written = Written(tmp_path / "out", finished=False)
    places = tuple(LineageRun(0, 2, uri, 4, 1, exact=False) for uri in ("/in/a.csv", "/in/b.csv"))
    written.settle(3, (written.file("part-00-000003.parquet", 2),), 2, lineage=places)
    found = why(tmp_path / "out" / "part-00-000003.parquet", 1)
    assert found.sources == (Place("/in/a.csv", 4, 1, False), Place("/in/b.csv", 4, 1, False))
    assert (found.source_uri, found.source_row) == (None, None)
