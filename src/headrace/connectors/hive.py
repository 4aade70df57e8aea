"""Columns that the names of folders tell (`year=2020/month=1/`), as Hive, Spark and DuckDB lay tables out. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"-?[0-9]{1,18}")


def told(name: str) -> dict[str, str | None]:
    """What the folders of an object's name say: column -> value. name: relative to what is read, "/" between folders."""
    if "=" not in name:
        return {}
    pairs = (folder.partition("=") for folder in name.split("/")[:-1])
    return {unquote(key): None if value == NULL else unquote(value) for key, equals, value in pairs if key and equals}


def fields(names: Iterable[str]) -> list[pa.Field]:
    """The columns that these objects' folders tell, in the order in which they first come: int64 where all values are whole
    numbers, else string. All may be null.
    """
    whole: dict[str, bool] = {}
    for name in names:
        for column, value in told(name).items():
            whole[column] = whole.get(column, True) and (value is None or _INTEGER.fullmatch(value) is not None)
    return [pa.field(column, pa.int64() if numbers else pa.string()) for column, numbers in whole.items()]


def equal_to(values: Mapping[str, pa.Scalar]) -> Any:
    """The expression that is true of all rows under such folders."""
    from headrace.core.arrow_dataset import ds

    said = ds.scalar(True)
    for name, value in values.items():
        said = said & (ds.field(name) == value if value.is_valid else ds.field(name).is_null())
    return said
