"""The suite: `./dev bench <workload> [--peers headrace,threads,daft:own] [--runs 5] [--size small]`.

    python -m suite                            list workloads and peers
    python -m suite images --variant simplejpeg --peers headrace,threads --runs 5
    python -m suite images --scale 1,4,16      scaling curves: also --cores 1,2 and --devices 1,2,4,8
    python -m suite images --search daft       find the best of its knobs, for all later runs
    python -m suite page                       docs/benchmarks.md and the table in README.md, from the recorded runs

Full-size results go to benchmarks/results/suite/<workload>.json; a point measured again replaces what was there. Small ones are
only printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

from suite import environments, inputs, record, runner, search
from suite.contract import Workload, workload


def main() -> None:
    options = _options()
    if options.workload is None:
        _list()
    elif options.workload == "page":
        from suite import page

        page.write()
    else:
        _bench(options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("workload", nargs="?")
    parser.add_argument("--variant", default="", help="of the workload")
    parser.add_argument("--peers", default="", help="peer or peer:form, by commas; all by default")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--scale", default="1", help="times the data, by commas")
    parser.add_argument("--cores", default="", help="how many, by commas; all by default")
    parser.add_argument("--devices", default="", help="simulated devices, by commas")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the workload")
    parser.add_argument("--knob", action="append", default=[], metavar="NAME=VALUE", help="of all chosen peers that have it")
    parser.add_argument("--search", metavar="PEER", help="try its knobs instead of comparing")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a run may take")
    parser.add_argument("--touch-gb", type=float, default=None, help="memory touched before each round")
    parser.add_argument("--data", type=Path, default=environments.KEPT / "data", help="where inputs are kept")
    parser.add_argument("--out", type=Path, help="write the results there instead")
    return parser.parse_args()


def _list() -> None:
    for name in runner.all_workloads():
        found = workload(name)
        variants = f"  (--variant {', '.join(found.variants)})" if found.variants else ""
        print(f"{name:16} {found.title}{variants}")
    print("peers:", ", ".join(runner.all_peers()))


def _bench(options: argparse.Namespace) -> None:
    found = workload(options.workload)
    if options.variant and options.variant not in found.variants:
        raise SystemExit(f"{found.name} has no variant {options.variant!r}; it has {', '.join(found.variants)}")
    for scale, cores, devices in itertools.product(_numbers(options.scale), _cores(options.cores), _numbers(options.devices)):
        point = _point(found, options, scale or 1, cores, devices)
        if options.search:
            best = search.search(options.search, point, timeout_s=options.timeout, keep=options.size == "full")
            print(json.dumps(best))
            continue
        names = options.peers.split(",") if options.peers else runner.all_peers()
        able, reasons = runner.prepare(runner.chosen(names), point, _values(options.knob))
        result = runner.compare(
            able,
            point,
            runs=options.runs,
            timeout_s=options.timeout,
            touch_bytes=int(_touch_gb(options) * (1 << 30)),
            limit_s=0.3 if options.size == "small" else 2.0,
        )
        for name, reason in reasons.items():
            result["contestants"][name] = {"title": name, "cannot": reason}
        key = {
            "variant": options.variant,
            "size": options.size,
            "scale": scale or 1,
            "cores": len(cores),
            "devices": point.params.get("devices"),
            "set": _values(options.set),
        }
        entry = {**key, "params": dict(point.params), **result, **record.circumstances(able)}
        if options.out or options.size == "full":
            record.keep(found, key, entry, options.out)
        print(record.table(entry), flush=True)


def _point(
    found: Workload, options: argparse.Namespace, scale: int, cores: tuple[int, ...], devices: int | None
) -> runner.Point:
    more: dict[str, Any] = _values(options.set)
    if devices is not None:
        more["devices"] = devices
    if unknown := set(more) - {*found.params, *inputs.LAYOUT}:
        known = ", ".join((*found.params, *inputs.LAYOUT))
        raise SystemExit(f"{found.name} has no parameter {min(unknown)!r}; it has {known}")
    params = inputs.params_of(found, size=options.size, variant=options.variant, scale=scale, more=more)
    return runner.Point(found, params, cores, inputs.made(found, params, options.data), options.variant)


def _numbers(text: str) -> list[int | None]:
    return [int(part) for part in text.split(",")] if text else [None]


def _cores(text: str) -> list[tuple[int, ...]]:
    """The first so many of those that this process may use."""
    usable = tuple(sorted(os.sched_getaffinity(0)))
    wanted = [int(part) for part in text.split(",")] if text else [len(usable)]
    if max(wanted) > len(usable):
        raise SystemExit(f"there are {len(usable)} cores")
    return [usable[:n] for n in wanted]


def _values(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON where it is that."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def _touch_gb(options: argparse.Namespace) -> float:
    if options.touch_gb is not None:
        return options.touch_gb
    if options.size == "small":
        return 0.0
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return min(6.0, free / 2)


if __name__ == "__main__":
    sys.exit(main())
