"""Pools that have no worker up: when to look why, and what there is to see.

A run's actors hold their CPUs until its consumer has finished. A consumer that begins another run meanwhile (a validation
inside of a training loop) waits for that one, which waits for those CPUs: so nobody may have to wait for what this program
holds by itself. What other programs hold is theirs.

What must not live here: actors. `pool` acts on what this module finds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import ClassVar

import ray
from msgspec import Struct

LOOK_S = 3.0  # without a worker: a process that may start at once is there in one or two
TELL_S = 10.0  # without a worker: people are told


class Standing(Struct, frozen=True):
    """What the cluster says, in Ray's words. starting: ids of the run's actors that have what they asked for. held: what other
    actors of this program hold, or this process. free: on all nodes. known: False where Ray did not say who holds what.
    """

    starting: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    free: Mapping[str, float] = {}
    known: bool = True


def standing(actors: Mapping[str, tuple[bool, Mapping[str, float]]] | None, own: Collection[str]) -> Standing:
    """Asks the head. actors: those of this program, see `cluster.actors_of`. own: ids of the run's."""
    free: Mapping[str, float] = {}
    with contextlib.suppress(Exception):
        free = ray.available_resources()
    held = set(_held_here())
    for id, (begun, wanted) in (actors or {}).items():
        if begun and id not in own:
            held.update(k for k, v in wanted.items() if v > 0)
    starting = frozenset(id for id, (begun, _) in (actors or {}).items() if begun and id in own)
    return Standing(starting, frozenset(held), free, actors is not None)


def _held_here() -> frozenset[str]:
    """By the task or actor that this process is, if it is one."""
    with contextlib.suppress(Exception):
        assigned: Mapping[str, float] = ray.get_runtime_context().get_assigned_resources()
        return frozenset(name for name, amount in assigned.items() if amount > 0)
    return frozenset()


class Waits:
    """Pools without a worker that is up, and since when. The time is given.

    helped: people were told of a run that got help; once a process, since loops begin a run each time.
    """

    helped: ClassVar[bool] = False

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._next_s = 0.0
        self._asked = False
        self._told: set[str] = set()

    def begin(self, pool: str, now_s: float) -> None:
        if not self._since:
            self._next_s = now_s + LOOK_S
        self._since.setdefault(pool, now_s)

    def end(self, pool: str) -> None:
        self._since.pop(pool, None)

    def __contains__(self, pool: str) -> bool:
        return pool in self._since

    @property
    def look_s(self) -> float | None:
        """When to look next; None while nobody waits, or an answer is to come."""
        return None if self._asked or not self._since else self._next_s

    def looks(self) -> None:
        self._asked = True

    def seen(self, now_s: float) -> tuple[str, ...]:
        """Pools that have waited for as long as it takes to look."""
        self._asked, self._next_s = False, now_s + LOOK_S
        return tuple(pool for pool, since_s in self._since.items() if now_s - since_s >= LOOK_S)

    def tells_help(self) -> bool:
        """Whether to tell that a run got help."""
        new, Waits.helped = not Waits.helped, True
        return new

    def tells_of(self, pool: str, now_s: float) -> bool:
        """Whether to tell that the pool waits: once a run, and not before it has waited for long."""
        if pool in self._told or now_s - self._since[pool] < TELL_S:
            return False
        self._told.add(pool)
        return True


def helped_out(pool: str) -> str:
    """What people are told when a worker was started that asks for no CPU."""
    return (
        f"pool {pool!r} found no free CPU for {LOOK_S:g} s, and this program holds some elsewhere, as a run whose consumer "
        "has not finished does: so it goes on with one worker that asks for none. (cpus= of the other run leaves CPUs free)"
    )


def waits_for(pool: str, wanted: Mapping[str, float], seen: Standing) -> str:
    """What people are told of a pool that goes on waiting."""
    needs = ", ".join(f"{v:g} {k}" for k, v in wanted.items())
    lacking = [k for k, v in wanted.items() if seen.free.get(k, 0.0) < v]
    taken = f"the cluster has no {' and no '.join(lacking)} left" if lacking else "no node has that left"
    hint = "the run goes on when others give it back; `ray status` tells what is in use"
    if seen.held & wanted.keys():
        taken += ": this program holds some elsewhere, as a run does whose consumer has not finished"
        hint = "finish or close the other run first, or let each take a share (cpus=, replicas=, resources=)"
    return f"no worker of pool {pool!r} could start for {TELL_S:g} s: it needs {needs}, and {taken}. ({hint})"
