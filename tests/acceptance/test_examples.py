"""The examples run as a reader of the README would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import headrace as hr

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *args: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / script, *args], cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_demo(tmp_path: Path) -> None:
    printed = run("demo.py", cwd=tmp_path)
    assert "accuracy" in printed
    again = run("demo.py", cwd=tmp_path)
    assert "accuracy" in again, "a second run replaces the first"


def test_resnet50(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run("resnet50.py", "--rows", "6", "--output", "out", "--batch", "4", cwd=tmp_path)
    rows = hr.read_parquet(tmp_path / "out").take(10)
    assert len(rows) == 6
    assert {"id", "class", "score"} <= set(rows[0])
