"""Refused: what user code returned can't be used."""

from __future__ import annotations


class Refused(Exception):
    """The message says why. hint: what to do. row: which row of the answer, where one is to blame."""

    def __init__(self, message: str, hint: str = "", row: int | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.row = row


class BrokenModel(Refused):
    """A breach of the contract that no row can be blamed for: it ends the run."""
