"""Sources whose splits are divided finer: the same rows, the same numbers of rows, in smaller splits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from headrace.connectors.blocks import BlockLimits
from headrace.connectors.parquet_splice import worth_copying
from headrace.connectors.sources import parquet
from headrace.connectors.sources.csv import CsvSource
from headrace.connectors.sources.images import ImageSource
from headrace.connectors.sources.json import JsonSource
from headrace.connectors.sources.memory import ArrowSource, RangeSource
from headrace.connectors.sources.parquet import ParquetSource
from headrace.connectors.sources.text import TextSource
from headrace.contracts.source import BadRange, DividingSource
from headrace.core.splits import Division
from headrace.testing.check_source import check_source, read_all

ROWS = 1_500


def table(rows: int = ROWS) -> pa.Table:
    rng = np.random.default_rng(7)
    return pa.table({"id": np.arange(rows), "x": rng.random(rows), "s": [f"text {i}" * (i % 5) for i in range(rows)]})


def located(uri: str, row: int) -> dict[str, Any]:
    del uri
    return ALL[row]


ALL = table().to_pylist()


@pytest.mark.parametrize("row_group_size", [ROWS, 600, 100])
@pytest.mark.parametrize("split_bytes", [1 << 10, 6 << 10, 1 << 30])
def test_parquet_in_ranges_of_rows(tmp_path: Path, row_group_size: int, split_bytes: int) -> None:
    pq.write_table(table(), tmp_path / "a.parquet", row_group_size=row_group_size)
    source = ParquetSource(tmp_path / "a.parquet").divided(Division(split_bytes, by_rows=True))
    got = check_source(source, rows=ROWS, predicate=pc.field("id") >= ROWS - 30, locate=located)
    assert got.equals(table())
    splits = list(source.splits(per_input=False))
    aim = max(split_bytes, (tmp_path / "a.parquet").stat().st_size * 100 // ROWS)  # small row groups stay whole
    assert all(split.bytes <= 2 * aim for split in splits)
    assert len(splits) > 1 or split_bytes == 1 << 30
    assert sum(split.rows or 0 for split in splits) in (0, ROWS)
    assert all(not worth_copying(split) for split in splits if any(f.by_rows for f in split.fragments))


def test_row_groups_stay_whole_where_nothing_was_measured(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "a.parquet", row_group_size=300)
    splits = list(ParquetSource(tmp_path / "a.parquet").divided(Division(1)).splits(per_input=False))
    assert [split.rows for split in splits] == [300] * 5
    assert not any(f.by_rows for split in splits for f in split.fragments)


def test_a_row_group_is_not_read_again_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(table(), tmp_path / "a.parquet")
    size = pq.read_metadata(tmp_path / "a.parquet").row_group(0).total_byte_size
    monkeypatch.setattr(parquet, "REREAD_BYTES", 3 * size)
    source = ParquetSource(tmp_path / "a.parquet").divided(Division(1 << 10, by_rows=True))
    assert len(list(source.splits(per_input=False))) == 3
    assert read_all(source).equals(table())


def test_rows_of_a_broken_row_group_are_told_once(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(), path, row_group_size=750, compression="none", use_dictionary=False)
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff" * 40)
    source = ParquetSource(path, schema=table().schema).divided(Division(2 << 10, by_rows=True))
    bad: list[BadRange] = []
    rows: list[int] = []
    splits = list(source.splits(per_input=False))
    for split in splits:
        for batch, _ in source.open(split, BlockLimits(), bad.append):
            rows += batch["id"].to_pylist()
    told = [row for r in bad for row in range(r.row, r.row + r.rows)]
    assert len(splits) > 4
    assert rows == list(range(750))
    assert told == list(range(750, ROWS))


@pytest.mark.parametrize("first", [0, 3])
def test_a_fault_takes_no_more_rows_than_in_the_row_group_as_a_whole(tmp_path: Path, first: int) -> None:
    """What lies before the fault is given, whichever range it is in; nothing behind it can be reached."""
    rows = 20_000
    path = tmp_path / "a.parquet"
    whole = pa.table({"id": np.arange(rows), "s": [f"word {i}" for i in range(rows)]})
    pq.write_table(whole, path, compression="none", use_dictionary=False, data_page_size=4 << 10)
    chunk = pq.read_metadata(path).row_group(0).column(1)
    with path.open("r+b") as file:
        file.seek(chunk.data_page_offset + chunk.total_compressed_size * (first + 5) // 10)
        file.write(b"\xff" * 400)
    found: list[tuple[list[int], list[int]]] = []
    plain = ParquetSource(path, schema=whole.schema)
    for source in (plain, plain.divided(Division(8 << 10, by_rows=True))):
        bad: list[BadRange] = []
        good: list[int] = []
        for split in source.splits(per_input=False):
            for batch, _ in source.open(split, BlockLimits(max_rows=500), bad.append):
                good += batch["id"].to_pylist()
        found.append((good, [row for r in bad for row in range(r.row, r.row + r.rows)]))
    assert len(list(source.splits(per_input=False))) > 10
    assert len(found[0][0]) > rows // 4
    assert found[1][0][: len(found[0][0])] == found[0][0], "as many, or more, as blocks are smaller"
    for good, told in found:
        assert good + told == list(range(rows))


def test_empty_row_groups(tmp_path: Path) -> None:
    columns = {f"c{i}": pa.array([], pa.int64()) for i in range(60)}
    pq.write_table(pa.table(columns), tmp_path / "0.parquet", use_dictionary=False)
    pq.write_table(pa.table({name: np.arange(5) for name in columns}), tmp_path / "1.parquet", use_dictionary=False)
    source = ParquetSource(tmp_path).divided(Division(64, by_rows=True))
    assert read_all(source)["c0"].to_pylist() == list(range(5))


def test_rows_of_text_are_measured_by_few_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * (1 << 20) + b"\n" + b"word\n" * 10)
    assert TextSource(tmp_path / "a.txt").row_bytes() == 0.0, "one line takes all that is looked at"
    for i in range(2):
        (tmp_path / f"{i}.json").write_text('{"x": 1}')
    assert JsonSource([tmp_path / "0.json", tmp_path / "1.json"]).row_bytes() == 8.0
    (tmp_path / "b.txt").write_bytes(b"word\r" * 100)
    assert TextSource(tmp_path / "b.txt").row_bytes() == 5.0


@pytest.mark.parametrize("split_bytes", [1, 100, 5_000])
def test_lines(tmp_path: Path, split_bytes: int) -> None:
    rows = 300
    few = table(rows)
    (tmp_path / "a.csv").write_text("id,s\n" + "".join(f"{i},word {i}\n" for i in range(rows)))
    (tmp_path / "a.jsonl").write_text("".join(f'{{"id": {i}, "s": "word {i}"}}\n' for i in range(rows)))
    (tmp_path / "a.txt").write_text("".join(f"word {i}\n" for i in range(rows)))
    division = Division(split_bytes)
    for source in (CsvSource(tmp_path / "a.csv"), JsonSource(tmp_path / "a.jsonl")):
        assert isinstance(source, DividingSource)
        assert 5 < source.row_bytes() < 50
        fine = source.divided(division)
        got = read_all(fine)
        assert got["id"].to_pylist() == few["id"].to_pylist()
        assert got["s"].to_pylist() == [f"word {i}" for i in range(rows)]
        assert len(list(fine.splits(per_input=False))) == -(-_size(source) // split_bytes)
    texts = TextSource(tmp_path / "a.txt").divided(division)
    assert read_all(texts).column(0).to_pylist() == [f"word {i}" for i in range(rows)]


def _size(source: Any) -> int:
    return sum(split.bytes for split in source.splits(per_input=True))


def test_packed_files(tmp_path: Path) -> None:
    for i in range(20):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i:02}.png")
        pq.write_table(table(50), tmp_path / f"{i:02}.parquet")
    images = ImageSource(tmp_path)
    size = images.row_bytes()
    assert size == pytest.approx(sum(f.stat().st_size for f in tmp_path.glob("*.png")) / 20)
    fine = images.divided(Division(round(5.5 * size)))
    assert [len(split.fragments) for split in fine.splits(per_input=False)] == [5] * 4
    tables = ParquetSource(tmp_path / "*.parquet")
    each = (tmp_path / "00.parquet").stat().st_size
    assert tables.row_bytes() == pytest.approx(each / 50)
    parts = tables.divided(Division(each * 4))
    assert [len(split.fragments) for split in parts.splits(per_input=False)] == [4] * 5
    assert read_all(parts).num_rows == 1_000
    assert [s.id for s in parts.splits(per_input=True)] == [s.id for s in tables.splits(per_input=True)]


def test_tables_in_memory_and_ranges() -> None:
    memory = ArrowSource(table())
    fine = memory.divided(Division(round(memory.row_bytes() * 150)))
    assert check_source(fine, rows=ROWS).equals(table())
    assert len(list(fine.splits(per_input=False))) == pytest.approx(10, abs=1)
    numbers = RangeSource(1_000).divided(Division(80))
    assert check_source(numbers, rows=1_000)["id"].to_pylist() == list(range(1_000))
    assert len(list(numbers.splits(per_input=False))) == 100
    assert len(list(RangeSource(3).divided(Division(1)).splits(per_input=False))) == 3


class _Nonsense(RangeSource):
    def row_bytes(self) -> float:
        return math.nan


class _Loses(RangeSource):
    def divided(self, division: Division) -> Any:
        return RangeSource(self.count() - 1)


class _ChangesPerInput(RangeSource):
    def divided(self, division: Division) -> Any:
        return _OfTwoInputs(self.count())


class _OfTwoInputs(RangeSource):
    def splits(self, *, per_input: bool) -> Any:
        splits = super().splits(per_input=per_input)
        return iter(list(splits)[:0]) if per_input else splits


@pytest.mark.parametrize(
    ("broken", "said"), [(_Nonsense, "row_bytes"), (_Loses, "per_input|other rows"), (_ChangesPerInput, "splits of per_input")]
)
def test_the_kit_finds_what_is_wrong_with_a_division(broken: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_source(broken(1_000), rows=1_000)
