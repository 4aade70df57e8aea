"""What a model answered: put into columns with names, and checked.

Invariant: a model that does not answer one row for one row is refused before any of its answers is used. Of a batch of one row
the dimension of rows may be missing, as `squeeze()` takes it away, where it can be told what the row's own dimensions are.
Where it can't, that ends the run: which batches have one row, and what was seen before, are no row's doing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
from msgspec import Struct, field

from headrace.core.errors import HeadraceError, PlanError
from headrace.core.extras import is_instance
from headrace.core.refs import Origin
from headrace.core.tensors import is_tensor
from headrace.plan.nodes import DEFAULT_OUTPUT, Predict
from headrace.worker.bad_rows import Lost
from headrace.worker.batching import Piece
from headrace.worker.casting import concat
from headrace.worker.declared import Declared
from headrace.worker.formats import Given
from headrace.worker.refused import BrokenModel, Refused
from headrace.worker.results import columns_of, make_batch, named_column
from headrace.worker.user_code import explain
from headrace.worker.watch import NOBODY, Watch

_ROWS_HINT = "a model answers every row, in the order given; to drop or add rows use map_batches"
_SQUEEZE_HINT = "; squeeze() takes the dimension of rows from a batch of one: name the dimension, as in squeeze(-1)"


class Answer(Struct):
    """The output columns of the next `rows` rows of an input. lost: those of them that failed, by position; `made` lacks them.

    input: its index. made: None when all are lost. failed: rows that failed and have nulls in `made`; why: one such failure.
    """

    input: int
    rows: int
    made: pa.RecordBatch | None
    lost: list[Lost] = field(default_factory=list[Lost])
    failed: int = 0
    why: str = ""


class ModelRunner:
    """A model in one worker. wanted_rows: how many rows are worth a call. step_rows: how many are worth gathering for a step;
    0: as many as were planned.
    """

    wanted_rows: int
    step_rows: int = 0

    def run(
        self,
        inputs: Sequence[pa.RecordBatch],
        origins: Sequence[Origin],
        part_bytes: int | None = None,
        watch: Watch = NOBODY,
        whole: pa.RecordBatch | None = None,
    ) -> Iterator[Answer]:
        """The outputs of all inputs in order. part_bytes: an input's outputs come in parts of about this size, rather
        than whole. inputs: only what the model reads, at least one row each. whole: all of them, if they are slices of one.
        """
        raise NotImplementedError

    def begin(
        self, inputs: Sequence[pa.RecordBatch], origins: Sequence[Origin], watch: Watch, ready: Callable[[], None]
    ) -> bool:
        """Start on these rows beside others, if the model can: `ready` is called, from any thread, once `run` with the same
        arguments does not wait. False: nothing was done, and `run` does it all.
        """
        return False

    def close(self) -> None: ...


def join_columns(parts: Sequence[pa.RecordBatch], op: str, origin: Origin) -> pa.RecordBatch:
    """Answers to consecutive rows as one. Raises HeadraceError when their names, or kinds of types, differ."""
    if len(parts) == 1:
        return parts[0]
    names = parts[0].schema.names
    for part in parts:
        if part.schema.names != names:
            refused = Refused(f"returned columns {part.schema.names} after {names}", "return the same columns every time")
            raise explain(refused, op, origin)
    return concat(parts, origin.label)


def blame(exc: BaseException, op: Predict, piece: Piece, row: int | None = None) -> HeadraceError:
    row = exc.row if row is None and isinstance(exc, Refused) else row
    return explain(exc, op.name, piece.origin, row=row, columns=piece.batch.schema.names)


def name_outputs(
    op: Predict, result: Any, rows: int, given: Given, shared: bool, like: pa.Schema | None = None
) -> pa.RecordBatch:
    """The output columns of a model's answer to `rows` rows. like: of other answers of the model, if known. Raises Refused,
    and BrokenModel for what may be one row without the dimension of rows.
    """
    columns = _named(op, _unsqueezed(op, result, like) if rows == 1 else result, given, shared)
    for name, column in columns.items():
        if len(column) != rows:
            what = f"{len(column)} rows" if len(columns) == 1 else f"{len(column)} rows in column {name!r}"
            given_rows = "1 row" if rows == 1 else f"{rows} rows"
            squeezed = rows == 1 < len(column) and (isinstance(result, Mapping) or not _has_names(result))
            squeezed = squeezed and not _is_single(like, name)
            kind = BrokenModel if squeezed else Refused
            raise kind(f"was given {given_rows} and returned {what}", _ROWS_HINT + _SQUEEZE_HINT if squeezed else _ROWS_HINT)
    return Declared(op.types).apply(make_batch(columns, rows))


def _named(op: Predict, result: Any, given: Given, shared: bool) -> dict[str, pa.Array]:
    names = op.output
    if _has_names(result):
        columns = columns_of(result, given, shared)
        missing = [n for n in names if n not in columns]
        if missing:
            raise Refused(
                f"returned columns {list(columns)}, but output names {list(names)}",
                "make the model's keys and predict(output=...) agree, or leave output out to take all keys",
            )
        return {n: columns[n] for n in names} if names else columns
    if result is None:
        raise Refused("returned None", "return an array with one value a row; is a return statement missing?")
    if not names and op.keeps_default:
        text = f"{op.name} answers without a name for its column, and {DEFAULT_OUTPUT!r} is a column already"
        raise PlanError(text, hint="name it with output=, or drop the column before")
    names = names or (DEFAULT_OUTPUT,)
    values = result if isinstance(result, tuple) and len(result) == len(names) else None
    if len(names) == 1:
        value = values[0] if values is not None and hasattr(values[0], "__len__") else result
        return {names[0]: named_column(names[0], value, given, shared)}
    if values is None:
        raise Refused(
            f"returned a {type(result).__name__} for the {len(names)} columns {list(names)}",
            f"return a dict with these keys, or a tuple of {len(names)} arrays",
        )
    return {n: named_column(n, v, given, True) for n, v in zip(names, values, strict=True)}


def _unsqueezed(op: Predict, result: Any, like: pa.Schema | None) -> Any:
    """The answer to a batch of one row, with the dimension of rows where that is missing."""
    types: dict[Any, pa.DataType] = {} if like is None else {field.name: field.type for field in like}
    if isinstance(result, Mapping):
        answer = cast(Mapping[Any, Any], result)
        return {name: _row_of_one(value, types.get(name)) for name, value in answer.items()}
    names = op.output or (DEFAULT_OUTPUT,)
    if isinstance(result, tuple) and len(cast(tuple[Any, ...], result)) == len(names):
        return tuple(_row_of_one(value, types.get(name)) for name, value in zip(names, result, strict=True))
    return _row_of_one(result, types.get(names[0])) if len(names) == 1 else result


def _is_single(like: pa.Schema | None, name: str) -> bool:
    """Is a row of this column a single value, so that nothing can be squeezed away but the rows?"""
    if like is None or like.get_field_index(name) < 0:
        return False
    type = like.field(name).type
    return not (is_tensor(type) or pa.types.is_nested(type))


def _row_of_one(value: Any, type: pa.DataType | None) -> Any:
    """A single value, or what has just the shape of a row of this type, as a column of one row; all else as it is."""
    if isinstance(value, (np.generic, bool, int, float)):
        return np.asarray(value).reshape(1) if isinstance(value, np.generic) else [value]
    if not (isinstance(value, np.ndarray) or is_instance(value, "torch", "Tensor")):
        return value
    shape = tuple(value.shape)
    bare = type is not None and is_tensor(type) and shape == tuple(type.shape) and shape[0] > 1
    return value[None] if not shape or bare else value


def _has_names(result: Any) -> bool:
    if isinstance(result, (Mapping, pa.Table, pa.RecordBatch)):
        return True
    return is_instance(result, "pandas", "DataFrame")
