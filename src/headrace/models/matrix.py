"""Columns as what libraries for tables take: a matrix of features, or a pandas frame.

Here too: which columns of a batch are a model's features, in which order. What must not live here: any one library's names.

| column | in a matrix |
|---|---|
| integers, floats, booleans, decimals, dictionaries of these | a column, in the order asked for |
| null | NaN |
| lists and tensors, one column alone | the matrix itself, a row each; tensors of more dimensions row-major |
| timestamps, texts and all else | refused |

Invariants: values are copied at most once, and not at all where a column's memory has the matrix's layout (the matrix is
then read-only); nothing depends on how rows were cut into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from headrace.core.errors import DataError, PlanError
from headrace.core.tensors import is_tensor, vector_to_numpy
from headrace.models.base import check_columns

Batch: TypeAlias = "pa.Table | pa.RecordBatch | pa.Array | pa.ChunkedArray"  # an array: the one column of predict(input="x")
Matrix: TypeAlias = "np.ndarray[Any, Any]"

NUMBERS = "numbers or booleans, or one column of lists or tensors"


# --- types -----------------------------------------------------------------------------------------------------------


def is_number(type: pa.DataType) -> bool:
    """Whether a column of it makes a column of a matrix."""
    if pa.types.is_dictionary(type):
        return is_number(type.value_type)
    t = pa.types
    return t.is_integer(type) or t.is_floating(type) or t.is_boolean(type) or t.is_decimal(type) or t.is_null(type)


def is_vector(type: pa.DataType) -> bool:
    """Whether a column of it is a matrix by itself."""
    if is_tensor(type):
        return is_number(type.value_type)
    t = pa.types
    return (t.is_list(type) or t.is_large_list(type) or t.is_fixed_size_list(type)) and is_number(type.value_type)


def is_text(type: pa.DataType) -> bool:
    t = pa.types
    return t.is_string(type) or t.is_large_string(type) or t.is_string_view(type)


def is_category(type: pa.DataType) -> bool:
    """Texts, or a dictionary: values that a model may know by name."""
    return is_text(type) or pa.types.is_dictionary(type)


def is_feature(type: pa.DataType) -> bool:
    """Numbers, or categories."""
    return is_number(type) or is_category(type)


def _width(type: pa.DataType) -> int | None:
    """How many features a row of a vector column has, where the type tells."""
    if is_tensor(type):
        return int(np.prod(type.shape))  # type: ignore[attr-defined]
    return type.list_size if pa.types.is_fixed_size_list(type) else None


# --- which columns ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Features:
    """What a model says of its inputs. names: in its order, None when it has none. count: None when it does not tell."""

    names: tuple[str, ...] | None = None
    count: int | None = None

    def columns(
        self,
        who: str,
        schema: pa.Schema,
        inputs: Sequence[str],
        accepts: Callable[[pa.DataType], bool] = is_number,
        wanted: str = NUMBERS,
    ) -> tuple[str, ...]:
        """The columns that make the matrix, in the model's order: by its names, else as declared.

        who: the adapter's name. inputs: as declared; () takes the model's names, or all columns. accepts, wanted: as in
        check_columns. Raises PlanError for columns that are missing, too many or of the wrong type.
        """
        given = tuple(inputs) or self.names or tuple(schema.names)
        if len(given) == 1 and given[0] in schema.names and is_vector(schema.field(given[0]).type):
            self._check_width(who, given[0], schema.field(given[0]).type)
            return given
        self.check_names(who, given)
        ordered = self.names or given
        check_columns(who, schema, ordered, accepts, wanted)
        return ordered

    def check_names(self, who: str, given: Sequence[str]) -> None:
        """Raise PlanError unless these are the model's features, in any order."""
        names = self.names
        if names is not None:
            missing = [n for n in names if n not in given]
            unknown = [n for n in given if n not in names]
            if missing:
                hint = f"the model's features are {_listed(names)}: name them in input=[...], or leave input out"
                raise PlanError(f"{who} was trained with {_listed(missing)}, which the input lacks", hint=hint)
            if unknown:
                hint = f"the model's features are {_listed(names)}"
                raise PlanError(f"{who} does not know the feature {_listed(unknown)}", hint=hint)
        elif self.count is not None and len(given) != self.count:
            hint = "name the features in the order of the training data: input=[...]"
            raise PlanError(f"{who} was trained with {self.count} features, and the input has {len(given)} columns", hint=hint)

    def _check_width(self, who: str, column: str, type: pa.DataType) -> None:
        width, count = _width(type), len(self.names) if self.names is not None else self.count
        if width is not None and count is not None and width != count:
            text = f"{who} was trained with {count} features, and a row of {column!r} ({type}) has {width}"
            raise PlanError(text, hint="give the features that the model was trained with")


class Selection:
    """The model's columns of each batch; how they are found is remembered for the last schema.

    Raises DataError for what only running told: by now nothing is planned any more.
    """

    def __init__(self, inputs: Sequence[str], choose: Callable[[pa.Schema], tuple[str, ...]]) -> None:
        self._inputs = tuple(inputs)
        self._choose = choose
        self._schema: pa.Schema | None = None
        self._columns: tuple[str, ...] = ()

    def __call__(self, batch: Batch) -> tuple[list[pa.Array], tuple[str, ...]]:
        """(the columns, their names)."""
        named = _named(batch, self._inputs)
        schema = named.schema
        if self._schema is None or not schema.equals(self._schema):
            try:
                self._columns = self._choose(schema)
            except PlanError as error:
                raise DataError(error.message, where=error.where, hint=error.hint) from None
            self._schema = schema
        return [_one(named.column(name)) for name in self._columns], self._columns


def _named(batch: Batch, inputs: Sequence[str]) -> pa.Table | pa.RecordBatch:
    if isinstance(batch, pa.Table | pa.RecordBatch):
        return batch
    name = inputs[0] if inputs else "column"
    return pa.table({name: batch})


def _one(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(column, pa.Array):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.nulls(0, column.type)


def _listed(names: Sequence[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


# --- matrices --------------------------------------------------------------------------------------------------------


def common_dtype(columns: Sequence[pa.Array]) -> Any:
    """float32 when all columns are of that precision at most, else float64: no value loses digits that a float64 holds."""
    small = all(_value_type(c.type).id in _FIT_FLOAT32 for c in columns)
    return np.dtype(np.float32 if small and columns else np.float64)


_FIT_FLOAT32 = frozenset(t.id for t in (pa.float32(), pa.float16()))


def _value_type(type: pa.DataType) -> pa.DataType:
    while is_tensor(type) or hasattr(type, "value_type"):
        type = type.value_type
    return type


def to_matrix(columns: Sequence[pa.Array], dtype: Any = None, names: Sequence[str] = ()) -> Matrix:
    """The columns as (rows, features), row-major; NaN for null. One column of lists or tensors is the matrix itself.

    dtype: None for common_dtype. names: of the columns, for errors. Read-only where it is a column's own memory. Raises
    DataError for lists that differ in length, and for nulls where dtype is not one of floats.
    """
    dtype = common_dtype(columns) if dtype is None else np.dtype(dtype)
    if len(columns) == 1:
        only = columns[0]
        if is_vector(only.type):
            return _vectors(only, dtype, names[0] if names else "")
        return _vector(only, dtype, names[0] if names else "").reshape(-1, 1)
    rows = len(columns[0]) if columns else 0
    out = np.empty((rows, len(columns)), dtype)
    vectors = [_values(c) for c in columns]
    with np.errstate(over="ignore", invalid="ignore"):  # what a float32 can't hold is infinite, as in the libraries themselves
        for j, (values, _) in enumerate(vectors):
            out[:, j] = values
    for j, (_, nulls) in enumerate(vectors):
        if nulls is not None:
            out[nulls, j] = _null(dtype, names[j] if names else "")
    return out


def _values(column: pa.Array) -> tuple[Matrix, Matrix | None]:
    """(numbers, which of them are null and mean nothing)."""
    type = column.type
    if pa.types.is_dictionary(type):
        return _values(column.dictionary_decode())
    if pa.types.is_null(type):
        return np.full(len(column), np.nan), None
    if pa.types.is_decimal(type):
        column = column.cast(pa.float64())
    elif pa.types.is_boolean(type):
        column = column.cast(pa.uint8())
    if not column.null_count:
        return vector_to_numpy(column), None
    known = pa.Array.from_buffers(column.type, len(column), [None, column.buffers()[1]], 0, column.offset)
    return vector_to_numpy(known), vector_to_numpy(column.is_null())


def _null(dtype: Any, name: str) -> float:
    """What stands for null. Raises DataError where nothing does."""
    if dtype.kind == "f":
        return np.nan
    hint = "fill them before, or leave the rows out"
    raise DataError(f"there are nulls in column {name!r}, which the model takes as {dtype}", hint=hint)


def _vector(column: pa.Array, dtype: Any, name: str) -> Matrix:
    """One column of numbers, a view of its memory where it is of this dtype."""
    values, nulls = _values(column)
    if nulls is None and values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        out = values.astype(dtype)
    if nulls is not None:
        out[nulls] = _null(dtype, name)
    return out


def _vectors(column: pa.Array, dtype: Any, name: str) -> Matrix:
    """A column of lists or tensors as (rows, size); a row that is null is all NaN."""
    if column.null_count:
        known = _vectors(column.drop_null(), dtype, name)
        out = np.full((len(column), known.shape[1]), _null(dtype, name), dtype)
        out[vector_to_numpy(column.is_valid())] = known
        return out
    rows = len(column)
    if is_tensor(column.type):
        permutation = column.type.permutation
        if permutation is not None and list(permutation) != sorted(permutation):
            return np.ascontiguousarray(column.to_numpy_ndarray(), dtype).reshape(rows, -1)
        column = column.storage
    if pa.types.is_fixed_size_list(column.type):
        size = column.type.list_size
        flat = column.values.slice(column.offset * size, rows * size)
    else:
        size, flat = _list_size(column, name), column.flatten()
    return _vector(flat, dtype, name).reshape(rows, size)


def _list_size(column: pa.Array, name: str) -> int:
    """The one length of all lists."""
    sizes = np.unique(vector_to_numpy(column.value_lengths()))
    if len(sizes) > 1:
        hint = "give every row as many features as the model was trained with"
        raise DataError(f"the lists in column {name!r} differ in length: from {sizes[0]} to {sizes[-1]}", hint=hint)
    return int(sizes[0]) if len(sizes) else 0


# --- frames ----------------------------------------------------------------------------------------------------------


def is_of_kind(type: pa.DataType, categories: pa.Array) -> bool:
    """May values of this type be among the categories? Texts among texts, numbers among numbers."""
    type = type.value_type if pa.types.is_dictionary(type) else type
    return pa.types.is_null(type) or is_text(type) == is_text(categories.type)


def codes(column: pa.Array, categories: pa.Array) -> pa.Array:
    """The position of each value among a model's categories, as int32; null for null and for what is none of them.

    Values are compared as the categories' type. Raises DataError where they are not of its kind.
    """
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        return codes(column.dictionary, categories).take(column.indices)
    try:
        return pc.call_function("index_in", [column.cast(categories.type)], pc.SetLookupOptions(value_set=categories))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        text = f"values of type {column.type} are no categories of type {categories.type}: {error}"
        raise DataError(text, hint="cast the column to the type that the model was trained with") from None


def to_frame(columns: Sequence[pa.Array], names: Sequence[str]) -> Any:
    """A pandas frame of the columns as pandas.read_parquet would give them: integers with nulls as floats, dictionaries as
    categories, texts as pandas' own type of texts; but decimals as floats.
    """
    floats = [c.cast(pa.float64()) if pa.types.is_decimal(c.type) else c for c in columns]
    return pa.table(list(floats), names=list(names)).to_pandas()
