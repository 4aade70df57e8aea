"""Dataset.streaming_split: iterators for training workers, over one run of the pipeline an epoch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from headrace.api.actions import _quiet as quiet
from headrace.api.actions import _writable as writable
from headrace.api.actions import check_device, rebatch, to_torch
from headrace.api.placing import reach
from headrace.api.planning import parse_options, prepare
from headrace.api.session import _no_place_for_bad_rows as no_place_for_bad_rows
from headrace.api.session import accumulators_of, make_driver
from headrace.connectors import environment
from headrace.connectors.environment import Torchrun
from headrace.core.errors import PlanError
from headrace.core.extras import require, require_format
from headrace.core.options import ActionOptions, RunOptions
from headrace.plan.nodes import BatchFormat, Plan
from headrace.runtime.committer import Committer
from headrace.runtime.driver import Driver
from headrace.runtime.ingest.channel import Channel, blocks
from headrace.runtime.ingest.hub import Hub
from headrace.runtime.ingest.server import LocalChannel

if TYPE_CHECKING:
    import pyarrow as pa

_calls = itertools.count(1)  # of this process, for all ranks of its torchrun job


class SplitIterator:
    """One worker's share of a dataset, epoch after epoch: one of the n that `Dataset.streaming_split` makes.

    Each loop over it is an epoch. It pickles, to a few words that say where its rows come from: give it to a thread, or to a
    process of this machine. Who has the pickle can read the rows: keep it private.

    One consumer at a time. An epoch begins when all n iterators have been asked for their first batch; until then that call
    waits (after 15 seconds it is said on stderr for whom). Leaving a loop early ends the epoch for this iterator alone.
    """

    __slots__ = ("_channel", "rank")

    def __init__(self, channel: Channel, rank: int) -> None:
        self._channel = channel
        self.rank = rank

    def __repr__(self) -> str:
        return f"SplitIterator(rank={self.rank})"

    def __reduce__(self) -> tuple[Callable[..., SplitIterator], tuple[Any, ...]]:
        return SplitIterator, (self._channel, self.rank)

    def iter_batches(
        self,
        *,
        batch_size: int | None = 256,
        batch_format: BatchFormat = "numpy",
        drop_last: bool = False,
        local_shuffle_buffer_size: int | None = None,
        local_shuffle_seed: int | None = None,
    ) -> Iterator[Any]:
        """One epoch's batches for this worker, as `Dataset.iter_batches` makes them. batch_size None: blocks as they come.

        local_shuffle_buffer_size: batches are drawn at random from at least so many rows (fewer at the end), which are in
            memory; local_shuffle_seed makes the draws the same each time.

        The next blocks are fetched meanwhile. Raises what the run raises (in all workers), WorkerDied when the process that
        runs the pipeline is gone, PlanError when another consumer has this iterator's epoch.
        """
        if batch_format not in ("numpy", "pyarrow", "pandas", "torch"):
            raise PlanError(f"batch_format is {batch_format!r}", hint="use numpy, pyarrow, pandas or torch")
        require_format(batch_format, "iter_batches")
        rows = _positive("batch_size", batch_size)
        buffer = _positive("local_shuffle_buffer_size", local_shuffle_buffer_size)
        if buffer is not None and rows is None:
            raise PlanError("a shuffled epoch has no blocks as they come", hint="give batch_size")
        return _batches(self._channel, self.rank, rows, batch_format, drop_last, buffer, local_shuffle_seed)

    def iter_torch_batches(
        self,
        *,
        batch_size: int | None = 256,
        device: str | None = None,
        dtypes: Any = None,
        drop_last: bool = False,
        local_shuffle_buffer_size: int | None = None,
        local_shuffle_seed: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """As `iter_batches`, as {column: torch tensor} on `device`. dtypes: one torch dtype, or {column: dtype}.

        Columns that are no numbers (strings, bytes, ragged) stay NumPy object arrays. Raises PlanError for a device that torch
        does not find here, and, at the first batch, for a column in dtypes that is not there.
        """
        require("torch", "iter_torch_batches")
        check_device(device)
        batches = self.iter_batches(
            batch_size=batch_size,
            batch_format="torch",
            drop_last=drop_last,
            local_shuffle_buffer_size=local_shuffle_buffer_size,
            local_shuffle_seed=local_shuffle_seed,
        )
        return (to_torch(batch, device, dtypes) for batch in batches)

    def close(self) -> None:
        """End the run, and the serving, for all n; in any process but the one that called `streaming_split` nothing happens.

        The end of that process does the same, when the consumers that are in an epoch have finished it.
        """
        self._channel.close()


def streaming_split(plan: Plan, n: int, equal: bool, options: ActionOptions, name: str) -> list[SplitIterator]:
    """See Dataset.streaming_split. name: what the dataset is called, the same in all ranks of a torchrun job."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise PlanError(f"streaming_split({n!r}): there must be at least one iterator", hint="use the number of workers")
    parsed = parse_options(quiet(options))
    if parsed.on_error == "quarantine":
        raise no_place_for_bad_rows()
    if parsed.engine == "ray":
        return _split(_on_cluster(plan, n, equal, parsed), n)
    job = environment.torchrun()
    if job is None or job.world_size != n or n == 1:
        return _split(_local(plan, n, equal, options), n)
    return _split(_met(plan, n, equal, options, name, job), n)


def _split(channel: Channel, n: int) -> list[SplitIterator]:
    return [SplitIterator(channel, rank) for rank in range(n)]


def _local(plan: Plan, n: int, equal: bool, options: ActionOptions) -> LocalChannel:
    parsed = parse_options(quiet(options))

    def open_run(deliver: Callable[[Any], None]) -> Driver:
        from headrace.observe.progress import make_observers

        ready = prepare(plan, parsed)  # for each epoch: the input may have changed, and a probe takes milliseconds
        return make_driver(ready, make_observers(parsed.progress), Committer(accumulators_of(ready)), deliver=deliver)

    return LocalChannel(Hub(n, equal=equal, open_run=open_run))


def _on_cluster(plan: Plan, n: int, equal: bool, parsed: RunOptions) -> Channel:
    """An actor drives the epochs; their blocks stay in the cluster's object stores until a rank reads them."""
    from functools import partial

    from headrace.substrates.ray.cluster import connect_to_stay
    from headrace.substrates.ray.ingest import serve

    connect_to_stay(parsed.address)
    with reach(parsed):
        prepare(plan, parsed)  # refuse here what can never run
    return serve(n, equal=equal, open_run=partial(_open_in_actor, plan, replace(parsed, address=None)))


def _open_in_actor(plan: Plan, parsed: RunOptions, deliver: Callable[[Any], None]) -> Driver:
    ready = prepare(plan, parsed)
    return make_driver(ready, (), Committer(accumulators_of(ready)), deliver=deliver, refs=True)


def _met(plan: Plan, n: int, equal: bool, options: ActionOptions, name: str, job: Torchrun) -> Channel:
    """Under torchrun all ranks make this call: rank 0 serves, the others find it."""
    from headrace.runtime.ingest import meeting

    if job.local_world_size != job.world_size:
        raise PlanError(
            f"the {n} ranks of this torchrun job are on several machines, and streaming_split without Ray serves one",
            hint="run the training with Ray Train, or let each machine read a part of the input of its own",
        )
    path = meeting.place(job.job, next(_calls))
    facts = f"{name}.streaming_split({n}, equal={equal})"
    if job.rank:
        return meeting.MeetingChannel(path, facts)
    channel = _local(plan, n, equal, options)
    channel.at_close(meeting.announce(path, channel.remote(), facts))
    return channel


# ---------------------------------------------------------------- batches of one consumer


def _batches(
    channel: Channel,
    rank: int,
    rows: int | None,
    batch_format: BatchFormat,
    drop_last: bool,
    buffer_rows: int | None,
    seed: int | None,
) -> Iterator[Any]:
    from headrace.worker.formats import NumpyReader, to_format

    reader = NumpyReader()
    found: Iterator[pa.RecordBatch] = blocks(channel, rank)
    if buffer_rows is not None and rows is not None:
        found = _shuffled(found, buffer_rows, rows, seed)
    batches = rebatch(found, rows, drop_last)
    try:
        for batch in batches:
            yield writable(to_format(batch, batch_format, reader)[0])
    finally:
        batches.close()


def _shuffled(found: Iterator[pa.RecordBatch], buffer_rows: int, rows: int, seed: int | None) -> Iterator[pa.RecordBatch]:
    """Pieces of `rows` rows, drawn at random from at least `buffer_rows` as long as there are so many.

    The buffer is filled to half as much again before it is shuffled, so that a row is copied about three times.
    """
    import numpy as np

    from headrace.worker.casting import concat

    random = np.random.default_rng(seed)
    held: list[pa.RecordBatch] = []
    have, full = 0, buffer_rows + max(rows, buffer_rows // 2)
    try:
        for block in found:
            held.append(block)
            have += block.num_rows
            if have < full:
                continue
            pool = concat(held, "the shuffle buffer of this iterator")
            pool = pool.take(random.permutation(have))
            at = 0
            while have - at - rows >= buffer_rows:
                yield pool.slice(at, rows)
                at += rows
            held, have = [pool.slice(at)], have - at
        if held:
            pool = concat(held, "the shuffle buffer of this iterator")
            yield pool.take(random.permutation(have))
    finally:
        close = getattr(found, "close", None)
        if close is not None:
            close()


def _positive(what: str, value: int | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{what} is {value!r}", hint="use a whole number of at least 1, or None")
    return value
