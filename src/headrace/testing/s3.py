"""A small, strict S3 server for tests: objects in memory, one lock, faults on demand.

    with S3Server(faults=Faults(seed=1, rates={"503": 0.1, "lost": 0.05})) as server:
        server.make_bucket("b")          # AWS_ENDPOINT_URL=server.url, any access key
    python -m headrace.testing.s3 --port 9000 --bucket b --fault 503=0.1

Strict: conditions (If-Match, If-None-Match) are checked and the change is made under the same lock, so that of any number of
conditional writes exactly one takes effect. Signatures are not checked. What must not live here: anything that production
code uses.

Kinds of fault: "500", "503", "429": an error instead of the effect. "slow": `slow_s` seconds go by first. "reset": the
connection breaks before the effect. "lost": the effect takes place, then the connection breaks.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

CONTROL = "/_control"
LEAST_PART_BYTES = 5 << 20  # as S3: every part but the last
KINDS = ("500", "503", "429", "slow", "reset", "lost")


@dataclass(frozen=True, slots=True)
class Stored:
    data: bytes
    etag: str
    meta: dict[str, str]
    modified_s: float


@dataclass
class Upload:
    bucket: str
    key: str
    meta: dict[str, str]
    parts: dict[int, tuple[bytes, str]] = field(default_factory=dict[int, tuple[bytes, str]])


class Faults:
    """Which requests fail, and how. A seeded draw for each request, and single faults to come.

    rates: kind -> probability. match: a pattern that "METHOD /bucket/key?query" must contain for any of it.
    """

    def __init__(self, seed: int = 0, rates: dict[str, float] | None = None, match: str = "", slow_s: float = 1.0) -> None:
        unknown = set(rates or {}) - set(KINDS)
        if unknown:
            raise ValueError(f"unknown faults {sorted(unknown)}; there are {', '.join(KINDS)}")
        self._random = random.Random(seed)
        self._rates = dict(rates or {})
        self._match = re.compile(match)
        self._next: list[tuple[str, re.Pattern[str]]] = []
        self._lock = threading.Lock()
        self.slow_s = slow_s

    def once(self, kind: str, match: str = "", times: int = 1) -> None:
        """The next requests that contain `match` suffer `kind`."""
        with self._lock:
            self._next += [(kind, re.compile(match))] * times

    def draw(self, request: str) -> str:
        """The fault of this request, "" for none."""
        with self._lock:
            for i, (kind, pattern) in enumerate(self._next):
                if pattern.search(request):
                    del self._next[i]
                    return kind
            if not self._rates or not self._match.search(request):
                return ""
            at = self._random.random()
            for kind, rate in self._rates.items():
                at -= rate
                if at < 0:
                    return kind
            return ""


class S3Server:
    """The server. `objects(bucket)`, `uploads` and `requests` are for assertions; `faults` may be replaced at any time."""

    def __init__(self, *, port: int = 0, faults: Faults | None = None, ignore_conditions: bool = False) -> None:
        self.faults = faults or Faults()
        self.ignore_conditions = ignore_conditions
        self.least_part_bytes = LEAST_PART_BYTES
        self.lock = threading.Lock()
        self.buckets: dict[str, dict[str, Stored]] = {}
        self.uploads: dict[str, Upload] = {}
        self.requests: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        handler = type("Handler", (_Handler,), {"s3": self})
        self._http = _Server(("127.0.0.1", port), handler)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def make_bucket(self, name: str) -> str:
        with self.lock:
            self.buckets.setdefault(name, {})
        return name

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        with self.lock:
            return {k: o.data for k, o in sorted(self.buckets[bucket].items()) if k.startswith(prefix)}

    def start(self) -> S3Server:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def __enter__(self) -> S3Server:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def control(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """What `POST /_control` does: set faults from outside; what came in so far."""
        if "ignore_conditions" in wanted:
            self.ignore_conditions = bool(wanted["ignore_conditions"])
        if "rates" in wanted:
            self.faults = Faults(wanted.get("seed", 0), wanted["rates"], wanted.get("match", ""), wanted.get("slow_s", 1.0))
        return {"requests": dict(self.requests), "injected": dict(self.injected)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self._open: set[socket.socket] = set()
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self._open):  # kept-alive connections, whose threads wait for another request
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news in a test of faults."""


class _Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


@dataclass
class _Answer:
    status: int = 200
    body: bytes | memoryview = b""
    headers: dict[str, str] = field(default_factory=dict[str, str])


class _Handler(BaseHTTPRequestHandler):
    s3: S3Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        if parts.path == CONTROL:
            self._send(_Answer(200, json.dumps(self.s3.control(json.loads(body or b"{}"))).encode()))
            return
        bucket, _, key = unquote(parts.path.lstrip("/")).partition("/")
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        fault = self.s3.faults.draw(f"{self.command} /{bucket}/{key}?{parts.query}")
        with self.s3.lock:
            self.s3.requests[self.command] += 1
            self.s3.injected[fault] += bool(fault)
        if fault == "slow":
            time.sleep(self.s3.faults.slow_s)
        if fault == "reset":
            self._reset()
            return
        if fault.isdigit():
            self._send(_error(int(fault), {"500": "InternalError", "503": "SlowDown", "429": "TooManyRequests"}[fault]))
            return
        try:
            with self.s3.lock:
                answer = self._act(bucket, key, query, body)
        except _Refused as e:
            answer = _error(e.status, e.code)
        if fault == "lost":
            self._reset()
            return
        self._send(answer)

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
        self.wfile.flush()

    def _reset(self) -> None:
        """Break the connection so that the client reads "reset by peer"."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    # -- operations, under the lock

    def _act(self, bucket: str, key: str, query: dict[str, str], body: bytes) -> _Answer:
        if self.command == "PUT" and not key:
            self.s3.buckets.setdefault(bucket, {})
            return _Answer()
        if bucket not in self.s3.buckets:
            raise _Refused(404, "NoSuchBucket")
        there = self.s3.buckets[bucket]
        if self.command in ("GET", "HEAD"):
            return self._get(there, key) if key else self._list(there, bucket, query)
        if self.command == "PUT":
            if "partNumber" in query:
                return self._part(key, query, body)
            return self._put(there, key, body)
        if self.command == "POST":
            if "delete" in query:
                return _delete_many(there, body)
            if "uploads" in query:
                return self._begin(bucket, key)
            if "uploadId" in query:
                return self._complete(there, key, query["uploadId"], body)
        if self.command == "DELETE":
            if "uploadId" in query:
                self._upload(key, query["uploadId"])
                del self.s3.uploads[query["uploadId"]]
            else:
                there.pop(key, None)
            return _Answer(204)
        raise _Refused(501, "NotImplemented")

    def _check(self, there: dict[str, Stored], key: str) -> None:
        """Conditions of a write."""
        if self.s3.ignore_conditions:
            return
        now = there.get(key)
        if self.headers.get("If-None-Match") == "*" and now is not None:
            raise _Refused(412, "PreconditionFailed")
        wanted = self.headers.get("If-Match")
        if wanted is not None and now is None:
            raise _Refused(404, "NoSuchKey")
        if wanted not in (None, "*") and now is not None and now.etag != wanted:
            raise _Refused(412, "PreconditionFailed")

    def _put(self, there: dict[str, Stored], key: str, body: bytes) -> _Answer:
        if "x-amz-copy-source" in self.headers:
            source = self._source()
            self._check(there, key)
            meta = self._meta() if self.headers.get("x-amz-metadata-directive") == "REPLACE" else source.meta
            there[key] = Stored(source.data, source.etag, meta, time.time())
            return _xml(f"<CopyObjectResult><ETag>{escape(source.etag)}</ETag></CopyObjectResult>")
        if self.headers.get("x-amz-content-sha256", "").startswith("STREAMING"):
            raise _Refused(501, "NotImplemented")
        self._check(there, key)
        etag = _etag(body)
        there[key] = Stored(body, etag, self._meta(), time.time())
        return _Answer(headers={"ETag": etag})

    def _source(self) -> Stored:
        bucket, _, key = unquote(self.headers["x-amz-copy-source"]).lstrip("/").partition("/")
        source = self.s3.buckets.get(bucket, {}).get(key)
        if source is None:
            raise _Refused(404, "NoSuchKey")
        return source

    def _meta(self) -> dict[str, str]:
        kept = {k.lower(): v for k, v in self.headers.items()}
        return {k: v for k, v in kept.items() if k.startswith("x-amz-meta-") or k == "content-type"}

    def _get(self, there: dict[str, Stored], key: str) -> _Answer:
        found = there.get(key)
        if found is None:
            raise _Refused(404, "NoSuchKey")
        wanted = self.headers.get("If-Match")
        if wanted not in (None, "*") and found.etag != wanted:
            raise _Refused(412, "PreconditionFailed")
        headers = {"ETag": found.etag, "Last-Modified": formatdate(found.modified_s, usegmt=True), **found.meta}
        span = _span(self.headers.get("Range"), len(found.data))
        if span is None:
            return _Answer(200, found.data, {**headers, "Content-Length": str(len(found.data))})
        start, stop = span
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(found.data)}"
        return _Answer(206, memoryview(found.data)[start:stop], {**headers, "Content-Length": str(stop - start)})

    def _list(self, there: dict[str, Stored], bucket: str, query: dict[str, str]) -> _Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after") or ""
        most = min(1000, int(query.get("max-keys", "1000")))
        encode = quote if query.get("encoding-type") == "url" else escape
        rows: list[str] = []
        last = ""
        more = False
        groups: set[str] = set()
        for key in sorted(there):
            if key <= after or not key.startswith(prefix):
                continue
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            group = key[: cut + len(delimiter)] if cut >= 0 else ""
            if group and (group in groups or after.startswith(group)):
                continue
            if len(rows) == most:
                more = True
                break
            if group:
                groups.add(group)
                rows.append(f"<CommonPrefixes><Prefix>{encode(group)}</Prefix></CommonPrefixes>")
            else:
                o = there[key]
                when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(o.modified_s)) + ".000Z"
                rows.append(
                    f"<Contents><Key>{encode(key)}</Key><LastModified>{when}</LastModified><ETag>{escape(o.etag)}</ETag>"
                    f"<Size>{len(o.data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                )
            last = group or key
        token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if more else ""
        truncated = "true" if more else "false"
        head = f"<Name>{bucket}</Name><Prefix>{encode(prefix)}</Prefix><KeyCount>{len(rows)}</KeyCount>"
        body = f"{head}<IsTruncated>{truncated}</IsTruncated>{token}{''.join(rows)}"
        return _xml(f"<ListBucketResult>{body}</ListBucketResult>")

    # -- uploads in parts

    def _begin(self, bucket: str, key: str) -> _Answer:
        name = f"upload-{len(self.s3.uploads)}-{time.monotonic_ns()}"
        self.s3.uploads[name] = Upload(bucket, key, self._meta())
        body = f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key><UploadId>{name}</UploadId>"
        return _xml(f"<InitiateMultipartUploadResult>{body}</InitiateMultipartUploadResult>")

    def _upload(self, key: str, name: str) -> Upload:
        upload = self.s3.uploads.get(name)
        if upload is None or upload.key != key:
            raise _Refused(404, "NoSuchUpload")
        return upload

    def _part(self, key: str, query: dict[str, str], body: bytes) -> _Answer:
        upload = self._upload(key, query["uploadId"])
        copied = "x-amz-copy-source" in self.headers
        if copied:
            source = self._source()
            span = _span(self.headers.get("x-amz-copy-source-range"), len(source.data)) or (0, len(source.data))
            body = source.data[slice(*span)]
        etag = _etag(body)
        upload.parts[int(query["partNumber"])] = (body, etag)
        if copied:
            return _xml(f"<CopyPartResult><ETag>{escape(etag)}</ETag></CopyPartResult>")
        return _Answer(headers={"ETag": etag})

    def _complete(self, there: dict[str, Stored], key: str, name: str, body: bytes) -> _Answer:
        upload = self._upload(key, name)
        wanted = [(int(_text(p, "PartNumber")), _text(p, "ETag")) for p in _parse(body).iter() if _tag(p) == "Part"]
        if not wanted or [n for n, _ in wanted] != sorted({n for n, _ in wanted}):
            raise _Refused(400, "InvalidPartOrder")
        chosen: list[bytes] = []
        for number, etag in wanted:
            data, real = upload.parts.get(number, (b"", ""))
            if real.strip('"') != etag.strip('"'):
                raise _Refused(400, "InvalidPart")
            chosen.append(data)
        if any(len(data) < self.s3.least_part_bytes for data in chosen[:-1]):
            raise _Refused(400, "EntityTooSmall")
        self._check(there, key)
        joined = hashlib.md5(b"".join(hashlib.md5(data).digest() for data in chosen)).hexdigest()
        etag = f'"{joined}-{len(chosen)}"'
        there[key] = Stored(b"".join(chosen), etag, upload.meta, time.time())
        del self.s3.uploads[name]
        where = f"<Bucket>{upload.bucket}</Bucket><Key>{escape(key)}</Key><ETag>{escape(etag)}</ETag>"
        return _xml(f"<CompleteMultipartUploadResult>{where}</CompleteMultipartUploadResult>")


def _delete_many(there: dict[str, Stored], body: bytes) -> _Answer:
    keys = [_text(o, "Key") for o in _parse(body).iter() if _tag(o) == "Object"]
    for key in keys:
        there.pop(key, None)
    rows = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
    return _xml(f"<DeleteResult>{rows}</DeleteResult>")


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """(start, stop) of a Range header; None for the whole."""
    if not header:
        return None
    m = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if m is None or m[1] == m[2] == "":
        raise _Refused(416, "InvalidRange")
    if not m[1]:
        return max(0, size - int(m[2])), size
    start = int(m[1])
    stop = min(size, int(m[2]) + 1) if m[2] else size
    if start >= size or stop <= start:
        raise _Refused(416, "InvalidRange")
    return start, stop


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _xml(text: str) -> _Answer:
    return _Answer(200, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode(), {"Content-Type": "application/xml"})


def _error(status: int, code: str) -> _Answer:
    body = _xml(f"<Error><Code>{code}</Code><Message>{code}</Message></Error>")
    return _Answer(status, body.body, body.headers)


def _parse(body: bytes) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(body)
    except ElementTree.ParseError as e:
        raise _Refused(400, "MalformedXML") from e


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _text(element: ElementTree.Element, name: str) -> str:
    return next((child.text or "" for child in element if _tag(child) == name), "")


def main() -> None:
    parser = argparse.ArgumentParser(description="A strict S3 server in memory, for tests.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bucket", action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", action="append", default=[], help="kind=rate; kinds: " + ", ".join(KINDS))
    parser.add_argument("--match", default="", help="only requests with this pattern in 'METHOD /bucket/key?query' fail")
    parser.add_argument("--slow-s", type=float, default=1.0)
    parser.add_argument("--ignore-conditions", action="store_true")
    given = parser.parse_args()
    rates = {kind: float(rate) for kind, _, rate in (f.partition("=") for f in given.fault)}
    faults = Faults(given.seed, rates, given.match, given.slow_s)
    server = S3Server(port=given.port, faults=faults, ignore_conditions=given.ignore_conditions)
    for bucket in given.bucket:
        server.make_bucket(bucket)
    print(server.url, flush=True)  # whoever started it reads where it is
    with server, contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()


if __name__ == "__main__":
    main()
