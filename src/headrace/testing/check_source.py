"""A conformance kit for sources: what contracts/source.py promises, as assertions that a plug-in's author can run.

    from headrace.testing.check_source import check_source
    check_source(MySource(...), rows=1000)

Raises AssertionError that says which promise was broken.
"""

from __future__ import annotations

import itertools
import math
import os
import stat
import threading
from collections.abc import Callable
from typing import Any

import cloudpickle
import pyarrow as pa

from headrace.connectors.blocks import concat
from headrace.contracts.source import BadRange, DividingSource, Source
from headrace.core.options import BlockLimits
from headrace.core.refs import Origin
from headrace.core.splits import Division, Split


def check_source(
    source: Source,
    *,
    rows: int,
    predicate: Any = None,
    locate: Callable[[str, int], dict[str, Any]] | None = None,
) -> pa.Table:
    """Check a source of `rows` rows; returns all of them.

    predicate: an expression over its columns that `prune` should take, if given. locate: the true row at (uri, row of that
    object), to check origins against.
    """
    assert isinstance(source, Source), "it lacks an attribute or method of the Source contract"
    schema = source.schema()
    assert schema.equals(source.schema()), "schema() must not change"
    assert source.describe(), "describe() is empty"
    splits = _check_splits(source)
    table = _check_rows(source, splits, rows, schema, locate)
    _check_cuts(source, splits, table)
    _check_projection(source, splits, table)
    _check_pickle(source, table)
    _check_division(source, table)
    _check_close(source, splits)
    _check_tolerance(source, splits)
    if predicate is not None:
        _check_prune(source, table, predicate)
    counted = source.count()
    assert counted in (None, rows), f"count() says {counted}, open() yields {rows}"
    return table


def read_all(source: Source, *, per_input: bool = False, limits: BlockLimits | None = None) -> pa.Table:
    """Every row of a source, in order."""
    blocks = [b for s in source.splits(per_input=per_input) for b, _ in source.open(s, limits or BlockLimits())]
    if not len(source.schema()):
        return pa.Table.from_batches([concat(blocks)]) if blocks else pa.table({})
    return pa.Table.from_batches(blocks, source.schema())


def open_descriptors() -> int:
    """Regular files open in this process, 0 where the system can't tell. (Clients keep connections alive on purpose.)"""
    count = 0
    for name in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ():
        try:
            count += stat.S_ISREG(os.fstat(int(name)).st_mode)
        except OSError:
            continue  # the listing's own
    return count


def _threads() -> int:
    """Threads that keep a process alive."""
    return sum(not t.daemon for t in threading.enumerate())


def _check_splits(source: Source) -> list[Split]:
    packed: list[Split] = []
    for per_input in (False, True):
        stream = source.splits(per_input=per_input)
        assert iter(stream) is stream, "splits() must return an iterator: listings don't fit in memory"
        splits = list(stream)
        assert [s.index for s in splits] == list(range(len(splits))), "split indexes must be 0, 1, 2, ..."
        again = list(source.splits(per_input=per_input))
        assert splits == again, "the same input must give the same splits"
        ids = [s.id for s in splits]
        listed_twice = len({(f.uri, f.start) for s in splits for f in s.fragments}) < sum(len(s.fragments) for s in splits)
        assert listed_twice or len(set(ids)) == len(ids), "two splits have the same id"
        if per_input:
            assert all(len(s.fragments) == 1 for s in splits), "per_input: one fragment a split"
            names = [s.fragments[0].name for s in splits]
            assert len(set(names)) == len(names), "fragment names must be unique: outputs are named after them"
            assert all(n and not n.startswith("/") and ".." not in n.split("/") for n in names), "names stay in the root"
        else:
            packed = splits
    return packed


def _check_rows(
    source: Source, splits: list[Split], rows: int, schema: pa.Schema, locate: Callable[[str, int], dict[str, Any]] | None
) -> pa.Table:
    blocks: list[pa.RecordBatch] = []
    for split in splits:
        in_split = 0
        for batch, origin in source.open(split, BlockLimits()):
            assert batch.num_rows > 0, "an empty block"
            assert batch.schema.equals(schema), f"a block has schema {batch.schema}, promised was {schema}"
            _check_origin(batch, origin, locate)
            in_split += batch.num_rows
            blocks.append(batch)
        assert split.rows in (None, in_split), f"{split.label} said {split.rows} rows and has {in_split}"
    table = pa.Table.from_batches(blocks, schema)
    assert table.num_rows == rows, f"{table.num_rows} rows came out of {rows}"
    assert table.equals(read_all(source)), "reading twice gives different rows"
    assert table.equals(read_all(source, per_input=True)), "per_input gives other rows, or another order"
    return table


def _check_origin(batch: pa.RecordBatch, origin: Origin, locate: Callable[[str, int], dict[str, Any]] | None) -> None:
    if not origin.exact:
        return
    assert sum(s.rows for s in origin.segments) == batch.num_rows, "an exact origin must cover the block's rows"
    if locate is None:
        return
    for i in {0, batch.num_rows // 2, batch.num_rows - 1}:
        place = origin.locate(i)
        assert place is not None
        assert batch.slice(i, 1).to_pylist()[0] == locate(*place), f"block row {i} is not {place}"


def _check_cuts(source: Source, splits: list[Split], table: pa.Table) -> None:
    for limits in (
        BlockLimits(max_rows=7),
        BlockLimits(max_rows=100, rows_multiple=16),
        BlockLimits(target_bytes=1),
        BlockLimits(target_bytes=1, rows_multiple=3),
    ):
        parts: list[pa.RecordBatch] = []
        for split in splits:
            blocks = [b for b, _ in source.open(split, limits)]
            sizes = [b.num_rows for b in blocks]
            assert sizes == [b.num_rows for b, _ in source.open(split, limits)], "cuts must not change between reads"
            assert all(n % limits.rows_multiple == 0 for n in sizes[:-1]), f"cuts {sizes} against {limits}"
            most = max(limits.max_rows, limits.rows_multiple)
            assert all(n <= most for n in sizes), f"blocks of {max(sizes, default=0)} rows against {limits}"
            parts += blocks
        assert pa.Table.from_batches(parts, table.schema).equals(table), f"rows differ with {limits}"


def _check_projection(source: Source, splits: list[Split], table: pa.Table) -> None:
    names = table.schema.names
    for columns in (tuple(reversed(names)), tuple(names[-1:])):
        narrow = source.project(columns)
        assert narrow.schema().names == list(columns), "project() must keep the order asked for"
        assert read_all(narrow).equals(table.select(list(columns))), f"projection to {columns} changes values"
    bare = source.project(())
    rows = sum(b.num_rows for s in splits for b, _ in bare.open(s, BlockLimits()))
    assert rows == table.num_rows, "a projection to no columns must still count rows"
    assert source.schema().names == names, "project() must not change the source itself"


def _check_division(source: Source, table: pa.Table) -> None:
    if not isinstance(source, DividingSource):
        return
    row_bytes = source.row_bytes()
    assert math.isfinite(row_bytes), f"row_bytes() says {row_bytes}"
    assert row_bytes >= 0, f"row_bytes() says {row_bytes}"
    usual, per_input = list(source.splits(per_input=False)), list(source.splits(per_input=True))
    for parts, by_rows in itertools.product((3, 40), (False, True)):
        division = Division(max(1, sum(s.bytes for s in usual) // parts), by_rows=by_rows)
        divided = source.divided(division)
        splits = list(divided.splits(per_input=False))
        assert [s.index for s in splits] == list(range(len(splits))), f"{division}: split indexes must be 0, 1, 2, ..."
        assert splits == list(divided.splits(per_input=False)), f"{division}: the same input must give the same splits"
        assert list(divided.splits(per_input=True)) == per_input, f"{division} changes the splits of per_input"
        assert read_all(divided).equals(table), f"{division} gives other rows, or another order"
    assert list(source.splits(per_input=False)) == usual, "divided() changed the source itself"


def _check_pickle(source: Source, table: pa.Table) -> None:
    copy = cloudpickle.loads(cloudpickle.dumps(source))
    assert read_all(copy).equals(table), "the pickled source reads other rows"


def _check_close(source: Source, splits: list[Split]) -> None:
    """Closing a half-read split releases everything."""
    if not splits:
        return
    before = open_descriptors(), _threads()
    for split in itertools.islice(splits, 3):
        blocks = source.open(split, BlockLimits(max_rows=1))
        next(iter(blocks))
        close = getattr(blocks, "close", None)
        assert close is not None, "open() must return a generator"
        close()
    assert open_descriptors() <= before[0], "a closed read left files open"
    assert _threads() <= before[1], "a closed read left threads running"


def _check_tolerance(source: Source, splits: list[Split]) -> None:
    """Someone who wants to be told of bad input is told of none in good input, and gets the same blocks."""
    bad: list[BadRange] = []
    for split in splits:
        plain = [(b.num_rows, o) for b, o in source.open(split, BlockLimits())]
        told = [(b.num_rows, o) for b, o in source.open(split, BlockLimits(), bad.append)]
        assert plain == told, "on_bad changes the blocks of good input"
    assert not bad, f"good input is told to be bad: {bad[0]}"


def _check_prune(source: Source, table: pa.Table, predicate: Any) -> None:
    pruned, exact = source.prune(predicate)
    got = read_all(pruned)
    wanted = table.filter(predicate)
    assert (got if exact else got.filter(predicate)).equals(wanted), "prune() lost or kept the wrong rows"
    narrow, exact = source.project(tuple(table.schema.names[-1:])).prune(predicate) if exact else (pruned, exact)
    if exact:
        assert read_all(narrow).equals(wanted.select(table.schema.names[-1:])), "a filter on an unread column fails"
