"""What a source has to say of what it reads, beside rows. Invariant: a line about each subject, and few of them."""

from __future__ import annotations

import threading

MOST = 20  # subjects


class Remarks:
    """Of one action in one process: another process begins with none. Each subject once, of all that are added. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._about: set[str] = set()
        self._waiting: list[tuple[str, str]] = []

    def __reduce__(self) -> tuple[type[Remarks], tuple[()]]:
        return Remarks, ()

    def add(self, about: str, text: str) -> None:
        with self._lock:
            if about not in self._about and len(self._about) < MOST:
                self._about.add(about)
                self._waiting.append((about, text))

    def take(self) -> tuple[tuple[str, str], ...]:
        """Those that were not taken yet."""
        if not self._waiting:
            return ()
        with self._lock:
            taken, self._waiting = tuple(self._waiting), []
        return taken
