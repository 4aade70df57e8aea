"""What an origin says of columns that a function gave back is dropped wherever rows are cut, chosen or joined."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from headrace.core.origins import chosen, join_origins
from headrace.core.refs import Origin, Segment
from headrace.worker.batching import Piece
from headrace.worker.blocks import Packed, pack

KEPT = Origin((Segment("a", 10, 4),), exact=False, kept=("x",))
OTHER = Origin((Segment("a", 14, 2),), exact=False, kept=("x",))


def test_rows_that_are_not_all_there_keep_nothing() -> None:
    assert not KEPT.known
    assert KEPT.slice(1, 2).kept == ()
    assert KEPT.inexact().kept == ()
    assert chosen(KEPT, np.array([0, 1])).kept == ()
    assert join_origins([KEPT, OTHER]).kept == ()


def packed(*origins: Origin) -> Packed:
    return pack([Piece(pa.record_batch({"x": range(o.rows)}), o) for o in origins])


def test_pieces_that_travel_together_keep_what_all_of_them_do() -> None:
    assert packed(KEPT, OTHER).origin.kept == ("x",)
    assert packed(KEPT, Origin(OTHER.segments, exact=False)).origin.kept == ()
    assert packed(KEPT, Origin(OTHER.segments, exact=False, kept=("x", "y"))).origin.kept == ()
