"""Observer: anything people see (progress, report, trace)."""

from __future__ import annotations

from typing import Protocol

from headrace.core.events import RunEvent


class Observer(Protocol):
    """Called by the driver's thread; must return quickly and never raise."""

    def on_event(self, event: RunEvent) -> None: ...

    def close(self) -> None:
        """The run is over, whatever its end; restore the terminal."""
        ...
