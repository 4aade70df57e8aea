"""Transform: a row-preserving function of named columns that Headrace itself ships (image decoding and the like)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import pyarrow as pa


@runtime_checkable
class Transform(Protocol):
    """Picklable. Pure: the same input gives the same output, rows are independent.

    columns_in: what it reads. columns_out: what it adds or replaces.
    row_bytes: rough size of one output row, for cutting blocks; None when unknown.
    """

    @property
    def name(self) -> str: ...

    @property
    def columns_in(self) -> tuple[str, ...]: ...

    @property
    def columns_out(self) -> tuple[str, ...]: ...

    @property
    def row_bytes(self) -> int | None: ...

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """batch: only `columns_in`. Returns only `columns_out`, as many rows. Raises DataError; when one row is to blame,
        with ("row", str(index within the batch)) in `where`.
        """
        ...

    def schema(self, schema: pa.Schema) -> pa.Schema:
        """The schema of `columns_out`, given that of `columns_in`. Raises PlanError for a type it can't take."""
        ...
