"""A model server and a client that sends it records: the shape of SageMaker Batch Transform.

One server process per core (uvicorn with uvloop and httptools), each on a port of its own, with threads for requests; it can
put records of several requests into one call of the model, as model servers do. The client reads Parquet, keeps a number of
requests in flight over kept-alive connections, each connection taking the next record when it is free, and joins the answers
to the columns that were not sent: one output file for each input file. The service's own client is native code, so this one
speaks HTTP/1.1 over bare sockets rather than through a library.

    same           a record per request (SingleRecord): bytes and texts as they are, other records as JSON; JSON back
    multi-record   as many records as a step asks for per request (MultiRecord), as Arrow streams
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from suite.contract import Expand, Job, Loaded, Map, Model, Peer, Pipeline, Step
from suite.peers.steps import arrow_of, files_of, metrics, numpy_of, opened, out_of, without

KNOBS = {
    "servers": None,  # processes; None: one per core
    "threads": None,  # of each, for requests; None: one, and one for each device that it may wait for
    "in_flight": 8,  # requests, per server (MaxConcurrentTransforms)
    "batch": 1,  # rows that the server may put into one call of the model
    "delay_ms": 2.0,  # how long the first of them waits
    "rows": None,  # of a request, multi-record; None: what the pipeline's steps ask for
}
MOST_RECORDS = 200_000


def _why_not(pipelines: Sequence[Pipeline], form: str, params: Mapping[str, Any]) -> str | None:
    records = int(params.get("files", len(pipelines))) * int(params.get("rows", 1))
    if form == "same" and records > MOST_RECORDS:
        return f"a request for each of {records:,} records would take many minutes"
    return None


PEER = Peer(
    "http-server",
    "HTTP model server, concurrent client",
    forms={"same": "a record per request", "multi-record": "a batch of records per request"},
    environment="http_server",
    why_not=_why_not,
    knobs=lambda workload: KNOBS,
    search=lambda workload: [
        ("in_flight", [2, 4, 16, 32]),
        ("threads", [1, 2, 4]),
        ("batch", [8, 32]),
        ("servers", [1, 3]),
        ("rows", [256, 4096, 16_384]),
    ],
)

ARROW = "application/vnd.apache.arrow.stream"


def run(job: Job) -> dict[str, Any]:
    scratch = Path(os.environ["SUITE_SCRATCH"])
    job.write(scratch / "job.json")
    count = job.knobs["servers"] or job.cores
    sockets = [socket.create_server(("127.0.0.1", 0), backlog=1024) for _ in range(count)]
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for sock in sockets:
            argv = [sys.executable, "-m", "suite.peers.http_server", str(scratch / "job.json"), str(sock.fileno())]
            servers.append(subprocess.Popen(argv, pass_fds=[sock.fileno()]))
        ports = [sock.getsockname()[1] for sock in sockets]
        for sock in sockets:
            sock.close()  # the servers hold them
        return {"metrics": asyncio.run(_transform(job, ports))}
    finally:
        for server in servers:
            server.send_signal(signal.SIGTERM)
        for server in servers:
            server.wait()


def _sent(pipeline: Pipeline) -> list[str]:
    """Columns of the source that the steps read."""
    made: set[str] = set()
    sent: list[str] = []
    for step in pipeline.steps:
        sent += [name for name in step.reads if name not in made and name not in sent]
        made |= set(step.writes)
    return sent


def _returned(pipeline: Pipeline) -> dict[str, Any]:
    """Columns that the steps make and don't drop, with their types."""
    made: dict[str, Any] = {}
    for step in pipeline.steps:
        made = {name: column for name, column in {**made, **step.writes}.items() if name not in step.drops}
    return made


def _dropped(pipeline: Pipeline) -> list[str]:
    return [name for step in pipeline.steps for name in step.drops]


# -- the client


async def _transform(job: Job, ports: Sequence[int]) -> dict[str, float]:
    """Connections take records from one queue, whichever file they are of."""
    todo: asyncio.Queue[tuple[str, str, bytes, asyncio.Future[Any]]] = asyncio.Queue(2 * job.knobs["in_flight"] * len(ports))
    pipelines = job.pipelines
    threads = ThreadPoolExecutor(2)
    async with asyncio.TaskGroup() as group:
        connections = [group.create_task(_connection(port, todo)) for port in ports for _ in range(job.knobs["in_flight"])]
        found: dict[str, float] = {}
        finishing: set[asyncio.Task[dict[str, Any]]] = set()
        parts: dict[int, list[dict[str, Any]]] = {}
        for at, pipeline in enumerate(pipelines):
            folder = out_of(job.out, pipelines, pipeline)
            Path(folder).mkdir(parents=True, exist_ok=True)
            for path in files_of(pipeline.source):
                waiting = [piece async for piece in _send(job, at, pipeline, path, todo, threads)]
                task = group.create_task(_finish(pipeline, waiting, f"{folder}/{path.rsplit('/', 1)[1]}", threads))
                task.add_done_callback(lambda done, at=at: parts.setdefault(at, []).append(done.result()))
                finishing.add(task)
                task.add_done_callback(finishing.discard)
        while finishing:
            await asyncio.wait(finishing)
        for connection in connections:
            connection.cancel()
    threads.shutdown()
    for at, columns in parts.items():
        if pipelines[at].metrics:
            found |= metrics(pipelines[at], _joined(columns))
    return found


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import numpy as np

    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


async def _send(
    job: Job, at: int, pipeline: Pipeline, path: str, todo: asyncio.Queue[Any], threads: ThreadPoolExecutor
) -> AsyncIterator[tuple[Any, list[asyncio.Future[Any]]]]:
    """Queue the records of a file. Yields (columns that are kept, the answers to come) piece by piece."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    loop = asyncio.get_running_loop()
    sent = _sent(pipeline)
    single = job.form == "same"
    rows = job.knobs["rows"] or min(step.rows for step in pipeline.steps)
    with pq.ParquetFile(opened(path), pre_buffer=path.startswith("s3://")) as file:
        pieces = file.iter_batches(rows)
        while (piece := await loop.run_in_executor(threads, next, pieces, None)) is not None:
            table = pa.Table.from_batches([piece])
            answers: list[asyncio.Future[Any]] = []
            kind, bodies = _records(table.select(sent)) if single else (ARROW, [_to_stream(table.select(sent))])
            for body in bodies:
                answer: asyncio.Future[Any] = loop.create_future()
                await todo.put((f"/models/{at}/invoke", kind, body, answer))
                answers.append(answer)
            yield without(table, _dropped(pipeline)), answers


def _records(table: Any) -> tuple[str, list[bytes]]:
    """(content type, a body for each row)."""
    import pyarrow as pa

    if table.num_columns == 1 and pa.types.is_binary(table.schema[0].type):
        return "application/octet-stream", table.column(0).to_pylist()
    if table.num_columns == 1 and pa.types.is_string(table.schema[0].type):
        return "text/plain", [text.encode() for text in table.column(0).to_pylist()]
    columns = [column.to_pylist() for column in table.columns]
    return "application/json", [json.dumps(row).encode() for row in zip(*columns, strict=True)]


async def _connection(port: int, todo: asyncio.Queue[tuple[str, str, bytes, asyncio.Future[Any]]]) -> None:
    """One request after the other."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        while True:
            path, kind, body, answer = await todo.get()
            head = f"POST {path} HTTP/1.1\r\nhost: model\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.writelines([head.encode(), body])
            told = (await reader.readuntil(b"\r\n\r\n")).lower()
            size = int(told.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            content = await reader.readexactly(size)
            if not told.startswith(b"http/1.1 200"):
                raise RuntimeError(f"the server answered {told!r} {content!r}")
            answer.set_result(_of_stream(content) if kind == ARROW else json.loads(content))
    finally:
        writer.close()


async def _finish(
    pipeline: Pipeline, pieces: list[tuple[Any, list[asyncio.Future[Any]]]], to: str, threads: ThreadPoolExecutor
) -> dict[str, Any]:
    """Write a file when all of its answers are there. Returns what metrics need."""
    tables = [(kept, [await answer for answer in answers]) for kept, answers in pieces]
    return await asyncio.get_running_loop().run_in_executor(threads, _write, pipeline, tables, to)


def _write(pipeline: Pipeline, pieces: list[tuple[Any, list[Any]]], to: str) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.concat_tables([_join(pipeline, kept, answers) for kept, answers in pieces])
    pq.write_table(table, to)
    return {name: numpy_of(table[name]) for pair in pipeline.metrics.values() for name in pair}


def _join(pipeline: Pipeline, kept: Any, answers: list[Any]) -> Any:
    import numpy as np
    import pyarrow as pa

    if isinstance(answers[0], pa.Table):
        made = answers[0]
        if "parents" in made.column_names:
            kept, made = kept.take(made["parents"]), made.drop_columns(["parents"])
        for name in made.column_names:
            kept = _put(kept, name, made[name])
        return kept
    if any(isinstance(step, Expand) for step in pipeline.steps):
        kept = kept.take(pa.array(np.repeat(np.arange(len(answers)), [len(next(iter(a.values()))) for a in answers])))
    for name, column in _returned(pipeline).items():
        values = [value for answer in answers for value in answer[name]]
        if column.dtype != "string":
            values = np.asarray(values, column.dtype).reshape(-1, *column.shape)
        kept = _put(kept, name, arrow_of(values, column))
    return kept


def _put(table: Any, name: str, column: Any) -> Any:
    at = table.schema.get_field_index(name)
    return table.append_column(name, column) if at < 0 else table.set_column(at, name, column)


def _to_stream(table: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue().to_pybytes()


def _of_stream(data: bytes) -> Any:
    import pyarrow as pa

    return pa.ipc.open_stream(pa.py_buffer(data)).read_all()


# -- the server


class Server:
    """An ASGI application: POST /models/<number of the pipeline>/invoke."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._pipelines = job.pipelines
        self._signatures: dict[int, Any] = {}
        self._models: dict[int, dict[str, Loaded]] = {}
        devices = sum(model.devices for model in self._pipelines[0].models if model.device)
        self._pool = ThreadPoolExecutor(job.knobs["threads"] or 1 + -(-devices // (job.knobs["servers"] or job.cores)))
        self._loading = asyncio.Lock()
        self._batchers: dict[int, Batcher] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        which = int(scope["path"].split("/")[2])
        parts, more = [], True
        while more:
            message = await receive()
            parts.append(message["body"])
            more = message.get("more_body", False)
        kind = dict(scope["headers"])[b"content-type"].decode()
        loop = asyncio.get_running_loop()
        if which not in self._models:
            async with self._loading:
                if which not in self._models:
                    await loop.run_in_executor(self._pool, self._load, which)
        if which in self._batchers:
            steps = self._pipelines[which].steps
            arrays = await loop.run_in_executor(self._pool, self._prepare, which, kind, b"".join(parts), steps[:-1])
            answer = await self._batchers[which].submit(arrays)
            body = _answer(kind, {n: v for n, v in {**arrays, **answer}.items() if n not in steps[-1].drops}, steps)
        else:
            body = await loop.run_in_executor(self._pool, self._whole, which, kind, b"".join(parts))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _load(self, which: int) -> None:
        import pyarrow.parquet as pq

        pipeline = self._pipelines[which]
        self._signatures[which] = pq.read_schema(opened(files_of(pipeline.source)[0]))
        threads = max(1, self._job.cores // (self._job.knobs["servers"] or self._job.cores))
        models = {model.name: model.load(threads) for model in pipeline.models}
        *before, last = pipeline.steps
        plain = isinstance(last, Model) and all(isinstance(step, Map) for step in before)
        if self._job.knobs["batch"] > 1 and plain and self._job.form == "same":
            self._batchers[which] = Batcher(models[last.name], last, self._job.knobs)
        self._models[which] = models  # last: it says that all is there

    def _whole(self, which: int, kind: str, body: bytes) -> bytes:
        steps = self._pipelines[which].steps
        return _answer(kind, self._prepare(which, kind, body, steps), steps)

    def _prepare(self, which: int, kind: str, body: bytes, steps: Sequence[Step]) -> dict[str, Any]:
        return _run(steps, self._given(which, kind, body), self._models[which])

    def _given(self, which: int, kind: str, body: bytes) -> dict[str, Any]:
        """The request's columns."""
        import numpy as np

        names = _sent(self._pipelines[which])
        if kind == ARROW:
            table = _of_stream(body)
            return {name: numpy_of(table[name]) for name in names}
        if kind == "application/json":
            return {
                name: np.asarray([value], self._signatures[which].field(name).type.to_pandas_dtype())
                for name, value in zip(names, json.loads(body), strict=True)
            }
        only = np.empty(1, object)
        only[0] = body if kind == "application/octet-stream" else body.decode()
        return {names[0]: only}


def _run(steps: Sequence[Step], arrays: dict[str, Any], models: Mapping[str, Loaded]) -> dict[str, Any]:
    """The arrays after all steps; `parents` when there are more rows than there were."""
    for step in steps:
        if isinstance(step, Expand):
            made, parents = step(arrays)
            arrays = {name: values[parents] for name, values in arrays.items()} | {"parents": parents} | made
        else:
            arrays = arrays | (step(arrays) if isinstance(step, Map) else models[step.name](arrays))
        arrays = {name: values for name, values in arrays.items() if name not in step.drops}
    return arrays


def _answer(kind: str, arrays: Mapping[str, Any], steps: Sequence[Step]) -> bytes:
    import pyarrow as pa

    columns = {name: column for step in steps for name, column in step.writes.items() if name in arrays}
    if kind != ARROW:
        return json.dumps({name: arrays[name].tolist() for name in columns}).encode()
    table = pa.table({name: arrow_of(arrays[name], column) for name, column in columns.items()})
    return _to_stream(table.append_column("parents", pa.array(arrays["parents"])) if "parents" in arrays else table)


class Batcher:
    """Puts rows of several requests into one call of a model: `batch` at most, the first of them waiting `delay_ms` at most."""

    def __init__(self, loaded: Loaded, model: Model, knobs: Mapping[str, Any]) -> None:
        self._loaded = loaded
        self._reads = model.reads
        self._most = knobs["batch"]
        self._delay_s = knobs["delay_ms"] / 1000
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[dict[str, Any]]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._pool = ThreadPoolExecutor(1)
        self._running: set[asyncio.Task[None]] = set()

    async def submit(self, arrays: dict[str, Any]) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[dict[str, Any]] = loop.create_future()
        self._waiting.append(({name: arrays[name] for name in self._reads}, answer))
        if len(self._waiting) >= self._most:
            self._flush()
        elif self._timer is None:
            self._timer = loop.call_later(self._delay_s, self._flush)
        return await answer

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        taken, self._waiting = self._waiting, []
        if taken:
            task = asyncio.get_running_loop().create_task(self._call(taken))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _call(self, taken: list[tuple[dict[str, Any], asyncio.Future[dict[str, Any]]]]) -> None:
        import numpy as np

        arrays = {name: np.concatenate([given[name] for given, _ in taken]) for name in self._reads}
        try:
            made = await asyncio.get_running_loop().run_in_executor(self._pool, self._loaded, arrays)
        except BaseException as error:
            for _, answer in taken:
                answer.set_exception(error)
            return
        at = 0
        for given, answer in taken:
            rows = len(next(iter(given.values())))
            answer.set_result({name: values[at : at + rows] for name, values in made.items()})
            at += rows


def _serve(path: str, fd: str) -> None:
    import pyarrow as pa
    import uvicorn

    pa.set_cpu_count(1)
    config = uvicorn.Config(Server(Job.read(path)), loop="uvloop", http="httptools", lifespan="off", log_level="error")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(fd))])


if __name__ == "__main__":
    _serve(*sys.argv[1:])
