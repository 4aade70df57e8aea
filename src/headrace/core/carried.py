"""Columns that come out of a plan as they were in its input. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Carried:
    """names: of the output's columns, in order. sources: output column -> the input column that it is, row for row; of those a
    block may lack any. Columns that are not there are made on the way.
    """

    names: tuple[str, ...]
    sources: Mapping[str, str]
