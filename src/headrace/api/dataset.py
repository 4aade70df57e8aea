"""Dataset: a lazy chain of verbs. It only builds plan nodes; actions hand the plan to the session."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Unpack

from msgspec.structs import replace

from headrace.api import actions, session
from headrace.contracts.accumulator import Accumulator
from headrace.contracts.model import ModelAdapter
from headrace.contracts.transform import Transform
from headrace.core.errors import PlanError
from headrace.core.extras import require, require_format
from headrace.core.options import ActionOptions, Outputs
from headrace.plan.nodes import (
    Apply,
    BatchFormat,
    Evaluate,
    FilterExpr,
    FilterRows,
    FlatMap,
    Limit,
    MapBatches,
    MapRows,
    Op,
    Plan,
    Predict,
    Project,
    Read,
    Reshape,
    UserFunction,
)

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from headrace.api.streaming_split import SplitIterator
    from headrace.connectors.sinks.parquet import Compression
    from headrace.observe.rehearsal import Rehearsal
    from headrace.observe.run import Run

    Declaration = Mapping[str, Any] | pa.Schema | None  # {column: type}

_FORMATS = ("numpy", "pyarrow", "pandas", "torch")


class Dataset:
    """Rows to be read, and what is to be done with them. Immutable: every verb returns a new Dataset, and nothing is read
    before an action (`write_*`, `iter_batches`, `take`, `show`, `count`, `to_*`, `run`).

    Rows keep their input order through every verb.
    """

    __slots__ = ("_plan",)

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def _with(self, op: Op) -> Dataset:
        return Dataset(Plan(self._plan.read, (*self._plan.ops, op)))

    def __repr__(self) -> str:
        chain = " > ".join([self._plan.read.name, *(op.name for op in self._plan.ops)])
        return f"Dataset({chain})"

    # ---------------------------------------------------------------- columns

    def select(self, *columns: str | Sequence[str]) -> Dataset:
        """Keep only these columns, in this order."""
        names = _names(columns)
        return self._with(Project(tuple((name, name) for name in names), "select"))

    def drop(self, *columns: str | Sequence[str]) -> Dataset:
        """Leave out these columns. One that is not there is refused when the plan is run."""
        return self._with(Reshape(drop=_names(columns), name="drop"))

    def rename(self, columns: Mapping[str, str]) -> Dataset:
        """Rename columns: {old: new}; the others keep their names, all keep their places."""
        return self._with(Reshape(rename=tuple(columns.items()), name="rename"))

    # ---------------------------------------------------------------- rows

    def filter(self, predicate: Any, *, fn_kwargs: Mapping[str, Any] | None = None) -> Dataset:
        """Keep the rows for which `predicate` holds: a pyarrow expression (`pc.field("x") > 3`; may move into the reader), or
        a function of a row {column: value} that returns a truth value.
        """
        if type(predicate).__name__ == "Expression" and type(predicate).__module__.startswith("pyarrow"):
            return self._with(FilterExpr(predicate, ()))
        if isinstance(predicate, str):
            raise PlanError(f"{predicate!r} is no filter", hint='give an expression, pc.field("x") > 0, or a function of a row')
        return self._with(FilterRows(_function(predicate, (), fn_kwargs, (), None)))

    def map(
        self, fn: Callable[..., Mapping[str, Any]], *, fn_kwargs: Mapping[str, Any] | None = None, schema: Declaration = None
    ) -> Dataset:
        """One row for one row: fn({column: value}) returns the new row as a dict.

        schema: what it returns, all of it, as {column: type} (Arrow types, or their names such as "float32") or a pyarrow
            Schema. What comes is brought to that; what does not fit is an error that names row and column, or a bad row.
        """
        return self._with(MapRows(_function(fn, (), fn_kwargs, (), None), _types(schema)))

    def flat_map(
        self, fn: Callable[..., Any], *, fn_kwargs: Mapping[str, Any] | None = None, schema: Declaration = None
    ) -> Dataset:
        """Any number of rows for one row: fn({column: value}) returns an iterable of dicts (a generator is best for many).

        schema: what it returns, as for `map`.
        """
        return self._with(FlatMap(_function(fn, (), fn_kwargs, (), None), _types(schema)))

    def map_batches(
        self,
        fn: Callable[..., Any] | type | Transform,
        *,
        batch_size: int | Literal["auto"] | None = "auto",
        batch_format: BatchFormat = "numpy",
        concurrency: int | None = None,
        fn_args: Sequence[Any] = (),
        fn_kwargs: Mapping[str, Any] | None = None,
        fn_constructor_args: Sequence[Any] = (),
        fn_constructor_kwargs: Mapping[str, Any] | None = None,
        schema: Declaration = None,
    ) -> Dataset:
        """fn(batch) -> batch, for whole batches; the answer replaces the columns and may have any number of rows.

        fn: a function, a callable object (worker threads share it: what it keeps on itself in a call is another's, too), or a
            class (constructed once per worker).
        batch_size: rows per call, cut from the start of each split, the last batch of a split may be shorter; "auto" (or None):
            blocks as they come, at most 1,024 rows.
        batch_format: "numpy" {column: array} (zero-copy, read-only; tensors are (rows, *shape)), "pyarrow" Table,
            "pandas", "torch" (code that writes to its first batch in place gets copies; where it begins later, the run ends).
        concurrency: at most this many workers run fn at once; None lets the engine decide.
        schema: what it returns, as for `map`.
        The answer: dict of arrays, Arrow table, pandas frame, or an iterator of those.
        """
        if isinstance(fn, Transform) and not isinstance(fn, type):
            return self.apply(fn)
        if batch_format not in _FORMATS:
            raise PlanError(f"batch_format is {batch_format!r}", hint=f"use one of {', '.join(_FORMATS)}")
        require_format(batch_format, "map_batches")
        rows = _rows("batch_size", batch_size)
        user = _function(fn, fn_args, fn_kwargs, fn_constructor_args, fn_constructor_kwargs)
        return self._with(MapBatches(user, rows, batch_format, _rows("concurrency", concurrency), _types(schema)))

    def apply(self, transform: Transform) -> Dataset:
        """Add or replace columns by one of Headrace's transforms, such as `hr.images.decode("image")`."""
        return self._with(Apply(transform))

    def limit(self, rows: int) -> Dataset:
        """The first `rows` rows in input order; nothing more is read than they need."""
        if rows < 0:
            raise PlanError(f"limit({rows}): the number of rows can't be negative", hint="use 0 or more")
        if any(isinstance(op, Evaluate) for op in self._plan.ops):  # how many rows come so far is up to chance
            raise PlanError(
                "limit() after evaluate() leaves open which rows are evaluated", hint="call limit() before evaluate()"
            )
        return self._with(Limit(rows))

    # ---------------------------------------------------------------- models

    def predict(
        self,
        model: Any,
        *,
        input: str | Sequence[str] | Mapping[str, Any] | None = None,
        output: str | Sequence[str] | Mapping[str, Any] | None = None,
        batch_size: int | Literal["auto"] | Mapping[str, Any] = "auto",
        batch_format: BatchFormat = "numpy",
        device: str | Mapping[str, str] = "auto",
        replicas: int | Literal["auto"] = "auto",
        resources: Mapping[str, float] | None = None,
        constructor_args: Sequence[Any] = (),
        constructor_kwargs: Mapping[str, Any] | None = None,
    ) -> Dataset:
        """Add a model's outputs as columns; every other column is carried over untouched.

        model: one of hr.models, a class (constructed once per worker; a constructor parameter named `device` gets the
            worker's), a callable object, a function, a torch module, or an object with an asynchronous `stream`
            (contracts.model). Worker threads share an object, and have copies of a module with the same parameters. Or
            {name: model}: several in one pass, see below.
        input: one name: the model gets that column as a bare array; a list of names: a dict of arrays; None: all columns.
        output: one name, a list of names (the model returns a tuple or a dict with those keys), {name: type} to declare their
            types too (as for `map`), or None: the keys of the dict that it returns, or "prediction" for a bare array.
        batch_size: "auto" finds the best while it runs.
        device: "auto" (a GPU if there is one and the model can say where it runs, else CPU), "cpu", "cuda", "cuda:1", or
            "sim" for a simulated accelerator: a worker of its own beside the CPU workers.
        replicas: how many workers hold the model; "auto": one per device, or one per core on CPUs.
        resources: what such a worker holds of its node on a Ray cluster: {"GPU": 0.5}, or custom ones: {"my_license": 1}. On
            one machine only "GPU" matters: half a GPU makes two workers on each.

        The model must return as many rows as it got, and treat rows independently: its batches may span files. A batch may be
        one row: `.squeeze()` takes its dimension of rows away, too, so name the dimension, as in `.squeeze(-1)`; a single value
        and what has the shape of other rows are understood, the rest ends the run, whatever on_error says.

        Several models, `predict({"ctr": A, "cvr": B}, input=...)`: reading, decoding and what they share happens once. Each
        adds the column of its name, or those of output={"ctr": ...}; input, output, batch_size and device may be given for
        each by name. They don't see each other's outputs. With on_error="skip" or "quarantine" a row that fails in one of them
        (or all rows, when that one can't be loaded) has nulls in its columns and keeps what the others say; Run.guards counts
        them.
        """
        if isinstance(model, Mapping):
            options = {"input": input, "output": output, "batch_size": batch_size, "device": device}
            return self._predict_all(model, options, batch_format, replicas, resources, constructor_args, constructor_kwargs)
        if isinstance(input, Mapping):
            raise PlanError("input names models, but there is only one", hint="give a dict of models")
        if isinstance(batch_size, Mapping) or isinstance(device, Mapping):
            raise PlanError("batch_size or device names models, but there is only one", hint="give a dict of models")
        node = _model_node(
            model, input, output, batch_size, batch_format, device, replicas, resources, constructor_args, constructor_kwargs
        )
        return self._with(node)

    def _predict_all(
        self,
        models: Mapping[str, Any],
        options: Mapping[str, Any],
        batch_format: BatchFormat,
        replicas: Any,
        resources: Any,
        *constructor: Any,
    ) -> Dataset:
        """One node for each of several models, in a group."""
        if not models or not all(isinstance(name, str) and name for name in models):
            raise PlanError("predict was given a dict without models, or one without names", hint='for example {"ctr": model}')
        if any(constructor):
            raise PlanError("constructor arguments go with one class", hint="give objects, or functools.partial of each class")
        for name, value in options.items():
            if isinstance(value, Mapping) and (unknown := set(value) - set(models)):
                raise PlanError(f"{name} names {min(unknown)!r}, which is no model here", hint=f"they are {list(models)}")
        nodes: list[Predict] = []
        defaults = {"input": None, "output": None, "batch_size": "auto", "device": "auto"}
        for name, model in models.items():
            own = {k: v.get(name, defaults[k]) if isinstance(v, Mapping) else v for k, v in options.items()}
            if options["output"] is not None and not isinstance(options["output"], Mapping):
                raise PlanError("several models can't share one output", hint='give output={"ctr": ...}, or leave it out')
            output = own["output"] if own["output"] is not None else name
            node = _model_node(
                model, own["input"], output, own["batch_size"], batch_format, own["device"], replicas, resources, *constructor
            )
            nodes.append(replace(node, group=len(self._plan.ops), label=name))
        _check_apart(nodes)
        made = self
        for node in nodes:
            made = made._with(node)
        return made

    def evaluate(
        self,
        *,
        stop_if: Mapping[str, Callable[[Any], Any]] | None = None,
        stop_after_rows: int = 1000,
        **accumulators: Accumulator,
    ) -> Dataset:
        """Compute metrics over the rows in the same pass; rows pass unchanged. Results are in the Run's `metrics`.

        `ds.evaluate(acc=hr.metrics.Accuracy("prediction", "label")).write_parquet(out).metrics["acc"]`

        stop_if: {name: function of that metric's result}: as soon as one is true of the rows evaluated so far (at least
        `stop_after_rows`, fewer only at the end), the run ends with StopConditionMet, so that a broken model does not run all
        night. What was settled until then is kept; the same call goes on from there, when the condition no longer holds.
        """
        for name, accumulator in accumulators.items():
            if not isinstance(accumulator, Accumulator):
                raise PlanError(f"evaluate({name}=...) needs an accumulator", hint="for example hr.metrics.Accuracy(...)")
        taken = {name for op in self._plan.ops if isinstance(op, Evaluate) for name in op.accumulators}
        if again := taken & set(accumulators):
            raise PlanError(f"the metric name {min(again)!r} is used twice", hint="give each accumulator its own name")
        rules = dict(stop_if or {})
        if unknown := set(rules) - set(accumulators):
            raise PlanError(f"stop_if names {min(unknown)!r}, which is no metric here", hint=f"use {list(accumulators)}")
        if bad := [name for name, rule in rules.items() if not callable(rule)]:
            raise PlanError(f"stop_if[{bad[0]!r}] can't be called", hint="give a function: lambda value: value < 0.5")
        if isinstance(stop_after_rows, bool) or not isinstance(stop_after_rows, int) or stop_after_rows < 0:
            raise PlanError(f"stop_after_rows is {stop_after_rows!r}", hint="use a whole number of at least 0")
        return self._with(Evaluate(dict(accumulators), rules, stop_after_rows))

    # ---------------------------------------------------------------- actions: files

    def write_parquet(
        self,
        path: str,
        *,
        outputs: Outputs = "packed",
        fresh: bool = False,
        compression: Compression | None = None,
        **options: Unpack[ActionOptions],
    ) -> Run:
        """Run, and write Parquet files under `path` (a directory, local or s3://).

        outputs: "packed": files of a good size, part-..., in input order; "per_input": one file per input file, same name.
        fresh: replace the output that is there; it is removed only when the new one is complete.
        options: also on_error ("fail", "skip" or "quarantine": what becomes of rows that fail), max_bad_rows, max_bad_fraction,
        timeout (seconds without an answer after which a worker counts as hung), take_over (from a driver that is at work).

        Every row counts exactly once, whatever dies: the same call again goes on where it was, and does nothing when the run
        is finished (Run.already_done). A file appears under its final name only when it is whole and the run log holds it;
        `_SUCCESS` and `_manifest.json` come last.
        Files without rows have the columns of the others. Where no row is written at all they have those that are known:
        columns carried along, declared ones, names in output=; a function that declares nothing is taken to keep its columns.
        Types that are not known, or that the format can't hold, are null.
        Raises DestinationError, with the difference, when `path` holds a run of another plan and fresh is False, or when
        another driver is at work there; InputChanged when the input is not what the run began with.
        """
        from headrace.connectors.sinks.parquet import ParquetSink

        more: dict[str, Any] = {} if compression is None else {"compression": compression}
        return session.write(self._plan, ParquetSink(str(path), outputs=outputs, fresh=fresh, **more), options)

    def write_csv(
        self, path: str, *, outputs: Outputs = "packed", fresh: bool = False, **options: Unpack[ActionOptions]
    ) -> Run:
        """Run, and write CSV files with a header; as `write_parquet`. Nested, tensor and binary columns are refused.

        Nulls are empty, texts in quotes; the nulls of a single column are `""`, as no reader would see a blank line.
        """
        from headrace.connectors.sinks.csv import CsvSink

        return session.write(self._plan, CsvSink(str(path), outputs=outputs, fresh=fresh), options)

    def write_json(
        self, path: str, *, outputs: Outputs = "packed", fresh: bool = False, **options: Unpack[ActionOptions]
    ) -> Run:
        """Run, and write JSON lines; as `write_parquet`. JSON has no NaN and no infinities: they are null."""
        from headrace.connectors.sinks.json import JsonSink

        return session.write(self._plan, JsonSink(str(path), outputs=outputs, fresh=fresh), options)

    def run(self, **options: Unpack[ActionOptions]) -> Run:
        """Run for the metrics and side effects alone: no row is kept."""
        from headrace.connectors.sinks.discard import DiscardSink

        return session.write(self._plan, DiscardSink(), options)

    def reproduce(self, path: str, **options: Unpack[ActionOptions]) -> str:
        """Run one operator on one row, in this process: a row that killed its worker, kept at `path` (the error names it).

        What comes of it is printed as it happens, and returned. The pipeline must be the one that the row was kept by.
        """
        return session.reproduce_row(self._plan, path, options)

    # ---------------------------------------------------------------- actions: rows to the caller

    def iter_batches(
        self,
        *,
        batch_size: int | None = 256,
        batch_format: BatchFormat = "numpy",
        drop_last: bool = False,
        **options: Unpack[ActionOptions],
    ) -> Iterator[Any]:
        """Batches in input order, while workers go on in the background. batch_size None: blocks as they come.

        Memory stays bounded however slowly the caller takes them; closing the iterator (or leaving the loop) ends the run.
        """
        require_format(batch_format, "iter_batches")
        rows = _rows("batch_size", batch_size)
        return actions.iter_batches(self._plan, rows, batch_format, drop_last, options)

    def iter_torch_batches(
        self,
        *,
        batch_size: int | None = 256,
        device: str | None = None,
        dtypes: Any = None,
        drop_last: bool = False,
        **options: Unpack[ActionOptions],
    ) -> Iterator[dict[str, Any]]:
        """As `iter_batches`, as {column: torch tensor} on `device`. dtypes: one torch dtype, or {column: dtype}.

        Columns that are no numbers (strings, bytes, ragged) stay NumPy object arrays. Raises PlanError for a device that torch
        does not find here, and, at the first batch, for a column in dtypes that is not there.
        """
        require("torch", "iter_torch_batches")
        actions.check_device(device)
        batches = self.iter_batches(batch_size=batch_size, batch_format="torch", drop_last=drop_last, **options)
        return (actions.to_torch(batch, device, dtypes) for batch in batches)

    def streaming_split(self, n: int, *, equal: bool = False, **options: Unpack[ActionOptions]) -> list[SplitIterator]:
        """n iterators for n training workers: each epoch is one run of the pipeline, whose rows they share.

        The iterators pickle: give one to each worker, a thread or a process of this machine. Under torchrun, with n its world
        size, all ranks make the same call and use `[rank]`; rank 0 runs the pipeline for all. With engine="ray" an actor of the
        cluster runs it, the workers (those of Ray Train) are anywhere in the cluster, and read blocks from its object stores.

        equal: all get exactly the same number of rows, and fewer than n rows are dropped: collective training does not hang.
            False: blocks go to whoever asks first, and every row goes to one of them.

        An epoch begins when all n have asked for it; memory stays bounded however slowly one of them takes its rows (with
        `equal` the others wait for it). Nothing is run before the first batch is asked for.
        Raises PlanError for a torchrun job on several machines.
        """
        from headrace.api.streaming_split import streaming_split

        return streaming_split(self._plan, n, equal, options, repr(self))

    def take(self, rows: int = 20, **options: Unpack[ActionOptions]) -> list[dict[str, Any]]:
        """The first rows as dicts of Python values (tensors as NumPy arrays)."""
        return actions.take(self._plan, rows, options)

    def show(self, rows: int = 10, **options: Unpack[ActionOptions]) -> None:
        """Print the first rows as a table."""
        actions.show(self._plan, rows, options)

    def count(self, **options: Unpack[ActionOptions]) -> int:
        """The number of rows; from metadata alone where that tells."""
        return actions.count(self._plan, options)

    def schema(self) -> pa.Schema:
        """The schema of the rows. With user functions or models in the plan the first row is run to find it."""
        return actions.schema(self._plan)

    def to_arrow(self, **options: Unpack[ActionOptions]) -> pa.Table:
        """All rows as one Arrow table, in memory. Without rows its columns are those that `write_parquet` would write."""
        return actions.to_arrow(self._plan, options)

    def to_pandas(self, **options: Unpack[ActionOptions]) -> pd.DataFrame:
        """All rows as a pandas frame, in memory; tensor columns as object columns of arrays."""
        require("pandas", "to_pandas")
        return actions.to_pandas(self._plan, options)

    def to_ray_dataset(self, **options: Unpack[ActionOptions]) -> Any:
        """All rows as a `ray.data.Dataset`, run now on the cluster; its blocks lie in the object stores, in input order.

        Connects to the cluster that `address` names (see `engine="ray"`) and stays connected.
        """
        require("ray", "to_ray_dataset")
        return actions.to_ray_dataset(self._plan, options)

    def explain(self, **options: Unpack[ActionOptions]) -> str:
        """The logical plan, the stages it is cut into, and the decisions taken. Print it.

        Nothing is written; but which engine suits is found out on the first rows, by the functions and models themselves."""
        return actions.explain(self._plan, options)

    def check(
        self,
        *,
        rows: int | Literal["auto"] = "auto",
        splits: int = 8,
        price_per_hour: float | None = None,
        **options: Unpack[ActionOptions],
    ) -> Rehearsal:
        """A rehearsal: about `rows` rows from `splits` places all over the input go through every step, and nothing is written.

        rows: "auto" is 1,000, and when those take less than a second and are no requests to a server, up to 64,000 more.

        The Rehearsal tells what failed and where, the output's schema, warnings (types that drift, NaN), the bottleneck, and
        time, memory and (given the price of an hour of this machine) cost to expect of the whole run. Print it. Models are
        loaded and called as in a run; options are those of the run.
        Failures are in the report, never raised; PlanError is, for what can't be planned.
        """
        from headrace.api.check import check

        return check(self._plan, None if rows == "auto" else rows, splits, price_per_hour, options)


def from_source(source: Any) -> Dataset:
    """A Dataset over any Source (contracts.source)."""
    return Dataset(Plan(Read(source)))


def _names(columns: Sequence[str | Sequence[str]]) -> tuple[str, ...]:
    flat: list[str] = []
    for column in columns:
        if isinstance(column, str):
            flat.append(column)
        else:
            flat.extend(column)
    if len(set(flat)) != len(flat):
        raise PlanError("a column is named twice", where=(("columns", ", ".join(flat)),), hint="name each once")
    return tuple(flat)


def _rows(what: str, value: int | str | None) -> int | None:
    if value is None or value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{what} is {value!r}", hint='use a whole number of at least 1, or "auto"')
    return value


def _makes_callables(cls: type) -> bool:
    """Is it a class to construct, or one that is itself the function, as `dict` is?"""
    return hasattr(cls, "stream") or any("__call__" in vars(base) for base in cls.__mro__)


def _model_node(
    model: Any,
    input: str | Sequence[str] | None,
    output: str | Sequence[str] | Mapping[str, Any] | None,
    batch_size: Any,
    batch_format: BatchFormat,
    device: Any,
    replicas: Any,
    resources: Mapping[str, float] | None,
    constructor_args: Sequence[Any],
    constructor_kwargs: Mapping[str, Any] | None,
) -> Predict:
    if not callable(model) and not hasattr(model, "stream") and not isinstance(model, ModelAdapter):
        raise PlanError(f"predict needs a callable model, not {type(model).__name__}", hint="give a class or a function")
    if batch_format not in _FORMATS:
        raise PlanError(f"batch_format is {batch_format!r}", hint=f"use one of {', '.join(_FORMATS)}")
    require_format(batch_format, "predict")
    return Predict(
        model=_function(model, (), None, constructor_args, constructor_kwargs),
        inputs=(input,) if isinstance(input, str) else tuple(input or ()),
        single=isinstance(input, str),
        output=_names((output,) if isinstance(output, str) else tuple(output or ())),
        batch_rows=_rows("batch_size", batch_size),
        batch_format=batch_format,
        device=device,
        replicas=_rows("replicas", replicas),
        resources=_resources(resources),
        types=_types(output) if isinstance(output, Mapping) else (),
    )


def _resources(asked: Mapping[str, float] | None) -> tuple[tuple[str, float], ...]:
    """Resources by name, in order. Raises PlanError for an amount that Ray would refuse."""
    for name, amount in (asked or {}).items():
        good = isinstance(amount, int | float) and not isinstance(amount, bool) and 0 < amount < float("inf")
        if not isinstance(name, str) or not name or not good or (amount > 1 and amount != int(amount)):
            raise PlanError(f"resources has {name!r}: {amount!r}", hint='for example {"GPU": 0.5} or {"my_license": 1}')
    return tuple(sorted((asked or {}).items()))


def _types(declared: Declaration) -> tuple[tuple[str, Any], ...]:
    """Declared columns with their Arrow types. Raises PlanError for a name that is no type's."""
    if declared is None:
        return ()
    import pyarrow as pa

    if isinstance(declared, pa.Schema):
        schema: Any = declared
        return tuple(zip(schema.names, schema.types, strict=True))
    found: list[tuple[str, Any]] = []
    for name, type in declared.items():
        try:
            made = type if isinstance(type, pa.DataType) else pa.from_numpy_dtype(type) if callable(type) else _type_of(type)
        except (TypeError, ValueError, pa.ArrowException):
            raise PlanError(
                f"column {name!r} is declared as {type!r}, which is no type",
                hint='use pyarrow types, or names such as "float32", "int64", "string", "bool"',
            ) from None
        found.append((name, made))
    return tuple(found)


def _type_of(name: Any) -> Any:
    import numpy as np
    import pyarrow as pa

    if isinstance(name, np.dtype):
        return pa.from_numpy_dtype(name)
    return pa.type_for_alias(name)


def _check_apart(nodes: Sequence[Predict]) -> None:
    """Raise PlanError unless models of a group write different columns and read none that another one writes."""
    made: dict[str, str] = {}
    for node in nodes:
        for column in node.output:
            if column in made:
                raise PlanError(
                    f"models {made[column]!r} and {node.label!r} would both write column {column!r}",
                    hint="name their columns apart with output={...}",
                )
            made[column] = node.label
    for node in nodes:
        for column in node.inputs:
            if made.get(column, node.label) != node.label:
                raise PlanError(
                    f"model {node.label!r} reads column {column!r}, which model {made[column]!r} of the same predict writes",
                    hint="models of one predict don't see each other's outputs: chain .predict(...).predict(...)",
                )


def _function(
    target: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    ctor_args: Sequence[Any],
    ctor_kwargs: Mapping[str, Any] | None,
) -> UserFunction:
    is_class = inspect.isclass(target) and _makes_callables(target)
    if not is_class and (ctor_args or ctor_kwargs):
        raise PlanError("constructor arguments go with a class", hint="give the class itself, not an object of it")
    if not callable(target) and not hasattr(target, "stream") and not isinstance(target, ModelAdapter):
        raise PlanError(f"{target!r} can't be called", hint="give a function, a callable object or a class")
    return UserFunction(target, is_class, tuple(args), dict(kwargs or {}), tuple(ctor_args), dict(ctor_kwargs or {}))
