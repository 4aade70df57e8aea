"""Accumulator: a mergeable metric computed in the pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import pyarrow as pa


@runtime_checkable
class Accumulator(Protocol):
    """A description (columns and parameters, immutable, picklable) that works on states.

    A state is JSON-able (dicts, lists, ints, floats, strings), so that it can ride in a receipt without pickle.
    merge is associative and commutative: any order of any grouping of rows gives the same result, up to nothing
    (exact sums, integer bins).
    """

    @property
    def columns(self) -> tuple[str, ...]: ...

    def zero(self) -> Any:
        """The state of no rows."""
        ...

    def update(self, state: Any, batch: pa.RecordBatch) -> Any:
        """The state with the rows of `batch` (only `columns`) added; may change `state` in place."""
        ...

    def merge(self, a: Any, b: Any) -> Any:
        """The state of the rows of both; may change `a`, never `b`."""
        ...

    def result(self, state: Any) -> Any:
        """What the user reads: a number, or a dict of numbers. JSON-able; NaN becomes None in a manifest."""
        ...
