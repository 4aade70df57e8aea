"""Footers of remote files that this process has read: planning, trying and each split of a file need the same one.

What must not live here: what a footer says. Invariants: a footer is found under the etag that it was read under and no other;
memory is bounded.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from headrace.connectors.storage import is_etag

MOST_BYTES = 8 << 20  # of all: about a thousand files of a dozen columns; those read last stay


class Footers:
    """By uri and version. Thread-safe."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._bytes = 0

    def find(self, uri: str, version: str) -> bytes | None:
        with self._lock:
            found = self._held.get((uri, version))
            if found is not None:
                self._held.move_to_end((uri, version))
            return found

    def keep(self, uri: str, version: str, footer: bytes) -> None:
        """Under a version that tells contents apart; others are not kept."""
        if not is_etag(version):
            return
        with self._lock:
            self._bytes += len(footer) - len(self._held.pop((uri, version), b""))
            self._held[uri, version] = footer
            while self._bytes > self._most:
                _, gone = self._held.popitem(last=False)
                self._bytes -= len(gone)


remembered = Footers()
