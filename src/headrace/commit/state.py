"""LogState: what a run log amounts to, segment by segment.

Invariants: segments apply in order, each under the claim before it; a lower epoch after a higher one can't be (an append there
would have conflicted), so that it means a damaged log. The first record of a split wins. Memory is about 50 bytes a split: ten
million splits are half a gigabyte.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, overload

from headrace.commit.records import Claim, Finished, Listed, Released, Replaced, Segment, Settled, corrupt
from headrace.core.receipts import FileKind, OutputFile, Tally

_KINDS: tuple[FileKind, ...] = ("output", "quarantine", "lineage")


class LogState:
    """next: index of the segment that comes next. owner: who claimed last; released: and left. deltas: metrics of segments,
    for whoever knows how to merge them; taken from here. listing: in order; listed: splits in it.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.next = 0
        self.epoch = 0
        self.owner: Claim | None = None
        self.released = False
        self.replaced = ""
        self.finished: Mapping[str, Any] | None = None
        self.tally = Tally()
        self.rows = 0
        self.settled = SplitTable()
        self.listing: list[Listed] = []
        self.listed = 0
        self.listing_done = False
        self.deltas: list[Mapping[str, Any]] = []

    def apply(self, segment: Segment) -> None:
        """Raises DestinationError for a segment that can't follow."""
        if segment.index != self.next:
            raise corrupt(self.run, segment.index, f"segment {self.next} is missing")
        self._check_owner(segment)
        repeated = False
        for record in segment.records:
            match record:
                case Settled():
                    if record.split >= self.listed:
                        raise corrupt(self.run, segment.index, f"it settles split {record.split}, which was never listed")
                    repeated |= not self._settle(record)
                case Listed():
                    self._list(segment, record)
                case Claim():
                    self.epoch, self.owner, self.released = record.epoch, record, False
                case Released():
                    self.released = True
                case Replaced(by):
                    self.replaced = by
                case Finished(summary):
                    self.finished = summary
        if segment.metrics:
            if repeated:
                raise corrupt(self.run, segment.index, "its metrics count a split that was settled before")
            self.deltas.append(segment.metrics)
        self.next += 1

    def _check_owner(self, segment: Segment) -> None:
        claims = [r for r in segment.records if isinstance(r, Claim)]
        if claims:
            claim = claims[0]
            good = len(claims) == 1 and segment.records[0] is claim and claim.epoch == self.epoch + 1
            good = good and (claim.epoch, claim.nonce) == (segment.epoch, segment.nonce)
            good = good and self.finished is None and not self.replaced
        else:
            good = self.owner is not None and (segment.epoch, segment.nonce) == (self.epoch, self.owner.nonce)
            good = good and not self.replaced
        if not good:
            why = f"epoch {segment.epoch} ({segment.nonce}) has no right to write after epoch {self.epoch}"
            raise corrupt(self.run, segment.index, why)

    def _settle(self, record: Settled) -> bool:
        if not self.settled.add(record.split, record.files, record.taken):
            return False
        self.tally += record.tally
        self.rows += record.rows
        return True

    def _list(self, segment: Segment, record: Listed) -> None:
        if record.first != self.listed or self.listing_done:
            raise corrupt(self.run, segment.index, f"its listing begins at split {record.first}, not at {self.listed}")
        self.listed += record.count
        self.listing_done = record.done
        if record.count:
            self.listing.append(record)


class SplitTable:
    """Settled splits, their files and what limits took of them, packed.

    Invariant: what `add` was given comes back equal. A name that holds the split's number is kept as a template
    that all splits share.
    """

    def __init__(self) -> None:
        self._places = array("Q")  # split -> place in _data, plus one; 0: not settled
        self._data = bytearray()
        self._templates: list[str] = []
        self._ids: dict[str, int] = {}
        self._count = 0
        self._files = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, split: int) -> bool:
        return split < len(self._places) and self._places[split] != 0

    def add(self, split: int, files: Sequence[OutputFile], taken: Sequence[tuple[int, int]]) -> bool:
        """False, and nothing is changed, when the split is settled already."""
        if split in self:
            return False
        place = len(self._data) + 1
        self._pack(split, files, taken)
        if split >= len(self._places):
            self._places.frombytes(bytes(8 * (split + 1 - len(self._places))))
        self._places[split] = place
        self._count += 1
        self._files += len(files)
        return True

    def taken(self, split: int) -> tuple[tuple[int, int], ...]:
        return self._unpack(split)[1]

    def files_of(self, split: int) -> tuple[OutputFile, ...]:
        return self._unpack(split)[0]

    @property
    def files(self) -> Files:
        """In split order."""
        return Files(self)

    def count_files(self) -> int:
        return self._files

    def splits(self) -> Iterator[int]:
        return (split for split, place in enumerate(self._places) if place)

    # -- packing

    def _pack(self, split: int, files: Sequence[OutputFile], taken: Sequence[tuple[int, int]]) -> None:
        self._number(len(taken))
        for op, rows in taken:
            self._number(op)
            self._number(rows)
        self._number(len(files))
        for f in files:
            self._name(split, f.name)
            self._name(split, f.staged)
            self._number(f.rows)
            self._number(f.bytes)
            self._number(_KINDS.index(f.kind) * 2 + bool(f.digest))
            self._data += bytes.fromhex(f.digest)

    def _number(self, n: int) -> None:
        while n > 127:
            self._data.append(n & 127 | 128)
            n >>= 7
        self._data.append(n)

    def _name(self, split: int, name: str) -> None:
        head, number, tail = name.rpartition(f"{split:06d}")
        if not number:
            raw = name.encode("utf-8", "surrogatepass")
            self._number(0)
            self._number(len(raw))
            self._data += raw
            return
        template = f"{head}\0{tail}"
        known = self._ids.get(template)
        if known is None:
            known = self._ids[template] = len(self._templates)
            self._templates.append(template)
        self._number(known + 1)

    def _unpack(self, split: int) -> tuple[tuple[OutputFile, ...], tuple[tuple[int, int], ...]]:
        data = self._data
        at = self._places[split] - 1

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
