"""A scripted run: events with times of our own choosing, and a terminal that remembers what it shows."""

from __future__ import annotations

import io

from headrace.core.events import (
    MemorySampled,
    Noted,
    RunEvent,
    RunFinished,
    RunStarted,
    SplitRetried,
    SplitSettled,
    SplitsFound,
    StepFinished,
    StepStarted,
    WorkerReplaced,
)
from headrace.core.receipts import OutputFile, Receipt, Tally
from headrace.core.steps import OpTime, Timing

START_S = 1000.0


def started(**changes: object) -> RunStarted:
    fields: dict[str, object] = {
        "at_s": START_S,
        "name": "images → out",
        "engine": "threads",
        "pools": {"cpu": 2, "sim": 1},
        "stages": {0: ("prepare", "cpu"), 1: ("predict(Net)", "sim"), 2: ("write", "cpu")},
        "ops": {0: "images.decode", 1: "predict(Net)"},
        "budget_bytes": 1_000_000_000,
    }
    return RunStarted(**(fields | changes))  # type: ignore[arg-type]


def found(at: float, count: int, size: int, *, complete: bool = True, rows: int | None = None) -> SplitsFound:
    return SplitsFound(START_S + at, count, size, complete, rows)


def step(
    begin: float,
    end: float,
    *,
    worker: int = 0,
    pool: str = "cpu",
    stage: int = 0,
    rows: int = 0,
    cpu_s: float | None = None,
    ops: tuple[OpTime, ...] = (),
    tally: Tally | None = None,
) -> list[RunEvent]:
    wall_s = end - begin
    timing = Timing(START_S + begin, wall_s, wall_s if cpu_s is None else cpu_s, ops)
    return [
        StepStarted(START_S + begin, worker, pool, stage),
        StepFinished(START_S + end, worker, pool, stage, rows, rows * 10, timing, tally or Tally()),
    ]


def settled(at: float, index: int, size: int, rows: int | None) -> SplitSettled:
    if rows is None:
        return SplitSettled(START_S + at, index, size, None)
    receipt = Receipt(index, f"id{index}", 0, (OutputFile(f"part-{index}", rows, rows * 7),), rows)
    return SplitSettled(START_S + at, index, size, receipt)


def retried(at: float, index: int, tally: Tally | None = None, why: str = "worker 1 died: killed by signal 9") -> SplitRetried:
    return SplitRetried(START_S + at, index, 2, why, tally or Tally())


def replaced(at: float, worker: int, replaces: int) -> WorkerReplaced:
    return WorkerReplaced(START_S + at, worker, "cpu", replaces, "killed by signal 9")


def noted(at: float, text: str) -> Noted:
    return Noted(START_S + at, text)


def memory(at: float, in_flight: int, rss: int) -> MemorySampled:
    return MemorySampled(START_S + at, in_flight, rss)


def finished(at: float, error: str = "", metrics: dict[str, object] | None = None, **tally: int) -> RunFinished:
    return RunFinished(START_S + at, Tally(**tally), error, metrics or {})


class Terminal(io.StringIO):
    """A text stream that is a terminal; `screen` is what a person sees in it."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        lines = [""]
        column = 0
        text = self.getvalue()
        i = 0
        while i < len(text):
            if text.startswith("\x1b[K", i):
                lines[-1] = lines[-1][:column]
                i += 3
                continue
            c = text[i]
            assert c != "\x1b", f"unknown control sequence: {text[i : i + 8]!r}"
            if c == "\r":
                column = 0
            elif c == "\n":
                lines.append("")
                column = 0
            else:
                lines[-1] = lines[-1][:column] + c + lines[-1][column + 1 :]
                column += 1
            i += 1
        return lines
