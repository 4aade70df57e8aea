"""Small things about batches and memory that all substrates share. Knows no substrate and starts nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import pyarrow as pa

from headrace.core.errors import InternalError


def zip_parts(parts: Sequence[tuple[tuple[str, ...], pa.RecordBatch]], rows: int) -> pa.RecordBatch:
    """One batch of the parts' columns side by side; of a name that comes twice, the later part's column, in the
    earlier one's place. parts: (the columns wanted, the batch). Zero-copy.
    """
    fields: dict[str, pa.Field] = {}
    arrays: dict[str, pa.Array] = {}
    metadata: dict[bytes, bytes] = {}
    for names, batch in parts:
        metadata.update(batch.schema.metadata or {})
        for name in names:
            index = batch.schema.get_field_index(name)
            if index < 0:
                raise InternalError(f"a block lacks column {name!r}, or has it twice; it has {batch.schema.names}")
            fields[name] = batch.schema.field(index)
            arrays[name] = batch.column(index)
    if not fields:  # only a row count: Arrow keeps it beside zero columns when the batch is read from IPC or selected
        return pa.RecordBatch.from_arrays([pa.nulls(rows)], names=["_"]).select([])
    schema = pa.schema(list(fields.values()), metadata=metadata or None)
    return pa.RecordBatch.from_arrays(list(arrays.values()), schema=schema)


def own_copy(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows in memory that nothing else refers to; a slice takes only its own rows along."""
    buffer = pa.allocate_buffer(encoded_bytes(batch))
    encode_into(buffer, batch)
    return decode(buffer)


def encoded_bytes(batch: pa.RecordBatch) -> int:
    """How long the batch is as an Arrow IPC stream (schema, dictionaries, batch). Copies no data to find out."""
    sink = pa.MockOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.size()


def encode_into(buffer: pa.Buffer, batch: pa.RecordBatch) -> None:
    """Write the stream into a mutable buffer of at least `encoded_bytes`: one copy of the data, without the GIL."""
    with pa.ipc.new_stream(pa.FixedSizeBufferWriter(buffer), batch.schema) as writer:
        writer.write_batch(batch)


def decode(buffer: pa.Buffer) -> pa.RecordBatch:
    """The batch of an Arrow IPC stream; its columns are views of `buffer`."""
    return pa.ipc.open_stream(buffer).read_next_batch()


def anonymous_bytes(pid: int | None = None) -> int:
    """Memory of a process that is its own: resident, without files and shared memory. 0 when the process is gone.

    On Linux from /proc/<pid>/statm, about 20 us; elsewhere resident memory as psutil tells it.
    """
    if sys.platform == "linux":
        try:
            with open(f"/proc/{pid or os.getpid()}/statm", "rb") as f:
                _, resident, shared, *_ = f.read().split()
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGESIZE")
    import psutil

    return psutil.Process(pid).memory_info().rss
