"""Receipts and tallies: what is counted, per split and per run. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.core.wire import travels


@travels
@dataclass(frozen=True, slots=True)
class Tally:
    """Row counts. The law of conservation, per split and per run:

    rows_in + expanded == written + filtered + skipped + quarantined + cut

    read_bytes: stored bytes are not counted here; this is the Arrow size of blocks read.
    """

    rows_in: int = 0
    expanded: int = 0
    written: int = 0
    filtered: int = 0
    skipped: int = 0
    quarantined: int = 0
    cut: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.rows_in + other.rows_in,
            self.expanded + other.expanded,
            self.written + other.written,
            self.filtered + other.filtered,
            self.skipped + other.skipped,
            self.quarantined + other.quarantined,
            self.cut + other.cut,
        )

    @property
    def balanced(self) -> bool:
        gained = self.rows_in + self.expanded
        return gained == self.written + self.filtered + self.skipped + self.quarantined + self.cut


NO_ROWS = Tally()


@travels
@dataclass(frozen=True, slots=True)
class OutputFile:
    """A published file. name: relative to the destination. digest: blake2b-128 hex of its bytes ("" if unknown)."""

    name: str
    rows: int
    bytes: int
    digest: str = ""


@travels
@dataclass(frozen=True, slots=True)
class Receipt:
    """What closing a split's output returns, and what a run log will record."""

    split: int
    split_id: str
    attempt: int
    outputs: tuple[OutputFile, ...] = ()
    rows: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "split_id": self.split_id,
            "attempt": self.attempt,
            "rows": self.rows,
            "outputs": [{"name": o.name, "rows": o.rows, "bytes": o.bytes, "digest": o.digest} for o in self.outputs],
        }
