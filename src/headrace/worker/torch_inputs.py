"""Batches as torch tensors for code that may write to them, though their memory is the block's, which others read.

The first batch is a copy. Code that does not write to it gets views of the block from then on, until the run ends at the first
write to one: what was overwritten is lost. Code that does write to it gets copies, always.

Invariant: no row leaves, and none is tried again, between a write to a block and the end of the run. Writes are told by the
tensors' version counters, which views share; not seen are those through `.data`, `.numpy()` and foreign code. Tensors of
inference mode have none: none is made here, though user code, a suspended generator say, has left that mode on in the thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from headrace.models.torch_device import version_of
from headrace.worker.formats import Given, NumpyReader, to_torch
from headrace.worker.refused import BrokenModel
from headrace.worker.results import call


class GivenTensors(Given):
    """What code was given as tensors. private: they are copies."""

    __slots__ = ("_tensors", "_versions", "private")

    def __init__(self, given: Given, tensors: dict[str, Any], private: bool) -> None:
        super().__init__(given.schema, given._values, given._immutable, given._batch)
        self.private = private
        self._tensors = {name: value for name, value in tensors.items() if not isinstance(value, np.ndarray)}
        self._versions = {name: version_of(tensor) for name, tensor in self._tensors.items()}

    def written(self) -> list[str]:
        """The columns whose tensors were written to."""
        return [name for name, tensor in self._tensors.items() if version_of(tensor) != self._versions[name]]


class TorchReader:
    """Makes tensors of the batches of one function or model. What uses them goes through `call`; else `check` each afterwards,
    whatever came of it.

    uploads: the code copies each batch to a device before anything else.
    """

    def __init__(self, reader: NumpyReader, *, uploads: bool = False) -> None:
        self._reader = reader
        self._known = uploads
        self._writes = False

    def read(self, batch: pa.RecordBatch) -> tuple[dict[str, Any], GivenTensors]:
        import torch

        arrays, given = self._reader.read(batch)
        private = self._writes or not self._known
        with torch.inference_mode(False):
            tensors = {name: to_torch(value) for name, value in arrays.items()}
            if private:
                tensors = {name: t if isinstance(t, np.ndarray) else t.clone() for name, t in tensors.items()}
        return tensors, GivenTensors(given, tensors, private)

    def call(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], given: Given
    ) -> tuple[Any, bool]:
        """As `results.call`, of code that was given this, in whatever format."""
        try:
            return call(function, args, kwargs)
        finally:
            self.check(given)

    def check(self, given: Given) -> None:
        """Learn whether the code writes to its input. Raises BrokenModel when it has written to a block."""
        if not isinstance(given, GivenTensors):
            return
        written = given.written()
        if written and not given.private:
            raise BrokenModel(
                f"wrote to its input in place, column {written[0]!r}, after it had left an earlier batch as it was",
                "batches are memory that others read too: clone what you change, x = x.clone()",
            )
        self._known = True
        self._writes = self._writes or bool(written)
