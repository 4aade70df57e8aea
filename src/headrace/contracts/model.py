"""Model: what `predict` calls. Any callable will do; the Protocols say what more it may offer.

A model gets only its input columns and returns as many rows as it got: an array (one output column), a dict of arrays,
an Arrow table or batch, a pandas frame, a torch tensor. Row i of the answer belongs to row i of the input.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable
from typing import Any, Protocol, runtime_checkable


class BatchModel(Protocol):
    """A batch function. A class is constructed once per worker; when its constructor has a parameter named `device` it is
    given the worker's own ("cuda:0", "sim:1", "cpu").
    """

    def __call__(self, batch: Any) -> Any: ...


@runtime_checkable
class StreamModel(Protocol):
    """An asynchronous stream of rows that may finish out of order (LLM engines, remote endpoints).

    `stream` is given rows as (key, {column: value}) and yields (key, {column: value}) for each key exactly once, in any
    order. The worker keeps it running over all blocks at hand and scatters the answers back by key. Output order is
    the input's all the same. A row's failure is raised as an exception instance in place of the dict.
    """

    def stream(
        self, rows: AsyncIterator[tuple[Hashable, dict[str, Any]]]
    ) -> AsyncIterator[tuple[Hashable, dict[str, Any] | Exception]]: ...
