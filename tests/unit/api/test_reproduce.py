"""reproduce(): a kept row goes through its operator, here and now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import headrace as hr
from headrace.api.reproduce import reproduce
from headrace.core.errors import DataError, PlanError
from headrace.worker.watch import row_bytes, row_digest

TABLE = pa.table({"x": [1.0, 2.0], "y": ["a", "b"]})


def kept(folder: Path, op: int, batch: pa.RecordBatch) -> Path:
    data = row_bytes(batch)
    path = folder / f"{op}-{row_digest(data)}.arrow"
    path.write_bytes(data)
    return path


def row(**values: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([values])


def double(batch: Any) -> Any:
    return {"x": batch["x"] * 2}


class Model:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Any) -> Any:
        return x * self.factor


def test_the_result_is_told(tmp_path: Path) -> None:
    plan = hr.from_arrow(TABLE).limit(5).map_batches(double)._plan
    said: list[str] = []
    text = reproduce(plan, kept(tmp_path, 1, row(x=3.0, y="a")), tell=said.append)
    assert text.splitlines() == [line for part in said for line in part.splitlines()]
    assert said[0].startswith("running map_batches(double) on the row of ")
    assert "  y: 'a'" in said
    assert said[-2:] == ["it made 1 row, and the process is alive:", "  x: 6.0"]


def test_a_model_is_constructed(tmp_path: Path) -> None:
    plan = hr.from_arrow(TABLE).predict(Model, input="x", output="p", constructor_args=(3.0,))._plan
    said: list[str] = []
    reproduce(plan, kept(tmp_path, 0, row(x=3.0)), tell=said.append)
    assert said[-1] == "  p: 9.0"


@pytest.mark.parametrize("verb", ["map", "flat_map", "filter", "map_batches"])
def test_what_is_raised_is_told(tmp_path: Path, verb: str) -> None:
    def broken(given: Any) -> Any:
        raise ValueError("no such thing")

    plan = getattr(hr.from_arrow(TABLE), verb)(broken)._plan
    said: list[str] = []
    reproduce(plan, kept(tmp_path, 0, row(x=3.0)), tell=said.append)
    text = "\n".join(said)
    assert "it raised:" in text
    assert "ValueError: no such thing" in text
    assert "in broken" in text


def test_wrong_files(tmp_path: Path) -> None:
    plan = hr.from_arrow(TABLE).limit(5).map_batches(double)._plan
    with pytest.raises(PlanError, match="not the name of a kept row"):
        reproduce(plan, tmp_path / "row.arrow")
    for op in (0, 2):
        with pytest.raises(PlanError, match=f"kept for operator {op}"):
            reproduce(plan, kept(tmp_path, op, row(x=3.0)))
    with pytest.raises(DataError, match="is not there"):
        reproduce(plan, tmp_path / "1-ab.arrow")
    (tmp_path / "1-ab.arrow").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(DataError, match="can't be read"):
        reproduce(plan, tmp_path / "1-ab.arrow")
    two = pa.RecordBatch.from_pylist([{"x": 1.0}, {"x": 2.0}])
    with pa.ipc.new_stream(str(tmp_path / "1-cd.arrow"), two.schema) as writer:
        writer.write_batch(two)
    with pytest.raises(DataError, match="2 rows, not one"):
        reproduce(plan, tmp_path / "1-cd.arrow")


def test_a_crash_happens_here_with_its_stack(tmp_path: Path) -> None:
    path = kept(tmp_path, 0, row(x=3.0))
    script = (
        "import os, sys, signal, pyarrow as pa, headrace as hr\n"
        "from headrace.api.reproduce import reproduce\n"
        "def dies(batch):\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
        "reproduce(hr.from_arrow(pa.table({'x': [1.0]})).map_batches(dies)._plan, sys.argv[1])\n"
    )
    file = tmp_path / "job.py"
    file.write_text(script)
    done = subprocess.run([sys.executable, str(file), str(path)], capture_output=True, text=True)
    assert done.returncode == -11
    assert done.stderr.startswith("running map_batches(dies) on the row of ")
    assert "in dies" in done.stderr
