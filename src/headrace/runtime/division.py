"""What a run's splits are divided to.

A split is what is done again after a kill, and what is written when it is done. Its usual size is one of bytes: right for rows
that take microseconds, and hours of work where one takes a second. So the time that rows take is sampled when a run begins, or
assumed where nothing was tried, and splits that would be too much work are divided finer. The answer goes into the log, before
anything that is listed: later sessions of the run have the same splits, however quick their machine is.
"""

from __future__ import annotations

import math
from itertools import islice

from headrace.connectors.packing import PACK_BYTES
from headrace.contracts.source import DividingSource, Source
from headrace.core.resources import CPU_POOL, WAITING_POOL
from headrace.core.splits import Division
from headrace.plan.nodes import FilterRows, FlatMap, MapBatches, MapRows, Predict
from headrace.plan.physical import is_stream
from headrace.runtime.engine import LOOK_AHEAD, Sampled
from headrace.worker.program import Program

USUAL_S = 20.0  # of work in a split of the usual size: as much may be done again
LEAST_S = 10.0  # of work in a smaller one: what it costs, some milliseconds, is nothing beside it
MOST_S = 300.0
MOST_SPLITS = 256  # so many of LEAST_S are not too many outputs; with more work there is more in each
LEAST_ROWS = 16

# What a row is assumed to take where nobody has tried. A wrong guess costs some more splits, or some more work done again.
STREAM_ROW_S = 0.05  # an LLM, an endpoint
DEVICE_ROW_S = 0.001
UNTRIED_ROW_S = 0.0001
LEAST_ROW_BYTES = 2**-10  # that a source may tell; less, and what is no number, is nothing told
GUESSED_BYTES = 1 << 20  # of a split at least, where the guess is most of what is known: rows may be quick, and few bytes


def choose_division(program: Program, sampled: Sampled | None) -> Division | None:
    """None: splits of the usual size are little enough work. sampled: what the first rows told, None where none were tried."""
    source = program.source
    if not program.divisible or not isinstance(source, DividingSource):
        return None
    assumed_s, streams = _assumed(program, 0 if sampled is None else sampled.ops)
    row_s = assumed_s + (0.0 if sampled is None else sampled.row_s)
    if not row_s or (sampled is not None and not assumed_s and sampled.all_s <= USUAL_S):
        return None
    size = _least_bytes(source)
    told = source.row_bytes()
    known = math.isfinite(told) and told >= LEAST_ROW_BYTES
    row_bytes = told if known else (sampled.row_bytes if sampled is not None else 0.0)
    if not row_bytes:
        return None
    byte_s = row_s / row_bytes
    if min(size, PACK_BYTES) * byte_s <= USUAL_S:
        return None
    target_s = min(MOST_S, max(LEAST_S, size * byte_s / MOST_SPLITS))
    wanted = max(target_s / byte_s, LEAST_ROWS * row_bytes)
    slow = streams or assumed_s < row_s / 2
    if not slow:
        wanted = max(wanted, GUESSED_BYTES)
    split_bytes = 1 << max(0, round(math.log2(wanted)))  # by powers of two: samples that differ a little make the same splits
    if split_bytes >= min(size, PACK_BYTES):  # nothing to divide, or so much work that usual splits are little of it
        return None
    return Division(split_bytes, by_rows=slow)


def _assumed(program: Program, tried: int) -> tuple[float, bool]:
    """(seconds that a row is assumed to take in operators from `tried` on, does one of them answer row by row?)"""
    total_s, streams = 0.0, False
    for i, op in enumerate(program.ops[tried:], start=tried):
        if isinstance(op, Predict) and is_stream(op):
            total_s, streams = total_s + STREAM_ROW_S, True
        elif isinstance(op, Predict) and _pool(program, i) not in (CPU_POOL, WAITING_POOL):
            total_s += DEVICE_ROW_S
        elif isinstance(op, FilterRows | MapRows | FlatMap | MapBatches | Predict):
            total_s += UNTRIED_ROW_S
    return total_s, streams


def _pool(program: Program, op: int) -> str:
    return next((s.pool for s in program.stages if s.first <= op < s.stop), CPU_POOL)


def _least_bytes(source: Source) -> int:
    """Bytes of the input, or of the first of very many inputs."""
    inputs = iter(source.splits(per_input=True))
    size = sum(split.bytes for split in islice(inputs, LOOK_AHEAD))
    return size if next(inputs, None) is None else max(size, PACK_BYTES)
