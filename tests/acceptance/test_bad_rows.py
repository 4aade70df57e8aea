"""Rows that fail: left out or set aside in any stage, with the others going on; counted always."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.core.errors import HeadraceError, PlanError, SchemaConflict, UserCodeError

from .conftest import read_back

Options = dict[str, Any]
BAD = {3, 41, 42, 43, 120, 199}


def per_row(row: dict[str, Any]) -> dict[str, Any]:
    if row["id"] in BAD:
        raise ValueError(f"bad id {row['id']}")
    return {**row, "y": row["x"] + 1}


def per_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if set(batch["id"].tolist()) & BAD:
        raise ValueError("a bad id is among these")
    return {**batch, "y": batch["x"] + 1}


class Model:
    def __call__(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        if set(batch["id"].tolist()) & BAD:
            raise ValueError("a bad id is among these")
        return batch["x"] + 1


def expanding(row: dict[str, Any]) -> Any:
    yield {"id": row["id"], "y": row["x"] + 1}
    if row["id"] in BAD:
        raise ValueError("after the first")


def chains() -> dict[str, Any]:
    return {
        "map": lambda ds: ds.map(per_row),
        "map_batches": lambda ds: ds.map_batches(per_batch, batch_size=16),
        "map_batches auto": lambda ds: ds.map_batches(per_batch),
        "filter": lambda ds: ds.filter(lambda row: per_row(row) is not None).map(per_row),
        "flat_map": lambda ds: ds.flat_map(expanding),
        "predict": lambda ds: ds.predict(Model, input=["id", "x"], output="y"),
        "predict on a device": lambda ds: ds.predict(Model, input=["id", "x"], output="y", device="sim"),
        "after a limit": lambda ds: ds.limit(200).map(per_row),
    }


def quarantined(out: Path) -> pa.Table:
    found = sorted((out / "_headrace").rglob("quarantine/*.parquet"))
    return pa.concat_tables([pq.read_table(p) for p in found], promote_options="permissive")


@pytest.mark.parametrize("name", list(chains()))
@pytest.mark.parametrize("how", ["skip", "quarantine"])
def test_the_others_go_on(data: Path, tmp_path: Path, quiet: Options, name: str, how: str) -> None:
    ds = chains()[name](hr.read_parquet(data))
    run = ds.write_parquet(tmp_path / "out", on_error=how, **quiet)
    back = read_back(tmp_path / "out")
    good = [i for i in range(200) if i not in BAD]
    assert back["id"].to_pylist() == good
    assert back["y"].to_pylist() == [i * 0.5 + 1 for i in good]
    assert run.tally.balanced
    assert run.tally.bad == len(BAD)
    assert (run.tally.skipped, run.tally.quarantined) == ((6, 0) if how == "skip" else (0, 6))
    if how == "quarantine":
        aside = quarantined(tmp_path / "out").sort_by("id")
        assert aside["id"].to_pylist() == sorted(BAD)
        assert all("ValueError" in text for text in aside["_exception"].to_pylist())
        assert all("raise ValueError" in text for text in aside["_traceback"].to_pylist())
        assert [row % 40 for row in sorted(BAD)] == aside["_source_row"].to_pylist()
        assert [Path(uri).name for uri in aside["_source_uri"].to_pylist()] == [f"f{i // 40}.parquet" for i in sorted(BAD)]
        assert set(aside["_attempt"].to_pylist()) == {1}
    assert hr.verify(str(tmp_path / "out")).ok


@pytest.mark.on_ray
def test_carried_columns_are_set_aside_too(data: Path, tmp_path: Path, quiet: Options) -> None:
    ds = hr.read_parquet(data).predict(Model, input=["id", "x"], output="y", device="sim")
    ds.write_parquet(tmp_path / "out", on_error="quarantine", **quiet)
    aside = quarantined(tmp_path / "out").sort_by("id")
    assert aside["name"].to_pylist() == [f"row {i}" for i in sorted(BAD)]
    assert read_back(tmp_path / "out")["name"].to_pylist() == [f"row {i}" for i in range(200) if i not in BAD]


def test_the_default_fails_and_names_the_row(data: Path, tmp_path: Path, quiet: Options) -> None:
    with pytest.raises(UserCodeError, match=r"row: (3 of .*f0|1 of .*f1|0 of .*f3|39 of .*f4)\.parquet"):
        hr.read_parquet(data).map(per_row).write_parquet(tmp_path / "out", **quiet)


def test_too_many_bad_rows_end_the_run(data: Path, tmp_path: Path, quiet: Options) -> None:
    ds = hr.read_parquet(data).map(per_row)
    with pytest.raises(UserCodeError, match="bad rows"):
        ds.write_parquet(tmp_path / "a", on_error="skip", max_bad_rows=5, **quiet)
    with pytest.raises(UserCodeError, match="bad rows"):
        ds.write_parquet(tmp_path / "b", on_error="skip", max_bad_fraction=0.02, **quiet)
    run = ds.write_parquet(tmp_path / "c", on_error="skip", max_bad_rows=6, max_bad_fraction=0.03, **quiet)
    assert run.tally.skipped == 6


def test_every_row_bad_leaves_an_empty_output(data: Path, tmp_path: Path, quiet: Options) -> None:
    def never(row: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("never")

    run = hr.read_parquet(data).map(never).write_parquet(tmp_path / "out", on_error="quarantine", **quiet)
    assert run.tally.quarantined == 200
    assert run.rows == 0
    assert (tmp_path / "out" / "_SUCCESS").exists()
    assert quarantined(tmp_path / "out").num_rows == 200


@pytest.mark.on_ray
def test_metrics_count_good_rows_only(data: Path, tmp_path: Path, quiet: Options) -> None:
    ds = hr.read_parquet(data).map(per_row).evaluate(n=hr.metrics.Count(), mean=hr.metrics.Mean("y"))
    run = ds.write_parquet(tmp_path / "out", on_error="skip", **quiet)
    good = [i * 0.5 + 1 for i in range(200) if i not in BAD]
    assert run.metrics["n"] == len(good)
    assert run.metrics["mean"] == pytest.approx(sum(good) / len(good), rel=1e-12)


def test_a_broken_row_group_is_set_aside(tmp_path: Path, quiet: Options) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.parquet"
    pq.write_table(pa.table({"id": np.arange(4000), "x": np.random.default_rng(0).random(4000)}), path, row_group_size=1000)
    group = pq.ParquetFile(path).metadata.row_group(2).column(1)
    broken = bytearray(path.read_bytes())
    broken[group.data_page_offset : group.data_page_offset + 12] = b"\xff" * 12
    path.write_bytes(broken)
    with pytest.raises(HeadraceError, match="row group"):
        hr.read_parquet(tmp_path / "in").write_parquet(tmp_path / "fails", **quiet)
    run = hr.read_parquet(tmp_path / "in").write_parquet(tmp_path / "out", on_error="quarantine", **quiet)
    assert run.rows == 3000
    assert run.tally.quarantined == 1000
    assert read_back(tmp_path / "out")["id"].to_pylist() == [*range(2000), *range(3000, 4000)]
    aside = quarantined(tmp_path / "out")
    assert sum(aside["_rows"].to_pylist()) == 1000
    assert aside["_source_uri"].to_pylist()[0].endswith("a.parquet")


@pytest.mark.parametrize("which", [0, 2])
def test_a_truncated_file_is_set_aside(data: Path, tmp_path: Path, quiet: Options, which: int) -> None:
    path = data / f"f{which}.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    run = hr.read_parquet(data).write_parquet(tmp_path / "out", on_error="quarantine", **quiet)
    assert run.rows == 160
    assert any(uri.endswith(path.name) for uri in quarantined(tmp_path / "out")["_source_uri"].to_pylist())
    with pytest.raises(HeadraceError, match=path.name):
        hr.read_parquet(data).write_parquet(tmp_path / "fails", **quiet)


def test_bad_json_lines_are_set_aside(tmp_path: Path, quiet: Options) -> None:
    (tmp_path / "in").mkdir()
    lines = [f'{{"id": {i}, "x": {i}.5}}' for i in range(100)]
    lines[7] = '{"id": 7, "x": '
    lines[60] = "not json"
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines) + "\n")
    run = hr.read_json(tmp_path / "in").write_parquet(tmp_path / "out", on_error="quarantine", **quiet)
    assert read_back(tmp_path / "out")["id"].to_pylist() == [i for i in range(100) if i not in (7, 60)]
    assert run.tally.quarantined == 2


def test_a_broken_image_is_set_aside(tmp_path: Path, quiet: Options) -> None:
    pytest.importorskip("simplejpeg")
    import simplejpeg

    (tmp_path / "in").mkdir()
    for i in range(6):
        picture = np.full((20, 30, 3), i * 10, np.uint8)
        (tmp_path / "in" / f"{i}.jpg").write_bytes(simplejpeg.encode_jpeg(picture))
    (tmp_path / "in" / "3.jpg").write_bytes(b"no image at all")
    ds = hr.read_images(tmp_path / "in").apply(hr.images.decode("bytes", resize=16, crop=16, output="image")).drop("bytes")
    run = ds.write_parquet(tmp_path / "out", on_error="quarantine", **quiet)
    assert run.rows == 5
    aside = quarantined(tmp_path / "out")
    assert aside["path"].to_pylist()[0].endswith("3.jpg")
    trace = hr.why(str(next((tmp_path / "out" / "_headrace").rglob("quarantine/*.parquet"))), 0)
    assert trace.source_uri.endswith("3.jpg")


def test_quarantine_needs_a_destination(data: Path, quiet: Options) -> None:
    with pytest.raises(PlanError, match="destination"):
        list(hr.read_parquet(data).map(per_row).iter_batches(on_error="quarantine", **quiet))
    rows = hr.read_parquet(data).map(per_row).to_arrow(on_error="skip", **quiet)
    assert rows["id"].to_pylist() == [i for i in range(200) if i not in BAD]


class Panic(BaseException):
    """As extensions in Rust raise it: no Exception."""


class Panicking:
    def __call__(self, ids: np.ndarray) -> np.ndarray:
        if set(ids.tolist()) & BAD:
            raise Panic("panicked")
        return ids


def panicking(row: dict[str, Any]) -> dict[str, Any]:
    if row["id"] in BAD:
        raise Panic("panicked")
    return row


@pytest.mark.parametrize("what", ["map", "predict"])
def test_a_panic_is_blamed_on_its_row(data: Path, tmp_path: Path, quiet: Options, what: str) -> None:
    ds = hr.read_parquet(data)
    ds = ds.map(panicking) if what == "map" else ds.predict(Panicking, input="id", output="y")
    run = ds.write_parquet(tmp_path / "out", on_error="quarantine", **quiet)
    assert run.tally.quarantined == len(BAD)
    assert set(quarantined(tmp_path / "out")["_exception"].to_pylist()) == {"Panic: panicked"}
    with pytest.raises(UserCodeError, match=r"raised Panic: panicked"):
        ds.write_parquet(tmp_path / "other", **quiet)


def forking(row: dict[str, Any]) -> dict[str, Any]:
    if row["id"] == 57:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
    return row


def test_a_forked_child_that_comes_back_answers_nothing(data: Path, tmp_path: Path) -> None:
    """Nor does it take what its parent is sent."""
    for name in ("a", "b", "c"):
        run = hr.read_parquet(data).map(forking).write_parquet(tmp_path / name, engine="processes", cpus=2, progress="quiet")
        assert run.rows == 200
        assert read_back(tmp_path / name)["id"].to_pylist() == list(range(200))


@pytest.mark.parametrize(("how", "became"), [("skip", "skipped"), ("quarantine", "set aside")])
def test_a_file_of_unknown_rows_is_told_of(data: Path, tmp_path: Path, quiet: Options, how: str, became: str) -> None:
    broken = sorted(data.glob("*.parquet"))[-1]
    broken.write_bytes(broken.read_bytes()[:200])
    run = hr.read_parquet(data).write_parquet(tmp_path / "out", on_error=how, **quiet)
    assert run.rows == 160
    assert [note for note in run.notes if note.startswith(became) and broken.name in note]


def test_a_file_that_nobody_can_count_is_a_bad_row_to_the_limits(data: Path, tmp_path: Path, quiet: Options) -> None:
    path = data / "f2.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    for how in ("skip", "quarantine"):
        with pytest.raises(UserCodeError, match="bad rows"):
            hr.read_parquet(data).write_parquet(tmp_path / how, on_error=how, max_bad_rows=0, **quiet)
        run = hr.read_parquet(data).write_parquet(tmp_path / how, on_error=how, max_bad_rows=1, **quiet)
        assert run.rows == 160


def test_a_builtin_class_is_a_function(data: Path, tmp_path: Path, quiet: Options) -> None:
    assert hr.read_parquet(data).map(dict).to_arrow(**quiet).num_rows == 200


@pytest.mark.parametrize(
    ("text", "good", "bad"),
    [
        ('a,b\n1,x\n2,"cut off\n3,z\n4,w\n', [(1, "x"), (3, "z"), (4, "w")], 1),
        ('a,b\n1,x\n2,"cut off\n', [(1, "x")], 1),
        ('a,b\n1,x\n2,"cut off', [(1, "x")], 1),
        ('a,b\n1,x\n2,"cut\n\n3,off"\n4,w\n', [(1, "x"), (3, 'off"'), (4, "w")], 1),
        ('a,b\n1,"x ""y"" z"\r\n\r\n2,5" pipe\n', [(1, 'x "y" z'), (2, '5" pipe')], 0),
    ],
)
def test_a_quote_that_is_not_closed_takes_no_other_lines(
    text: str, good: list[tuple[int, str]], bad: int, tmp_path: Path, quiet: dict[str, Any]
) -> None:
    (tmp_path / "in.csv").write_text(text, newline="")
    ds = hr.read_csv(str(tmp_path / "in.csv"))
    run = ds.write_parquet(str(tmp_path / "out"), on_error="skip", **quiet)
    assert [(row["a"], row["b"]) for row in read_back(tmp_path / "out").to_pylist()] == good
    assert run.tally.skipped == bad
    if bad:
        with pytest.raises(hr.DataError, match="behind the end of its line") as caught:
            ds.write_parquet(str(tmp_path / "failing"), **quiet)
        assert ("line", "3") in caught.value.where
    run = ds.select(["a"]).write_parquet(str(tmp_path / "narrow"), on_error="skip", **quiet)
    assert read_back(tmp_path / "narrow")["a"].to_pylist() == [a for a, _ in good], "whatever columns are read"
    assert run.tally.skipped == bad


def test_a_value_that_is_not_of_the_type_given_is_a_bad_line(tmp_path: Path, quiet: dict[str, Any]) -> None:
    (tmp_path / "in.csv").write_text("a,b\n1,x\nmany,y\n3,z\n")
    ds = hr.read_csv(str(tmp_path / "in.csv"), column_types={"a": pa.int64()})
    run = ds.write_parquet(str(tmp_path / "out"), on_error="skip", **quiet)
    assert read_back(tmp_path / "out")["a"].to_pylist() == [1, 3]
    assert run.tally.skipped == 1
    with pytest.raises(hr.DataError, match="invalid value 'many'") as caught:
        ds.write_parquet(str(tmp_path / "failing"), **quiet)
    assert ("line", "3") in caught.value.where


def _half(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "s": "\ud83d"}


def _half_in_a_dict(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "d": {"\ud83d": 1}}


def _half_as_a_name(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "\ud83d": 1}


def _half_in_a_message(row: dict[str, Any]) -> dict[str, Any]:
    raise ValueError("unreadable name \udce4")


def _other_unit(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "t": np.datetime64("2020-01-02T01:02:03.123456789")}


@pytest.mark.parametrize("odd", [_half, _half_in_a_dict, _half_as_a_name, _half_in_a_message, _other_unit])
@pytest.mark.parametrize("how", ["skip", "quarantine"])
def test_what_can_not_be_stored_is_one_bad_row(tmp_path: Path, quiet: Options, odd: Any, how: str) -> None:
    def fn(row: dict[str, Any]) -> dict[str, Any]:
        usual = {"id": row["id"], "s": "x", "d": {"a": 1}, "t": np.datetime64("2020-01-02")}
        return odd(usual) if row["id"] == 7 else usual

    for ds in (hr.range(20).map(fn), hr.range(20).flat_map(lambda row: [fn(row)])):
        run = ds.write_parquet(tmp_path / "out", fresh=True, on_error=how, **quiet)
        assert (run.rows, run.tally.bad) == (19, 1)
    if how == "quarantine":
        assert quarantined(tmp_path / "out")["id"].to_pylist()[-1:] == [7]
    with pytest.raises((UserCodeError, SchemaConflict)):  # of two types that meet in a block, or in the output
        hr.range(20).map(fn).write_parquet(tmp_path / "out", fresh=True, **quiet)


def test_one_odd_value_among_a_blocks_is_named() -> None:
    """Although it is the block whose column can't be made."""
    ds = hr.range(3000).map(lambda row: {"s": b"abc" if row["id"] == 1500 else "ok"})
    with pytest.raises(hr.UserCodeError, match="some bytes and some texts") as caught:
        ds.to_arrow(engine="inline", progress="quiet")
    assert "1500 of range(3000)" in str(caught.value)


@pytest.mark.parametrize("engine", ["inline", "threads", "processes"])
def test_one_odd_value_among_a_blocks_is_set_aside_alone(tmp_path: Path, engine: Any) -> None:
    ds = hr.range(3000).map(lambda row: {"id": row["id"], "s": b"abc" if row["id"] == 1500 else "ok"})
    run = ds.write_parquet(tmp_path / "out", on_error="skip", engine=engine, progress="quiet")
    assert (run.rows, run.tally.skipped) == (2999, 1)
