"""Committer: what is settled, counted once. Receipts and accumulator states come in per split, run totals go out.

Invariants: a split's states join the totals only when it settles; a cancelled split leaves nothing. The run log joins here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.contracts.accumulator import Accumulator
from headrace.core.receipts import OutputFile, Tally
from headrace.scheduler.messages import Settle


class Committer:
    """Memory: states of open splits, one total per metric, and the names of the output files for the manifest."""

    def __init__(self, accumulators: Mapping[str, Accumulator]) -> None:
        self._accumulators = dict(accumulators)
        self._open: dict[int, dict[str, Any]] = {}
        self._totals: dict[str, Any] = {}
        self.tally = Tally()
        self.splits = 0
        self.files: list[OutputFile] = []

    def add(self, split: int, states: Mapping[str, Any]) -> None:
        """Merge accumulator states that a step of this split answered."""
        if states:
            self._merge(self._open.setdefault(split, {}), states)

    def settle(self, done: Settle) -> None:
        states = self._open.pop(done.split.index, None)
        if done.cancelled:
            return
        self.splits += 1
        self.tally = self.tally + done.tally
        if states:
            self._merge(self._totals, states)
        if done.receipt is not None:
            self.files.extend(done.receipt.outputs)

    def _merge(self, into: dict[str, Any], states: Mapping[str, Any]) -> None:
        for name, state in states.items():
            into[name] = self._accumulators[name].merge(into[name], state) if name in into else state

    def results(self) -> dict[str, Any]:
        """Each accumulator's result; that of no rows when none came."""
        return {
            name: accumulator.result(self._totals.get(name, accumulator.zero()))
            for name, accumulator in self._accumulators.items()
        }
