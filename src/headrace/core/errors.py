"""Errors, by who must act. Each says what happened, where, and what to do next; all of them pickle, and none holds a secret."""

from __future__ import annotations

from headrace.core.redact import redact


class HeadraceError(Exception):
    """The base of every error that Headrace raises on purpose.

    where: (label, value) pairs such as ("split", "3 (a.parquet)"), ("rows", "0-127 of a.parquet"), ("stage", "map_batches(f)").
    hint: what to do next. frames: the user's own traceback, formatted, without Headrace's frames.
    """

    frames_title = "in your code"

    def __init__(self, message: str, *, where: tuple[tuple[str, str], ...] = (), hint: str = "", frames: str = "") -> None:
        self.message = redact(message)
        super().__init__(self.message)
        self.where = _redacted(where)
        self.hint = redact(hint)
        self.frames = redact(frames)

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  {label}: {value}" for label, value in self.where]
        if self.frames:
            lines.append(f"  {self.frames_title}:")
            lines += [f"    {line}" for line in self.frames.rstrip().splitlines()]
        if self.hint:
            lines.append(f"  next: {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.where, self.hint, self.frames)

    def at(self, *where: tuple[str, str]) -> HeadraceError:
        """The same error with more places; those it already names are kept."""
        known = {label for label, _ in self.where}
        self.where = self.where + _redacted(tuple(pair for pair in where if pair[0] not in known))
        return self


def _redacted(where: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((label, redact(value)) for label, value in where)


def _rebuild(
    kind: type[HeadraceError], message: str, where: tuple[tuple[str, str], ...], hint: str, frames: str
) -> HeadraceError:
    return kind(message, where=where, hint=hint, frames=frames)


class PlanError(HeadraceError, ValueError):
    """The pipeline can't run as written: refused before any work."""


class UserCodeError(HeadraceError):
    """The user's function or model raised, or broke its contract."""


class DataError(HeadraceError):
    """The input, or what a function made of it, can't be read, converted or written."""


class SchemaConflict(DataError):
    """Rows whose columns or types don't go together with those before them."""


class InputChanged(DataError):
    """An input object changed between planning and reading."""


class StorageRefused(DataError):
    """The storage refuses a request for input: credentials, a policy, a bucket that is not there. No object is to blame for it:
    it ends the run, whatever `on_error` says.
    """


class StopConditionMet(HeadraceError):
    """A metric met the condition of evaluate(stop_if=...). What was settled until then is kept."""


class DestinationError(HeadraceError):
    """The destination can't be written, or holds something that must not be overwritten."""


class TransientError(HeadraceError):
    """Storage or network trouble that a retry may cure."""


class BlockLost(HeadraceError):
    """A block's memory is gone with the node or worker that held it: the splits concerned start again."""


class WorkerDied(HeadraceError):
    """A worker process died: killed, out of memory, or a crash in native code."""


class InternalError(HeadraceError):
    """A fault of Headrace itself; its frames are Headrace's."""

    frames_title = "frames"
