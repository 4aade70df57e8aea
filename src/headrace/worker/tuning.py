"""Finding out how many rows suit a model."""

from __future__ import annotations

FIRST_ROWS = 32  # small enough to answer at once, large enough to say something about speed
MAX_ROWS = 4096  # beyond this no model tried gains, and latency and memory only grow
MAX_INPUT_BYTES = 256 << 20
FIXED_ROWS = 256  # deterministic runs: the size must not depend on timing
GAIN = 1.05  # less is noise
SAMPLES = 2  # the first batch of a size pays for warm-up (kernels chosen, memory grown)


class BatchTuner:
    """How many rows a model gets at a time: doubles while that makes it faster, and remembers the best.

    Only whole batches count. `fixed` sizes only ever shrink, when memory runs out.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.rows = fixed or FIRST_ROWS
        self._settled = fixed is not None
        self._most = fixed or MAX_ROWS
        self._best = (0.0, self.rows)  # rows per second, at this many rows
        self._samples: list[float] = []

    def fit(self, row_bytes: float) -> int:
        """Rows for the next batch, given the size of a row of input."""
        if self._settled:
            return self.rows
        return max(1, min(self.rows, int(MAX_INPUT_BYTES / max(row_bytes, 1.0))))

    def record(self, rows: int, seconds: float) -> None:
        """A batch of `rows` rows took this long."""
        if self._settled or rows != self.rows:
            return
        self._samples.append(rows / max(seconds, 1e-9))
        if len(self._samples) < SAMPLES:
            return
        rate = max(self._samples)
        self._samples.clear()
        best, best_rows = self._best
        if rate > best * GAIN and rows * 2 <= self._most:
            self._best = (rate, rows)
            self.rows = rows * 2
        else:
            self.rows = rows if rate > best * GAIN else best_rows
            self._settled = True

    def shrink(self, rows: int) -> bool:
        """Memory ran out with this many rows. False when there is nothing left to halve."""
        if rows <= 1:
            return False
        self.rows = self._most = max(1, rows // 2)
        self._settled = True
        return True


def is_out_of_memory(exc: BaseException) -> bool:
    """By name, so that torch need not be imported; a device's error is a RuntimeError of its own type."""
    return isinstance(exc, MemoryError) or type(exc).__name__ in ("OutOfMemoryError", "XlaRuntimeOutOfMemory")
