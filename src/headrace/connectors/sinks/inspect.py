"""Reading an output again: its bytes, digest, rows and columns, whatever its format.

Invariant: what is wrong with a file's content is told, not raised; memory is bounded by WHOLE_BYTES or a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from msgspec import Struct

from headrace.connectors import storage
from headrace.connectors.run_store import LocalRunStore, S3RunStore

WHOLE_BYTES = 32 << 20  # files up to this size are read once, and kept while they are looked at
_PIECE = 1 << 20


class Found(Struct, frozen=True):
    """rows: -1 when nobody can tell. columns: (name, type), the type "" where the format has none. trouble: why it can't be
    read.
    """

    bytes: int
    digest: str
    rows: int
    columns: tuple[tuple[str, str], ...] = ()
    trouble: str = ""


def inspect(store: LocalRunStore | S3RunStore, name: str) -> Found | None:
    """None when there is no such file. Raises DestinationError and DataError for what can't be reached."""
    uri = store.uri(name)
    there = storage.stat(uri)
    if there is None:
        return None
    data: bytes | None = None
    if there.size <= WHOLE_BYTES:
        data = store.read(name)
        if data is None:
            return None
        size, digest = len(data), hashlib.sha256(data).hexdigest()
    else:
        measured = store.size_and_digest(name)
        if measured is None:
            return None
        size, digest = measured

    def opened() -> Any:
        return pa.BufferReader(data) if data is not None else storage.open_reader(uri, size, "").native(_PIECE)

    try:
        rows, columns = _READERS[PurePosixPath(name).suffix](opened, size)
    except KeyError:
        return Found(size, digest, -1, (), "its format is unknown")
    except (pa.ArrowException, OSError, ValueError) as e:
        return Found(size, digest, -1, (), str(e).splitlines()[0][:200] if str(e) else type(e).__name__)
    return Found(size, digest, rows, columns)


def _parquet(opened: Any, size: int) -> tuple[int, tuple[tuple[str, str], ...]]:
    import pyarrow.parquet as pq

    with opened() as source:
        file = pq.ParquetFile(source)
        rows = sum(b.num_rows for b in file.iter_batches(batch_size=4096, use_threads=False))
        if rows != file.metadata.num_rows:
            raise ValueError(f"its footer says {file.metadata.num_rows} rows, and it has {rows}")
        return rows, tuple((f.name, str(f.type)) for f in file.schema_arrow)


def _csv(opened: Any, size: int) -> tuple[int, tuple[tuple[str, str], ...]]:
    import pyarrow.csv as pc

    if not size:
        return 0, ()
    parse = pc.ParseOptions(newlines_in_values=True, ignore_empty_lines=False)
    with opened() as source, pc.open_csv(source, parse_options=parse) as reader:
        names = reader.schema.names
    # As text: types that are inferred from the beginning need not hold to the end.
    convert = pc.ConvertOptions(column_types={name: pa.large_string() for name in names})
    with opened() as source, pc.open_csv(source, parse_options=parse, convert_options=convert) as reader:
        rows = sum(batch.num_rows for batch in reader)
    return rows, tuple((name, "") for name in names)


def _lines(opened: Any, size: int) -> tuple[int, tuple[tuple[str, str], ...]]:
    rows, last = 0, b"\n"
    for piece in _pieces(opened):
        rows += piece.count(b"\n")
        last = piece[-1:]
    if last != b"\n":
        raise ValueError("its last line is cut off")
    return rows, ()


def _pieces(opened: Any) -> Iterator[bytes]:
    with opened() as source:
        while piece := source.read(_PIECE):
            yield bytes(piece)


_READERS = {".parquet": _parquet, ".csv": _csv, ".jsonl": _lines}
