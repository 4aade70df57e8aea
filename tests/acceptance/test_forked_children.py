"""User code that forks: a child that comes back from it is no second worker. And user code that raises what Ctrl-C raises."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

import headrace as hr

ENGINES = ["inline", "threads", "processes"] if sys.platform == "linux" else ["inline", "threads"]
ROWS, FILES = 20_000, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of text: what reads them shares its place in the file with every child."""
    made = tmp_path_factory.mktemp("in")
    for i in range(FILES):
        ids = np.arange(i * ROWS, (i + 1) * ROWS)
        table = pa.table({"id": ids, "s": [f"{k:0120d}" for k in ids]})
        pa.csv.write_csv(table, made / f"{i}.csv")
    return made


class Forks:
    """Forks once for each of the files, after some batches; the child raises, exits or returns, as if nothing were."""

    def __init__(self, marks: Path, how: str) -> None:
        self.marks = marks
        self.how = how

    def __call__(self, first: int) -> None:
        mark = self.marks / str(first // ROWS)
        if first % ROWS < ROWS // 2 or mark.exists():
            return
        mark.touch()
        child = os.fork()
        if child:
            os.waitpid(child, 0)
        elif self.how == "raise":
            raise ValueError("in the child")
        elif self.how == "exit":
            sys.exit(0)


def of_batches(forks: Forks) -> Callable[[hr.Dataset], hr.Dataset]:
    def batch(given: dict[str, Any]) -> dict[str, Any]:
        forks(int(given["id"][0]))
        return given

    return lambda ds: ds.map_batches(batch)


def of_rows(forks: Forks) -> Callable[[hr.Dataset], hr.Dataset]:
    def row(given: dict[str, Any]) -> dict[str, Any]:
        if given["id"] % 1000 == 0:
            forks(given["id"])
        return given

    return lambda ds: ds.map(row)


def of_models(forks: Forks) -> Callable[[hr.Dataset], hr.Dataset]:
    class Model:
        def __call__(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            forks(int(ids[0]))
            return ids * 2

    return lambda ds: ds.predict(Model, input="id", output="twice", batch_size=1000)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", ["raise", "exit", "return"])
@pytest.mark.parametrize("kind", [of_batches, of_rows, of_models])
def test_a_child_that_comes_back_takes_no_rows(
    folder: Path, tmp_path: Path, engine: Any, how: str, kind: Callable[[Forks], Callable[[hr.Dataset], hr.Dataset]]
) -> None:
    (tmp_path / "marks").mkdir()
    ds = kind(Forks(tmp_path / "marks", how))(hr.read_csv(folder))
    run = ds.write_csv(tmp_path / "out", engine=engine, outputs="per_input", on_error="skip", progress="quiet", cpus=2)
    assert (run.rows, run.tally.skipped) == (ROWS * FILES, 0)
    read = hr.read_csv(tmp_path / "out").to_arrow(progress="quiet")
    assert read["id"].to_pylist() == list(range(ROWS * FILES))
    assert len(list((tmp_path / "marks").iterdir())) == FILES


@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "inline"])
def test_a_row_may_raise_what_ctrl_c_raises(engine: Any) -> None:
    def row(given: dict[str, Any]) -> dict[str, Any]:
        if given["id"] == 50:
            raise KeyboardInterrupt
        return given

    ds = hr.range(200).map(row)
    assert ds.count(engine=engine, on_error="skip", progress="quiet") == 199
    with pytest.raises(hr.UserCodeError, match=r"raised KeyboardInterrupt") as failed:
        ds.count(engine=engine, progress="quiet")
    assert "row: 50 of" in str(failed.value)
