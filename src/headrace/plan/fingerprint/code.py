"""What a piece of user code says: its source in a normal form, the names that it reads, and those that it only scribbles on.

Normal form: without comments, docstrings, annotations, positions and layout. Code without source (a REPL, exec) is known by
its code object; then another minor version of Python makes it other code.

What must not live here: values, and what names stand for (values.py).
"""

# pyright: basic
from __future__ import annotations

import ast
import builtins
import contextlib
import dis
import hashlib
import importlib.util
import linecache
import os
import pickle
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from headrace.core.redact import HIDDEN, is_secret_name, looks_secret, redact

TEXT_CHARS = 20_000  # longer sources are known by their digest alone

_OURS = str(Path(__file__).resolve().parents[2]) + os.sep
_LIBRARIES = tuple(
    {p + os.sep for k, p in sysconfig.get_paths().items() if k in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_SITE = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
# fmt: off
_MUTATORS = frozenset((
    "append", "appendleft", "extend", "insert", "add", "update", "setdefault", "pop", "popleft", "popitem", "remove",
    "discard", "clear", "sort", "reverse", "write", "put", "put_nowait", "inc", "increment", "touch", "set",
))
# fmt: on

Chain = tuple[str, ...]
"""A global name and the attributes read of it: ("utils", "clean")."""


class Code(Struct, frozen=True):
    """digest: of the normal form. text: the normal form to show, secrets masked; "" when too long or without source.

    reads: globals. imports: modules that are imported inside. scratch: names that the code changes: their values are no part
    of what it means. Of a class with source: assigned, the attributes that its code sets; changed, those of an instance that
    its call changes (see scratch_attributes).
    """

    digest: str
    text: str
    reads: tuple[Chain, ...]
    imports: tuple[str, ...]
    scratch: frozenset[str]
    assigned: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()


def is_own(module_name: str | None) -> bool:
    """Is this a module of the user's, rather than of an installed package, Python or Headrace?"""
    if module_name is None or module_name == "__main__":
        return True
    module = sys.modules.get(module_name)
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return module_name not in sys.builtin_module_names and module is None and not _is_installed(module_name)
    return is_own_file(file)


def is_own_file(file: str) -> bool:
    """Does code of this file belong to the user? Code that is in no file does."""
    path = file if file.startswith("<") else os.path.abspath(file)
    return not (path.startswith((_OURS, *_LIBRARIES)) or any(s in path for s in _SITE))


def _is_installed(module_name: str) -> bool:
    """For a module that is not loaded (yet, or any more; or it was shipped by value): is its top package a library's?"""
    top = module_name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return True
    if top in sys.modules:
        return top != module_name and not is_own(top)
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(top)  # of a top package: nothing is imported
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
        return any(place is not None and not is_own_file(place) for place in places)
    return False


# ---------------------------------------------------------------- source


class Sources:
    """Parsed source files as they are now: each is looked at once. What an earlier one has parsed is parsed again when its
    file, or its cell of a notebook, has changed.
    """

    def __init__(self, before: Sources | None = None) -> None:
        self._files: dict[str, tuple[int, dict[int, list[Any]]]] = {} if before is None else before._files
        self._now: dict[str, dict[int, list[Any]]] = {}

    def function(self, code: CodeType) -> Any:
        """The node of a function or lambda; None when its source can't be found for certain."""
        wanted = [n for n in self._at(code.co_filename, code.co_firstlineno) if not isinstance(n, ast.ClassDef)]
        same = [n for n in wanted if _name_of(n) == code.co_name and _arguments(n) == _code_arguments(code)]
        if len(same) > 1:
            same = [n for n in same if _holds(n, code)]
        return same[0] if len(same) == 1 else None

    def class_(self, cls: type) -> Any:
        """The node of a class: by the lines of its methods, else the only one of that name."""
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        functions = [
            f for f in vars(cls).values() if isinstance(f, FunctionType) and f.__qualname__.startswith(cls.__qualname__ + ".")
        ]
        if functions:
            file = functions[0].__code__.co_filename
        if file is None:
            return None
        named = [n for n in self._all(file) if isinstance(n, ast.ClassDef) and n.name == cls.__name__]
        if functions and len(named) > 1:
            line = functions[0].__code__.co_firstlineno
            named = [n for n in named if n.lineno <= line <= (n.end_lineno or 0)]
            named = named[-1:]  # the innermost
        return named[0] if len(named) == 1 else None

    def module_digest(self, name: str) -> str:
        """Of a whole module of the user's, "" when there is no source."""
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None:
            try:
                spec = importlib.util.find_spec(name)
            except (ImportError, ValueError, AttributeError):
                spec = None
            file = spec.origin if spec is not None else None
        try:
            tree = ast.parse("".join(linecache.getlines(file or "")))
        except (SyntaxError, ValueError):
            return ""
        return _digest(ast.unparse(_normal(tree))) if tree.body else ""

    def _at(self, filename: str, line: int) -> list[Any]:
        return self._load(filename).get(line, [])

    def _all(self, filename: str) -> Iterator[Any]:
        for nodes in self._load(filename).values():
            yield from nodes

    def _load(self, filename: str) -> dict[int, list[Any]]:
        now = self._now.get(filename)
        if now is None:
            now = self._now[filename] = self._parsed(filename)
        return now

    def _parsed(self, filename: str) -> dict[int, list[Any]]:
        linecache.checkcache(filename)
        lines = linecache.getlines(filename)
        key = hash(tuple(lines))
        known = self._files.get(filename)
        if known is not None and known[0] == key:
            return known[1]
        found: dict[int, list[Any]] = {}
        try:
            tree = ast.parse("".join(lines))
        except (SyntaxError, ValueError, RecursionError):
            tree = ast.Module([], [])
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
                decorators = getattr(node, "decorator_list", [])
                line = min([node.lineno, *(d.lineno for d in decorators)])
                found.setdefault(line, []).append(node)
        self._files[filename] = key, found
        return found


def _name_of(node: Any) -> str:
    return "<lambda>" if isinstance(node, ast.Lambda) else node.name


def _arguments(node: Any) -> tuple[str, ...]:
    a = node.args
    extra = [x.arg for x in (a.vararg, a.kwarg) if x is not None]
    return tuple([x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)] + extra)


def _code_arguments(code: CodeType) -> tuple[str, ...]:
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
    return code.co_varnames[:count]


def _holds(node: Any, code: CodeType) -> bool:
    """Do the code's instructions lie within the node, and not within a function inside it?"""
    body = node.body if isinstance(node, ast.Lambda) else node
    places = [p for p in code.co_positions() if p[0] is not None and p[2] is not None and p[3]]
    if not places:
        return False
    first, last = (body.lineno, body.col_offset), (body.end_lineno, body.end_col_offset)
    spans = [((p[0], p[2]), (p[1], p[3])) for p in places]
    if not all(first <= start and end <= last for start, end in spans):
        return False
    return max(end for _, end in spans) == last or not isinstance(node, ast.Lambda)


# ---------------------------------------------------------------- normal form


class _Normal(ast.NodeTransformer):
    """Takes away what has no meaning, in place."""

    def visit_FunctionDef(self, node: Any) -> Any:
        node.returns = None
        node.type_comment = None
        _drop_docstring(node)
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        _drop_docstring(node)
        return self.generic_visit(node)

    def visit_Module(self, node: ast.Module) -> Any:
        _drop_docstring(node)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> Any:
        node.annotation = None
        node.type_comment = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if node.value is None:  # a field's name matters (dataclasses), its type does not
            return ast.Expr(node.target)
        return self.generic_visit(ast.Assign([node.target], node.value, lineno=0))


def _drop_docstring(node: Any) -> None:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        node.body = node.body[1:] or [ast.Pass()]


class _Masked(ast.NodeTransformer):
    """Hides string literals that are secrets. shown: also those that only look like one. hid: there was one."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.hid = False

    def visit_Constant(self, node: ast.Constant) -> Any:
        value = node.value
        if isinstance(value, bytes):
            value = value.decode("latin-1")
        if isinstance(value, str) and (redact(value) != value or (self.shown and looks_secret(value))):
            return self._hidden()
        return node

    def visit_Assign(self, node: ast.Assign) -> Any:
        names = [t.id if isinstance(t, ast.Name) else t.attr if isinstance(t, ast.Attribute) else "" for t in node.targets]
        return self._named(node, names)

    def visit_keyword(self, node: ast.keyword) -> Any:
        return self._named(node, [node.arg or ""])

    def _named(self, node: Any, names: list[str]) -> Any:
        if _is_text(node.value) and any(map(is_secret_name, names)):
            node.value = self._hidden()
            return node
        return self.generic_visit(node)

    def visit_arguments(self, node: ast.arguments) -> Any:
        positional = [*node.posonlyargs, *node.args]
        pairs = [(positional[len(positional) - len(node.defaults) + i], node.defaults, i) for i in range(len(node.defaults))]
        pairs += [(a, node.kw_defaults, i) for i, a in enumerate(node.kwonlyargs)]
        for parameter, defaults, i in pairs:
            if is_secret_name(parameter.arg) and _is_text(defaults[i]):
                defaults[i] = self._hidden()
        return self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> Any:
        for i, key in enumerate(node.keys):
            named = isinstance(key, ast.Constant) and isinstance(key.value, str) and is_secret_name(key.value)
            if named and _is_text(node.values[i]):
                node.values[i] = self._hidden()
        return self.generic_visit(node)

    def _hidden(self) -> ast.Constant:
        self.hid = True
        return ast.Constant(HIDDEN)


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


def _normal(node: Any) -> Any:
    """The node's normal form, in a copy (which pickle makes three times as quickly as copy does)."""
    copied = pickle.loads(pickle.dumps(node, pickle.HIGHEST_PROTOCOL))
    return ast.fix_missing_locations(_Masked(False).visit(_Normal().visit(copied)))


def _digest_and_text(node: Any) -> tuple[str, str]:
    """Of the normal form; and that form to show, "" when it is too long."""
    normal = _normal(node)
    text = shown = ast.unparse(normal)
    if len(text) > TEXT_CHARS:
        return _digest(text), ""
    masked = _Masked(True)
    masked.visit(normal)
    if masked.hid:
        shown = ast.unparse(ast.fix_missing_locations(normal))
    return _digest(text), redact(shown)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


# ---------------------------------------------------------------- code


class Codes:
    """Code of functions and classes as it is now: each is looked at once.

    before: what it has found by code object and source is used again, so that a second plan with the same ones costs little.
    What is remembered by a node's id holds the node, so that the id stays its own.
    """

    def __init__(self, before: Codes | None = None) -> None:
        self.sources = Sources(None if before is None else before.sources)
        self._functions: dict[tuple[CodeType, int], tuple[Any, Code]] = {} if before is None else before._functions
        # Without what their functions say.
        self._classes: dict[int, tuple[Any, Code]] = {} if before is None else before._classes
        self._now: dict[FunctionType | type, Code] = {}

    def of_function(self, function: FunctionType) -> Code:
        now = self._now.get(function)
        if now is None:
            now = self._now[function] = self._of_function(function)
        return now

    def of_class(self, cls: type) -> Code:
        now = self._now.get(cls)
        if now is None:
            now = self._now[cls] = self._of_class(cls)
        return now

    def _of_function(self, function: FunctionType) -> Code:
        code = function.__code__
        node = self.sources.function(code)
        known = self._functions.get((code, id(node)))
        if known is None:
            if len(self._functions) > 10_000:
                self._functions.clear()
            known = self._functions[code, id(node)] = node, _function_code(code, node, function.__globals__)
        return known[1]

    def _of_class(self, cls: type) -> Code:
        node = self.sources.class_(cls)
        named = sorted(functions_of(cls))
        parts = [self.of_function(f) for _, f in named]
        if node is None:
            digests = [(name, part.digest) for (name, _), part in zip(named, parts, strict=True)]
            own = Code(_digest(repr(digests)), "", (), (), frozenset())
        else:
            own = self._of_class_node(node)
        reads = tuple(sorted({r for p in parts for r in p.reads}))
        imports = tuple(sorted({i for p in parts for i in p.imports}))
        return replace(own, reads=reads, imports=imports, scratch=frozenset(s for p in parts for s in p.scratch))

    def _of_class_node(self, node: Any) -> Code:
        known = self._classes.get(id(node))
        if known is None:
            if len(self._classes) > 10_000:
                self._classes.clear()
            digest, text = _digest_and_text(node)
            code = Code(digest, text, (), (), frozenset(), _assigned(node), scratch_attributes(node))
            known = self._classes[id(node)] = node, code
        return known[1]


def functions_of(cls: type) -> Iterator[tuple[str, FunctionType]]:
    """The functions in a class's body, by name."""
    for name, value in vars(cls).items():
        for part, f in _parts(value):
            if isinstance(f, FunctionType) and f.__qualname__.startswith(cls.__qualname__ + "."):
                yield name + part, f


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, property):
        yield from ((".get", value.fget), (".set", value.fset), (".del", value.fdel))
    elif isinstance(value, staticmethod | classmethod):
        yield "", value.__func__
    else:
        yield "", getattr(value, "__wrapped__", value)


def _function_code(code: CodeType, node: Any, names: dict[str, Any]) -> Code:
    if node is not None:
        digest, shown = _digest_and_text(node)
    else:
        digest, shown = _digest(f"python {sys.version_info[:2]} {_code_text(code)}"), ""
    reads: set[Chain] = set()
    imports: set[str] = set()
    stored: set[str] = set()
    for part in _nested(code):
        _scan(part, str(names.get("__package__") or ""), reads, imports, stored)
    return Code(digest, shown, tuple(sorted(reads)), tuple(sorted(imports)), frozenset(stored | _changed(node)))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _scan(code: CodeType, package: str, reads: set[Chain], imports: set[str], stored: set[str]) -> None:
    """Globals that a code object reads, with the attributes read of them; what it imports and stores."""
    chain: list[str] | None = None
    level = 0
    for step in dis.get_instructions(code):
        name = step.opname
        if chain is not None:
            if name in ("LOAD_ATTR", "LOAD_METHOD"):
                chain.append(step.argval)
                continue
            reads.add(tuple(chain))
            chain = None
        if name in ("LOAD_GLOBAL", "LOAD_NAME") and not hasattr(builtins, step.argval):
            chain = [step.argval]
        elif name in ("LOAD_GLOBAL", "LOAD_NAME"):
            reads.add((step.argval,))  # maybe shadowed: whoever looks it up sees
        elif name in ("STORE_GLOBAL", "STORE_DEREF"):
            stored.add(step.argval)
        elif name == "LOAD_CONST" and isinstance(step.argval, int):
            level = step.argval
        elif name == "IMPORT_NAME":
            try:
                imports.add(importlib.util.resolve_name("." * level + step.argval, package) if level else step.argval)
            except ImportError:
                imports.add(step.argval)
            level = 0
        elif name not in ("LOAD_CONST", "EXTENDED_ARG"):
            level = 0
    if chain is not None:
        reads.add(tuple(chain))


def _code_text(code: CodeType) -> str:
    """What a code object does, the same in every process of one version of Python."""
    return repr(
        (
            code.co_code,
            code.co_names,
            code.co_varnames,
            code.co_freevars,
            code.co_flags,
            [_constant(c) for c in code.co_consts[_doc(code) :]],
        )
    )


def _doc(code: CodeType) -> int:
    """How many of the first constants are the docstring."""
    return int(bool(code.co_consts) and isinstance(code.co_consts[0], str) and code.co_name != "<lambda>")


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _code_text(value)
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    return HIDDEN if isinstance(value, str) and redact(value) != value else value


# ---------------------------------------------------------------- what code changes


def _changed(node: Any) -> frozenset[str]:
    """Names whose values the code changes in place: x[...] = , x.a = , x.append(...), global x."""
    if node is None:
        return frozenset()
    out: set[str] = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Global | ast.Nonlocal):
            out.update(n.names)
        elif isinstance(n, ast.Subscript | ast.Attribute) and isinstance(n.ctx, ast.Store | ast.Del):
            out.add(_base(n))
        elif isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in _MUTATORS:
            out.add(_base(n.func))
    return frozenset(out - {"", "self", "cls"})


def _base(node: Any) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _assigned(node: Any) -> frozenset[str]:
    """Attributes, of whatever, that the code sets."""
    return frozenset(n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))


def scratch_attributes(node: Any) -> frozenset[str]:
    """Attributes of an instance that its call (`__call__`, `stream`, and the methods that these call) sets or changes."""
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    waiting = [m for m in ("__call__", "stream") if m in methods]
    seen: set[str] = set()
    out: set[str] = set()
    while waiting:
        method = methods[waiting.pop()]
        seen.add(method.name)
        first = method.args.args[0].arg if method.args.args else ""
        for n in ast.walk(method):
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute):
                if isinstance(n.func.value, ast.Name) and n.func.value.id == first and n.func.attr in methods:
                    waiting += [n.func.attr] if n.func.attr not in seen else []
                elif n.func.attr in _MUTATORS:
                    out.add(_attribute(n.func.value, first))
            elif isinstance(n, ast.Subscript | ast.Attribute) and isinstance(n.ctx, ast.Store | ast.Del):
                out.add(_attribute(n, first))
    return frozenset(out - {""})


def _attribute(node: Any, first: str) -> str:
    """The attribute of `first` that an expression begins with: "x" for self.x.y[0]."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == first:
            return node.attr
        node = node.value
    return ""
