"""Packing, where dividing an object takes a request."""

from __future__ import annotations

import threading

import pytest

from headrace.connectors import packing
from headrace.connectors.storage import Stored
from headrace.core.errors import DataError
from headrace.core.splits import Fragment

LARGE = packing.DIVIDE_OVER_BYTES + 1


def objects(*sizes: int) -> list[Stored]:
    return [Stored(f"s3://b/{i:03d}", size, f'"{i}"', str(i)) for i, size in enumerate(sizes)]


def halves(o: Stored) -> list[Fragment]:
    return [Fragment(o.uri, o.size, o.version, start, start + 1, 10, o.name) for start in (0, 1)]


@pytest.mark.parametrize("sizes", [(), (1,), (LARGE,), (1, LARGE, 1, 1, LARGE, LARGE), (*[LARGE] * 40, *[1] * 40)])
def test_the_same_splits_as_one_after_the_other(sizes: tuple[int, ...]) -> None:
    there = objects(*sizes)
    assert list(packing.pack_remote(there, halves)) == list(packing.pack(there, halves))


def test_large_objects_are_divided_side_by_side() -> None:
    together = threading.Barrier(packing.DIVIDED_AHEAD)

    def divide(o: Stored) -> list[Fragment]:
        together.wait(timeout=30)  # breaks unless all of them are here at once
        return halves(o)

    there = objects(*[LARGE] * packing.DIVIDED_AHEAD)
    assert len(list(packing.pack_remote(there, divide))) == 2 * len(there)


def test_an_object_that_can_not_be_divided_is_told_in_its_turn() -> None:
    def divide(o: Stored) -> list[Fragment]:
        if o.name == "1":
            raise DataError("broken")
        return halves(o)

    found = packing.pack_remote(objects(LARGE, LARGE, LARGE), divide)
    assert [next(found).index, next(found).index] == [0, 1]
    with pytest.raises(DataError, match="broken"):
        next(found)


def test_a_listing_given_up_leaves_no_thread() -> None:
    found = packing.pack_remote(objects(*[LARGE] * 30), halves)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("headrace-divide")]
