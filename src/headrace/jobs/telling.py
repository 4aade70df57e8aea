"""What people see of many jobs on stderr: one line that redraws in a terminal, a line now and then anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Self, TextIO

from headrace.core.options import Progress
from headrace.jobs.job import JobResult, first_line
from headrace.observe import words
from headrace.observe.progress import CLEAR, LOG_EVERY_S, REDRAW_S, room, settled

MOST_TOLD = 20  # failed jobs that have a line each


class Teller:
    """total: jobs. Failed jobs are told as they come, each in a line of its own."""

    def __init__(self, total: int, progress: Progress, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._progress = settled(progress, self._stream)
        self._clear = CLEAR if self._progress == "line" else ""
        self._total = total
        self._done = self._failed = self._rows = 0
        self._began = self._drawn = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._write(f"{self._clear}headrace: {self._text()}\n")

    def told(self, result: JobResult) -> JobResult:
        self._done += 1
        self._failed += not result.ok
        self._rows += 0 if result.run is None else result.run.rows
        if result.error is not None and self._failed <= MOST_TOLD:
            more = "" if self._failed < MOST_TOLD else "; further ones are only counted"
            failure = words.one_line(f"{result.job.name} failed: {first_line(result.error)}")
            self._write(f"{self._clear}headrace: {failure}{more}\n")
        now = time.perf_counter()
        if now - self._drawn >= (REDRAW_S if self._clear else LOG_EVERY_S):
            self._drawn = now
            line = f"headrace: {self._text()}"
            self._write(CLEAR + words.cut(line, room(self._stream)) if self._clear else f"{line}\n")
        return result

    def _text(self) -> str:
        seconds = time.perf_counter() - self._began
        failed = f", {words.count(self._failed)} failed" if self._failed else ""
        done = f"{words.count(self._done)} of {words.count(self._total)} jobs{failed}, {words.count(self._rows)} rows"
        return f"{done}, {words.rate(self._done / max(seconds, 1e-9))} jobs/s, {words.duration(seconds)}"

    def _write(self, text: str) -> None:
        if self._progress == "quiet":
            return
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone must not end the jobs
            self._stream.write(text)
            self._stream.flush()
