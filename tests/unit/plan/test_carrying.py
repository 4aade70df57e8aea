"""Which columns a sink takes from the input, and which of them nobody needs to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.connectors.sinks.parquet import ParquetSink
from headrace.connectors.sources.parquet import ParquetSource
from headrace.core.carried import Carried
from headrace.plan.columns import ALL
from headrace.plan.nodes import Limit, MapRows, Op, Plan, Predict, Project, Read, UserFunction, Write
from headrace.plan.rules.carrying import carry_stored


class Taking(ParquetSink):
    """Takes all columns but those named "odd"."""

    def carries(self, source: Any, columns: Sequence[str]) -> frozenset[str]:
        return frozenset(columns) - {"odd"}


@pytest.fixture
def source(tmp_path: Path) -> ParquetSource:
    pq.write_table(pa.table({name: [1] for name in ("a", "b", "c", "odd")}), tmp_path / "in.parquet")
    return ParquetSource(tmp_path / "in.parquet")


def model(inputs: tuple[str, ...], *output: str) -> Predict:
    return Predict(UserFunction(len), inputs, single=False, output=output)


def carry(source: ParquetSource, *ops: Op, leave: bool = True, sink: Any = None) -> tuple[Plan, Carried | None, list[str]]:
    notes: list[str] = []
    plan = Plan(Read(source), ops, Write(sink or Taking("/out")))
    return *carry_stored(plan, ALL, notes, leave=leave), notes


def left(plan: Plan) -> frozenset[str]:
    source: Any = plan.read.source
    return source._left


def test_names_are_followed_through_projections(source: ParquetSource) -> None:
    swap = Project((("b", "a"), ("a", "b"), ("odd", "odd"), ("c", "c")))
    plan, carried, notes = carry(
        source, swap, model(("a",), "p"), Project((("x", "b"), ("p", "p"), ("y", "b"), ("odd", "odd")))
    )
    assert carried == Carried(("x", "p", "y", "odd"), {"x": "a", "y": "a"})
    assert left(plan) == {"a"}  # the model's "a" is the input's "b"
    assert [op.left for op in plan.ops if isinstance(op, Project)] == [{"a"}, {"b"}]
    assert "2 of 4 columns are copied encoded" in notes[0]
    assert "1 of them are only checked" in notes[0]


def test_a_replaced_column_is_not_carried(source: ParquetSource) -> None:
    plan, carried, _ = carry(source, model(("a",), "b"))
    assert carried == Carried(("a", "b", "c", "odd"), {"a": "a", "c": "c"})
    assert left(plan) == {"c"}


def test_what_is_read_later_is_read(source: ParquetSource) -> None:
    plan, _, _ = carry(source, Project((("k", "a"), ("b", "b"))), model(("k",), "p"))
    assert left(plan) == {"b"}
    plan, carried, _ = carry(source, model((), "p"))  # a model of all columns
    assert carried is not None
    assert left(plan) == frozenset()


def test_nothing_is_left_where_rows_may_be_set_aside(source: ParquetSource) -> None:
    plan, carried, notes = carry(source, model(("a",), "p"), leave=False)
    assert carried == Carried(("a", "b", "c", "odd", "p"), {"a": "a", "b": "b", "c": "c"})
    assert left(plan) == frozenset()
    assert "only checked" not in notes[0]


@pytest.mark.parametrize("op", [Limit(3), MapRows(UserFunction(len)), Predict(UserFunction(len), ("a",), False, ())])
def test_plans_whose_rows_or_columns_may_change_carry_nothing(source: ParquetSource, op: Op) -> None:
    plan, carried, notes = carry(source, op)
    assert (plan.ops, carried, notes) == ((op,), None, [])


def test_a_sink_that_takes_nothing(source: ParquetSource) -> None:
    assert carry(source, sink=ParquetSink("/out"))[1] is None  # the file is too small to be worth it
