"""Lister: pulls splits from a source's lazy listing when the scheduler asks, off the driver's thread.

A slow store must not hold up steps that are ready. Inline runs list in the caller's thread. What is found goes through the
committer, which logs it or compares it with what the run listed before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import islice
from queue import SimpleQueue

from headrace.core.errors import HeadraceError, InternalError
from headrace.core.splits import Split
from headrace.scheduler.messages import SplitsListed

Admit = Callable[[tuple[Split, ...], bool, Iterator[Split]], SplitsListed]
"""(splits found, no more, the rest of the listing) -> the answer; Committer.admit."""


class Lister:
    """post: called with each answer, from the listing thread unless `inline`."""

    def __init__(
        self,
        splits: Iterator[Split],
        post: Callable[[SplitsListed | HeadraceError], None],
        *,
        admit: Admit,
        inline: bool,
    ) -> None:
        self._splits = splits
        self._post = post
        self._admit = admit
        self._wanted: SimpleQueue[int] | None = None
        self._thread: threading.Thread | None = None
        if not inline:
            self._wanted = SimpleQueue()

    def ask(self, count: int) -> None:
        if self._wanted is None:
            self._answer(count)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="headrace-listing", daemon=True)
            self._thread.start()
        self._wanted.put(count)

    def close(self) -> None:
        """End the thread; a listing request under way is given up after a second and ends by itself."""
        if self._wanted is not None and self._thread is not None:
            self._wanted.put(0)
            self._thread.join(timeout=1.0)

    def _work(self) -> None:
        assert self._wanted is not None
        while count := self._wanted.get():
            self._answer(count)

    def _answer(self, count: int) -> None:
        try:
            found = tuple(islice(self._splits, count))
            listed = self._admit(found, len(found) < count, self._splits)
        except HeadraceError as error:
            self._post(error)
        except Exception as error:
            self._post(InternalError(f"listing the input failed: {type(error).__name__}: {error}"))
        else:
            self._post(listed)
