"""Where plans are cut."""

from __future__ import annotations

import pytest

from headrace.core.resources import CPU_POOL
from headrace.core.stages import End, Order
from headrace.plan.nodes import (
    Evaluate,
    FilterExpr,
    FilterRows,
    FlatMap,
    Limit,
    MapBatches,
    MapRows,
    Plan,
    Predict,
    Project,
    Read,
    UserFunction,
    Write,
)
from headrace.plan.physical import ALIGN_MAX_ROWS, PhysicalPlan, make_physical


class _Source:
    name = "fake"
    remote = False


class _Sink:
    name = "fake"
    per_input = False


def work(*_: object) -> None: ...


FN = UserFunction(work)
DEVICE = Predict(FN, ("image",), True, ("p",), device="sim")
CPU = Predict(FN, ("image",), True, ("p",), device="cpu")


def cut(*ops: object, delivers: bool = False, at_end: object = None) -> PhysicalPlan:
    write = None if delivers else Write(_Sink())  # type: ignore[arg-type]
    plan = Plan(Read(_Source()), tuple(ops), write)  # type: ignore[arg-type]
    more = {} if at_end is None else {"at_end": at_end}
    return make_physical(
        plan,
        delivers=delivers,
        pool_of=lambda op: CPU_POOL if op.device == "cpu" else op.device,
        **more,  # type: ignore[arg-type]
    )


def shape(physical: PhysicalPlan, route: str) -> list[tuple[int, int, Order, End, str]]:
    chosen = next(r for r in physical.routes if r.name == route)
    stages = [physical.stages[i] for i in chosen.stages]
    return [(s.first, s.stop, s.order, s.end, s.pool) for s in stages]


def cutting(physical: PhysicalPlan) -> dict[int, int]:
    """Operator whose batches an earlier stage cuts -> their rows."""
    return {s.stop: s.cut_rows for s in physical.stages if s.cut_rows is not None}


def test_a_plan_of_cpu_work_is_one_stage_when_fused() -> None:
    physical = cut(MapBatches(FN), CPU, Evaluate({}))
    assert shape(physical, "fused") == [(0, 3, Order.SOURCE, End.SINK, "cpu")]


def test_spread_reads_apart_and_leaves_light_work_to_the_writer() -> None:
    physical = cut(Project((("image", "image"),)), MapBatches(FN), CPU, Evaluate({}))
    assert shape(physical, "spread") == [
        (0, 1, Order.SOURCE, End.NEXT, "cpu"),
        (1, 3, Order.FREE, End.NEXT, "cpu"),
        (3, 4, Order.SPLIT, End.SINK, "cpu"),
    ]


def test_light_work_alone_has_one_route() -> None:
    physical = cut(Project((("a", "a"),)))
    assert [r.name for r in physical.routes] == ["fused"]


def test_a_device_model_is_a_stage_of_its_own_and_shared_by_routes() -> None:
    physical = cut(MapBatches(FN), DEVICE, Evaluate({}))
    fused, spread = shape(physical, "fused"), shape(physical, "spread")
    assert fused[0] == (0, 1, Order.SOURCE, End.NEXT, "cpu")
    assert fused[1:] == [(1, 2, Order.FREE, End.NEXT, "sim"), (2, 3, Order.SPLIT, End.SINK, "cpu")]
    assert spread[2:] == fused[1:]
    assert sum(s.model for s in physical.stages) == 1


def test_stage_ids_grow_along_every_route() -> None:
    model = Predict(FN, ("x",), True, ("q",), device="sim:1")
    physical = cut(
        MapRows(FN), DEVICE, MapBatches(FN, batch_rows=20), Limit(9), MapBatches(FN, batch_rows=7), model, Evaluate({})
    )
    for route in physical.routes:
        assert list(route.stages) == sorted(route.stages)


def test_batches_that_fit_blocks_stay_free_and_set_the_cut() -> None:
    physical = cut(MapBatches(FN, batch_rows=1000))
    assert physical.limits.rows_multiple == 1000
    assert shape(physical, "spread")[1][2] is Order.FREE


@pytest.mark.parametrize("before", [FilterRows(FN), FlatMap(FN), MapBatches(FN)])
def test_batches_after_a_change_of_rows_are_cut_in_sequence_and_computed_in_any_order(before: object) -> None:
    physical = cut(before, MapBatches(FN, batch_rows=1000), CPU)
    assert physical.limits.rows_multiple == 1
    assert shape(physical, "fused") == [(0, 3, Order.SOURCE, End.SINK, "cpu")]
    assert shape(physical, "spread") == [
        (0, 0, Order.SOURCE, End.NEXT, "cpu"),
        (0, 1, Order.FREE, End.NEXT, "cpu"),
        (1, 1, Order.SPLIT, End.NEXT, "cpu"),
        (1, 3, Order.FREE, End.NEXT, "cpu"),
        (3, 3, Order.SPLIT, End.SINK, "cpu"),
    ]
    assert cutting(physical) == {1: 1000}


def test_each_further_size_of_batches_is_cut_by_itself() -> None:
    physical = cut(*(MapBatches(FN, batch_rows=n) for n in (100, 64, 64)))
    assert physical.limits.rows_multiple == 100
    assert cutting(physical) == {1: 64, 2: 64}
    assert [s[2] for s in shape(physical, "spread")] == [
        *(Order.SOURCE, Order.FREE),
        *(Order.SPLIT, Order.FREE),
        *(Order.SPLIT, Order.FREE, Order.SPLIT),
    ]


@pytest.mark.parametrize(
    ("before", "rows"), [((), ALIGN_MAX_ROWS + 1), ((FilterExpr(None, ("x",)),), 64)], ids=["too large to align", "filter"]
)
def test_a_reader_cuts_batches_itself(before: tuple[object, ...], rows: int) -> None:
    physical = cut(*before, MapBatches(FN, batch_rows=rows))
    at = len(before)
    assert shape(physical, "spread") == [
        (0, at, Order.SOURCE, End.NEXT, "cpu"),
        (at, at + 1, Order.FREE, End.NEXT, "cpu"),
        (at + 1, at + 1, Order.SPLIT, End.SINK, "cpu"),
    ]
    assert cutting(physical) == {at: rows}


def test_after_a_model_the_function_runs_in_sequence_when_fused_and_in_any_order_when_spread() -> None:
    physical = cut(FilterRows(FN), DEVICE, MapBatches(FN, batch_rows=64))
    assert [s[2] for s in shape(physical, "fused")] == [Order.SOURCE, Order.FREE, Order.SPLIT]
    assert [s[2] for s in shape(physical, "spread")][2:] == [Order.FREE, Order.SPLIT, Order.FREE, Order.SPLIT]
    assert sum(s.model for s in physical.stages) == 1


def test_a_function_for_few_workers_is_one_stage_on_both_routes() -> None:
    physical = cut(FilterRows(FN), MapBatches(FN, batch_rows=64, max_workers=2))
    assert [(s.order, s.cut_rows) for s in physical.stages if s.max_workers] == [(Order.SPLIT, None)]
    assert cutting(physical) == {}


def test_batches_after_a_limit_are_cut_apart_from_it() -> None:
    physical = cut(MapBatches(FN), Limit(10), MapBatches(FN, batch_rows=64))
    assert sum(s.order is Order.GLOBAL for s in physical.stages) == 1
    assert cutting(physical) == {2: 64}


def test_a_limit_takes_splits_in_order_and_the_rest_is_free_again() -> None:
    physical = cut(Limit(10), MapBatches(FN))
    assert [s[2] for s in shape(physical, "fused")] == [Order.SOURCE, Order.GLOBAL, Order.FREE, Order.SPLIT]
    assert next(s for s in physical.stages if s.order is Order.GLOBAL).limit == 10


def test_a_limit_at_the_end_writes_by_itself() -> None:
    assert shape(cut(MapBatches(FN), Limit(10)), "fused")[-1] == (1, 2, Order.GLOBAL, End.SINK, "cpu")


def test_delivery_cuts_batches_apart_where_splits_are_few() -> None:
    physical = cut(FilterRows(FN), MapBatches(FN, batch_rows=64), delivers=True)
    assert [s[2] for s in shape(physical, "fused")] == [Order.SOURCE, Order.FREE, Order.SPLIT]
    assert [s[2] for s in shape(physical, "spread")] == [Order.SOURCE, Order.FREE, Order.SPLIT, Order.FREE]
    assert {physical.stages[r.stages[-1]].end for r in physical.routes} == {End.DELIVER}


def test_delivery_needs_no_writer_and_spreads() -> None:
    physical = cut(MapBatches(FN), delivers=True)
    assert [r.name for r in physical.routes] == ["spread"]
    assert shape(physical, "spread")[-1] == (0, 1, Order.FREE, End.DELIVER, "cpu")


def test_columns_that_only_the_model_reads_travel_apart() -> None:
    physical = cut(MapBatches(FN), DEVICE, Project((("id", "id"), ("p", "p"))))
    model = next(s for s in physical.stages if s.model)
    assert model.columns_in == ("image",)
    assert model.keep == ("id",)
    feeding = [s for s in physical.stages if s.stop == model.first]
    assert {s.transient for s in feeding if s.order is not Order.SOURCE or s.stop} == {("image",)}


def test_replicas_on_cpus_are_a_stage_that_few_workers_open() -> None:
    physical = cut(Predict(FN, ("x",), True, ("p",), device="cpu", replicas=2))
    assert next(s for s in physical.stages if s.model).max_workers == 2
