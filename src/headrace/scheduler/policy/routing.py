"""Which route a split takes. Fused is cheapest; spread lets several workers share one split."""

from __future__ import annotations

from collections.abc import Sequence

MANY_SPLITS = 8192  # a listing that has found so many and goes on has many more: with more workers nobody waits for those


def prefer_fused(
    *,
    split_bytes: int,
    left_bytes: int,
    left_splits: int,
    listing_done: bool,
    workers: int,
    listed: int = 0,
    reading: Sequence[float] = (),
) -> bool:
    """Fused while what is still to read keeps all the others busy until this split ends; spread for the tail.

    left_bytes, left_splits: known splits after this one. listed: all that were ever. reading: bytes that each fused split that
    is being read has left. Output does not depend on the answer.
    """
    if workers <= 1:
        return True
    if not listing_done and (left_splits >= workers or listed >= MANY_SPLITS):
        return True
    others = workers - 1
    busy_bytes = left_bytes + sum(min(left, split_bytes) for left in reading)
    return left_splits + len(reading) >= others and busy_bytes >= others * split_bytes
