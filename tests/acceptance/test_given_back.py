"""Columns that a function of batches gives back as it got them: copied as they are stored in the input, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.plan import rules

from .conftest import ENGINES
from .test_carried_columns import ROWS, copied, same, table_of

Options = dict[str, Any]
Batch = dict[str, Any]
Twice = Callable[..., None]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of several row groups, gzipped, as pyarrow's writer never does here by itself."""
    folder = tmp_path_factory.mktemp("tables")
    for i in range(2):
        table = table_of(2 * ROWS + 100, i).drop_columns(["kind", "list", "map"])
        pq.write_table(table, folder / f"{i}.parquet", row_group_size=ROWS, compression="gzip")
    return folder


@pytest.fixture
def twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Twice:
    """Writes with and without copying; the outputs are the same."""

    def run(ds: Any, engine: str = "inline", **options: Any) -> None:
        quiet: Options = {"engine": engine, "progress": "quiet", "cpus": 2, **options}
        ds.write_parquet(tmp_path / "out", **quiet)
        with monkeypatch.context() as patch:
            patch.setattr(rules, "carry_stored", lambda plan, at_end, notes, *, leave: (plan, None))
            ds.write_parquet(tmp_path / "plain", **quiet)
        assert same(tmp_path / "out", tmp_path / "plain")
        assert copied(tmp_path / "plain", "id") == []

    return run


def more(batch: Batch) -> Batch:
    return {**batch, "y": batch["x"] * 2}


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "ray"])
def test_what_comes_back_is_copied(tables: Path, tmp_path: Path, twice: Twice, engine: str) -> None:
    twice(hr.read_parquet(tables).map_batches(more).evaluate(mean=hr.metrics.Mean("y")), engine)
    out = tmp_path / "out"
    assert copied(out) == copied(out, "word") == copied(out, "at") == [ROWS] * 4
    assert copied(out, "y") == copied(out, "deep.a") == copied(out, "must") == []  # new; may be changed inside; not null there
    assert hr.verify(str(out)).ok


@pytest.mark.parametrize("rows", [1, 700, 5000])
def test_on_both_routes_and_in_batches_of_any_size(tables: Path, tmp_path: Path, twice: Twice, rows: int) -> None:
    """With more workers than splits, blocks pass from stage to stage."""
    ds = hr.read_parquet(str(tables / "0.parquet")).select("id", "x", "noise")
    twice(ds.map_batches(more, **({"batch_size": rows} if rows > 1 else {})), "threads", cpus=8)
    assert copied(tmp_path / "out") == [ROWS] * 2 if rows == 1 else copied(tmp_path / "out") != []


def test_names_of_before_are_followed(tables: Path, tmp_path: Path, twice: Twice) -> None:
    ds = hr.read_parquet(tables).select("id", "x", "noise").rename({"noise": "hiss", "x": "noise"})
    twice(ds.map_batches(lambda b: {"hiss": b["hiss"], "id": b["id"], "noise": b["noise"] + 1}))
    assert copied(tmp_path / "out", "hiss") == [ROWS] * 4
    assert copied(tmp_path / "out", "noise") == []


def test_structs_that_change_inside(tables: Path, tmp_path: Path, twice: Twice) -> None:
    def change(batch: Batch) -> Batch:
        for value in batch["deep"]:
            if value is not None:
                value["a"] = -1
        return dict(batch)

    twice(hr.read_parquet(tables).map_batches(change))
    assert set(pq.read_table(tmp_path / "out")["deep"].combine_chunks().field("a").to_pylist()) == {-1, None, 0} - {0}
    assert copied(tmp_path / "out") == [ROWS] * 4


def generated(batch: Batch) -> Iterator[Batch]:
    yield batch


@pytest.mark.parametrize(
    "fn",
    [
        lambda b: {name: values[::-1] for name, values in b.items()},
        lambda b: {name: values[b["id"] % 1000 != 3] for name, values in b.items()},
        lambda b: {name: np.repeat(values, 2, axis=0) for name, values in b.items()},
        lambda b: {"id": b["at"].astype(np.int64), "at": b["id"], "noise": b["noise"].copy()},
        generated,
    ],
)
def test_nothing_else_is_copied(tables: Path, tmp_path: Path, twice: Twice, fn: Any) -> None:
    twice(hr.read_parquet(tables).select("id", "at", "noise").map_batches(fn))
    assert copied(tmp_path / "out") == []


@pytest.mark.parametrize(
    "later",
    [
        lambda b: {**b, "noise": b["noise"].copy()},  # not as it came
        lambda b: {name: values for name, values in b.items() if name != "noise"},  # not at all
        lambda b: {name: values[5:] for name, values in b.items()},  # without some rows
        lambda b: {**b, "y": [None] * len(b["id"])},
        lambda b: {**b, "word": [None] * len(b["id"])},
        lambda b: {"x": b["x"], "noise": b["noise"], "word": b["word"], "id": b["id"]},  # in another order
    ],
)
def test_a_function_that_changes_its_mind(tables: Path, tmp_path: Path, twice: Twice, later: Any) -> None:
    """In the middle of a row group, after one that was copied."""

    def fn(batch: Batch) -> Batch:
        first = int(batch["id"][0])
        return later(batch) if first % 1_000_000 > ROWS + 2000 else {**batch, "y": batch["id"] + 1}

    twice(hr.read_parquet(tables).select("id", "x", "noise", "word").map_batches(fn), outputs="per_input")
    assert copied(tmp_path / "out")[0] == ROWS


def test_a_column_that_comes_late(tables: Path, tmp_path: Path, twice: Twice) -> None:
    """The file is written anew with it."""

    def fn(batch: Batch) -> Batch:
        return {**batch, "new": batch["id"]} if batch["id"][0] % 1_000_000 > ROWS + 2000 else dict(batch)

    twice(hr.read_parquet(tables).select("id", "x", "noise").map_batches(fn), outputs="per_input")
    assert copied(tmp_path / "out") == []


def test_a_function_that_begins_with_nothing(tables: Path, tmp_path: Path, twice: Twice) -> None:
    def fn(batch: Batch) -> Batch:
        return {**batch, "y": [None] * len(batch["id"]) if batch["id"][0] % 1_000_000 < 2000 else batch["x"]}

    twice(hr.read_parquet(tables).select("id", "x", "noise").map_batches(fn))


def test_rows_that_fail(tables: Path, tmp_path: Path, twice: Twice) -> None:
    def fn(batch: Batch) -> Batch:
        if (batch["id"] == ROWS + 7).any():
            raise ValueError("no")
        return dict(batch)

    twice(hr.read_parquet(tables).select("id", "x", "noise").map_batches(fn), on_error="skip")
    assert len(pq.read_table(tmp_path / "out", columns=["id"])) == 2 * (2 * ROWS + 100) - 1


@pytest.mark.parametrize(
    "change",
    [
        lambda ds: ds.map_batches(more).map_batches(lambda b: {name: v[::-1] for name, v in b.items()}),
        lambda ds: ds.map_batches(more).rename({"noise": "x", "x": "noise"}),
        lambda ds: ds.map_batches(more).filter(pc.field("id") != 3),
        lambda ds: ds.map_batches(more).predict(lambda x: x, input="x", output="noise"),
        lambda ds: ds.filter(lambda row: row["id"] != 3).map_batches(more),
        lambda ds: ds.limit(7000).map_batches(more),
        lambda ds: ds.map_batches(more, batch_format="pandas").map_batches(more),
        lambda ds: ds.map_batches(lambda b: dict(b), schema={"id": "float64", "x": "float64", "noise": "binary"}),
    ],
)
def test_other_plans_are_as_they_were(tables: Path, tmp_path: Path, twice: Twice, change: Any) -> None:
    if "pandas" in str(change):
        pytest.importorskip("pandas")
    twice(change(hr.read_parquet(tables).select("id", "x", "noise")))
    assert copied(tmp_path / "out", "id") == []


def test_explain_says_so(tables: Path, tmp_path: Path) -> None:
    run = hr.read_parquet(tables).map_batches(more).write_parquet(tmp_path / "out", engine="inline", progress="quiet")
    assert "gives back unchanged of" in str(run)


def test_few_texts_are_those_of_the_column() -> None:
    """Converted a block at a time where they repeat, batch by batch where they do not."""
    from headrace.worker.formats import NumpyReader

    rows = 5000
    words = pa.array([None if i % 7 == 0 else f"w{i % 50}" for i in range(rows)])
    columns = {
        "few": words,
        "codes": words.cast(pa.binary()),
        "full": pa.array([f"w{i % 50}" for i in range(rows)]),
        "many": pa.array([str(i) for i in range(rows)]),
        "holes": pa.array([None if i == 4000 else i for i in range(rows)], pa.int32()),
    }
    block = pa.record_batch(columns).slice(100)
    reader = NumpyReader()
    reader.ahead(block)
    for at, n in ((0, 1024), (1024, 1000), (4890, 10)):
        part = block.slice(at, n)
        arrays, given = reader.read(part, block, at)
        plain, _ = NumpyReader().read(part)
        for name in columns:
            assert arrays[name].dtype == plain[name].dtype
            assert arrays[name].tolist() == plain[name].tolist()
            assert not arrays[name].flags.writeable
            column = given.column_of(arrays[name])
            assert column is not None
            assert column.equals(part.column(name))
    assert {id(v) for v in arrays["full"]} <= {id(v) for v in reader.read(block, block)[0]["full"]}
