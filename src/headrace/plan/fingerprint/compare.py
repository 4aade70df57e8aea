"""What differs between two fingerprints, in lines for people. Pure: two mappings in, text out.

Invariant: no line exactly when both mean the same run. A fingerprint that was read from a destination may hold anything:
nothing of it is trusted to have a type.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

FORMAT = 1
DIFF_LINES = 12
VALUE_CHARS = 80
SHORT = 100  # items of lists that are compared one by one

Json = Mapping[str, Any]


def differences(old: Json, new: Json) -> list[str]:
    """Lines such as "limit: 100 -> 200" or "map_batches(clean): its code changed"; [] when both mean the same."""
    if old.get("format") != new.get("format"):
        was = _show(old.get("format"))
        return [f"the plan was recorded in another format ({was}, now {_show(new.get('format'))}): it can't be compared"]
    if _same(old, new):
        return []
    out: list[str] = []
    out += _values("input", _dict(old.get("input")), _dict(new.get("input")))
    out += _steps(_list(old.get("steps")), _list(new.get("steps")))
    out += _values("output", _dict(old.get("output")), _dict(new.get("output")))
    out += _values("", _tolerant(_dict(old.get("settings")), _dict(new.get("settings"))), _dict(new.get("settings")))
    if old.get("split_planning") != new.get("split_planning"):
        out.append("this version of Headrace divides inputs into splits in another way")
    return out


def _tolerant(old: Json, new: Json) -> Json:
    """Whatever was settled under on_error="fail" holds no bad row: it is as good under "skip" or "quarantine"."""
    if old.get("on_error") == "fail" and "on_error" in new:
        return {**old, "on_error": new["on_error"]}
    return old


def models_of(fingerprint: Json) -> dict[str, str]:
    """Steps that are models, each with the version that the user gave it, or the digest of its code, arguments and weights."""
    out: dict[str, str] = {}
    for step in map(_dict, _list(fingerprint.get("steps"))):
        if step.get("kind") != "predict":
            continue
        versions = [str(c["version"]) for c in map(_dict, _dict(step.get("code")).values()) if "version" in c]
        function = _dict(step.get("function"))
        if "version" in function:
            versions.insert(0, str(function["version"]))
        out[str(step.get("name"))] = f"version {versions[0]}" if versions else f"digest {step.get('digest')}"
    return out


# ---------------------------------------------------------------- steps


def _steps(old: list[Any], new: list[Any]) -> Iterator[str]:
    """Steps that were added, taken away or changed. Changed ones are found by kind and name, then by kind alone."""
    before, after = [_dict(s) for s in old], [_dict(s) for s in new]
    pairs = difflib.SequenceMatcher(None, [_key(s) for s in before], [_key(s) for s in after], autojunk=False)
    for tag, i1, i2, j1, j2 in pairs.get_opcodes():
        if tag == "equal":
            for was, now in zip(before[i1:i2], after[j1:j2], strict=True):
                yield from _step(was, now)
            continue
        left, right = before[i1:i2], after[j1:j2]
        while left and right and left[0].get("kind") == right[0].get("kind"):
            was, now = left.pop(0), right.pop(0)
            yield f"{_name(was)} is now {_name(now)}"
            yield from _step(was, now)
            j1 += 1
        for was in left:
            yield f"the step {_name(was)} is gone"
        for k, now in enumerate(right):
            yield f"a new step {_name(now)} {_place(after, j1 + k)}"


def _key(step: Json) -> str:
    return f"{step.get('kind')} {step.get('name')}"


def _name(step: Json) -> str:
    return _show(str(step.get("name")))


def _place(steps: Sequence[Json], at: int) -> str:
    return f"after {_name(steps[at - 1])}" if at else "at the beginning"


def _step(old: Json, new: Json) -> Iterator[str]:
    name = _name(new)
    told = list(_code(name, old, new))
    yield from told
    without = {"name", "kind", "code", "digest"}
    if old.get("name") != new.get("name") and all(len(_dict(s.get("function"))) == 1 for s in (old, new)):
        without.add("function")  # that it has another name is told
    if old.get("kind") == "limit" and old.get("rows") != new.get("rows"):
        yield f"{name}: {_show(old.get('rows'))} -> {_show(new.get('rows'))}"
        return
    given = ("arguments", "constructor")
    rest = [{k: v for k, v in s.items() if k not in (*without, *given)} for s in (old, new)]
    yield from _values(name, *rest)
    for key in given:
        yield from _values(f"{name}: argument", _dict(old.get(key)), _dict(new.get(key)))


def _code(name: str, old: Json, new: Json) -> Iterator[str]:
    before, after = _dict(old.get("code")), _dict(new.get("code"))
    main = _labels(old.get("function")) | _labels(new.get("function"))
    for label in sorted(before.keys() | after.keys()):
        what = "its code" if label in main else _show(label)
        if label not in before:
            if label not in main:
                yield f"{name}: now uses {_show(label)}"
        elif label not in after:
            if label not in main:
                yield f"{name}: no longer uses {_show(label)}"
        else:
            yield from _entry(name, what, _dict(before[label]), _dict(after[label]))


def _labels(function: Any) -> set[str]:
    """The labels of code that a description names at its top."""
    found = [
        v for k, v in _dict(function).items() if k in ("(function)", "(class)", "(object)", "(method)") and isinstance(v, str)
    ]
    return set(found) | (_labels(_dict(function)["(partial)"]) if "(partial)" in _dict(function) else set())


def _entry(name: str, what: str, old: Json, new: Json) -> Iterator[str]:
    if "version" in old or "version" in new:
        if old.get("version") != new.get("version"):
            of = "" if what == "its code" else f" of {what}"
            yield f"{name}: version{of}: {_show(old.get('version'))} -> {_show(new.get('version'))}"
        return
    if old.get("digest") != new.get("digest"):
        changed = f"{name}: {what} changed"
        diff = _diff(str(old.get("text") or ""), str(new.get("text") or ""))
        yield changed + ("" if not diff else "\n" + "\n".join(f"    {line}" for line in diff))
    if old.get("bases") != new.get("bases"):
        yield f"{name}: base classes of {what}: {_show(old.get('bases'))} -> {_show(new.get('bases'))}"
    for key in ("defaults", "closure", "globals", "attributes"):
        yield from _values(name, _dict(old.get(key)), _dict(new.get(key)))


def _diff(old: str, new: str) -> list[str]:
    if not old or not new:
        return []
    lines = [
        _show(line, 120)
        for line in difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=1)
        if not line.startswith(("---", "+++", "@@"))
    ]
    return lines if len(lines) <= DIFF_LINES else [*lines[:DIFF_LINES], f"... {len(lines) - DIFF_LINES} more lines"]


# ---------------------------------------------------------------- values


def _values(name: str, old: Json, new: Json) -> Iterator[str]:
    for key in sorted(old.keys() | new.keys()):
        yield from _value(f"{name} {_show(key)}" if name else _show(key), old.get(key), new.get(key))


def _value(name: str, old: Any, new: Any) -> Iterator[str]:
    """How a value differs. Files count by content where both fingerprints saw one: one may be made while a run is under way."""
    if _same(old, new):
        return
    was, now = _path(old), _path(new)
    if was is not None and was == now:
        if isinstance(old, dict) and isinstance(new, dict):
            kind = "folder" if "(folder)" in old else "file"
            yield f"{name}: the {kind} {_show(was)} changed"
        return
    if was is not None and now is not None:
        yield f"{name}: {_show(was)} -> {_show(now)}"
        return
    if isinstance(old, dict) and isinstance(new, dict) and "(object)" in old and "(object)" in new:
        before, after = cast(Json, old), cast(Json, new)
        if (
            before["(object)"] == after["(object)"]
            and isinstance(before.get("state"), dict)
            and isinstance(after.get("state"), dict)
        ):
            yield from _values(name, _dict(before.get("state")), _dict(after.get("state")))
            rest = [{k: v for k, v in d.items() if k not in ("state", "(object)")} for d in (before, after)]
            yield from _values(name, *rest)
            return
        if before["(object)"] == after["(object)"]:
            yield f"{name}: the {_show(before['(object)'])} changed"
            return
    elif isinstance(old, dict) and isinstance(new, dict):
        yield from _values(name, _dict(cast(Any, old)), _dict(cast(Any, new)))
        return
    elif _alike(old, new):
        for i, (was_i, now_i) in enumerate(zip(_list(old), _list(new), strict=True)):
            yield from _value(f"{name} {i}", was_i, now_i)
        return
    shown = f"{_show(old)} -> {_show(new)}"
    yield f"{name}: changed" if _show(old) == _show(new) else f"{name}: {shown}"


def _same(old: Any, new: Any) -> bool:
    """Equal, and of the same types: 1 is not 1.0, nor true."""
    return old == new and json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)


def _alike(old: Any, new: Any) -> bool:
    """Are these lists whose items are better compared one by one?"""
    items = (*_list(old), *_list(new))
    lists = isinstance(old, list) and isinstance(new, list) and len(_list(old)) == len(_list(new)) <= SHORT
    return lists and any(isinstance(item, dict) for item in items)


def _path(value: Any) -> str | None:
    """The path that a value may be: a text, or a described file or folder."""
    if isinstance(value, str):
        return value
    described = _dict(value)
    found = described.get("(file)", described.get("(folder)"))
    return found if isinstance(found, str) else None


def _show(value: Any, chars: int = VALUE_CHARS) -> str:
    """A value on one line, without control characters."""
    if value is None:
        text = "none"
    elif isinstance(value, str):
        text = value
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= chars else text[: chars - 3] + "..."


def _dict(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []
