"""Splits: the unit of planning, retry, order and commit.

A split is fixed from input metadata, and the division that its run began with, never from the number of workers or a rank, so
that a run's sessions have the same splits on any machine.
"""

from __future__ import annotations

import hashlib

from msgspec import Struct


class Fragment(Struct, frozen=True):
    """A range of one input object.

    uri: what names the object to a person (a path, or s3://bucket/key).
    size_bytes: of the whole object.
    version: etag, or "size-mtime_ns" on a file system; changes when the object does.
    start, stop: the range, in the source's own unit (row groups for Parquet, bytes for line formats, rows for
        in-memory data). stop == -1 means to the end.
    by_rows: the range is one of rows, though the source's own unit is a larger one.
    rows: number of rows when the metadata tells, else None.
    name: the object's path relative to the dataset's root, with forward slashes; names `per_input` outputs.
    """

    uri: str
    size_bytes: int
    version: str
    start: int = 0
    stop: int = -1
    rows: int | None = None
    name: str = ""
    by_rows: bool = False


class Division(Struct, frozen=True):
    """What splits are to hold at most, where the sizes that a source has by itself would be too much work.

    split_bytes: as stored. by_rows: also where it is a part of what the format divides an object into.
    """

    split_bytes: int
    by_rows: bool = False


class Split(Struct, frozen=True):
    """An ordered group of fragments that is read, retried and committed as one.

    index: position in input order; names the output file. bytes: estimated bytes to read (stored size).
    """

    index: int
    fragments: tuple[Fragment, ...]
    bytes: int
    rows: int | None = None

    @property
    def id(self) -> str:
        """A digest of what the split reads: same content, same id, on every machine."""
        digest = hashlib.blake2b(digest_size=12)
        for f in self.fragments:
            unit = "\0rows" if f.by_rows else ""
            digest.update(f"{f.uri}\0{f.version}\0{f.start}\0{f.stop}{unit}\n".encode())
        return digest.hexdigest()

    @property
    def label(self) -> str:
        """How messages name this split."""
        first = self.fragments[0].uri if self.fragments else "(empty)"
        more = f" and {len(self.fragments) - 1} more" if len(self.fragments) > 1 else ""
        return f"split {self.index} ({first}{more})"
