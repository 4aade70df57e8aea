"""Resources: what a machine has and what a worker holds. Pure data; detection lives in runtime/machine.py."""

from __future__ import annotations

from msgspec import Struct

CPU_POOL = "cpu"
WAITING_POOL = "waiting"  # models on CPUs that mostly wait (an endpoint, a sleep): as many workers as cores, beside them


class Machine(Struct, frozen=True):
    """cores: usable (affinity and cgroup quota). memory_bytes: usable (cgroup aware). devices: e.g. ("cuda:0",)."""

    cores: int
    memory_bytes: int
    devices: tuple[str, ...] = ()


class WorkerSpec(Struct, frozen=True):
    """What a worker to be started holds. pool: "cpu" or a device kind ("cuda", "sim"). device: "cpu", "cuda:0", "sim:1".

    node: which machine of a cluster it lives on; "" for this one, or for wherever there is room.
    """

    id: int
    pool: str
    device: str
    node: str = ""
