"""Packing: a stream of objects becomes a stream of splits.

Rules: small objects are packed in listing order by their stored size, without opening them; large ones are divided where their
format allows it; nothing depends on the number of workers. Where a row is so much work that splits of the usual size would take
long, a run has smaller ones (`Division`). Memory is one split.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from headrace.connectors.storage import Stored
from headrace.core.splits import Division, Fragment, Split

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

# A split is what is lost when a worker dies and what one core holds on to at the end of a run: a second or two of work.
# Parquet decodes at 0.5-1 GB/s a core and image pipelines eat 50-60 MB/s, so 128 MiB is 0.2-2.5 s.
PACK_BYTES = 128 << 20
# Opening an object and publishing costs about a millisecond, in which 0.5-4 MB could have been read; on S3 rather more.
FILE_COST_BYTES = 4 << 20
# Larger objects stand alone and are divided into even parts of about this size, so that a handful of large files still
# keeps all cores busy to the end.
DIVIDE_OVER_BYTES = 32 << 20
DIVIDE_BYTES = 64 << 20
SPLIT_MAX_ROWS = 4_000_000

DIVIDED_AHEAD = 16  # large objects of a remote store that are looked at at once: each takes a request's time, and little else

Divide = Callable[[Stored], list[Fragment]]


def whole(o: Stored, rows: int | None = None) -> Fragment:
    return Fragment(o.uri, o.size, o.version, 0, -1, rows, o.name)


def one_each(objects: Iterable[Stored]) -> Iterator[Split]:
    """A split per object, whole (`outputs="per_input"`)."""
    for index, o in enumerate(objects):
        yield Split(index, (whole(o),), o.size)


def pack(
    objects: Iterable[Stored],
    divide: Divide,
    division: Division | None = None,
    *,
    file_cost: int = FILE_COST_BYTES,
    max_files: int = 65_536,
) -> Iterator[Split]:
    """Pack small objects; a large one becomes one split for each fragment that `divide` returns."""
    most, over = (PACK_BYTES, DIVIDE_OVER_BYTES) if division is None else (division.split_bytes, division.split_bytes)
    if division is not None:
        file_cost = 0  # opening it is nothing beside the work that its rows are
    index = 0
    held: list[Fragment] = []
    held_bytes = 0
    cost = 0
    for o in objects:
        large = o.size > over
        if held and (large or cost + o.size + file_cost > most or len(held) >= max_files):
            yield Split(index, tuple(held), held_bytes)
            index, held, held_bytes, cost = index + 1, [], 0, 0
        if large:
            parts = divide(o)
            rows = sum(part.rows or 0 for part in parts)
            for part in parts:  # of equal size, where their rows are not known
                share = (part.rows or 0) / rows if rows else 1 / len(parts)
                yield Split(index, (part,), max(1, int(o.size * share)), part.rows)
                index += 1
            continue
        held.append(whole(o))
        held_bytes += o.size
        cost += o.size + file_cost
    if held:
        yield Split(index, tuple(held), held_bytes)


def pack_remote(
    objects: Iterable[Stored], divide: Divide, division: Division | None = None, *, file_cost: int = FILE_COST_BYTES
) -> Iterator[Split]:
    """As `pack`; while an object is packed, the next large ones are being divided."""
    over = DIVIDE_OVER_BYTES if division is None else division.split_bytes
    divided: deque[tuple[Stored, Future[list[Fragment]]]] = deque()

    def taken(o: Stored) -> list[Fragment]:
        of, parts = divided.popleft()
        assert of is o
        return parts.result()

    def looked_at(threads: ExitStack) -> Iterator[Stored]:
        pool: ThreadPoolExecutor | None = None
        ahead: deque[Stored] = deque()
        rest = iter(objects)
        while True:
            for o in islice(rest, DIVIDED_AHEAD - len(ahead)):
                ahead.append(o)
                if o.size > over:
                    if pool is None:
                        from concurrent.futures import ThreadPoolExecutor

                        pool = threads.enter_context(ThreadPoolExecutor(DIVIDED_AHEAD, thread_name_prefix="headrace-divide"))
                        threads.callback(lambda: [parts.cancel() for _, parts in divided])  # before the pool is waited for
                    divided.append((o, pool.submit(divide, o)))
            if not ahead:
                return
            yield ahead.popleft()

    with ExitStack() as threads:
        yield from pack(looked_at(threads), taken, division, file_cost=file_cost)


def even_ranges(size: int, target: int) -> list[tuple[int, int]]:
    """[start, stop) byte ranges of nearly equal length, about `target` each; the last stop is -1 (to the end)."""
    parts = max(1, -(-size // target))
    cuts = [size * i // parts for i in range(parts)] + [-1]
    return list(pairwise(cuts))
