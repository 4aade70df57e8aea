"""From the recorded runs: docs/benchmarks.md with its plots, and the table in README.md between its markers.

Nothing is written there that no recorded run says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suite import plots, record
from suite.environments import ROOT

BEGIN, END = "<!-- suite:begin (by ./dev bench page) -->", "<!-- suite:end -->"
ORDER = ("images", "images-s3", "tabular", "tiny-files", "big-file", "text-embedding", "many-jobs", "expand")
OURS = "headrace"
IN_README = ("headrace", "threads", "processes", "dataloader", "daft", "http-server", "spark", "ray-data")

Point = Mapping[str, Any]

INTRO = """# Benchmarks: beside every peer

Written by `./dev bench page` from the runs in `benchmarks/results/suite/`; `./dev bench <workload>` measures one again.

How it was measured:

- Every contestant is a process of its own, timed from its start to its end, imports included, in an environment of its own
  whose versions are pinned. Contestants take turns, in an order that rotates; figures are medians, with the least and the
  most. One that takes more than four times as long as the quickest is timed twice only.
- *The same functions*: every engine is given the same Python functions and model classes. *own*: what an engine brings for it,
  such as its own decoder. Headrace runs with default options; a peer runs with the best settings that a search over its knobs
  found for the workload, where one was made (`--search`).
- Every output was compared with that of a plain loop, row by row and column by column; one that differs is not in the table.
- *Ideal*: the machine's own limit, measured in every round: CPU time of the functions on a core that does nothing else, divided
  by the cores, or the time that the device needs; and a start. Headrace keeps its promise meanwhile: every row exactly once,
  synced and logged. No other contestant does.
- *First*: from process start to the first answer of the last step. *Steady*: rows per second between a quarter and three
  quarters of the rows, of the slowest step. *CPU*: seconds, of the process and all that it started. *Memory*: the highest sum
  of proportional set sizes of the whole process tree, in a run that is not timed, and blocks that Headrace moved to disk
  meanwhile. *Device*: share of the time that it computed, of the whole run, and from its first call to its last.
- A device is simulated by a lock that is held for as long as a device of that speed would compute.
"""


def write() -> None:
    """Both, from all that is recorded."""
    found = recorded()
    if not found:
        raise SystemExit("nothing is recorded yet: ./dev bench <workload>")
    docs = ROOT / "docs"
    folder = docs / "benchmarks"
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.svg"):
        stale.unlink()
    text, drawn = page(found)
    (docs / "benchmarks.md").write_text(text)
    for name, svg in drawn.items():
        (folder / name).write_text(svg)
    readme = ROOT / "README.md"
    before = readme.read_text()
    if BEGIN not in before:
        raise SystemExit(f"docs/benchmarks.md is written; README.md has no place for its table: {BEGIN} and {END}")
    readme.write_text(between(before, readme_table(found)))


def recorded(folder: Path = record.FOLDER) -> list[dict[str, Any]]:
    """What is in the result files, in the order of the page. Each: workload, title, points."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    place = {name: i for i, name in enumerate(ORDER)}
    return sorted(found, key=lambda one: place.get(one["workload"], len(ORDER)))


def between(text: str, table: str) -> str:
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n\n{table}\n\n{END}", text, flags=re.DOTALL)


# -- the page


def page(found: Sequence[Mapping[str, Any]]) -> tuple[str, dict[str, str]]:
    """(Markdown, {file name: SVG})."""
    parts, drawn = [INTRO], dict[str, str]()
    for one in found:
        parts.append(f"## {one['workload']}: {one['title']}\n")
        for point in _bases(one["points"]):
            name = f"{one['workload']}{'-' + point['variant'] if point['variant'] else ''}.svg"
            drawn[name] = _plot(one["workload"], point)
            parts.append(_section(one["workload"], point, name))
        for across, name, svg in _curves(one["workload"], one["points"]):
            drawn[name] = svg
            parts.append(f"![Wall time by {across}](benchmarks/{name})\n")
    return "\n".join(parts), drawn


def _bases(points: Sequence[Point]) -> list[Point]:
    """Those that tables are made of: the data once, all cores; one for each variant, with nothing set where there is one."""
    most = max(point["cores"] for point in points)
    wanted = [p for p in points if p["scale"] == 1 and p["cores"] == most and p["size"] == "full"]
    chosen: dict[str, Point] = {}
    for point in sorted(wanted, key=lambda p: bool(p["set"])):  # of several numbers of devices the least
        before = chosen.get(point["variant"])
        if before is None or (not point["set"] and (point["devices"] or 0) < (before["devices"] or 0)):
            chosen[point["variant"]] = point
    return sorted(chosen.values(), key=lambda point: point["variant"])


def _section(workload: str, point: Point, plot: str) -> str:
    lines = [f"### {title(workload, point)}\n"] if point["variant"] or point["set"] else []
    told = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in point["params"].items()
    )
    machine = point["machine"]
    on = f"{point['cores']} cores of {machine['processor']}, {point['date']}"
    lines.append(f"{point['rows']:,} rows, {point['input_mb']} MB; {told}. {on}: `{point['command']}`\n")
    lines.append(f"![Wall time](benchmarks/{plot})\n")
    lines.append("| | wall s | range | over Headrace | of ideal | first s | steady rows/s | CPU s | memory MB | device |")
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    ours = wall(point, OURS)
    for name, one in _ranked(point):
        lines.append(_row(name, one, ours))
    lines.append("")
    lines += [f"- {_title(name, one)}: {_why(one)}" for name, one in point["contestants"].items() if "summary" not in one]
    limit = point["limits"]
    if limit:
        lines += ["", _limits(point)]
    return "\n".join([*lines, ""])


def _row(name: str, one: Mapping[str, Any], ours: float | None) -> str:
    found = one["summary"]
    time = found["wall_s"]
    label = _title(name, one)
    cells = [
        f"**{label}**" if name.startswith(OURS) else label,
        f"{time['median']:.2f}",
        f"{time['least']:.2f} to {time['most']:.2f}",
        f"{time['median'] / ours:.2f}x" if ours else "",
        f"{found['share_of_ideal']:.0%}" if "share_of_ideal" in found else "",
        _median(found, "first_s", ".2f"),
        _median(found, "steady_rows_per_s", ",.0f"),
        _median(found, "cpu_s", ".1f"),
        f"{one['peak_mb']:,}" + (f", {one['spilled_mb']:,} on disk" if one.get("spilled_mb") else ""),
        f"{found['busy']['median']:.0%}, {found['busy_span']['median']:.1%}" if "busy" in found else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _limits(point: Point) -> str:
    first = point["limits"][0]
    work = ", ".join(f"{stage.strip('()')} {first['rows'] / s:,.0f}" for stage, s in first["cpu_s"].items() if s > 0)
    together = f"{point['ideal_together_s']:.2f} s by what cores do when all are busy"
    copies = f"memory copied at {first['memcpy_gb_per_s']:.1f} GB/s, disk written at {first['disk_gb_per_s']:.2f} GB/s"
    return (
        f"The machine: ideal {point['ideal_s']:.2f} s ({together}); rows per second of a core: {work}; "
        f"device {first['device_s']:.1f} s; start {first['start_s']:.2f} s; {copies}."
    )


def title(workload: str, point: Point) -> str:
    changed = (f"{name} {value}" for name, value in point["set"].items())
    return ", ".join([workload, *([point["variant"]] if point["variant"] else []), *changed])


def _title(name: str, one: Mapping[str, Any]) -> str:
    form = name.partition(":")[2]
    return f"{one['title']} ({form})" if form and not one["title"].endswith(form) else one["title"]


def _why(one: Mapping[str, Any]) -> str:
    return f"failed: {one['failed'][:300]}" if "failed" in one else one["cannot"]


def wall(point: Point, name: str) -> float | None:
    return point["contestants"].get(name, {}).get("summary", {}).get("wall_s", {}).get("median")


def _ranked(point: Point) -> list[tuple[str, Mapping[str, Any]]]:
    ended = [(name, one) for name, one in point["contestants"].items() if "wall_s" in one.get("summary", {})]
    return sorted(ended, key=lambda pair: pair[1]["summary"]["wall_s"]["median"])


def _median(found: Mapping[str, Any], name: str, form: str) -> str:
    return format(found[name]["median"], form) if name in found else ""


def _plot(workload: str, point: Point) -> str:
    of: list[plots.Bar] = []
    for name, one in _ranked(point):
        time = one["summary"]["wall_s"]
        of.append(plots.Bar(_title(name, one), time["median"], time["least"], time["most"], name.startswith(OURS)))
    return plots.bars(f"{title(workload, point)}: wall seconds, process start included", " s", of, point["ideal_s"])


def _curves(workload: str, points: Sequence[Point]) -> list[tuple[str, str, str]]:
    """(what is varied, file name, SVG) for each variant and each way in which it was varied at two points or more."""
    found: list[tuple[str, str, str]] = []
    words = {"scale": "times the data", "cores": "cores", "devices": "devices"}
    for variant in sorted({point["variant"] for point in points}):
        mine = [p for p in points if p["variant"] == variant and p["size"] == "full" and not p["set"]]
        for across, said in words.items():
            series = _series(mine, across)
            if series:
                name = f"{workload}{'-' + variant if variant else ''}-{across}.svg"
                head = f"{workload}{', ' + variant if variant else ''}: wall seconds by {said}"
                found.append((said, name, plots.curves(head, said, " s", series, OURS)))
    return found


def _series(points: Sequence[Point], across: str) -> dict[str, list[tuple[float, float]]]:
    """Contestant -> (value, wall) where all else is as in the largest group of points."""
    others = [name for name in ("scale", "cores", "devices") if name != across]
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        if point[across] is not None:
            groups.setdefault(tuple(point[name] for name in others), []).append(point)
    largest = max(groups.values(), key=len, default=[])
    if len(largest) < 2:
        return {}
    series: dict[str, list[tuple[float, float]]] = {}
    for point in largest:
        for name, one in _ranked(point):
            series.setdefault(name, []).append((point[across], one["summary"]["wall_s"]["median"]))
    return {name: of for name, of in series.items() if len(of) > 1}


# -- the README


def readme_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Walls of the contestants that run the same functions."""
    bases = [(one["workload"], point) for one in found for point in _bases(one["points"])]
    there = [name for name in IN_README if any(name in point["contestants"] for _, point in bases)]
    titles = {name: one["title"] for _, point in bases for name, one in point["contestants"].items() if "form" in one}
    lines = [
        "Seconds from process start to end, the same functions for all, outputs compared, medians of interleaved runs on "
        f"{max((point['cores'] for _, point in bases), default=0)} cores ([how, and all the rest](docs/benchmarks.md)):",
        "",
        "| workload | ideal | " + " | ".join(titles.get(name, name) for name in there) + " |",
        "|---" * (len(there) + 2) + "|",
    ]
    for workload, point in bases:
        walls = [wall(point, name) for name in there]
        least = min((w for w in walls if w is not None), default=None)
        cells = ["" if w is None else f"**{w:.2f}**" if w == least else f"{w:.2f}" for w in walls]
        ideal = f"{point['ideal_s']:.2f}" if point["ideal_s"] else ""
        lines.append("| " + " | ".join([title(workload, point), ideal, *cells]) + " |")
    return "\n".join(lines)
