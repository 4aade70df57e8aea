"""A Torch DataLoader and a loop, as one who feeds training by it writes inference.

Workers take pieces of the input (row groups; whole files when there are many) from a shared counter, so that none has more to
do than another, decode them with pyarrow, run the steps up to the first model batch by batch, and hand tensors and carried
columns (as Arrow bytes) over in shared memory. The main process runs the models, each in a thread of its own (several devices:
a thread for each), and writes Parquet in threads. A model on CPUs may run in the workers instead: a knob.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.contract import Job, Loaded, Model, Peer, Pipeline, Step
from suite.peers.steps import apply, files_of, metrics, numpy_of, opened, out_of

KNOBS = {
    "workers": None,  # processes; None: as many as cores
    "prefetch": 2,  # batches ahead per worker
    "rows": None,  # a batch; None: what the pipeline's steps ask for
    "models": "main",  # where models on CPUs run: "main", or "workers"
    "threads": None,  # of such a model in main; None: as many as cores
    "writers": 1,  # threads
    "context": "fork",  # of the workers
}


Search = list[tuple[str, Sequence[Any]]]


def _search(workload: str) -> Search:
    workers: Search = [("workers", [1, 3, 4]), ("prefetch", [1, 4, 8])]
    if workload in ("images", "images-s3", "expand"):
        return [("models", ["workers"]), *workers, ("rows", [16, 32, 128]), ("threads", [1]), ("context", ["forkserver"])]
    if workload == "text-embedding":  # never more texts a call than others have to sort
        return [("models", ["workers"]), *workers, ("threads", [1])]
    rows: Search = [("rows", [4096, 16_384, 262_144])]
    return [("models", ["workers"]), *workers, *rows, ("writers", [2]), ("threads", [1]), ("context", ["forkserver"])]


PEER = Peer(
    "dataloader",
    "Torch DataLoader and a loop",
    forms={"same": "workers read and prepare, the main process predicts, threads write"},
    environment="dataloader",
    knobs=lambda workload: KNOBS,
    search=_search,
)

GROUP_ROWS, GROUP_BYTES = 1 << 16, 64 << 20  # of a written row group, whichever is reached first
END = None  # in queues


@dataclass(frozen=True)
class Piece:
    """What a worker takes: a file, or one row group of it."""

    pipeline: int
    path: str
    group: int | None = None


@dataclass
class Batch:
    """Rows of a piece on their way: `table`, and tensors that a model has yet to read. at: which batch of its piece, `of` how
    many (told by the last one, after which there are no rows).
    """

    piece: Piece
    at: int
    table: Any
    of: int | None = None


def run(job: Job) -> dict[str, Any]:
    import pyarrow as pa
    import torch
    from torch.utils.data import DataLoader

    pipelines = job.pipelines
    knobs = job.knobs
    workers = knobs["workers"] or job.cores
    whole = len(pipelines) > 1 or pipelines[0].per_input  # a file is read by one worker and written as one
    pieces = list(_pieces(pipelines, whole, workers))
    split = [_split(pipeline, knobs["models"] == "workers") for pipeline in pipelines]
    loader = DataLoader(
        _dataset(torch, Feed(pieces, pipelines, [before for before, _ in split], knobs, workers)),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=knobs["prefetch"],
        collate_fn=_itself,
        multiprocessing_context=knobs["context"],
    )
    arriving = iter(loader)  # forks, so before any thread
    pa.set_cpu_count(job.cores)
    writing = Writing(job, pipelines, whole, knobs["writers"])
    chain = Chain([(p, after) for p, (_, after) in enumerate(split)], knobs["threads"] or job.cores, writing.put)
    for tensors, carried, piece, at, of in arriving:
        chain.put(Batch(piece, at, _table(tensors, carried), of))
    chain.close()
    return {"metrics": writing.close()}


def _itself(batch: Any) -> Any:
    return batch


# -- what there is to read


def _pieces(pipelines: Sequence[Pipeline], whole: bool, workers: int) -> Iterator[Piece]:
    import pyarrow.parquet as pq

    for at, pipeline in enumerate(pipelines):
        paths = files_of(pipeline.source)
        if whole or len(paths) >= 4 * workers:
            yield from (Piece(at, path) for path in paths)
            continue
        for path in paths:
            with pq.ParquetFile(opened(path)) as file:
                groups = file.num_row_groups
            yield from (Piece(at, path, group) for group in range(groups))


def _split(pipeline: Pipeline, models_too: bool) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Steps of the workers, and of the main process: from the first model on; models_too: from the first one on a device on."""
    for i, step in enumerate(pipeline.steps):
        if isinstance(step, Model) and (step.device or not models_too):
            return pipeline.steps[:i], pipeline.steps[i:]
    return pipeline.steps, ()


# -- in the workers


class Feed:
    """What a worker iterates. Holds nothing that can't be sent to one."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        pipelines: Sequence[Pipeline],
        steps: Sequence[tuple[Step, ...]],
        knobs: Mapping[str, Any],
        workers: int,
    ) -> None:
        from torch.multiprocessing import get_context

        self._pieces = pieces
        self._steps = steps
        self._rows = [knobs["rows"] or min((step.rows for step in p.steps), default=1024) for p in pipelines]
        self._next = get_context(knobs["context"]).Value("q", 0)
        self._models: dict[int, dict[str, Loaded]] = {}

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        import pyarrow as pa

        pa.set_cpu_count(1)
        while True:
            with self._next.get_lock():
                at = self._next.value
                self._next.value += 1
            if at >= len(self._pieces):
                return
            yield from self._batches(self._pieces[at])

    def _batches(self, piece: Piece) -> Iterator[tuple[Any, ...]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        steps = self._steps[piece.pipeline]
        if piece.pipeline not in self._models:
            self._models[piece.pipeline] = {step.name: step.load(1) for step in steps if isinstance(step, Model)}
        at = 0
        with pq.ParquetFile(opened(piece.path), pre_buffer=piece.path.startswith("s3://")) as file:
            groups = None if piece.group is None else [piece.group]
            for part in file.iter_batches(self._rows[piece.pipeline], row_groups=groups, use_threads=False):
                table = pa.Table.from_batches([part])
                for step in steps:
                    table = apply(step, table, self._models[piece.pipeline])
                yield *_tensors(table), piece, at, None
                at += 1
        yield {}, None, piece, at, at


def _dataset(torch: Any, feed: Feed) -> Any:
    class Fed(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(feed)

        def __reduce__(self) -> Any:
            return _dataset_again, (feed,)

    return Fed()


def _dataset_again(feed: Feed) -> Any:
    import torch

    return _dataset(torch, feed)


def _tensors(table: Any) -> tuple[dict[str, Any], Any]:
    """(tensor columns, all others as the bytes of an Arrow stream), both in Torch's shared memory."""
    import pyarrow as pa
    import torch

    warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
    names = [field.name for field in table.schema if isinstance(field.type, pa.FixedShapeTensorType)]
    tensors = {name: torch.from_numpy(numpy_of(table[name])) for name in names}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.drop_columns(names).schema) as stream:
        stream.write_table(table.drop_columns(names))
    return tensors, torch.frombuffer(sink.getvalue(), dtype=torch.uint8)


def _table(tensors: Mapping[str, Any], carried: Any) -> Any:
    """The other way."""
    import pyarrow as pa

    if carried is None:
        return None
    table = pa.ipc.open_stream(pa.py_buffer(carried.numpy())).read_all()
    for name, tensor in tensors.items():
        table = table.append_column(name, pa.FixedShapeTensorArray.from_numpy_ndarray(tensor.numpy()))
    return table


# -- in the main process


class Chain:
    """Each model of the main process in threads of its own, one after the other."""

    def __init__(self, steps: Sequence[tuple[int, tuple[Step, ...]]], threads: int, then: Callable[[Batch], None]) -> None:
        self._failed: list[BaseException] = []
        self._stages: list[tuple[queue.Queue[Batch | None], list[threading.Thread]]] = []
        depth = max((sum(isinstance(s, Model) for s in of) for _, of in steps), default=0)
        for level in reversed(range(depth)):
            mine = {p: _level(of, level) for p, of in steps}
            todo: queue.Queue[Batch | None] = queue.Queue(4)
            count = max((s.devices for of in mine.values() for s in of if isinstance(s, Model) and s.device), default=1)
            of = [threading.Thread(target=self._work, args=(mine, todo, threads, then), daemon=True) for _ in range(count)]
            for thread in of:
                thread.start()
            self._stages.insert(0, (todo, of))
            then = todo.put
        self.put = self._checked(then)

    def _work(
        self,
        steps: Mapping[int, tuple[Step, ...]],
        todo: queue.Queue[Batch | None],
        threads: int,
        then: Callable[[Batch], None],
    ) -> None:
        models: dict[int, dict[str, Loaded]] = {}
        if len(steps) == 1:  # load while the workers start
            models = {p: _load(of, threads) for p, of in steps.items()}
        while (batch := todo.get()) is not END:
            if self._failed:
                continue
            try:
                pipeline = batch.piece.pipeline
                if pipeline not in models:
                    models = {pipeline: _load(steps[pipeline], threads)}  # pieces come in the order of pipelines
                if batch.table is not None:
                    for step in steps[pipeline]:
                        batch.table = apply(step, batch.table, models[pipeline])
                then(batch)
            except BaseException as error:
                self._failed.append(error)

    def _checked(self, put: Callable[[Batch], None]) -> Callable[[Batch], None]:
        def checked(batch: Batch) -> None:
            if self._failed:
                raise self._failed[0]
            put(batch)

        return checked

    def close(self) -> None:
        for todo, threads in self._stages:
            for _ in threads:
                todo.put(END)
            for thread in threads:
                thread.join()
        if self._failed:
            raise self._failed[0]


def _level(steps: tuple[Step, ...], level: int) -> tuple[Step, ...]:
    """The level-th model, and the steps after it up to the next."""
    starts = [i for i, step in enumerate(steps) if isinstance(step, Model)]
    if level >= len(starts):
        return ()
    return steps[starts[level] : starts[level + 1] if level + 1 < len(starts) else None]


def _load(steps: Sequence[Step], threads: int) -> dict[str, Loaded]:
    return {step.name: step.load(threads) for step in steps if isinstance(step, Model)}


class Writing:
    """Threads that write: a file for each thread, or one for each file of the input."""

    def __init__(self, job: Job, pipelines: Sequence[Pipeline], whole: bool, writers: int) -> None:
        self._job = job
        self._pipelines = pipelines
        self._whole = whole
        self._failed: list[BaseException] = []
        self._columns: dict[int, list[dict[str, Any]]] = {}
        for pipeline in pipelines:
            Path(out_of(job.out, pipelines, pipeline)).mkdir(parents=True, exist_ok=True)
        self._queues: list[queue.Queue[Batch | None]] = [queue.Queue(16) for _ in range(writers if whole else 1)]
        target = self._write_whole if whole else self._write_packed
        self._threads = [
            threading.Thread(target=self._guarded, args=(target, self._queues[i % len(self._queues)], i))
            for i in range(writers)
        ]
        for thread in self._threads:
            thread.start()

    def put(self, batch: Batch) -> None:
        if self._failed:
            raise self._failed[0]
        if self._whole or batch.table is not None:
            which = hash((batch.piece.pipeline, batch.piece.path)) % len(self._queues)
            self._queues[which].put(batch)

    def close(self) -> dict[str, float]:
        """The metrics."""
        for i in range(len(self._threads)):
            self._queues[i % len(self._queues)].put(END)
        for thread in self._threads:
            thread.join()
        if self._failed:
            raise self._failed[0]
        return self._metrics()

    def _guarded(self, work: Callable[[queue.Queue[Batch | None], int], None], todo: queue.Queue[Batch | None], i: int) -> None:
        try:
            work(todo, i)
        except BaseException as error:
            self._failed.append(error)
            while todo.get() is not END:
                pass

    def _write_packed(self, todo: queue.Queue[Batch | None], writer: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        file, held, rows, size = None, list[Any](), 0, 0

        def flush() -> None:
            nonlocal file, rows, size
            table = pa.concat_tables(held)
            held.clear()
            rows = size = 0
            if file is None:
                file = pq.ParquetWriter(f"{self._job.out}/part-{writer}.parquet", table.schema)
            file.write_table(table)
            self._keep(0, table)

        while (batch := todo.get()) is not END:
            held.append(batch.table)
            rows, size = rows + batch.table.num_rows, size + batch.table.nbytes
            if rows >= GROUP_ROWS or size >= GROUP_BYTES:
                flush()
        if held:
            flush()
        if file is not None:
            file.close()

    def _write_whole(self, todo: queue.Queue[Batch | None], writer: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        held: dict[Piece, dict[int, Any]] = {}
        counts: dict[Piece, int] = {}
        while (batch := todo.get()) is not END:
            of = held.setdefault(batch.piece, {})
            if batch.of is None:
                of[batch.at] = batch.table
            else:
                counts[batch.piece] = batch.of
            if counts.get(batch.piece) != len(of):
                continue
            del held[batch.piece], counts[batch.piece]
            if of:
                table = pa.concat_tables([of[at] for at in sorted(of)])
                folder = out_of(self._job.out, self._pipelines, self._pipelines[batch.piece.pipeline])
                pq.write_table(table, f"{folder}/{Path(batch.piece.path).name}")
                self._keep(batch.piece.pipeline, table)

    def _keep(self, pipeline: int, table: Any) -> None:
        names = {name for pair in self._pipelines[pipeline].metrics.values() for name in pair}
        if names:
            self._columns.setdefault(pipeline, []).append({name: numpy_of(table[name]) for name in names})

    def _metrics(self) -> dict[str, float]:
        import numpy as np

        found: dict[str, float] = {}
        for pipeline, parts in self._columns.items():
            columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            found |= metrics(self._pipelines[pipeline], columns)
        return found
