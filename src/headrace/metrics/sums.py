"""Exact sums: floats added as whole numbers, so that addition is associative and the mean is correctly rounded.

Every finite double is a whole multiple of 2**-1074. A sum is kept as that multiple (times 2**52, which spares a case
distinction for subnormals), an unbounded Python int, written as hexadecimal text: 0.6 kB at most. After the idea of
the superaccumulator (Kulisch, "Computer Arithmetic and Validity", 2008).
"""

from __future__ import annotations

from typing import Any

import numpy as np

_SCALE_BITS = 1074 + 52
_CHUNK = 1 << 24  # so that sums of 27-bit parts stay below 2**53, where doubles are still exact


def scaled_sum(array: np.ndarray) -> int:
    """The exact sum of int64, uint64 or finite float values, times 2**_SCALE_BITS."""
    if array.dtype.kind in "iu":
        low = int((array & 0xFFFFFFFF).sum(dtype=np.uint64 if array.dtype.kind == "u" else np.int64))
        return (low + (int((array >> 32).sum()) << 32)) << _SCALE_BITS
    total = 0
    for start in range(0, len(array), _CHUNK):
        total += _float_sum(array[start : start + _CHUNK].astype(np.float64))
    return total


def _float_sum(array: np.ndarray) -> int:
    fraction, exponent = np.frexp(array)
    whole = np.ldexp(fraction, 53).astype(np.int64)  # array == whole * 2**(exponent - 53)
    base = int(exponent.min()) if len(array) else 0
    place = exponent - base
    high = np.bincount(place, weights=(whole >> 27).astype(np.float64))
    low = np.bincount(place, weights=(whole & ((1 << 27) - 1)).astype(np.float64))
    total = 0
    for i in np.flatnonzero((high != 0) | (low != 0)).tolist():
        total += ((int(high[i]) << 27) + int(low[i])) << i
    shift = base - 53 + _SCALE_BITS  # never negative: the smallest subnormal has exponent -1073
    return total << shift


def encode(total: int) -> str:
    return format(total, "x")


def decode(text: str) -> int:
    return int(text, 16)


def mean(total: int, count: int) -> float:
    """total / count, correctly rounded; NaN of nothing."""
    return total / (count << _SCALE_BITS) if count else float("nan")


class MeanState:
    """The part of an accumulator whose result is the exact mean of one number a row. It holds nothing of its own."""

    __slots__ = ()

    def zero(self) -> dict[str, Any]:
        return {"rows": 0, "sum": "0"}

    @staticmethod
    def add(state: dict[str, Any], total: int, rows: int) -> dict[str, Any]:
        """The state with `rows` more numbers; total: their scaled sum."""
        state["sum"] = encode(decode(state["sum"]) + total)
        state["rows"] += rows
        return state

    def merge(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        return self.add(a, decode(b["sum"]), b["rows"])

    def result(self, state: dict[str, Any]) -> float:
        return mean(decode(state["sum"]), state["rows"])
