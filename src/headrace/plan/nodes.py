"""Logical plan nodes: what the verbs of a Dataset build. Immutable; a plan is a chain, source first.

Invariants: a node holds what the user asked for and nothing decided. Expressions, functions and models are opaque here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from msgspec import Struct, field

from headrace.contracts.accumulator import Accumulator
from headrace.contracts.model import ModelAdapter
from headrace.contracts.sink import Sink
from headrace.contracts.source import Source
from headrace.contracts.transform import Transform
from headrace.core.errors import PlanError

BatchFormat = Literal["numpy", "pyarrow", "pandas", "torch"]

AUTO_BATCH_ROWS = 1024  # 1,024 decoded 224x224 images are 150 MB, the most that a batch by default should hold


class UserFunction(Struct, frozen=True):
    """A user's function, callable object, class, or ModelAdapter.

    is_class: `target` is a class, constructed once per worker with `ctor_args`/`ctor_kwargs`; `args`/`kwargs` go to every call.
    """

    target: Any
    is_class: bool = False
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ctor_args: tuple[Any, ...] = ()
    ctor_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def name(self) -> str:
        target = self.target
        if not self.is_class and hasattr(target, "name") and isinstance(target, ModelAdapter):  # which takes 20 us
            return target.name
        return getattr(target, "__name__", None) or type(target).__name__


class Read(Struct, frozen=True):
    source: Source

    @property
    def name(self) -> str:
        return f"read_{self.source.name}"


class Project(Struct, frozen=True):
    """select, drop and rename, normalised. columns: (output name, input name) in output order. left: input names that may not
    be there, because the sink takes them from the input.
    """

    columns: tuple[tuple[str, str], ...]
    name: str = "select"
    left: frozenset[str] = frozenset()


class Reshape(Struct, frozen=True):
    """drop or rename as the user wrote it. Becomes a Project as soon as the names that come in are known; after a user's
    function they are known only in the worker, which then does it by name. rename: (old, new).
    """

    drop: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    name: str = "drop"

    def resolve(self, known: tuple[str, ...]) -> Project:
        """The projection that it means for these columns. Raises PlanError for a name that is not there."""
        for wanted in (*self.drop, *(old for old, _ in self.rename)):
            if wanted not in known:
                raise PlanError(
                    f"{self.name} names column {wanted!r}, which is not there",
                    where=(("columns there", ", ".join(known)),),
                    hint="check the spelling",
                )
        new = dict(self.rename)
        pairs = tuple((new.get(name, name), name) for name in known if name not in self.drop)
        if len({out for out, _ in pairs}) != len(pairs):
            raise PlanError(f"{self.name} would give two columns the same name", hint="choose names that are not taken")
        return Project(pairs, self.name)


class FilterExpr(Struct, frozen=True):
    """Keep rows for which the pyarrow compute expression is true. columns: field names that it reads (() if unknown)."""

    expression: Any
    columns: tuple[str, ...]
    name: str = "filter"


class FilterRows(Struct, frozen=True):
    """Keep rows for which fn({column: value}) is true."""

    fn: UserFunction

    @property
    def name(self) -> str:
        return f"filter({self.fn.name})"


Types = tuple[tuple[str, Any], ...]  # (column, pyarrow.DataType): all that a function returns, as declared; () for what comes


class MapRows(Struct, frozen=True):
    """fn({column: value}) -> {column: value}, one row for one row; the answer replaces the row."""

    fn: UserFunction
    types: Types = ()

    @property
    def name(self) -> str:
        return f"map({self.fn.name})"


class FlatMap(Struct, frozen=True):
    """fn({column: value}) -> iterable of {column: value}."""

    fn: UserFunction
    types: Types = ()

    @property
    def name(self) -> str:
        return f"flat_map({self.fn.name})"


class MapBatches(Struct, frozen=True):
    """fn(batch) -> batch (or an iterator of batches). The answer replaces the columns; any number of rows.

    batch_rows: rows per call, cut from the start of the split, the last one may be shorter. None ("auto"): blocks as
    they come, cut at AUTO_BATCH_ROWS; blocks depend on the input alone. max_workers: `concurrency`.
    """

    fn: UserFunction
    batch_rows: int | None = None
    batch_format: BatchFormat = "numpy"
    max_workers: int | None = None
    types: Types = ()

    @property
    def name(self) -> str:
        return f"map_batches({self.fn.name})"


class Apply(Struct, frozen=True):
    """A Transform of our own (hr.images.decode)."""

    transform: Transform

    @property
    def name(self) -> str:
        return self.transform.name


class Limit(Struct, frozen=True):
    rows: int
    name: str = "limit"


DEFAULT_OUTPUT = "prediction"  # the column of a model's bare array, when the user gave no name


class Predict(Struct, frozen=True):
    """A row-wise model.

    inputs: the columns that it gets, () for all columns. single: `input="x"` was one name, so that the model gets the bare
    array instead of a dict. output: names of the columns that it adds; () when the model names them itself (it returns a dict).
    batch_rows: None for "auto". device: "auto", "cpu", "cuda", "cuda:1", "sim", "sim:0". replicas: None for "auto".
    resources: what a worker with this model holds of its node, in Ray's words ("GPU", "CPU", custom ones).
    group: models that were given together share a number: none sees the others' outputs, and where bad rows are set aside, a
    row that fails in one of them keeps what the others say of it. label: the model's name in its group. keeps_default: rows
    have a column DEFAULT_OUTPUT already, which a bare array must not replace; planning tells, where columns are known.
    """

    model: UserFunction
    inputs: tuple[str, ...]
    single: bool
    output: tuple[str, ...]
    batch_rows: int | None = None
    batch_format: BatchFormat = "numpy"
    device: str = "auto"
    replicas: int | None = None
    resources: tuple[tuple[str, float], ...] = ()
    group: int | None = None
    label: str = ""
    types: Types = ()
    keeps_default: bool = False

    @property
    def name(self) -> str:
        return f"predict({self.label or self.model.name})"


class Evaluate(Struct, frozen=True):
    """Accumulators by name; rows pass unchanged.

    stop_if: name -> a function of the result so far; when it is true the run ends. stop_after_rows: not before so many.
    """

    accumulators: Mapping[str, Accumulator]
    stop_if: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict[str, Callable[[Any], Any]])
    stop_after_rows: int = 0
    name: str = "evaluate"


class Write(Struct, frozen=True):
    sink: Sink

    @property
    def name(self) -> str:
        return f"write_{self.sink.name}"


Op = Project | Reshape | FilterExpr | FilterRows | MapRows | FlatMap | MapBatches | Apply | Limit | Predict | Evaluate


class Plan(Struct, frozen=True):
    """read -> ops -> write. write is None when blocks are delivered to a consumer."""

    read: Read
    ops: tuple[Op, ...] = ()
    write: Write | None = None
