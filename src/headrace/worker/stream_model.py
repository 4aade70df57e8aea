"""Running a model that is an asynchronous stream of rows.

Steps are begun as they come, and answered as each one's last row is. Between them stands one long-lived call of the model's
`stream`, fed with the rows of all steps that were begun: a row that takes long holds back its own step, and nobody else.
The event loop lives in a thread of its own as long as the worker, so that connections outlast a step, and a loop that the
caller runs (a notebook's) is not in the way.

The input of a call ends when no row came for GRACE_S while some are unanswered, because a model may be gathering rows for a
batch; rows that come later go to a new call, while the old one answers what it has.

Invariants: a ticket's results are touched by the loop's thread alone until its `ready` was called, by the worker's alone
afterwards; each row of a ticket gets one result, or the ticket has an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from headrace.core.errors import HeadraceError, WorkerDied
from headrace.core.frames import with_room
from headrace.core.origins import join_origins
from headrace.core.refs import Origin
from headrace.plan.nodes import Predict
from headrace.worker.bad_rows import Failure, RowError, blames_rows, failure_of
from headrace.worker.batching import Piece
from headrace.worker.formats import Given, to_rows
from headrace.worker.model_answers import Answer, ModelRunner, blame, name_outputs
from headrace.worker.refused import BrokenModel, Refused
from headrace.worker.results import columns_of, fitting_rows, make_batch, rows_batch
from headrace.worker.tuning import FIXED_ROWS
from headrace.worker.user_code import internal_error
from headrace.worker.watch import NOBODY, Watch

Row = dict[str, Any]
GRACE_S = 0.05  # blocks of a source that keeps up come far closer than this
CLOSE_S = 5.0  # for a model to end when it has no row left
_NOTHING = Given(pa.schema([]))  # a row's answer need not be of the types that its columns had


class StreamRunner(ModelRunner):
    """A model that is an asynchronous stream of rows.

    Two methods of a model are used if it has them: `set_outputs(names)` tells the output columns, before any row; the coroutine
    `aclose()` is run in its event loop at the end.
    """

    def __init__(self, model: Any, op: Predict, index: int) -> None:
        self._model = model
        self._op = op
        self._index = index
        self.wanted_rows = op.batch_rows or FIXED_ROWS
        self._engine: _Engine | None = None
        self._tickets: dict[int, _Ticket] = {}  # of steps begun, by the identity of their watches
        if hasattr(model, "set_outputs"):
            model.set_outputs(op.output)

    def begin(
        self, inputs: Sequence[pa.RecordBatch], origins: Sequence[Origin], watch: Watch, ready: Callable[[], None]
    ) -> bool:
        self._tickets[id(watch)] = ticket = self._ticket(inputs, origins, watch, ready)
        self._give(ticket)
        return True

    def run(
        self,
        inputs: Sequence[pa.RecordBatch],
        origins: Sequence[Origin],
        part_bytes: int | None = None,
        watch: Watch = NOBODY,
        whole: pa.RecordBatch | None = None,
    ) -> Iterator[Answer]:
        ticket = self._tickets.pop(id(watch), None)
        if ticket is None:
            over = threading.Event()
            ticket = self._ticket(inputs, origins, watch, over.set)
            ticket.last = True
            self._give(ticket)
            over.wait()
        if ticket.error is not None:
            raise ticket.error
        return self._answers(ticket)

    def close(self) -> None:
        """Whatever is under way is cancelled."""
        self._tickets.clear()
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _ticket(
        self, inputs: Sequence[pa.RecordBatch], origins: Sequence[Origin], watch: Watch, ready: Callable[[], None]
    ) -> _Ticket:
        pieces = [Piece(b, o) for b, o in zip(inputs, origins, strict=True)]
        return _Ticket(pieces, watch, any(watch.doubts(self._index, p.origin) for p in pieces), ready)

    def _give(self, ticket: _Ticket) -> None:
        if self._engine is None:
            self._engine = _Engine(self._model, self._op, self._index)
        self._engine.give(ticket)

    def _answers(self, ticket: _Ticket) -> Iterator[Answer]:
        start = 0
        for i, piece in enumerate(ticket.pieces):
            results = ticket.results[start : start + piece.batch.num_rows]
            start += piece.batch.num_rows
            lost = [(at, r) for at, r in enumerate(results) if isinstance(r, Failure)]
            places = [at for at, r in enumerate(results) if not isinstance(r, Failure)]
            rows = [r for r in results if isinstance(r, dict)]
            if ticket.watch.tolerant:
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


class _Ticket:
    """The rows of one step. results: of each row, None as long as there is none. error: instead of results.

    alone: a worker has died on some of these rows: they are asked for one by one, with nothing else under way. last: nothing
    will follow, so the model need not wait for more. first: key of the first row.
    """

    __slots__ = ("alone", "done", "error", "first", "last", "missing", "pieces", "ready", "results", "rows", "watch")

    def __init__(self, pieces: Sequence[Piece], watch: Watch, alone: bool, ready: Callable[[], None]) -> None:
        self.pieces = pieces
        self.watch = watch
        self.alone = alone
        self.ready = ready
        self.rows: list[Row] = [row for piece in pieces for row in to_rows(piece.batch)]
        self.results: list[Row | Failure | None] = [None] * len(self.rows)
        self.missing = len(self.rows)
        self.error: HeadraceError | None = None
        self.last = self.done = False
        self.first = 0

    def find(self, at: int) -> tuple[Piece, int]:
        """The piece that holds row `at`, and the row's place in it."""
        for piece in self.pieces:
            if at < piece.batch.num_rows:
                return piece, at
            at -= piece.batch.num_rows
        raise IndexError(at)


_Asked = tuple[_Ticket, int]  # a row: its ticket, its place there


class _Input:
    """What one call of `stream` is given to iterate over. Cancelling a wait for the next row loses no row.

    rows: not taken yet. open: taken and not answered, by key. answered: answered rows of tickets that are not done.
    closing: no row will be added. ended: the model was told so.
    """

    def __init__(self, engine: _Engine, rows: Sequence[_Asked] = (), *, closing: bool = False) -> None:
        self._engine = engine
        self._news = asyncio.Event()
        self.rows = deque(rows)
        self.open: dict[int, _Asked] = {}
        self.answered: dict[int, _Asked] = {}
        self.closing = closing
        self.ended = False

    def __aiter__(self) -> _Input:
        return self

    async def __anext__(self) -> tuple[int, Row]:
        while not self.ended:
            while self.rows:
                ticket, at = self.rows.popleft()
                if ticket.done:  # it has failed
                    continue
                key = ticket.first + at
                self.open[key] = ticket, at
                self._engine.taken(ticket)
                return key, ticket.rows[at]
            if self.closing or not await self._more():
                self.ended = True
        raise StopAsyncIteration

    def add(self, rows: Sequence[_Asked]) -> None:
        self.rows.extend(rows)
        self._news.set()

    def answer(self, key: int) -> tuple[_Asked | None, bool]:
        """The row of this key, None for none; was it answered before?"""
        if key in self.answered:
            return self.answered[key], True
        asked = self.open.pop(key, None)
        if asked is None:  # a model may know the keys of rows that it has not taken yet
            asked = next((a for a in self.rows if a[0].first + a[1] == key), None)
            if asked is None:
                return None, False
            self.rows.remove(asked)
        self.answered[key] = asked
        return asked, False

    def end(self) -> None:
        self.closing = True
        self._news.set()

    async def _more(self) -> bool:
        """Wait for rows. False when the model had better answer what it has."""
        self._news.clear()
        if not self.open:
            await self._news.wait()
            return True
        try:
            async with asyncio.timeout(GRACE_S):
                await self._news.wait()
        except TimeoutError:
            return bool(self.rows) or not self.open
        return True


class _Engine:
    """The event loop, and the model's calls in it. `give` and `close` are the worker's, everything else the loop's."""

    def __init__(self, model: Any, op: Predict, index: int) -> None:
        self._model = model
        self._op = op
        self._index = index
        self._waiting: deque[_Ticket] = deque()
        self._at_work: dict[_Ticket, None] = {}  # tickets that the model has, or has had, rows of
        self._inputs: dict[_Input, None] = {}  # of calls under way
        self._tasks: set[asyncio.Task[None]] = set()
        self._next_key = 0
        self._closing = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=with_room, args=(self._main,), name="headrace-stream", daemon=True)
        self._thread.start()

    def give(self, ticket: _Ticket) -> None:
        self._loop.call_soon_threadsafe(self._take_in, ticket)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        self._thread.join()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            asyncio.set_event_loop(None)
            self._loop.close()

    async def _end(self) -> None:
        self._closing = True
        self._waiting.clear()
        try:
            for given in self._inputs:
                given.end()
            tasks = set(self._tasks)
            if tasks and not any(given.open or given.rows for given in self._inputs):
                await asyncio.wait(tasks, timeout=CLOSE_S)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left, timeout=CLOSE_S)
            aclose: Any = getattr(self._model, "aclose", None)
            if aclose is not None:
                with contextlib.suppress(Exception):  # the run is decided; nobody is left to act on it
                    await asyncio.wait_for(aclose(), CLOSE_S)
            await self._loop.shutdown_asyncgens()
        finally:
            self._loop.stop()

    # --- from tickets to calls ---------------------------------------------------------------------------------------

    def _take_in(self, ticket: _Ticket) -> None:
        ticket.first = self._next_key
        self._next_key += len(ticket.rows)
        if self._closing:
            return
        self._waiting.append(ticket)
        self._pump()

    def _pump(self) -> None:
        """Hand on the tickets that wait, as far as that may be: one whose rows are asked for alone waits until nothing else
        is under way, and what comes after it waits too.
        """
        while self._waiting and not self._closing:
            ticket = self._waiting[0]
            alone = any(t.alone for t in self._at_work)
            if ticket.alone and (self._inputs or self._tasks):
                for given in self._inputs:
                    given.end()
                return
            if alone:
                return
            self._waiting.popleft()
            if ticket.alone:
                self._at_work[ticket] = None
                self._spawn(self._one_by_one(ticket))
                return
            self._feed([(ticket, at) for at in range(len(ticket.rows))], ticket.last)

    def _feed(self, rows: Sequence[_Asked], last: bool = False) -> None:
        given = next((g for g in self._inputs if not g.closing and not g.ended), None)
        if given is None:
            given = _Input(self)
            self._inputs[given] = None
            self._spawn(self._call(given))
        given.add(rows)
        if last:
            given.end()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._fail_all(internal_error(fault, self._op.name))
        self._pump()

    def _fail_all(self, error: HeadraceError) -> None:
        waiting = [ticket for given in self._inputs for ticket, _ in (*given.rows, *given.open.values())]
        for ticket in dict.fromkeys([*self._at_work, *waiting, *self._waiting]):
            self._fail(ticket, error)

    async def _one_by_one(self, ticket: _Ticket) -> None:
        for at in range(len(ticket.rows)):
            piece, row = ticket.find(at)
            try:
                failure = ticket.watch.condemned(self._index, self._op.name, piece.slice(row, 1))
            except HeadraceError as error:
                self._fail(ticket, error)
            if ticket.done:
                return
            if failure is None:
                await self._ask([(ticket, at)])
            else:
                self._put(ticket, at, failure)

    # --- calls -------------------------------------------------------------------------------------------------------

    async def _ask(self, rows: Sequence[_Asked]) -> None:
        """A call for just these rows."""
        given = _Input(self, rows, closing=True)
        self._inputs[given] = None
        await self._call(given)

    async def _call(self, given: _Input) -> None:
        """One call of the model's stream, and what becomes of the rows that it leaves."""
        broken: RowError | None = None
        answers: Any = None
        try:
            answers = self._model.stream(given)
            async for key, answer in answers:
                self._take(given, key, answer)
        except BaseException as exc:
            if self._closing and isinstance(exc, asyncio.CancelledError):
                raise
            broken = exc
        finally:
            by_itself = not given.ended
            given.closing = given.ended = True
            del self._inputs[given]
            if hasattr(answers, "aclose"):
                with contextlib.suppress(Exception):
                    await answers.aclose()
        left = [asked for asked in given.open.values() if not asked[0].done]
        others = [asked for asked in given.rows if not asked[0].done]
        if others and (left if broken is not None else not by_itself):
            self._feed(others, others[-1][0].last)
        else:  # it ended, or broke with no row at hand: nothing says that another call would fare better
            left += others
        await self._settle(left, broken)

    async def _settle(self, left: Sequence[_Asked], broken: RowError | None) -> None:
        """Rows without an answer. Of a call that broke, those that a row may be to blame for are asked for in halves."""
        if not left:
            return
        first = left[0][0]
        if broken is None:
            for ticket in dict.fromkeys(ticket for ticket, _ in left):
                mine = [at for t, at in left if t is ticket]
                count = f"{len(mine)} of {len(ticket.rows)} rows"
                why = Refused(f"left {count} without an answer", "yield every key exactly once")
                for at in mine:
                    self._put_failure(ticket, at, why)
        elif not (first.watch.tolerant and blames_rows(broken)):
            for ticket in dict.fromkeys(ticket for ticket, _ in left):
                self._fail(ticket, blame(broken, self._op, ticket.pieces[0]))
        elif len(left) == 1:
            self._put_failure(*left[0], broken)
        else:
            half = len(left) // 2
            await self._ask(left[:half])
            await self._ask(left[half:])

    # --- answers -----------------------------------------------------------------------------------------------------

    def _take(self, given: _Input, key: Any, answer: Any) -> None:
        """An answer of the stream. Raises BrokenModel for one that belongs to no row."""
        asked, again = given.answer(key) if isinstance(key, int) else (None, False)
        if asked is None:
            raise BrokenModel(f"answered key {key!r}, which it was not given", "yield the keys that came with the rows")
        ticket, at = asked
        error = _row_error(answer, again)
        if error is not None:
            self._put_failure(ticket, at, error)
        else:
            self._put(ticket, at, dict(answer))

    def _put_failure(self, ticket: _Ticket, at: int, error: RowError) -> None:
        if ticket.watch.tolerant and blames_rows(error):
            self._put(ticket, at, failure_of(error, self._op.name))
        else:
            piece, row = ticket.find(at)
            self._fail(ticket, blame(error, self._op, piece, row))

    def _put(self, ticket: _Ticket, at: int, result: Row | Failure) -> None:
        """The last one completes the ticket, after the model had its say: it may be about to answer a row twice."""
        if ticket.done:
            return
        if ticket.results[at] is None:
            ticket.missing -= 1
            if not ticket.missing:
                self._loop.call_soon(self._complete, ticket)
        ticket.results[at] = result

    def _fail(self, ticket: _Ticket, error: HeadraceError) -> None:
        if not ticket.done:
            ticket.error = error
            self._complete(ticket)

    def _complete(self, ticket: _Ticket) -> None:
        if ticket.done:
            return
        ticket.done = True
        for given in self._inputs:
            for key in range(ticket.first, ticket.first + len(ticket.rows)):
                given.answered.pop(key, None)
        self._at_work.pop(ticket, None)
        with contextlib.suppress(WorkerDied):  # the run has stopped: nothing more begins, but this is to be told
            self._leave_crumb(ticket.watch)
        ticket.ready()

    # --- breadcrumbs -------------------------------------------------------------------------------------------------

    def taken(self, ticket: _Ticket) -> None:
        """The model takes a row of this ticket."""
        if ticket not in self._at_work:
            self._at_work[ticket] = None
            self._leave_crumb(ticket.watch)

    def _leave_crumb(self, watch: Watch) -> None:
        """Say which rows may be to blame if the worker dies now."""
        origins = [p.origin for ticket in self._at_work if not ticket.alone for p in ticket.pieces]
        if origins:
            watch.enter(self._index, self._op.name, join_origins(origins))


def _row_error(answer: Any, again: bool) -> Exception | None:
    """What is wrong with the answer to one row."""
    if again:
        return Refused("answered a row twice", "yield every key exactly once")
    if isinstance(answer, Exception):
        return answer
    if not isinstance(answer, Mapping):
        return Refused(f"answered a row with a {type(answer).__name__}", "yield (key, {column: value})")
    return None
