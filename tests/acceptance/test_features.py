"""The public verbs, each on every engine, with equal results: same files, rows and order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import headrace as hr

from .conftest import outputs, read_back, table

Options = dict[str, Any]


class Doubler:
    """A model with state: counts its own rows."""

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def __call__(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        assert set(batch) == {"x"}, "only its input columns"
        return batch["x"] * self.factor


@pytest.mark.on_ray
def test_predict_carries_every_other_column(data: Path, tmp_path: Path, quiet: Options) -> None:
    run = hr.read_parquet(data).predict(Doubler, input=["x"], output="y").write_parquet(tmp_path / "out", **quiet)
    assert run.rows == 200
    back = read_back(tmp_path / "out")
    expected = table(0, 200)
    assert back.column_names == [*expected.column_names, "y"]
    assert back.drop_columns(["y"]).combine_chunks().equals(expected.combine_chunks())
    assert back["y"].to_pylist() == (expected["x"].to_numpy() * 2).tolist()


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_bare_array_for_one_named_input(data: Path, tmp_path: Path, quiet: Options, device: str) -> None:
    ds = hr.read_parquet(data).predict(lambda x: x + 1, input="x", output="y", device=device)
    ds.write_parquet(tmp_path / "out", **quiet)
    back = read_back(tmp_path / "out")
    assert back["id"].to_pylist() == list(range(200))
    assert back["y"].to_pylist() == (np.arange(200) * 0.5 + 1).tolist()


@pytest.mark.on_ray
def test_two_devices_and_two_models_keep_order(data: Path, tmp_path: Path, quiet: Options) -> None:
    ds = (
        hr.read_parquet(data)
        .predict(lambda x: x + 1, input="x", output="y", device="sim", replicas=2)
        .map_batches(lambda b: {**b, "z": b["y"] * 10}, batch_size=7)
        .predict(lambda z: z - 1, input="z", output="w", device="sim:7")
        .select("id", "w")
    )
    ds.write_parquet(tmp_path / "out", **quiet)
    back = read_back(tmp_path / "out")
    assert back.column_names == ["id", "w"]
    assert back["id"].to_pylist() == list(range(200))
    assert back["w"].to_pylist() == ((np.arange(200) * 0.5 + 1) * 10 - 1).tolist()


def test_each_worker_sees_its_own_device(data: Path, quiet: Options) -> None:
    class Where:
        def __init__(self, device: str) -> None:
            self.device = device

        def __call__(self, x: np.ndarray) -> list[str]:
            return [self.device] * len(x)

    found = hr.read_parquet(data).predict(Where, input="x", output="d", device="sim", replicas=2).to_arrow(**quiet)
    assert set(found["d"].to_pylist()) <= {"sim:0", "sim:1"}


@pytest.mark.on_ray
def test_output_is_the_same_on_every_route(tmp_path: Path, quiet: Options) -> None:
    """One big file (several workers share it) and many small ones (a worker each) give the same rows."""
    whole = table(0, 3000)
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    pq.write_table(whole, tmp_path / "one" / "a.parquet")
    for i in range(30):
        pq.write_table(whole.slice(i * 100, 100), tmp_path / "many" / f"{i:02d}.parquet")
    found = []
    for name in ("one", "many"):
        ds = hr.read_parquet(tmp_path / name).map_batches(lambda b: {"id": b["id"], "y": b["x"] * 3}, batch_size=64)
        ds.write_parquet(tmp_path / f"out-{name}", **quiet)
        found.append(read_back(tmp_path / f"out-{name}").combine_chunks())
    assert found[0].equals(found[1])


def test_batches_are_cut_from_the_start_of_the_split(tmp_path: Path, quiet: Options) -> None:
    pq.write_table(table(0, 1000), tmp_path / "a.parquet", row_group_size=170)
    sizes = hr.read_parquet(tmp_path / "a.parquet").map_batches(lambda b: {"n": np.array([len(b["id"])])}, batch_size=300)
    assert sizes.to_arrow(**quiet)["n"].to_pylist() == [300, 300, 300, 100]


def test_batches_after_a_filter_are_cut_from_the_start_of_the_split(tmp_path: Path, quiet: Options) -> None:
    pq.write_table(table(0, 1000), tmp_path / "a.parquet", row_group_size=170)
    ds = hr.read_parquet(tmp_path / "a.parquet").filter(lambda row: row["id"] % 2 == 0)
    ds = ds.map_batches(lambda b: {"n": np.array([len(b["id"])])}, batch_size=150)
    assert ds.to_arrow(**quiet)["n"].to_pylist() == [150, 150, 150, 50]


@pytest.mark.parametrize("form", ["numpy", "pyarrow", "pandas", "torch"])
def test_batch_formats(data: Path, quiet: Options, form: Any) -> None:
    if form == "torch":
        pytest.importorskip("torch")

    def work(batch: Any) -> Any:
        if form == "pyarrow":
            assert isinstance(batch, pa.Table)
            return batch.append_column("y", pc.multiply(batch["x"], 2))
        if form == "pandas":
            assert isinstance(batch, pd.DataFrame)
            return batch.assign(y=batch["x"] * 2)
        return {"id": batch["id"], "y": batch["x"] * 2}

    found = hr.read_parquet(data).map_batches(work, batch_format=form).to_arrow(**quiet)
    assert found["y"].to_pylist() == np.arange(200).astype(float).tolist()


def test_map_flat_map_filter(data: Path, quiet: Options) -> None:
    ds = (
        hr.read_parquet(data)
        .select("id", "x")
        .filter(pc.field("id") < 50)
        .map(lambda row: {"id": row["id"], "x2": row["x"] * 2})
        .filter(lambda row: row["id"] % 10 == 0)
        .flat_map(lambda row: [{"id": row["id"], "copy": i} for i in range(3)])
    )
    found = ds.to_arrow(**quiet).to_pylist()
    assert found == [{"id": i, "copy": c} for i in range(0, 50, 10) for c in range(3)]


def test_rename_drop_select(data: Path, quiet: Options) -> None:
    ds = hr.read_parquet(data).rename({"x": "y"}).drop("nested", "when").select("y", "id")
    found = ds.to_arrow(**quiet)
    assert found.column_names == ["y", "id"]
    after = hr.read_parquet(data).map_batches(lambda b: {"a": b["id"], "b": b["x"]}).rename({"a": "c"}).drop("b")
    assert after.to_arrow(**quiet).column_names == ["c"]


@pytest.mark.parametrize("rows", [0, 1, 40, 57, 200, 1000])
def test_limit_takes_the_first_rows(data: Path, tmp_path: Path, quiet: Options, rows: int) -> None:
    ds = hr.read_parquet(data).filter(lambda row: row["id"] % 2 == 0).limit(rows).map_batches(lambda b: {"id": b["id"]})
    run = ds.write_parquet(tmp_path / "out", **quiet)
    expected = list(range(0, 200, 2))[:rows]
    assert run.rows == len(expected)
    if expected:
        assert read_back(tmp_path / "out")["id"].to_pylist() == expected
    assert [row["id"] for row in ds.take(5, **quiet)] == expected[:5]


@pytest.mark.on_ray
def test_evaluate_in_the_pass(data: Path, tmp_path: Path, quiet: Options) -> None:
    ds = hr.read_parquet(data).predict(lambda x: (x > 20).astype(np.int64), input="x", output="p")
    ds = ds.evaluate(n=hr.metrics.Count(), acc=hr.metrics.Accuracy("p", "label"), mean=hr.metrics.Mean("x"))
    run = ds.write_parquet(tmp_path / "out", **quiet)
    expected = ((np.arange(200) * 0.5 > 20) == (np.arange(200) % 2)).mean()
    assert run.metrics == {"n": 200, "acc": pytest.approx(expected), "mean": pytest.approx(49.75)}
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["metrics"]["n"] == 200


def test_per_input_names_and_rows(data: Path, tmp_path: Path, quiet: Options) -> None:
    ds = hr.read_parquet(data).filter(pc.field("id") >= 40).map_batches(lambda b: {"id": b["id"]})
    ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    assert outputs(tmp_path / "out") == [f"f{i}.parquet" for i in range(5)]
    for i in range(5):
        expected = list(range(i * 40, i * 40 + 40)) if i else []
        assert pq.read_table(tmp_path / "out" / f"f{i}.parquet")["id"].to_pylist() == expected


def test_tensors_in_and_out(tmp_path: Path, quiet: Options) -> None:
    images = np.arange(50 * 4 * 3, dtype=np.uint8).reshape(50, 4, 3)
    array = pa.FixedShapeTensorArray.from_numpy_ndarray(images)
    pq.write_table(pa.table({"id": np.arange(50), "image": array}), tmp_path / "a.parquet")

    def model(x: np.ndarray) -> np.ndarray:
        assert x.shape[1:] == (4, 3)
        return x.astype(np.float32) / 2

    ds = hr.read_parquet(tmp_path / "a.parquet").predict(model, input="image", output="half", device="sim")
    ds.write_parquet(tmp_path / "out", **quiet)
    for batch in hr.read_parquet(tmp_path / "out").iter_batches(batch_size=50, **quiet):
        assert batch["half"].shape == (50, 4, 3)
        np.testing.assert_array_equal(batch["half"], images / 2)


def test_ragged_tensors(data: Path, tmp_path: Path, quiet: Options) -> None:
    def ragged(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return {"id": batch["id"], "t": [np.full((int(i) % 3 + 1, 2), i) for i in batch["id"]]}

    hr.read_parquet(data).map_batches(ragged).write_parquet(tmp_path / "out", **quiet)
    rows = hr.read_parquet(tmp_path / "out").take(4, **quiet)
    assert [row["t"].shape for row in rows] == [(1, 2), (2, 2), (3, 2), (1, 2)]


def test_iter_batches_cuts_and_keeps_order(data: Path, quiet: Options) -> None:
    batches = list(hr.read_parquet(data).iter_batches(batch_size=64, **quiet))
    assert [len(b["id"]) for b in batches] == [64, 64, 64, 8]
    assert np.concatenate([b["id"] for b in batches]).tolist() == list(range(200))
    kept = list(hr.read_parquet(data).iter_batches(batch_size=64, drop_last=True, **quiet))
    assert [len(b["id"]) for b in kept] == [64, 64, 64]


@pytest.mark.on_ray
def test_leaving_the_loop_ends_the_run(data: Path, quiet: Options) -> None:
    for batch in hr.read_parquet(data).iter_batches(batch_size=10, **quiet):
        assert batch["id"].tolist() == list(range(10))
        break


def test_a_bare_answer_does_not_replace_a_column_that_nobody_named(quiet: Options) -> None:
    rows = hr.from_arrow(pa.table({"x": [1, 2], "prediction": ["kept", "too"]}))
    with pytest.raises(hr.PlanError, match="'prediction' is a column already") as refused:
        rows.predict(lambda x: x * 2, input="x").to_arrow(**quiet)
    assert "output=" in refused.value.hint
    named = rows.predict(lambda x: {"double": x * 2}, input="x").to_arrow(**quiet)
    assert named.select(["prediction", "double"]).to_pydict() == {"prediction": ["kept", "too"], "double": [2, 4]}
    asked = rows.predict(lambda x: x * 2, input="x", output="prediction").to_arrow(**quiet)
    assert asked["prediction"].to_pylist() == [2, 4]


def test_iter_torch_batches_refuses_dtypes_of_no_column(data: Path, quiet: Options) -> None:
    torch = pytest.importorskip("torch")
    batches = hr.read_parquet(data).select("id").iter_torch_batches(dtypes={"no_such_column": torch.float32}, **quiet)
    with pytest.raises(hr.PlanError, match="'no_such_column', which is not there"):
        next(batches)


def test_iter_torch_batches_refuses_devices_that_are_not_there(
    data: Path, quiet: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, why in {"cuda": "no CUDA device", "cuda:1": "no CUDA device", "gpu": "gpu"}.items():
        with pytest.raises(hr.PlanError, match=why):
            hr.read_parquet(data).iter_torch_batches(device=device, **quiet)


def test_iter_torch_batches(data: Path, quiet: Options) -> None:
    torch = pytest.importorskip("torch")
    (batch,) = hr.read_parquet(data).select("id", "x", "name").iter_torch_batches(batch_size=200, dtypes=torch.float32, **quiet)
    assert batch["x"].dtype == torch.float32
    assert batch["id"].tolist() == list(range(200))


def test_count_schema_pandas(data: Path, quiet: Options) -> None:
    ds = hr.read_parquet(data)
    assert ds.count() == 200
    assert ds.filter(pc.field("id") < 11).count(**quiet) == 11
    assert ds.flat_map(lambda r: [r, r]).count(**quiet) == 400
    assert ds.schema().names == table(0, 1).column_names
    assert ds.map_batches(lambda b: {"q": b["x"]}).schema() == pa.schema([("q", pa.float64())])
    assert ds.to_pandas(**quiet)["id"].tolist() == list(range(200))


def test_text_formats_round_trip(data: Path, tmp_path: Path, quiet: Options) -> None:
    flat = hr.read_parquet(data).select("id", "x", "name")
    flat.write_csv(tmp_path / "csv", **quiet)
    flat.write_json(tmp_path / "json", **quiet)
    expected = flat.to_arrow(**quiet).to_pylist()
    assert hr.read_csv(tmp_path / "csv").to_arrow(**quiet).to_pylist() == expected
    assert hr.read_json(tmp_path / "json").to_arrow(**quiet).to_pylist() == expected
    lines = hr.read_text(tmp_path / "json" / "*.jsonl").take(1, **quiet)
    assert json.loads(lines[0]["text"])["id"] == 0


def test_memory_sources(quiet: Options) -> None:
    assert hr.range(5).to_arrow(**quiet)["id"].to_pylist() == [0, 1, 2, 3, 4]
    assert hr.from_arrow(table(0, 7)).count() == 7
    assert hr.from_pandas(pd.DataFrame({"a": [1, 2]})).take(**quiet) == [{"a": 1}, {"a": 2}]
    assert hr.from_items([{"a": 1}, {"a": None}]).take(**quiet) == [{"a": 1}, {"a": None}]


@pytest.mark.on_ray
def test_expansion_by_300_through_two_models(tmp_path: Path, quiet: Options) -> None:
    """Video-shaped: each row becomes 300 frames that feed two device models."""

    def frames(row: dict[str, Any]) -> Any:
        for i in range(300):
            yield {"id": row["id"], "frame": i, "image": np.full((8, 8, 3), i % 256, np.uint8)}

    ds = (
        hr.range(20)
        .flat_map(frames)
        .predict(lambda im: im.mean(axis=(1, 2, 3)), input="image", output="mean", device="sim")
        .predict(lambda im: im.max(axis=(1, 2, 3)), input="image", output="max", device="sim:5")
        .drop("image")
    )
    run = ds.write_parquet(tmp_path / "out", memory_bytes=64 << 20, **quiet)
    assert run.rows == 6000
    back = read_back(tmp_path / "out")
    assert back["id"].to_pylist() == [i for i in range(20) for _ in range(300)]
    assert back["frame"].to_pylist() == list(range(300)) * 20
    assert back["max"].to_pylist() == [i % 256 for i in range(300)] * 20


def test_no_rows_at_all(data: Path, tmp_path: Path, quiet: Options) -> None:
    run = hr.read_parquet(data).filter(pc.field("id") < 0).write_parquet(tmp_path / "out", **quiet)
    assert run.rows == 0
    assert hr.read_parquet(tmp_path / "out").count() == 0


def test_no_rows_have_columns_all_the_same(data: Path, tmp_path: Path, quiet: Options) -> None:
    none = hr.read_parquet(data).select("id", "nested").filter(lambda row: False)
    scored = none.predict(lambda ids: ids, input="id", output="score")
    known = [*none.schema(), pa.field("score", pa.null())]
    assert scored.to_arrow(**quiet).schema == pa.schema(known)
    scored.write_parquet(tmp_path / "scored", **quiet)
    assert read_back(tmp_path / "scored").schema == pa.schema(known)
    assert hr.verify(tmp_path / "scored").ok
    scored.write_csv(tmp_path / "csv", **quiet)  # which holds no nested column, but there is none to write
    assert (tmp_path / "csv" / "part-00-000000.csv").read_text() == '"id","nested","score"\n'
    none.map(lambda row: {"x": 1}).write_parquet(tmp_path / "mapped", **quiet)
    assert read_back(tmp_path / "mapped").schema.names == ["id", "nested"]  # "x" was never seen


@pytest.mark.parametrize("outputs", ["packed", "per_input"])
def test_no_rows_of_types_that_parquet_can_not_hold(tmp_path: Path, quiet: Options, outputs: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"id":1,"meta":{},"deep":[{}]}\n')
    none = hr.read_json(tmp_path / "a.jsonl").filter(lambda row: False)
    scored = none.predict(lambda ids: ids, input="id", output="p")
    run = scored.write_parquet(tmp_path / "out", outputs=outputs, **quiet)
    assert run.rows == 0
    null = pa.null()
    expected = pa.schema([("id", pa.int64()), ("meta", null), ("deep", null), ("p", null)])
    assert read_back(tmp_path / "out").schema == expected
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["schema"] == expected.to_string()
    assert hr.verify(tmp_path / "out").ok
    assert scored.write_parquet(tmp_path / "out", outputs=outputs, **quiet).already_done


def test_no_rows_of_intervals(tmp_path: Path, quiet: Options) -> None:
    lengths = pa.array([(1, 2, 3)], pa.month_day_nano_interval())
    table = pa.table({"id": [1], "long": lengths, "kept": pa.array(["x"])})
    none = hr.from_arrow(table).filter(lambda row: False).predict(lambda ids: ids, input="id", output="p")
    none.write_parquet(tmp_path / "out", **quiet)
    expected = pa.schema([("id", pa.int64()), ("long", pa.null()), ("kept", pa.string()), ("p", pa.null())])
    assert read_back(tmp_path / "out").schema == expected
    none.write_csv(tmp_path / "csv", **quiet)
    assert (tmp_path / "csv" / "part-00-000000.csv").read_text() == '"id","long","kept","p"\n'


def test_files_without_rows_are_like_the_others(data: Path, tmp_path: Path, quiet: Options) -> None:
    ds = hr.read_parquet(data).filter(lambda row: row["id"] >= 40).map(lambda row: {"x": row["id"]})
    ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    assert {pq.read_schema(f).to_string() for f in (tmp_path / "out").glob("*.parquet")} == {"x: int64"}


@pytest.mark.on_ray
def test_the_stream_model_contract(data: Path, quiet: Options) -> None:
    class Engine:
        async def stream(self, rows: Any) -> Any:
            held = []
            async for key, row in rows:
                held.append((key, row))
            for key, row in reversed(held):
                yield key, {"y": row["x"] + 1}

    found = hr.read_parquet(data).predict(Engine, input=["x"], output="y", device="sim").to_arrow(**quiet)
    assert found["y"].to_pylist() == (np.arange(200) * 0.5 + 1).tolist()


def test_batches_are_the_callers_own_memory(quiet: Options) -> None:
    table = pa.table({"x": np.arange(1000)})
    kept = []
    for batch in hr.from_arrow(table).iter_batches(batch_size=300, **quiet):
        batch["x"] += 1
        kept.append(batch["x"])
    assert np.concatenate(kept).tolist() == list(range(1, 1001))
    assert table["x"].to_pylist() == list(range(1000))


def test_a_bare_answer_is_called_prediction(data: Path, quiet: Options) -> None:
    found = hr.read_parquet(data).predict(lambda x: x + 1, input="x").take(1, **quiet)
    assert found[0]["prediction"] == 1.0
    many = hr.read_parquet(data).predict(lambda b: {"p": b["x"], "q": -b["x"]}, input=["x"]).take(2, **quiet)
    assert many[1]["p"] == -many[1]["q"] == 0.5


def test_filters_keep_tensor_columns(tmp_path: Path, quiet: Options) -> None:
    images = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((20, 2, 2), np.uint8))
    ds = hr.from_arrow(pa.table({"id": np.arange(20), "image": images}))
    assert ds.filter(pc.field("id") > 100).count(**quiet) == 0
    assert ds.map_batches(lambda b: b).filter(pc.field("id") > 17).to_arrow(**quiet)["id"].to_pylist() == [18, 19]


def test_several_steps_of_many_rows_share_blocks_without_changing_batches(tmp_path: Path, quiet: Options) -> None:
    """What "auto" batches are depends on the input alone: on no engine, route or time."""
    seen = hr.range(5000).map_batches(lambda b: {"id": b["id"], "n": np.full(len(b["id"]), len(b["id"]))})
    again = seen.predict(lambda x: x, input="id", output="p", device="sim").map_batches(
        lambda b: {"n": b["n"], "m": np.full(len(b["n"]), len(b["n"]))}
    )
    found = again.to_arrow(**quiet).to_pydict()
    inline = again.to_arrow(engine="inline").to_pydict()
    assert found == inline


class Counting:
    """A live object with an array of its own, which it writes to."""

    def __init__(self) -> None:
        self.calls = np.zeros(1000)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.calls[:] += 1
        return x + self.calls[0] * 0


@pytest.mark.on_ray
def test_a_model_may_write_to_its_own_arrays(data: Path, quiet: Options) -> None:
    rows = hr.read_parquet(data).predict(Counting(), input="x", output="y").to_arrow(**quiet)
    assert rows["y"].to_pylist() == rows["x"].to_pylist()


def test_vectors_of_row_functions_need_no_neighbour_of_another_length(tmp_path: Path, quiet: Options) -> None:
    def tokens(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "v": np.arange(row["id"] % 7)}

    for rows in (1, 1025, 3000):  # the last block has one row, or only equal ones
        table = hr.range(rows).map(tokens).to_arrow(**quiet)
        assert [np.asarray(v).tolist() for v in table["v"].to_pylist()] == [list(range(i % 7)) for i in range(rows)]
        run = hr.range(rows).map(tokens).write_parquet(tmp_path / f"{rows}", **{**quiet, "on_error": "skip"})
        assert run.rows == rows


@pytest.mark.parametrize("rows", [5, 70_000, 100_000])
def test_a_limit_ends_within_what_one_row_becomes(tmp_path: Path, quiet: Options, rows: int) -> None:
    def expand(row: Any) -> Any:
        for i in range(100_000):
            yield {"i": i}

    def doubled(batch: Any) -> Any:
        yield from ({"i": np.arange(50_000) + at} for at in (0, 50_000))

    for ds in (hr.range(1).flat_map(expand), hr.range(1).map_batches(doubled)):
        run = ds.limit(rows).write_parquet(tmp_path / "out", fresh=True, **quiet)
        tally = run.tally
        assert (tally.written, tally.rows_in, tally.filtered) == (rows, 1, 0)
        assert tally.rows_in + tally.expanded == tally.written + tally.cut
    assert [row["i"] for row in hr.range(1).flat_map(expand).take(3)] == [0, 1, 2]


def test_outputs_that_readers_would_pass_over_are_refused(tmp_path: Path, quiet: Options) -> None:
    for name in ("_a", "b"):
        pq.write_table(pa.table({"x": [1]}), tmp_path / f"{name}.parquet")
    paths = [tmp_path / "_a.parquet", tmp_path / "b.parquet"]
    with pytest.raises(hr.DestinationError, match="begin with _"):
        hr.read_parquet(paths).write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    assert hr.read_parquet(paths).write_parquet(tmp_path / "packed", **quiet).rows == 2


def test_an_endless_generator_gives_its_first_rows() -> None:
    """Also where the engine is chosen by trying it."""

    def forever(row: Any) -> Any:
        i = 0
        while True:
            yield {"i": i}
            i += 1

    batches = hr.range(1).flat_map(forever).iter_batches(batch_size=10, progress="quiet")
    assert next(batches)["i"].tolist() == list(range(10))
    batches.close()


@pytest.mark.parametrize("odd", [np.array([1.5, 2.0]), np.array([0.5]), np.array([1, 2], np.float32), [1.5, 2.0]])
def test_vectors_of_whole_numbers_among_others(tmp_path: Path, odd: Any) -> None:
    """One row of another number type widens the column, wherever blocks are cut."""
    for engine in ("inline", "threads"):
        ds = hr.range(3000).map(lambda row: {"id": row["id"], "v": odd if row["id"] == 1500 else np.array([1, 2])})
        run = ds.write_parquet(tmp_path / engine, engine=engine, on_error="skip", progress="quiet")
        assert (run.rows, run.tally.bad) == (3000, 0)
        rows = read_back(tmp_path / engine).sort_by("id")["v"].combine_chunks()
        values = rows.storage if isinstance(rows, pa.ExtensionArray) else rows
        assert values.to_pylist()[1499:1501] == [[1.0, 2.0], [float(v) for v in odd]]
