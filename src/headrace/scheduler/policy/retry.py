"""What becomes of a split whose worker died on it: tried again, with what is known of the rows that kill, or given up.

A poison row is found in three deaths at most. The first breadcrumb names a batch: its rows are then run one at a time. The next
death names one row: it is accused. A row that is alone at work at two deaths is condemned, since a worker may also be killed by
chance, and no innocent row shall be set aside for it.
"""

from __future__ import annotations

from msgspec import Struct, field

from headrace.core.errors import BlockLost, HeadraceError
from headrace.core.refs import Origin, Segment
from headrace.core.steps import Doing, Suspect

MOST_BLIND = 3  # attempts that ended without a word of what killed the worker
MOST_TRANSIENT = 3  # attempts that storage trouble ended, beyond what the storage's own retries cure
MOST_LOST = 20  # attempts that lost blocks of theirs with a node, or maybe died with it: no fault of the split's
MOST_ATTEMPTS = 100  # in all: each brings something new, and yet there must be an end
CONFIRMATIONS = 2  # deaths on the very same row


class History(Struct):
    """What the attempts at one split have met. segments: by operator; none of them: any of its rows may be the one."""

    blind: int = 0
    transient: int = 0
    lost: int = 0
    segments: dict[int, tuple[Segment, ...]] = field(default_factory=dict[int, tuple[Segment, ...]])
    accused: dict[tuple[int, str], int] = field(default_factory=dict[tuple[int, str], int])
    condemned: dict[int, tuple[tuple[str, str], ...]] = field(default_factory=dict[int, tuple[tuple[str, str], ...]])
    suspects: tuple[Suspect, ...] = ()

    def note(self, doing: Doing | None, reason: str) -> bool:
        """Take in a death. True: it is certain now which row kills, and that row is condemned."""
        if doing is None:
            self.blind += 1
            return False
        known = self.segments.get(doing.op, ())
        new = tuple(s for s in doing.segments if s not in known)
        tells_something = bool(new) or doing.op not in self.segments
        certain = False
        self.segments[doing.op] = known + new
        if doing.digest:
            row = (doing.op, doing.digest)
            self.accused[row] = self.accused.get(row, 0) + 1
            certain = self.accused[row] == CONFIRMATIONS
            if certain:
                self.condemned[doing.op] = (*self.condemned.get(doing.op, ()), (doing.digest, reason))
            elif self.accused[row] > CONFIRMATIONS:
                self.blind = MOST_BLIND  # it was run although it is condemned: no attempt will fare better
        elif not tells_something:
            self.blind += 1
        self.suspects = tuple(
            Suspect(op, segments, self.condemned.get(op, ())) for op, segments in sorted(self.segments.items())
        )
        return certain

    def goes_on_after(self, error: HeadraceError) -> bool:
        """Take in that an attempt ended with storage trouble or lost blocks. True: another one is worth it."""
        if isinstance(error, BlockLost):
            self.lost += 1
            return self.lost < MOST_LOST
        self.transient += 1
        return self.transient < MOST_TRANSIENT

    def goes_on_untold(self) -> bool:
        """Take in a death of which nothing could be found out. True: another attempt is worth it."""
        self.lost += 1
        return self.lost < MOST_LOST

    def exhausted(self, attempt: int) -> bool:
        """There is no sense in another attempt after this one."""
        return self.blind >= MOST_BLIND or attempt >= MOST_ATTEMPTS


def may_hold(origin: Origin, segments: tuple[Segment, ...]) -> bool:
    """May a block of this origin hold rows of these segments? Rows of unknown origin may be any."""
    if not origin.segments or not segments:
        return True
    return any(s.uri == t.uri and s.row < t.row + t.rows and t.row < s.row + s.rows for s in origin.segments for t in segments)


def place_of(doing: Doing) -> tuple[str, str]:
    """(label, value): the rows at work, for an error."""
    segments = doing.segments
    if not segments:
        return "rows", "not known"
    first, last = segments[0], segments[-1]
    if len(segments) == 1 and first.rows == 1:
        return "row", f"{first.row} of {first.uri}"
    if len(segments) == 1:
        return "rows", f"among {first.row}-{first.row + first.rows - 1} of {first.uri}"
    return "rows", f"among row {first.row} of {first.uri} to row {last.row + last.rows - 1} of {last.uri}"
