"""What a value says: arguments, closures, globals, models, parts of a plan, as JSON that is the same in every process.

Numbers and texts stand for themselves; what is large stands as a digest of its content; objects are their type and state; code
of the user's is in `Describer.code`, by name. Secrets are "(hidden)" and of no meaning. What has no stable content (locks,
loggers, connections, generators of random numbers) is its type's name, "not compared"; so are devices and numbers of threads.

Nothing is imported for this: a value can only be of a package that is loaded. Files that arguments name are read.
"""

# pyright: basic
from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import math
import os
import re
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

from headrace.core.extras import is_instance
from headrace.core.redact import is_secret_name, looks_secret, redact
from headrace.plan.fingerprint.code import Codes, functions_of, is_own, is_own_file

HIDDEN = "(hidden)"
NOT_COMPARED = "(not compared)"
LONG_CHARS = 300  # of texts and of small containers that are shown as they are
MANY = 200  # items; more are a digest
DEPTH = 40
WHOLE_FILE_BYTES = 64 << 20
PIECE_BYTES = 1 << 20
PIECES = 16
FOLDER_FILES = 1000

_READ_BYTES = 4 << 20
_CODES = Codes()  # what plans before have found
# fmt: off
_UNSTABLE = frozenset((
    "_asyncio", "_contextvars", "_io", "_queue", "_random", "_socket", "_ssl", "_thread", "_weakref", "asyncio",
    "concurrent", "contextvars", "io", "logging", "multiprocessing", "queue", "random", "selectors", "socket",
    "sqlite3", "ssl", "subprocess", "tempfile", "threading", "weakref",
))
# fmt: on
_BASES = (str, bytes, int, float, list, tuple, set, frozenset, dict)  # of types that add to them, such as named tuples
_BY_TEXT = frozenset(["datetime", "decimal", "fractions", "uuid", "ipaddress", "zoneinfo", "pathlib"])
_DEVICE = re.compile(r"(?:auto|cpu|cuda|mps|xpu|sim)(?::\d+)?")
_RESOURCES = frozenset(
    ("n_jobs", "n_threads", "nthread", "num_threads", "num_workers", "max_workers", "verbose", "progress_bar")
)
_SCRATCH_FILES = (".log", ".lock", ".tmp", ".pid", ".db", ".sqlite", ".out", ".err")
# fmt: off
_SCRATCH_NAMES = frozenset((
    "cache", "tmp", "temp", "log", "logs", "out", "output", "outputs", "dest", "destination", "scratch", "work",
    "workdir", "marker", "flag",
))
# fmt: on


def digest(*parts: Any) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, bytes | memoryview) else str(part).encode("utf-8", "surrogatepass"))
    return h.hexdigest()[:32]


def digest_json(value: Any) -> str:
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":")))


class Describer:
    """Describes the values of one step. code: of the user's functions and classes met on the way, by qualified name.

    packages: top-level packages that were met, for information. destination: a folder that holds it is no model.
    """

    def __init__(self, destination: str = "") -> None:
        self.code: dict[str, dict[str, Any]] = {}
        self.packages: set[str] = set()
        self._labels: dict[int, str] = {}
        self._uses: dict[str, int] = {}  # of a name, as a label
        self._alive: list[Any] = []  # so that ids stay those of one object
        self._under_way: dict[int, int] = {}
        self._codes = Codes(_CODES)
        self._destination = os.path.abspath(destination) if destination and "://" not in destination else ""

    # ---------------------------------------------------------------- values

    def value(self, value: Any, *, name: str = "", argument: bool = False, depth: int = 0) -> Any:
        """JSON of a value. name: of the variable or parameter that holds it. argument: a folder that it names is read, too."""
        kind: Any = type(value)
        if is_secret_name(name) and _may_be_secret(value):
            return HIDDEN
        if _is_resource(name, value):
            return NOT_COMPARED
        if value is None or kind is bool:
            return value
        if kind is int:
            return value if abs(value) < 1 << 53 else str(value)
        if kind is float:
            return value if math.isfinite(value) else f"float {value}"
        if kind is str:
            return self._text(value, name, argument)
        if kind is bytes or kind is bytearray:
            return f"{len(value)} bytes, digest {digest(bytes(value))}"
        if depth > DEPTH:
            return f"{_type_name(kind)} {NOT_COMPARED}"
        if id(value) in self._under_way:
            return f"(again, {depth - self._under_way[id(value)]} up)"
        self._under_way[id(value)] = depth
        try:
            return self._composite(value, name, argument, depth + 1)
        finally:
            del self._under_way[id(value)]

    def named(self, values: Iterable[tuple[str, Any]], *, argument: bool = False, depth: int = 0) -> dict[str, Any]:
        return {k: self.value(v, name=k, argument=argument, depth=depth) for k, v in sorted(values)}

    def _text(self, text: str, name: str, argument: bool) -> Any:
        hidden = redact(text)
        if hidden != text:
            return hidden
        if looks_secret(text):
            return f"{HIDDEN}, digest {digest(text)}"
        found = self._file(text, name, argument)
        if found is not None:
            return found
        return text if len(text) <= LONG_CHARS else f"{text[:60]}... ({len(text)} characters, digest {digest(text)})"

    def _composite(self, value: Any, name: str, argument: bool, depth: int) -> Any:
        kind = type(value)
        if kind in (list, tuple):
            return self._items(value, name, argument, depth)
        if kind in (set, frozenset):
            items = [self.value(v, depth=depth) for v in value]
            return _small({"(set)": sorted(items, key=lambda x: json.dumps(x, sort_keys=True))}, len(value))
        if isinstance(value, Mapping) and (kind is dict or kind.__module__ in ("collections", "builtins", "types")):
            return self._mapping(value, argument, depth)
        if isinstance(value, enum.Enum):
            return f"{kind.__name__}.{value.name}"
        if isinstance(value, types.ModuleType):
            return self._module(value)
        if isinstance(value, type) or _is_code(value):
            return self._callable(value, depth)
        try:
            found = self._known(value, kind, name, argument, depth)
            return found if found is not None else self._object(value, depth)
        except Exception:  # of code that is not ours: a property, __reduce__, state_dict
            return f"{_type_name(kind)} {NOT_COMPARED}"

    def _items(self, value: Any, name: str, argument: bool, depth: int) -> Any:
        if len(value) > MANY:
            return f"{type(value).__name__} of {len(value)}, digest {self._stream(value, depth)}"
        return _small([self.value(v, name=name, argument=argument, depth=depth) for v in value], len(value))

    def _mapping(self, value: Mapping[Any, Any], argument: bool, depth: int) -> Any:
        if len(value) > MANY:
            pairs = sorted(value.items(), key=lambda kv: (str(type(kv[0])), str(kv[0])))
            return f"dict of {len(value)}, digest {self._stream(pairs, depth)}"
        out: dict[str, Any] = {}
        for k, v in value.items():
            key = k if isinstance(k, str) else json.dumps(self.value(k, depth=depth), sort_keys=True)
            out[redact(key)] = self.value(v, name=key, argument=argument, depth=depth)
        return _small({k: out[k] for k in sorted(out)}, len(out))

    def _stream(self, values: Iterable[Any], depth: int) -> str:
        try:
            return digest(json.dumps(values))  # the usual case, a vocabulary or weights, in C
        except (TypeError, ValueError):
            pass
        h = hashlib.sha256()
        for v in values:
            h.update(json.dumps(self.value(v, depth=depth), sort_keys=True).encode())
        return h.hexdigest()[:32]

    # ---------------------------------------------------------------- types known by name

    def _known(self, value: Any, kind: type, name: str, argument: bool, depth: int) -> Any:
        top = kind.__module__.partition(".")[0]
        if top == "numpy":
            return self._numpy(value, depth)
        if top == "pyarrow":
            return _arrow(value)
        if top == "pandas":
            return _pandas(value)
        if is_instance(value, "torch", "Tensor"):
            return _tensor(value)
        if is_instance(value, "torch.nn", "Module"):
            return self._torch_module(value, depth)
        if isinstance(value, os.PathLike):
            return self._text(os.fspath(value), name, argument) if isinstance(os.fspath(value), str) else str(value)
        if top in _BY_TEXT or kind in (complex, range, slice):
            return f"{kind.__name__} {value!s}"
        if isinstance(value, re.Pattern):
            return f"pattern {redact(repr(value.pattern))} {value.flags}"
        if kind is memoryview:
            return f"{value.nbytes} bytes, digest {digest(value.tobytes())}"
        if (
            (top in _UNSTABLE and not isinstance(value, functools.partial))
            or "Generator" in kind.__name__
            or kind.__name__ == "RandomState"
        ):
            return f"{_type_name(kind)} {NOT_COMPARED}"
        return None

    def _numpy(self, value: Any, depth: int) -> Any:
        np = sys.modules["numpy"]
        if isinstance(value, np.ndarray):
            content = _array_digest(np, value) if not value.dtype.hasobject else self._stream(value.ravel().tolist(), depth)
            return f"array {value.dtype} {value.shape}, digest {content}"
        if isinstance(value, np.generic):
            item = value.item()
            return f"{value.dtype} {value!s}" if isinstance(item, np.generic) else self.value(item, depth=depth)
        if isinstance(value, np.dtype):
            return f"dtype {value!s}"
        if isinstance(value, np.random.Generator | np.random.BitGenerator | np.random.RandomState):
            return f"{_type_name(type(value))} {NOT_COMPARED}"
        return f"numpy.{value.__name__}" if isinstance(value, np.ufunc) else None

    def _torch_module(self, value: Any, depth: int) -> Any:
        h = hashlib.sha256(repr(value).encode())
        for key, tensor in sorted(value.state_dict().items()):
            h.update(f"{key} {_tensor(tensor) if hasattr(tensor, 'shape') else tensor!r}\n".encode())
        out: dict[str, Any] = {"(object)": _type_name(type(value)), "weights": f"digest {h.hexdigest()[:32]}"}
        for name, part in value.named_modules():
            self._met(type(part).__module__)
            if is_own(type(part).__module__):
                self._type(type(part), depth)
                plain = ((k, v) for k, v in vars(part).items() if not k.startswith("_") and k != "training")
                if state := self.named(plain, depth=depth):
                    out.setdefault("state", {})[name or "."] = state
        return out

    # ---------------------------------------------------------------- files

    def _file(self, text: str, name: str, argument: bool) -> Any:
        """The path and the digest of its content, for a text that names a file (or, among arguments, a folder)."""
        if not 0 < len(text) < 4096 or "\0" in text or "\n" in text or "://" in text or not ("/" in text or "." in text):
            return None
        words = set(re.findall(r"[a-z]+", name.lower()))
        if words & _SCRATCH_NAMES or text.endswith(_SCRATCH_FILES):
            return None
        try:
            if os.path.isfile(text):
                size = os.path.getsize(text)
                return {"(file)": text, "content": file_digest(text)} if size else text
            if argument and text not in (".", "..", "/") and os.path.isdir(text) and not self._holds_destination(text):
                content = folder_digest(text)
                return {"(folder)": text, "content": content} if content else text
        except OSError:
            return text
        return None

    def _holds_destination(self, folder: str) -> bool:
        """Does it lie above or below the destination? Then its content changes while we run."""
        here, there = os.path.abspath(folder) + os.sep, self._destination + os.sep
        return bool(self._destination) and (there.startswith(here) or here.startswith(there))

    # ---------------------------------------------------------------- objects

    def _object(self, value: Any, depth: int) -> Any:
        kind = type(value)
        meaning = getattr(kind, "meaning", None)
        if callable(meaning):
            return {"(object)": _type_name(kind), "state": self.value(dict(value.meaning()), depth=depth)}
        own = is_own(kind.__module__)
        if not own:
            self._met(kind.__module__)
        version = _version(value)
        label = self._type(kind, depth) if version is None else kind.__qualname__
        out: dict[str, Any] = {"(object)": label if own else _type_name(kind)}
        if version is not None:
            out["version"] = version
            return out
        scratch: frozenset[str] = frozenset()
        for base in kind.__mro__ if own else ():
            if is_own(base.__module__) and base is not object:
                scratch |= self._codes.of_class(base).changed
        state = self._state(value, own, scratch, depth)
        if state is not None and state != {}:
            out["state"] = state
        base: Any = next((b for b in _BASES if isinstance(value, b)), None)
        if base is not None:
            out["value"] = self.value(base(value), depth=depth)
        return out

    def _state(self, value: Any, own: bool, scratch: frozenset[str], depth: int) -> Any:
        kind: Any = type(value)
        if dataclasses.is_dataclass(kind) or kind.__getstate__ is object.__getstate__:
            attributes = _attributes(value)
            if attributes or own:
                kept = {k: v for k, v in attributes.items() if k not in scratch}
                return self.named(kept.items(), argument=True, depth=depth)
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:  # whatever a foreign type raises when it can't be pickled
            attributes = getattr(value, "__dict__", None)
            return NOT_COMPARED if not attributes else self.named(attributes.items(), depth=depth)
        if isinstance(reduced, str):
            return reduced
        parts = [list(p) if i > 2 and p is not None else p for i, p in enumerate(reduced[:5])]
        state = parts[2] if len(parts) > 2 else None
        if isinstance(state, Mapping):  # what library version wrote it has no meaning
            parts[2] = {k: v for k, v in state.items() if k not in scratch and not str(k).endswith("_version")}
        # copyreg's own constructors name the type, which is told already.
        arguments = [a for a in parts[1] if not isinstance(a, type)] if isinstance(parts[1], tuple) else parts[1]
        return _small([self.value(p, depth=depth) for p in (arguments, *parts[2:]) if p not in (None, [], ())], 0)

    # ---------------------------------------------------------------- code

    def _module(self, module: types.ModuleType) -> Any:
        if not is_own(module.__name__):
            self._met(module.__name__)
            return f"module {module.__name__}"
        return {"(module)": module.__name__, "digest": self._codes.sources.module_digest(module.__name__)}

    def _callable(self, value: Any, depth: int) -> Any:
        if isinstance(value, functools.partial):
            inner = self.value(value.func, depth=depth)
            kwargs = self.named(value.keywords.items(), argument=True, depth=depth)
            return {"(partial)": inner, "args": self.value(list(value.args), argument=True, depth=depth), "kwargs": kwargs}
        if isinstance(value, types.MethodType):
            label = self._function(value.__func__, depth)
            return {"(method)": label, "of": self.value(value.__self__, depth=depth)}
        if isinstance(value, type):
            return {"(class)": self._type(value, depth)}
        wrapped = getattr(value, "__wrapped__", None)
        if not isinstance(value, types.FunctionType) and isinstance(wrapped, types.FunctionType):  # functools.lru_cache
            return {"(function)": self._function(wrapped, depth)}
        if isinstance(value, types.FunctionType):
            return {"(function)": self._function(value, depth)}
        owner = getattr(value, "__self__", None)  # a method of a built-in type
        out = f"{getattr(value, '__module__', None) or 'builtins'}.{getattr(value, '__qualname__', '')}"
        if owner is None or isinstance(owner, types.ModuleType):
            return out
        return {"(method)": out, "of": self.value(owner, depth=depth)}

    def _function(self, function: types.FunctionType, depth: int) -> str:
        """The label under which the function's code is described."""
        if not is_own(function.__module__) and not _made_here(function):
            self._met(function.__module__)
            return f"{function.__module__}.{function.__qualname__}"
        wraps = not is_own_file(function.__code__.co_filename)  # made by a library's decorator, which the source names
        wrapped = getattr(function, "__wrapped__", None)
        if wraps and isinstance(wrapped, types.FunctionType) and _version(function) is None:
            return self._function(wrapped, depth)
        # A decorator's wrapper bears the name of what it wraps, which is the one that people know by it.
        name = function.__qualname__ if wrapped is None else function.__code__.co_qualname
        label, new = self._label(function, _plain(name))
        if not new:
            return label
        entry = self.code[label] = {}
        version = _version(function)
        if version is not None:
            entry["version"] = version
            return label
        code = self._codes.of_function(function)
        entry["digest"] = function.__code__.co_name if wraps else code.digest
        if code.text and not wraps:
            entry["text"] = code.text
        defaults = dict(_defaults(function))
        closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        cells = {n: v for n, c in closure.items() if n != "__class__" and (v := _content(c)) is not _EMPTY}
        if base := closure.get("__class__"):  # of methods that call super()
            cells.pop("__class__", None)
            if isinstance(_content(base), type):
                self._type(_content(base), depth)
        self._add(
            entry, "defaults", self.named(((k, v) for k, v in defaults.items() if k not in code.scratch), depth=depth + 1)
        )
        self._add(entry, "closure", self.named(((k, v) for k, v in cells.items() if k not in code.scratch), depth=depth + 1))
        self._add(entry, "globals", {} if wraps else self._globals(code, function.__globals__, depth + 1))
        return label

    def _type(self, cls: type, depth: int) -> str:
        """The label under which the class's code is described; its name when it is not the user's."""
        if not is_own(cls.__module__):
            self._met(cls.__module__)
            return _type_name(cls)
        label, new = self._label(cls, _plain(cls.__qualname__))
        if not new:
            return label
        entry = self.code[label] = {}
        version = _version(cls)
        if version is not None:
            entry["version"] = version
            return label
        code = self._codes.of_class(cls)
        entry["digest"] = code.digest
        if code.text:
            entry["text"] = code.text
        bases = [self._type(b, depth) for b in cls.__bases__ if b is not object]
        self._add(entry, "bases", bases)
        functions = [f for _, f in sorted(functions_of(cls))]
        reads: dict[str, Any] = {}
        closure: dict[str, Any] = {}
        for f in functions:
            own = self._codes.of_function(f)
            reads |= self._globals(own, f.__globals__, depth + 1)
            for n, c in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
                if n != "__class__" and n not in own.scratch and _content(c) is not _EMPTY:
                    closure[n] = self.value(_content(c), name=n, depth=depth + 1)
        self._add(entry, "closure", closure)
        self._add(entry, "globals", {k: reads[k] for k in sorted(reads)})
        self._add(entry, "attributes", self._class_values(cls, code, depth + 1))
        return label

    def _class_values(self, cls: type, code: Any, depth: int) -> dict[str, Any]:
        """Values in the class's body that are computed when it is defined."""
        changed = code.scratch | code.assigned
        out: dict[str, Any] = {}
        for name, value in sorted(vars(cls).items()):
            skipped = name.startswith(("__", "_abc_")) or name in changed or name == "headrace_version"
            if skipped or callable(value) or hasattr(value, "__get__"):
                continue
            out[name] = self.value(value, name=name, depth=depth)
        return out

    def _globals(self, code: Any, names: Mapping[str, Any], depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for chain in code.reads:
            name = chain[0]
            if name not in names or name in code.scratch or name.startswith("__"):
                continue
            value, used = names[name], list(chain[1:])
            shown = name
            while isinstance(value, types.ModuleType) and is_own(value.__name__) and used and hasattr(value, used[0]):
                shown = f"{shown}.{used[0]}"
                value = getattr(value, used.pop(0))
            if _is_logger(value):
                continue
            out[shown] = self.value(value, name=shown.rpartition(".")[2], depth=depth)
        for module in code.imports:
            top = module.partition(".")[0]
            if top in sys.stdlib_module_names or top == "headrace":
                continue
            if is_own(module) and (found := self._codes.sources.module_digest(module)):
                out[f"import {module}"] = found
            else:
                self._met(module)
        return {k: out[k] for k in sorted(out)}

    def _label(self, key: Any, name: str) -> tuple[str, bool]:
        """(label, it is new). Functions made several times from one definition are told apart: closures may differ."""
        known = self._labels.get(id(key))
        if known is not None:
            return known, False
        n = self._uses[name] = self._uses.get(name, 0) + 1
        label = name if n == 1 else f"{name}#{n}"
        self._labels[id(key)] = label
        self._alive.append(key)
        return label, True

    def _met(self, module: str | None) -> None:
        top = (module or "").partition(".")[0]
        if top and top not in sys.stdlib_module_names and top not in ("headrace", "__main__", "builtins"):
            self.packages.add(top)

    @staticmethod
    def _add(entry: dict[str, Any], key: str, value: Any) -> None:
        if value:
            entry[key] = value


class _Empty:
    pass


_EMPTY = _Empty()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return _EMPTY


def _defaults(function: types.FunctionType) -> Iterable[tuple[str, Any]]:
    code = function.__code__
    values = function.__defaults__ or ()
    yield from zip(code.co_varnames[code.co_argcount - len(values) : code.co_argcount], values, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


def _plain(qualname: str) -> str:
    return qualname.replace("<locals>.", "")


def _is_code(value: Any) -> bool:
    kinds = types.FunctionType | types.MethodType | types.BuiltinFunctionType | types.MethodWrapperType | functools.partial
    return isinstance(value, kinds) or isinstance(getattr(value, "__wrapped__", None), types.FunctionType)


def _made_here(function: types.FunctionType) -> bool:
    """A wrapper that a library's decorator made of the user's function: its closure holds what matters."""
    return any(isinstance(c, types.FunctionType) and is_own(c.__module__) for c in map(_content, function.__closure__ or ()))


def _version(value: Any) -> str | None:
    """What the user says instead of code."""
    found = getattr(value, "headrace_version", None)
    return str(found) if isinstance(found, str | int) else None


def _attributes(value: Any) -> dict[str, Any]:
    """Of an object, in its __dict__ or in slots."""
    slots = [n for base in type(value).__mro__ for n in _slot_names(base)]
    return {n: getattr(value, n) for n in slots if hasattr(value, n)} | dict(getattr(value, "__dict__", {}))


def _slot_names(base: type) -> Iterable[str]:
    slots = vars(base).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return (n for n in names if not n.startswith("__"))


def _is_resource(name: str, value: Any) -> bool:
    """Where or how quickly it is computed: a device, a number of threads. May change while a run is under way."""
    if name.lstrip("_") in ("device", "devices", "device_map"):
        text = value if isinstance(value, str) else str(value) if type(value).__module__ == "torch" else None
        return value is None or type(value) is int or (text is not None and _DEVICE.fullmatch(text) is not None)
    return name.lstrip("_") in _RESOURCES and (value is None or type(value) in (int, bool))


def _may_be_secret(value: Any) -> bool:
    return type(value) not in (bool, int, float) and not callable(value)


def _is_logger(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "logging"


def _type_name(kind: type) -> str:
    """Our own parts by their names alone: they may move between modules."""
    module = kind.__module__
    plain = module.partition(".")[0] == "headrace" or module in ("builtins", "__main__") or is_own(module)
    return kind.__qualname__ if plain else f"{module}.{kind.__qualname__}"


def _small(value: Any, items: int) -> Any:
    """The value, or its digest when it is too long to read."""
    if len(json.dumps(value)) <= LONG_CHARS * 8:
        return value
    return f"{items or len(value)} items, digest {digest_json(value)}"


# ---------------------------------------------------------------- contents


def _array_digest(np: Any, array: Any) -> str:
    if array.dtype.names:  # field by field: the gaps between fields hold anything
        return digest(*(f"{n} {_array_digest(np, array[n])}" for n in array.dtype.names))
    return digest(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))) if array.size else digest("")


def _tensor(tensor: Any) -> str:
    torch = sys.modules["torch"]
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.dtype is torch.bool:
        flat = flat.to(torch.uint8)
    content = digest(memoryview(flat.view(torch.uint8).numpy())) if flat.numel() else digest("")
    return f"tensor {tensor.dtype} {tuple(tensor.shape)}, digest {content}"


class _Hashing:
    """A file that is only digested."""

    closed = False

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._at = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.hash.update(view)
        self._at += len(view)
        return len(view)

    def tell(self) -> int:
        return self._at

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


def _arrow(value: Any) -> Any:
    pa = sys.modules["pyarrow"]
    if isinstance(value, pa.RecordBatch):
        value = pa.Table.from_batches([value])
    if isinstance(value, pa.Array):
        value = pa.chunked_array([value])
    if isinstance(value, pa.ChunkedArray):
        value = pa.table({"values": value})
    if not isinstance(value, pa.Table):
        return f"{type(value).__name__} {redact(str(value))}"
    out = _Hashing()
    with pa.ipc.new_stream(pa.PythonFile(out, mode="w"), value.schema) as writer:
        writer.write_table(value)
    return f"table of {value.num_rows} rows, columns {value.schema.names}, digest {out.hash.hexdigest()[:32]}"


def _pandas(value: Any) -> Any:
    pd = sys.modules["pandas"]
    frame = value.to_frame() if isinstance(value, pd.Series | pd.Index) else value
    if not isinstance(frame, pd.DataFrame):
        return f"{type(value).__name__} {value!s}"
    columns = [f"{c} {d}" for c, d in zip(frame.columns, frame.dtypes, strict=True)]
    try:
        hashes = pd.util.hash_pandas_object(frame, index=True).to_numpy()
    except TypeError:  # cells that can't be hashed
        hashes = frame.astype(str).to_csv().encode()
    return f"{type(value).__name__} of {len(frame)} rows, columns {columns}, digest {digest(memoryview(hashes).cast('B'))}"


def file_digest(path: str) -> str:
    """SHA-256 of a file's content; of a large one its size and pieces from all over it."""
    size = os.path.getsize(path)
    h = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        if size <= WHOLE_FILE_BYTES:
            while data := file.read(_READ_BYTES):
                h.update(data)
            return f"sha256 {h.hexdigest()[:32]}"
        h.update(str(size).encode())
        for i in range(PIECES):
            file.seek((size - PIECE_BYTES) * i // (PIECES - 1))
            h.update(file.read(PIECE_BYTES))
    return f"{size} bytes, sampled {h.hexdigest()[:32]}"


def folder_digest(path: str) -> str:
    """Of all files in a folder by name and content; "" for an empty folder, or one of so many files that it is no model."""
    found: list[str] = []
    for top, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__pycache__")))
        found += [os.path.join(top, f) for f in sorted(files) if os.path.isfile(os.path.join(top, f))]
        if len(found) > FOLDER_FILES:
            return ""
    parts = [f"{os.path.relpath(f, path)} {file_digest(f)}\n" for f in found]
    return f"{len(found)} files, digest {digest(*parts)}" if parts else ""
