"""SplitTable: which splits of a run are settled, and what their records say, in next to no memory of its own.

What must not live here: where the bytes are kept, which is the `Spool`'s business. Invariants: what `add` was given comes back
equal, or an error is raised; one thread adds, and others may look meanwhile.

A record is packed and put into the spool. Where it begins is remembered for each split of a block, until all of the block's
splits are settled; then these numbers go into the spool, too. So memory is that of blocks that have gaps, 8 bytes a split, and
10 bytes a block. With a spool that is no file, add what the records take: some 50 bytes a split.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import compress, islice
from typing import Protocol, overload

from headrace.core.errors import InternalError
from headrace.core.receipts import FileKind, OutputFile

BLOCK_SPLITS = 4096  # whose places are 32 KB
_USUAL_BYTES = 256  # of a record: enough for one file or two
_TEMPLATES = 1 << 16  # kept at most: names that fit none are packed as they are

_KINDS: tuple[FileKind, ...] = ("output", "quarantine", "lineage")
_HEAD = struct.Struct("<II")  # bytes, CRC-32


class Spool(Protocol):
    """Bytes that are kept in the order in which they come. One thread appends, any may read."""

    def append(self, data: bytes) -> int:
        """Keep them; where they begin. Never fails for want of space: then they stay in memory."""
        ...

    def read(self, start: int, size: int) -> bytes:
        """So many that begin there; fewer at the end. Raises HeadraceError when they can't be read again."""
        ...


class MemorySpool:
    """A Spool for little."""

    def __init__(self) -> None:
        self._data = bytearray()

    def append(self, data: bytes) -> int:
        at = len(self._data)
        self._data += data
        return at

    def read(self, start: int, size: int) -> bytes:
        return bytes(self._data[start : start + size])


class SplitTable:
    """Settled splits, their files and what limits took of them.

    A name that holds the split's number is kept as a template that all splits share.
    """

    def __init__(self, spool: Spool | None = None) -> None:
        self._spool = MemorySpool() if spool is None else spool
        # Of each block: its splits' entries (0: not settled, else 1 + 2 * place + whether limits took something), or, once all
        # are settled, the place of these, plus one. 0: none is settled.
        self._blocks: list[array[int] | int] = []
        self._missing = array("H")  # of each block: splits that are not settled
        self._last: tuple[int, array[int]] | None = None  # the block that was fetched last, and its entries
        self._templates: list[str] = []
        self._ids: dict[str, int] = {}
        self._count = 0
        self._files = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, split: int) -> bool:
        number = split // BLOCK_SPLITS
        block = self._blocks[number] if number < len(self._blocks) else 0
        return block != 0 if isinstance(block, int) else block[split % BLOCK_SPLITS] != 0

    def add(self, split: int, files: Sequence[OutputFile], taken: Sequence[tuple[int, int]]) -> bool:
        """False, and nothing is changed, when the split is settled already."""
        if split in self:
            return False
        place = self._keep(self._packed(split, files, taken))
        number = split // BLOCK_SPLITS
        entries = self._entries(number)
        entries[split % BLOCK_SPLITS] = 1 + 2 * place + bool(taken)
        self._missing[number] -= 1
        if not self._missing[number]:
            self._blocks[number] = 1 + self._keep(entries.tobytes())
        self._count += 1
        self._files += len(files)
        return True

    def taken(self, split: int) -> tuple[tuple[int, int], ...]:
        entry = self._entry(split)
        return self._unpacked(split, entry)[1] if (entry - 1) % 2 else ()

    def files_of(self, split: int) -> tuple[OutputFile, ...]:
        return self._unpacked(split, self._entry(split))[0]

    @property
    def files(self) -> Files:
        """In split order."""
        return Files(self)

    def count_files(self) -> int:
        return self._files

    def splits(self) -> Iterator[int]:
        for number, block in enumerate(self._blocks):
            first = number * BLOCK_SPLITS
            if isinstance(block, int):
                yield from range(first, first + BLOCK_SPLITS if block else first)
            else:
                yield from compress(range(first, first + BLOCK_SPLITS), block)

    # ---------------------------------------------------------------- places

    def _entries(self, number: int) -> array[int]:
        """Those of a block with gaps."""
        more = number + 1 - len(self._blocks)
        if more > 0:
            self._missing.extend([BLOCK_SPLITS] * more)
            self._blocks.extend([0] * more)
        block = self._blocks[number]
        if isinstance(block, int):
            self._blocks[number] = block = array("Q", bytes(8 * BLOCK_SPLITS))
        return block

    def _entry(self, split: int) -> int:
        """Raises KeyError for a split that is not settled."""
        if split not in self:
            raise KeyError(split)
        number, i = divmod(split, BLOCK_SPLITS)
        block = self._blocks[number]
        if not isinstance(block, int):
            return block[i]
        last = self._last
        if last is None or last[0] != number:
            self._last = last = (number, array("Q", self._fetch(block - 1, _HEAD.size + 8 * BLOCK_SPLITS)))
        return last[1][i]

    def _keep(self, body: bytes) -> int:
        return self._spool.append(_HEAD.pack(len(body), zlib.crc32(body)) + body)

    def _fetch(self, place: int, usual: int) -> bytes:
        found = self._spool.read(place, usual)
        if len(found) >= _HEAD.size:
            size, check = _HEAD.unpack_from(found)
            body = found[_HEAD.size : _HEAD.size + size]
            if len(body) < size:
                body = self._spool.read(place + _HEAD.size, size)
            if len(body) == size and zlib.crc32(body) == check:
                return body
        raise InternalError(
            "what was settled does not come back from the temporary file as it was put there",
            hint="the run log holds it all: the same call goes on with what is settled; look at the disk's health",
        )

    # ---------------------------------------------------------------- records

    def _packed(self, split: int, files: Sequence[OutputFile], taken: Sequence[tuple[int, int]]) -> bytes:
        out = bytearray()
        _pack(out, len(taken))
        for op, rows in taken:
            _pack(out, op)
            _pack(out, rows)
        _pack(out, len(files))
        for f in files:
            self._pack_name(out, split, f.name)
            self._pack_name(out, split, f.staged)
            _pack(out, f.rows)
            _pack(out, f.bytes)
            _pack(out, _KINDS.index(f.kind) * 2 + bool(f.digest))
            out += bytes.fromhex(f.digest)
        return bytes(out)

    def _pack_name(self, out: bytearray, split: int, name: str) -> None:
        head, number, tail = name.rpartition(f"{split:06d}")
        if number:
            template = f"{head}\0{tail}"
            known = self._ids.get(template)
            if known is None and len(self._templates) < _TEMPLATES:
                known = self._ids[template] = len(self._templates)
                self._templates.append(template)
            if known is not None:
                _pack(out, known + 1)
                return
        raw = name.encode("utf-8", "surrogatepass")
        _pack(out, 0)
        _pack(out, len(raw))
        out += raw

    def _unpacked(self, split: int, entry: int) -> tuple[tuple[OutputFile, ...], tuple[tuple[int, int], ...]]:
        data = self._fetch((entry - 1) // 2, _USUAL_BYTES)
        at = 0

        def number() -> int:
            nonlocal at
            n = shift = 0
            while True:
                byte = data[at]
                at += 1
                n |= (byte & 127) << shift
                if byte < 128:
                    return n
                shift += 7

        def text() -> str:
            nonlocal at
            template = number()
            if template:
                return self._templates[template - 1].replace("\0", f"{split:06d}")
            length = number()
            at += length
            return data[at - length : at].decode("utf-8", "surrogatepass")

        taken = tuple((number(), number()) for _ in range(number()))
        files: list[OutputFile] = []
        for _ in range(number()):
            name, staged, rows, size, kind = text(), text(), number(), number(), number()
            digest = ""
            if kind & 1:
                digest = data[at : at + 32].hex()
                at += 32
            files.append(OutputFile(name, rows, size, digest, staged, _KINDS[kind >> 1]))
        return tuple(files), taken


def _pack(out: bytearray, n: int) -> None:
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)


class Files(Sequence[OutputFile]):
    """The files of a table, in split order, made as they are asked for. Iterate: an index is a walk."""

    def __init__(self, table: SplitTable) -> None:
        self._table = table

    def __iter__(self) -> Iterator[OutputFile]:
        for split in self._table.splits():
            yield from self._table.files_of(split)

    def __len__(self) -> int:
        return self._table.count_files()

    @overload
    def __getitem__(self, index: int) -> OutputFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[OutputFile]: ...
    def __getitem__(self, index: int | slice) -> OutputFile | list[OutputFile]:
        if isinstance(index, slice):
            return list(self)[index]
        at = index + len(self) if index < 0 else index
        for file in islice(self, at, None) if at >= 0 else ():
            return file
        raise IndexError(index)
