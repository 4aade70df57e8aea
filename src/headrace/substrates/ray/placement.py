"""Which workers go on which nodes. Pure: nodes and shapes in, worker specs out.

A CPU worker for each CPU of every node; a device worker for each device, or share of one, where devices are. What Ray must set
aside for a worker is its pool's shape.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import ceil

from msgspec import Struct, field

from headrace.core.errors import PlanError
from headrace.core.resources import CPU_POOL, WAITING_POOL, WorkerSpec

STORE_SHARE = 0.4  # of the object stores for blocks in flight: a block is in two stores while another node reads it
LEAST_BUDGET = 64 << 20
_TINY = 1e-9  # what sums of fractions may be off by


class Node(Struct, frozen=True):
    """A live node. name: unique, and for people: "10.0.0.3/1a2b3c4d". id: Ray's. resources: in Ray's words: CPU, GPU, memory
    (bytes) and custom ones. store_bytes: of its object store.
    """

    name: str
    id: str
    resources: Mapping[str, float]
    store_bytes: int = 0

    @property
    def cpus(self) -> int:
        return int(self.resources.get("CPU", 0))


class Shape(Struct, frozen=True):
    """What one worker of a pool holds of its node. device: what it is told that it runs on. most: workers in all, None for as
    many as fit.
    """

    device: str
    cpus: float = 0.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict[str, float])
    most: int | None = None

    def most_on(self, nodes: Sequence[Node]) -> int:
        """A bound on the workers of the pool: without any demand but for memory, as many as there are CPUs."""
        if self.most is not None:
            return self.most
        return 1 << 30 if self.wanted.keys() - {"memory"} else max(1, sum(n.cpus for n in nodes))

    @property
    def wanted(self) -> dict[str, float]:
        """What Ray sets aside for a worker."""
        return {k: v for k, v in {"CPU": self.cpus, "GPU": self.gpus, **self.resources}.items() if v > 0}

    def __str__(self) -> str:
        return ", ".join(_amount(k, v) for k, v in self.wanted.items()) or "nothing that Ray counts"


def shape_of(
    pool: str,
    asked: Mapping[str, float],
    nodes: Sequence[Node],
    *,
    cpus: int | None,
    replicas: int,
    capped: bool = False,
    devices: Sequence[str] | None = None,
) -> Shape:
    """The shape of a pool. asked: resources that its model names. cpus: bound on CPU workers. replicas: the most that a model
    of it asks for, 0 for auto. capped: all its models ask for a number.
    """
    kind = pool.partition("(")[0].partition(":")[0]
    custom = {k: v for k, v in asked.items() if k not in ("CPU", "GPU")}
    if pool == CPU_POOL:
        return Shape("cpu", cpus=1.0, most=cpus)
    if pool == WAITING_POOL:
        return Shape("cpu", most=replicas or max(1, sum(n.cpus for n in nodes)))
    if kind == "cuda":
        gpus = sum(int(n.resources.get("GPU", 0)) for n in nodes)
        share = asked.get("GPU") or (1.0 if replicas <= max(1, gpus) else 1.0 / -(-replicas // max(1, gpus)))
        most = replicas if capped else None
        return Shape("cuda:0", asked.get("CPU", 0.0), share, custom, most)  # Ray shows a worker its own devices only
    if kind == "sim":
        there = any(n.resources.get("sim") for n in nodes)
        resources = {**({"sim": 1.0} if there else {}), **custom}
        device = pool.partition("(")[0] if ":" in pool else "sim:0"
        named = sum(1 for d in devices or () if d.startswith("sim"))
        most = max(1, replicas, named) if not resources else replicas if capped else None
        return Shape(device, asked.get("CPU", 0.0), asked.get("GPU", 0.0), resources, most)
    most = max(1, replicas) if not asked else replicas if capped else None
    return Shape("cpu", asked.get("CPU", 0.0), asked.get("GPU", 0.0), custom, most)


def place(
    shapes: Mapping[str, Shape],
    nodes: Sequence[Node],
    *,
    to_come: Collection[str] | None = (),
    have: Mapping[str, int] | None = None,
    held: Mapping[str, Sequence[str]] | None = None,
) -> tuple[WorkerSpec, ...]:
    """The workers to start. One of each pool finds its place first, those that fit on few nodes before others; then pools take
    turns, so that those which need the same device share them; CPU workers get what CPUs are left, at least one.

    to_come: resources that an autoscaler may bring (None: any): a pool that fits nowhere yet gets one worker, which waits for
    its node. have: workers of each pool that there are already, on these nodes or others: a pool may then get none, and where
    nobody reads a CPU worker comes before models. held: node -> pools of the workers that are on it already.

    Raises PlanError for a pool that can never have a worker.
    """
    room = {n.name: _Room(n) for n in nodes}
    for name, pools in (held or {}).items():
        for pool in pools:
            room[name].take(shapes[pool].wanted if pool in shapes else {})
    before = have or {}
    here = [pool for pools in (held or {}).values() for pool in pools]
    left = {  # how many more there may be; a bound that CPUs set is one for these nodes
        pool: shape.most_on(nodes) - (here.count(pool) if shape.most is None else before.get(pool, 0))
        for pool, shape in shapes.items()
    }
    found = _first({p: s for p, s in shapes.items() if left[p] > 0}, room, reads=have is None or before.get(CPU_POOL, 0) > 0)
    found = {pool: found.get(pool, []) for pool in shapes}
    for pool in shapes:
        if not found[pool] and have is None and not (to_come is None or shapes[pool].wanted.keys() <= set(to_come)):
            raise _nowhere(pool, shapes[pool], nodes)
    growing = [pool for pool in shapes if pool != CPU_POOL and found[pool]]
    while growing:
        for pool in list(growing):
            shape = shapes[pool]
            more = [] if len(found[pool]) >= left[pool] else _take(shape, room, 1, len(found[pool]))
            found[pool] += more
            if not more:
                growing.remove(pool)
    if CPU_POOL in shapes:
        shape = shapes[CPU_POOL]
        most = sum(n.cpus for n in nodes) if shape.most is None else left[CPU_POOL]
        found[CPU_POOL] += _take(shape, room, max(0, most - len(found[CPU_POOL])), len(found[CPU_POOL]))
    specs: list[WorkerSpec] = []
    for pool, shape in shapes.items():
        for node in found[pool] or ([""] if have is None else []):
            specs.append(WorkerSpec(len(specs), pool, shape.device, node))
    return tuple(specs)


def leaving_a_reader(
    shapes: Mapping[str, Shape], nodes: Sequence[Node], *, to_come: Collection[str] | None
) -> dict[str, Shape]:
    """The shapes as they can be placed: where one worker of each model leaves no CPU, and none may come, blocks are made by one
    CPU worker that asks for none. Nobody else could.
    """
    cpu = shapes.get(CPU_POOL)
    may_come = to_come is None or "CPU" in to_come
    if cpu is None or may_come or not any(n.cpus for n in nodes):
        return dict(shapes)
    if _first(shapes, {n.name: _Room(n) for n in nodes})[CPU_POOL]:
        return dict(shapes)
    return {**shapes, CPU_POOL: Shape(cpu.device, most=1)}


class _Room:
    """What is left of a node. As Ray counts, a share of a GPU is a share of one device, the fullest that has it."""

    def __init__(self, node: Node) -> None:
        self._left = dict(node.resources)
        self._gpus = [1.0] * int(self._left.pop("GPU", 0))

    def holds(self, wanted: Mapping[str, float]) -> bool:
        """Is all of it left?"""
        if any(self._left.get(k, 0.0) + _TINY < v for k, v in wanted.items() if k != "GPU"):
            return False
        share, count = _of_devices(wanted)
        return sum(left + _TINY >= share for left in self._gpus) >= count

    def left(self, name: str) -> float:
        return sum(self._gpus) if name == "GPU" else self._left.get(name, 0.0)

    def take(self, wanted: Mapping[str, float]) -> bool:
        """Take all of it, or nothing."""
        if not self.holds(wanted):
            return False
        share, count = _of_devices(wanted)
        free = sorted((left, i) for i, left in enumerate(self._gpus) if left + _TINY >= share)
        for _, i in free[:count]:
            self._gpus[i] -= share
        for k, v in wanted.items():
            if k != "GPU":
                self._left[k] -= v
        return True


def _of_devices(wanted: Mapping[str, float]) -> tuple[float, int]:
    """(what of each GPU, of how many)."""
    gpus = wanted.get("GPU", 0.0)
    return (gpus, int(gpus > 0)) if gpus < 1.0 else (1.0, ceil(gpus))


def _first(shapes: Mapping[str, Shape], room: Mapping[str, _Room], *, reads: bool = True) -> dict[str, list[str]]:
    """The node of one worker of each pool, [] where none has room. Models come first, as CPU workers fit where anything does,
    and of them those that fewer nodes can hold, then those that ask for more of what there is. reads: somebody does, or can;
    else a CPU worker comes before models.
    """

    def rank(pool: str) -> tuple[bool, int, float]:
        wanted = shapes[pool].wanted
        nodes = sum(each.holds(wanted) for each in room.values())
        there = {name: sum(each.left(name) for each in room.values()) for name in wanted}
        share = max((amount / max(_TINY, there[name]) for name, amount in wanted.items()), default=0.0)
        return (pool == CPU_POOL) == reads, nodes, -share

    return {pool: _take(shapes[pool], room, 1) for pool in sorted(shapes, key=rank)}


def _take(shape: Shape, room: Mapping[str, _Room], count: int, turn: int = 0) -> list[str]:
    """Nodes for up to `count` more workers, in turns; what they hold is taken from `room`."""
    names = list(room)
    names = names[turn % len(names) :] + names[: turn % len(names)] if names else []
    taken: list[str] = []
    while len(taken) < count:
        before = len(taken)
        for name in names:
            if len(taken) < count and room[name].take(shape.wanted):
                taken.append(name)
        if len(taken) == before:
            break
    return taken


def _nowhere(pool: str, shape: Shape, nodes: Sequence[Node]) -> PlanError:
    return PlanError(
        f"no node of the cluster can hold a worker of pool {pool!r}: it needs {shape}",
        where=tuple(("node", f"{n.name}: {_resources(n)}") for n in nodes[:5]),
        hint="start a node that has it, or ask for what there is (device=, resources=)",
    )


def budget_bytes(nodes: Sequence[Node]) -> int:
    """Blocks that may be in flight without any store's having to spill: the smallest store sets the share of all."""
    stores = [n.store_bytes for n in nodes if n.store_bytes]
    return max(LEAST_BUDGET, int(STORE_SHARE * min(stores) * len(stores))) if stores else 1 << 30


def node_name(host: str, id: str) -> str:
    """As people see it, and unique: nodes of a test cluster share a host."""
    return f"{host}/{id[:8]}"


def _resources(node: Node) -> str:
    return ", ".join(_amount(k, v) for k, v in sorted(node.resources.items()) if ":" not in k) or "nothing"


def _amount(name: str, amount: float) -> str:
    return f"{amount / 1e9:.3g} GB of memory" if name == "memory" else f"{amount:g} {name}"
