"""Batch sizes that were found for models, remembered for later workers and runs. What a short search found is remembered in
this process alone, and is where the next one goes on.

A size is only where a search begins: nothing that is here or is missing changes an answer. So trouble with the file (not there,
not to be read or written, not what it should be) is passed over, and a race between two processes may lose an entry.

The file is `batch-sizes.json` in the cache folder: {"version": 1, "sizes": {"<model> on <device>, <row>": rows, ...}}, the
newest last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
from types import CodeType
from typing import Any, cast

import pyarrow as pa

from headrace.contracts.model import ModelAdapter
from headrace.plan.nodes import UserFunction
from headrace.worker.tuning import MAX_ROWS

FILE = "batch-sizes.json"
VERSION = 1
MOST_ENTRIES = 1000
LEAST_S = 2.0  # of batches measured: a shorter search says too little to be kept
SHORT_MOST = 4096  # rows, of a short search: models of one name may differ in what a row costs

_LOCK = threading.Lock()
_known: dict[str, dict[str, int]] = {}  # path -> the sizes
_short: dict[str, int] = {}  # of short searches


def key_of(model: UserFunction, device: str, schema: pa.Schema) -> str:
    """What a size was found for: the model by its name, the device by its type, the row by its columns' types."""
    row = ", ".join(str(t) for t in schema.types)
    if len(row) > 200:
        row = hashlib.blake2b(row.encode(), digest_size=8).hexdigest()
    return f"{_model_name(model)} on {_device_name(device)}, {row}"


def recall(key: str) -> int | None:
    """The size that was found for this, by a worker of this process or an earlier run."""
    with _LOCK:
        return _sizes(_path()).get(key)


def recall_short(key: str) -> int | None:
    """Where the last search in this process was that was too short to end."""
    with _LOCK:
        return _short.get(key)


def remember_short(key: str, rows: int) -> None:
    with _LOCK:
        if len(_short) >= MOST_ENTRIES:
            _short.clear()
        _short[key] = min(rows, SHORT_MOST)


def remember(key: str, rows: int) -> None:
    """Keep a size for later workers and runs."""
    path = _path()
    with _LOCK:
        sizes = _known[path] = _sizes(path) | _read(path)  # what other processes have found meanwhile
        if sizes.pop(key, None) == rows:
            sizes[key] = rows
            return
        sizes[key] = rows
        for old in list(sizes)[:-MOST_ENTRIES]:
            del sizes[old]
        _write(path, sizes)


def _path() -> str:
    from headrace.connectors.environment import cache_folder

    return os.path.join(cache_folder(), FILE)


def _sizes(path: str) -> dict[str, int]:
    if path not in _known:
        _known[path] = _read(path)
    return _known[path]


def _read(path: str) -> dict[str, int]:
    """The entries that make sense."""
    try:
        with open(path, encoding="utf-8") as file:
            found: Any = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    content = cast(dict[str, Any], found)
    sizes: Any = content.get("sizes")
    if content.get("version") != VERSION or not isinstance(sizes, dict):
        return {}
    entries = cast(dict[str, Any], sizes)
    return {k: v for k, v in entries.items() if type(v) is int and 1 <= v <= MAX_ROWS}


def _write(path: str, sizes: dict[str, int]) -> None:
    import tempfile

    folder = os.path.dirname(path)
    with contextlib.suppress(OSError, ValueError):
        os.makedirs(folder, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{FILE}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"version": VERSION, "sizes": sizes}, file, indent=1)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


def _model_name(model: UserFunction) -> str:
    """An adapter's own name; of a class or function its module, name and code; of an object its type."""
    target: Any = model.target
    if isinstance(target, ModelAdapter):
        return target.name
    kind = target if hasattr(target, "__qualname__") else type(target)
    name = f"{kind.__module__}.{kind.__qualname__}"
    call: Any = vars(kind).get("__call__") if isinstance(kind, type) else kind
    code = getattr(call, "__code__", None)
    return f"{name} {_digest(code)}" if isinstance(code, CodeType) else name


def _digest(code: CodeType) -> str:
    """Functions of notebooks and lambdas share their names."""
    return hashlib.blake2b(code.co_code + repr(code.co_names).encode(), digest_size=4).hexdigest()


def _device_name(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" rather than "cuda:0"; of other devices the kind."""
    kind, _, index = device.partition(":")
    if kind == "cuda":
        torch = sys.modules.get("torch")
        with contextlib.suppress(Exception):  # a driver that torch can't speak to
            if torch is not None and torch.cuda.is_initialized():
                return str(torch.cuda.get_device_name(int(index or 0)))
    return kind
