"""Columns that come out of a plan as they were in its input. Pure data."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct


class Carried(Struct, frozen=True):
    """names: of the output's columns, in order. sources: output column -> the input column that it is, row for row; of those a
    block may lack any. Columns that are not there are made on the way.

    names: None where a function decides. A block lacks none then, and its origin tells which of the sources it has (`kept`).
    """

    names: tuple[str, ...] | None
    sources: Mapping[str, str]
