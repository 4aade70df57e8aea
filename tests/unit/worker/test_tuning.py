"""Finding the batch size of a model, in virtual time, and knowing when memory ran out."""

from __future__ import annotations

import errno
import itertools
import math
import random
from collections.abc import Callable

import pytest

from headrace.worker.tuning import FIRST_ROWS, MAX_INPUT_BYTES, MAX_ROWS, BatchTuner, PeakMemory, is_out_of_memory

Cost = Callable[[int], float]  # seconds for a batch of so many rows

COSTS: dict[str, Cost] = {
    "a call costs 1 ms": lambda n: 1e-3 + 1e-6 * n,
    "a call costs 5 ms": lambda n: 5e-3 + 1e-4 * n,
    "a cache is full at 256 rows": lambda n: 5e-4 + n * (1e-5 if n <= 256 else 2e-5),
    "slower by and by": lambda n: 2e-3 + 2e-5 * n * (1 + n / 4000),
    "best at 8": lambda n: 1e-3 * n * (1 if n <= 8 else 1.3),
    "a call costs nothing": lambda n: 1e-4 * n,
}


def drive(tuner: BatchTuner, cost: Cost, seconds: float, seed: int = 0, most: int = 1 << 30) -> float:
    """Run batches for so long, and no more than `most`; rows per second.

    A batch takes up to 10% longer than it should, every 20th three times as long, and the first one ten times.
    """
    chance = random.Random(seed)
    passed, rows = 9 * cost(tuner.rows), 0
    for _ in range(most):
        if passed >= seconds:
            break
        n = tuner.fit(8)
        took = cost(n) * (1 + 0.1 * chance.random()) * (3 if chance.random() < 0.05 else 1)
        tuner.record(n, took, 8 * n)
        passed += took
        rows += n
    return rows / passed


def best_rate(cost: Cost) -> float:
    return max(n / cost(n) for n in (1 << k for k in range(17)) if n <= MAX_ROWS)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", COSTS)
def test_the_size_found_is_about_the_best(name: str, seed: int) -> None:
    cost, tuner = COSTS[name], BatchTuner()
    drive(tuner, cost, 60.0, seed)
    assert tuner.settled
    assert tuner.best / cost(tuner.best) >= 0.93 * best_rate(cost)


@pytest.mark.parametrize("name", COSTS)
def test_the_search_costs_little(name: str) -> None:
    """Over a minute, in the median of nine runs, beside the best size under the same noise (of 1.16 on average)."""
    cost = COSTS[name]
    rates = sorted(drive(BatchTuner(), cost, 60.0, seed) for seed in range(9))
    assert rates[4] >= 0.95 * best_rate(cost) / 1.16


def test_one_slow_batch_decides_nothing() -> None:
    """At every size the second batch is slow."""
    tuner, seen = BatchTuner(), dict[int, int]()
    for _ in range(400):
        n = tuner.fit(8)
        seen[n] = seen.get(n, 0) + 1
        tuner.record(n, (1e-2 + 1e-6 * n) * (4 if seen[n] == 2 else 1), 8 * n)
    assert tuner.best == MAX_ROWS


def test_a_model_that_changes_is_followed_both_ways() -> None:
    tuner = BatchTuner()
    drive(tuner, COSTS["a call costs 1 ms"], 20.0)
    large = tuner.best
    drive(tuner, COSTS["best at 8"], 1e9, most=5000)
    assert tuner.best <= 16 < large
    drive(tuner, COSTS["a call costs 5 ms"], 300.0)
    assert tuner.best >= 512


def test_it_starts_small_and_grows_by_measure() -> None:
    tuner, sizes = BatchTuner(), list[int]()
    for _ in range(60):
        n = tuner.fit(8)
        sizes.append(n)
        tuner.record(n, 1e-2 + 1e-5 * n, 8 * n)
    assert sizes[0] == FIRST_ROWS
    assert all(n <= 4 * max(sizes[:i]) for i, n in enumerate(sizes) if i)
    assert len(set(sizes)) < 14


def test_texts_that_become_longer_are_not_taken_for_a_slower_size() -> None:
    """Work is counted by bytes too: 400 bytes a row at first, 1600 in the batches that are tried next."""
    tuner = BatchTuner()
    for i in range(200):
        n = tuner.fit(400)
        row_bytes = 400 if i < 4 else 1600
        tuner.record(n, 1e-2 + 1e-6 * n * row_bytes, n * row_bytes)
    assert tuner.best >= 128


def test_a_size_that_was_good_before_is_where_it_starts() -> None:
    tuner = BatchTuner(start=2048)
    assert tuner.fit(8) == 2048
    assert tuner.settled
    drive(tuner, COSTS["best at 8"], 600.0)
    assert tuner.best < 2048


def test_fixed_sizes_do_not_move() -> None:
    tuner = BatchTuner(100)
    drive(tuner, COSTS["a call costs 1 ms"], 1.0)
    assert tuner.fit(MAX_INPUT_BYTES) == tuner.wanted == 100


def test_when_there_are_no_more_rows_it_takes_those_there_are() -> None:
    tuner = BatchTuner()
    for _ in range(300):
        n = min(700, tuner.fit(8))
        tuner.record(n, 1e-2 + 1e-6 * n, 8 * n)
    assert tuner.settled
    assert tuner.best in (512, 700)


def test_wide_rows_make_small_batches() -> None:
    assert BatchTuner(start=1000).fit(MAX_INPUT_BYTES / 4) == 4
    assert BatchTuner().fit(MAX_INPUT_BYTES * 2) == 1


def test_it_wants_rows_for_the_next_size_while_it_climbs() -> None:
    tuner = BatchTuner()
    assert tuner.wanted == 2 * FIRST_ROWS
    drive(tuner, COSTS["a cache is full at 256 rows"], 20.0)
    assert tuner.wanted in (tuner.best, tuner.rows)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_after_memory_ran_out_it_stays_below() -> None:
    tuner = BatchTuner(start=4096)
    assert tuner.shrink(4096)
    assert tuner.fit(8) == 2048
    sizes = set[int]()
    for _ in range(2000):
        n = tuner.fit(8)
        sizes.add(n)
        tuner.record(n, 1e-2 + 1e-6 * n, 8 * n)
    assert 2048 < max(sizes) <= 0.9 * 4096
    assert not tuner.shrink(1)


def test_a_trial_that_does_not_fit_leaves_the_best_alone() -> None:
    tuner = BatchTuner()
    fits = 300
    failures = list[int]()
    for _ in range(500):
        n = tuner.fit(8)
        if n > fits:
            failures.append(n)
            assert tuner.shrink(n)
            continue
        tuner.record(n, 1e-2 + 1e-6 * n, 8 * n)
    assert all(later <= 0.9 * earlier for earlier, later in itertools.pairwise(failures))
    assert fits / 2 <= tuner.best <= fits


def test_growth_ends_before_memory_does() -> None:
    """10 MB a row beside 100 MB: 1 GB is full at 92 rows."""
    tuner = BatchTuner(room_bytes=lambda: 1_000_000_000)
    largest = 0
    for _ in range(1000):
        n = tuner.fit(8)
        largest = max(largest, n)
        tuner.peaks.add(n, 100_000_000 + 10_000_000 * n)
        tuner.record(n, 1e-2 + 1e-6 * n, 8 * n)
    assert largest == 64


def test_peaks_are_a_line() -> None:
    peaks = PeakMemory()
    assert peaks.predict(100) == 0.0
    peaks.add(8, 180)
    assert peaks.predict(16) == 360
    peaks.add(16, 260)
    assert peaks.predict(32) == 420  # 100 + 10 * rows
    peaks.add(32, 260)
    assert peaks.predict(64) == 260  # never less for more


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


def _library_error(library: str, text: str) -> Exception:
    return type("LibraryError", (Exception,), {"__module__": f"{library}.core"})(text)


def _caused(cause: Exception) -> Exception:
    error = ValueError("this batch failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("whatever"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)"),
        RuntimeError("std::bad_alloc"),
        _library_error("onnxruntime", "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested"),
        _library_error("jaxlib", "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes."),
        _library_error("tensorflow", "OOM when allocating tensor with shape[8192,8192] and type float"),
        _library_error("xgboost", "std::bad_alloc"),
        _library_error("lightgbm", "bad allocation"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        _caused(OutOfMemoryError()),
    ],
    ids=lambda e: f"{type(e).__module__}.{e}"[:40],
)
def test_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("the text says: CUDA out of memory"),
        RuntimeError("RESOURCE_EXHAUSTED: quota exceeded for requests per minute"),
        _library_error("requests", "out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyError("OutOfMemoryError"),
        _caused(ValueError("no")),
    ],
    ids=lambda e: f"{type(e).__module__}.{e}"[:40],
)
def test_not_out_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_what_torch_raises_for_a_host() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("no"))


MEASURED = {1: 4_000, 8: 29_400, 32: 104_000, 128: 233_000, 512: 320_000, 2048: 332_000, 8192: 363_000, 32768: 400_000}
THREADED = {**MEASURED, 16: 60_000, 32: 40_000, 64: 50_000, 128: 60_000, 256: 80_000}  # as BLAS is between 32 and 256 rows


def rate_on(curve: dict[int, int], n: int) -> float:
    """Rows per second, between the sizes that were measured by the logarithm of the size."""
    sizes = sorted(curve)
    above = next((s for s in sizes if s >= n), sizes[-1])
    below = max((s for s in sizes if s <= n), default=sizes[0])
    part = 0.0 if above <= below else math.log(n / below) / math.log(above / below)
    return curve[below] + part * (curve[above] - curve[below])


@pytest.mark.parametrize("curve", [MEASURED, THREADED])
@pytest.mark.parametrize("slow", [0.0, 0.1])
def test_a_plateau_and_a_dent_are_passed(curve: dict[int, int], slow: float) -> None:
    """In five seconds, in the median of nine runs. slow: how many batches take two to five times as long."""
    found: list[float] = []
    for seed in range(9):
        chance, tuner = random.Random(seed), BatchTuner()
        while tuner.measured_s < 5.0:
            n = tuner.fit(8)
            took = n / rate_on(curve, n) * (1 + 0.1 * chance.random())
            tuner.record(n, took * (chance.choice((2, 3, 5)) if chance.random() < slow else 1), 8 * n)
        found.append(rate_on(curve, tuner.best) / max(curve.values()))
    assert sorted(found)[4] >= 0.9


def test_leaps_are_never_into_batches_that_take_long() -> None:
    """Where doubling has stopped, nothing of which a batch would take 0.1 s is tried."""
    tuner, sizes = BatchTuner(), set[int]()
    for _ in range(20_000):
        n = tuner.fit(8)
        sizes.add(n)
        tuner.record(n, 4e-3 * n, 8 * n)
    assert max(sizes) <= 32


# --- short batches ---------------------------------------------------------------------------------------------------


def sizes_of(tuner: BatchTuner, cost: Cost, rows: int, most: int = 1 << 30) -> list[int]:
    """Of the batches that so many rows make; no more than `most` are at hand at a time."""
    sizes: list[int] = []
    while rows:
        n = min(tuner.fit(8), rows, most)
        tuner.record(n, cost(n), 8 * n)
        sizes.append(n)
        rows -= n
    return sizes


def test_a_model_whose_calls_cost_all_is_called_a_few_times() -> None:
    assert sizes_of(BatchTuner(), lambda n: 1e-3, 2000) == [8, 64, 512, 1416]


def test_a_slow_first_call_is_taken_for_warm_up() -> None:
    costs = itertools.chain([0.5], itertools.repeat(1e-3))
    assert sizes_of(BatchTuner(), lambda n: next(costs), 600) == [8, 8, 64, 512, 8]


def test_a_larger_size_that_was_slower_is_left_at_once() -> None:
    sizes = sizes_of(BatchTuner(), lambda n: 1e-4 * n if n <= 8 else 2e-4 * n, 200)
    assert sizes[:2] == [8, 64]
    assert max(sizes[2:]) <= 16


def test_long_batches_never_grow_by_leaps() -> None:
    sizes = sizes_of(BatchTuner(), lambda n: 3e-3 + 1e-6 * n, 5000)
    assert all(b <= 4 * a for a, b in itertools.pairwise(sizes))


def test_fewer_rows_at_hand_than_wanted_are_measured() -> None:
    sizes = sizes_of(BatchTuner(), lambda n: 1e-3, 5000, most=100)
    assert sizes[:3] == [8, 64, 100]


def test_a_short_search_goes_on_where_the_last_one_was() -> None:
    tuner = BatchTuner(first=512)
    assert not tuner.settled
    assert sizes_of(tuner, lambda n: 1e-3, 5000)[:2] == [512, 4096]
    drive(tuner, COSTS["best at 8"], 1e9, most=5000)
    assert tuner.best <= 16
