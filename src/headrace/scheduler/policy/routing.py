"""Which route a split takes. Fused is cheapest; spread lets several workers share one split."""

from __future__ import annotations


def prefer_fused(*, split_bytes: int, left_bytes: int, left_splits: int, listing_done: bool, workers: int) -> bool:
    """Fused while the splits still to open keep all the others busy until this one ends; spread for the tail.

    left_bytes, left_splits: known splits after this one. Output does not depend on the answer.
    """
    if workers <= 1:
        return True
    if not listing_done and left_splits >= workers:
        return True
    return left_splits >= workers and left_bytes >= workers * split_bytes
