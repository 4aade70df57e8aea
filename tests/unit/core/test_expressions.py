"""What an expression reads, and which rows it keeps."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from headrace.core.expressions import columns_of, passing

ROWS = pa.record_batch(
    {
        "x": [1, 2, 3],
        "xx": [3, 2, 1],
        "a b": ["one", "two", "three"],
        's"': [{"x": 1, "y": {"z": 5}}, {"x": 2, "y": {"z": 6}}, {"x": 3, "y": None}],
        "é": [0.5, None, 1.5],
    }
)


@pytest.mark.parametrize(
    ("expression", "columns", "rows"),
    [
        (pc.field("xx") > 1, ("xx",), [0, 1]),
        (pc.field("x") == pc.field("xx"), ("x", "xx"), [1]),
        (pc.field("a b") == "x", ("a b",), []),
        (pc.field('s"', "x") == 2, ('s"',), [1]),
        (pc.field('s"', "y", "z") == 5, ('s"',), [0]),
        (pc.field(('s"', 0)) > 2, ('s"',), [2]),
        (pc.field("é").is_valid() & pc.field("x").isin([3, *range(10, 1000)]), ("x", "é"), [2]),
        (pc.if_else(pc.field("x") > 1, pc.field("é"), 9.0) > 1, ("x", "é"), [0, 2]),
        (pc.field("a b") == "FieldPath(0)", ("a b",), []),
        (pc.scalar(True), (), [0, 1, 2]),
    ],
)
def test_columns_and_rows(expression: Any, columns: tuple[str, ...], rows: list[int]) -> None:
    assert columns_of(expression, ROWS.schema) == columns
    assert passing(ROWS, expression).to_pylist() == rows


@pytest.mark.parametrize("field", [0, (0,), (3, 0), (3, "x")])
def test_a_column_given_by_its_number_is_refused(field: Any) -> None:
    for found_in in (lambda e: passing(ROWS, e), lambda e: columns_of(e, ROWS.schema)):
        with pytest.raises(pa.ArrowInvalid, match="by its number"):
            found_in(pc.field(field) == 1)


@pytest.mark.parametrize("name", ["FieldPath(0)", "a (FieldPath(12) b"])
def test_a_column_may_be_named_like_a_number(name: str) -> None:
    batch = ROWS.append_column(name, pa.array([7, 8, 9]))
    expression = (pc.field(name) > 7) & (pc.field("x") < 3)
    assert columns_of(expression, batch.schema) == ("x", name)
    assert passing(batch, expression).to_pylist() == [1]
    with pytest.raises(pa.ArrowInvalid, match="by its number"):
        columns_of(expression & (pc.field(1) > 0), batch.schema)


def test_a_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(pa.ArrowInvalid, match="nope"):
        columns_of(pc.field("x") + pc.field("nope") > 1, ROWS.schema)


def test_only_columns_that_the_expression_names_are_given_to_arrow() -> None:
    """Arrow can't filter this type, and its plans cost time by the column."""
    batch = ROWS.append_column("other", pa.array(["a", "b", "c"], pa.string_view()))
    assert columns_of(pc.field("x") > 1, batch.schema) == ("x",)
    assert passing(batch, pc.field("x") > 1).to_pylist() == [1, 2]
