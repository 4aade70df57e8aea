"""Exact sums: floats added as whole numbers, so that addition is associative and the mean is correctly rounded.

Every finite double is a whole multiple of 2**-1074. A sum is kept as that multiple (times 2**52, which spares a case
distinction for subnormals), an unbounded Python int, written as hexadecimal text: 0.6 kB at most. After the idea of
the superaccumulator (Kulisch, "Computer Arithmetic and Validity", 2008).

A total in a state is a plain int where rows are counted, and such a text where weights or numbers are added.
"""

from __future__ import annotations

import numpy as np

Total = int | str

SCALE_BITS = 1074 + 52
_CHUNK = 1 << 24  # so that sums of 27-bit parts stay below 2**53, where doubles are still exact
_FRACTION = (1 << 52) - 1
_SPLITTER = float((1 << 27) + 1)  # Veltkamp's, for 53 bits
# Squares of numbers between these are sums of two doubles without over- or underflow of the smaller one.
_SMALL, _LARGE, _FAR_BITS = 2.0**-400, 2.0**500, 600


def scaled_sum(array: np.ndarray) -> int:
    """The exact sum of int64, uint64 or finite float values, times 2**SCALE_BITS."""
    if array.dtype.kind in "iu":
        low = int((array & 0xFFFFFFFF).sum(dtype=np.uint64 if array.dtype.kind == "u" else np.int64))
        return (low + (int((array >> 32).sum()) << 32)) << SCALE_BITS
    total = 0
    for start in range(0, len(array), _CHUNK):
        total += _float_sum(np.ascontiguousarray(array[start : start + _CHUNK], dtype=np.float64))
    return total


def _float_sum(array: np.ndarray) -> int:
    bits = array.view(np.int64)
    exponent = (bits >> 52) & 0x7FF
    whole = bits & _FRACTION
    whole |= (exponent > 0).astype(np.int64) << 52  # the leading one, which subnormals lack
    np.maximum(exponent, 1, out=exponent)
    np.negative(whole, out=whole, where=bits < 0)  # array == whole * 2**(exponent - 1075)
    base = int(exponent.min()) if len(exponent) else 1
    place = exponent - base
    high = np.bincount(place, weights=whole >> 27)
    low = np.bincount(place, weights=whole & ((1 << 27) - 1))
    total = 0
    for i in np.flatnonzero((high != 0) | (low != 0)).tolist():
        total += ((int(high[i]) << 27) + int(low[i])) << i
    return total << (base - 1075 + SCALE_BITS)


def two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(p, e): p the rounded product and p + e the exact one, where nothing over- or underflows (Dekker, 1971)."""
    product = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    c = _SPLITTER * a
    high = c - (c - a)
    return high, a - high


def scaled_squares(array: np.ndarray) -> int:
    """The exact sum of squares of int64, uint64 or finite float values, times 4**SCALE_BITS."""
    if array.dtype.kind in "iu" and len(array) and (int(array.max()) > 1 << 53 or int(array.min()) < -(1 << 53)):
        return sum(x * x for x in array.tolist()) << (2 * SCALE_BITS)
    x = np.ascontiguousarray(array, dtype=np.float64)
    size = np.abs(x)
    small, large = size < _SMALL, size > _LARGE
    if not (small.any() or large.any()):
        return _squares(x) << SCALE_BITS
    total = _squares(x[~(small | large)]) << SCALE_BITS
    total += _squares(np.ldexp(x[large], -_FAR_BITS)) << (SCALE_BITS + 2 * _FAR_BITS)
    return total + ((_squares(np.ldexp(x[small], _FAR_BITS)) << SCALE_BITS) >> (2 * _FAR_BITS))


def _squares(x: np.ndarray) -> int:
    square, error = two_product(x, x)
    return scaled_sum(square) + scaled_sum(error)


def by_cell(cells: np.ndarray, size: int, weights: np.ndarray | None = None) -> list[tuple[int, Total]]:
    """(cell, total) for each cell that has rows: how many (weights None), or the exact sum of their weights.

    cells: (rows,) int64 in [0, size).
    """
    if weights is None:
        counts = np.bincount(cells, minlength=size)
        at = np.flatnonzero(counts)
        return list(zip(at.tolist(), counts[at].tolist(), strict=True))
    order = np.argsort(cells, kind="stable")
    found, starts = np.unique(cells[order], return_index=True)
    parts = np.split(weights[order], starts[1:]) if len(found) else []
    return [(cell, encode(scaled_sum(part))) for cell, part in zip(found.tolist(), parts, strict=True)]


def plus(a: Total, b: Total) -> Total:
    """Both totals together. 0 goes with either kind."""
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return encode(_whole(a) + _whole(b))


def number(total: Total) -> float:
    """A total as the nearest float; inf when it is beyond them."""
    try:
        return float(total) if isinstance(total, int) else _whole(total) / (1 << SCALE_BITS)
    except OverflowError:
        return float("-inf" if _whole(total) < 0 else "inf")


def ratio(a: Total, b: Total) -> float:
    """a / b, correctly rounded; NaN when b is zero."""
    below = _whole(b)
    return _whole(a) / below if below else float("nan")


def _whole(total: Total) -> int:
    return total << SCALE_BITS if isinstance(total, int) else decode(total)


def encode(total: int) -> str:
    return format(total, "x")


def decode(text: str) -> int:
    return int(text, 16)
