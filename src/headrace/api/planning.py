"""Planning of an action: check options, resolve names by the input's schema, apply the rules, cut into stages, choose workers
and engine. Reads the input's schema; starts nothing.

`lay_out` refuses what can never run, and calls no function of the user's. `choose` may run the first rows in this process, to
choose an engine. Between the two a session enters itself in its log: should a function end the process, the next one knows
(and by the marks of runtime/trial_mark.py where there is no log).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from headrace.api.placing import cluster_machine, gpus_may_come, place_on_cluster
from headrace.contracts.model import ModelAdapter
from headrace.contracts.source import CheckedSource, DividingSource, ListedSource
from headrace.core.errors import PlanError
from headrace.core.extras import is_instance, require
from headrace.core.options import ActionOptions, RunOptions
from headrace.core.resources import CPU_POOL, WAITING_POOL, Machine, WorkerSpec
from headrace.core.splits import Division
from headrace.observe.words import size
from headrace.plan.columns import ALL, Columns, check_columns
from headrace.plan.nodes import (
    DEFAULT_OUTPUT,
    FilterExpr,
    MapBatches,
    Op,
    Plan,
    Predict,
    Read,
    Reshape,
)
from headrace.plan.physical import PhysicalPlan, is_stream, make_physical
from headrace.plan.rules import optimise
from headrace.plan.schemas import rowless_schema, static_schema
from headrace.runtime.engine import Choice, Sampled, asked_engine, choose_engine
from headrace.runtime.machine import block_budget_bytes, detect_machine
from headrace.worker.program import Program

if TYPE_CHECKING:
    import pyarrow as pa

LEAST_ROWS_UNSHARED = 1024  # of blocks that no other worker waits for, and whose end no function sees: hides what each costs


class Prepared(Struct, frozen=True):
    """A plan ready to run; nothing has been started. engine "auto": it has no workers yet, and goes to `choose`."""

    written: Plan
    physical: PhysicalPlan
    program: Program
    workers: tuple[WorkerSpec, ...]
    engine: str
    budget_bytes: int
    notes: tuple[str, ...]
    options: RunOptions
    machine: Machine
    at_end: Columns
    cluster: Any = None  # engine "ray": {pool: substrates.ray.placement.Shape}
    sampled: Sampled | None = None
    division: Division | None = None


def with_division(ready: Prepared, division: Division | None) -> Prepared:
    """Whose splits are divided to that; None: as its source does."""
    source = ready.program.source
    if division is None or not isinstance(source, DividingSource):
        return ready
    ready.program.ahead.close()  # what was read to choose an engine is of other splits
    program = replace(ready.program, source=source.divided(division))
    note = f"rows are much work: splits of about {size(division.split_bytes)}, of which little is lost when a worker dies"
    return replace(ready, program=program, division=division, notes=(*ready.notes, note))


def parse_options(options: ActionOptions) -> RunOptions:
    """Options checked. Raises PlanError for a value that can't be."""
    unknown = set(options) - set(ActionOptions.__annotations__)
    if unknown:
        known = ", ".join(sorted(ActionOptions.__annotations__))
        raise PlanError(f"there is no option {min(unknown)!r}", hint=f"the options are {known}")
    values: dict[str, Any] = dict(options)
    if values.get("devices") is not None:
        values["devices"] = tuple(values["devices"])
    parsed = RunOptions(**values)
    if parsed.engine not in ("auto", "inline", "threads", "processes", "ray"):
        raise PlanError(f"engine is {parsed.engine!r}", hint="use auto, inline, threads, processes or ray")
    if parsed.address is not None and parsed.engine != "ray":
        raise PlanError("address names a Ray cluster, and the engine is another one", hint='use engine="ray" with it')
    if parsed.engine == "ray":
        require("ray", 'engine="ray"')
    if parsed.progress not in ("auto", "line", "log", "quiet"):
        raise PlanError(f"progress is {parsed.progress!r}", hint="use auto, line, log or quiet")
    if parsed.on_error not in ("fail", "skip", "quarantine"):
        raise PlanError(f"on_error is {parsed.on_error!r}", hint="use fail, skip or quarantine")
    if parsed.execution not in ("streaming", "bulk"):
        raise PlanError(f"execution is {parsed.execution!r}", hint="use streaming or bulk")
    for name, least in (("cpus", 1), ("memory_bytes", 1 << 20), ("max_bad_rows", 0)):
        value = getattr(parsed, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise PlanError(f"{name} is {value!r}", hint=f"use a whole number of at least {least}")
    _check_number("max_bad_fraction", parsed.max_bad_fraction, "a number from 0 to 1", lambda x: 0 <= x <= 1)
    _check_number("timeout", parsed.timeout, "a number of seconds above 0", lambda x: 0 < x < float("inf"))
    for name in ("max_bad_rows", "max_bad_fraction"):
        if parsed.on_error == "fail" and getattr(parsed, name) is not None:
            raise PlanError(
                f'{name} says how many bad rows are too many, and with on_error="fail" the first one ends the run',
                hint='use on_error="quarantine" or "skip" with it',
            )
    return parsed


def _check_number(name: str, value: object, wanted: str, good: Callable[[float], bool]) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not good(value):
        raise PlanError(f"{name} is {value!r}", hint=f"use {wanted}")


def for_action(plan: Plan) -> Plan:
    """The plan for one action: what it finds out about the input by listing it, it finds out once."""
    source = plan.read.source
    return replace(plan, read=Read(source.snapshot())) if isinstance(source, ListedSource) else plan


def prepare(plan: Plan, options: RunOptions, at_end: Columns = ALL) -> Prepared:
    """Everything that is decided before work starts. Raises PlanError for what can never run."""
    laid_out = lay_out(plan, options, at_end)
    try:
        return choose(laid_out)
    finally:
        laid_out.program.ahead.close()
        laid_out.program.tried.close()


def lay_out(plan: Plan, options: RunOptions, at_end: Columns = ALL) -> Prepared:
    """Everything that is decided without the user's functions. Raises PlanError for what can never run."""
    if options.engine == "auto" and getattr(plan.read.source, "on_cluster", False):
        options = replace(options, engine="ray")
    on_ray = options.engine == "ray"
    machine = cluster_machine() if on_ray else detect_machine()
    if options.devices is not None:
        machine = replace(machine, devices=options.devices)
    resolved = resolve(plan)
    _check_models(resolved)
    # Columns that are left unread are read after all for a row that fails: only where no row is set aside.
    optimised, notes, carried = optimise(resolved, at_end, leave=options.on_error == "fail")
    if isinstance(optimised.read.source, CheckedSource):
        optimised.read.source.check_columns()
    pool_of = _PoolChoice(machine, gpus_may_come=on_ray and gpus_may_come())
    physical = make_physical(optimised, delivers=plan.write is None, pool_of=pool_of, at_end=at_end, networked=on_ray)
    program = Program(
        source=optimised.read.source,
        ops=optimised.ops,
        stages=physical.stages,
        sink=optimised.write.sink if optimised.write is not None else None,
        limits=physical.limits,
        deterministic=options.deterministic,
        on_error=options.on_error,
        sys_path=tuple(sys.path),
        carried=carried,
    )
    choice = asked_engine(options.engine, program, options.timeout)
    budget = options.memory_bytes or block_budget_bytes(machine)
    ready = Prepared(plan, physical, program, (), "auto", budget, notes, options, machine, at_end)
    if not on_ray:
        _local_shares(optimised, pool_of)  # refuses
    return ready if choice is None else _with_engine(ready, choice, pool_of)


def choose(ready: Prepared, *, after_crash: bool | None = None) -> Prepared:
    """The plan with an engine; as it is where it has one. What was read to choose it waits in `program.ahead` for workers of
    this process, what was constructed in `program.tried`; the caller closes both in the end.

    after_crash: an earlier session of this run died at work, maybe of the user's code; None: it keeps no log.
    """
    if ready.engine != "auto":
        return ready
    choice = choose_engine(ready.program, ready.options.cpus or ready.machine.cores, after_crash=after_crash)
    if choice.engine == "processes":
        ready.program.ahead.close()
    if choice.engine != "threads" or choice.models_wait:  # the CPU workers of such a run have other functions
        ready.program.tried.close()
    return _with_engine(ready, choice, _PoolChoice(ready.machine, waiting=choice.models_wait))


def _with_engine(ready: Prepared, choice: Choice, pool_of: _PoolChoice) -> Prepared:
    """With its workers, and stages as they suit the engine."""
    options, plan, physical, program = ready.options, ready.physical.plan, ready.physical, ready.program
    notes = (*ready.notes, f"engine {choice.engine}: {choice.why}")
    if options.execution == "bulk":
        notes = (*notes, "bulk: each stage begins when the one before it has ended, for all rows")
    if choice.models_wait:
        physical = make_physical(plan, delivers=ready.written.write is None, pool_of=pool_of, at_end=ready.at_end)
        program = replace(program, stages=physical.stages)
        notes = (*notes, "the model mostly waits: it has workers of its own beside the CPU workers")
    ready = replace(ready, physical=physical, program=program, engine=choice.engine, notes=notes, sampled=choice.sampled)
    if choice.engine == "ray":
        placed = place_on_cluster(plan, physical, pool_of, options)
        budget = options.memory_bytes or placed.budget_bytes
        notes = (*notes, *placed.notes)
        return replace(ready, workers=placed.workers, budget_bytes=budget, notes=notes, cluster=placed.shapes)
    cores = options.cpus or ready.machine.cores
    if options.cpus is None and (choice.small or choice.engine == "inline"):
        cores = 1  # more would take turns, and hand blocks to each other
    workers = _workers(physical, cores, ready.machine, _local_shares(plan, pool_of))
    if len(workers) == 1 and not any(_sees_blocks(op, options.deterministic) for op in plan.ops):
        program = replace(program, limits=replace(program.limits, least_rows=LEAST_ROWS_UNSHARED))
    return replace(ready, workers=workers, program=program)


def _sees_blocks(op: Op, deterministic: bool) -> bool:
    """Do the rows that its function gets at once depend on where blocks end? Then those must depend on the input alone."""
    return (isinstance(op, MapBatches) and op.batch_rows is None) or (isinstance(op, Predict) and deterministic)


def known_schema(plan: Plan) -> pa.Schema | None:
    """What all rows of the plan will have; None where a function or a model decides."""
    return static_schema(plan.read.source.schema(), resolve(plan).ops)


def schema_without_rows(plan: Plan) -> pa.Schema:
    """For a result that has none."""
    return rowless_schema(plan.read.source.schema(), resolve(plan).ops)


def resolve(plan: Plan) -> Plan:
    """Fill in what only the input's schema tells: names behind drop and rename, columns that a filter expression reads."""
    schema = plan.read.source.schema()
    _check_unique(schema.names, plan.read.source.describe())
    known: tuple[str, ...] | None = tuple(schema.names)
    before_group = known
    ops: list[Op] = []
    for op in plan.ops:
        if isinstance(op, Predict) and op.group is not None:
            before_group = before_group if ops and _group_of(ops[-1]) == op.group else known
            op = op if op.inputs else replace(op, inputs=_inputs_of(op, before_group))
        if known is not None and isinstance(op, Reshape):
            op = op.resolve(known)
        elif known is not None and isinstance(op, FilterExpr) and not op.columns:
            op = replace(op, columns=_expression_columns(op.expression, static_schema(schema, ops)))
        elif known is not None and isinstance(op, Predict) and not op.output and DEFAULT_OUTPUT in known:
            op = replace(op, keeps_default=True)
        ops.append(op)
        known = check_columns(ops, schema.names)[-1]
    return replace(plan, ops=tuple(ops))


def _group_of(op: Op) -> int | None:
    return op.group if isinstance(op, Predict) else None


def _inputs_of(op: Predict, known: tuple[str, ...] | None) -> tuple[str, ...]:
    """What a model of a group reads that named no columns: all that there were before the group."""
    if known is None:
        raise PlanError(
            f"{op.name} names no input columns, and which there are is known only while running",
            hint="name them: several models in one predict don't see each other's outputs",
        )
    return known


def _check_unique(names: Sequence[str], source: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else ()
    if twice:
        raise PlanError(
            f"the input has more than one column {twice[0]!r}",
            where=(("input", source),),
            hint="columns are told apart by name: write the input again with a name for each",
        )


def _expression_columns(expression: Any, schema: pa.Schema | None) -> tuple[str, ...]:
    """Which columns an expression reads; () when the schema is not known before the run."""
    import pyarrow as pa

    from headrace.core.expressions import columns_of

    if schema is None:
        return ()
    try:
        return columns_of(expression, schema)
    except pa.ArrowInvalid as error:
        why = str(error)
        if "FieldRef" in why:
            why, _, _ = why.partition(" in ")  # what follows are the columns, a line each, and one of ours
        text = f"the filter {expression} can't be used on this input: {why}"
        raise PlanError(text, where=(("columns there", ", ".join(schema.names)),), hint="check the column names") from None
    except (pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        text = f"the filter {expression} does not fit the columns' types: {error}"
        raise PlanError(text, hint="cast one side") from None


def _check_models(plan: Plan) -> None:
    """Let adapters refuse what can't work. Raises PlanError."""
    for i, op in enumerate(plan.ops):
        if isinstance(op, Predict) and isinstance(op.model.target, ModelAdapter) and not op.model.is_class:
            op.model.target.check(static_schema(plan.read.source.schema(), plan.ops[:i]), op.inputs)


class _PoolChoice:
    """Which pool a model runs in. Raises PlanError for a device that is not there.

    waiting: models without a device spend their time waiting, and get a pool of their own. gpus_may_come: a cluster that has
    none may get some.
    """

    def __init__(self, machine: Machine, *, waiting: bool = False, gpus_may_come: bool = False) -> None:
        self.machine = machine
        self.waiting = waiting
        self.gpus_may_come = gpus_may_come

    def __call__(self, op: Predict) -> str:
        amounts = ((name, repr(float(amount)).removesuffix(".0")) for name, amount in op.resources)  # bytes to the last digit:
        asked = ",".join(f"{name}={amount}" for name, amount in amounts)  # workers of one pool hold the same
        return self._kind(op) + (f"({asked})" if asked else "")

    def _kind(self, op: Predict) -> str:
        device = op.device
        has_cuda = any(d.startswith("cuda") for d in self.machine.devices)
        if device == "auto":
            if has_cuda and _takes_device(op):
                return "cuda"
            return WAITING_POOL if self.waiting or is_stream(op) else CPU_POOL
        kind, _, index = device.partition(":")
        if kind == "cpu":
            return WAITING_POOL if is_stream(op) else CPU_POOL
        if kind == "sim":
            return device
        if kind != "cuda" or (index and not index.isdigit()):
            raise PlanError(f"{op.name}: there is no device {device!r}", hint="use auto, cpu, cuda, cuda:<n> or sim")
        if self.gpus_may_come and not has_cuda and not index:
            return device
        if not has_cuda or (index and device not in self.machine.devices):
            there = ", ".join(self.machine.devices) or "no accelerator"
            raise PlanError(
                f"{op.name} asks for {device}, and this machine has {there}",
                hint='use device="auto", which takes a GPU where there is one',
            )
        return device


def _takes_device(op: Predict) -> bool:
    """Can this model be told where to run? A class whose constructor has a `device`, or a torch module."""
    import inspect

    target: Any = op.model.target
    if op.model.is_class:
        return "device" in inspect.signature(target).parameters
    if isinstance(target, ModelAdapter):
        return "cuda" in target.devices
    return is_instance(target, "torch.nn", "Module")


def _local_shares(plan: Plan, pool_of: _PoolChoice) -> dict[str, int]:
    """Workers for each device of a pool whose model asks for a share of one. Raises PlanError for what only a cluster has."""
    shares: dict[str, int] = {}
    for op in plan.ops:
        if isinstance(op, Predict) and op.resources:
            unknown = [name for name, _ in op.resources if name not in ("CPU", "GPU")]
            if unknown:
                raise PlanError(
                    f"{op.name} asks for resource {unknown[0]!r}, which this machine does not have",
                    hint='custom resources are those of a Ray cluster: use engine="ray"',
                )
            shares[pool_of(op)] = max(1, int(1 / dict(op.resources).get("GPU", 1.0)))
    return shares


def _workers(physical: PhysicalPlan, cores: int, machine: Machine, shares: Mapping[str, int]) -> tuple[WorkerSpec, ...]:
    """One CPU worker per core, one per device of each pool (more when a model asks for more replicas, or for a share)."""
    specs = [WorkerSpec(i, CPU_POOL, "cpu") for i in range(cores)]
    for pool in physical.pools:
        replicas = max((s.max_workers or 0 for s in physical.stages if s.pool == pool), default=0)
        if pool == CPU_POOL:
            specs += [WorkerSpec(i, CPU_POOL, "cpu") for i in range(cores, replicas)]
            continue
        if pool == WAITING_POOL:
            capped = all(s.max_workers is not None for s in physical.stages if s.pool == pool)
            specs += [WorkerSpec(len(specs) + i, pool, "cpu") for i in range(replicas if capped else max(cores, replicas))]
            continue
        kind = pool.partition("(")[0]
        devices = [kind] if ":" in kind else [d for d in machine.devices if d.partition(":")[0] == kind]
        if kind == "sim" and not devices:
            devices = [f"sim:{i}" for i in range(max(1, replicas))]
        devices = (devices or ["cpu"]) * shares.get(pool, 1)
        for i in range(max(replicas, len(devices))):
            specs.append(WorkerSpec(len(specs), pool, devices[i % len(devices)]))
    return tuple(specs)
