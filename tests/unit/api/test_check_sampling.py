"""Sampling: places spread over the listing, rows within their bound, totals exact or extrapolated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.api.sampling import survey, take_sample
from headrace.connectors.sources.csv import CsvSource
from headrace.connectors.sources.memory import ArrowSource, RangeSource
from headrace.connectors.sources.parquet import ParquetSource
from headrace.core.options import BlockLimits
from headrace.core.splits import Fragment, Split

LIMITS = BlockLimits()


class Listing:
    """A source that can only be listed."""

    def __init__(self, inputs: int) -> None:
        self._inputs = inputs

    def splits(self, *, per_input: bool) -> Iterator[Split]:
        assert per_input  # other splits may open objects
        for i in range(self._inputs):
            yield Split(i, (Fragment(f"f{i}", 10, "v"),), 10)


def listed(inputs: int, **how: Any) -> Any:
    source: Any = Listing(inputs)
    return survey(source, **how)


def test_a_long_listing_is_kept_evenly_and_in_bounded_memory() -> None:
    found = listed(100_001, most=64)
    assert (found.count, found.bytes, found.rows, found.whole) == (100_001, 1_000_010, None, True)
    indexes = [i for i, _ in found.kept]
    assert len(indexes) <= 65
    assert (indexes[0], indexes[-1]) == (0, 100_000)
    steps = np.diff(indexes)
    assert len(set(steps[:-1])) == 1
    assert steps[-1] <= steps[0]


def test_a_short_listing_is_kept_whole_and_a_slow_one_is_ended() -> None:
    assert [i for i, _ in listed(5).kept] == [0, 1, 2, 3, 4]
    assert listed(0).kept == []
    ended = listed(1000, listing_s=-1.0)
    assert not ended.whole
    assert ended.count == 1


def test_rows_in_memory_come_from_start_middle_and_end() -> None:
    sample = take_sample(RangeSource(1_000_000), LIMITS, rows=90, splits=3)
    assert (sample.rows, sample.rows_expected, sample.rows_exact) == (90, 1_000_000, True)
    ids = [np.concatenate([batch["id"].to_numpy() for batch, _ in place.blocks]) for place in sample.places]
    assert ids[0][0] == 0
    assert 333_333 <= ids[1][0] < 666_666
    assert ids[2][-1] == 999_999


def test_origins_name_the_sampled_rows() -> None:
    sample = take_sample(ArrowSource(pa.table({"x": range(1000)})), LIMITS, rows=40, splits=4)
    for place in sample.places:
        for batch, origin in place.blocks:
            for row in (0, batch.num_rows - 1):
                assert origin.locate(row) == ("table in memory", batch["x"][row].as_py())


def test_one_small_file_gives_several_places(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": range(1000)}), tmp_path / "a.parquet")
    sample = take_sample(ParquetSource(tmp_path), LIMITS, rows=40, splits=4)
    assert (len(sample.places), sample.rows, sample.rows_expected, sample.rows_exact) == (4, 40, 1000, True)
    firsts = [place.blocks[0][1].segments[0].row for place in sample.places]
    assert firsts == sorted(set(firsts))
    assert firsts[-1] >= 500


def test_a_large_file_is_entered_in_the_middle(tmp_path: Path) -> None:
    with open(tmp_path / "a.csv", "w") as file:
        file.write("id,text\n")
        for start in range(0, 1_400_000, 100_000):
            file.write("".join(f"{i:08},{'x' * 90}\n" for i in range(start, start + 100_000)))
    sample = take_sample(CsvSource(tmp_path / "a.csv"), LIMITS, rows=60, splits=3)
    firsts = [place.blocks[0][0]["id"][0].as_py() for place in sample.places]
    assert firsts[0] < 100_000
    assert firsts[-1] > 600_000
    assert sample.rows == 60
    assert not sample.rows_exact
    assert sample.rows_expected is not None
    assert abs(sample.rows_expected - 1_400_000) < 20_000


def test_many_small_files_are_extrapolated(tmp_path: Path) -> None:
    for i in range(50):
        pq.write_table(pa.table({"x": range(20)}), tmp_path / f"{i:02}.parquet")
    sample = take_sample(ParquetSource(tmp_path), LIMITS, rows=100, splits=5)
    assert (sample.rows, len(sample.places)) == (100, 5)
    assert (sample.rows_expected, sample.rows_exact, sample.rows_error) == (1000, False, 0.0)


def test_what_cant_be_read_is_told(tmp_path: Path) -> None:
    for i in range(3):
        pq.write_table(pa.table({"x": range(20)}), tmp_path / f"{i}.parquet")
    (tmp_path / "1.parquet").write_bytes(b"nothing of the kind")
    sample = take_sample(ParquetSource(tmp_path), LIMITS, rows=60, splits=3)
    assert [Path(f.uri).name for f in sample.failures] == ["1.parquet"]
    assert sample.rows == 40
