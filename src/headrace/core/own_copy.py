"""Copies of live objects, so that each worker thread has its own: what one keeps in a call (`self.x = ...`, features kept by
a forward hook) would be another's.

Invariants: what code can write to through the object is copied, closures and their cells too, and is shared within the copy as
it was within the object. Shared with it are classes, modules, functions without a state, globals, and, where asked for, the
parameters of torch modules.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Sequence
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]

from headrace.core.extras import is_instance

_SIMPLE = frozenset({int, float, str, bytes, bool, complex, type(None), tuple, list, dict, set, frozenset})


def own_copy(obj: Any, *, weights: bool = False) -> Any:
    """A copy of the object. weights: torch parameters are copied too. Raises whatever copying it raises."""
    file = io.BytesIO()
    packer: Any = _Packer(file, weights)
    packer.dump(obj)
    file.seek(0)
    return _Unpacker(file, packer.kept).load()


class _Same:
    """Stands for an object that is not copied."""

    def __init__(self, obj: Any) -> None:
        self.obj = obj


class _Packer(cloudpickle.Pickler):
    """kept: what the pickle refers to."""

    def __init__(self, file: io.BytesIO, weights: bool) -> None:
        super().__init__(file, protocol=5)  # pyright: ignore[reportUnknownMemberType]
        self.kept: list[Any] = []
        self._weights = weights
        self._storages: dict[int, Any] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) in _SIMPLE:
            return None
        if isinstance(obj, _Same):
            return self._keep(obj.obj)
        if isinstance(obj, type | ModuleType | CodeType) or (isinstance(obj, FunctionType) and _is_stateless(obj)):
            return self._keep(obj)
        return self._tensors(obj) if "torch" in sys.modules else None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType):
            state = (obj.__defaults__, obj.__kwdefaults__, obj.__dict__)
            return _function, (_Same(obj), obj.__closure__), state, None, None, _set_function
        if isinstance(obj, CellType):
            return CellType, (), _contents(obj), None, None, _set_cell
        parent: Any = super()
        return parent.reducer_override(obj)

    def _tensors(self, obj: Any) -> int | None:
        if is_instance(obj, "torch", "UntypedStorage"):
            return self._keep(self._storage(obj))
        if is_instance(obj, "torch.storage", "TypedStorage"):
            from torch.storage import TypedStorage

            cloned = self._storage(obj._untyped_storage)
            return self._keep(TypedStorage(wrap_storage=cloned, dtype=obj.dtype, _internal=True))
        if not self._weights and is_instance(obj, "torch.nn", "Parameter"):
            return self._keep(obj)
        if is_instance(obj, "torch.nn", "Module") and hasattr(obj, "__deepcopy__"):  # programs: they know best
            shared = () if self._weights else obj.parameters()
            return self._keep(copy.deepcopy(obj, {id(tensor): tensor for tensor in shared}))
        return None

    def _storage(self, storage: Any) -> Any:
        """The copy of a storage, one for all tensors that are views of it."""
        found = self._storages.get(storage._cdata)
        if found is None:
            found = self._storages[storage._cdata] = storage.clone()
        return found

    def _keep(self, obj: Any) -> int:
        self.kept.append(obj)
        return len(self.kept) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, kept: Sequence[Any]) -> None:
        super().__init__(file)
        self._kept = kept

    def persistent_load(self, pid: Any) -> Any:
        return self._kept[pid]


def _is_stateless(function: FunctionType) -> bool:
    """Is its only state that of its module?"""
    if not (function.__closure__ or function.__defaults__ or function.__kwdefaults__ or function.__dict__):
        return True
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def _function(like: FunctionType, closure: tuple[CellType, ...] | None) -> FunctionType:
    made = FunctionType(like.__code__, like.__globals__, like.__name__, None, closure)
    made.__qualname__, made.__module__, made.__doc__ = like.__qualname__, like.__module__, like.__doc__
    made.__annotations__ = like.__annotations__
    return made


def _set_function(function: FunctionType, state: tuple[Any, Any, dict[str, Any]]) -> None:
    function.__defaults__, function.__kwdefaults__ = state[:2]
    function.__dict__.update(state[2])


def _contents(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # empty
        return ()


def _set_cell(cell: CellType, contents: tuple[Any, ...]) -> None:
    if contents:
        cell.cell_contents = contents[0]
