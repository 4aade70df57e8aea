"""A sample of a source's rows, spread over the whole listing, and what it says of the rest: rows, seconds of reading, size.

The listing is passed once, lazily and without opening an object; of it an even choice is kept. A few rows are then read from
each of several places, by the source's own reader and with the run's own limits.

Invariants: the listing takes memory for MOST_KEPT inputs at most, and of each place little more than its share of rows is held;
what can't be read is told, never raised; the choice depends on the listing alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field
from msgspec.structs import replace

from headrace.connectors.packing import DIVIDE_OVER_BYTES
from headrace.connectors.sources.files import FileSource
from headrace.connectors.storage import Stored
from headrace.contracts.source import BadRange, Source
from headrace.core.errors import HeadraceError
from headrace.core.options import BlockLimits
from headrace.core.refs import Origin
from headrace.core.splits import Fragment, Split
from headrace.observe.rehearsal import Failure
from headrace.worker.cursor import read_error

if TYPE_CHECKING:
    import pyarrow as pa

MOST_KEPT = 4096  # inputs of the listing that are kept to choose from
LISTING_S = 20.0  # S3 lists some 10,000 objects a second: with millions, the rest is left out and the report says so
PLACE_S = 2.0  # reading at one place ends then, if it has rows
PROBE_BYTES = 4 << 20  # of text is read where a large file can be entered in the middle
SAMPLE_BYTES = 64 << 20  # of rows in all: they travel to each worker process
MEMORY_ROWS = 65_536  # read at each place where that costs nothing, so that blocks are as large as in the run
MOST_WINDOWS = 8  # of a place, to choose from
READ_HINT = 'replace or remove it, or run with on_error="quarantine" (or "skip"), which sets aside what can\'t be read'


Block = tuple["pa.RecordBatch", Origin]


class Survey(Struct):
    """The listing. kept: inputs (index, fragment) evenly spread over it, the first and the last among them. rows: in all, None
    when the metadata of some input does not tell. whole: it came to its end.
    """

    count: int = 0
    bytes: int = 0
    rows: int | None = 0
    whole: bool = True
    kept: list[tuple[int, Fragment]] = field(default_factory=list[tuple[int, Fragment]])


def survey(source: Source, most: int = MOST_KEPT, listing_s: float = LISTING_S) -> Survey:
    """Pass over the listing. Raises HeadraceError when there is nothing to list."""
    found = Survey()
    stride = 1
    last: tuple[int, Fragment] | None = None
    began = time.monotonic()
    for split in source.splits(per_input=True):
        for fragment in split.fragments:
            last = (found.count, fragment)
            if found.count % stride == 0:
                found.kept.append(last)
                if len(found.kept) > most:
                    stride *= 2
                    del found.kept[1::2]
            found.count += 1
        found.bytes += split.bytes
        found.rows = None if found.rows is None or split.rows is None else found.rows + split.rows
        if time.monotonic() - began > listing_s:
            found.whole = False
            break
    if last is not None and found.kept[-1] != last:
        found.kept.append(last)
    return found


class Place(Struct, frozen=True):
    """What was read at one place. inputs: whole ones that it holds, 0 for a part of one. stored_bytes: of what was read to its
    end, 0 when reading ended earlier. rows: read there, those that could not be read included. read_s: what that took.
    """

    label: str
    blocks: tuple[tuple[pa.RecordBatch, Origin], ...]
    inputs: int
    stored_bytes: int
    rows: int
    arrow_bytes: int
    read_s: float

    @property
    def count(self) -> int:
        return _rows_of(self.blocks)


class Sample(Struct, frozen=True):
    """rows_expected: that the source yields in all, None when nothing tells; rows_exact: not extrapolated. rows_error: relative
    standard error of it. read_s_per_row: of a place that is warm.
    """

    survey: Survey
    places: tuple[Place, ...]
    failures: tuple[Failure, ...]
    rows_failed: int
    rows_expected: int | None
    rows_exact: bool
    rows_error: float
    read_s_per_row: float
    read_error: float

    @property
    def rows(self) -> int:
        return sum(p.count for p in self.places)


def take_sample(source: Source, limits: BlockLimits, rows: int, splits: int) -> Sample:
    """At most `rows` rows from `splits` places. Raises HeadraceError when listing fails; what can't be read is a failure."""
    found = survey(source)
    spots = _spots(source, limits, found, rows, splits)
    reader = _PlaceReader(source, limits, SAMPLE_BYTES // max(1, len(spots)))
    places: list[Place] = []
    left = rows
    wanted = sum(spot.places for spot in spots)
    for i, spot in enumerate(spots):
        found_there = reader.read(spot, want=-(-left * spot.places // wanted), at=i / max(1, len(spots) - 1))
        left -= sum(place.count for place in found_there)
        wanted -= spot.places
        places += found_there
    exact = _exact_rows(found, places)
    expected, error = (exact, 0.0) if exact is not None else _extrapolated(source, found, places)
    per_row, read_spread = _read_cost(places)
    return Sample(
        found,
        tuple(p for p in places if p.count),
        tuple(reader.failures),
        reader.rows_failed,
        expected,
        exact is not None,
        error,
        per_row,
        read_spread,
    )


class _Spot(Struct, frozen=True):
    """Fragments read together. whole: they are whole inputs. places: to take of them."""

    fragments: tuple[Fragment, ...]
    whole: bool = True
    places: int = 1


def _spots(source: Source, limits: BlockLimits, found: Survey, rows: int, splits: int) -> list[_Spot]:
    """Where to read: whole inputs in groups where they are small, parts of them where there are few large ones."""
    kept = found.kept
    if not kept or rows < 1:
        return []
    splits = min(splits, rows)
    if len(kept) < splits or any(f.size_bytes > DIVIDE_OVER_BYTES for _, f in kept):
        chosen = _evenly(kept, min(len(kept), splits))
        shares = [splits * (i + 1) // len(chosen) - splits * i // len(chosen) for i in range(len(chosen))]
        spots = [
            spot for (_, f), parts in zip(chosen, shares, strict=True) for spot in _parts(source, f, parts, -(-rows // splits))
        ]
        return _evenly(spots, splits) if sum(s.places for s in spots) > splits else spots
    wanted = _inputs_wanted(source, limits, kept, rows)
    chosen = _evenly(kept, min(len(kept), max(splits, wanted)))
    cuts = [len(chosen) * i // splits for i in range(splits + 1)]
    return [_Spot(tuple(f for _, f in chosen[a:b])) for a, b in itertools.pairwise(cuts)]


def _inputs_wanted(source: Source, limits: BlockLimits, kept: Sequence[tuple[int, Fragment]], rows: int) -> int:
    """How many small inputs hold about `rows` rows, by the one in the middle; of that no more than these is read."""
    _, fragment = kept[len(kept) // 2]
    there = 0
    try:
        with closing(_open(source, limits, (fragment,))) as blocks:
            for batch, _ in blocks:
                there += batch.num_rows
                if there >= rows:
                    break
    except Exception:  # if it is among the chosen ones, it is told there
        pass
    return -(-rows // there) if there else 1


def _parts(source: Source, f: Fragment, parts: int, rows: int) -> list[_Spot]:
    """Places in one input: row ranges, parts of a large file where its format allows, or the whole."""
    if f.rows is not None and f.stop - f.start == f.rows:  # in memory: rows are the unit
        return _row_ranges(f, parts, max(rows, MEMORY_ROWS))
    whole = [_Spot((f,), places=parts)]
    if not isinstance(source, FileSource) or f.size_bytes <= DIVIDE_OVER_BYTES:
        return whole
    try:
        divided = source.divide(Stored(f.uri, f.size_bytes, f.version, f.name))
    except HeadraceError:  # told when it is read
        return whole
    if len(divided) < 2:
        return whole
    chosen = _evenly(divided, parts)
    return [_Spot((_narrowed(source, part),), whole=False, places=-(-parts // len(chosen))) for part in chosen]


def _row_ranges(f: Fragment, parts: int, most: int) -> list[_Spot]:
    """At most `most` rows from the start of each part, of the last one from its end."""
    assert f.rows is not None
    cuts = [f.start + f.rows * i // parts for i in range(parts + 1)]
    ranges = [(a, min(b, a + most)) for a, b in itertools.pairwise(cuts)]
    ranges[-1] = (max(cuts[-2], cuts[-1] - most), cuts[-1])
    return [_Spot((replace(f, start=a, stop=b, rows=b - a),), whole=False) for a, b in ranges if b > a]


def _narrowed(source: Source, part: Fragment) -> Fragment:
    """A piece of a large file's part: one row group of Parquet, or a few megabytes of lines."""
    if source.name == "parquet":
        middle = (part.start + part.stop - 1) // 2
        return replace(part, start=middle, stop=middle + 1, rows=None)
    stop = part.size_bytes if part.stop < 0 else part.stop
    start = part.start if part.start == 0 or part.stop < 0 else (part.start + stop) // 2
    return replace(part, start=start, stop=min(stop, start + PROBE_BYTES))


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of them, the first and the last among them; all if there are no more."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[0]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _open(
    source: Source, limits: BlockLimits, fragments: tuple[Fragment, ...], on_bad: Any = None
) -> Generator[tuple[pa.RecordBatch, Origin]]:
    rows = [f.rows for f in fragments if f.rows is not None]
    split = Split(0, fragments, sum(f.size_bytes for f in fragments), sum(rows) if len(rows) == len(fragments) else None)
    yield from source.open(split, limits) if on_bad is None else source.open(split, limits, on_bad)


class _PlaceReader:
    """Reads places, and collects what can't be read. most_bytes: of rows that a place may hold."""

    def __init__(self, source: Source, limits: BlockLimits, most_bytes: int) -> None:
        self.failures: list[Failure] = []
        self.rows_failed = 0
        self._source = source
        self._limits = limits
        self._most_bytes = most_bytes

    def read(self, spot: _Spot, want: int, at: float) -> list[Place]:
        """About `want` rows, in as many places as the spot is to have: all there are, or windows of what was read; of one place
        a window at `at` (0 start, 1 end). The first place holds what was measured.
        """
        each = -(-want // spot.places)
        windows: list[Block] = []
        tail: list[Block] = []  # of the last block, which is to be among the chosen ones
        stride, number, rows, size, took, bad_before = 1, 0, 0, 0, 0.0, self.rows_failed
        ended = True
        bad: list[BadRange] = []
        blocks = _open(self._source, self._limits, spot.fragments, bad.append)
        began = time.perf_counter()
        try:
            for batch, origin in blocks:
                took += time.perf_counter() - began
                rows += batch.num_rows
                size += batch.nbytes
                tail = _windows(batch, origin, each, spot.places, at)
                if number % stride == 0:
                    windows += tail
                    if len(windows) > MOST_WINDOWS * spot.places and _rows_of(windows) >= 2 * want:
                        stride *= 2
                        del windows[1::2]
                number += 1
                if took > PLACE_S and rows >= want:
                    ended = False
                    break
                began = time.perf_counter()
        except Exception as exc:
            ended = False
            self._tell(spot, read_error(exc))
        finally:
            blocks.close()
        for each_bad in bad:
            self._tell_range(each_bad)
        if tail and windows[-1] is not tail[-1]:
            windows += tail
        stored = sum(_stored(f) for f in spot.fragments) if ended else 0
        rows += self.rows_failed - bad_before
        inputs = len(spot.fragments) if spot.whole and ended else 0
        label = spot.fragments[0].uri
        groups: list[tuple[Block, ...]] = []
        for group in _grouped(windows, spot.places):
            groups.append(self._cut(group, min(each, want), at))
            want -= _rows_of(groups[-1])
        measured = Place(label, groups[0] if groups else (), inputs, stored, rows, size, took)
        return [measured, *(Place(label, group, 0, 0, 0, 0, 0.0) for group in groups[1:])]

    def _cut(self, windows: list[Block], want: int, at: float) -> tuple[Block, ...]:
        """`want` rows of the windows, beginning with the one at `at`, within the bytes that a place may hold."""
        first = 0 if _rows_of(windows) <= want else int(at * (len(windows) - 1) + 0.5)
        out: dict[int, Block] = {}
        size = 0
        for i in [*range(first, len(windows)), *range(first - 1, -1, -1)]:
            batch, origin = windows[i]
            fit = batch.num_rows
            if batch.num_rows and batch.nbytes:
                fit = int((self._most_bytes - size) / (batch.nbytes / batch.num_rows))
            n = min(want, batch.num_rows, max(fit, 0 if out else 1))
            if n > 0:
                out[i] = (batch.slice(0, n), origin.slice(0, n))
                want -= n
                size += int(batch.nbytes * n / batch.num_rows)
        return tuple(out[i] for i in sorted(out))

    def _tell(self, spot: _Spot, error: HeadraceError) -> None:
        where = dict(error.where)
        place = "; ".join(f"{k} {v}" for k, v in error.where if k not in ("file", "hint"))
        text = f"{type(error).__name__}: {error.message}" + (f" ({place})" if place else "")
        uri = where.get("file", spot.fragments[0].uri if len(spot.fragments) == 1 else "")
        self.failures.append(Failure("read", uri, None, text, error.hint or READ_HINT, rows=0))

    def _tell_range(self, bad: BadRange) -> None:
        self.rows_failed += bad.rows
        where = "; ".join(f"{k} {v}" for k, v in bad.error.where if k != "file")
        text = f"{type(bad.error).__name__}: {bad.error.message}" + (f" ({where})" if where else "")
        self.failures.append(Failure("read", bad.uri, bad.row if bad.row >= 0 else None, text, READ_HINT, rows=bad.rows))


def _stored(f: Fragment) -> int:
    """Stored bytes of a fragment whose range is in bytes or the whole; 0 for any other."""
    if f.start == 0 and f.stop < 0:
        return f.size_bytes
    return (f.stop - f.start) if f.stop <= f.size_bytes and f.rows is None else 0


def _windows(batch: pa.RecordBatch, origin: Origin, each: int, places: int, at: float) -> list[Block]:
    """`places` windows of at most `each` rows, evenly over the block; copied, so that the block's memory goes."""
    rows = batch.num_rows
    if places == 1 or rows <= each:
        return [_window(batch, origin, int(at * (rows - min(each, rows))), min(each, rows))]
    if rows <= each * places:
        cuts = [rows * i // places for i in range(places + 1)]
        return [_window(batch, origin, a, b - a) for a, b in itertools.pairwise(cuts) if b > a]
    return [_window(batch, origin, (rows - each) * i // (places - 1), each) for i in range(places)]


def _rows_of(blocks: Sequence[Block]) -> int:
    return sum(batch.num_rows for batch, _ in blocks)


def _window(batch: pa.RecordBatch, origin: Origin, start: int, rows: int) -> Block:
    import pyarrow as pa

    if rows == batch.num_rows:
        return batch, origin
    part = batch.slice(start, rows)
    if batch.num_columns:
        part = batch.take(pa.array(range(start, start + rows), pa.int64()))
    return part, origin.slice(start, rows)


def _grouped(windows: list[Block], places: int) -> list[list[Block]]:
    """For each place the windows that follow each other; fewer places where there are fewer windows."""
    if places == 1:
        return [windows]
    if len(windows) < places:
        return [[window] for window in windows]
    cuts = [len(windows) * i // places for i in range(places + 1)]
    return [windows[a:b] for a, b in itertools.pairwise(cuts) if b > a]


def _exact_rows(found: Survey, places: Sequence[Place]) -> int | None:
    """Rows in all, where metadata tell or every input was read to its end."""
    if not found.whole:
        return None
    if found.rows is not None:
        return found.rows
    whole = sum(p.inputs for p in places)
    return sum(p.rows for p in places) if whole == found.count else None


def _extrapolated(source: Source, found: Survey, places: Sequence[Place]) -> tuple[int | None, float]:
    """(rows, relative standard error): by rows an input or rows a stored byte, whichever varies less from place to place."""
    by_input = [p.rows / p.inputs for p in places if p.inputs]
    lines = source.name != "parquet"  # ranges of row groups are no bytes
    by_byte = [p.rows / p.stored_bytes for p in places if p.stored_bytes and (p.inputs or lines)]
    guesses: list[tuple[float, float]] = []
    if any(p.rows and not p.inputs for p in places):  # parts of large inputs say nothing of whole ones
        by_input = []
    for ratios, units in ((by_input, found.count), (by_byte, found.bytes)):
        if ratios:
            mean = fmean(ratios)
            spread = pstdev(ratios) / mean if mean > 0 else 0.0
            guesses.append((spread / len(ratios) ** 0.5 if len(ratios) > 1 else 0.3, mean * units))
    if guesses:
        error, rows = min(guesses)
        return round(rows), error
    known = _known_rows(source, found)
    return known, 0.1


def _known_rows(source: Source, found: Survey) -> int | None:
    """From the metadata of a few inputs (of Parquet: their footers), by stored size. None where those don't tell."""
    if not isinstance(source, FileSource) or source.name != "parquet":
        return None
    rows = size = 0
    for _, f in _evenly(found.kept, 8):
        try:
            parts = source.divide(Stored(f.uri, f.size_bytes, f.version, f.name))
        except HeadraceError:
            continue
        if all(p.rows is not None for p in parts):
            rows += sum(p.rows or 0 for p in parts)
            size += f.size_bytes
    return round(rows * found.bytes / size) if size else None


def _read_cost(places: Sequence[Place]) -> tuple[float, float]:
    """(seconds a row, its relative standard error), without the first place, where connections are made and code is loaded."""
    warm = [p for p in places[1:] if p.rows] or [p for p in places if p.rows]
    if not warm:
        return 0.0, 0.0
    per_row = sum(p.read_s for p in warm) / sum(p.rows for p in warm)
    rates = [p.read_s / p.rows for p in warm]
    spread = pstdev(rates) / fmean(rates) / len(rates) ** 0.5 if len(rates) > 1 and fmean(rates) > 0 else 0.3
    return per_row, spread
