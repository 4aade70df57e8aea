"""Floats as text, for the formats that are text."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from headrace.core.tensors import text_scalar


def has_whole(column: pa.Array) -> bool:
    """Is it a column of floats, and one of them finite and without a fraction?"""
    return pa.types.is_floating(column.type) and bool(_compute().any(_whole(column)).as_py())


def decimals(column: pa.Array) -> pa.Array:
    """Floats as text (large_string) that reads back as floats: Arrow writes 1.0 as "1". Null stays null."""
    pc = _compute()

    text = column.cast(pa.large_string())
    whole = _whole(column)
    if not pc.any(whole).as_py():
        return text
    bare = pc.and_(whole, pc.invert(pc.match_substring(text, "e")))
    point = pc.if_else(bare, text_scalar(".0"), text_scalar(""))
    return pc.binary_join_element_wise(text, point, text_scalar(""))


def _whole(column: pa.Array) -> Any:
    pc = _compute()

    column = column.cast(pa.float32()) if pa.types.is_float16(column.type) else column
    return pc.and_(pc.equal(pc.trunc(column), column), pc.is_finite(column))


def _compute() -> Any:
    import pyarrow.compute

    return pyarrow.compute  # Any: its functions are made at import, type checkers don't see them
