"""Finding out how many rows suit a model, and telling that memory ran out.

Pure: nothing here calls a model or looks at a clock; `batch_model` says what happened, and asks for the next size.

How the size is found. Batches of less than SHORT_S are mostly what a call costs: the next one is eight times as large, as
long as that at least doubles the speed. From there on two sizes are compared at a time, the best so far and a trial. The trial
is twice the best (four times, where doubling nearly doubled the speed) and wins when it is clearly faster. What is not clear
after two batches is decided by batches of both in turn, so that a slow spell of the machine hits both, and by the faster half
of each, so that one slow batch decides nothing. Once a trial has lost, the best stays, and its neighbours are tried again ever
more rarely. What lies beyond the neighbours is looked at too, as soon as that costs little beside what has been done: speed
may stand still, or sink, over a few doublings and then rise again (caches, libraries that use threads from some size on).

Invariants: a fixed size only ever shrinks, when memory runs out; a batch is never larger than nine tenths of one for which
memory ran out; sizes have no influence on answers, because models are row-wise.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

FIRST_ROWS = 8  # where images or long texts no longer fit into a cache, the best size is about this
MAX_ROWS = 65_536  # rows of a block at most: batches of scikit-learn's forests still gain at some ten thousand rows
MAX_INPUT_BYTES = 256 << 20
FIXED_ROWS = 256  # deterministic runs: the size must not depend on timing
ROW_BYTES = 64  # a row is as much work as so many bytes of input, beside its own bytes: texts differ in length, numbers don't

SHORT_S = 0.002  # of a batch, the first ones: eight times as many rows take 16 ms at most
SHORT_FACTOR, SHORT_GAIN = 8, 2.0
CLEAR_GAIN = 1.10  # beyond the noise of two batches, while it climbs
CLEAR_LOSS = 0.80
GAIN = 1.015  # of doubling: less says that calls cost less than 3% of the time (from time = a + b * rows)
LATER_GAIN = 1.025  # to leave a size that was settled on for a larger one, or one below FIRST_ROWS
EQUAL = 0.98  # for a smaller one: of two that are as fast it is better, and a plateau is no place to stay
FEW, MANY = 2, 6  # samples of each size: for a clear result, for any. The first batch of a size pays for warm-up
LEAST_S = 0.005  # of samples of a size together, as far as MANY batches take so long: the clock and the caches are noisy
MOST_S = 2.0  # a batch that takes so long is no longer ruled by what a call costs
FIRST_WAIT, MOST_WAIT = 32, 1024  # batches between trials of neighbours, once settled
STARVED = 16  # batches that a trial waits for enough rows
SAFE = 0.9  # of a size that failed
CLEARLY_SMALLER = 0.7  # of two sizes: their peaks tell what a row takes
STRETCH = 1.25  # a batch may be so much larger than its size when the last ones of the rows at hand are one fewer by that
LEAPS = (8, 64)  # times the best: what is tried beyond its neighbours
LEAP_SHARE = 0.03  # of the time so far that leaps may take
LEAP_WAIT = 128  # between trials of neighbours, when leaps are due again
LITTLE_BYTES = 4 << 20  # of a batch: nobody need be asked whether there is so much; asking the host takes 0.2 ms
LEAP_S = 0.1  # a batch of a leap takes no longer, as it seems: within that little memory is filled


class PeakMemory:
    """Peak bytes of a batch as a + b * rows, from what was measured for one shape of row."""

    def __init__(self) -> None:
        self._peaks: dict[int, int] = {}  # rows -> bytes

    def add(self, rows: int, peak_bytes: int) -> None:
        self._peaks[rows] = max(peak_bytes, self._peaks.get(rows, 0))
        if len(self._peaks) > 8:
            del self._peaks[min(self._peaks)]

    def predict(self, rows: int) -> float:
        """Bytes for a batch of so many rows, by the largest size measured and one that is clearly smaller, never falling; 0.0
        while there are none. Allocators grow in steps: neighbours say nothing of a row.
        """
        if not self._peaks:
            return 0.0
        largest = max(self._peaks)
        smaller = max((size for size in self._peaks if size <= CLEARLY_SMALLER * largest), default=0)
        if not smaller:
            return self._peaks[largest] / largest * rows
        slope = (self._peaks[largest] - self._peaks[smaller]) / (largest - smaller)
        return self._peaks[largest] + max(0.0, slope) * (rows - largest)


class BatchTuner:
    """How many rows a model gets at a time. See the module for the method.

    fixed: the size that was asked for. start: one that was good before. first: where to begin, if there is none. room_bytes:
    how much a batch may use, None for unknown; asked before a larger size is tried.
    """

    def __init__(
        self,
        fixed: int | None = None,
        *,
        start: int | None = None,
        first: int | None = None,
        room_bytes: Callable[[], int | None] | None = None,
    ) -> None:
        self.best = fixed or start or first or FIRST_ROWS
        self.peaks = PeakMemory()
        self.measured_s = 0.0  # time that the samples took
        self._fixed = fixed is not None
        self._room_bytes = room_bytes
        self._limit = fixed or MAX_ROWS
        self._trial: int | None = None if fixed or start else self.best  # the first size is tried against nothing
        self._samples: dict[int, list[tuple[float, float]]] = {}  # size -> (work per second, seconds)
        self._row_bytes = 1.0
        self._climbing = not (fixed or start)
        self._rushing = self._climbing  # batches are short so far; then the trial is the best
        self._rushed = (first or 0, 0.0)  # the size before, and its work per second
        self._up = True  # the side of the next trial
        self._seen: dict[int, float] = {}  # sizes that were the best once -> work per second
        self._steep = False  # doubling nearly doubled the speed
        self._leaps = list(LEAPS)  # that were not tried yet from the best
        self._leaping = False  # the trial is a leap
        self._leapt_s = 0.0  # that leaps took
        self._wait = FIRST_WAIT
        self._batches = 0  # since the last trial ended
        self._starved = 0

    # ---------------------------------------------------------------- what is wanted

    @property
    def rows(self) -> int:
        """The size to be used next."""
        trial = self._trial
        if trial is None or self._count(trial) > self._count(self.best):
            return self.best
        first = self._count(trial) == self._count(self.best) and self._count(trial) >= FEW
        return self.best if first else trial

    @property
    def wanted(self) -> int:
        """Rows worth having at hand: while it climbs, for the next size too, so that it need not wait for them."""
        if self._fixed:
            return self.best
        most = max(self.best, self._trial or 0) * (2 if self._climbing else 1)
        return max(1, min(most, self._limit, self._fitting(self._row_bytes)))

    @property
    def settled(self) -> bool:
        return not self._climbing

    def fit(self, row_bytes: float) -> int:
        """Rows for the next batch, given the size of a row of input."""
        self._row_bytes = row_bytes
        return self.best if self._fixed else max(1, min(self.rows, self.most(row_bytes)))

    def most(self, row_bytes: float) -> int:
        """Rows that no batch may exceed."""
        return self._limit if self._fixed else max(1, min(self._limit, self._fitting(row_bytes)))

    @staticmethod
    def _fitting(row_bytes: float) -> int:
        return int(MAX_INPUT_BYTES / max(row_bytes, 1.0))

    # ---------------------------------------------------------------- what happened

    def record(self, rows: int, seconds: float, input_bytes: int = 0) -> None:
        """A batch of `rows` rows took this long."""
        if self._fixed:
            return
        self.measured_s += seconds
        self._batches += 1
        trial = self._trial
        if trial is not None and not self._count(trial) and STRETCH * self.best < rows < 0.9 * trial:
            trial = self._trial = rows  # there are no more rows at hand: then so many are tried
        rate = (rows * ROW_BYTES + input_bytes) / max(seconds, 1e-9)
        if self._rushing and self._rush(rows, rate, seconds):
            return
        if trial is not None and _near(rows, trial):
            self._leapt_s += seconds if self._leaping else 0.0
            self._samples.setdefault(trial, []).append((rate, seconds))
            self._starved = 0
        else:
            self._starved += trial is not None
            if _near(rows, self.best):
                self._samples[self.best] = [*self._samples.get(self.best, ())[-2 * MANY :], (rate, seconds)]
        if trial is None:
            self._next_trial()
        else:
            self._judge(trial)

    def shrink(self, rows: int) -> bool:
        """Memory ran out with this many rows. False when there is nothing left to halve."""
        if rows <= 1:
            return False
        half = max(1, rows // 2)
        self._limit = min(self._limit, half if self._fixed else max(1, int(SAFE * rows)))
        if rows <= self.best:
            self.best = half
        self._end_trial(self._wait)
        self._climbing = self._steep = self._rushing = False
        self._up = True
        self._samples.clear()
        self._seen.clear()
        return True

    # ---------------------------------------------------------------- short batches

    def _rush(self, rows: int, rate: float, seconds: float) -> bool:
        """Go on to a much larger size, or back from one that was too large; False: the batch is one like any other."""
        before, rate_before = self._rushed
        if rows < 0.9 * self.best:
            if rows <= 1.15 * before:
                return False  # a rest, which says nothing
            self.best = self._trial = rows  # there are no more rows at hand
        if not rate_before and seconds >= SHORT_S and self._batches == 1:
            return False  # the first batch of all pays for warm-up
        self._rushing = False
        if rate < rate_before:
            return self._begin_at(before)
        larger = min(SHORT_FACTOR * self.best, self._limit, self._fitting(self._row_bytes))
        worth = seconds < SHORT_S and rate >= SHORT_GAIN * rate_before
        if not worth or larger < 1.15 * self.best or not self.has_room(larger):
            return False
        self._rushing = True
        self._rushed = self.best, rate
        self._seen[self.best] = rate
        return self._begin_at(larger)

    def _begin_at(self, rows: int) -> bool:
        """Measure this size against nothing."""
        self.best = self._trial = rows
        self._samples.clear()
        return True

    # ---------------------------------------------------------------- comparing

    def _judge(self, trial: int) -> None:
        """Decide for a size, as soon as there is reason to."""
        taken = self._count(trial)
        seconds = sum(s for _, s in self._samples.get(trial, ()))
        if taken < FEW or (taken < MANY and seconds < LEAST_S):
            if self._starved >= STARVED:
                self._end_trial(min(2 * self._wait, MOST_WAIT))
                self._climbing = False
            return
        if trial == self.best:  # the first size of all
            self._won(trial, gain=1.0)
            return
        if not self._count(self.best):
            return  # its turn comes
        gain = self._rate(trial) / self._rate(self.best)
        enough = min(taken, self._count(self.best)) >= MANY
        needed = GAIN if self._climbing else EQUAL if FIRST_ROWS <= trial < self.best else LATER_GAIN
        if (self._climbing and gain >= CLEAR_GAIN) or (enough and gain >= needed):
            self._won(trial, gain)
        elif enough or (gain <= CLEAR_LOSS and taken > FEW) or self._starved >= STARVED:
            self._lost()

    def _won(self, trial: int, gain: float) -> None:
        """Go on in this direction."""
        factor = trial / self.best
        self._steep = factor > 1.5 and gain > 0.85 * factor
        self._up = trial >= self.best
        self._climbing = self._climbing or self._leaping
        self._leaps = list(LEAPS)
        self.best = trial
        self._seen[trial] = self._rate(trial)
        self._samples = {trial: self._samples[trial]}
        self._end_trial(FIRST_WAIT)
        self._try_neighbour()
        if self._trial is None:
            self._climbing = False

    def _lost(self) -> None:
        if self._leaping:
            self._end_trial(self._wait)
            return
        between = self._climbing and self._steep
        self._steep = False
        if between:  # there is a size between
            self._end_trial(FIRST_WAIT)
            self._try_neighbour()
            return
        if self._wait >= LEAP_WAIT:  # a slow spell may have hit them
            self._leaps = self._leaps or list(LEAPS)
        climbed, self._climbing = self._climbing, False
        self._up = not self._up or climbed  # the half of a size that was climbed to is known to be slower
        self._end_trial(FIRST_WAIT if climbed else min(2 * self._wait, MOST_WAIT))
        if climbed:
            self._look_back()

    def _look_back(self) -> None:
        """Two slow batches can make a size lose against a worse one: the best that was seen on the way gets another chance."""
        size = max(self._seen, key=lambda s: self._seen[s], default=self.best)
        if size < self.best and self._seen[size] > CLEAR_GAIN * self._rate(self.best):
            self._up = False
            self._trial = size
            self._samples.clear()

    def _end_trial(self, wait: int) -> None:
        if self._trial is not None and self._trial != self.best:
            self._samples.pop(self._trial, None)
        self._trial = None
        self._leaping = False
        self._wait = wait
        self._batches = self._starved = 0

    def _next_trial(self) -> None:
        if self._batches < min(self._wait, FIRST_WAIT):
            return
        if self._leap() or self._batches < self._wait:
            return
        self._try_neighbour()
        if self._trial is None:  # there is none on this side
            self._up = not self._up
            self._batches = 0
        else:
            self._samples.pop(self.best, None)  # what was measured long ago says little about now

    def _try_neighbour(self) -> None:
        """Begin a trial of the next size in the direction, if there is one that is sensible."""
        best = self.best
        if not self._up:
            size = best // 2
        else:
            times = [s for _, s in self._samples.get(best, ())]
            if times and min(times) > MOST_S:
                return
            size = min(best * (4 if self._steep else 2), self._limit, self._fitting(self._row_bytes))
            if size < 1.15 * best or not self.has_room(size):
                return
        self._trial = size if size >= 1 else None

    def _leap(self) -> bool:
        """Begin a trial far beyond the best, if one is due and costs little."""
        if not self._leaps or not self._count(self.best):
            return False
        size = min(self.best * self._leaps[0], self._limit, self._fitting(self._row_bytes))
        took = [s for _, s in self._samples[self.best][-2 * MANY :]]
        expected_s = sorted(took)[len(took) // 4] * size / self.best
        if size < 4 * self.best or expected_s > LEAP_S or not self.has_room(size):
            self._leaps.clear()  # nor is a farther one of use
            return False
        if self._leapt_s + (FEW + 1) * expected_s > LEAP_SHARE * self.measured_s:
            return False
        self._leaps.pop(0)
        self._trial, self._leaping = size, True
        self._samples.pop(self.best, None)
        return True

    def has_room(self, rows: int) -> bool:
        """May a batch be so large, by what smaller ones took?"""
        needed = self.peaks.predict(rows)
        if needed <= LITTLE_BYTES or self._room_bytes is None:
            return True
        room = self._room_bytes()
        return room is None or needed <= room

    def _count(self, size: int) -> int:
        return len(self._samples.get(size, ()))

    def _rate(self, size: int) -> float:
        """Of the faster half of the last samples."""
        rates = sorted((rate for rate, _ in self._samples[size][-2 * MANY :]), reverse=True)
        half = rates[: (len(rates) + 1) // 2]
        return sum(half) / len(half)


def _near(rows: int, size: int) -> bool:
    return 0.9 * size <= rows <= 1.3 * size


# --- memory ran out --------------------------------------------------------------------------------------------------

_LIBRARIES = ("torch", "onnxruntime", "xgboost", "lightgbm", "catboost", "cupy", "jax", "jaxlib", "tensorflow")
_TEXT = re.compile(
    r"(CUDA|HIP|XPU|MPS backend) out of memory"
    r"|(CUDA|HIP) error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation"
    r"|CU(BLAS|DNN|SOLVER)_STATUS_ALLOC_FAILED"
    r"|DefaultCPUAllocator: (can't allocate memory|not enough memory)"
    r"|Failed to allocate memory for requested buffer|std::bad_alloc|\bbad allocation\b"
    r"|RESOURCE_EXHAUSTED: .*(memory|allocat)|OOM when allocating"
)
_LIBRARY_TEXT = re.compile(r"Failed to allocate memory|bad_alloc|out of memory|Memory allocation error", re.IGNORECASE)
_DEPTH = 4  # of exceptions raised from one another


def is_out_of_memory(exc: BaseException) -> bool:
    """Did a host or a device run out of memory, or is that the stated cause?

    By name and text, so that no library need be imported. A text counts only in a RuntimeError or an error of a library that
    allocates: what a ValueError or a service's answer says of memory is not ours.
    """
    error: BaseException | None = exc
    for _ in range(_DEPTH):
        if error is None:
            return False
        if _says_out_of_memory(error):
            return True
        error = error.__cause__
    return False


def _says_out_of_memory(exc: BaseException) -> bool:
    if isinstance(exc, MemoryError):  # NumPy's and Arrow's are of this type
        return True
    if isinstance(exc, OSError):
        return exc.errno == errno.ENOMEM
    names = {base.__name__ for base in type(exc).__mro__}
    if names & {"OutOfMemoryError", "XlaRuntimeOutOfMemory"}:  # torch's, CuPy's
        return True
    ours = type(exc).__module__.partition(".")[0] in _LIBRARIES
    if not (ours or isinstance(exc, RuntimeError)):
        return False
    text = str(exc)
    return bool(_TEXT.search(text) or (ours and _LIBRARY_TEXT.search(text)))
