"""To and from Ray Data: blocks change hands as objects of the cluster, and no byte passes the driver.

Ray has Arrow types of its own for tensors, by which all its NumPy columns of more than one dimension are made. They become ours
as they are read, so that models see arrays of (rows, *shape); and ours become Ray's as they leave, where Ray can't read them.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import ObjectLostError

from headrace.connectors.blocks import Piece, no_columns, rechunk, shareable
from headrace.contracts.source import OnBad
from headrace.core.errors import DataError, PlanError, TransientError
from headrace.core.options import BlockLimits
from headrace.core.refs import Origin, Segment
from headrace.core.schemas import Conflict, bring, unify
from headrace.core.splits import Division, Fragment, Split
from headrace.core.tensors import is_ragged, is_tensor, ragged_to_array, ragged_to_numpy, ragged_type, tensor_to_numpy
from headrace.substrates.ray.ingest import RefBlock

SPLIT_BYTES = 16 << 20  # no reading to do: small splits balance better
_BLOCK = "block-"
_FIXED = ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2")  # a list a row; the shape is the type's
_RAGGED = ("ray.data.arrow_variable_shaped_tensor",)  # a struct a row: "data" and "shape"


class RayTables:
    """A source of Arrow tables that lie in the object stores of the cluster we are connected to."""

    name = "ray_dataset"
    remote = False
    _split_bytes = SPLIT_BYTES
    on_cluster = True  # only workers of the cluster reach them

    def __init__(self, refs: Sequence[Any]) -> None:
        """refs: references to pa.Table. Looks at each where it lies. The schema is one that rows of all go into. Raises
        DataError when they differ in columns, or in types that don't go together.
        """
        if not refs:
            raise DataError("the Ray Dataset has no block", hint="give one with rows")
        self._refs = list(refs)
        self._sizes: list[tuple[int, int]] = []
        self._digests: list[str] = []
        self._schema: pa.Schema | None = None
        for i, (rows, size, digest, schema) in enumerate(ray.get(_some_at_once(_look, [(ref,) for ref in refs]))):
            self._sizes.append((rows, size))
            self._digests.append(digest)
            if self._schema is None:
                self._schema = schema if rows or i == len(refs) - 1 else None
            elif rows:
                self._schema = _together(i, self._schema, schema)
        self._columns: tuple[str, ...] | None = None

    def meaning(self) -> dict[str, Any]:
        """For fingerprints."""
        content = hashlib.blake2b("".join(self._digests).encode(), digest_size=12).hexdigest()
        return {"blocks": len(self._sizes), "rows": self.count(), "content": content}

    def schema(self) -> pa.Schema:
        assert self._schema is not None
        return self._schema if self._columns is None else pa.schema([self._schema.field(c) for c in self._columns])

    def splits(self, *, per_input: bool) -> Iterator[Split]:
        index = 0
        packed: list[Fragment] = []
        packed_bytes = 0
        for i, (rows, size) in enumerate(self._sizes):
            if not rows:
                continue
            parts = 1 if per_input else max(1, min(rows, -(-size // self._split_bytes)))
            if packed and (per_input or parts > 1 or packed_bytes + size > self._split_bytes):
                yield _split(index, packed)
                index, packed, packed_bytes = index + 1, [], 0
            for part in range(parts):
                start, stop = rows * part // parts, rows * (part + 1) // parts
                packed.append(
                    Fragment(f"ray dataset block {i}", size, f"{rows}-{self._digests[i]}", start, stop, stop - start, _name(i))
                )
                if parts > 1:
                    yield _split(index, packed)
                    index, packed = index + 1, []
            packed_bytes = packed_bytes + size if packed else 0
        if packed:
            yield _split(index, packed)

    def divided(self, division: Division) -> Self:
        out = copy.copy(self)
        out._split_bytes = min(SPLIT_BYTES, division.split_bytes)
        return out

    def row_bytes(self) -> float:
        return sum(size for _, size in self._sizes) / max(1, self.count() or 0)

    def project(self, columns: tuple[str, ...]) -> Self:
        names = self.schema().names
        for c in columns:
            if c not in names:
                raise PlanError(f"column {c!r} is not in the input", hint=f"it has: {', '.join(names)}")
        out = copy.copy(self)
        out._columns = columns
        return out

    def prune(self, predicate: Any) -> tuple[Self, bool]:
        return self, False

    def open(self, split: Split, limits: BlockLimits, on_bad: OnBad | None = None) -> Iterator[tuple[pa.RecordBatch, Origin]]:
        yield from rechunk(self._pieces(split), shareable(limits, split.rows or 0, len(self.schema())))

    def _pieces(self, split: Split) -> Iterator[Piece]:
        if not ray.is_initialized():
            raise DataError("a Ray Dataset can be read on its cluster only", hint='use engine="ray"')
        for f in split.fragments:
            try:
                table: pa.Table = ray.get(self._refs[int(f.name.removeprefix(_BLOCK))])
            except ObjectLostError as lost:
                raise TransientError(
                    f"{f.uri} is lost ({type(lost).__name__})", hint="its node is gone: make it anew"
                ) from None
            table = _ours(table.select(self.schema().names))
            at, row_bytes = f.start, table.nbytes / max(1, table.num_rows)
            if table.num_columns == 0:
                yield Piece(no_columns(f.stop - at), Origin((Segment(f.uri, at, f.stop - at),)), 1e-9)
                continue
            for batch in table.slice(f.start, f.stop - f.start).to_batches():
                try:
                    batch = bring(batch, self.schema())
                except pa.ArrowException as error:
                    raise DataError(f"{f.uri} does not go with the others: {error}", hint="bring them to one schema") from None
                yield Piece(batch, Origin((Segment(f.uri, at, batch.num_rows),)), row_bytes)
                at += batch.num_rows

    def count(self) -> int | None:
        return sum(rows for rows, _ in self._sizes)

    def describe(self) -> str:
        return f"Ray Dataset of {len(self._sizes)} blocks, {self.count()} rows, columns: {', '.join(self.schema().names)}"


def _name(block: int) -> str:
    return f"{_BLOCK}{block:06d}"


def _split(index: int, fragments: Sequence[Fragment]) -> Split:
    rows = sum(f.stop - f.start for f in fragments)
    return Split(
        index,
        tuple(fragments),
        sum(f.size_bytes * (f.stop - f.start) // max(1, int(f.version.partition("-")[0])) for f in fragments),
        rows,
    )


def _together(block: int, schema: pa.Schema, other: pa.Schema) -> pa.Schema:
    """Of blocks before this one, and of this one."""
    hint = "bring its blocks to one schema first"
    if set(other.names) != set(schema.names):
        text = f"block {block} of the Ray Dataset has columns {other.names}, and others have {schema.names}"
        raise DataError(text, hint=hint)
    try:
        return unify(schema, other)
    except Conflict as conflict:
        text = (
            f"column {conflict.name!r} of the Ray Dataset is {conflict.then} in block {block}, and {conflict.first} in others"
        )
        raise DataError(text, hint=hint) from None


def _some_at_once(task: Any, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """References to the answers of calls that ask for no CPU: Ray would start a process for each, so many at once as there are
    CPUs.
    """
    remote = ray.remote(task).options(num_cpus=0)
    most = max(2, int(ray.cluster_resources().get("CPU", 0)))
    answers: list[Any] = []
    under_way: list[Any] = []
    for arguments in calls:
        if len(under_way) >= most:
            _, under_way = ray.wait(under_way, num_returns=1, fetch_local=False)
        answers.append(remote.remote(*arguments))
        under_way.append(answers[-1])
    return answers


def _look(table: pa.Table) -> tuple[int, int, str, pa.Schema]:
    """(rows, bytes, digest of the content, schema)"""
    digest = hashlib.blake2b(digest_size=12)
    for batch in table.combine_chunks().to_batches():
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        digest.update(sink.getvalue())
    return table.num_rows, table.nbytes, digest.hexdigest(), _ours(table.slice(0, 0)).schema


def _ours(table: pa.Table) -> pa.Table:
    """The same rows, with tensors of Ray's types as tensors of ours."""
    for i, field in enumerate(table.schema):
        name = getattr(field.type, "extension_name", "")
        if name not in _FIXED + _RAGGED:
            continue
        if _holds_texts(field.type):
            table = table.set_column(i, field.name, _lists_of_texts(table.column(i)))
            continue
        if name in _FIXED:
            value, shape = field.type.storage_type.value_type, tuple(field.type.shape)
            storage, tensor = pa.list_(value, math.prod(shape)), pa.fixed_shape_tensor(value, shape)
        else:
            tensor = ragged_type(field.type.storage_type.field("data").type.value_type)
            storage = tensor.storage_type
        chunks = [pa.ExtensionArray.from_storage(tensor, chunk.storage.cast(storage)) for chunk in table.column(i).chunks]
        table = table.set_column(i, field.with_type(tensor), pa.chunked_array(chunks, tensor))
    return table


def _holds_texts(type: Any) -> bool:
    """Ray keeps NumPy's texts as the bytes of their memory."""
    stored = type.storage_type
    value = stored.field("data").type.value_type if pa.types.is_struct(stored) else stored.value_type
    return pa.types.is_fixed_size_binary(value)


def _lists_of_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """As nested lists, a level for each dimension. Raises DataError for tensors of several shapes."""
    shape = getattr(column.type, "shape", None)
    if shape is None:
        raise DataError("texts in arrays of several shapes can't be read from a Ray Dataset", hint="make lists of them first")
    type: pa.DataType = pa.string()
    for _ in shape:
        type = pa.list_(type)
    chunks = [pa.array(chunk.to_numpy(zero_copy_only=False).tolist(), type) for chunk in column.chunks]
    return pa.chunked_array(chunks, type)


def from_ray_dataset(dataset: Any) -> RayTables:
    """The source of a ray.data.Dataset, which is executed for it."""
    return RayTables(dataset.to_arrow_refs())


def to_ray_dataset(blocks: Sequence[RefBlock], schema: pa.Schema) -> Any:
    """A ray.data.Dataset of these blocks; of no rows and this schema, where there are none."""
    import ray.data as data

    refs = _some_at_once(_as_table, [(block.ref, block.start, block.num_rows) for block in blocks])
    return _of_refs(refs) if refs else data.from_arrow(_rays(_no_rows(schema)))


def _of_refs(refs: list[Any]) -> Any:
    """As `ray.data.from_arrow_refs`, whose tasks ask for a CPU each: this program may hold all there are, and wait here before
    it gives any back. Ray has no public way to say so; where its parts are others than these it has to do.
    """
    parts: Any = importlib.import_module("ray.data.read_api")
    try:
        metadata = ray.get(_some_at_once(parts.get_table_block_metadata_schema, [(ref,) for ref in refs]))
        stats = parts.DatasetStats(metadata={"FromArrow": metadata}, parent=None)
        context = parts.DataContext.get_current().copy()
        return parts.MaterializedDataset(parts.LogicalPlan(parts.FromArrow(refs, metadata), context), context, stats)
    except (AttributeError, TypeError):
        return parts.from_arrow_refs(refs)


def _no_rows(schema: pa.Schema) -> pa.Table:
    """`pa.Schema.empty_table` can't make tensors whose dimensions are permuted."""
    columns = [
        f.type.wrap_array(_none(f.type)) if isinstance(f.type, pa.BaseExtensionType) else pa.array([], f.type) for f in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _as_table(batch: pa.RecordBatch, start: int, rows: int) -> pa.Table:
    return _rays(pa.Table.from_batches([batch.slice(start, rows)]))


def _rays(table: pa.Table) -> pa.Table:
    """The same rows, at most one chunk a column, with tensors as Ray can read them: numbers of one shape as they are; bools of
    one shape, and tensors of several, as Ray's own types. Tensors with nulls among them are of several shapes, too: a null is
    None, and in a NumPy batch, where Ray has no nulls, a tensor without elements.
    """
    for i, field in enumerate(table.schema):
        if not is_ragged(field.type) and not is_tensor(field.type):
            continue
        column = pa.concat_arrays(table.column(i).chunks) if table.num_rows else field.type.wrap_array(_none(field.type))
        if is_ragged(field.type):
            made = _of_shapes(list(ragged_to_numpy(column)), field.type.value_type)
        elif column.null_count:
            made = _of_shapes(list(tensor_to_numpy(column)), field.type.value_type)
        elif pa.types.is_boolean(field.type.value_type):
            from ray.data.extensions import ArrowTensorArray

            made = ArrowTensorArray.from_numpy(tensor_to_numpy(column))
        else:
            continue
        table = table.set_column(i, field.with_type(made.type), made)
    return table


def _none(type: Any) -> pa.Array:
    """The storage of no rows."""
    return pa.array([], type.storage_type)


def _of_shapes(rows: Sequence[Any], value_type: pa.DataType) -> pa.Array:
    """Arrays as tensors of Ray's type for several shapes; None for null. It names a number of dimensions: the most of any."""
    from ray.data.extensions import ArrowVariableShapedTensorType

    dimensions = max((row.ndim for row in rows if row is not None), default=1)
    nothing = np.empty((0,) * dimensions, value_type.to_pandas_dtype())
    storage = ragged_to_array([nothing if row is None else row for row in rows], value_type).storage
    type = ArrowVariableShapedTensorType(value_type, dimensions)
    parts = [storage.field(f.name).cast(f.type) for f in type.storage_type]
    mask = pa.array([row is None for row in rows], pa.bool_())
    return type.wrap_array(pa.StructArray.from_arrays(parts, fields=list(type.storage_type), mask=mask))
