"""What is sent to actors: an object pickled as bytes, and the references in it beside them.

Ray's own way would hand out its arrays as read-only views of the store, and a model may write to an array of its own. Plain
pickle would hide references from Ray, which then drops what they stand for.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import cloudpickle
import ray

from headrace.core.errors import PlanError


def send(value: Any, what: str) -> Any:
    """A reference to the parcel. Raises PlanError for what can't be pickled. what: names it in the error."""
    refs: list[Any] = []
    file = io.BytesIO()
    try:
        _Packer(file, refs).dump(value)
    except Exception as exc:
        raise PlanError(
            f"{what} can't be sent to the cluster: {type(exc).__name__}: {exc}",
            hint="make what your functions and models refer to picklable (build it in a class's __init__, which runs "
            "in the worker)",
        ) from exc
    return ray.put((file.getvalue(), refs))


def receive(parcel: Any) -> Any:
    """The object, in memory of its own; modules that it needs must be importable by now."""
    data, refs = ray.get(parcel)
    unpacker = _Unpacker(io.BytesIO(data), refs)
    return unpacker.load()


class _Packer(cloudpickle.Pickler):
    def __init__(self, file: io.BytesIO, refs: list[Any]) -> None:
        super().__init__(file, protocol=5)
        self._refs = refs

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, ray.ObjectRef):
            return None
        self._refs.append(obj)
        return len(self._refs) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, refs: list[Any]) -> None:
        super().__init__(file)
        self._refs = refs

    def persistent_load(self, pid: Any) -> Any:
        return self._refs[pid]
