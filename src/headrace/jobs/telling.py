"""What people see of many jobs on stderr: one line that redraws in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Self, TextIO

from headrace.core.options import Progress
from headrace.jobs.job import JobResult, first_line

REDRAW_S = 0.125
LOG_EVERY_S = 10.0
MOST_TOLD = 20  # failed jobs that have a line each


class Teller:
    """total: jobs. Failed jobs are told as they come, each in a line of its own."""

    def __init__(self, total: int, progress: Progress, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        if progress == "auto":
            progress = "line" if self._stream.isatty() else "log"
        self._progress: Progress = progress
        self._total = total
        self._done = self._failed = self._rows = 0
        self._began = self._drawn = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress != "quiet":
            self._write(("\r\x1b[K" if self._progress == "line" else "") + self._text() + "\n")

    def told(self, result: JobResult) -> JobResult:
        self._done += 1
        self._failed += not result.ok
        self._rows += 0 if result.run is None else result.run.rows
        if self._progress == "quiet":
            return result
        clear = "\r\x1b[K" if self._progress == "line" else ""
        if result.error is not None and self._failed <= MOST_TOLD:
            more = "" if self._failed < MOST_TOLD else "; further ones are only counted"
            self._write(f"{clear}headrace: {result.job.name} failed: {first_line(result.error)}{more}\n")
        now = time.perf_counter()
        if now - self._drawn >= (REDRAW_S if clear else LOG_EVERY_S):
            self._drawn = now
            self._write(clear + self._text() + ("" if clear else "\n"))
        return result

    def _text(self) -> str:
        seconds = time.perf_counter() - self._began
        failed = f", {self._failed} failed" if self._failed else ""
        done = f"{self._done:,} of {self._total:,} jobs{failed}, {self._rows:,} rows"
        return f"headrace: {done}, {self._done / max(seconds, 1e-9):,.1f} jobs/s, {seconds:,.1f} s"

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone must not end the jobs
            self._stream.write(text)
            self._stream.flush()
