"""What goes wrong ends the run with one clear error, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

import headrace as hr

from .conftest import outputs, read_back

Options = dict[str, Any]


def explode(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if (batch["id"] == 133).any():
        raise ValueError("no such row, please")
    return batch


def test_a_user_function_that_raises(data: Path, tmp_path: Path, quiet: Options) -> None:
    with pytest.raises(hr.UserCodeError) as caught:
        hr.read_parquet(data).map_batches(explode, batch_size=40).write_parquet(tmp_path / "out", **quiet)
    text = str(caught.value)
    assert "ValueError: no such row, please" in text
    assert text.count("no such row, please") <= 2, "said once, and once in the user's own frames"
    assert "explode" in text
    assert "headrace/worker" not in text, "only the user's frames"
    where = dict(caught.value.where)
    assert "f3.parquet" in where["rows"]
    assert 'on_error="skip"' in caught.value.hint
    assert not (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_model_that_returns_too_few_rows(data: Path, quiet: Options, device: str) -> None:
    with pytest.raises(hr.UserCodeError, match="rows"):
        hr.read_parquet(data).predict(lambda x: x[:-1], input="x", output="y", device=device).run(**quiet)


def test_a_missing_column_is_refused_before_any_work(data: Path, tmp_path: Path, quiet: Options) -> None:
    with pytest.raises(hr.PlanError, match="no_such"):
        hr.read_parquet(data).predict(lambda x: x, input="no_such", output="y").write_parquet(tmp_path / "out", **quiet)
    assert outputs(tmp_path) == [f"in/f{i}.parquet" for i in range(5)]


def test_a_missing_input(tmp_path: Path, quiet: Options) -> None:
    with pytest.raises(hr.DataError, match="nowhere"):
        hr.read_parquet(tmp_path / "nowhere").count(**quiet)


def test_a_broken_input_names_the_file(data: Path, quiet: Options) -> None:
    good = (data / "f2.parquet").read_bytes()
    (data / "f2.parquet").write_bytes(good[:200] + b"\0" * 50 + good[250:])
    with pytest.raises(hr.DataError, match=r"f2\.parquet"):
        hr.read_parquet(data).run(**quiet)


def test_a_finished_destination_is_not_overwritten(data: Path, tmp_path: Path, quiet: Options) -> None:
    ds = hr.read_parquet(data)
    ds.write_parquet(tmp_path / "out", **quiet)
    first = outputs(tmp_path / "out")
    assert ds.write_parquet(tmp_path / "out", **quiet).already_done
    with pytest.raises(hr.DestinationError, match="fresh"):
        ds.limit(3).write_parquet(tmp_path / "out", **quiet)
    assert outputs(tmp_path / "out") == first
    ds.limit(3).write_parquet(tmp_path / "out", fresh=True, **quiet)
    assert hr.read_parquet(tmp_path / "out").count() == 3


def test_unknown_options_and_devices(data: Path) -> None:
    with pytest.raises(hr.PlanError, match="engin"):
        hr.read_parquet(data).run(engin="threads")  # type: ignore[call-arg]
    with pytest.raises(hr.PlanError, match="device"):
        hr.read_parquet(data).predict(lambda x: x, input="x", output="y", device="tpu").run(progress="quiet")
    with pytest.raises(hr.PlanError, match="cuda"):
        hr.read_parquet(data).predict(lambda x: x, input="x", output="y", device="cuda").run(progress="quiet", devices=[])


@pytest.mark.skipif(sys.platform != "linux", reason="processes need Linux")
def test_a_worker_that_is_killed(data: Path, tmp_path: Path) -> None:
    def die(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        os.kill(os.getpid(), signal.SIGKILL)
        return batch

    with pytest.raises(hr.WorkerDied, match=r"SIGKILL|signal 9"):
        hr.read_parquet(data).map_batches(die).write_parquet(tmp_path / "out", engine="processes", progress="quiet", cpus=2)
    assert outputs(tmp_path / "out") == []


def test_a_function_that_calls_exit(data: Path, quiet: Options) -> None:
    def leave(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        sys.exit(3)

    with pytest.raises(hr.HeadraceError):
        hr.read_parquet(data).map_batches(leave).run(**quiet)


def test_interrupting_the_driver_loses_nothing(data: Path, tmp_path: Path, quiet: Options) -> None:
    def interrupt(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with contextlib.suppress(FileExistsError):  # once, whichever worker comes first
            os.close(os.open(sent, os.O_CREAT | os.O_EXCL))
            os.kill(parent, signal.SIGINT)
        return batch

    parent, sent = os.getpid(), tmp_path / "sent"
    ds = hr.read_parquet(data).map_batches(interrupt)
    with pytest.raises(KeyboardInterrupt):
        ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    ds.write_parquet(tmp_path / "out", outputs="per_input", **quiet)
    assert read_back(tmp_path / "out")["id"].to_pylist() == list(range(200))


def test_a_limit_after_an_evaluation_is_refused(data: Path) -> None:
    """How many rows come to the evaluation before the limit is reached would be up to chance."""
    ds = hr.read_parquet(data).evaluate(n=hr.metrics.Count())
    with pytest.raises(hr.PlanError, match=r"limit\(\) before evaluate\(\)"):
        ds.limit(3)


def test_a_filter_that_names_no_column_of_the_input(data: Path) -> None:
    with pytest.raises(hr.PlanError) as caught:
        hr.read_parquet(data).filter(pc.field("zz") > 0).explain()
    assert str(caught.value).splitlines()[0].endswith("No match for FieldRef.Name(zz)")
    assert ("columns there", "id, x, name, label, nested, when") in caught.value.where
    assert "__headrace" not in str(caught.value)


def test_a_filter_in_words() -> None:
    with pytest.raises(hr.PlanError, match="'x > 0' is no filter"):
        hr.range(3).filter("x > 0")


def test_a_function_of_several_parameters_is_told_what_it_is_called_with() -> None:
    def both(a: object, b: object) -> object:
        return a, b

    for ds in (hr.range(3).map(both), hr.range(3).predict(both, input=["id"], output="y")):  # type: ignore[arg-type]
        with pytest.raises(hr.UserCodeError, match="missing 1 required positional argument") as caught:
            ds.to_arrow(progress="quiet")
        assert "one argument: a dict of columns" in str(caught.value)
