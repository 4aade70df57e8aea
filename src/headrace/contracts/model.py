"""Model: what `predict` calls. Any callable will do; the Protocols say what more it may offer.

A model gets only its input columns and returns as many rows as it got: an array (one output column), a dict of arrays,
an Arrow table or batch, a pandas frame, a torch tensor. Row i of the answer belongs to row i of the input.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from msgspec import Struct

if TYPE_CHECKING:
    import pyarrow as pa


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
    the input's all the same. A row's failure is given as an exception instance in place of the dict.

    The input ends when no row came for a moment while some are unanswered, so that a model that gathers batches answers what it
    has; rows that come later go to a new call, which may begin while the old one answers its last rows. A model may have
    `set_outputs(names)`, which tells the output columns before any row, and a coroutine `aclose()`, run in its loop at the end.
    """

    def stream(
        self, rows: AsyncIterator[tuple[Hashable, dict[str, Any]]]
    ) -> AsyncIterator[tuple[Hashable, dict[str, Any] | Exception]]: ...


class Place(Struct, frozen=True):
    """Where an adapter's model is to live.

    device: "cpu", "cuda:0", "sim:1". threads: how many it may use at once on CPUs. inputs: the columns that it will get, in the
    order in which they were declared; () for all. deterministic: the same rows give the same bits whenever they are asked for.
    """

    device: str = "cpu"
    threads: int = 1
    inputs: tuple[str, ...] = ()
    deterministic: bool = False


@runtime_checkable
class ModelAdapter(Protocol):
    """A model of some library, named by its artifact or held as an object (hr.models). Immutable, picklable, and cheap to make:
    no library is imported and no artifact read before `check`.

    name: what people see. devices: kinds that it can use, the best first: "cuda", "cpu". streams: what `load` returns is a
    StreamModel. batch_format: of the batches that it wants, "numpy", "pyarrow", "pandas" or "torch".
    """

    @property
    def name(self) -> str: ...

    @property
    def devices(self) -> tuple[str, ...]: ...

    @property
    def streams(self) -> bool: ...

    @property
    def batch_format(self) -> str: ...

    def check(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        """Raise PlanError, before anything runs, for what can't work: a library that is not installed, an artifact that is not
        there or would have to be trusted, an input of the wrong type. schema: of the rows that come in; None when only running
        tells.
        """
        ...

    def meaning(self) -> Mapping[str, Any]:
        """What its answers depend on, for the run's fingerprint: parameters, and digests of artifacts. JSON-able."""
        ...

    def load(self, place: Place) -> Any:
        """The model, once per worker: a BatchModel, or a StreamModel. One that can be closed is closed at the end."""
        ...
