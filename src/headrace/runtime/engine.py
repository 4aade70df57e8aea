"""Which substrate runs a plan: threads unless a short probe shows that its Python code holds the interpreter lock.

The probe runs the first rows through the CPU operators while a second thread keeps asking for the interpreter: the share of
times it is kept waiting is the share of the time in which two such threads would not run at once. Output never depends on
the answer; user functions are called again on the first rows, as after any retry: quick ones up to a hundred times.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from headrace.connectors.storage import is_remote
from headrace.contracts.sink import Sink
from headrace.contracts.source import Source
from headrace.core.errors import DataError, PlanError
from headrace.core.options import Engine
from headrace.core.refs import Origin
from headrace.core.resources import CPU_POOL, WorkerSpec
from headrace.core.splits import Split
from headrace.core.stages import End, Order, Stage
from headrace.core.steps import Advance, StepDone, StepFailed
from headrace.plan.nodes import AUTO_BATCH_ROWS, Apply, FilterRows, FlatMap, MapBatches, MapRows, Predict
from headrace.runtime.trial_mark import died_of, key_of, mark
from headrace.worker.program import Program
from headrace.worker.readahead import Ahead, Begun, begin_reading
from headrace.worker.tried import Tried
from headrace.worker.user_code import Functions, is_for_main_threads

PROBE_S = 0.03  # enough for about 40 samples of the interpreter lock, too short to be felt
PROBE_AIM_S = 0.04  # what the next sample may take if it takes as long for each row as the one before
PROBE_SMALL_AIM_S = 0.12  # the same where there is little input: it tells sooner that there is little to do
PROBE_GROWTH = 64  # the next sample has so many times the rows at most
FIXED, FIXED_GROWTH = 1.5, 8  # twice the rows took not even so many times as long: a call costs more than its rows
MORE_ROWS, MORE_LEAST_S, LONG_S = 8, 0.25, 20.0  # tried once more, where it took no longer, and all would take as long
PROBE_TIMES = 32  # that a whole block is run at most
PROBE_FAILURES = 4  # samples with bad rows, until it is given up
# A generator may make any number of rows of one: no more of them are made than so many bytes, or in so much time.
PROBE_BYTES = 128 << 20
PROBE_MOST_S = 1.0
ASK_S = 0.0002  # between asking twice for the interpreter
LEAST_S = 1e-6  # that a sample takes
LOOKS, DOUBT_SHARE = 3, 0.2  # at functions that seem to hold the lock for that much longer than they use a core,
DISTURBED_SHARE = 0.05  # or enough to matter, while other programs have the cores for so much of the time
READINGS = 3  # of the time and of how long a thread has waited, until it has not waited in between
FREE_S = 0.00015  # that asking for a free interpreter takes; one that is held gives way after 5 ms
ALONE_SHARE = 0.67  # above this, no number of threads does the work of 1.5
HELD_SHARE = 0.35  # above this, two threads do the work of less than 1.5; more of them get in each other's way sooner,
LEAST_HELD_SHARE = 0.1  # though ten threads that hold it so long are still worth sharing what they have loaded
WORTH_S = 0.6  # starting processes costs about 0.25 s: worth it when half of this much locked time is saved
# What reading and writing takes, measured on files of 100 to 20,000 rows; of long splits only the first two hold the lock.
FRAGMENT_S = 0.0003
SPLIT_S = 0.0005
BYTE_S = 1.8e-8
SHORT_SPLIT_S = 0.008  # each of a split's hundreds of short calls hands the lock over: here two threads do no more than one
TINY_BYTES = 64 << 10  # inputs smaller than this are read and written faster than Python turns to the next
LOOK_AHEAD = 4096  # inputs listed to see how much there is; with more, processes have paid for themselves

SMALL_S = 0.05  # of work in all: more workers than one cost about half of that, and save no more
SMALL_BYTES = 4 << 20  # of input, read and written in about that time

SOON_S, SOON_SHARE = 2.0, 0.25  # of work in all, by a sample, at most; and of the time that the first row took, with loading

WAITS_SHARE = 0.5  # of a model's time without CPU: it waits for an endpoint, a device, a sleep
WAITS_LEAST = 0.1  # of the sample's time: less is not worth workers of its own


class Probe(Struct, frozen=True):
    """held: share of the time in which the interpreter lock was held. rows, wall_s, bytes (as stored, where that is less): of
    the sample that was run; without the time in which other programs had its core, as far as the system tells.

    cpu_s: CPU time of its thread. models_s: time inside models. first_s: of the first row, with what it
    imports and loads. whole: the sample was run to its end. row_s: of a row among many, as far as samples tell.
    """

    held: float
    rows: int
    wall_s: float
    bytes: int
    cpu_s: float
    models_s: float
    first_s: float = 0.0
    whole: bool = True
    row_s: float = 0.0

    @property
    def models_wait(self) -> bool:
        """The models spend their time waiting, so that they should not hold a CPU worker meanwhile."""
        waited_s = self.wall_s - self.cpu_s
        return self.models_s >= WAITS_LEAST * self.wall_s and waited_s >= WAITS_SHARE * self.models_s


class Sampled(Struct, frozen=True):
    """What a row takes in the first `ops` operators. row_bytes: of the sample, in Arrow, or as stored where that is less.
    all_s: what all rows take, inf where it is not known how many there are.
    """

    ops: int
    row_s: float
    row_bytes: float
    all_s: float


class Choice(Struct, frozen=True):
    """engine, and why in words. models_wait: see Probe; False where no probe was needed. small: one CPU worker is enough.
    sampled: None where nothing was tried.
    """

    engine: str
    why: str
    models_wait: bool = False
    small: bool = False
    sampled: Sampled | None = None


def asked_engine(asked: Engine, program: Program, timeout: float | None = None) -> Choice | None:
    """What the caller's options leave no choice about; None where `choose_engine` has to. timeout: see RunOptions.

    Raises PlanError for processes where there are none, and for a timeout that nothing could enforce.
    """
    if asked == "processes" and sys.platform != "linux":
        raise PlanError("processes need Linux (memfd)", hint='use engine="threads"')
    if asked != "ray" and timeout is not None:
        return _killable(asked, program, timeout)
    return None if asked == "auto" else Choice(asked, "asked for")


def may_want_processes(asked: Engine, source: Source, sink: Sink, cores: int) -> bool:
    """Is it likely enough that what they need is worth preparing before the choice is made? Lists no more than tells."""
    if sys.platform != "linux" or cores < 2 or asked not in ("auto", "processes"):
        return False
    if asked == "processes":
        return True
    size = overhead_s = 0.0
    for split in source.splits(per_input=sink.per_input or source.remote):  # far away nothing is read to divide it
        size += split.bytes
        overhead_s += SPLIT_S + len(split.fragments) * FRAGMENT_S
        if size > SMALL_BYTES or overhead_s >= WORTH_S:
            return True
    return False


def choose_engine(program: Program, cores: int, *, after_crash: bool | None = None) -> Choice:
    """What suits the plan. The probe runs in this process: a function that ends it ends the caller.

    after_crash: an earlier session of the run died at work, maybe of these functions: they are not run here again, unless they
    can run nowhere else. None: there is no log to tell; marks do.
    """
    ops = _cpu_ops(program)
    named = [op.name for op in program.ops[:ops] if isinstance(op, FilterRows | MapRows | FlatMap | MapBatches | Predict)]
    marking: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if named and after_crash is None:
        key = key_of(program.source.describe(), program.ops[:ops])
        after_crash, marking = died_of(key), mark(key)
    if not (named and after_crash):
        with marking:
            return _by_work(program, ops, named, cores)
    died = f"an earlier process died at work, maybe of {', '.join(named)}"
    if sys.platform == "linux" and _ships(program):
        return Choice("processes", f"{died}: workers that die are replaced")
    lack = "the plan can't be sent to them (it does not pickle)" if sys.platform == "linux" else "they need Linux"
    choice = _by_work(program, ops, named, cores)
    return replace(choice, why=f"{choice.why}; {died}, which processes would survive, but {lack}")


def _by_work(program: Program, ops: int, named: Sequence[str], cores: int) -> Choice:
    """named: functions among the first `ops` operators, which run on the CPUs."""
    work = _work(program)
    tiny = work.fragments > 1 and work.bytes < TINY_BYTES * work.fragments
    if tiny and work.overhead_s >= WORTH_S and sys.platform == "linux" and cores > 1 and _ships(program):
        return Choice("processes", f"{work.fragments} tiny inputs: reading and writing them holds the interpreter lock")
    try:
        probe = _probe(program, ops, work) if named else None
    except _ForMainThreads:
        return _in_main_threads(program, f"{', '.join(named)} can be called in main threads only")
    choice = _suited(program, ops, named, cores, work, probe, tiny=tiny)
    if probe is None:
        return choice
    all_s = work.functions_s(probe) if work.known else math.inf
    return replace(choice, sampled=Sampled(ops, probe.row_s, probe.bytes / probe.rows, all_s))


def _in_main_threads(program: Program, why: str) -> Choice:
    if sys.platform == "linux" and _ships(program):
        return Choice("processes", why)
    here = threading.current_thread() is threading.main_thread()
    return Choice("inline" if here else "threads", why)


def _suited(
    program: Program, ops: int, named: Sequence[str], cores: int, work: Work, probe: Probe | None, *, tiny: bool
) -> Choice:
    # Steps of ours that compute are not tried: images may take as long as a function, outside of the lock.
    plain = not any(isinstance(op, Apply) for op in program.ops[:ops])
    why, waits, functions_s, held = "no function of yours runs on the CPUs", False, 0.0, 0.0
    if work.small and (not named or (probe is not None and work.is_quick(probe))):
        return Choice("threads", f"{work.amount}: one worker is enough", small=True)
    if probe is not None:
        functions_s, held = work.functions_s(probe), probe.held
        why = f"{', '.join(named)} held the interpreter lock {probe.held:.0%} of {probe.wall_s * 1e3:.0f} ms"
        if work.decided(probe):
            why = f"{', '.join(named)} takes little beside reading and writing"
        waits = probe.models_wait
    elif named:
        why = f"{', '.join(named)} could not be tried: there is no row to try, or the first ones fail"
    told = probe is not None or not named
    alone = work.known and not waits and ops == len(program.ops)  # could one worker do all of it?
    many, what = (work.fragments, "tiny inputs") if tiny else (work.splits, "small splits")
    short = told and plain and work.io_s + functions_s <= SHORT_SPLIT_S * many
    io_s = work.io_s if short else work.overhead_s
    locked_s, total_s = io_s + held * functions_s, io_s + functions_s
    if short and locked_s >= HELD_SHARE * total_s:
        why = f"{many:,} {what}: threads would read and write them in turn"
        if alone and not work.remote and ALONE_SHARE * total_s <= locked_s < WORTH_S:
            return Choice("threads", f"{why}, one worker is enough", small=True)
    if alone and probe is not None and total_s <= min(SOON_S, probe.first_s * SOON_SHARE):
        return Choice("threads", f"{why}; one worker ends before another one has loaded what it needs", small=True)
    if locked_s < WORTH_S:
        return Choice("threads", why, waits)
    if locked_s < max(LEAST_HELD_SHARE, HELD_SHARE * 2 / cores) * total_s:
        return Choice("threads", why, waits)
    if sys.platform != "linux":
        return Choice("threads", f"{why}, but processes need Linux", waits)
    if cores == 1:
        return Choice("threads", f"{why}, but there is one core", waits)
    if not _ships(program):
        return Choice("threads", f"{why}, but the plan can't be sent to processes (it does not pickle)", waits)
    return Choice("processes", why, waits)


def _killable(asked: Engine, program: Program, timeout: float) -> Choice:
    """Processes: the only workers that can be ended. No probe: the function that hangs may hang there."""
    why = f"timeout={timeout:g}"
    if asked in ("inline", "threads"):
        raise PlanError(
            f"{why} can't be kept with engine=\"{asked}\": a thread that hangs can't be ended",
            hint='use engine="processes" or "auto", or leave timeout out',
        )
    if sys.platform != "linux":
        raise PlanError(f"{why} can't be kept here: it needs worker processes, and those need Linux", hint="leave timeout out")
    if asked == "auto" and not _ships(program):
        raise PlanError(
            f"{why} can't be kept: it needs worker processes, and the plan can't be sent to them (it does not pickle)",
            hint="build what does not pickle in a class's __init__, which runs in the worker, or leave timeout out",
        )
    return Choice("processes", "asked for" if asked == "processes" else f"with {why} a worker that hangs must be ended")


class Work(Struct, frozen=True):
    """How much there is, or at least is: the listing is looked at for LOOK_AHEAD inputs. all: it is no more than that.

    rows: 0 when unknown. remote: each split waits for a network.
    """

    splits: int
    fragments: int
    bytes: int
    rows: int
    all: bool
    remote: bool

    @property
    def overhead_s(self) -> float:
        return self.splits * SPLIT_S + self.fragments * FRAGMENT_S

    @property
    def io_s(self) -> float:
        """What reading and writing takes, by one worker."""
        return self.overhead_s + self.bytes * BYTE_S

    @property
    def amount(self) -> str:
        """In words."""
        count, unit = (self.rows, "row") if self.rows else (self.splits, "split")
        return f"{count:,} {unit}" + ("" if count == 1 else "s")

    @property
    def known(self) -> bool:
        """Is it known how much there is?"""
        return self.all and (bool(self.bytes or self.rows) or not self.splits)

    @property
    def small(self) -> bool:
        """Is reading and writing it quickly done?"""
        quick = self.bytes <= SMALL_BYTES and self.overhead_s <= SMALL_S
        return self.known and quick and (self.splits <= 1 or not self.remote)

    def functions_s(self, probe: Probe) -> float:
        """What the functions take for all of it, by a sample."""
        return probe.wall_s * max(self.bytes / max(1, probe.bytes), self.rows / max(1, probe.rows))

    def decided(self, probe: Probe) -> bool:
        """Is the choice the same whatever share of the time the functions hold the lock? Whether models wait takes longer to
        tell.
        """
        functions_s = self.functions_s(probe)
        little = functions_s <= (1 / ALONE_SHARE - 1) * self.io_s and functions_s + self.io_s < WORTH_S
        return self.known and little and not probe.models_wait

    def is_quick(self, probe: Probe) -> bool:
        return self.overhead_s + self.functions_s(probe) <= SMALL_S


def _work(program: Program) -> Work:
    splits = fragments = size = rows = 0
    per_input = program.sink is not None and program.sink.per_input
    remote = program.source.remote or is_remote(str(getattr(program.sink, "path", "")))
    most = LOOK_AHEAD // 4 if program.source.remote else LOOK_AHEAD
    for split in program.source.splits(per_input=per_input):
        splits += 1
        fragments += len(split.fragments)
        size += split.bytes
        rows += split.rows or 0
        if fragments >= most:
            break
    return Work(splits, fragments, size, rows, fragments < most, remote)


def _cpu_ops(program: Program) -> int:
    """How many operators from the start run on CPUs."""
    stops = [s.first for s in program.stages if s.pool != CPU_POOL]
    return min(stops, default=len(program.ops))


class _ForMainThreads(Exception):
    """What was tried can be called in main threads only, and the trial is none."""


_First = tuple[Split, Any, Origin]  # a split, its first block with rows, and where those came from


def _probe(program: Program, ops: int, work: Work) -> Probe | None:
    """What a sample told. None when there is no input, or the functions raise for all that is tried: the run will say.

    Raises _ForMainThreads.
    """
    first = _first_block(program)
    if first is None:
        return None
    split, block, origin = first
    trial = _Trial(program, ops, split, _stored_share(split, block, origin))
    try:
        found = _grown(trial, block, work)
        if found is None:
            return None
        return replace(found, row_s=_row_s(trial, block, work, found) if program.divisible else found.wall_s / found.rows)
    finally:
        trial.close()  # what it has constructed waits in `program.tried`


def _grown(trial: _Trial, block: Any, work: Work) -> Probe | None:
    """Run growing samples until one takes PROBE_S, or tells that there is little to do; a whole block several times. A sample
    in which a row fails is given up, and a smaller one of later rows taken.
    """
    aim_s = PROBE_SMALL_AIM_S if work.small else PROBE_AIM_S
    best: Probe | None = None
    failures = start = 0
    before: Probe | None = None
    rows, watched, first_s = 1, False, 0.0  # the first run imports libraries and constructs models: it is not counted
    while failures < PROBE_FAILURES and start < block.num_rows:
        rows = min(rows, block.num_rows - start)
        if rows > AUTO_BATCH_ROWS:
            import pyarrow.compute  # noqa: F401 - or a column's first call of it would: 20 ms once, with the lock held

        found = trial.run(block.slice(start, rows), watched=watched)
        if found is None:
            failures += 1
            start, rows = start + rows, max(1, rows // PROBE_GROWTH)
            continue
        if not watched:
            first_s = found.wall_s
            if not found.whole:
                watched = True
                continue
        else:
            before, best = best, replace(found, first_s=first_s)
            found = best
            if not found.whole or found.wall_s >= PROBE_S or (work.small and work.is_quick(found)):
                return found
            if rows == block.num_rows - start:
                if work.decided(found):
                    return found
                # Again and again: the lock is held for milliseconds at a time.
                again = trial.run(block.slice(start), times=min(PROBE_TIMES, int(PROBE_S / found.wall_s) + 1))
                return best if again is None else replace(again, first_s=first_s)
        growth = min(max(1 + watched, int(aim_s / found.wall_s)), PROBE_GROWTH)
        if before is not None and found.rows >= 2 * before.rows and found.wall_s < FIXED * before.wall_s:
            growth = max(growth, FIXED_GROWTH)
        rows, watched = rows * growth, True
    return best


def _row_s(trial: _Trial, block: Any, work: Work, found: Probe) -> float:
    """Of a row. Where a few rows take long, which may be the call's share and not theirs, some more are tried."""
    more = min(block.num_rows, found.rows * MORE_ROWS)
    slow = work.functions_s(found) >= LONG_S or not work.known
    if slow and found.whole and found.rows < AUTO_BATCH_ROWS and found.rows < more and found.wall_s <= MORE_LEAST_S:
        again = trial.run(block.slice(0, more), watched=False)
        if again is not None and again.whole:
            return min(again.wall_s / again.rows, found.wall_s / found.rows)
    return found.wall_s / found.rows


def _stored_share(split: Split, block: Any, origin: Origin) -> float:
    """What the inputs that these rows came from are stored in, of what they take in Arrow; 1.0 where it is more, or unknown."""
    if len(split.fragments) < 2:
        return 1.0
    there = {segment.uri for segment in origin.segments}
    stored = sum(fragment.size_bytes for fragment in split.fragments if fragment.uri in there)
    return min(1.0, stored / max(1, block.nbytes)) if stored else 1.0


def _first_block(program: Program) -> _First | None:
    """Of what can be read; where that is nothing, the run will say. What came of a remote split is left to its workers."""
    for split in program.source.splits(per_input=False):
        if program.source.remote:
            return _first_remote_block(program, split)
        blocks = program.source.open(split, program.limits, lambda bad: None)
        try:
            for block, origin in blocks:
                if block.num_rows:
                    return split, block, origin
        finally:
            close = getattr(blocks, "close", None)
            if close is not None:
                close()
        return None
    return None


def _first_remote_block(program: Program, split: Split) -> _First | None:
    def read(split: Split) -> Begun:
        return begin_reading(program.source, split, program.limits, fails=program.on_error == "fail")

    try:
        found = program.ahead.first(split, program.limits, read)
    except DataError:
        return None
    return None if found is None else (split, *found)


class _Trial:
    """The CPU operators in a worker body of their own, run over one sample after the other. stored: see _stored_share."""

    def __init__(self, program: Program, ops: int, split: Split, stored: float) -> None:
        from headrace.substrates.inline import LocalStore
        from headrace.worker.body import WorkerBody

        stage = Stage(0, "probe", CPU_POOL, Order.SOURCE, End.DELIVER, 0, ops)
        self._source = _Sample(program.source)
        source: Any = self._source
        trial = replace(
            program,
            source=source,
            ops=program.ops[:ops],
            stages=(stage,),
            sink=None,
            on_error="fail",
            ahead=Ahead(),
            tried=Tried(program.tried.loads),
        )
        self._tried = program.tried
        self._deterministic = program.deterministic
        self._body = WorkerBody(trial, WorkerSpec(0, CPU_POOL, "cpu"), LocalStore(0, itertools.count().__next__))
        self._tried.begin(self._body.close)
        self._split = split
        self._stored = stored
        self._models = [i for i, op in enumerate(program.ops[:ops]) if isinstance(op, Predict)]
        self._runs = 0

    def run(self, sample: Any, *, times: int = 1, watched: bool = True) -> Probe | None:
        """watched: held is told."""
        from headrace.substrates.bodies import run_guarded

        self._source.block = sample

        def run() -> _Watched:
            return _watch(lambda: [run_guarded(self._body, self._step()) for _ in range(times)], watched)

        seen = self._tried.call(run)
        done = _done(seen.answer)
        for _ in range(LOOKS - 1):
            # To hold it one needs a core, but for rare libraries: more often something else made the watcher wait. And a
            # function that is without a core for a while may hold it meanwhile.
            unlikely = seen.held > sum(answer.timing.cpu_s for answer in done) / seen.wall_s + DOUBT_SHARE
            likely = not unlikely and (seen.held < HELD_SHARE or seen.disturbed < DISTURBED_SHARE)
            if likely or seen.wall_s > MORE_LEAST_S or len(done) < times or not all(answer.finished for answer in done):
                break
            again = self._tried.call(run)
            if len(_done(again.answer)) < times:  # a function that fails now and then: what the look before told holds
                self._tried.call(self._drop)
                break
            if again.held < seen.held:
                seen, done = again, _done(again.answer)
        held, wall_s = seen.held, seen.wall_s
        timings = [answer.timing for answer in done]
        if len(timings) < times:
            return None
        whole = all(answer.finished for answer in done)
        models_s = sum(op.wall_s for timing in timings for op in timing.ops if op.op in self._models)
        cpu_s = sum(timing.cpu_s for timing in timings)
        if not whole:
            self._tried.call(self._drop)
            made = sum(block.rows for answer in done for block in answer.outputs)
            if made > sample.num_rows * times:  # of how many of the rows is not known: one at least was begun
                nbytes = max(1, int(self._stored * sample.nbytes / sample.num_rows))
                return Probe(held, 1, wall_s, nbytes, cpu_s, models_s, whole=False)
        nbytes = int(self._stored * sample.nbytes * times)
        return Probe(held, sample.num_rows * times, wall_s, nbytes, cpu_s, models_s, whole=whole)

    def _drop(self) -> None:
        for cursor in range(1, self._runs + 1):
            self._body.discard(cursor)

    def _step(self) -> Any:
        self._runs += 1
        index = self._split.index
        return Advance(
            0, 0, 0, self._runs, index, 1, split=self._split, end=True, credit_bytes=PROBE_BYTES, credit_s=PROBE_MOST_S
        )

    def close(self) -> None:
        """What may go on is kept: models. Functions may have a state, which must be that of a run without a trial."""
        if not self._tried.left:
            self._tried.keep(self._tried.call(self._leave))

    def _leave(self) -> Functions:
        functions = self._body.leave()
        functions.keep(() if self._deterministic else self._models)
        return functions


def _done(answers: Sequence[Any]) -> list[StepDone]:
    if any(isinstance(answer, StepFailed) and is_for_main_threads(answer.error.message) for answer in answers):
        raise _ForMainThreads
    return [answer for answer in answers if isinstance(answer, StepDone)]


class _Watched(Struct, frozen=True):
    """held: share of the time in which the interpreter was. wall_s: without the time in which the caller had no core.
    disturbed: share of the time in which it or the watcher had none.
    """

    answer: Any
    held: float
    wall_s: float
    disturbed: float


def _watch(call: Callable[[], Any], watched: bool) -> _Watched:
    begun, done = threading.Event(), threading.Event()
    held = disturbed = 0.0

    def sample() -> None:
        """Ask for the interpreter again and again: as long as it is held, the answer does not come."""
        nonlocal held, disturbed
        late_s, queued_s, started = 0.0, _queued_s(), time.perf_counter()
        begun.set()
        while not done.is_set():
            before = time.perf_counter()
            time.sleep(ASK_S)
            late_s += max(0.0, time.perf_counter() - before - ASK_S - FREE_S)
        watched_s = max(time.perf_counter() - started, LEAST_S)
        queued_s = _queued_s() - queued_s
        held, disturbed = max(0.0, late_s - queued_s) / watched_s, queued_s / watched_s

    watcher = threading.Thread(target=sample, name="headrace-probe", daemon=True)
    if watched:
        watcher.start()
        begun.wait()  # or what holds the interpreter might be over before it is asked for
    began_s, started = time.perf_counter(), _running_s()
    try:
        answer = call()
    finally:
        wall_s = max(_running_s() - started, LEAST_S)
        took_s = max(time.perf_counter() - began_s, LEAST_S)
        done.set()
        if watched:
            watcher.join()
    return _Watched(answer, held, wall_s, max(disturbed, 1 - wall_s / took_s))


def _running_s() -> float:
    """A clock that stands still while this thread waits for a core: of two readings between which it did not wait."""
    now_s, queued_s = time.perf_counter(), _queued_s()
    for _ in range(READINGS):
        before_s, now_s, queued_s = queued_s, time.perf_counter(), _queued_s()
        if queued_s == before_s:
            break
    return now_s - queued_s


def _queued_s() -> float:
    """How long this thread has waited for a core since it began, though it had something to do; 0.0 where nothing tells."""
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:
            return int(file.read().split()[1]) * 1e-9
    except (OSError, ValueError, IndexError):
        return 0.0


class _Sample:
    """A source of one block."""

    name = "sample"
    remote = False

    def __init__(self, source: Any) -> None:
        self._source = source
        self.block: Any = None

    def schema(self) -> Any:
        return self._source.schema()

    def open(self, split: Split, limits: Any, on_bad: Any = None) -> Any:
        from headrace.core.refs import Origin

        yield self.block, Origin((), exact=False)


def _ships(program: Program) -> bool:
    import cloudpickle

    try:
        cloudpickle.dumps(program)
    except Exception:
        return False
    return True
