"""Placement on a Ray cluster, as planning needs it: what the cluster has, and which workers a plan gets there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct

from headrace.core.options import RunOptions
from headrace.core.resources import Machine, WorkerSpec
from headrace.plan.nodes import Plan, Predict
from headrace.plan.physical import PhysicalPlan


class Placed(Struct, frozen=True):
    """shapes: pool -> substrates.ray.placement.Shape. notes: for explain and the report."""

    workers: tuple[WorkerSpec, ...]
    shapes: Mapping[str, Any]
    budget_bytes: int
    notes: tuple[str, ...]


def reach(options: RunOptions) -> contextlib.AbstractContextManager[None]:
    """Be connected to the cluster that the options name, while inside; nothing for other engines."""
    if options.engine != "ray":
        return contextlib.nullcontext()
    from headrace.substrates.ray.cluster import connected

    return connected(options.address)


def cluster_machine() -> Machine:
    """The cluster as one machine. With an autoscaler that can bring GPUs it counts as having one."""
    from headrace.substrates.ray.cluster import kinds_to_come, live_nodes

    nodes = live_nodes()
    gpus = sum(int(n.resources.get("GPU", 0)) for n in nodes)
    if not gpus and "GPU" in (kinds_to_come() or ()):
        gpus = 1
    return Machine(
        cores=max(1, sum(n.cpus for n in nodes)),
        memory_bytes=sum(n.store_bytes for n in nodes),
        devices=tuple(f"cuda:{i}" for i in range(gpus)),
    )


def gpus_may_come() -> bool:
    """An autoscaler is there, and does not say what it can bring: who asks for a GPU by name may wait for one."""
    from headrace.substrates.ray.cluster import kinds_to_come

    return kinds_to_come() is None


def place_on_cluster(plan: Plan, physical: PhysicalPlan, pool_of: Callable[[Predict], str], options: RunOptions) -> Placed:
    """Workers for every pool of the plan. Raises PlanError for a pool that no node can hold, now or later."""
    from headrace.substrates.ray import placement
    from headrace.substrates.ray.cluster import kinds_to_come, live_nodes

    nodes = live_nodes()
    asked = {pool_of(op): dict(op.resources) for op in plan.ops if isinstance(op, Predict)}
    replicas = {pool: [s.max_workers for s in physical.stages if s.pool == pool] for pool in physical.pools}
    shapes = {
        pool: placement.shape_of(
            pool,
            asked.get(pool, {}),
            nodes,
            cpus=options.cpus,
            replicas=max((most or 0 for most in replicas[pool]), default=0),
            capped=None not in replicas[pool],
            devices=options.devices,
        )
        for pool in physical.pools
    }
    to_come = kinds_to_come()
    shapes = placement.leaving_a_reader(shapes, nodes, to_come=to_come)
    workers = placement.place(shapes, nodes, to_come=to_come)
    places = {spec.node for spec in workers}
    used = [n for n in nodes if n.name in places] or nodes
    return Placed(workers, shapes, placement.budget_bytes(used), _notes(workers, shapes))


def _notes(workers: tuple[WorkerSpec, ...], shapes: Mapping[str, Any]) -> tuple[str, ...]:
    notes: list[str] = []
    for pool, shape in shapes.items():
        where: dict[str, int] = {}
        for spec in workers:
            if spec.pool == pool:
                where[spec.node or "a node that is to come"] = where.get(spec.node or "a node that is to come", 0) + 1
        places = ", ".join(f"{count} on {node}" for node, count in where.items())
        notes.append(f"placement {pool}: {places}; each holds {shape}")
    return tuple(notes)
