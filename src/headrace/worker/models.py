"""Running a row-wise model over the rows at hand.

Batches may span the inputs; the answers are scattered back, so that input i gets exactly its own rows. Out of memory
halves the batch and tries again: rows are independent, so their answers do not change. Where bad rows are set aside (a tolerant
watch), so does any other failure, down to the rows that fail alone.

Invariant: a model that does not answer one row for one row is refused before any of its answers is used.
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow as pa

from headrace.contracts.model import ModelAdapter, StreamModel
from headrace.core.errors import HeadraceError
from headrace.core.extras import is_instance
from headrace.core.origins import join_origins
from headrace.core.refs import Origin
from headrace.plan.nodes import BatchFormat, Predict
from headrace.worker.bad_rows import Failure, Lost, RowError, blames_rows, failure_of
from headrace.worker.batching import FIXED_ROWS, BatchTuner, Piece, is_out_of_memory, join
from headrace.worker.casting import concat_arrays
from headrace.worker.formats import Given, NumpyReader, to_format, to_rows
from headrace.worker.operators import Host
from headrace.worker.results import Refused, call, columns_of, fitting_rows, make_batch, named_column, rows_batch
from headrace.worker.user_code import TorchModule, explain
from headrace.worker.watch import NOBODY, Watch

DEFAULT_OUTPUT = "prediction"  # the column of a bare array, when the user gave no name


@dataclass(slots=True)
class Answer:
    """The output columns of the next `rows` rows of an input. lost: those of them that failed, by position; `made` lacks them.

    input: its index. made: None when all are lost.
    """

    input: int
    rows: int
    made: pa.RecordBatch | None
    lost: list[Lost] = field(default_factory=list[Lost])


def model_runner(op: Predict, index: int, host: Host) -> ModelRunner:
    """The worker's runner of a model; constructs the model at first use."""
    runner = host.models.get(index)
    if runner is None:
        model = host.functions.get(index, op.model, op.name, op.inputs)
        runner = StreamRunner(model, op, index) if _is_stream(model) else BatchRunner(model, op, index, host)
        host.models[index] = runner
    return runner


def _is_stream(model: Any) -> bool:
    return isinstance(model, StreamModel) and not isinstance(model, type)


class ModelRunner:
    """A model in one worker. wanted_rows: how many rows are worth a call."""

    wanted_rows: int

    def run(
        self,
        inputs: Sequence[pa.RecordBatch],
        origins: Sequence[Origin],
        part_bytes: int | None = None,
        watch: Watch = NOBODY,
    ) -> Iterator[Answer]:
        """The outputs of all inputs in order. part_bytes: an input's outputs come in parts of about this size, rather
        than whole. inputs: only what the model reads, at least one row each.
        """
        raise NotImplementedError

    def close(self) -> None: ...


class BatchRunner(ModelRunner):
    """A model that is a function of a batch."""

    def __init__(self, model: Any, op: Predict, index: int, host: Host) -> None:
        self._model = model
        self._op = op
        self._index = index
        self._format: BatchFormat = op.batch_format
        if isinstance(model, TorchModule):
            self._format = "torch"
        elif isinstance(op.model.target, ModelAdapter):
            self._format = cast(BatchFormat, op.model.target.batch_format)
        self._reader = NumpyReader()
        self._deterministic = host.deterministic
        self._tuner = BatchTuner(op.batch_rows or (FIXED_ROWS if host.deterministic else None))

    @property
    def wanted_rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._tuner.rows

    def run(
        self,
        inputs: Sequence[pa.RecordBatch],
        origins: Sequence[Origin],
        part_bytes: int | None = None,
        watch: Watch = NOBODY,
    ) -> Iterator[Answer]:
        pieces = [Piece(b, o) for b, o in zip(inputs, origins, strict=True)]
        groups = [[i] for i in range(len(pieces))] if self._deterministic else [list(range(len(pieces)))]
        for group in groups:
            yield from self._run_group(pieces, group, part_bytes, watch)

    def _run_group(
        self, pieces: Sequence[Piece], group: Sequence[int], part_bytes: int | None, watch: Watch
    ) -> Iterator[Answer]:
        """One batch after the other over the rows of these pieces, put together again by piece."""
        parts = _Parts(pieces, part_bytes, self._op.name)
        queue = [(i, 0) for i in group if pieces[i].batch.num_rows]
        queue.reverse()  # the next rows are at the end
        total = sum(pieces[i].batch.num_rows for i in group)
        row_bytes = sum(pieces[i].batch.nbytes for i in group) / max(1, total)
        while queue:
            span: list[tuple[int, Piece]] = []
            rows = self._tuner.fit(row_bytes)
            while queue and rows:
                i, start = queue.pop()
                piece = pieces[i]
                n = min(rows, piece.batch.num_rows - start)
                whole = n == piece.batch.num_rows
                span.append((i, piece if whole else piece.slice(start, n)))
                rows -= n
                if start + n < piece.batch.num_rows:
                    queue.append((i, start + n))
            done = self._predict(join([p for _, p in span]), watch)
            if len(span) == 1:
                yield from parts.add(span[0][0], done)
                continue
            start = 0
            for i, part in span:
                yield from parts.add(i, done.slice(start, part.batch.num_rows))
                start += part.batch.num_rows

    def _predict(self, piece: Piece, watch: Watch) -> _Outcome:
        """The answer to one batch; row by row if a worker has died on it before."""
        if not watch.doubts(self._index, piece.origin):
            watch.enter(self._index, self._op.name, piece.origin)
            return self._halves(piece, watch)
        outcomes: list[_Outcome] = []
        for at in range(piece.batch.num_rows):
            row = piece.slice(at, 1)
            failure = watch.condemned(self._index, self._op.name, row)
            outcomes.append(self._halves(row, watch) if failure is None else _Outcome(1, None, [(0, failure)]))
        return _joined(outcomes, self._op.name, piece.origin)

    def _halves(self, piece: Piece, watch: Watch) -> _Outcome:
        """The answer to one batch. Out of memory, or with rows that fail: in halves."""
        rows = piece.batch.num_rows
        batch, given = to_format(piece.batch, self._format, self._reader)
        argument = batch
        if self._op.single:
            name = self._op.inputs[0]
            argument = batch[name] if self._format != "pyarrow" else piece.batch.column(name)
        began = time.perf_counter()
        try:
            result, shared = call(self._model, (argument, *self._op.model.args), self._op.model.kwargs)
            made = name_outputs(self._op, result, rows, given, shared)
        except RowError as exc:
            memory = is_out_of_memory(exc)
            if not self._may_halve(exc, memory, rows, watch):
                raise _blame(exc, self._op, piece) from None
            if rows == 1:
                return _Outcome(1, None, [(0, failure_of(exc, self._op.name))])
        else:
            self._tuner.record(rows, time.perf_counter() - began)
            return _Outcome(rows, made)
        if memory:
            _free_device_memory()
        half = rows // 2
        outcomes = [self._halves(piece.slice(0, half), watch), self._halves(piece.slice(half, rows - half), watch)]
        return _joined(outcomes, self._op.name, piece.origin)

    def _may_halve(self, exc: BaseException, memory: bool, rows: int, watch: Watch) -> bool:
        """Or set the row aside, if it is one."""
        if memory and rows > 1:
            return not self._deterministic and self._tuner.shrink(rows)
        return watch.tolerant and blames_rows(exc)


@dataclass(slots=True)
class _Outcome:
    """What became of consecutive rows. made: the answers to all but the lost ones; None when there are none."""

    rows: int
    made: pa.RecordBatch | None
    lost: list[Lost] = field(default_factory=list[Lost])

    def slice(self, start: int, rows: int) -> _Outcome:
        if not self.lost or self.made is None:
            lost = [(at - start, f) for at, f in self.lost if start <= at < start + rows]
            return _Outcome(rows, None if self.made is None else self.made.slice(start, rows), lost)
        before = sum(at < start for at, _ in self.lost)
        lost = [(at - start, f) for at, f in self.lost if start <= at < start + rows]
        left = rows - len(lost)
        return _Outcome(rows, self.made.slice(start - before, left) if left else None, lost)


def _joined(outcomes: Sequence[_Outcome], op: str, origin: Origin) -> _Outcome:
    """Consecutive outcomes as one."""
    if len(outcomes) == 1:
        return outcomes[0]
    made = [o.made for o in outcomes if o.made is not None]
    lost: list[Lost] = []
    rows = 0
    for outcome in outcomes:
        lost += [(rows + at, failure) for at, failure in outcome.lost]
        rows += outcome.rows
    return _Outcome(rows, join_columns(made, op, origin) if made else None, lost)


class _Parts:
    """Puts the answers to slices of an input together."""

    def __init__(self, pieces: Sequence[Piece], part_bytes: int | None, op: str) -> None:
        self._pieces = pieces
        self._part_bytes = part_bytes
        self._op = op
        self._held: dict[int, list[_Outcome]] = {}
        self._bytes = 0
        self._done: dict[int, int] = {}

    def add(self, i: int, outcome: _Outcome) -> Iterator[Answer]:
        held = self._held.setdefault(i, [])
        held.append(outcome)
        done = self._done[i] = self._done.get(i, 0) + outcome.rows
        self._bytes += 0 if outcome.made is None else outcome.made.nbytes
        complete = done == self._pieces[i].batch.num_rows
        if complete or (self._part_bytes is not None and self._bytes >= self._part_bytes):
            del self._held[i]
            self._bytes = 0
            whole = _joined(held, self._op, self._pieces[i].origin)
            yield Answer(i, whole.rows, whole.made, whole.lost)


def join_columns(parts: Sequence[pa.RecordBatch], op: str, origin: Origin) -> pa.RecordBatch:
    """Answers to consecutive rows as one. Raises UserCodeError when the model named its columns differently."""
    if len(parts) == 1:
        return parts[0]
    names = parts[0].schema.names
    for part in parts:
        if part.schema.names != names:
            refused = Refused(f"returned columns {part.schema.names} after {names}", "return the same columns every time")
            raise explain(refused, op, origin)
    columns = {n: concat_arrays([p.column(i) for p in parts], n, origin.label) for i, n in enumerate(names)}
    return make_batch(columns, sum(p.num_rows for p in parts))


def _free_device_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _blame(exc: BaseException, op: Predict, piece: Piece, row: int | None = None) -> HeadraceError:
    return explain(exc, op.name, piece.origin, row=row, columns=piece.batch.schema.names)


# --- naming what a model returned ------------------------------------------------------------------------------------


def name_outputs(op: Predict, result: Any, rows: int, given: Given, shared: bool) -> pa.RecordBatch:
    """The output columns of a model's answer to `rows` rows. Raises Refused."""
    columns = _named(op, result, given, shared)
    for name, column in columns.items():
        if len(column) != rows:
            what = f"{len(column)} rows" if len(columns) == 1 else f"{len(column)} rows in column {name!r}"
            raise Refused(
                f"was given {rows} rows and returned {what}",
                "a model answers every row, in the order given; to drop or add rows use map_batches",
            )
    return make_batch(columns, rows)


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


def _has_names(result: Any) -> bool:
    if isinstance(result, (Mapping, pa.Table, pa.RecordBatch)):
        return True
    return is_instance(result, "pandas", "DataFrame")


# --- streams ---------------------------------------------------------------------------------------------------------


Row = dict[str, Any]
_NOTHING = Given(pa.schema([]))  # a row's answer need not be of the types that its columns had


class StreamRunner(ModelRunner):
    """A model that is an asynchronous stream of rows. Its event loop lives in a thread of its own as long as the worker,
    so that connections outlast a call, and a loop that the caller runs (a notebook's) is not in the way.
    """

    def __init__(self, model: Any, op: Predict, index: int) -> None:
        self._model = model
        self._op = op
        self._index = index
        self.wanted_rows = op.batch_rows or FIXED_ROWS
        self._thread: ThreadPoolExecutor | None = None
        self._loop: Any = None

    def run(
        self,
        inputs: Sequence[pa.RecordBatch],
        origins: Sequence[Origin],
        part_bytes: int | None = None,
        watch: Watch = NOBODY,
    ) -> Iterator[Answer]:
        pieces = [Piece(b, o) for b, o in zip(inputs, origins, strict=True)]
        for i, (piece, results) in enumerate(zip(pieces, self._results(pieces, watch), strict=True)):
            lost = [(at, r) for at, r in enumerate(results) if isinstance(r, Failure)]
            rows = [r for r in results if not isinstance(r, Failure)]
            places = [at for at, r in enumerate(results) if not isinstance(r, Failure)]
            if watch.tolerant:
                made, refused = self._named_fitting(rows)
                lost += [(places[k], failure_of(exc, self._op.name)) for k, exc in refused.items()]
                lost.sort(key=lambda pair: pair[0])
            else:
                try:
                    made = self._named(rows)
                except Refused as exc:
                    raise _blame(exc, self._op, piece) from None
            yield Answer(i, piece.batch.num_rows, made, lost)

    def _named(self, rows: Sequence[Row]) -> pa.RecordBatch:
        """The output columns of these answers. Raises Refused."""
        columns = columns_of(rows_batch(rows, _NOTHING), _NOTHING, True)
        return name_outputs(self._op, make_batch(columns, len(rows)), len(rows), _NOTHING, True)

    def _named_fitting(self, rows: Sequence[Row]) -> tuple[pa.RecordBatch | None, dict[int, Refused]]:
        """The same of those that go together, and why the others don't."""
        refused: dict[int, Refused] = {}
        for i, row in enumerate(rows):
            missing = [n for n in self._op.output if n not in row]
            if missing:
                refused[i] = Refused(f"answered a row with {list(row)}, but output names {list(self._op.output)}")
        left = [i for i in range(len(rows)) if i not in refused]
        _, others = fitting_rows([rows[i] for i in left], _NOTHING)
        refused |= {left[k]: exc for k, exc in others.items()}
        left = [i for i in left if i not in refused]
        return (self._named([rows[i] for i in left]) if left else None), refused

    def close(self) -> None:
        if self._thread is not None:
            self._thread.submit(self._loop.close).result()
            self._thread.shutdown()
            self._thread = None

    def _results(self, pieces: Sequence[Piece], watch: Watch) -> list[list[Row | Failure]]:
        """For each piece what became of each of its rows."""
        doubts = any(watch.doubts(self._index, p.origin) for p in pieces)
        if not doubts:
            watch.enter(self._index, self._op.name, join_origins([p.origin for p in pieces]))
            results = self._answers(pieces, watch.tolerant)
        else:
            results = []
            for piece in pieces:
                for at in range(piece.batch.num_rows):
                    row = piece.slice(at, 1)
                    failure = watch.condemned(self._index, self._op.name, row)
                    results += self._answers([row], watch.tolerant) if failure is None else [failure]
        out: list[list[Row | Failure]] = []
        at = 0
        for piece in pieces:
            out.append(results[at : at + piece.batch.num_rows])
            at += piece.batch.num_rows
        return out

    def _answers(self, pieces: Sequence[Piece], tolerant: bool) -> list[Row | Failure]:
        """What became of each row, in the order of the rows. Raises for the first failure unless tolerant."""
        rows = [row for piece in pieces for row in to_rows(piece.batch)]
        if self._thread is None:
            import asyncio

            self._thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-stream")
            self._loop = asyncio.Runner()
        done: dict[int, Row | Failure] = {}
        self._ask(list(range(len(rows))), rows, done, pieces, tolerant)
        return [done[i] for i in range(len(rows))]

    def _ask(
        self, keys: Sequence[int], rows: list[Row], done: dict[int, Row | Failure], pieces: Sequence[Piece], tolerant: bool
    ) -> None:
        """Fill `done` for all keys. When a stream breaks, what it has answered counts, and the rest is asked for in halves."""
        assert self._thread is not None
        answers: dict[int, Row] = {}
        failed: dict[int, Exception] = {}
        broken: BaseException | None = None
        try:
            self._thread.submit(self._collect, keys, rows, answers, failed, tolerant).result()
        except RowError as exc:
            if isinstance(exc, _RowFailed):
                piece, row = _find(pieces, exc.row)
                raise _blame(exc.error, self._op, piece, row) from None
            if not (tolerant and blames_rows(exc)):
                raise _blame(exc, self._op, pieces[0]) from None
            broken = exc
        for key, error in failed.items():
            if not blames_rows(error):
                piece, row = _find(pieces, key)
                raise _blame(error, self._op, piece, row) from None
            answers.pop(key, None)
            done[key] = failure_of(error, self._op.name)
        done |= answers
        left = [key for key in keys if key not in done]
        if not left:
            return
        if broken is not None and len(left) > 1:
            half = len(left) // 2
            self._ask(left[:half], rows, done, pieces, tolerant)
            self._ask(left[half:], rows, done, pieces, tolerant)
            return
        why = broken or Refused(f"left {len(left)} of {len(keys)} rows without an answer", "yield every key exactly once")
        if not tolerant:
            piece, row = _find(pieces, left[0])
            raise _blame(why, self._op, piece, row)
        done |= {key: failure_of(why, self._op.name) for key in left}

    def _collect(self, *args: Any) -> None:
        self._loop.run(self._stream(*args))

    async def _stream(
        self,
        keys: Sequence[int],
        rows: list[Row],
        answers: dict[int, Row],
        failed: dict[int, Exception],
        tolerant: bool,
    ) -> None:
        """One run of the model's stream over these rows. The first failure of a row ends it unless tolerant."""
        asked = frozenset(keys)

        async def source() -> AsyncIterator[tuple[int, Row]]:
            for key in keys:
                yield key, rows[key]

        async for key, answer in self._model.stream(source()):
            if not isinstance(key, int) or key not in asked:
                raise Refused(f"answered key {key!r}, which it was not given", "yield the keys that came with the rows")
            error = _row_error(answer, key in answers or key in failed)
            if error is None:
                answers[key] = dict(answer)
            elif tolerant:
                failed[key] = error
            else:
                raise _RowFailed(key, error)


def _row_error(answer: Any, again: bool) -> Exception | None:
    """What is wrong with the answer to one row."""
    if again:
        return Refused("answered a row twice", "yield every key exactly once")
    if isinstance(answer, Exception):
        return answer
    if not isinstance(answer, Mapping):
        return Refused(f"answered a row with a {type(answer).__name__}", "yield (key, {column: value})")
    return None


class _RowFailed(Exception):
    def __init__(self, row: int, error: Exception) -> None:
        super().__init__(row)
        self.row = row
        self.error = error


def _find(pieces: Sequence[Piece], row: int) -> tuple[Piece, int]:
    """The piece that holds row `row` of all, and the row's place in it."""
    for piece in pieces:
        if row < piece.batch.num_rows:
            return piece, row
        row -= piece.batch.num_rows
    raise IndexError(row)
