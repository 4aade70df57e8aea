"""Running a row-wise model that is a function of a batch, over the rows at hand.

Batches may span the inputs; the answers are scattered back, so that input i gets exactly its own rows. Out of memory
cuts the batch up and tries again: rows are independent, so their answers do not change. Where bad rows are set aside (a
tolerant watch), any other failure halves it, down to the rows that fail alone. Texts and lists go by length: rows of like
lengths into one batch.

A model that has `submit(batch) -> handle` and `collect(handle) -> answer` is kept one batch ahead: the next batch is submitted
before the answer to the one before is collected. It must answer as `__call__` does, and either may raise. One whose `ahead` is
False is called batch by batch: that is worth nothing where `submit` computes, and its answer may be memory it writes to again.

Invariants: handles are collected in the order in which they were submitted, each once, whatever fails in between; nothing is
submitted while a batch that failed is tried again; answers come in the order of the rows.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any, cast

import pyarrow as pa
from msgspec import Struct, field

from headrace.contracts.model import ModelAdapter
from headrace.core.origins import join_origins
from headrace.core.refs import Origin
from headrace.models.torch_device import forget_shared
from headrace.plan.nodes import BatchFormat, Predict
from headrace.worker import batch_sizes
from headrace.worker.bad_rows import Lost, RowError, blames_rows, failure_of
from headrace.worker.batching import Piece, join
from headrace.worker.by_length import SLOW_ROW_S, Window, have_lengths, window_rows
from headrace.worker.formats import Given, NumpyReader, to_format
from headrace.worker.memory import free_memory, memory_of
from headrace.worker.model_answers import Answer, ModelRunner, blame, join_columns, name_outputs
from headrace.worker.operators import Host
from headrace.worker.refused import BrokenModel
from headrace.worker.results import call
from headrace.worker.torch_inputs import TorchReader
from headrace.worker.tuning import FIXED_ROWS, STRETCH, BatchTuner, is_out_of_memory
from headrace.worker.user_code import TorchModule
from headrace.worker.watch import NOBODY, Watch

LAST = 4  # batches of the rows at hand, among which the rest is shared out
STEP_BATCHES = 4  # batches worth gathering for a step when the model is kept one ahead: the first waits, the others overlap

_Span = list[tuple[int, Piece]]  # a batch: rows of consecutive inputs


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
        self._shared = host.shared if op.group is not None and self._format in ("numpy", "torch") else None
        self._reader = NumpyReader(self._shared)
        self._tensors = TorchReader(self._reader, uploads=getattr(model, "uploads", False))
        self._deterministic = host.deterministic
        two_halves = callable(getattr(model, "submit", None)) and callable(getattr(model, "collect", None))
        self._ahead = two_halves and getattr(model, "ahead", True)
        self._device = host.functions.device
        self._memory = memory_of(self._device)
        self._fixed = op.batch_rows or (FIXED_ROWS if host.deterministic else None)
        self._tuners: dict[str, BatchTuner] = {}  # by what they are remembered under
        self._schema: pa.Schema | None = None  # of the last rows
        self._tuner = BatchTuner(self._fixed)  # for rows of that schema
        self._have_lengths = False  # rows of that schema
        self._like = pa.schema(list(op.types)) if op.types else None  # of answers
        self._row_s = 0.0  # a row, in the quickest batch of that schema so far
        self._answered = self._answer_bytes = 0  # rows of that schema, and their answers

    @property
    def wanted_rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._tuner.wanted

    @property
    def step_rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self._deterministic:
            return 0
        wanted = self._tuner.wanted * (STEP_BATCHES if self._ahead else 1)
        return max(wanted, self._window_rows) if self._by_length else wanted

    @property
    def _window_rows(self) -> int:
        return window_rows(self._tuner.wanted, self._row_s, self._answer_bytes / max(1, self._answered))

    @property
    def _by_length(self) -> bool:
        """Are rows sorted? Not where the user has said what a batch is, nor where models share what they read."""
        return self._fixed is None and self._op.group is None and self._have_lengths and self._row_s >= SLOW_ROW_S

    def close(self) -> None:
        """Remember what was found."""
        for key, tuner in self._tuners.items():
            if tuner.measured_s >= batch_sizes.LEAST_S:
                batch_sizes.remember(key, tuner.best)
            elif tuner.measured_s:
                batch_sizes.remember_short(key, tuner.best)
        self._tuners.clear()

    def run(
        self,
        inputs: Sequence[pa.RecordBatch],
        origins: Sequence[Origin],
        part_bytes: int | None = None,
        watch: Watch = NOBODY,
        whole: pa.RecordBatch | None = None,
    ) -> Iterator[Answer]:
        starts = itertools.accumulate((b.num_rows for b in inputs), initial=0)
        pieces = [Piece(b, o, whole, at) for b, o, at in zip(inputs, origins, starts, strict=False)]
        self._share(inputs if whole is None else [whole])
        groups = [[i] for i in range(len(pieces))] if self._deterministic else [list(range(len(pieces)))]
        if pieces:
            self._choose_tuner(pieces[0].batch.schema)
        parts = _Parts(pieces, part_bytes, self._op.name)
        if self._by_length:
            yield from self._run_by_length(pieces, parts, watch)
            return
        with contextlib.closing(self._outcomes(self._spans(pieces, groups), watch)) as outcomes:
            for span, done in outcomes:
                if len(span) == 1:
                    yield from parts.add(span[0][0], done)
                    continue
                start = 0
                for i, part in span:
                    yield from parts.add(i, done.slice(start, part.batch.num_rows))
                    start += part.batch.num_rows

    def _run_by_length(self, pieces: Sequence[Piece], parts: _Parts, watch: Watch) -> Iterator[Answer]:
        """As `run`, with rows of like lengths in one batch."""
        under_way: deque[tuple[Window, _Span]] = deque()  # the window of each batch that was begun
        with contextlib.closing(self._outcomes(self._alike(pieces, under_way), watch)) as outcomes:
            for _, done in outcomes:
                window, span = under_way.popleft()
                if not window.add(done.made, done.lost):
                    continue
                join_parts = functools.partial(join_columns, op=self._op.name, origin=span[0][1].origin)
                whole = _Outcome(window.rows, *window.answer(join_parts))
                start = 0
                for i, part in span:
                    yield from parts.add(i, whole.slice(start, part.batch.num_rows))
                    start += part.batch.num_rows

    def _share(self, batches: Sequence[pa.RecordBatch]) -> None:
        """Convert, once for all models of the group, what costs something: not while a batch's time is taken."""
        if self._shared is not None:
            for batch in batches:
                self._shared.add(batch)

    def _choose_tuner(self, schema: pa.Schema) -> None:
        """Rows of another shape have a size of their own."""
        if self._fixed is not None or (self._schema is not None and schema.equals(self._schema)):
            return
        self._schema = schema
        self._have_lengths, self._row_s = have_lengths(schema), 0.0
        self._answered = self._answer_bytes = 0
        key = batch_sizes.key_of(self._op.model, self._device, schema)
        tuner = self._tuners.get(key)
        if tuner is None:
            start, first = batch_sizes.recall(key), batch_sizes.recall_short(key)
            tuner = BatchTuner(start=start, first=first, room_bytes=self._memory.room_bytes)
            self._tuners[key] = tuner
        self._tuner = tuner

    # ---------------------------------------------------------------- batches

    def _spans(self, pieces: Sequence[Piece], groups: Sequence[Sequence[int]]) -> Iterator[_Span]:
        """The rows of each group, in batches of the size that is right when they are asked for."""
        for group in groups:
            queue = [(i, 0) for i in group if pieces[i].batch.num_rows]
            queue.reverse()  # the next rows are at the end
            total = sum(pieces[i].batch.num_rows for i in group)
            row_bytes = sum(pieces[i].batch.nbytes for i in group) / max(1, total)
            while queue:
                span: _Span = []
                rows = self._size(total, row_bytes)
                total -= rows
                while queue and rows:
                    i, start = queue.pop()
                    piece = pieces[i]
                    n = min(rows, piece.batch.num_rows - start)
                    whole = n == piece.batch.num_rows
                    span.append((i, piece if whole else piece.slice(start, n)))
                    rows -= n
                    if start + n < piece.batch.num_rows:
                        queue.append((i, start + n))
                yield span

    def _alike(self, pieces: Sequence[Piece], under_way: deque[tuple[Window, _Span]]) -> Iterator[_Span]:
        """The rows in batches of like lengths, window after window."""
        queue = deque((i, piece) for i, piece in enumerate(pieces) if piece.batch.num_rows)
        left = sum(piece.batch.num_rows for _, piece in queue)
        while queue:
            span: _Span = []
            most = self._window_rows
            room = left if left <= most else most - most % self._tuner.wanted  # whole batches
            left -= room
            while queue and room:
                i, piece = queue.popleft()
                rows = piece.batch.num_rows
                if rows > room:
                    queue.appendleft((i, piece.slice(room, rows - room)))
                    piece = piece.slice(0, room)
                span.append((i, piece))
                room -= piece.batch.num_rows
            joined = join([piece for _, piece in span])
            window = Window(joined)
            row_bytes = joined.batch.nbytes / window.rows
            while window.left:
                batch = window.next(self._size(window.left, row_bytes))
                under_way.append((window, span))
                yield [(0, batch)]

    def _size(self, left: int, row_bytes: float) -> int:
        rows = self._tuner.fit(row_bytes)
        batches = left // rows
        if self._fixed is None and rows < left and batches <= LAST:  # a rest costs a call of its own
            even = min(math.ceil(left / batches), self._tuner.most(row_bytes))
            if rows < even <= STRETCH * rows and self._tuner.has_room(even):
                rows = even
        return min(rows, left)

    def _outcomes(self, spans: Iterator[_Span], watch: Watch) -> Generator[tuple[_Span, _Outcome], None, None]:
        """The answers to batches, in order; of a model that is kept ahead, with the next batch under way."""
        before: _Submitted | None = None
        try:
            for span in spans:
                piece = join([p for _, p in span])
                after = None
                if self._ahead and not watch.doubts(self._index, piece.origin):
                    after = self._submit(span, piece, watch, before)
                if before is not None:
                    done, before = before, after
                    yield done.span, self._finish(done, after, watch)
                before = after
                if after is None:
                    yield span, self._predict(piece, watch)
            if before is not None:
                done, before = before, None
                yield done.span, self._finish(done, None, watch)
        finally:
            if before is not None:  # nobody wants it any more
                self._collect(before)

    def _predict(self, piece: Piece, watch: Watch) -> _Outcome:
        """The answer to one batch; row by row if a worker has died on it before."""
        if not watch.doubts(self._index, piece.origin):
            watch.enter(self._index, self._op.name, piece.origin)
            return self._try(piece, watch)
        outcomes: list[_Outcome] = []
        for at in range(piece.batch.num_rows):
            row = piece.slice(at, 1)
            failure = watch.condemned(self._index, self._op.name, row)
            outcomes.append(self._try(row, watch) if failure is None else _Outcome(1, None, [(0, failure)]))
        return _joined(outcomes, self._op.name, piece.origin)

    def _try(self, piece: Piece, watch: Watch) -> _Outcome:
        """The answer to one batch. Out of memory, or with rows that fail: in parts."""
        rows = piece.batch.num_rows
        self._memory.begin()
        began = time.perf_counter()
        argument, given = self._argument(piece)
        try:
            result, shared = self._tensors.call(self._model, (argument, *self._op.model.args), self._op.model.kwargs, given)
            made = self._named(result, rows, given, shared)
        except RowError as exc:
            failed = self._failed(exc, piece, watch)
        else:
            self._learn(piece, made, time.perf_counter() - began)
            return _Outcome(rows, made)
        del argument, given
        return self._after(failed, piece, watch)

    def _argument(self, piece: Piece) -> tuple[Any, Given]:
        """What the model is called with."""
        if self._format == "torch":
            batch, given = self._tensors.read(piece.batch)
        else:
            batch, given = to_format(piece.batch, self._format, self._reader)
        if not self._op.single:
            return batch, given
        name = self._op.inputs[0]
        return (batch[name] if self._format != "pyarrow" else piece.batch.column(name)), given

    def _named(self, result: Any, rows: int, given: Given, shared: bool) -> pa.RecordBatch:
        """The output columns of an answer. Raises Refused."""
        made = name_outputs(self._op, result, rows, given, shared, self._like)
        self._like = made.schema
        return made

    def _learn(self, piece: Piece, made: pa.RecordBatch, seconds: float) -> None:
        """A batch was answered."""
        if self._fixed is not None:
            return
        rows, input_bytes, answer_bytes = piece.batch.num_rows, piece.batch.nbytes, made.nbytes
        # With a batch ahead the peak is that of two, which is what this size takes.
        self._tuner.peaks.add(rows, self._memory.peak_bytes(input_bytes + answer_bytes))
        self._tuner.record(rows, seconds, input_bytes)
        self._row_s = min(seconds / rows, self._row_s or math.inf)
        self._answered += rows
        self._answer_bytes += answer_bytes

    # ---------------------------------------------------------------- what fails

    def _failed(self, exc: BaseException, piece: Piece, watch: Watch) -> _Outcome | bool:
        """What becomes of a batch that failed: the outcome of a bad row; else it is to be tried in parts: True because memory
        ran out. Raises HeadraceError when it is neither.
        """
        rows = piece.batch.num_rows
        memory = is_out_of_memory(exc)
        if memory and rows > 1 and not self._deterministic and self._tuner.shrink(rows):
            return True
        if not (watch.tolerant and blames_rows(exc)) or (memory and rows > 1):
            error = blame(exc, self._op, piece)
            if memory:
                error.hint = _memory_hint(rows)
            raise error from None
        return _Outcome(1, None, [(0, failure_of(exc, self._op.name))]) if rows == 1 else False

    def _after(self, failed: _Outcome | bool, piece: Piece, watch: Watch) -> _Outcome:
        """The outcome of a batch that failed; called when the exception, and the frames that it held, are gone."""
        if isinstance(failed, _Outcome):
            return failed
        if failed:
            forget_shared()
            free_memory()
        rows = piece.batch.num_rows
        row_bytes = piece.batch.nbytes / rows
        outcomes: list[_Outcome] = []
        start = 0
        while start < rows:
            n = rows - start if start else rows // 2
            n = min(n, self._tuner.most(row_bytes)) if failed else n
            outcomes.append(self._try(piece.slice(start, n), watch))
            start += n
        return _joined(outcomes, self._op.name, piece.origin)

    # ---------------------------------------------------------------- one batch ahead

    def _submit(self, span: _Span, piece: Piece, watch: Watch, before: _Submitted | None) -> _Submitted:
        """Start on a batch; a failure is kept for when its turn comes."""
        under_way = piece.origin if before is None else join_origins([before.piece.origin, piece.origin])
        watch.enter(self._index, self._op.name, under_way)
        self._memory.begin(alone=before is None)
        began = time.perf_counter()
        argument, given = self._argument(piece)
        submitted = _Submitted(span, piece, given)
        try:
            submitted.handle = self._model.submit(argument, *self._op.model.args, **self._op.model.kwargs)
        except RowError as exc:
            submitted.error = exc
            self._check(submitted)
        submitted.seconds = time.perf_counter() - began
        return submitted

    def _check(self, submitted: _Submitted) -> None:
        """Fail a batch that was written to."""
        try:
            self._tensors.check(submitted.given)
        except BrokenModel as exc:
            submitted.error = exc

    def _collect(self, submitted: _Submitted) -> None:
        """Wait for the answer, or the failure, once."""
        if submitted.collected or submitted.error is not None:
            return
        submitted.collected = True
        handle, submitted.handle = submitted.handle, None
        began = time.perf_counter()
        try:
            submitted.result, submitted.shared = call(self._model.collect, (handle,), {})
        except RowError as exc:
            submitted.error = exc
        self._check(submitted)
        submitted.seconds += time.perf_counter() - began

    def _finish(self, batch: _Submitted, after: _Submitted | None, watch: Watch) -> _Outcome:
        """The outcome of a batch that was submitted, with another one under way behind it."""
        rows = batch.piece.batch.num_rows
        self._collect(batch)
        error, batch.error = batch.error, None
        if error is None:
            began = time.perf_counter()
            try:
                made = self._named(batch.result, rows, batch.given, batch.shared)
            except RowError as exc:
                error = exc
            else:
                self._learn(batch.piece, made, batch.seconds + time.perf_counter() - began)
                return _Outcome(rows, made)
            finally:
                batch.result = None
        if after is not None:
            self._collect(after)
        failed = self._failed(error, batch.piece, watch)
        error.__traceback__ = None  # its frames hold what the model was computing
        del error
        return self._after(failed, batch.piece, watch)


class _Submitted(Struct):
    """A batch that was given to a model that is kept ahead. seconds: that were spent on it, without those it ran unwatched."""

    span: _Span
    piece: Piece
    given: Given
    handle: Any = None
    error: BaseException | None = None
    result: Any = None
    shared: bool = True
    collected: bool = False
    seconds: float = 0.0


class _Outcome(Struct):
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


def _memory_hint(rows: int) -> str:
    if rows > 1:
        return f"deterministic=True keeps batches as they are, {rows} rows: give a smaller batch_size"
    return 'a single row does not fit into memory: make it smaller, or set such rows aside with on_error="quarantine"'
