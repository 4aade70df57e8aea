"""How the ranks of one torchrun job, which all make the same call, find the rank that serves: by a note in the private folder,
whose name follows from the job and from which call it is.

A note that an earlier job has left is told by nobody answering at its address.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from headrace.core.errors import PlanError
from headrace.runtime.ingest import private
from headrace.runtime.ingest.client import RemoteChannel, RemoteEpoch
from headrace.runtime.ingest.coordinator import AHEAD
from headrace.runtime.ingest.hub import PATIENCE_S

_LOOK_S = 0.02  # between looks for the note: rank 0 may be importing still


def place(job: str, call: int) -> str:
    """The note of a job's `call`-th split. Raises PlanError when the private folder is not private."""
    return private.note(hashlib.sha256(f"{job}|{call}".encode()).hexdigest()[:32])


def announce(path: str, channel: RemoteChannel, facts: str) -> Callable[[], None]:
    """Say where we serve. facts: what all ranks must agree on. Returns what takes the word back."""
    said = {"address": channel.address, "token": channel.token, "pid": str(channel.pid), "facts": facts}
    private.write_note(path, said)

    def withdraw() -> None:
        if private.read_note(path) == said:
            with contextlib.suppress(OSError):
                os.unlink(path)

    return withdraw


@dataclass
class MeetingChannel:
    """The channel of a rank that does not serve. facts: what it calls for, to be the same as in rank 0."""

    ahead: ClassVar[int] = AHEAD

    path: str
    facts: str
    _found: RemoteChannel | None = field(default=None, repr=False)

    def join(self, rank: int) -> RemoteEpoch:
        if self._found is None:
            self._found = self._find(rank)
        return self._found.join(rank)

    def close(self) -> None:
        """The split is rank 0's to close."""

    def __reduce__(self) -> tuple[Callable[..., MeetingChannel], tuple[Any, ...]]:
        return MeetingChannel, (self.path, self.facts)

    def _find(self, rank: int) -> RemoteChannel:
        """Wait for rank 0. Raises PlanError when its call is another one."""
        started, told = time.monotonic(), False
        while True:
            said = private.read_note(self.path)
            if said is not None and private.answers(said["address"]):
                self._compare(said["facts"], rank)
                return RemoteChannel(said["address"], said["token"], int(said["pid"]))
            if not told and time.monotonic() - started > PATIENCE_S:
                told = True
                text = f"streaming_split: rank {rank} waits for rank 0, which serves the others, to make the same call"
                print(f"headrace: {text}", file=sys.stderr, flush=True)
            time.sleep(_LOOK_S)

    def _compare(self, said: str, rank: int) -> None:
        if said != self.facts:
            raise PlanError(
                "the ranks of this torchrun job call streaming_split for different things",
                where=(("rank 0", said), (f"rank {rank}", self.facts)),
                hint="let all ranks make the same calls in the same order; a split that one rank needs alone has another n",
            )
