"""The benchmark suite itself: contestants run and agree, a wrong output is found, and what is measured is what happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from suite import contract, inputs, page, record, runner  # noqa: E402
from suite.check import Reference  # noqa: E402
from suite.contract import workload  # noqa: E402
from suite.notes import Notes  # noqa: E402

CONTESTANTS = ("headrace", "threads")  # beside the reference, which plain Python makes
SMALLEST: dict[str, dict[str, Any]] = {
    "tiny-files": {"files": 6, "outputs": "per_input"},
    "expand": {"files": 1, "rows": 4, "frames": 12, "rate": 5000.0},
}


@pytest.fixture
def point(request: pytest.FixtureRequest, tmp_path: Path) -> runner.Point:
    """The workload that the test is given, at its smallest."""
    found = workload(request.param)
    params = inputs.params_of(found, size="small", more=SMALLEST[request.param])
    return runner.Point(found, params, tuple(sorted(os.sched_getaffinity(0))), inputs.made(found, params, tmp_path / "data"))


@pytest.mark.parametrize("point", SMALLEST, indirect=True)
def test_contestants_give_the_same_output(point: runner.Point) -> None:
    runner.make_reference(point, {}, 60)
    able, reasons = runner.prepare(runner.chosen([f"{name}:same" for name in CONTESTANTS]), point)
    assert not reasons
    for one in able:
        run = runner.run_once(one, point, {}, timeout_s=60, watched=True, full=True)
        assert run.first_s is not None
        assert 0 < run.first_s < run.wall_s
        assert run.cpu_s > 0
        assert run.peak_bytes > 10 << 20
        assert run.left == []
        if point.workload.name == "expand":
            assert run.busy is not None
            assert 0 < run.busy < 1
    reference = inputs.reference(point.workload, point.params, point.data)
    told = {**reference.told, "rows": reference.told["rows"] + 1}
    (reference.folder / "digests.json").write_text(json.dumps(told))
    with pytest.raises(runner.Failed, match=r"\d+ rows instead of \d+"):
        runner.run_once(able[-1], point, {}, timeout_s=60)


def _write(folder: Path, **columns: Any) -> Path:
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "part.parquet")
    return folder


def test_outputs_are_compared_by_value(tmp_path: Path) -> None:
    ids, nested = [3, 1, 2], [{"a": [1.5], "b": "x"}, {"a": [], "b": None}, None]
    out = _write(tmp_path / "out", id=ids, name=["c", None, "b"], nested=nested, p=np.array([0.3, 0.1, 0.2], np.float32))
    reference = Reference(tmp_path / "reference")
    reference.keep(out, ["id"], ["p"], {"auc": 0.5})

    order = [1, 2, 0]  # other order, other widths, a score that differs by rounding
    kind = pa.struct([("a", pa.large_list(pa.float64())), ("b", pa.large_string())])
    same = _write(
        tmp_path / "same",
        id=pa.array([ids[i] for i in order], pa.int32()),
        name=pa.array([["c", None, "b"][i] for i in order], pa.large_string()),
        nested=pa.array([nested[i] for i in order], kind),
        p=np.array([0.1, 0.2, 0.3]) + 1e-7,
    )
    near = {"p": (1e-5, 1e-6)}
    assert reference.differences(same, ["id"], near, {"auc": 0.5}) == []

    other = _write(
        tmp_path / "other", id=ids, name=["c", None, "a"], nested=[nested[0], None, None], p=[0.3, 0.2, 0.1], q=[0] * 3
    )
    assert reference.differences(other, ["id"], near, {"auc": 0.6}) == [
        "columns ['q'] too many",
        "column name has other values",
        "column nested has other values",
        "column p is not near enough",
        "auc is 0.6 instead of 0.5",
    ]


def test_notes_tell_steady_rate_first_answer_and_device_share(tmp_path: Path) -> None:
    ten = "".join(f"{100 + i} {100 + i + 1} 50\n" for i in range(10))
    (tmp_path / "decode-1-1").write_text(ten)
    (tmp_path / "model-1-2").write_text("".join(f"{101 + i} {101 + i + 0.5} 50\n" for i in range(10)))
    (tmp_path / "device.0-1-2").write_text("".join(f"{101 + i} {101 + i + 0.5} 50\n" for i in range(10)))
    notes = Notes.read(tmp_path)
    assert notes.steady() == pytest.approx(50)
    assert notes.first_answer("model") == 101.5
    assert notes.busy(20.0, 1) == (pytest.approx(0.25), pytest.approx(5 / 9.5))
    assert notes.busy(20.0, 2) == (pytest.approx(0.125), pytest.approx(5 / 19))


def test_a_device_computes_one_call_at_a_time_and_two_devices_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_LOG", str(tmp_path))
    devices = [contract.Devices(2000.0, 2) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda device: [device.compute(20) for _ in range(3)], devices))
    for file in contract._NOTES.values():
        os.close(file)
    contract._NOTES.clear()
    found = Notes.read(tmp_path).devices
    assert sorted(found) == ["device.0", "device.1"]
    assert sum(rows for calls in found.values() for _, _, rows in calls) == 240
    for calls in found.values():
        ordered = sorted(calls)
        assert all(ended <= begun for (_, ended, _), (begun, _, _) in pairwise(ordered))


def test_processes_that_outlive_a_contestant_are_counted_and_ended(tmp_path: Path) -> None:
    orphan = "import time; until = time.process_time() + 0.3\nwhile time.process_time() < until: pass\ntime.sleep(60)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {orphan!r}]); time.sleep(0.8)"
    order = {
        "argv": [sys.executable, "-c", parent],
        "env": dict(os.environ),
        "said": str(tmp_path / "said"),
        "found": str(tmp_path / "found"),
        "cores": sorted(os.sched_getaffinity(0)),
        "timeout_s": 30,
        "every_s": 0,
        "grace_s": 0.1,
    }
    (tmp_path / "order").write_text(json.dumps(order))
    env = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    subprocess.run([sys.executable, "-m", "suite.supervise", str(tmp_path / "order")], env=env, check=True)
    found = json.loads((tmp_path / "found").read_text())
    assert found["code"] == 0
    assert len(found["left"]) == 1
    assert found["cpu_s"] > 0.3


def _contestant(wall_s: float) -> dict[str, Any]:
    spread = {"median": wall_s, "least": wall_s - 0.1, "most": wall_s + 0.1}
    summary = {"wall_s": spread, "first_s": spread, "cpu_s": spread, "share_of_ideal": 1 / wall_s}
    return {"title": "One", "form": "same", "knobs": {}, "peak_mb": 100, "summary": summary, "runs": []}


def test_a_page_is_made_of_recorded_points_and_a_point_measured_again_is_replaced(tmp_path: Path) -> None:
    found = workload("tiny-files")
    path = tmp_path / "tiny-files.json"
    for scale, wall_s in ((1, 9.0), (1, 2.0), (4, 8.0)):
        key = {"variant": "", "size": "full", "scale": scale, "cores": 2, "devices": None, "set": {}}
        contestants = {
            "headrace": _contestant(wall_s),
            "daft": {**_contestant(wall_s * 2), "title": "Daft"},
            "spark": {"title": "Spark", "cannot": "there is no Java"},
        }
        entry = {
            **key,
            "params": {"files": 10},
            "rows": 1000,
            "input_mb": 1,
            "ideal_s": 1.0,
            "ideal_together_s": 1.1,
            "limits": [],
            "contestants": contestants,
            **record.circumstances([]),
        }
        record.keep(found, key, entry, path)
        assert "there is no Java" in record.table(entry)
    told = page.recorded(tmp_path)
    assert [point["contestants"]["headrace"]["summary"]["wall_s"]["median"] for point in told[0]["points"]] == [2.0, 8.0]
    text, drawn = page.page(told)
    assert "| **One** | 2.00 | 1.90 to 2.10 | 1.00x |" in text
    assert "| Daft | 4.00 | 3.90 to 4.10 | 2.00x |" in text
    assert "- Spark: there is no Java" in text
    assert set(drawn) == {"tiny-files.svg", "tiny-files-scale.svg"}
    assert all(svg.startswith("<svg") and svg.rstrip().endswith("</svg>") for svg in drawn.values())
    table = page.readme_table(told)
    assert "| tiny-files | 1.00 | **2.00** | 4.00 |" in table
    assert page.between(f"a\n{page.BEGIN}\nold\n{page.END}\nb", table).count("old") == 0
