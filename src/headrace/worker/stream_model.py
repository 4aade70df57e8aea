"""Running a model that is an asynchronous stream of rows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from headrace.core.origins import join_origins
from headrace.core.refs import Origin
from headrace.plan.nodes import Predict
from headrace.worker.bad_rows import Failure, RowError, blames_rows, failure_of
from headrace.worker.batching import Piece
from headrace.worker.formats import Given, to_rows
from headrace.worker.model_answers import Answer, ModelRunner, blame, name_outputs
from headrace.worker.results import Refused, columns_of, fitting_rows, make_batch, rows_batch
from headrace.worker.tuning import FIXED_ROWS
from headrace.worker.watch import NOBODY, Watch

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
                    raise blame(exc, self._op, piece) from None
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
                raise blame(exc.error, self._op, piece, row) from None
            if not (tolerant and blames_rows(exc)):
                raise blame(exc, self._op, pieces[0]) from None
            broken = exc
        for key, error in failed.items():
            if not blames_rows(error):
                piece, row = _find(pieces, key)
                raise blame(error, self._op, piece, row) from None
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
            raise blame(why, self._op, piece, row)
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
