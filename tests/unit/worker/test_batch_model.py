"""Batches that run out of memory, models that are kept one batch ahead, and sizes that are remembered."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.unit.worker.fakes import BatchSource, Bench, column, fn, numbers

from headrace.core.errors import UserCodeError
from headrace.core.stages import Order
from headrace.core.steps import StepDone, StepFailed
from headrace.plan import nodes
from headrace.worker import batch_sizes
from headrace.worker.tuning import FIRST_ROWS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    return tmp_path / batch_sizes.FILE


def stage(model: Any, *, batch_rows: int | None = None, **kwargs: Any) -> Bench:
    op = nodes.Predict(fn(model), ("x",), True, ("p",), batch_rows=batch_rows)
    return Bench([op], model=True, columns_in=("x",), order=Order.FREE, **kwargs)


class Small:
    """A device with room for `room` rows, or for as many as `room` says at each call."""

    def __init__(self, room: Any) -> None:
        self.room = room if callable(room) else lambda call: room
        self.sizes: list[int] = []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.sizes.append(len(x))
        if len(x) > self.room(len(self.sizes)):
            raise MemoryError("no room")
        return x + 1


# --- out of memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_rows", [None, 512])
@pytest.mark.parametrize("room", [1, 7, 100])
def test_no_row_is_lost_on_a_device_that_is_smaller_than_thought(room: int, batch_rows: int | None) -> None:
    model = Small(room)
    bench = stage(model, batch_rows=batch_rows)
    for i in range(20 if room > 1 else 6):
        assert column(bench.applied(numbers(300, 300 * i), numbers(211)), "p")[:300] == list(range(300 * i + 1, 300 * i + 301))
    failed = [n for n in model.sizes if n > room]
    assert failed == sorted(failed, reverse=True)
    assert all(later <= 0.9 * earlier for earlier, later in itertools.pairwise(failed))
    assert max(model.sizes[-50:]) <= room


def test_room_that_shrinks_during_the_run() -> None:
    model = Small(lambda call: 1000 if call < 30 else 50 if call < 60 else 3)
    bench = stage(model)
    for i in range(30):
        assert column(bench.applied(numbers(500, i)), "p") == list(range(i + 1, i + 501))
    assert max(model.sizes[-20:]) <= 3


def test_among_other_operators_too() -> None:
    model = Small(10)
    op = nodes.Predict(fn(model), ("x",), True, ("p",))
    out = Bench([op], source=BatchSource([numbers(400), numbers(300, 400)])).run()
    assert column(out, "p") == list(range(1, 701))


def test_wide_columns_that_are_carried_bound_what_waits_for_a_batch() -> None:
    """1 MB a row: 64 rows are given to the model although it is worth more to it."""
    model = Small(1 << 30)
    wide = [pa.record_batch({"x": np.arange(16), "wide": pa.array([b"." * (1 << 20)] * 16)}) for _ in range(8)]
    op = nodes.Predict(fn(model), ("x",), True, ("p",))
    bench = Bench([op], source=BatchSource(wide))
    key = batch_sizes.key_of(op.model, "cpu", wide[0].select(["x"]).schema)
    batch_sizes.remember(key, 4096)
    bench.run()
    assert model.sizes[0] == 16, "before it knows the rows it wants few"
    assert max(model.sizes) == 64


class PickyDevice:
    """Row 5 does not fit, even alone."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if 5 in x:
            raise RuntimeError("CUDA out of memory. Tried to allocate 90.00 GiB")
        return x


def test_a_row_that_does_not_fit_is_a_bad_row() -> None:
    bench = stage(PickyDevice(), on_error="skip")
    done = bench.apply(numbers(12))
    assert isinstance(done, StepDone)
    assert done.shares[0].tally.skipped == 1
    assert column([bench.batch(b) for b in done.outputs], "p") == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]


def test_or_an_error_that_says_so() -> None:
    done = stage(PickyDevice()).apply(numbers(12))
    assert isinstance(done, StepFailed)
    assert isinstance(done.error, UserCodeError)
    assert "CUDA out of memory" in str(done.error)
    assert "a single row does not fit into memory" in (done.error.hint or "")
    assert ("rows", "rows 5-5 of a.parquet") in done.error.where


def test_a_deterministic_batch_is_not_cut_up() -> None:
    done = stage(Small(100), deterministic=True).apply(numbers(300))
    assert isinstance(done, StepFailed)
    assert "give a smaller batch_size" in (done.error.hint or "")


# --- one batch ahead -------------------------------------------------------------------------------------------------


class Device:
    """Notes what it is asked. fails: (method, first row of the batch) -> exception, once each; room: rows that fit."""

    def __init__(self, fails: dict[tuple[str, int], Exception] | None = None, room: int = 1 << 30, bad: int = -1) -> None:
        self.log: list[str] = []
        self.fails = fails or {}
        self.room = room
        self.bad = bad
        self.under_way: list[np.ndarray] = []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        assert not self.under_way, "a batch is tried again while another is under way"
        self.log.append(f"call {x[0]}")
        self._check("call", x)
        return x * 2

    def submit(self, x: np.ndarray) -> int:
        self.log.append(f"submit {x[0]}")
        self._check("submit", x)
        self.under_way.append(x)
        return int(x[0])

    def collect(self, handle: int) -> np.ndarray:
        self.log.append(f"collect {handle}")
        x = self.under_way.pop(0)
        assert x[0] == handle, "handles are collected in order"
        self._check("collect", x)
        return x * 2

    def _check(self, method: str, x: np.ndarray) -> None:
        if (error := self.fails.pop((method, int(x[0])), None)) is not None:
            raise error
        if len(x) > self.room:
            raise MemoryError
        if self.bad in x:
            raise ValueError("a bad row")


def test_the_next_batch_is_submitted_before_the_answer_is_collected() -> None:
    device = Device()
    out = stage(device, batch_rows=2).applied(numbers(5), numbers(3, 5))
    assert column(out, "p") == [2 * i for i in range(8)]
    assert device.log == [
        "submit 0",
        "submit 2",
        "collect 0",
        "submit 4",
        "collect 2",
        "submit 6",
        "collect 4",
        "collect 6",
    ]


@pytest.mark.parametrize("method", ["submit", "collect"])
def test_memory_that_runs_out_with_a_batch_ahead(method: str) -> None:
    device = Device({(method, 4): MemoryError()})
    out = stage(device, batch_rows=4).applied(numbers(12))
    assert column(out, "p") == [2 * i for i in range(12)]
    again = ["call 4", "call 6"]
    if method == "submit":
        assert device.log == ["submit 0", "submit 4", "collect 0", "submit 8", "collect 8", *again]
    else:
        assert device.log == ["submit 0", "submit 4", "collect 0", "submit 8", "collect 4", "collect 8", *again]


def test_a_device_that_is_too_small_for_any_two_batches() -> None:
    device = Device(room=3)
    bench = stage(device)
    for i in range(10):
        assert column(bench.applied(numbers(100, 100 * i)), "p") == [200 * i + 2 * k for k in range(100)]


@pytest.mark.parametrize("bad", [0, 3, 4, 9])
def test_bad_rows_with_a_batch_ahead(bad: int) -> None:
    device = Device(bad=bad)
    bench = stage(device, batch_rows=4, on_error="skip")
    done = bench.apply(numbers(10))
    assert isinstance(done, StepDone)
    assert column([bench.batch(b) for b in done.outputs], "p") == [2 * i for i in range(10) if i != bad]
    assert not device.under_way


@pytest.mark.parametrize("method", ["submit", "collect"])
def test_an_error_leaves_nothing_under_way(method: str) -> None:
    device = Device({(method, 4): ValueError("no")})
    done = stage(device, batch_rows=4).apply(numbers(20))
    assert isinstance(done, StepFailed)
    assert "raised ValueError: no" in str(done.error)
    assert ("rows", "rows 4-7 of a.parquet") in done.error.where
    assert not device.under_way


def test_a_step_is_worth_several_batches_to_a_model_that_is_kept_ahead() -> None:
    done = stage(Device(), batch_rows=100).apply(numbers(10))
    assert isinstance(done, StepDone)
    assert done.wanted_rows == 400
    done = stage(lambda x: x, batch_rows=100).apply(numbers(10))
    assert isinstance(done, StepDone)
    assert done.wanted_rows == 100
    done = stage(Device(), deterministic=True).apply(numbers(10))
    assert isinstance(done, StepDone)
    assert done.wanted_rows == 0


# --- remembered ------------------------------------------------------------------------------------------------------

MODEL = nodes.UserFunction(np.cbrt)
KEY = batch_sizes.key_of(MODEL, "cpu", numbers(1).schema)


def test_sizes_are_kept_for_model_device_and_row(cache: Path) -> None:
    assert batch_sizes.recall(KEY) is None
    batch_sizes.remember(KEY, 512)
    batch_sizes.remember("other", 64)
    assert json.loads(cache.read_text()) == {"version": 1, "sizes": {KEY: 512, "other": 64}}
    batch_sizes._known.clear()  # as in a later run
    assert batch_sizes.recall(KEY) == 512
    tensors = pa.schema([("x", pa.fixed_shape_tensor(pa.uint8(), (224, 224, 3)))])
    larger = pa.schema([("x", pa.fixed_shape_tensor(pa.uint8(), (512, 512, 3)))])
    keys = {batch_sizes.key_of(MODEL, device, schema) for device in ("cpu", "sim:0") for schema in (tensors, larger)}
    assert len(keys | {KEY}) == 5
    assert batch_sizes.key_of(MODEL, "sim:1", tensors) == batch_sizes.key_of(MODEL, "sim:0", tensors)


def test_functions_of_the_same_name_are_told_apart_by_their_code() -> None:
    plus, minus = fn(lambda x: x + x), fn(lambda x: x - x - x)
    assert batch_sizes.key_of(plus, "cpu", numbers(1).schema) != batch_sizes.key_of(minus, "cpu", numbers(1).schema)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"[]",
        b'{"version": 2, "sizes": {"k": 4}}',
        b'{"version": 1, "sizes": [4]}',
        b'{"version": 1, "sizes": {"k": "4", "l": 0, "m": true, "n": 1e9, "o": -3, "p": 99999999}}',
    ],
)
def test_a_file_that_makes_no_sense_is_passed_over(cache: Path, content: bytes) -> None:
    cache.write_bytes(content)
    assert [batch_sizes.recall(k) for k in "klmnop"] == [None] * 6
    batch_sizes.remember("k", 4)
    assert json.loads(cache.read_text())["sizes"] == {"k": 4}


def test_a_folder_that_can_not_be_written_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "file" / "below"))
    batch_sizes.remember(KEY, 512)
    assert batch_sizes.recall(KEY) == 512


def test_the_oldest_entries_go_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_sizes, "MOST_ENTRIES", 3)
    for i in range(5):
        batch_sizes.remember(f"k{i}", 8)
    assert list(json.loads(cache.read_text())["sizes"]) == ["k2", "k3", "k4"]
    assert [p.name for p in cache.parent.iterdir()] == [cache.name]


def test_a_worker_starts_where_an_earlier_one_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_sizes, "LEAST_S", 0.0)
    first, second = Small(100), Small(100)
    bench = stage(first)
    for _ in range(20):
        bench.applied(numbers(2000))
    bench.body.close()
    assert first.sizes[0] == FIRST_ROWS
    found = batch_sizes.recall(batch_sizes.key_of(fn(second), "cpu", numbers(1).select(["x"]).schema))
    assert found is not None
    bench = stage(second)
    bench.applied(numbers(2000))
    assert second.sizes[0] == found


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (110, [110]),
        (126, [100, 26]),
        (300, [100] * 3),
        (330, [110] * 3),
        (230, [115, 115]),
        (520, [100] + [105] * 4),
        (950, [100] * 5 + [113, 113, 112, 112]),
    ],
)
def test_the_rest_of_the_rows_at_hand_is_shared_out(rows: int, sizes: list[int]) -> None:
    """A call of its own costs more than what the others get, where that is little."""
    model = Small(1 << 30)
    batch_sizes.remember(batch_sizes.key_of(fn(model), "cpu", numbers(1).select(["x"]).schema), 100)
    stage(model).applied(numbers(rows))
    assert model.sizes == sizes


def test_short_runs_leave_no_trace(cache: Path) -> None:
    bench = stage(Small(100))
    bench.applied(numbers(2000))
    bench.body.close()
    assert not cache.exists()
