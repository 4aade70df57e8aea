"""Memory that gets short while a run goes on: it gets slower, spills, and its output stays the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headrace as hr
from headrace.core.refs import PartRef
from headrace.runtime import driver
from headrace.runtime.governor import Governor, Room
from headrace.substrates.inline import InlineSubstrate
from headrace.substrates.processes.pool import ProcessesSubstrate
from headrace.substrates.threads import ThreadsSubstrate

from .conftest import read_back

SUBSTRATES = {"inline": InlineSubstrate, "threads": ThreadsSubstrate, "processes": ProcessesSubstrate}


class Label:
    def __call__(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        import time

        time.sleep(0.01)
        return batch["wide"].sum(axis=1)


def widen(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"id": batch["id"], "wide": np.repeat(batch["id"][:, None], 2000, axis=1).astype(np.float32)}


def tight(monkeypatch: pytest.MonkeyPatch, shares: Callable[[int], float]) -> None:
    """The machine's memory is in use as `shares` says for each sample."""
    samples = iter(range(1 << 30))

    def rooms(own: int) -> Sequence[Room]:
        return (Room(int(shares(next(samples)) * 1000), 1000),)

    class Tight(Governor):
        def __init__(self) -> None:
            super().__init__(rooms=rooms)

        def sample(self, measure: Callable[[], int], now_s: float) -> tuple[int, bool, str]:
            answer = super().sample(measure, now_s)
            self.due_s = now_s + 0.01
            return answer

    monkeypatch.setattr(driver, "Governor", Tight)


@pytest.mark.parametrize("shares", [lambda i: 0.99, lambda i: 0.87, lambda i: (0.99, 0.5, 0.87)[i // 5 % 3]])
def test_output_is_the_same(
    tmp_path: Path, quiet: dict[str, Any], monkeypatch: pytest.MonkeyPatch, shares: Callable[[int], float]
) -> None:
    tight(monkeypatch, shares)
    ds = hr.range(2000).map_batches(widen, batch_size=100).predict(Label, input=["wide"], output="y", device="sim").drop("wide")
    run = ds.write_parquet(tmp_path / "out", **quiet)
    back = read_back(tmp_path / "out")
    assert back["id"].to_pylist() == list(range(2000))
    assert back["y"].to_pylist() == [i * 2000.0 for i in range(2000)]
    assert run.tally.written == 2000
    assert any("memory" in note for note in run.notes)


def test_blocks_that_wait_go_to_disk(
    data: Path, tmp_path: Path, engine: str, quiet: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spilled: list[int] = []
    spill = SUBSTRATES[engine].spill

    def counted(self: Any, parts: Sequence[PartRef]) -> tuple[PartRef, ...]:
        moved = spill(self, parts)
        spilled.extend(part.bytes for part in moved)
        return moved

    monkeypatch.setattr(SUBSTRATES[engine], "spill", counted)
    tight(monkeypatch, lambda i: 0.5 if i < 12 else 0.99)
    ds = hr.range(6000).map_batches(widen, batch_size=100)
    ds = ds.predict(Label, input=["wide"], output="y", device="sim", batch_size=100).drop("wide")
    ds.write_parquet(tmp_path / "out", **quiet)
    assert read_back(tmp_path / "out")["y"].to_pylist() == [i * 2000.0 for i in range(6000)]
    assert sum(spilled) > 0
