"""Origins of rows that are joined or chosen: arithmetic on `core.refs.Origin` that needs arrays.

Invariant: what is known of each row by itself stays known: only an origin that was vague before makes the result vague.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.core.refs import Origin, Segment


def join_origins(origins: Sequence[Origin]) -> Origin:
    """Where the rows of several batches, one after the other, came from. For origins of whole rows, not `listed` ones."""
    if len(origins) == 1:
        return origins[0]
    if not all(o.known for o in origins):
        return Origin(_covering(origins), exact=False)
    segments: list[Segment] = []
    for origin in origins:
        for segment in origin.segments:
            last = segments[-1] if segments else None
            if last is not None and last.uri == segment.uri and last.row + last.rows == segment.row:
                segments[-1] = Segment(last.uri, last.row, last.rows + segment.rows)
            else:
                segments.append(segment)
    if all(o.exact for o in origins):
        return Origin(tuple(segments))
    parts: list[np.ndarray] = []
    at = 0
    for origin in origins:
        rows = origin.rows
        parts.append(np.arange(at, at + rows) if origin.index is None else origin.index + at)
        at += rows
    return Origin(tuple(segments), exact=False, index=np.concatenate(parts))


def chosen(origin: Origin, rows: np.ndarray) -> Origin:
    """Where these of a batch's rows came from. rows: positions in the batch, ascending, maybe repeated, at least one."""
    if not origin.known:
        return origin.some()
    positions = rows if origin.index is None else origin.index[rows]
    whole = origin if origin.index is None else Origin(origin.segments)
    first, stop = int(positions[0]), int(positions[-1]) + 1
    part = whole.slice(first, stop - first)
    if stop - first == len(positions) and bool((np.diff(positions) == 1).all()):
        return part
    return Origin(part.segments, exact=False, index=positions - first)


def _covering(origins: Sequence[Origin]) -> tuple[Segment, ...]:
    """All segments, each row of the input once where they follow or overlap each other."""
    out: list[Segment] = []
    for origin in origins:
        for segment in origin.segments:
            last = out[-1] if out else None
            if last is None or last.uri != segment.uri or segment.row > last.row + last.rows or segment.row < last.row:
                out.append(segment)
            elif segment.row + segment.rows > last.row + last.rows:
                out[-1] = Segment(last.uri, last.row, segment.row + segment.rows - last.row)
    return tuple(out)
