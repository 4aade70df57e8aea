"""Running a row-wise model over the rows at hand.

Batches may span the inputs; the answers are scattered back, so that input i gets exactly its own rows. Out of memory
halves the batch and tries again: rows are independent, so their answers do not change.

Invariant: a model that does not answer one row for one row is refused before any of its answers is used.
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from headrace.contracts.model import StreamModel
from headrace.core.errors import HeadraceError
from headrace.core.extras import is_instance
from headrace.core.refs import Origin
from headrace.plan.nodes import BatchFormat, Predict
from headrace.worker.batching import FIXED_ROWS, BatchTuner, Piece, is_out_of_memory, join
from headrace.worker.casting import concat_arrays
from headrace.worker.formats import Given, NumpyReader, to_format, to_rows
from headrace.worker.operators import Host
from headrace.worker.results import Refused, call, columns_of, make_batch, named_column, rows_batch
from headrace.worker.user_code import TorchModule, explain

DEFAULT_OUTPUT = "prediction"  # the column of a bare array, when the user gave no name
Answer = tuple[int, pa.RecordBatch]  # the index of an input, and the next of its rows' output columns


def model_runner(op: Predict, index: int, host: Host) -> ModelRunner:
    """The worker's runner of a model; constructs the model at first use."""
    runner = host.models.get(index)
    if runner is None:
        model = host.functions.get(index, op.model, op.name)
        runner = StreamRunner(model, op, host) if _is_stream(model) else BatchRunner(model, op, host)
        host.models[index] = runner
    return runner


def _is_stream(model: Any) -> bool:
    return isinstance(model, StreamModel) and not isinstance(model, type)


class ModelRunner:
    """A model in one worker. wanted_rows: how many rows are worth a call."""

    wanted_rows: int

    def run(
        self, inputs: Sequence[pa.RecordBatch], origins: Sequence[Origin], part_bytes: int | None = None
    ) -> Iterator[Answer]:
        """The outputs of all inputs in order. part_bytes: an input's outputs come in parts of about this size, rather
        than whole. inputs: only what the model reads, at least one row each.
        """
        raise NotImplementedError

    def close(self) -> None: ...


class BatchRunner(ModelRunner):
    """A model that is a function of a batch."""

    def __init__(self, model: Any, op: Predict, host: Host) -> None:
        self._model = model
        self._op = op
        self._format: BatchFormat = "torch" if isinstance(model, TorchModule) else op.batch_format
        self._reader = NumpyReader()
        self._deterministic = host.deterministic
        self._tuner = BatchTuner(op.batch_rows or (FIXED_ROWS if host.deterministic else None))

    @property
    def wanted_rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._tuner.rows

    def run(
        self, inputs: Sequence[pa.RecordBatch], origins: Sequence[Origin], part_bytes: int | None = None
    ) -> Iterator[Answer]:
        pieces = [Piece(b, o) for b, o in zip(inputs, origins, strict=True)]
        groups = [[i] for i in range(len(pieces))] if self._deterministic else [list(range(len(pieces)))]
        for group in groups:
            yield from self._run_group(pieces, group, part_bytes)

    def _run_group(self, pieces: Sequence[Piece], group: Sequence[int], part_bytes: int | None) -> Iterator[Answer]:
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
            start = 0
            made = self._predict(join([p for _, p in span]))
            for i, part in span:
                yield from parts.add(i, made.slice(start, part.batch.num_rows) if len(span) > 1 else made)
                start += part.batch.num_rows

    def _predict(self, piece: Piece) -> pa.RecordBatch:
        """The answer to one batch. Out of memory: in halves."""
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
        except (Exception, KeyboardInterrupt, SystemExit) as exc:
            if self._deterministic or not is_out_of_memory(exc) or not self._tuner.shrink(rows):
                raise _blame(exc, self._op, piece) from None
        else:
            self._tuner.record(rows, time.perf_counter() - began)
            return made
        _free_device_memory()
        half = rows // 2
        answers = [self._predict(piece.slice(0, half)), self._predict(piece.slice(half, rows - half))]
        return join_columns(answers, self._op.name, piece.origin)


class _Parts:
    """Puts the answers to slices of an input together."""

    def __init__(self, pieces: Sequence[Piece], part_bytes: int | None, op: str) -> None:
        self._pieces = pieces
        self._part_bytes = part_bytes
        self._op = op
        self._held: dict[int, list[pa.RecordBatch]] = {}
        self._bytes = 0
        self._done: dict[int, int] = {}

    def add(self, i: int, made: pa.RecordBatch) -> Iterator[Answer]:
        held = self._held.setdefault(i, [])
        held.append(made)
        done = self._done[i] = self._done.get(i, 0) + made.num_rows
        self._bytes += made.nbytes
        complete = done == self._pieces[i].batch.num_rows
        if complete or (self._part_bytes is not None and self._bytes >= self._part_bytes):
            del self._held[i]
            self._bytes = 0
            yield i, join_columns(held, self._op, self._pieces[i].origin)


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


class StreamRunner(ModelRunner):
    """A model that is an asynchronous stream of rows. Its event loop lives in a thread of its own as long as the worker,
    so that connections outlast a call, and a loop that the caller runs (a notebook's) is not in the way.
    """

    def __init__(self, model: Any, op: Predict, host: Host) -> None:
        self._model = model
        self._op = op
        self.wanted_rows = op.batch_rows or FIXED_ROWS
        self._thread: ThreadPoolExecutor | None = None
        self._loop: Any = None

    def run(
        self, inputs: Sequence[pa.RecordBatch], origins: Sequence[Origin], part_bytes: int | None = None
    ) -> Iterator[Answer]:
        pieces = [Piece(b, o) for b, o in zip(inputs, origins, strict=True)]
        answers = self._answers(pieces)
        at = 0
        for i, piece in enumerate(pieces):
            rows = answers[at : at + piece.batch.num_rows]
            at += len(rows)
            try:
                columns = columns_of(rows_batch(rows, Given(pa.schema([]))), Given(pa.schema([])), True)
                made = name_outputs(self._op, make_batch(columns, len(rows)), len(rows), Given(pa.schema([])), True)
            except Refused as exc:
                raise _blame(exc, self._op, piece) from None
            yield i, made

    def close(self) -> None:
        if self._thread is not None:
            self._thread.submit(self._loop.close).result()
            self._thread.shutdown()
            self._thread = None

    def _answers(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """The answer to each row, in the order of the rows."""
        rows = [row for piece in pieces for row in to_rows(piece.batch)]
        answers: dict[int, dict[str, Any]] = {}
        if self._thread is None:
            import asyncio

            self._thread = ThreadPoolExecutor(1, thread_name_prefix="headrace-stream")
            self._loop = asyncio.Runner()
        try:
            self._thread.submit(self._collect, rows, answers).result()
        except _RowFailed as failed:
            piece, row = _find(pieces, failed.row)
            raise _blame(failed.error, self._op, piece, row) from None
        except (Exception, KeyboardInterrupt, SystemExit) as exc:
            raise _blame(exc, self._op, pieces[0]) from None
        missing = next((i for i in range(len(rows)) if i not in answers), None)
        if missing is not None:
            piece, row = _find(pieces, missing)
            lost = len(rows) - len(answers)
            refused = Refused(f"left {lost} of {len(rows)} rows without an answer", "yield every key exactly once")
            raise _blame(refused, self._op, piece, row)
        return [answers[i] for i in range(len(rows))]

    def _collect(self, rows: list[dict[str, Any]], answers: dict[int, dict[str, Any]]) -> None:
        self._loop.run(self._stream(rows, answers))

    async def _stream(self, rows: list[dict[str, Any]], answers: dict[int, dict[str, Any]]) -> None:
        async def source() -> AsyncIterator[tuple[int, dict[str, Any]]]:
            for item in enumerate(rows):
                yield item

        async for key, answer in self._model.stream(source()):
            if not isinstance(key, int) or not 0 <= key < len(rows):
                raise Refused(f"answered key {key!r}, which it was not given", "yield the keys that came with the rows")
            if key in answers:
                raise _RowFailed(key, Refused("answered a row twice", "yield every key exactly once"))
            if isinstance(answer, Exception):
                raise _RowFailed(key, answer)
            if not isinstance(answer, Mapping):
                refused = Refused(f"answered a row with a {type(answer).__name__}", "yield (key, {column: value})")
                raise _RowFailed(key, refused)
            answers[key] = dict(answer)


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
