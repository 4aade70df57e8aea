"""The schemas of results without rows."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

import headrace as hr
from headrace.api.planning import resolve
from headrace.plan.schemas import rowless_schema, static_schema

SCHEMA = pa.schema([("a", pa.int64()), ("t", pa.string())])
NULL = pa.null()


def model(batch: Any) -> Any:
    raise AssertionError("never called")


def some() -> hr.Dataset:
    return hr.from_arrow(SCHEMA.empty_table())


CASES = {
    "outputs are named": (lambda: some().predict(model, output="p"), [*SCHEMA, ("p", NULL)]),
    "an output replaces": (lambda: some().predict(model, output="a"), [("a", NULL), SCHEMA.field("t")]),
    "outputs may not be": (lambda: some().predict(model), list(SCHEMA)),
    "types are declared": (lambda: some().predict(model, output={"p": "float32"}), [*SCHEMA, ("p", pa.float32())]),
    "a function keeps names": (lambda: some().map(model), [("a", NULL), ("t", NULL)]),
    "a function that declares": (lambda: some().map(model).map_batches(model, schema={"x": "int8"}), [("x", pa.int8())]),
    "what a step names was there": (
        lambda: some().map(model).predict(model, input="x", output="p"),
        [("a", NULL), ("t", NULL), ("x", NULL), ("p", NULL)],
    ),
    "selected": (lambda: some().map(model).select("x", "a"), [("x", NULL), ("a", NULL)]),
    "dropped, renamed": (lambda: some().map(model).drop("a").rename({"x": "t"}), [("t", NULL)]),
    "decoded from what is not known": (
        lambda: some().map(model).apply(hr.images.decode("x", output="image")),
        [("a", NULL), ("t", NULL), ("x", NULL), ("image", NULL)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_without_rows(case: str) -> None:
    make, expected = CASES[case]
    ops = resolve(make()._plan).ops
    assert rowless_schema(SCHEMA, ops) == pa.schema(expected)
    static = static_schema(SCHEMA, ops)
    assert static is None or static == pa.schema(expected)
