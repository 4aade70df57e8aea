"""Writes docs/reference/api.md from the code: the public names of headrace, their signatures and docstrings.

`python docs/reference/generate.py` writes it, `--check` fails when it is not up to date.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import msgspec

PAGE = Path(__file__).with_name("api.md")

READERS = ("read_parquet", "read_csv", "read_json", "read_text", "read_images")
IN_MEMORY = ("from_arrow", "from_pandas", "from_items", "from_ray_dataset", "range")
GROUPS = (
    ("Readers", READERS + IN_MEMORY),
    ("Dataset", ("Dataset",)),
    ("Run", ("Run",)),
    ("Many runs", ("run_jobs", "Job", "JobResult")),
    ("Training", ("SplitIterator",)),
    ("Outputs", ("verify", "Verification", "why", "Trace")),
    ("Images", ("images.decode", "images.normalize")),
    ("Models", ()),
    ("Metrics", ()),
    ("Errors", ()),
)


def page() -> str:
    """The page's text. Every public name of headrace is on it, or this raises."""
    import headrace as hr

    metrics = tuple(f"metrics.{name}" for name in sorted(hr.metrics.__all__, key=str.lower))
    models = tuple(f"models.{name}" for name in sorted(hr.models.__all__, key=str.lower))
    errors = tuple(name for name in hr.__all__ if _is_error(getattr(hr, name)))
    lines = ["# Reference", "", "Written from the code by `./dev docs`; don't edit.", "", "`import headrace as hr`", ""]
    shown: set[str] = set()
    for title, names in GROUPS:
        names = {"Models": models, "Metrics": metrics, "Errors": errors}.get(title, names)
        lines += [f"## {title}", ""]
        for name in names:
            shown.add(name.partition(".")[0])
            lines += _entry(name, _find(hr, name))
    lines += ["## Options of every action", "", *_options()]
    if missing := set(hr.__all__) - shown:
        raise SystemExit(f"public names without a place in the reference: {', '.join(sorted(missing))}")
    return "\n".join(lines).rstrip() + "\n"


def _options() -> list[str]:
    from headrace.core.options import RunOptions

    return [f"`{_fields(RunOptions)}`", "", *_doc(RunOptions), ""]


def _find(root: Any, name: str) -> Any:
    for part in name.split("."):
        root = getattr(root, part)
    return root


def _is_error(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Exception)


def _entry(name: str, thing: Any) -> list[str]:
    if _is_error(thing):
        base = thing.__mro__[1].__name__
        return [f"### hr.{name}", "", *_doc(thing), *([f"A `{base}`.", ""] if base != "Exception" else [])]
    if dataclasses.is_dataclass(thing) and not name.startswith(("metrics.", "models.")):
        lines = [f"### hr.{name}", "", "```", f"hr.{name}({_fields(thing)})", "```", "", *_doc(thing)]
        return lines + (_members(thing) if name == "Run" else [])
    if inspect.isclass(thing) and not name.startswith(("metrics.", "models.")):
        return [f"### hr.{name}", "", *_doc(thing), *_members(thing)]
    return [f"### hr.{name}", "", "```", f"hr.{name}{_signature(thing)}", "```", "", *_doc(thing)]


def _members(cls: Any) -> list[str]:
    lines: list[str] = []
    for name, member in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            if member.__doc__:
                lines += [f"#### .{name}", "", *_doc(member)]
        elif inspect.isfunction(member):
            lines += [f"#### .{name}", "", "```", f".{name}{_signature(member)}", "```", "", *_doc(member)]
    return lines


def _fields(cls: Any) -> str:
    if dataclasses.is_dataclass(cls):
        return ", ".join(f"{f.name}: {_plain(f.type)}{_default(f, dataclasses.MISSING)}" for f in dataclasses.fields(cls))
    types = cls.__annotations__
    return ", ".join(f"{f.name}: {_plain(types[f.name])}{_default(f, msgspec.NODEFAULT)}" for f in msgspec.structs.fields(cls))


def _default(field: Any, none: Any) -> str:
    if field.default is not none:
        return f" = {field.default!r}"
    return " = ..." if field.default_factory is not none else ""


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    kept = [
        p if p.annotation is p.empty else p.replace(annotation=_Raw(p.annotation))
        for p in signature.parameters.values()
        if p.name != "self"
    ]
    answer = signature.return_annotation
    text = str(signature.replace(parameters=kept, return_annotation=inspect.Signature.empty))
    return text + ("" if answer is inspect.Signature.empty else f" -> {_plain(answer)}")


class _Raw:
    """An annotation that prints as it was written."""

    def __init__(self, annotation: Any) -> None:
        self.text = _plain(annotation)

    def __repr__(self) -> str:
        return self.text


def _plain(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return re.sub(r"Unpack\[ActionOptions\]", "options", text)


def _doc(thing: Any) -> list[str]:
    """The docstring: its first paragraph as text, the rest as it is laid out."""
    text = inspect.getdoc(thing) or ""
    if not text:
        raise SystemExit(f"{thing!r} is public and has no docstring")
    first, _, rest = text.partition("\n\n")
    head, *more = first.splitlines()
    while more and not head.endswith((".", ":")):
        head += " " + more.pop(0)
    tail = "\n".join(more) + ("\n\n" if more and rest else "") + rest
    return [head, "", *(["```text", *tail.splitlines(), "```", ""] if tail else [])]


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
            raise SystemExit("docs/reference/api.md is not up to date; run ./dev docs")
    else:
        PAGE.write_text(page(), encoding="utf-8")
        print(f"wrote {PAGE}")
