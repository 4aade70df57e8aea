"""What broke once: data, functions and plans at the edges of what the engine promises, on every engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.core.errors import PlanError, UserCodeError

from .conftest import read_back

Options = dict[str, Any]


class Reusing:
    """A model that answers with Arrow arrays over one buffer of its own."""

    def __init__(self) -> None:
        self.buffer = np.zeros(64)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, pa.Array]:
        rows = len(batch["x"])
        self.buffer[:rows] = batch["x"] * 10
        return {"y": pa.array(self.buffer[:rows])}


class ReusingFrame:
    """A function that keeps one frame and writes to it in place."""

    def __init__(self) -> None:
        import pandas as pd

        self.frame = pd.DataFrame({"y": np.zeros(10)})

    def __call__(self, batch: dict[str, np.ndarray]) -> Any:
        self.frame.loc[:, "y"] = batch["x"]
        return self.frame


def test_arrow_answers_over_a_reused_buffer_are_copied(data: Path, tmp_path: Path, quiet: Options) -> None:
    hr.read_parquet(data).predict(Reusing, input=["x"], output="y", batch_size=16).write_parquet(tmp_path / "out", **quiet)
    back = read_back(tmp_path / "out")
    assert back["y"].to_pylist() == (back["x"].to_numpy() * 10).tolist()


def test_a_frame_written_to_in_place_is_copied(data: Path, tmp_path: Path, quiet: Options) -> None:
    hr.read_parquet(data).map_batches(ReusingFrame, batch_size=10).write_parquet(tmp_path / "out", **quiet)
    assert read_back(tmp_path / "out")["y"].to_pylist() == (np.arange(200) * 0.5).tolist()


def test_structs_and_maps_keep_their_integers(tmp_path: Path, quiet: Options) -> None:
    large = 2**60 + 1
    rows = pa.table(
        {
            "s": pa.array([{"a": large, "t": None}, None, {"a": None, "t": 5}, {"a": 1, "t": 2}] * 5),
            "l": pa.array([[{"q": large}, None], None, [], [{"q": 2}]] * 5),
            "m": pa.array([[("k", large), ("n", None)], [], None, [("k", 1)]] * 5, pa.map_(pa.string(), pa.int64())),
        }
    )
    pq.write_table(rows, tmp_path / "in.parquet")
    ds = hr.read_parquet(tmp_path / "in.parquet").map_batches(lambda b: {k: v[::-1] for k, v in b.items()}, batch_size=20)
    ds.write_parquet(tmp_path / "out", **quiet)
    back = read_back(tmp_path / "out")
    assert back.to_pylist() == rows.to_pylist()[::-1]
    assert [f.type.equals(rows.schema.field(f.name).type) for f in back.schema if f.name == "m"] == [True]


def test_nones_first_and_values_later_make_one_column(data: Path, tmp_path: Path, quiet: Options) -> None:
    def late(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "text": "some" if row["id"] >= 60 else None, "list": [row["id"]] if row["id"] > 90 else []}

    run = hr.read_parquet(data).map(late).write_parquet(tmp_path / "out", **quiet)
    assert run.rows == 200
    back = read_back(tmp_path / "out")
    assert back["text"].to_pylist() == [None] * 60 + ["some"] * 140
    assert back["list"].to_pylist()[90:92] == [[], [91]]


def test_iter_batches_brings_drifting_types_together(data: Path, quiet: Options) -> None:
    def drifting(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": batch["x"] if batch["id"][0] >= 40 else batch["id"]}

    ds = hr.read_parquet(data).map_batches(drifting, batch_size=10)
    assert sum(len(b["y"]) for b in ds.iter_batches(batch_size=64, **quiet)) == 200


@pytest.mark.parametrize("capped", [False, True])
def test_batches_are_whole_after_row_functions_in_an_earlier_stage(tmp_path: Path, quiet: Options, capped: bool) -> None:
    """A row function works in chunks of its own; batches after it are still cut from the start of the split."""
    rows = 4000
    pq.write_table(pa.table({"id": np.arange(rows), "v": [b"%d" % i * 500 for i in range(rows)]}), tmp_path / "in.parquet")
    ds = hr.read_parquet(tmp_path / "in.parquet").map(lambda row: row)
    if not capped:
        ds = ds.predict(lambda ids: ids, input="id", output="y", device="sim")
    ds = ds.map_batches(
        lambda b: {"n": np.full(len(b["id"]), len(b["id"]))}, batch_size=1500, concurrency=1 if capped else None
    )
    ds.write_parquet(tmp_path / "out", **quiet)
    assert read_back(tmp_path / "out")["n"].to_pylist() == [1500] * 3000 + [1000] * 1000


def test_batches_by_default_are_at_most_1024_rows(tmp_path: Path, quiet: Options) -> None:
    pq.write_table(pa.table({"id": np.arange(50_000)}), tmp_path / "in.parquet")
    ds = hr.read_parquet(tmp_path / "in.parquet").map_batches(lambda b: {"n": [len(b["id"])]})
    sizes = ds.to_arrow(**quiet)["n"].to_numpy()
    assert sizes.sum() == 50_000
    assert sizes.max() <= 1024


def test_an_input_with_two_columns_of_one_name_is_refused(tmp_path: Path, quiet: Options) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "in.parquet")
    with pytest.raises(PlanError, match="more than one column 'a'"):
        hr.read_parquet(tmp_path / "in.parquet").to_arrow(**quiet)


@pytest.mark.parametrize("batch_format", ["pyarrow", "pandas"])
def test_a_result_with_two_columns_of_one_name_is_refused(data: Path, quiet: Options, batch_format: Any) -> None:
    def twice(batch: Any) -> Any:
        return batch[["id", "id"]] if batch_format == "pandas" else batch.select([0, 0])

    ds = hr.read_parquet(data).map_batches(twice, batch_format=batch_format)
    with pytest.raises(UserCodeError, match="more than one column 'id'"):
        ds.to_arrow(**quiet)


@pytest.mark.parametrize("first", [False, True])
def test_count_drops_columns_from_a_projection_after_a_model(data: Path, quiet: Options, first: bool) -> None:
    """Nothing is wanted at the end, so that the model's stage carries no column on: a later select must not ask for one."""
    ds = hr.read_parquet(data)
    if first:
        ds = ds.map(lambda row: row)
    ds = ds.predict(lambda b: b["x"], input=["id", "x", "name", "label", "nested", "when"], output="y", device="sim")
    assert ds.select("id", "y").filter(pc.field("y") >= 0).count(**quiet) == 200
    assert ds.select("id", "y").limit(60).count(**quiet) == 60


def test_blocks_are_gone_without_the_garbage_collector(data: Path) -> None:
    """Memory in flight is counted, so what has left must be free at once: cycles would keep gigabytes for a while."""

    def expand(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for _ in range(20):
            yield {"id": row["id"], "b": b"x" * 20_000}

    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    gc.collect()
    gc.disable()
    try:
        ds = hr.read_parquet(data).flat_map(expand).predict(lambda b: np.ones(len(b)), input="b", output="n", device="sim")
        run = ds.run(engine="inline", progress="quiet", memory_bytes=8 << 20)
        left = pool.bytes_allocated() - before
    finally:
        gc.enable()
    assert run.rows == 4000
    assert left < 16 << 20, "of 80 MB that went through"


@pytest.mark.parametrize("at", ["MemorySampled", "RunFinished", "StepFinished", "close"])
def test_a_failing_observer_leaves_nothing_behind(
    data: Path, tmp_path: Path, engine: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def on_event(self, event: Any) -> None:
            if type(event).__name__ == at:
                raise RuntimeError("observer")

        def close(self) -> None:
            if at == "close":
                raise RuntimeError("observer")

    monkeypatch.setattr("headrace.observe.progress.make_observers", lambda _: [Failing()])
    with pytest.raises(RuntimeError, match="observer"):  # threads and processes: see conftest
        hr.read_parquet(data).map(lambda row: row).write_parquet(tmp_path / "out", engine=engine)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory was removed."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()


@pytest.mark.usefixtures("nowhere")
def test_a_working_directory_that_was_removed_is_not_needed(data: Path, tmp_path: Path, quiet: Options) -> None:
    hr.read_parquet(data).map(lambda row: {"y": row["id"] * 2}).write_parquet(tmp_path / "out", **quiet)
    assert read_back(tmp_path / "out")["y"].to_pylist() == list(range(0, 400, 2))


@pytest.mark.usefixtures("nowhere")
def test_relative_paths_lead_nowhere_when_the_working_directory_was_removed(data: Path) -> None:
    with pytest.raises(PlanError, match="'in' leads nowhere: the working directory was removed"):
        hr.read_parquet("in")
    with pytest.raises(PlanError, match="'out' leads nowhere: the working directory was removed"):
        hr.read_parquet(data).write_parquet("out", progress="quiet")
    with pytest.raises(PlanError, match="'out' leads nowhere: the working directory was removed"):
        hr.why("out")


@pytest.mark.usefixtures("nowhere")
def test_settings_may_be_relative_where_the_working_directory_was_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.connectors.environment import cache_folder
    from headrace.substrates.ray.actor import Surroundings

    monkeypatch.setattr("sys.path", ["", "src", "/usr/lib"])
    assert Surroundings.here().sys_path == ("/usr/lib", "")
    monkeypatch.setenv("HEADRACE_CACHE", "cache")
    with pytest.raises(PlanError, match="'cache' leads nowhere: the working directory was removed"):
        cache_folder()
