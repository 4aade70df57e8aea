"""From operators to stages and routes: where the plan is cut, in what order a stage takes its blocks, what travels.

Two routes may come out. `fused`: a split is read, computed and (if no device is needed) written in one stage. `spread`: reading
apart from computing, so that several workers share one split; blocks for a consumer are always read apart. A row's way does not
change what becomes of it: operators are defined on the split's stream of blocks, and cuts between blocks depend on the input
alone.

Batches of n rows of the split (map_batches) are cut in sequence where the reader's blocks don't hold whole ones: once rows may
have been added or dropped. On `fused` the function runs in that sequence, too, since other splits keep the other workers busy.
On `spread` only the cutting does, and the function takes blocks of whole batches in any order.

Invariant: stage ids grow along every route (the scheduler's "downstream first" is "highest id first").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from headrace.contracts.model import ModelAdapter
from headrace.core.options import BlockLimits
from headrace.core.resources import CPU_POOL, WAITING_POOL
from headrace.core.stages import End, Order, Route, Stage
from headrace.plan.columns import ALL, Columns, needs
from headrace.plan.nodes import Apply, Evaluate, FilterExpr, Limit, MapBatches, MapRows, Op, Plan, Predict, Project, Reshape

ALIGN_MAX_ROWS = 16_384  # beyond this, aligned blocks would be too big: batches are cut in sequence instead
MODEL_ROWS = 256  # rows worth gathering for a model whose batch size is "auto"


class PhysicalPlan(Struct, frozen=True):
    """stages, routes: see core.stages. limits: how the reader cuts blocks. pools: those that stages use."""

    plan: Plan
    stages: tuple[Stage, ...]
    routes: tuple[Route, ...]
    limits: BlockLimits

    @property
    def pools(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((CPU_POOL, *(s.pool for s in self.stages))))


class _Cut(Struct):
    """A stage before it has an id."""

    first: int
    stop: int
    order: Order
    pool: str = CPU_POOL
    model: bool = False
    max_workers: int | None = None
    limit: int | None = None
    batch_rows: int = MODEL_ROWS
    stream: bool = False
    cut_rows: int | None = None
    end: End = End.NEXT


def make_physical(
    plan: Plan, *, delivers: bool, pool_of: Callable[[Predict], str], at_end: Columns = ALL, networked: bool = False
) -> PhysicalPlan:
    """Cut the plan. pool_of: the pool of a model ("cpu", or a device's). delivers: blocks go to a consumer, not a sink.
    networked: workers are on several machines.
    """
    ops = plan.ops
    aligned, multiple = _alignment(ops)
    cutter = _Cutter(ops, aligned, delivers, pool_of)
    # rows are delivered in order, so several workers on one split beat one worker on each
    fused, spread = cutter.route(spread=delivers, cutting=False), cutter.route(spread=True, cutting=True)
    routes = {"fused": fused, "spread": spread}
    if fused == spread:
        routes = {"spread" if delivers else "fused": fused}
    cuts: list[_Cut] = []
    for cut in (c for route in routes.values() for c in route):
        if cut not in cuts:
            cuts.append(cut)
    cuts.sort(key=lambda c: (c.stop, c.first, c.order is not Order.SOURCE))
    wanted = needs(ops, at_end)
    stages = tuple(_stage(i, cut, plan, wanted) for i, cut in enumerate(cuts))
    stages = tuple(_with_transient(s, cuts, stages, routes, wanted, networked) for s in stages)
    made = tuple(Route(name, tuple(cuts.index(c) for c in route)) for name, route in routes.items())
    per_input = plan.write is not None and plan.write.sink.per_input
    limits = BlockLimits(rows_multiple=multiple, per_input=per_input)
    return PhysicalPlan(plan, stages, made, limits)


def _alignment(ops: Sequence[Op]) -> tuple[frozenset[int], int]:
    """Operators whose batches never straddle a block if the reader cuts at a multiple of rows, and that multiple."""
    aligned: list[int] = []
    multiple = 1
    for i, op in enumerate(ops):
        if isinstance(op, MapBatches):
            if op.batch_rows is None:
                break  # it may change the number of rows
            both = math.lcm(multiple, op.batch_rows)
            if both > ALIGN_MAX_ROWS:
                break
            multiple = both
            aligned.append(i)
            break  # rows may be added or dropped from here on
        if not isinstance(op, Project | Reshape | MapRows | Apply | Predict | Evaluate):
            break
    return frozenset(aligned), multiple


def is_light(op: Op) -> bool:
    """Work that is not worth a trip to another worker."""
    return isinstance(op, Project | Reshape | FilterExpr | Evaluate | Limit)


def is_stream(op: Predict) -> bool:
    """Does the model answer row by row, in any order?"""
    target = op.model.target
    return bool(target.streams if isinstance(target, ModelAdapter) else hasattr(target, "stream"))


class _Cutter:
    def __init__(self, ops: Sequence[Op], aligned: frozenset[int], delivers: bool, pool_of: Callable[[Predict], str]) -> None:
        self.ops = ops
        self.aligned = aligned
        self.delivers = delivers
        self.pool_of = pool_of

    def route(self, *, spread: bool, cutting: bool) -> list[_Cut]:
        """The stages of one route, without ids. spread: reading is apart from computing; cutting: so is that of batches."""
        cuts = [_Cut(0, 0, Order.SOURCE)]
        for i, op in enumerate(self.ops):
            last = cuts[-1]
            if isinstance(op, Limit):
                cuts.append(_Cut(i, i + 1, Order.GLOBAL, limit=op.rows))
            elif isinstance(op, Predict) and self._shares(last, op, i):
                last.stop = i + 1
                last.batch_rows = max(last.batch_rows, op.batch_rows or MODEL_ROWS)
            elif self._alone(op):
                cuts.append(self._model_cut(i, op) if isinstance(op, Predict) else self._capped_cut(i, op))
            elif self._joins(last, op, i, spread):
                last.stop = i + 1
            elif self._free(i, i):
                cuts.append(_Cut(i, i + 1, Order.FREE))
            elif cutting:
                self._cut_before(i, cuts)
                cuts.append(_Cut(i, i + 1, Order.FREE))
            else:
                cuts.append(_Cut(i, i + 1, Order.SPLIT))
        return self._finish(cuts, spread)

    def _shares(self, last: _Cut, op: Predict, i: int) -> bool:
        """May a model run in the stage of the one before: of the same group, in the same pool, on the same rows?"""
        before = self.ops[i - 1] if i else None
        return (
            last.model
            and isinstance(before, Predict)
            and op.group is not None
            and before.group == op.group
            and self.pool_of(op) == last.pool
            and op.replicas == before.replicas
            and not (is_stream(op) or is_stream(before))
        )

    def _alone(self, op: Op) -> bool:
        if isinstance(op, Predict):
            return self.pool_of(op) != CPU_POOL or op.replicas is not None
        return isinstance(op, MapBatches) and op.max_workers is not None

    def _model_cut(self, i: int, op: Predict) -> _Cut:
        rows = op.batch_rows or MODEL_ROWS
        pool, stream = self.pool_of(op), is_stream(op)
        workers = op.replicas or (1 if stream and pool == WAITING_POOL else None)  # a stream's limits hold for all its requests
        return _Cut(i, i + 1, Order.FREE, pool, model=True, max_workers=workers, batch_rows=rows, stream=stream)

    def _capped_cut(self, i: int, op: Op) -> _Cut:
        assert isinstance(op, MapBatches)
        return _Cut(i, i + 1, Order.FREE if self._free(i, i) else Order.SPLIT, max_workers=op.max_workers)

    def _free(self, i: int, first: int) -> bool:
        """May operator i, in a stage that begins with operator `first`, work on each block by itself?"""
        op = self.ops[i]
        if not isinstance(op, MapBatches) or op.batch_rows is None:
            return True
        return i in self.aligned and not any(map(self._recuts, self.ops[:first]))

    def _recuts(self, op: Op) -> bool:
        """May operator `op` answer a block in pieces, which an earlier stage then gives on as blocks of their own?"""
        return isinstance(op, MapRows | Apply) or (isinstance(op, Predict) and not self._alone(op))

    def _cut_before(self, i: int, cuts: list[_Cut]) -> None:
        """Let the blocks that come to map_batches i hold whole batches: a reader cuts them itself, else a stage does it."""
        op = self.ops[i]
        assert isinstance(op, MapBatches)
        if cuts[-1].order is not Order.SOURCE:
            cuts.append(_Cut(i, i, Order.SPLIT))
        cuts[-1].cut_rows = op.batch_rows

    def _joins(self, last: _Cut, op: Op, i: int, spread: bool) -> bool:
        """May operator i run in the stage that is being built?"""
        if last.model or last.max_workers is not None:
            return False
        if last.order is Order.GLOBAL:
            return is_light(op)
        if last.order is Order.SOURCE:
            return is_light(op) or not spread
        if last.order is Order.FREE:
            return self._free(i, last.first)
        return True  # a sequence can do anything

    def _finish(self, cuts: list[_Cut], spread: bool) -> list[_Cut]:
        """Give the route its end: a consumer takes blocks from any stage, a sink wants them in sequence."""
        last = cuts[-1]
        if self.delivers:
            last.end = End.DELIVER
            return cuts
        if last.order is Order.FREE and not last.model and last.max_workers is None:
            if not spread and not self._heavy(last):
                last.order = Order.SPLIT  # light work after a model: the writer does it
            else:
                cut = last.stop
                while cut > last.first + 1 and is_light(self.ops[cut - 1]):
                    cut -= 1
                if self._heavy(last):
                    cuts.append(_Cut(cut, last.stop, Order.SPLIT))
                    last.stop = cut
                else:
                    last.order = Order.SPLIT
        elif last.order is Order.FREE or last.max_workers is not None:
            cuts.append(_Cut(last.stop, last.stop, Order.SPLIT))
        cuts[-1].end = End.SINK
        return cuts

    def _heavy(self, cut: _Cut) -> bool:
        return any(not is_light(op) for op in self.ops[cut.first : cut.stop])


def _stage(id: int, cut: _Cut, plan: Plan, wanted: Sequence[Columns]) -> Stage:
    names = [op.name for op in plan.ops[cut.first : cut.stop]]
    if cut.order is Order.SOURCE:
        names.insert(0, plan.read.name)
    if cut.end is End.SINK and plan.write is not None:
        names.append(plan.write.name)
    columns_in = keep = None
    if cut.model:
        models = [op for op in plan.ops[cut.first : cut.stop] if isinstance(op, Predict)]
        after = wanted[cut.stop]
        if all(op.inputs for op in models):
            columns_in = tuple(dict.fromkeys(name for op in models for name in op.inputs))
        if isinstance(after, frozenset):
            keep = tuple(sorted(after - {name for op in models for name in op.output}))
    return Stage(
        id=id,
        name=" > ".join(names) or ("pass" if cut.cut_rows is None else "cut batches"),
        pool=cut.pool,
        order=cut.order,
        end=cut.end,
        first=cut.first,
        stop=cut.stop,
        model=cut.model,
        columns_in=columns_in,
        keep=keep,
        max_workers=cut.max_workers,
        limit=cut.limit,
        batch_rows=cut.batch_rows,
        stream=cut.stream,
        cut_rows=cut.cut_rows,
    )


def _with_transient(
    stage: Stage,
    cuts: Sequence[_Cut],
    stages: Sequence[Stage],
    routes: dict[str, list[_Cut]],
    wanted: Sequence[Columns],
    networked: bool,
) -> Stage:
    """Name the columns of a stage's output that the next stage, a model, reads: alone, or (networked) with later ones."""
    for route in routes.values():
        ids = [cuts.index(c) for c in route]
        if stage.id not in ids[:-1] or stage.model:
            continue
        following = stages[ids[ids.index(stage.id) + 1]]
        after = wanted[following.stop]
        if following.model and following.columns_in is not None and isinstance(after, frozenset):
            transient = tuple(c for c in following.columns_in if c not in after)
            return replace(stage, transient=transient, feeds=following.columns_in if networked else ())
        if following.model and following.columns_in is not None and networked:
            return replace(stage, feeds=following.columns_in)
    return stage
