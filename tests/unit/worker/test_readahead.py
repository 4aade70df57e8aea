"""Reading ahead: a block of the split at hand, and the first one of the next."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from headrace.connectors.sources.memory import ArrowSource
from headrace.contracts.source import BadRange
from headrace.core.errors import DataError
from headrace.core.options import BlockLimits
from headrace.core.splits import Split
from headrace.worker.readahead import Ahead, Begun, ReadAhead, Told, begin_reading

LIMITS = BlockLimits()


class Rows:
    """A source's iterator that says what became of it."""

    def __init__(self, *items: Any) -> None:
        self._items = iter(items)
        self.read: list[Any] = []
        self.closed_by: threading.Thread | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = next(self._items)
        if isinstance(item, Exception):
            raise item
        self.read.append(item)
        return item

    def close(self) -> None:
        self.closed_by = threading.current_thread()


def begun(rows: Rows) -> Begun:
    return ReadAhead(rows), Told()


def splits(*indexes: int) -> tuple[Split, ...]:
    return tuple(Split(i, (), 1) for i in indexes)


def test_items_in_order_and_closed_in_the_thread_that_read_them() -> None:
    rows = Rows(1, 2, 3)
    ahead = ReadAhead(rows)
    assert list(ahead) == [1, 2, 3]
    assert list(ahead) == []
    assert rows.closed_by not in (None, threading.current_thread())
    assert not rows.closed_by.is_alive()  # type: ignore[union-attr]


def test_an_error_comes_behind_what_was_read_before_it() -> None:
    ahead = ReadAhead(Rows(1, DataError("broken")))
    assert next(ahead) == 1
    with pytest.raises(DataError, match="broken"):
        next(ahead)
    assert list(ahead) == []


def test_closing_early_closes_the_source() -> None:
    rows = Rows(*range(100))
    ahead = ReadAhead(rows)
    assert next(ahead) == 0
    ahead.close()
    ahead.close()
    assert rows.closed_by is not None
    assert len(rows.read) <= 3
    assert list(ahead) == []


def test_the_first_split_that_nobody_has_is_begun_once() -> None:
    ahead, read = Ahead(), dict[int, Rows]()

    def start(split: Split) -> Begun:
        assert split.index not in read
        read[split.index] = Rows(split.index)
        return begun(read[split.index])

    assert ahead.take(*splits(1), LIMITS) is None  # opened before anyone began it
    ahead.begin(splits(1, 2, 3), LIMITS, start)
    ahead.begin(splits(1, 2, 3), LIMITS, start)
    ahead.begin(splits(1, 2, 3), LIMITS, start)
    assert list(read) == [2, 3]
    taken = ahead.take(*splits(2), LIMITS)
    assert taken is not None
    assert list(taken[0]) == [2]
    assert ahead.take(*splits(2), LIMITS) is None  # another attempt reads it from its start
    ahead.close()
    assert read[3].closed_by is not None


def test_closing_ends_also_what_is_begun_meanwhile() -> None:
    ahead = Ahead()
    second = Rows(2)

    def chained() -> Iterator[int]:
        yield 1
        ahead.begin(splits(2), LIMITS, lambda _: begun(second))

    ahead.begin(splits(1), LIMITS, lambda _: (ReadAhead(chained()), Told()))
    taken = ahead.take(*splits(1), LIMITS)
    assert taken is not None
    assert list(taken[0]) == [1]
    ahead.close()
    assert second.closed_by is not None


def test_another_process_begins_with_nothing() -> None:
    ahead = Ahead()
    ahead.begin(splits(1), LIMITS, lambda _: begun(Rows(1)))
    try:
        assert pickle.loads(pickle.dumps(ahead)).take(*splits(1), LIMITS) is None
    finally:
        ahead.close()


def test_the_first_block_comes_again_for_whoever_opens_the_split() -> None:
    ahead, rows = Ahead(), Rows(1, 2, 3)
    assert ahead.first(*splits(0), LIMITS, lambda _: begun(rows)) == 1
    taken = ahead.take(*splits(0), LIMITS)
    assert taken is not None
    assert list(taken[0]) == [1, 2, 3]


@pytest.mark.parametrize("other", [Split(0, (), 2), Split(0, (), 1, 7)])
def test_a_split_cut_otherwise_is_read_from_its_start(other: Split) -> None:
    ahead, rows = Ahead(), [Rows(1, 2), Rows(1, 2)]
    ahead.first(*splits(0), LIMITS, lambda _: begun(rows[0]))
    assert ahead.take(other, LIMITS) is None
    ahead.first(*splits(1), LIMITS, lambda _: begun(rows[1]))
    assert ahead.take(*splits(1), BlockLimits(max_rows=5)) is None
    assert all(r.closed_by is not None for r in rows)


def test_what_broke_at_its_first_block_is_read_from_its_start() -> None:
    ahead = Ahead()
    with pytest.raises(DataError):
        ahead.first(*splits(0), LIMITS, lambda _: begun(Rows(DataError("broken"))))
    assert ahead.first(*splits(1), LIMITS, lambda _: begun(Rows())) is None
    assert ahead.take(*splits(0), LIMITS) is ahead.take(*splits(1), LIMITS) is None


def test_what_is_told_early_reaches_whoever_opens_the_split() -> None:
    told, bad, mostly = Told(), list[BadRange](), list[str]()
    ranges = [BadRange("a", i, 1, DataError("broken")) for i in range(2)]
    told.bad(ranges[0])
    told.mostly()
    told.hand_to(bad.append, lambda: mostly.append("mostly"))
    told.bad(ranges[1])
    told.mostly()
    assert bad == ranges
    assert mostly == ["mostly"]


def test_a_reading_tells_when_most_is_read() -> None:
    source = ArrowSource(pa.table({"x": range(8)}))
    (split,) = source.splits(per_input=False)
    blocks, told = begin_reading(source, split, LIMITS, fails=True)
    assert sum(batch.num_rows for batch, _ in blocks) == 8
    mostly: list[int] = []
    told.hand_to(lambda bad: None, lambda: mostly.append(split.index))
    assert mostly == [0]
