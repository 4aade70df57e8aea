"""Finds the best knobs of a peer for a workload: one knob after the other, each value beside the best so far."""

from __future__ import annotations

import json
from typing import Any

from suite import runner
from suite.runner import Contestant, Failed, Point, say

BETTER = 0.97  # a value stays when it is quicker by this, twice


def search(name: str, point: Point, *, timeout_s: float, keep: bool) -> dict[str, Any]:
    """keep: write them to results/suite/knobs/<peer>.json, where later runs find them."""
    ((declared, form), *_) = runner.chosen([name])
    able, reasons = runner.prepare([(declared, form)], point)
    if not able:
        raise SystemExit(f"{name} can't: {reasons}")
    best = dict(declared.knobs(point.workload.name))
    tried: list[dict[str, Any]] = []
    with runner.serving(point) as env:
        runner.make_reference(point, env, timeout_s * 5)

        def wall(knobs: dict[str, Any]) -> float:
            one = Contestant(declared, form, able[0].python, knobs)
            try:
                return runner.run_once(one, point, env, timeout_s=timeout_s).wall_s
            except Failed as error:
                say(f"{knobs}: {error}")
                return float("inf")

        wall(best)  # warms the page cache
        for knob, values in declared.search(point.workload.name):
            for value in values:
                other = {**best, knob: value}
                walls = [(wall(best), wall(other))]
                if walls[0][1] < walls[0][0] * BETTER:
                    walls.append((wall(best), wall(other)))
                stays = all(with_it < before * BETTER for before, with_it in walls)
                shown = [[None if w == float("inf") else round(w, 3) for w in pair] for pair in walls]
                tried.append({"knob": knob, "value": value, "before_and_with_it_s": shown, "stays": stays})
                say(f"{knob}={value}: {shown}{', stays' if stays else ''}")
                if stays:
                    best = other
    if not keep:
        return best
    path = runner.KNOBS / f"{declared.name}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found[runner.knobs_key(point, form)] = {"best": best, "params": dict(point.params), "tried": tried}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return best
