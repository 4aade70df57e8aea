"""Which route a split takes. Fused is cheapest; spread lets several workers share one split."""

from __future__ import annotations

MANY_SPLITS = 8192  # a listing that has found so many and goes on has many more: with more workers nobody waits for those


def prefer_fused(
    *, split_bytes: int, left_bytes: int, left_splits: int, listing_done: bool, workers: int, listed: int = 0
) -> bool:
    """Fused while the splits still to open keep all the others busy until this one ends; spread for the tail.

    left_bytes, left_splits: known splits after this one. listed: all that were ever. Output does not depend on the answer.
    """
    if workers <= 1:
        return True
    if not listing_done and (left_splits >= workers or listed >= MANY_SPLITS):
        return True
    return left_splits >= workers and left_bytes >= workers * split_bytes
