"""What the scheduler knows of a stage from its answers so far. Numbers only: the decisions are in `policy`."""

from __future__ import annotations

from headrace.core.refs import BlockRef


class Measure:
    """Moving averages of a stage.

    make_s, take_s: seconds per block made and taken. step_s: seconds per step. made_bytes: bytes made per step.
    made_rows: rows per block made (0.0: not measured). unfinished: share of steps after which the cursor went on.
    """

    __slots__ = ("made_bytes", "made_rows", "make_s", "step_s", "take_s", "unfinished")

    def __init__(self, block_bytes: int) -> None:
        self.make_s = 0.0
        self.take_s = 0.0
        self.step_s = 0.0
        self.made_bytes = float(block_bytes)
        self.made_rows = 0.0
        self.unfinished = 1.0

    def update(self, wall_s: float, taken: int, outputs: tuple[BlockRef, ...], finished: bool) -> None:
        """Take in one step's answer."""
        self.step_s = _blend(self.step_s, wall_s)
        self.unfinished += 0.3 * ((not finished) - self.unfinished)
        if taken:
            self.take_s = _blend(self.take_s, wall_s / taken)
        if outputs:
            made = len(outputs)
            size = rows = 0
            for block in outputs:
                rows += block.rows
                for part in block.parts:
                    size += part.bytes
            self.make_s = _blend(self.make_s, wall_s / made)
            self.made_bytes = _blend(self.made_bytes, float(size))
            self.made_rows = _blend(self.made_rows, rows / made)


def _blend(old: float, new: float) -> float:
    return new if old == 0.0 else old * 0.7 + new * 0.3
