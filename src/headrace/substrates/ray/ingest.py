"""Delivering a run's blocks as objects of the cluster: for training workers, and for Ray Data. No byte passes the driver.

A `RefBlock` is what a run delivers then: a reference whose owner is the process that drives the run: it outlives the workers,
though not the node that it lies on. `SplitServer` is an actor that drives one run per epoch for the ranks of a streaming_split;
`RayChannel` is how their iterators reach it, from anywhere in the cluster.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import ray
from msgspec import Struct
from msgspec.structs import replace
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headrace.core.errors import HeadraceError, PlanError, WorkerDied
from headrace.core.refs import BlockRef
from headrace.runtime.ingest.coordinator import AHEAD
from headrace.runtime.ingest.hub import Hub
from headrace.substrates.blocks import own_copy, zip_parts
from headrace.substrates.ray.actor import Surroundings, settle_in
from headrace.substrates.ray.parcel import receive, send
from headrace.substrates.ray.store import block_lost

if TYPE_CHECKING:
    import pyarrow as pa

BEAT_S = 5.0  # between signs of life of a consumer in an epoch
SILENT_S = 60.0  # without one it counts as gone
MADE_S = 120.0  # for a block to be joined where it lies
SEAT_S = 12.0  # the same when another wants its seat

OpenRun = Callable[[Callable[[Any], None]], Any]


class RefBlock(Struct, frozen=True):
    """`num_rows` rows from `start` on of the record batch that `ref` stands for."""

    ref: Any
    start: int
    num_rows: int

    def slice(self, start: int) -> RefBlock:
        """Without its first rows."""
        return replace(self, start=self.start + start, num_rows=self.num_rows - start)


def deliver(block: BlockRef) -> RefBlock:
    """The block as one object that this process owns. Waits until it is made. Raises BlockLost."""
    columns = [part.columns for part in block.parts]
    refs: Any = _JOIN.remote(columns, block.rows, *(part.handle for part in block.parts))
    ref, made = refs
    try:
        ray.get(made, timeout=MADE_S)
    except RayTaskError as error:
        if isinstance(error.cause, ObjectLostError):
            raise block_lost(error.cause) from None
        raise
    except RayError as lost:  # the node or worker at it died, or gives no answer
        raise block_lost(lost) from None
    return RefBlock(ref, 0, block.rows)


@ray.remote(num_cpus=0, num_returns=2, max_retries=0)
def _join(columns: Sequence[tuple[str, ...]], rows: int, *batches: Any) -> tuple[Any, bool]:
    return own_copy(zip_parts(list(zip(columns, batches, strict=True)), rows)), True


_JOIN: Any = _join  # made once: each remote function is known to the whole cluster for the life of the job


# ---------------------------------------------------------------- streaming_split


class _Guest(Struct):
    """A consumer in its epoch, or waiting for it."""

    rank: int
    heard_s: float


class SplitServer:
    """An actor, made with max_concurrency: the ranks' calls wait in it. payload: [parcel of an OpenRun].

    A rank that gives no sign of life for SILENT_S has left its epoch; for SEAT_S, if somebody else wants its seat, as a worker
    does that takes the place of a dead one.
    """

    def __init__(self, ranks: int, equal: bool, payload: list[Any], around: Surroundings) -> None:
        settle_in(around)
        open_run: OpenRun = receive(payload[0])
        self._hub = Hub(ranks, equal=equal, open_run=open_run)
        self._guests: dict[int, _Guest] = {}
        self._expelled: set[int] = set()
        threading.Thread(target=self._listen, name="headrace-ingest-listen", daemon=True).start()

    def join(self, rank: int) -> int:
        """The consumer's ticket; `begun` tells when its epoch begins. Raises PlanError when the rank's seat is taken by another
        that is alive.
        """
        ticket = self._hub.ticket()
        patience_s = time.monotonic() + SEAT_S + BEAT_S
        while True:
            try:
                self._hub.join(ticket, rank)
                break
            except PlanError:
                holders = [t for t, guest in list(self._guests.items()) if guest.rank == rank]
                if not holders or time.monotonic() > patience_s:
                    raise
                self._expel(SEAT_S, holders)
                time.sleep(0.2)
        self._guests[ticket] = _Guest(rank, time.monotonic())
        return ticket

    def begun(self, ticket: int) -> bool:
        """Whether the epoch has begun; waits for that a little while."""
        self._hear(ticket)
        epoch = self._hub.wait_begin(ticket, BEAT_S)
        self._hear(ticket)
        return epoch >= 0

    def next(self, ticket: int) -> tuple[list[Any], int, int] | None:
        """([reference], first row, rows): the consumer reads the object itself, and says that it has `reached` it: it may have
        died while it waited here. None at the end.
        """
        self._hear(ticket)
        piece = self._hub.next(ticket, sent=True)
        self._check(ticket)
        if piece is None:
            self._guests.pop(ticket, None)
            return None
        block: RefBlock = piece.block
        return [block.ref], block.start + piece.start, piece.rows

    def reached(self, ticket: int) -> None:
        self.alive(ticket)
        self._hub.reached(ticket)

    def leave(self, ticket: int) -> None:
        self._guests.pop(ticket, None)
        self._hub.leave(ticket)

    def alive(self, ticket: int) -> None:
        guest = self._guests.get(ticket)
        if guest is not None:
            guest.heard_s = time.monotonic()

    def close(self) -> None:
        self._hub.close(timeout_s=BEAT_S)

    def _hear(self, ticket: int) -> None:
        self._check(ticket)
        self.alive(ticket)

    def _check(self, ticket: int) -> None:
        """Raises WorkerDied for one that was given up: its epoch must not look complete to it."""
        if ticket in self._expelled:
            raise WorkerDied(
                "this worker gave no sign of life for so long that its part of the epoch was given up",
                hint="begin the next epoch; a worker that stops for a minute (a debugger, a frozen machine) counts as dead",
            )

    def _listen(self) -> None:
        """Let those leave that have died."""
        while True:
            time.sleep(BEAT_S)
            self._expel(SILENT_S, list(self._guests))

    def _expel(self, silent_s: float, tickets: Sequence[int]) -> None:
        now = time.monotonic()
        for ticket in tickets:
            guest = self._guests.get(ticket)
            if guest is not None and now - guest.heard_s > silent_s:
                self._expelled.add(ticket)
                self.leave(ticket)


def serve(ranks: int, *, equal: bool, open_run: OpenRun) -> RayChannel:
    """Start the actor that drives the epochs, on the node of this process, with which it ends, or by `close`. Raises PlanError
    when the plan can't be sent.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    server = ray.remote(SplitServer).options(num_cpus=0, max_concurrency=4 * ranks + 8, scheduling_strategy=here)
    payload = send(open_run, "this pipeline")
    return RayChannel(server.remote(ranks, equal, [payload], Surroundings.here()), owner=True)


class RayChannel:
    """See runtime.ingest.channel.Channel. Pickles to the actor's handle. owner: of the process that started it."""

    ahead: ClassVar[int] = AHEAD

    def __init__(self, server: Any, *, owner: bool = False) -> None:
        self._server = server
        self._owner = owner

    def __reduce__(self) -> tuple[Callable[..., RayChannel], tuple[Any, ...]]:
        return RayChannel, (self._server,)

    def join(self, rank: int) -> RayEpoch:
        epoch = RayEpoch(self._server, ask(self._server.join.remote(rank)))
        try:
            while not ask(self._server.begun.remote(epoch.ticket)):
                pass
        except BaseException:
            epoch.leave()
            raise
        return epoch

    def close(self) -> None:
        if self._owner:
            with contextlib.suppress(HeadraceError):
                ask(self._server.close.remote())
            ray.kill(self._server)


class RayEpoch:
    """A rank's share of one epoch; see runtime.ingest.channel.Epoch."""

    def __init__(self, server: Any, ticket: int) -> None:
        self._server = server
        self.ticket = ticket
        self._over = threading.Event()
        threading.Thread(target=self._beat, name="headrace-ingest-beat", daemon=True).start()

    def next(self) -> pa.RecordBatch | None:
        if self._over.is_set():
            return None
        try:
            answer = ask(self._server.next.remote(self.ticket))
            if answer is None:
                self._over.set()
                return None
            (ref,), start, rows = answer
            block = ask(ref).slice(start, rows)
            self._server.reached.remote(self.ticket)
            return block
        except BaseException:
            self._over.set()
            raise

    def leave(self) -> None:
        if not self._over.is_set():
            self._over.set()
            self._server.leave.remote(self.ticket)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(Exception):
                self._server.alive.remote(self.ticket)


def ask(ref: Any) -> Any:
    """The answer. Raises what the actor raised, as it was, and WorkerDied when it is gone."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, HeadraceError):
            raise error.cause from None
        raise
    except ObjectLostError as lost:
        raise WorkerDied(
            f"a block of this epoch is gone with its node ({type(lost).__name__})", hint="begin the epoch anew"
        ) from None
    except RayActorError as gone:
        raise WorkerDied(
            f"the actor that runs the pipeline of this streaming_split has ended ({type(gone).__name__})",
            hint="it lives until the split is closed, and no longer than its node and the process that called streaming_split",
        ) from None
