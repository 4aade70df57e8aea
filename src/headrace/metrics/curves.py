"""Counts of scores by label, for the areas under curves: whole numbers, so that states merge exactly in any order.

Scores are doubles, kept as int64 *keys* in their order. A *run* is a sorted set of bins: a key in each, whether it holds others
too, and how many negatives and positives it holds. At level 0 a bin is one score. When there are more of them than `limit`,
scores become *places* in whole numbers (`_places`), and each level above 1 takes one more bit from these. The level is the
least at which the bins fit. Level, bins, what they count and whether they are mixed are functions of the set of scores alone;
only which key stands for a mixed bin is not, and nothing depends on it.

A curve's state is {"level", "size", "held", "runs"}: the first `size` bins are merged; later runs, with `held` bins, wait until
it is worth merging them. Adding a batch is thus sorting it, whatever the state holds; a few rows (those of one of many groups)
are not even sorted before.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.core.errors import DataError
from headrace.metrics.packing import pack, unpack

Curve = dict[str, Any]

_HELD_BINS = 1 << 16
_HELD_RUNS = 128
_FEW_ROWS = 256  # as many are written as they came in a third of the time
_LOWEST = np.int64(np.iinfo(np.int64).min)
# A weight is a whole multiple of this, so that sums are exact.
WEIGHT_BITS = 30
LEAST_WEIGHT = 2.0**-10  # that those of a batch may have on average
_MOST = 1 << 62


@dataclass(frozen=True, slots=True)
class Run:
    """keys: (bins,) int64, ascending, one of each bin. mixed: (bins,) bool, whether a bin holds other scores, too.
    negative, positive: (bins,) int64 counts, or weights in units of 2**-WEIGHT_BITS.
    """

    keys: np.ndarray
    mixed: np.ndarray
    negative: np.ndarray
    positive: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


def zero() -> Curve:
    return {"level": 0, "size": 0, "held": 0, "runs": []}


def add(curve: Curve, scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None, limit: int | None) -> None:
    """Count a batch. scores: (rows,) finite. positive: (rows,) bool. limit: how many bins there may be; None for any number."""
    keys = _keys(scores)
    if weights is None and len(keys) <= _FEW_ROWS and not _is_full(curve, len(keys), 1):
        curve["runs"].append(_write_few(keys, positive))
        curve["held"] += len(keys)
        return
    runs: list[Run] = []
    for wanted in (False, True):
        chosen = positive == wanted
        found, counts = _counted(keys[chosen], None if weights is None else fixed(weights[chosen]))
        if len(found):
            zeros, alone = np.zeros(len(found), np.int64), np.zeros(len(found), bool)
            runs.append(Run(found, alone, zeros, counts) if wanted else Run(found, alone, counts, zeros))
    held = sum(map(len, runs))
    if _is_full(curve, held, len(runs)):
        _settle(curve, limit, runs)  # which spares writing and reading them
        return
    curve["runs"].extend(_write(run, deflate=False) for run in runs)
    curve["held"] += held


def merge(a: Curve, b: Curve, limit: int | None) -> None:
    """Add what `b` counted to `a`."""
    a["runs"].extend(b["runs"])
    a["held"] += b["size"] + b["held"]
    a["level"] = max(a["level"], b["level"])
    if _is_full(a):
        _settle(a, limit)


def load(curve: Curve, limit: int | None) -> Run:
    """All bins, merged."""
    return _merged(curve, limit)[0]


def _is_full(curve: Curve, bins: int = 0, runs: int = 0) -> bool:
    """Does as much wait as is merged, with so many more? Then a bin is merged a few times only, however many there are."""
    return curve["held"] + bins > max(_HELD_BINS, curve["size"]) or len(curve["runs"]) + runs > _HELD_RUNS


def _settle(curve: Curve, limit: int | None, more: Sequence[Run] = ()) -> None:
    run, level = _merged(curve, limit, more)
    curve.update(level=level, size=len(run), held=0, runs=[_write(run, deflate=True)])


def _merged(curve: Curve, limit: int | None, more: Sequence[Run] = ()) -> tuple[Run, int]:
    runs = [*(_read(written) for written in curve["runs"]), *more]
    if not runs:
        nothing = np.zeros(0, np.int64)
        return Run(nothing, nothing.astype(bool), nothing, nothing), 0
    parts = [np.concatenate([getattr(run, name) for run in runs]) for name in ("keys", "mixed", "negative", "positive")]
    order = np.argsort(parts[0], kind="stable")
    run = Run(*(part[order] for part in parts))
    if float(run.negative.sum(dtype=np.float64)) + float(run.positive.sum(dtype=np.float64)) > _MOST:
        raise DataError(
            "the weights of a curve add up to more than 2**32",
            hint="divide the weights by a constant: the result stays the same",
        )
    level = curve["level"]
    if level == 0:
        run = _binned(run, run.keys)
        if limit is None or len(run) <= limit:
            return run, 0
        level = 1
    assert limit is not None  # there are no levels without a limit
    places = _places(run.keys)
    apart = places[1:] ^ places[:-1]  # two neighbours share a bin once their highest different bit is gone
    while 1 + int(np.count_nonzero(apart >> (level - 1))) > limit:
        level += 1
    return _binned(run, places >> (level - 1)), level


def _binned(run: Run, bins: np.ndarray) -> Run:
    """bins: of each entry, ascending."""
    different = bins[1:] != bins[:-1]
    starts = np.flatnonzero(np.concatenate([[True], different]))
    if len(starts) == len(bins):
        return run
    first, last = run.keys[starts], run.keys[np.flatnonzero(np.concatenate([different, [True]]))]
    return Run(
        _between(first, last),
        np.logical_or.reduceat(run.mixed, starts) | (first != last),
        np.add.reduceat(run.negative, starts),
        np.add.reduceat(run.positive, starts),
    )


def _between(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """A key from first to last each, with as many zero bits at its end as there can be: states are shorter for it."""
    below = first ^ last
    for shift in (1, 2, 4, 8, 16, 32):
        below |= below >> shift
    # `below` has all bits from the highest different one down, which `last` has set and `first` has not.
    return np.where((first < 0) & (last >= 0), 0, last & ~(below >> 1))


# ---------------------------------------------------------------- scores as whole numbers


def _keys(scores: np.ndarray) -> np.ndarray:
    """int64 keys in the order of the scores, the same for equal scores and only for them.

    A double's bits, read as a whole number, are in the order of its absolute value. + 0.0: -0.0 and 0.0 are equal.
    """
    bits = (scores.astype(np.float64) + 0.0).view(np.int64)
    return np.where(bits < 0, _LOWEST - bits, bits)


def _scores(keys: np.ndarray) -> np.ndarray:
    """The other way round."""
    return np.where(keys < 0, _LOWEST - keys, keys).view(np.float64)


def _places(keys: np.ndarray) -> np.ndarray:
    """int64 places in the order of the keys, such that a fixed number of equal steps serves every usual distribution.

    The fourth root spreads scores near 0, and, mirrored, near 1, where classifiers crowd them: steps that tell
    apart 1e-6 from 2e-6 as well as 0.3 from 0.301. Square roots and differences are correctly rounded and so
    monotone. Two bits are dropped so that the mirror image is in range.
    """
    s = _scores(keys)
    upper = s > 0.5
    distance = np.where(upper, 1.0 - s, s)
    root = np.copysign(np.sqrt(np.sqrt(np.abs(distance))), distance)
    made = _keys(root) >> 2
    return np.where(upper, 2 * _MIDDLE - made, made)


_MIDDLE = _keys(np.sqrt(np.sqrt(np.array([0.5]))))[0] >> 2


def fixed(weights: np.ndarray) -> np.ndarray:
    """Weights in units of 2**-WEIGHT_BITS, int64; what they add up to is off by at most 2**-21 of it. Raises DataError for
    weights that this leaves no digits of, or no room for.
    """
    some = np.count_nonzero(weights)
    if some and (weights.sum() < LEAST_WEIGHT * some or weights.max() > 2.0**31):
        raise DataError(
            f"the weights of a curve go from {weights.min():.4g} to {weights.max():.4g}",
            hint="multiply them by a constant, so that they lie between 0.001 and 2**31: the result stays the same",
        )
    return np.rint(weights * (1 << WEIGHT_BITS)).astype(np.int64)


def _counted(keys: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys, ascending, and the number of each or its weight; without those that weigh nothing."""
    if weights is not None:
        keys, weights = keys[weights > 0], weights[weights > 0]
        order = np.argsort(keys)
        keys, weights = keys[order], weights[order]
    else:
        keys = np.sort(keys)
    if not len(keys):
        return keys, keys
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    if weights is not None:
        return keys[starts], np.add.reduceat(weights, starts)
    return keys[starts], np.diff(starts, append=len(keys))


# ---------------------------------------------------------------- runs as JSON


def _write(run: Run, *, deflate: bool) -> dict[str, Any]:
    keys = run.keys.view(np.uint64)  # differences wrap around, and back
    return {
        "bins": len(run),
        "start": int(run.keys[0]),
        "steps": pack(np.diff(keys), deflate=deflate),
        "mixed": pack(run.mixed.astype(np.int64), deflate=deflate),
        "negative": pack(run.negative, deflate=deflate),
        "positive": pack(run.positive, deflate=deflate),
    }


def _write_few(keys: np.ndarray, positive: np.ndarray) -> dict[str, Any]:
    """Rows as they are: an entry for each."""
    texts = (base64.b64encode(data.tobytes()).decode("ascii") for data in (keys.astype("<i8"), np.packbits(positive)))
    return {"bins": len(keys), **dict(zip(("keys", "right"), texts, strict=True))}


def _read(written: dict[str, Any]) -> Run:
    bins = written["bins"]
    if "keys" in written:
        few = np.frombuffer(base64.b64decode(written["keys"]), "<i8").astype(np.int64)
        right = np.unpackbits(np.frombuffer(base64.b64decode(written["right"]), np.uint8), count=bins).astype(np.int64)
        return Run(few, np.zeros(bins, bool), 1 - right, right)
    keys = np.empty(bins, np.uint64)
    keys[:1] = np.array([written["start"]], np.int64).view(np.uint64)
    keys[1:] = unpack(written["steps"], bins - 1)
    np.cumsum(keys, out=keys)
    return Run(
        keys.view(np.int64),
        unpack(written["mixed"], bins).astype(bool),
        unpack(written["negative"], bins).view(np.int64),
        unpack(written["positive"], bins).view(np.int64),
    )
