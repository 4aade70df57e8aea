"""What functions, models and devices noted during a run: rates, the first answer, and how busy devices were."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

Calls = list[tuple[float, float, float]]  # (begun, ended, rows)


@dataclass(frozen=True)
class Notes:
    """stages: name -> the calls of each thread. devices: name ("device-annotate.0") -> its calls."""

    stages: dict[str, list[Calls]]
    devices: dict[str, Calls]

    @classmethod
    def read(cls, folder: Path) -> Notes:
        stages: dict[str, list[Calls]] = {}
        devices: dict[str, Calls] = {}
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            stage = path.name.rsplit("-", 2)[0]
            calls: Calls = []
            for line in path.read_text().splitlines():
                begun, ended, rows = map(float, line.split())
                calls.append((begun, ended, rows))
            if stage.startswith("device") and "." in stage:
                devices.setdefault(stage, []).extend(calls)
            else:
                stages.setdefault(stage, []).append(calls)
        return cls(stages, devices)

    def first_answer(self, stage: str) -> float | None:
        """When the first call of the last stage ended."""
        ended = [end for calls in self.stages.get(stage, []) for _, end, rows in calls if rows]
        return min(ended, default=None)

    def steady(self) -> float | None:
        """Rows per second between 25% and 75% of the rows, of the slowest stage: what piles up before the next one is no
        throughput. None where there is nothing to tell: one call did it all.
        """
        rates = [rate for calls in self.stages.values() if (rate := _steady(calls)) is not None]
        return min(rates, default=None)

    def busy(self, wall_s: float, devices: int) -> tuple[float, float] | None:
        """Share of the time that devices computed: of the whole run, and from the first call of all to the end of the last. A
        device that was never used counts too.
        """
        calls = [call for of in self.devices.values() for call in of]
        if not calls:
            return None
        held = sum(end - begun for begun, end, _ in calls)
        span = max(end for _, end, _ in calls) - min(begun for begun, _, _ in calls)
        return held / devices / wall_s, held / devices / max(1e-9, span)


def _steady(workers: list[Calls]) -> float | None:
    """A call's rows are spread over the time since the call before it in the same thread."""
    spans: Calls = []
    for calls in workers:
        since = calls[0][0] if calls else 0.0
        for _, end, rows in calls:
            spans.append((since, end, rows))
            since = end
    if len(spans) < 4:
        return None
    edges = np.unique([t for start, end, _ in spans for t in (start, end)])
    done = np.zeros(len(edges))
    for start, end, rows in spans:
        done += np.clip((edges - start) / max(1e-9, end - start), 0, 1) * rows
    total = sum(rows for _, _, rows in spans)
    low, high = (float(np.interp(total * share, done, edges)) for share in (0.25, 0.75))
    return total * 0.5 / (high - low) if high > low else None
