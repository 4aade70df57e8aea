"""Fingerprint: what the output of a run depends on, as readable JSON, so that a run is only gone on with by the same one.

In it: input, steps in order with the user's code and models, output format, settings that change meaning, and how splits are
planned. Not in it: workers, devices, memory, engine, progress, credentials, the destination's path. Versions of packages and of
Python are told under "about", which is not compared: an upgrade half way through is the user's to judge.

values: what values say. code: what code says. compare: what differs.

The one part of `plan` that reads: source files, and files that arguments name. Invariant: the same in every process and on
every machine, whatever the hash seed, the working directory and the name under which a script was imported.
"""

# pyright: basic
from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from typing import Any

from headrace.core.redact import redact
from headrace.plan import nodes
from headrace.plan.fingerprint.compare import FORMAT, differences, models_of
from headrace.plan.fingerprint.values import Describer, digest_json
from headrace.plan.nodes import Plan, UserFunction

__all__ = ["FORMAT", "differences", "fingerprint", "models_of"]

SPLIT_PLANNING = 1  # another number whenever the same input is divided otherwise

# Of sources: the schema once it was looked up, what of it files may lack or disagree on, and what is read of it
# ("columns" tells); and what there is to say of files.
_RESOLVED = ("_full", "_optional", "_conflicts", "_columns", "_remarks")
_ELSEWHERE = ("path", "fresh", "per_input", "name", "root", "scratch")  # of sinks: told otherwise, or without meaning


def fingerprint(plan: Plan, *, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the run means. settings: options that change meaning, such as on_error.

    plan: as the user built it, with its sink. Reads the source's schema, which it may have to look up.
    """
    packages: set[str] = set()
    destination = str(getattr(plan.write.sink, "path", "")) if plan.write is not None else ""
    steps = [_step(op, bool(settings.get("deterministic")), packages, destination) for op in plan.ops]
    out = {
        "format": FORMAT,
        "split_planning": SPLIT_PLANNING,
        "input": _input(plan, packages),
        "steps": steps,
        "output": _output(plan, packages),
        "settings": Describer().named(settings.items()),
        "about": {"python": platform.python_version(), "packages": {p: _version_of(p) for p in sorted(packages)}},
    }
    return json.loads(json.dumps(out))


def _input(plan: Plan, packages: set[str]) -> dict[str, Any]:
    source: Any = plan.read.source
    out: dict[str, Any] = {"kind": source.name}
    listing = getattr(source, "_listing", None)
    if listing is not None:
        out["paths"] = [redact(p) for p in listing.entries]
    schema = source.schema()
    out["columns"] = {redact(f.name): str(f.type) for f in schema}
    return out | _part(source, ("name", "remote", "_listing", "_version", *_RESOLVED), packages)


def _output(plan: Plan, packages: set[str]) -> dict[str, Any]:
    if plan.write is None:
        return {"kind": "rows"}
    sink: Any = plan.write.sink
    out = {"kind": sink.name, "outputs": "per_input" if sink.per_input else "packed"}
    private = [name for name in vars(sink) if name.startswith("_")] if hasattr(sink, "__dict__") else []
    return out | _part(sink, (*private, *_ELSEWHERE), packages)


def _part(part: Any, without: tuple[str, ...], packages: set[str]) -> dict[str, Any]:
    """Parameters of a source or sink: what its `meaning()` says, else its attributes."""
    describer = Describer()
    if callable(getattr(part, "meaning", None)):
        out = describer.named(dict(part.meaning()).items())
    else:
        state = getattr(part, "__dict__", None)
        if state is None:
            state = {n: getattr(part, n) for n in getattr(type(part), "__slots__", ()) if hasattr(part, n)}
        kept = {k: v for k, v in state.items() if k not in without}
        out = {k.lstrip("_"): describer.value(v, name=k) for k, v in sorted(kept.items()) if v is not None}
    if describer.code:
        out["code"] = describer.code
    packages |= describer.packages
    return out


def _step(op: nodes.Op, deterministic: bool, packages: set[str], destination: str) -> dict[str, Any]:
    describer = Describer(destination)
    out: dict[str, Any] = {"name": op.name}
    match op:  # every member of nodes.Op
        case nodes.Project():
            out |= {"kind": "project", "columns": [list(pair) for pair in op.columns]}
        case nodes.Reshape():
            out |= {"kind": "reshape", "drop": list(op.drop), "rename": [list(pair) for pair in op.rename]}
        case nodes.FilterExpr():
            out |= {"kind": "filter", "expression": redact(str(op.expression))}
        case nodes.Limit():
            out |= {"kind": "limit", "rows": op.rows}
        case nodes.Apply():
            out |= {"kind": "apply", "transform": describer.value(op.transform)}
        case nodes.Evaluate():
            out |= {"kind": "evaluate", "metrics": {k: describer.value(a) for k, a in sorted(op.accumulators.items())}}
        case nodes.FilterRows():
            out |= {"kind": "filter_rows", **_function(op.fn, describer)}
        case nodes.MapRows():
            out |= {"kind": "map", **_function(op.fn, describer)}
        case nodes.FlatMap():
            out |= {"kind": "flat_map", **_function(op.fn, describer)}
        case nodes.MapBatches():
            out |= {"kind": "map_batches", "batch_size": op.batch_rows or "auto", "batch_format": op.batch_format}
            out |= _function(op.fn, describer)
        case nodes.Predict():
            out |= {"kind": "predict", "input": list(op.inputs), "single": op.single, "output": list(op.output)}
            out |= {"batch_format": op.batch_format, **_function(op.model, describer)}
            if deterministic:  # only then a batch's size is fixed, and part of what the model computes
                out["batch_size"] = op.batch_rows or "auto"
    if isinstance(op, nodes.MapRows | nodes.FlatMap | nodes.MapBatches | nodes.Predict) and op.types:
        out["schema"] = {name: str(type) for name, type in op.types}
    if describer.code:
        out["code"] = describer.code
    packages |= describer.packages
    return out


def _function(fn: UserFunction, describer: Describer) -> dict[str, Any]:
    """The function, and what it is given beside rows."""
    out: dict[str, Any] = {"function": describer.value(fn.target)}
    for key, positional, named in (
        ("arguments", fn.args, fn.kwargs),
        ("constructor", fn.ctor_args, fn.ctor_kwargs),
    ):
        given = {str(i): describer.value(v, argument=True) for i, v in enumerate(positional)}
        given |= describer.named(named.items(), argument=True)
        if given:
            out[key] = given
    model = {k: out[k] for k in ("function", "constructor") if k in out}
    out["digest"] = digest_json([model, {k: _compared(v) for k, v in describer.code.items()}])
    return out


def _compared(code: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in code.items() if k != "text"}


def _version_of(package: str) -> str:
    version = getattr(sys.modules.get(package), "__version__", None)
    return version if isinstance(version, str) else "unknown"
