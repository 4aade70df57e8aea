"""Records that say for themselves what they compare, or how they travel."""

from __future__ import annotations

import operator
import pickle

import numpy as np
import pytest

from headrace.core.receipts import Tally
from headrace.core.refs import Origin, Segment

PLACE = (Segment("a", 0, 3),)


def test_origins_are_compared_without_positions() -> None:
    one, same = Origin(PLACE, exact=False, index=np.array([0, 2])), Origin(PLACE, exact=False, index=np.array([1]))
    assert one == same
    assert operator.ne(one, same) is False  # a struct has one of its own
    assert len({one, same}) == 1


@pytest.mark.parametrize(
    "other", [Origin((Segment("b", 0, 3),), exact=False), Origin(PLACE), Origin(PLACE, exact=False, kept=("x",))]
)
def test_other_origins_differ(other: Origin) -> None:
    one = Origin(PLACE, exact=False)
    assert one != other
    assert operator.eq(one, other) is False


def test_tallies_travel() -> None:
    tally = Tally(rows_in=3, written=2, quarantined=1)
    assert pickle.loads(pickle.dumps(tally)) == tally
