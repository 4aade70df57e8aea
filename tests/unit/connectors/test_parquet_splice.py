"""Column chunks moved from one Parquet file to another."""

from __future__ import annotations

import hashlib
import io
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headrace.connectors import parquet_footer
from headrace.connectors.parquet_footer import Chunk, Footer, Refused, put_struct, struct_at
from headrace.connectors.parquet_splice import Source, Splicer, Template, encoded, read_footer

NEW = pa.field("new", pa.float32())

TYPES: dict[str, st.SearchStrategy[Any]] = {
    "int8": st.integers(-128, 127),
    "uint32": st.integers(0, (1 << 32) - 1),
    "int64": st.integers(-(1 << 63), (1 << 63) - 1),
    "float": st.floats(width=32, allow_nan=False),
    "bool": st.booleans(),
    "string": st.text(max_size=20),
    "binary": st.binary(max_size=20),
    "date32": st.dates(),
    "decimal": st.decimals(-1000, 1000, places=2, allow_nan=False),
    "list": st.lists(st.integers(0, 9) | st.none(), max_size=3),
    "struct": st.fixed_dictionaries({"a": st.integers(0, 9) | st.none(), "b": st.lists(st.text(max_size=3), max_size=2)}),
    "map": st.lists(st.tuples(st.text(max_size=3), st.booleans()), max_size=3),
}
ARROW = {
    "int8": pa.int8(),
    "uint32": pa.uint32(),
    "int64": pa.int64(),
    "float": pa.float32(),
    "bool": pa.bool_(),
    "string": pa.string(),
    "binary": pa.large_binary(),
    "date32": pa.date32(),
    "decimal": pa.decimal128(9, 2),
    "list": pa.list_(pa.int16()),
    "struct": pa.struct([("a", pa.int64()), pa.field("b", pa.list_(pa.string()), nullable=False)]),
    "map": pa.map_(pa.string(), pa.bool_()),
}


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    rows = draw(st.integers(1, 40))
    columns: dict[str, pa.Array] = {}
    for kind in draw(st.lists(st.sampled_from(sorted(TYPES)), min_size=1, max_size=4)):
        values = draw(st.lists(TYPES[kind] | st.none(), min_size=rows, max_size=rows))
        made = pa.array(values, ARROW[kind])
        columns[f"{kind}.{len(columns)}"] = made.dictionary_encode() if kind == "string" and draw(st.booleans()) else made
    return pa.table(columns)


def stored(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def source(data: bytes) -> Source:
    return Source(pa.BufferReader(data), len(data))


def spliced(data: bytes, table: pa.Table) -> tuple[bytes, pa.Table]:
    """(a file of the columns in `data` and a new one, what it should hold)."""
    schema = table.schema.append(NEW)
    out = io.BytesIO()
    made = Splicer(out, Template(schema))
    given = source(data)
    new = pa.array(np.arange(table.num_rows), pa.float32())
    at = 0
    for g, group in enumerate(given.footer.groups):
        part = encoded(pa.table([new.slice(at, group.rows)], schema=pa.schema([NEW])), {"compression": "zstd"})
        made.append(group.rows, {**{n: (given, g, n) for n in table.schema.names}, "new": (part, 0, "new")})
        at += group.rows
    done = made.close()
    assert (done.bytes, done.digest) == (len(out.getvalue()), hashlib.sha256(out.getvalue()).hexdigest())
    return out.getvalue(), table.append_column(NEW, new)


def check(data: bytes, table: pa.Table) -> None:
    made, wanted = spliced(data, table)
    ordinary = io.BytesIO()
    pq.write_table(wanted, ordinary)
    with pq.ParquetFile(pa.BufferReader(made)) as file, pq.ParquetFile(pa.BufferReader(ordinary.getvalue())) as plain:
        assert file.schema_arrow.equals(plain.schema_arrow, check_metadata=True)
        assert file.schema.equals(plain.schema)
        assert file.metadata.created_by == plain.metadata.created_by
        got, expected = file.read(), plain.read()
    got.validate(full=True)
    assert got.equals(expected)


@settings(max_examples=40, deadline=None)
@given(
    tables(),
    st.sampled_from(["none", "snappy", "gzip", "zstd", "brotli", "lz4"]),
    st.sampled_from(["1.0", "2.0"]),
    st.booleans(),
    st.integers(1, 40),
)
def test_what_is_read_is_what_was_written(table: pa.Table, codec: str, pages: str, dictionary: bool, rows: int) -> None:
    data = stored(
        table,
        compression=codec,
        data_page_version=pages,
        use_dictionary=dictionary,
        row_group_size=rows,
        data_page_size=64,
        write_page_index=dictionary,
        write_page_checksum=True,
    )
    assume(_readable(data))  # of pages of one row, pyarrow 26 can't read all that it writes
    check(data, table)


def _readable(data: bytes) -> bool:
    try:
        return pq.read_table(pa.BufferReader(data)) is not None
    except (pa.ArrowException, OSError):
        return False


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"store_schema": False}, (pa.string(), pa.list_(pa.int64()), pa.timestamp("us", "UTC"))),
        ({"use_compliant_nested_type": False}, (pa.list_(pa.list_(pa.int32())),)),
        ({"version": "1.0"}, (pa.int32(), pa.timestamp("ms"), pa.time32("ms"), pa.date32())),
        ({"use_dictionary": False, "column_encoding": "DELTA_BINARY_PACKED"}, (pa.int64(),)),
        ({"use_dictionary": False, "column_encoding": "BYTE_STREAM_SPLIT"}, (pa.float64(),)),
    ],
)
def test_older_and_other_forms(options: dict[str, Any], kinds: tuple[pa.DataType, ...]) -> None:
    table = pa.table({f"c{i}": pa.array([None, *[_value(t)] * 9], t) for i, t in enumerate(kinds)})
    check(stored(table, **options), table)


def _value(t: pa.DataType) -> Any:
    if pa.types.is_list(t):
        return [_value(t.value_type)]
    return (
        "x"
        if pa.types.is_string(t)
        else pa.scalar(7, pa.int64() if not pa.types.is_date32(t) and not pa.types.is_time32(t) else pa.int32()).cast(t).as_py()
    )


def test_other_storage_is_told_from_the_same() -> None:
    """The Arrow type may be the same where the bytes are not."""
    amounts = pa.table({"d": pa.array([Decimal("1.50")], pa.decimal128(9, 2)), "t": pa.array([5000], pa.timestamp("ns"))})
    template = Template(amounts.schema)
    same = source(stored(amounts)).footer.by_name
    assert template.takes("d", same["d"])
    assert template.takes("t", same["t"])
    integers = source(stored(amounts, store_decimal_as_integer=True)).footer.by_name
    assert not template.takes("d", integers["d"])
    twelve = source(stored(amounts, use_deprecated_int96_timestamps=True)).footer.by_name
    assert not template.takes("t", twelve["t"])
    assert not template.takes("t", source(stored(amounts, coerce_timestamps="us")).footer.by_name["t"])
    required = pa.schema([pa.field("d", pa.decimal128(9, 2), nullable=False)])
    assert not template.takes("d", source(stored(amounts.select(["d"]).cast(required))).footer.by_name["d"])
    assert not template.takes("x", same["d"])
    assert not template.takes("d", None)


def test_statistics_stay_and_indexes_do_not() -> None:
    table = pa.table({"a": pa.array([3, None, 1, 2])})
    made, _ = spliced(stored(table, write_page_index=True), table)
    column = pq.read_metadata(pa.BufferReader(made)).row_group(0).column(0)
    assert (column.statistics.min, column.statistics.max, column.statistics.null_count) == (1, 3, 1)
    assert not column.has_offset_index
    assert not column.has_column_index


def test_minima_of_an_early_writer_are_not_trusted() -> None:
    table = pa.table({"a": pa.array(["a", "b"])})
    data = stored(table)
    footer = read_footer(pa.BufferReader(data), len(data))
    assert footer.trusted
    writer = b"parquet-mr version 1.8.1"
    changed = put_struct({**footer.fields, 6: (8, bytes([len(writer)]) + writer)})
    assert not Footer(changed).trusted
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    old = data[:start] + changed + len(changed).to_bytes(4, "little") + b"PAR1"
    made, _ = spliced(old, table)
    column = pq.read_metadata(pa.BufferReader(made)).row_group(0).column(0)
    assert not column.statistics.has_min_max
    assert column.statistics.null_count == 0


def test_what_is_not_understood_is_refused() -> None:
    data = stored(pa.table({"a": [1, 2, 3]}))
    footer = read_footer(pa.BufferReader(data), len(data))
    text = bytes([1]) + b"x"
    with pytest.raises(Refused, match="version"):
        Footer(put_struct({**footer.fields, 1: (5, b"\x06")}))
    with pytest.raises(Refused, match="encrypted"):
        Footer(put_struct({**footer.fields, 8: (12, b"\0")}))
    with pytest.raises(Refused, match="Parquet"):
        read_footer(pa.BufferReader(data[:-1] + b"E"), len(data))
    with pytest.raises(Refused, match="too long"):
        read_footer(pa.BufferReader(data), len(data), 10)
    (chunk,) = footer.chunks(0).fields
    with pytest.raises(Refused, match="another file"):
        Chunk.of({**chunk, 1: (8, text)})
    with pytest.raises(Refused, match="kind"):
        Chunk.of({**chunk, 10: (6, b"\x02")})
    meta = struct_at(chunk[3][1])[0]
    with pytest.raises(Refused, match="in full"):
        Chunk.of({**chunk, 3: (12, put_struct({**meta, 30: (6, b"\x02")}))})
    with pytest.raises(Refused, match="codec"):
        Chunk.of({**chunk, 3: (12, put_struct({**meta, 4: (5, b"\x06")}))})


def test_a_group_given_up_leaves_nothing_behind() -> None:
    table = pa.table({"a": pa.array(range(1000))})
    data = stored(table, row_group_size=500, use_dictionary=False, compression="none")
    broken = bytearray(data)
    second = pq.read_metadata(pa.BufferReader(data)).row_group(1).column(0).data_page_offset
    broken[second : second + 8] = bytes(8)
    out = io.BytesIO()
    made = Splicer(out, Template(table.schema))
    good, bad = source(data), source(bytes(broken))
    made.append(500, {"a": (bad, 0, "a")})
    with pytest.raises(Refused):
        made.append(500, {"a": (bad, 1, "a")})
    with pytest.raises(Refused):
        made.append(499, {"a": (good, 1, "a")})
    made.append(500, {"a": (good, 1, "a")})
    done = made.close()
    assert pq.read_table(pa.BufferReader(out.getvalue())).equals(table)
    assert done.digest == hashlib.sha256(out.getvalue()).hexdigest()


def test_chunks_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.connectors import parquet_splice

    monkeypatch.setattr(parquet_splice, "PIECE_BYTES", 7)  # headers of pages lie across pieces
    table = pa.table({"a": pa.array([f"text {i % 50}" for i in range(900)]), "b": pa.array(range(900))})
    check(stored(table, data_page_size=100, row_group_size=400), table)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    """No other exception comes out of bytes that are not what they were."""
    table = pa.table({"a": pa.array([[1], None, [2, 3]]), "b": ["x", "y", None]})
    whole = bytearray(stored(table, data_page_size=8))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, len(whole) - 9))] = data.draw(st.integers(0, 255))
    try:
        given_ = source(bytes(whole))
        made = Splicer(io.BytesIO(), Template(table.schema))
        if all(made.template.takes(n, given_.footer.by_name.get(n)) for n in "ab"):
            for g, group in enumerate(given_.footer.groups):
                made.append(group.rows, {n: (given_, g, n) for n in "ab"})
        made.close()
    except Refused:
        return


@pytest.mark.parametrize("kind", [parquet_footer.LIST, parquet_footer.MAP])
def test_a_damaged_count_keeps_nobody_busy(kind: int) -> None:
    """Elements of fixed size are passed over without looking at them."""
    many = parquet_footer.put_varint(1 << 60)
    data = bytes([0xF3]) + many if kind == parquet_footer.LIST else many + bytes([0x33])
    with pytest.raises(IndexError):
        parquet_footer._skip(data, 0, kind)
