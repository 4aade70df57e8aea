"""Breadcrumbs: what a worker's user code was given last, in memory that outlives the worker.

A crumb is a memfd that driver and worker share: a length word, then a record of that many bytes; length 0 says that no user
code is at work. The writer clears the length, writes the record, then sets the length, so that a record torn by the worker's
death reads as none. The record is plain numbers and text, never a pickle: what a crashed process left can't run code here,
and bytes that native code trampled on read as none.

Invariant: one thread of the worker writes at a time; the driver reads with `pread` and maps nothing.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading

from headrace.core.refs import Segment
from headrace.core.steps import Doing

CRUMB_MAX_BYTES = 16 << 20  # of one record; a larger sample is left out, then segments that do not fit

_PAGE = mmap.PAGESIZE
_SHRINK_BYTES = 1 << 20  # a crumb that grew beyond this for a sample gives its memory back with the next small record
_CACHED_TEXTS = 1024  # names of input objects that are kept encoded

_LENGTH = struct.Struct("<I")
_HEAD = struct.Struct("<qIIIIQ")  # op, bytes of name, segments, bytes of their names, bytes of digest, bytes of sample
_SEGMENT = struct.Struct("<qqI")  # row, rows, bytes of uri, which follows
_NOTHING = _LENGTH.pack(0)


def create_crumb(worker: int) -> int:
    """A descriptor of a new crumb that says nothing."""
    fd = os.memfd_create(f"headrace-crumb-{worker}", os.MFD_CLOEXEC)
    os.ftruncate(fd, _PAGE)
    return fd


class CrumbWriter:
    """The worker's end: `contracts.substrate.Crumb`. Takes over the descriptor. A record of one segment takes about 2 us."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, os.fstat(fd).st_size)  # keeps a descriptor of its own
        os.close(fd)
        self._texts: dict[str, bytes] = {}
        self._lock = threading.Lock()  # a streaming model takes its rows in a thread of its own

    def write(self, doing: Doing) -> None:
        """Survives the death of the process; replaces what was there."""
        with self._lock:
            self._write(self._encode(doing))

    def _write(self, record: bytes) -> None:
        end = _LENGTH.size + len(record)
        memory = self._map
        memory[: _LENGTH.size] = _NOTHING
        if end > len(memory) or (len(memory) > _SHRINK_BYTES and end <= _PAGE):
            memory.resize(-(-end // _PAGE) * _PAGE)
        memory[_LENGTH.size : end] = record
        memory[: _LENGTH.size] = _LENGTH.pack(len(record))

    def clear(self) -> None:
        """No user code is at work."""
        with self._lock:
            self._map[: _LENGTH.size] = _NOTHING

    def _encode(self, doing: Doing) -> bytes:
        name, digest, sample = self._text(doing.name), doing.digest.encode(), doing.sample
        pieces: list[bytes] = []
        room = CRUMB_MAX_BYTES - _HEAD.size - len(name) - len(digest)
        for segment in doing.segments:
            uri = self._text(segment.uri)
            room -= _SEGMENT.size + len(uri)
            if room < 0:
                break
            pieces += (_SEGMENT.pack(segment.row, segment.rows, len(uri)), uri)
        if len(sample) > room:
            sample = b""
        named = b"".join(pieces)
        head = _HEAD.pack(doing.op, len(name), len(pieces) // 2, len(named), len(digest), len(sample))
        return b"".join((head, name, named, digest, sample))

    def _text(self, text: str) -> bytes:
        data = self._texts.get(text)
        if data is None:
            if len(self._texts) >= _CACHED_TEXTS:
                self._texts.clear()
            data = self._texts[text] = text.encode("utf-8", "surrogatepass")  # file names need not be valid text
        return data


def read_crumb(fd: int) -> Doing | None:
    """What the crumb says; None for nothing, or a record that is torn or damaged. The worker must not be writing: dead."""
    head = os.pread(fd, _LENGTH.size, 0)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if not 0 < length <= min(CRUMB_MAX_BYTES, os.fstat(fd).st_size - _LENGTH.size):
        return None
    record = os.pread(fd, length, _LENGTH.size)
    try:
        return _decode(record)
    except (struct.error, UnicodeDecodeError):
        return None


def _decode(record: bytes) -> Doing | None:
    op, name_bytes, count, named_bytes, digest_bytes, sample_bytes = _HEAD.unpack_from(record)
    if _HEAD.size + name_bytes + named_bytes + digest_bytes + sample_bytes != len(record):
        return None
    name = record[_HEAD.size :][:name_bytes].decode("utf-8", "surrogatepass")
    at = _HEAD.size + name_bytes
    stop = at + named_bytes
    segments: list[Segment] = []
    for _ in range(count):
        row, rows, uri_bytes = _SEGMENT.unpack_from(record, at)
        at += _SEGMENT.size
        segments.append(Segment(record[at : at + uri_bytes].decode("utf-8", "surrogatepass"), row, rows))
        at += uri_bytes
        if at > stop:
            return None
    if at != stop:
        return None
    digest = record[at : at + digest_bytes].decode()
    return Doing(op, name, tuple(segments), digest, record[at + digest_bytes :])
