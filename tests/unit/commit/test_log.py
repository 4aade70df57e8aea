"""What a log segment may say, and what a log amounts to."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from mmap import mmap
from typing import Any
from unittest.mock import patch

import pytest
from msgspec.structs import replace

from headrace.commit import table as splits_table
from headrace.commit.names import check_file
from headrace.commit.records import (
    Claim,
    Finished,
    Listed,
    Record,
    Released,
    Replaced,
    Segment,
    Settled,
    decode,
    encode,
)
from headrace.commit.state import LogState
from headrace.commit.table import BLOCK_SPLITS, MemorySpool, SplitTable, Spool
from headrace.core.errors import DestinationError, InternalError
from headrace.core.receipts import LineageRun, OutputFile, Tally

RUN = "run-00000"
FILE = OutputFile("part-00-000003.parquet", 5, 99, "ab" * 32, f"_headrace/{RUN}/staging/1/000003-0.parquet")
CLAIM = Claim(1, "n1", "host", 7, 1.5, 2.5)
SETTLED = Settled(3, "id", 1, Tally(rows_in=5, written=5), (FILE,), 5, ((2, 4),), (LineageRun(0, 5, "a.parquet", 0, 5),))
RECORDS: tuple[Record, ...] = (
    CLAIM,
    Listed(0, 10, "d", False),
    SETTLED,
    Replaced("run-00001"),
    Finished({"x": [1]}),
    Released(),
)


def segment(index: int, *records: Record, epoch: int = 1, nonce: str = "n1", **metrics: Any) -> Segment:
    return Segment(index, epoch, nonce, records, metrics)


def test_what_is_written_is_read_back() -> None:
    written = segment(4, *RECORDS, rows={"sum": 1})
    assert decode(RUN, 4, encode(written)) == written
    with_chunk = segment(4, Listed(0, 2, "d", True, b"\x1f\x8b\0 any bytes"))
    assert decode(RUN, 4, encode(with_chunk)) == with_chunk


def test_only_what_earlier_versions_can_not_read_is_of_the_later_one() -> None:
    plain, with_chunk = (json.loads(encode(segment(0, Listed(0, 2, "d", True, chunk)))) for chunk in (b"", b"x"))
    assert (plain["version"], with_chunk["version"]) == (1, 2)
    with_chunk["records"][0]["chunk"] = "no base64!"
    with pytest.raises(DestinationError, match="run log"):
        decode(RUN, 0, json.dumps(with_chunk).encode())


def changed(**values: Any) -> bytes:
    """A good segment with its settled record's values changed."""
    body = json.loads(encode(segment(0, SETTLED)))
    body["records"][0].update(values)
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"version":1}',
        changed(split=-1),
        changed(split=1.0),
        changed(split=True),
        changed(split="3"),
        changed(tally={"rows_in": -1}),
        changed(tally={"loot": 1}),
        changed(kind="exec"),
        changed(files=[{"name": "x", "rows": 1, "bytes": 1, "digest": "zz"}]),
        changed(files=[{"name": "x", "rows": 1, "bytes": 1, "digest": "", "kind": "program"}]),
        changed(taken=[[1]]),
        changed(lineage=[[0, 5, 7, 0, 5]]),
    ],
)
def test_damaged_segments_are_refused(data: bytes) -> None:
    with pytest.raises(DestinationError, match="run log"):
        decode(RUN, 0, data)


def test_a_newer_version_is_refused_as_such() -> None:
    body = json.loads(encode(segment(0, CLAIM)))
    with pytest.raises(DestinationError, match="newer version"):
        decode(RUN, 0, json.dumps({**body, "version": 4}).encode())


def test_a_segment_in_another_place_is_refused() -> None:
    with pytest.raises(DestinationError, match="number 4"):
        decode(RUN, 5, encode(segment(4, CLAIM)))


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a\0b", "a\nb", "_headrace/x", "_SUCCESS", "_manifest.json", "a/"],
)
def test_names_that_leave_the_root_or_are_the_runs_own(name: str) -> None:
    with pytest.raises(DestinationError):
        check_file(RUN, replace(FILE, name=name))
    with pytest.raises(DestinationError):
        decode(RUN, 0, changed(files=[{"name": name, "rows": 1, "bytes": 1, "digest": ""}]))


@pytest.mark.parametrize("staged", ["x", "../x", f"_headrace/{RUN}/log/0", f"_headrace/{RUN}/staging/../../../x"])
def test_staged_names_stay_in_staging(staged: str) -> None:
    with pytest.raises(DestinationError):
        check_file(RUN, replace(FILE, staged=staged))


def test_files_set_aside_stay_with_their_run() -> None:
    check_file(RUN, replace(FILE, name=f"_headrace/{RUN}/quarantine/000003-0000.parquet", kind="quarantine"))
    with pytest.raises(DestinationError):
        check_file(RUN, replace(FILE, name="_headrace/run-00001/quarantine/000003-0000.parquet", kind="quarantine"))
    with pytest.raises(DestinationError):
        check_file(RUN, replace(FILE, kind="lineage"))


def state(*segments: Segment) -> LogState:
    found = LogState(RUN)
    for one in segments:
        found.apply(one)
    return found


def test_a_log_amounts_to() -> None:
    later = replace(CLAIM, epoch=2, nonce="n2")
    log = state(
        segment(0, CLAIM),
        segment(1, Listed(0, 10, "d", False), SETTLED, rows={"sum": 5}),
        segment(2, Released()),
        segment(3, later, epoch=2, nonce="n2"),
        segment(4, Finished({"rows": 5}), epoch=2, nonce="n2"),
    )
    assert (log.next, log.epoch, log.owner, log.released, log.listed) == (5, 2, later, False, 10)
    assert log.finished == {"rows": 5}
    assert (len(log.settled), log.tally, log.rows, log.deltas) == (1, SETTLED.tally, 5, [{"rows": {"sum": 5}}])
    assert 3 in log.settled
    assert 2 not in log.settled
    assert list(log.settled.files) == [FILE]
    assert log.settled.taken(3) == ((2, 4),)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (segment(3, Released()), "segment 2 is missing"),
        (segment(2, Released(), nonce="n2"), "no right to write"),
        (segment(2, replace(CLAIM, epoch=3), epoch=3), "no right to write"),
        (segment(2, CLAIM), "no right to write"),
        (segment(2, Released(), replace(CLAIM, epoch=2), epoch=2), "no right to write"),
        (segment(2, replace(SETTLED, split=10)), "never listed"),
        (segment(2, Listed(9, 1, "d", False)), "begins at split 9"),
        (segment(2, SETTLED, rows={"sum": 5}), "settled before"),
    ],
)
def test_segments_that_cant_follow(bad: Segment, why: str) -> None:
    log = state(segment(0, CLAIM), segment(1, Listed(0, 10, "d", False), SETTLED))
    with pytest.raises(DestinationError, match=why):
        log.apply(bad)


def test_the_first_record_of_a_split_wins() -> None:
    log = state(segment(0, CLAIM), segment(1, Listed(0, 10, "d", False), SETTLED))
    log.apply(segment(2, replace(SETTLED, attempt=9, rows=7, tally=Tally(rows_in=7, written=7), files=())))
    assert (log.rows, log.tally.rows_in, list(log.settled.files)) == (5, 5, [FILE])


def test_nobody_writes_behind_a_replaced_run() -> None:
    log = state(segment(0, CLAIM, Replaced("run-00001")))
    with pytest.raises(DestinationError, match="no right"):
        log.apply(segment(1, replace(CLAIM, epoch=2, nonce="n2"), epoch=2, nonce="n2"))


# ---------------------------------------------------------------- the table


def test_the_table_gives_back_what_it_was_given() -> None:
    table = SplitTable()
    given = {
        7: ((FILE, OutputFile("a/000007/b-000007.csv", 1 << 40, 1 << 50)), ((0, 0), (200, 300))),
        0: ((), ()),
        1_234_567: ((OutputFile("x-1234567.parquet", 0, 0, "0" * 64, "_headrace/s-1234567", "lineage"),), ()),
        2: ((OutputFile("Ünï/日本.jsonl", 3, 4),), ((1, 2),)),
    }
    for split, (files, taken) in given.items():
        assert table.add(split, files, taken)
        assert not table.add(split, (), ())
    for split, (files, taken) in given.items():
        assert table.files_of(split) == files
        assert table.taken(split) == taken
    assert len(table) == 4
    assert list(table.splits()) == sorted(given)
    in_order = [f for split in sorted(given) for f in given[split][0]]
    assert list(table.files) == in_order
    assert len(table.files) == 4
    assert table.files[-1] == in_order[-1]
    assert table.files[1:3] == in_order[1:3]
    with pytest.raises(IndexError):
        table.files[4]


def output(split: int) -> OutputFile:
    staged = f"_headrace/{RUN}/staging/1/{split:06d}-0.parquet"
    return replace(FILE, name=f"part-00-{split:06d}.parquet", staged=staged)


class ElsewhereSpool:
    """Keeps its bytes where the memory of a test does not count: as a file would."""

    def __init__(self) -> None:
        self._pieces = mmap(-1, 16 << 20)
        self._size = 0

    def append(self, data: bytes) -> int:
        at, self._size = self._size, self._size + len(data)
        self._pieces[at : self._size] = data
        return at

    def read(self, start: int, size: int) -> bytes:
        return self._pieces[start : min(start + size, self._size)]


@pytest.mark.parametrize(("spool", "most"), [(MemorySpool, 90), (ElsewhereSpool, 6)])
def test_ten_million_splits_fit(spool: Callable[[], Spool], most: float) -> None:
    """A small part of them, measured. The last block has a gap: 32 KB."""
    count = 4 * BLOCK_SPLITS - 1
    table = SplitTable(spool())
    tracemalloc.start()
    try:
        for split in range(count):
            table.add(split, (output(split),), ())
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert used / count < most


def test_a_whole_block_is_as_one_with_gaps() -> None:
    table = SplitTable()
    order = [*range(2 * BLOCK_SPLITS, 0, -1), *range(3 * BLOCK_SPLITS, 3 * BLOCK_SPLITS + 3)]  # the first block lacks split 0
    for split in order:
        assert split not in table
        assert table.add(split, (output(split),), ((1, split),) if split % 5 == 0 else ())
        assert split in table
        assert not table.add(split, (), ())
    for split in (1, BLOCK_SPLITS - 1, BLOCK_SPLITS, 2 * BLOCK_SPLITS - 1, 2 * BLOCK_SPLITS, 3 * BLOCK_SPLITS + 2):
        assert table.files_of(split) == (output(split),)
        assert table.taken(split) == (((1, split),) if split % 5 == 0 else ())
    for split in (0, 2 * BLOCK_SPLITS + 1, 3 * BLOCK_SPLITS - 1, 3 * BLOCK_SPLITS + 3, 99 * BLOCK_SPLITS):
        assert split not in table
        with pytest.raises(KeyError):
            table.files_of(split)
    assert list(table.splits()) == sorted(order)
    assert [f.name for f in table.files] == [output(split).name for split in sorted(order)]


@pytest.mark.parametrize("settled", [3, BLOCK_SPLITS])
def test_what_does_not_come_back_is_an_error(settled: int) -> None:
    """A record's first bytes tell its length; the last ones of a whole block are its places."""
    for at in (0, 9, -1):
        spool = MemorySpool()
        table = SplitTable(spool)
        for split in range(settled):
            table.add(split, (FILE,), ())
        spool._data[at] ^= 1
        with pytest.raises(InternalError, match="does not come back"):
            list(table.files)
    spool._data.clear()
    with pytest.raises(InternalError, match="does not come back"):
        table.files_of(1)


def test_names_that_share_nothing_are_no_burden() -> None:
    """Names of files that were set aside have a number of their own: so many templates are not kept."""
    table = SplitTable()
    with patch.object(splits_table, "_TEMPLATES", 2):
        given = {split: replace(output(split), staged=f"_headrace/s/{split:06d}-aside-{7 * split}") for split in range(9)}
        for split, file in given.items():
            table.add(split, (file,), ())
    assert len(table._templates) == 2
    assert list(table.files) == list(given.values())
