"""Delivering a run's blocks as objects of the cluster: for training workers, and for Ray Data. No byte passes the driver.

A `RefBlock` is what a run delivers then: a reference whose owner is the process that drives the run: it outlives the
workers. `SplitServer` is an actor that drives one run per epoch for the ranks of a streaming_split; `RayChannel` is how their
iterators reach it, from anywhere in the cluster.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from headrace.core.errors import HeadraceError, WorkerDied
from headrace.core.refs import BlockRef
from headrace.runtime.ingest.coordinator import AHEAD
from headrace.runtime.ingest.hub import Hub
from headrace.substrates.blocks import own_copy, zip_parts
from headrace.substrates.ray.actor import Surroundings, settle_in
from headrace.substrates.ray.store import block_lost

if TYPE_CHECKING:
    import pyarrow as pa

BEAT_S = 5.0  # between signs of life of a consumer in an epoch
SILENT_S = 60.0  # without one it counts as gone

OpenRun = Callable[[Callable[[Any], None]], Any]


@dataclass(frozen=True, slots=True)
class RefBlock:
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
    task = ray.remote(_join).options(num_cpus=0, num_returns=2, max_retries=0)
    refs: Any = task.remote(columns, block.rows, *(part.handle for part in block.parts))
    ref, made = refs
    try:
        ray.get(made)
    except RayTaskError as error:
        if isinstance(error.cause, ObjectLostError):
            raise block_lost(error.cause) from None
        raise
    except ObjectLostError as lost:
        raise block_lost(lost) from None
    return RefBlock(ref, 0, block.rows)


def _join(columns: Sequence[tuple[str, ...]], rows: int, *batches: Any) -> tuple[Any, bool]:
    return own_copy(zip_parts(list(zip(columns, batches, strict=True)), rows)), True


# ---------------------------------------------------------------- streaming_split


class SplitServer:
    """An actor, made with max_concurrency: the ranks' calls wait in it. payload: a pickled OpenRun."""

    def __init__(self, ranks: int, equal: bool, payload: bytes, around: Surroundings) -> None:
        import pickle

        settle_in(around)
        open_run: OpenRun = pickle.loads(payload)
        self._hub = Hub(ranks, equal=equal, open_run=open_run)
        self._heard: dict[int, float] = {}
        threading.Thread(target=self._listen, name="headrace-ingest-listen", daemon=True).start()

    def join(self, rank: int) -> int:
        """The consumer's ticket, when the epoch has begun."""
        ticket = self._hub.ticket()
        self._hub.join(ticket, rank)
        try:
            self._hub.wait_begin(ticket)
        except BaseException:
            self._hub.leave(ticket)
            raise
        self._heard[ticket] = time.monotonic()
        return ticket

    def next(self, ticket: int) -> tuple[list[Any], int, int] | None:
        """([reference], first row, rows): the consumer reads the object itself. None at the end."""
        piece = self._hub.next(ticket)
        if piece is None:
            self._heard.pop(ticket, None)
            return None
        block: RefBlock = piece.block
        return [block.ref], block.start + piece.start, piece.rows

    def leave(self, ticket: int) -> None:
        self._heard.pop(ticket, None)
        self._hub.leave(ticket)

    def alive(self, ticket: int) -> None:
        if ticket in self._heard:
            self._heard[ticket] = time.monotonic()

    def close(self) -> None:
        self._hub.close(timeout_s=BEAT_S)

    def _listen(self) -> None:
        """Let those leave that have died."""
        while True:
            time.sleep(BEAT_S)
            for ticket, heard_s in list(self._heard.items()):
                if time.monotonic() - heard_s > SILENT_S:
                    self.leave(ticket)


def serve(ranks: int, *, equal: bool, open_run: OpenRun) -> RayChannel:
    """Start the actor that drives the epochs. It ends with this process, or by `close`."""
    import cloudpickle

    server = ray.remote(SplitServer).options(num_cpus=0, max_concurrency=4 * ranks + 8)
    around = Surroundings.here()
    return RayChannel(server.remote(ranks, equal, cloudpickle.dumps(open_run), around))


class RayChannel:
    """See runtime.ingest.channel.Channel. Pickles to the actor's handle."""

    ahead: ClassVar[int] = AHEAD

    def __init__(self, server: Any) -> None:
        self._server = server

    def join(self, rank: int) -> RayEpoch:
        return RayEpoch(self._server, _ask(self._server.join.remote(rank)))

    def close(self) -> None:
        with contextlib.suppress(HeadraceError, RayActorError):
            _ask(self._server.close.remote())
        ray.kill(self._server)


class RayEpoch:
    """A rank's share of one epoch; see runtime.ingest.channel.Epoch."""

    def __init__(self, server: Any, ticket: int) -> None:
        self._server = server
        self._ticket = ticket
        self._over = threading.Event()
        threading.Thread(target=self._beat, name="headrace-ingest-beat", daemon=True).start()

    def next(self) -> pa.RecordBatch | None:
        if self._over.is_set():
            return None
        try:
            answer = _ask(self._server.next.remote(self._ticket))
            if answer is None:
                self._over.set()
                return None
            (ref,), start, rows = answer
            return _ask(ref).slice(start, rows)
        except BaseException:
            self._over.set()
            raise

    def leave(self) -> None:
        if not self._over.is_set():
            self._over.set()
            self._server.leave.remote(self._ticket)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(Exception):
                self._server.alive.remote(self._ticket)


def _ask(ref: Any) -> Any:
    """The answer. Raises what the actor raised, as it was, and WorkerDied when it is gone."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, HeadraceError):
            raise error.cause from None
        raise
    except (RayActorError, ObjectLostError) as gone:
        raise WorkerDied(
            f"the actor that runs the pipeline of this streaming_split has ended ({type(gone).__name__})",
            hint="it lives as long as the process that called streaming_split, and its node",
        ) from None
