"""Stored objects: bytes, sizes and versions of local files and S3 objects, behind one small interface.

What must not live here: formats, listing rules, splits. Invariants: store clients are cached per process and bucket and never
pickled; nothing is read under a version other than the one asked for; failures come out as errors of core/errors.py.

A uri is an absolute local path or "s3://bucket/key".
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from stat import S_ISDIR, S_ISFIFO, S_ISREG, S_ISSOCK
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pyarrow as pa
from msgspec import Struct

from headrace.connectors import environment, retries
from headrace.connectors.redact import redact
from headrace.core.errors import DataError, HeadraceError, InputChanged, StorageRefused, TransientError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from obstore.store import S3Store

S3_PREFIX = "s3://"

# Objects up to this size are fetched whole. Local: the read costs less than the seeks of a column reader. S3: the first byte
# takes 50-100 ms, in which 8 MiB arrive, so one request beats footer + ranges.
WHOLE_LOCAL_BYTES = 1 << 20
ADVISE_BYTES = 256 << 10  # Linux reads no more for one hint than a device takes in one request
WHOLE_S3_BYTES = 8 << 20

REQUEST_BYTES = 8 << 20  # one ranged GET: large enough that the first-byte time is small beside it
OBJECTS_AHEAD = 16  # small objects of a split on their way at once: with 30-100 ms to the first byte, some 200 a second
REQUEST_THREADS = 4  # concurrent GETs of one reader; every worker has a reader of its own
GAP_BYTES = 1 << 20  # arrives in about 10 ms, in which another request would just have begun to answer
SMALL_GAP_BYTES = 64 << 10
FOOTER_BYTES = 256 << 10  # the tail of a file, fetched once: holds the footer of almost every Parquet file

# No request may hang for ever on a connection that is dead. A request carries at most REQUEST_BYTES, so a minute is long.
TIMEOUTS = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "60s"}
BULK_TIMEOUTS = {"connect_timeout": "5s", "read_timeout": "5m", "timeout": "15m"}  # a server copies about 5 GiB in two minutes
BULK_RETRIES = 8

T = TypeVar("T")

_stores: dict[tuple[Any, ...], S3Store] = {}


class Stored(Struct, frozen=True):
    """An object as listed. version: changes when the object does. name: relative to the dataset's root."""

    uri: str
    size: int
    version: str
    name: str = ""


class Reader(Protocol):
    """An open object. `native` may be asked for once; `check` raises InputChanged if it is no longer the planned one."""

    uri: str
    size: int
    version: str
    whole: bool

    def native(self, ahead_bytes: int = 0) -> pa.NativeFile:
        """The bytes, seekable. ahead_bytes: for sequential reading, how much a request to a remote store should bring."""
        ...

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """The (start, stop) ranges will be read next, in one go where that saves requests; earlier ones no more."""
        ...

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These ranges will be read after those that are being read: the store, or the disk, is asked for them now."""
        ...

    def check(self) -> None: ...

    def close(self) -> None: ...


def is_remote(uri: str) -> bool:
    return uri.startswith(S3_PREFIX)


def split_s3(uri: str) -> tuple[str, str]:
    """(bucket, key)."""
    bucket, _, key = uri[len(S3_PREFIX) :].partition("/")
    if "@" in bucket:
        hint = "give them by AWS_PROFILE or AWS_ACCESS_KEY_ID, not in a path"
        raise DataError(f"{redact(uri)!r} holds credentials", hint=hint)
    if not bucket:
        raise DataError(f"{uri!r} names no bucket", hint="write s3://bucket/prefix")
    return bucket, key


def s3_store(bucket: str, *, bulk: bool = False) -> S3Store:
    """The process's client for a bucket. It tries each request once: calls go through `requested`.

    bulk: for transfers of many requests in one call (uploads in parts, large copies): the client itself retries each of them,
    and has more time for it.
    """
    key = (os.getpid(), bulk, bucket, *environment.fingerprint())
    store = _stores.get(key)
    if store is None:
        from obstore.store import S3Store

        config = environment.s3_config()
        limits = BULK_TIMEOUTS if bulk else TIMEOUTS
        config["client_options"] = {**config.get("client_options", {}), **limits}
        config["retry_config"] = {"max_retries": BULK_RETRIES if bulk else 0, "retry_timeout": timedelta(minutes=4)}
        store = _stores[key] = S3Store(bucket, **config)
    return store


def requested(uri: str, action: Callable[[], T]) -> T:
    """What requests to S3 answer, after retries of what may pass; errors as those of core/errors.py.

    action: one request, or several that may all be made again.
    """
    with s3_errors(uri):
        return retries.call(action)


def found(uri: str, action: Callable[[], T]) -> T | None:
    """As `requested`; None when there is no such object."""
    with s3_errors(uri):
        try:
            return retries.call(action)
        except FileNotFoundError as e:
            if "NoSuchBucket" in str(e):
                raise _no_bucket(uri) from None
            return None


def list_keys(bucket: str, prefix: str, offset: str | None = None) -> Iterator[Any]:
    """Metadata of the objects under a prefix that ends at a "/" (or is ""), sorted by key; a page in memory.

    A listing that breaks off goes on behind the last key that came.
    """
    import obstore

    pages: Any = None

    def page() -> Any:
        nonlocal pages
        if pages is None:
            pages = iter(obstore.list(s3_store(bucket), prefix or None, offset=offset, chunk_size=1000))
        try:
            return next(pages, None)
        except BaseException:
            pages = None  # a broken stream; the next attempt begins another
            raise

    uri = f"{S3_PREFIX}{bucket}/{prefix}"
    while (metas := requested(uri, page)) is not None:
        if metas:
            offset = metas[-1]["path"]
        yield from metas


def stat_version(st: os.stat_result) -> str:
    return f"{st.st_size}-{st.st_mtime_ns}"


def meta_version(meta: Any) -> str:
    """The version of an S3 object from its metadata: the etag, else size and time."""
    return meta["e_tag"] or f"{meta['size']}-{meta['last_modified'].timestamp()}"


def is_etag(version: str) -> bool:
    """Does it tell contents apart? A size and a time are what servers without etags leave."""
    return bool(version) and (version.startswith('"') or "-" not in version)


def is_special(path: str) -> bool:
    """Is it a pipe, a socket or a device?"""
    try:
        return _is_special(os.stat(path))
    except OSError:
        return False


def _is_special(st: os.stat_result) -> bool:
    return not S_ISREG(st.st_mode) and not S_ISDIR(st.st_mode)


def stored_file(path: str, st: os.stat_result) -> Stored:
    """A local file. Raises DataError for a pipe, a socket or a device: files are read in parts, and more than once."""
    if _is_special(st):
        kind = "a named pipe" if S_ISFIFO(st.st_mode) else "a socket" if S_ISSOCK(st.st_mode) else "a device"
        hint = "write what comes out of it to a file, and read that"
        raise DataError(f"{kind} can't be read in parts, or twice", where=(("file", path),), hint=hint)
    return Stored(path, st.st_size, stat_version(st))


def stat(uri: str) -> Stored | None:
    """The object, or None when there is no such file or key."""
    if not is_remote(uri):
        try:
            st = os.stat(uri)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as e:
            raise DataError(f"can't look at {uri}: {e.strerror}") from e
        return stored_file(uri, st)
    import obstore

    bucket, key = split_s3(uri)
    meta = found(uri, lambda: obstore.head(s3_store(bucket), key))
    return None if meta is None else Stored(uri, meta["size"], meta_version(meta))


def open_reader(uri: str, size: int, version: str, *, parts: bool = False) -> Reader:
    """Open an object under the version that was planned ("" for whichever is there). parts: little of it will be read: a
    remote one is not fetched whole, however small. Raises InputChanged, DataError.
    """
    if is_remote(uri):
        return _S3Reader(uri, size, version, whole=size <= WHOLE_S3_BYTES and not parts)
    return _LocalReader(uri, size, version)


def changed(uri: str) -> InputChanged:
    return InputChanged(
        "an input object changed after it was listed",
        where=(("file", redact(uri)),),
        hint="let whatever writes it finish, then run again",
    )


@contextmanager
def s3_errors(uri: str) -> Iterator[None]:
    """Translate the client's exceptions by who must act."""
    from obstore import exceptions as oe

    where = (("file", redact(uri)),)
    try:
        yield
    except HeadraceError:
        raise
    except retries.Exhausted as e:
        message = f"storage trouble that {e.attempts} attempts did not outlast: {_brief(e.__cause__ or e)}"
        hint = "look after the storage and the network, then run the same command again"
        raise TransientError(message, where=where, hint=hint) from None
    except FileNotFoundError as e:
        if "NoSuchBucket" in str(e):
            raise _no_bucket(uri) from None
        raise DataError("no such object or bucket", where=where, hint="check the bucket and the key") from e
    except oe.PreconditionError as e:
        raise changed(uri) from e
    except (oe.PermissionDeniedError, oe.UnauthenticatedError) as e:
        hint = "check AWS_PROFILE or AWS_ACCESS_KEY_ID, and the bucket's policy"
        raise StorageRefused(f"access denied: {_brief(e)}", where=where, hint=hint) from None
    except (oe.BaseError, ConnectionError, TimeoutError) as e:
        # The client has no exception for this; the code is part of S3's protocol.
        if "NoSuchBucket" in str(e):
            raise _no_bucket(uri) from e
        if retries.transient(e):
            raise TransientError(f"storage trouble: {_brief(e)}", where=where) from None
        raise StorageRefused(f"the storage refused a request: {_brief(e)}", where=where) from None


def _no_bucket(uri: str) -> StorageRefused:
    return StorageRefused("no such bucket", where=(("file", redact(uri)),), hint="check the bucket's name and region")


def _brief(error: BaseException) -> str:
    """The error's first line. `from None` where it is used: the client's own texts hold whole requests, signatures included."""
    text = redact(str(error)).strip().splitlines()
    return text[0][:300] if text else type(error).__name__


class _LocalReader:
    """A local file. Its version is compared when it is opened and again by `check`."""

    def __init__(self, uri: str, size: int, version: str) -> None:
        self.uri = uri
        self.size = size
        self.whole = size <= WHOLE_LOCAL_BYTES
        self.version = version
        self._file: pa.NativeFile | None = None
        if not self.whole:
            self.check()

    def native(self, ahead_bytes: int = 0) -> pa.NativeFile:
        try:
            if self.whole:
                self._file = pa.BufferReader(self._read_whole())
            else:
                self._file = pa.OSFile(self.uri, "rb")
        except OSError as e:
            raise _unreadable(self.uri, e) from e
        return self._file

    def _read_whole(self) -> bytes:
        """All bytes, of the planned version: the open file is compared before and after; a rename in between is no matter."""
        try:
            fd = os.open(self.uri, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError as e:
            raise changed(self.uri) from e
        try:
            self._compare(os.fstat(fd))
            data = os.read(fd, self.size + 1)
            while len(data) < self.size and (more := os.read(fd, self.size - len(data))):
                data += more
            self._compare(os.fstat(fd))
            return data
        finally:
            os.close(fd)

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        """The kernel's read-ahead does it."""

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        """The kernel is told: it reads them from the disk meanwhile, if it has them not."""
        if not hasattr(os, "posix_fadvise") or self.whole:
            return
        with suppress(OSError):  # a hint
            fd = os.open(self.uri, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for start, stop in coalesce(ranges):
                    for at in range(start, stop, ADVISE_BYTES):
                        os.posix_fadvise(fd, at, min(ADVISE_BYTES, stop - at), os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)

    def check(self) -> None:
        if self.whole:
            return  # compared while it was read
        try:
            now = os.stat(self.uri)
        except FileNotFoundError as e:
            raise changed(self.uri) from e
        except OSError as e:
            raise _unreadable(self.uri, e) from e
        self._compare(now)

    def _compare(self, now: os.stat_result) -> None:
        if self.version and stat_version(now) != self.version:
            raise changed(self.uri)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _unreadable(uri: str, e: OSError) -> DataError:
    return DataError(f"can't read the file: {e.strerror or e}", where=(("file", uri),), hint="check its permissions")


class _S3Reader:
    """An S3 object. Every request carries the planned etag, so a changed object can't be read by parts of two versions."""

    def __init__(self, uri: str, size: int, version: str, *, whole: bool) -> None:
        self.uri = uri
        self.size = size
        self.whole = whole
        self.version = version
        self._file: RangedFile | None = None

    def native(self, ahead_bytes: int = 0) -> pa.NativeFile:
        if self.whole:
            coming = _coming.pop((self.uri, self.version), None)
            return pa.BufferReader(_fetch(self.uri, self.version, None) if coming is None else coming.result())
        self._file = RangedFile(self.uri, self.size, self.version, ahead_bytes)
        return pa.PythonFile(self._file, "r")

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        if self._file is not None:
            self._file.prefetch(ranges)

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        if self._file is not None:
            self._file.announce(ranges)

    def check(self) -> None:
        """Nothing to do: each request was conditional."""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _fetch(uri: str, version: str, span: tuple[int, int] | None) -> pa.Buffer:
    """Bytes [start, stop) of an object, or all of it, under a version."""
    import obstore

    bucket, key = split_s3(uri)
    listed = bool(version)
    options: dict[str, Any] = {}
    if span is not None:
        options["range"] = span
    if not is_etag(version):
        version = ""  # no etag from this server: sizes are all that can be compared
    if version:
        options["if_match"] = version

    def get() -> pa.Buffer:
        try:
            got = obstore.get(s3_store(bucket), key, options=options)  # type: ignore[arg-type]
        except FileNotFoundError as e:
            if not listed or "NoSuchBucket" in str(e):
                raise
            raise changed(uri) from e
        if version and got.meta["e_tag"] not in (None, version):
            raise changed(uri)
        return pa.py_buffer(got.buffer())

    return requested(uri, get)


_coming: dict[tuple[str, str], Future[pa.Buffer]] = {}  # (uri, version) -> a whole object, for the one who opens it next


class FetchAhead:
    """Small remote objects that are to be opened one after the other: the next ones are on their way, some at a time, and no
    more than `most_bytes` of them. Large ones come by ranges, which their readers ask for. One that is on its way is not asked
    for again: who opens it a second time fetches it then.
    """

    def __init__(self, objects: Iterable[Stored], most_bytes: int) -> None:
        self._left = deque(o for o in objects if o.size <= WHOLE_S3_BYTES)
        self._most_bytes = most_bytes
        self._asked: deque[tuple[Stored, Future[pa.Buffer]]] = deque()
        self._threads: ThreadPoolExecutor | None = None

    def go_on(self) -> None:
        """Ask for as many as may be on their way, now that those before have been opened."""
        self._asked = deque((o, coming) for o, coming in self._asked if _coming.get((o.uri, o.version)) is coming)
        size = sum(o.size for o, _ in self._asked)
        known = {(o.uri, o.version) for o, _ in self._asked}
        while (
            self._left
            and len(self._asked) < OBJECTS_AHEAD
            and (not self._asked or size + self._left[0].size <= self._most_bytes)
        ):
            if self._threads is None:
                from concurrent.futures import ThreadPoolExecutor

                self._threads = ThreadPoolExecutor(OBJECTS_AHEAD, thread_name_prefix="headrace-get")
            o = self._left.popleft()
            if (o.uri, o.version) in known:
                continue
            known.add((o.uri, o.version))
            coming = _coming[o.uri, o.version] = self._threads.submit(_fetch, o.uri, o.version, None)
            self._asked.append((o, coming))
            size += o.size

    def close(self) -> None:
        for o, coming in self._asked:
            if _coming.get((o.uri, o.version)) is coming:
                _coming.pop((o.uri, o.version), None)
        self._asked.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None


class RangedFile:
    """A seekable file over ranged GETs, for readers that name ahead what they will read. Not thread-safe.

    Holds the file's tail, the ranges of the last `prefetch`, and what comes of those of the last `announce`; any other read is
    one request, of its own size or of `ahead_bytes`.
    """

    def __init__(self, uri: str, size: int, version: str, ahead_bytes: int = 0) -> None:
        self._ahead = ahead_bytes
        self._uri = uri
        self._version = version
        self._size = size
        self._at = 0
        self._tail: tuple[int, pa.Buffer] | None = None
        self._spans: list[tuple[int, pa.Buffer]] = []
        self._coming: dict[tuple[int, int], Future[pa.Buffer]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self.closed = False

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._spans = []
        pieces = [piece for span in coalesce(ranges) for piece in _pieces(span)]
        announced, self._coming = self._coming, {}
        if len(pieces) == 1 and not announced:
            buffers = [self._fetch(pieces[0])]
        else:
            coming = [announced.pop(p, None) or self._ask(p) for p in pieces]
            for unwanted in announced.values():
                unwanted.cancel()
            buffers = [c.result() for c in coming]
        self._spans = [(start, buffer) for (start, _), buffer in zip(pieces, buffers, strict=True)]

    def announce(self, ranges: Sequence[tuple[int, int]]) -> None:
        for unwanted in self._coming.values():
            unwanted.cancel()
        self._coming = {piece: self._ask(piece) for span in coalesce(ranges) for piece in _pieces(span)}

    def _ask(self, piece: tuple[int, int]) -> Future[pa.Buffer]:
        if self._threads is None:
            from concurrent.futures import ThreadPoolExecutor

            self._threads = ThreadPoolExecutor(REQUEST_THREADS, thread_name_prefix="headrace-get")
        return self._threads.submit(self._fetch, piece)

    def _fetch(self, span: tuple[int, int]) -> pa.Buffer:
        return _fetch(self._uri, self._version, span)

    def read(self, size: int = -1) -> Any:
        stop = self._size if size < 0 else min(self._at + size, self._size)
        out = self._range(self._at, stop)
        self._at = stop
        return out

    def _range(self, start: int, stop: int) -> Any:
        if stop <= start:
            return b""
        held = [(at, b) for at, b in self._spans if at < stop and at + b.size > start]
        if len(held) == 1 and held[0][0] <= start and held[0][0] + held[0][1].size >= stop:
            return held[0][1].slice(start - held[0][0], stop - start)
        if held and held[0][0] <= start and sum(b.size for _, b in held) >= stop - held[0][0]:
            return b"".join(memoryview(b)[max(0, start - at) : stop - at] for at, b in held)
        tail_from = max(0, self._size - FOOTER_BYTES)
        if start >= tail_from:
            if self._tail is None:
                self._tail = (tail_from, self._fetch((tail_from, self._size)))
            return self._tail[1].slice(start - tail_from, stop - start)
        if self._ahead > stop - start:
            buffer = self._fetch((start, min(start + self._ahead, self._size)))
            self._spans = [(start, buffer)]
            return buffer.slice(0, stop - start)
        return self._fetch((start, stop))

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._size

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        self._spans, self._coming = [], {}
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
            self._threads = None


def coalesce(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges, joined where the gap costs less than another request; only over small gaps where large ones would come to
    more bytes than are wanted.
    """
    spans = _joined(ranges, GAP_BYTES)
    wanted = sum(stop - start for start, stop in ranges)
    return spans if sum(stop - start for start, stop in spans) <= 2 * wanted else _joined(ranges, SMALL_GAP_BYTES)


def _joined(ranges: Sequence[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if out and start - out[-1][1] <= gap:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return out


def _pieces(span: tuple[int, int]) -> list[tuple[int, int]]:
    start, stop = span
    return [(at, min(at + REQUEST_BYTES, stop)) for at in range(start, stop, REQUEST_BYTES)]
