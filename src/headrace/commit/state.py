"""LogState: what a run log amounts to, segment by segment.

Invariants: segments apply in order, each under the claim before it; a lower epoch after a higher one can't be (an append there
would have conflicted), so that it means a damaged log. The first record of a split wins. Memory is that of what is listed and
metrics; settled splits lie in the spool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.commit.records import Claim, Divided, Finished, Listed, Released, Replaced, Segment, Settled, corrupt
from headrace.commit.table import SplitTable, Spool
from headrace.core.receipts import Tally
from headrace.core.splits import Division


class LogState:
    """next: index of the segment that comes next. owner: who claimed last; released: and left. deserted: an owner before it may
    have died at work. deltas: metrics of segments, for whoever knows how to merge them; taken from here.
    division: of splits; None: the source's own. listing: in order; listed: splits in it. spool: where settled splits lie; None:
    in memory.
    """

    def __init__(self, run: str, spool: Spool | None = None) -> None:
        self.run = run
        self.next = 0
        self.epoch = 0
        self.owner: Claim | None = None
        self.released = False
        self.deserted = False
        self.replaced = ""
        self.finished: Mapping[str, Any] | None = None
        self.tally = Tally()
        self.rows = 0
        self.settled = SplitTable(spool)
        self.division: Division | None = None
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
                case Divided(division):
                    if self.listed or self.listing_done:
                        raise corrupt(self.run, segment.index, "it divides splits that are listed")
                    self.division = division
                case Listed():
                    self._list(segment, record)
                case Claim():
                    self.deserted |= record.died
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
