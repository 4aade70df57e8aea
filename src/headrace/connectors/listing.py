"""Listing: what the user wrote (files, directories, globs, lists, s3://) becomes a stream of stored objects.

What must not live here: formats and splits. Invariants: objects come out in a fixed order (entries as written, each sorted by
path); memory is one directory (local) or one page of keys (S3), whatever the length of the listing, and 8 bytes an object
where entries share a folder; names, which outputs are called after, are unique.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count, islice, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlparse

from headrace.connectors import storage
from headrace.connectors.name_set import GrowingNames
from headrace.connectors.redact import redact
from headrace.connectors.storage import Stored
from headrace.core.errors import DataError
from headrace.core.paths import absolute

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

T = TypeVar("T")

COMPRESSED = (".gz", ".bz2", ".zst")

MOST_KEPT = 1024  # objects that a listing kept for an action remembers: a page, and about 300 kB

# Objects that `spread` chooses among: what a store tells at once; locally 5 us each, a hundredth of what reading one takes.
PAGE = 1000
MOST_SPREAD = 16_384

_MAGIC = re.compile(r"[*?\[]")
_UNTIDY = re.compile(r"(^|/)\.?(/|\Z)")  # what PurePosixPath would put in order


def output_stem(name: str) -> str:
    """An object's name without what outputs drop: a compression suffix, then the extension."""
    name = str(PurePosixPath(name)) if _UNTIDY.search(name) else name
    suffix = _suffix(name)
    if suffix.lower() in COMPRESSED:
        name = name.removesuffix(suffix)
        suffix = _suffix(name)
    return name.removesuffix(suffix)


def _suffix(name: str) -> str:
    """PurePosixPath(name).suffix of a tidy name, in a tenth of the time."""
    base = name[name.rfind("/") + 1 :]
    at = base.rfind(".")
    return base[at:] if 0 < at < len(base) - 1 else ""


@dataclass(frozen=True)
class Listing:
    """entries: normalised paths (absolute, or s3://...). extensions: lower-case suffixes that directories are filtered by;
    () for every file. Compressed variants (.csv.gz) of an extension count as it when `compressed`.
    """

    entries: tuple[str, ...]
    extensions: tuple[str, ...]
    compressed: bool = False

    @staticmethod
    def of(paths: Paths, extensions: tuple[str, ...], *, compressed: bool = False) -> Listing:
        given: list[Any] = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        if not given:
            raise DataError("there is nothing to read: the list of paths is empty")
        return Listing(tuple(_normalise(p) for p in given), extensions, compressed)

    @property
    def remote(self) -> bool:
        return any(storage.is_remote(e) for e in self.entries)

    @property
    def label(self) -> str:
        more = f" and {len(self.entries) - 1} more" if len(self.entries) > 1 else ""
        return "".join(self.entries[:1]) + more

    @property
    def paged(self) -> bool:
        """Do many objects come with one request? Of single objects each takes one of its own."""
        return all(_is_broad(e) for e in self.entries)

    def first(self) -> Stored:
        return next(self.objects())

    def spread(self, most: int) -> tuple[list[Stored], bool]:
        """(the first object, the last, and evenly spaced ones between them: at most so many; are those all there are?).

        Of a long listing that is its beginning. Where several objects take several requests, their entries stand for them.
        """
        if self.remote and not all(map(_is_level, self.entries)):
            return self._spread_entries(most)
        objects = list(islice(self.objects(), PAGE if self.remote else MOST_SPREAD))
        return _evenly(objects, most), len(objects) <= most

    def _spread_entries(self, most: int) -> tuple[list[Stored], bool]:
        """As `spread`, by the first object of each entry; asked for side by side."""
        entries = _evenly(self.entries, most)
        if len(entries) == 1:
            return [self.first()], not _is_broad(entries[0])
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(len(entries), thread_name_prefix="headrace-list") as threads:
            others = [threads.submit(lambda e: next(self._expand(e), None), e) for e in entries[1:]]
            found = [self.first(), *(other.result() for other in others)]
        whole = len(entries) == len(self.entries) and not any(map(_is_broad, entries))
        return [o for o in found if o is not None], whole

    def kept(self) -> Listing:
        """The same listing, made once as far as it is short: whoever asks for its objects sees the same ones."""
        return _KeptListing(self.entries, self.extensions, self.compressed)

    def objects(self) -> Iterator[Stored]:
        """All objects. Raises DataError for an entry that is missing or holds nothing to read."""
        names = _Names(in_order=_apart([_fixed_root(e) for e in self.entries]))
        earlier: list[_Matcher] = []
        for entry in self.entries:
            found = False
            matcher = _Matcher(entry)
            for o in self._expand(entry):
                found = True
                _check_name(o.uri)
                name = self.relative(o.uri)
                repeats = sum(m.matches(o.uri) for m in earlier)
                yield Stored(o.uri, o.size, o.version, names.unique(name, repeats))
            if not found:
                raise self._nothing(entry)
            if matcher.broad and len(self.entries) > 1:
                earlier.append(matcher)

    def relative(self, uri: str) -> str:
        """An object's path below the folder that holds all that is read."""
        return _relative(uri, self._root)

    @cached_property
    def _root(self) -> str:
        return _common_root([_fixed_root(e) for e in self.entries])

    def covers(self, uri: str) -> bool:
        """Would `objects` find an object of this path, if there was one?"""
        return any(_covers(entry, uri) and (bool(_MAGIC.search(entry)) or self._wanted(uri)) for entry in self.entries)

    def _expand(self, entry: str) -> Iterator[Stored]:
        if storage.is_remote(entry):
            return self._expand_s3(entry)
        if _MAGIC.search(entry) and not os.path.lexists(entry):
            named = not _MAGIC.search(entry.rpartition("/")[2])
            return _local_glob(entry, lambda path: not named and not self._wanted(path) and storage.is_special(path))
        if os.path.isdir(entry):
            return _walk(entry, re.compile(r"[^_.]").match, self._wanted)
        found = storage.stat(entry)
        return iter(() if found is None else (found,))

    def _expand_s3(self, entry: str) -> Iterator[Stored]:
        bucket, key = storage.split_s3(entry)
        magic = _MAGIC.search(key)
        if magic:
            fixed = key[: magic.start()]
            pattern = _glob_pattern(key)
            for o in _list_s3(bucket, fixed):
                if pattern.fullmatch(storage.split_s3(o.uri)[1]):
                    yield o
            return
        prefix = key.rstrip("/") + "/" if key else ""
        listed = _list_s3(bucket, prefix)
        if key and not key.endswith("/"):
            found, listed = _object_or_listed(entry, listed)
            if found is not None:
                yield found
                return
        for o in listed:
            inner = storage.split_s3(o.uri)[1][len(prefix) :]
            hidden = any(part[:1] in ("_", ".") for part in inner.split("/"))
            if inner and not inner.endswith("/") and not hidden and self._wanted(inner):
                yield o

    def _wanted(self, path: str) -> bool:
        if not self.extensions:
            return True
        low = path.lower()
        if self.compressed:
            for suffix in COMPRESSED:
                low = low.removesuffix(suffix)
        return low.endswith(self.extensions)

    def _nothing(self, entry: str) -> DataError:
        kinds = ", ".join(self.extensions) or "files"
        if _MAGIC.search(entry):
            return DataError("no object matches the pattern", where=(("path", entry),), hint="check the pattern")
        if storage.is_remote(entry):
            hint = f"check the bucket and the prefix; under a prefix these are read: {kinds}"
            return DataError("no object to read at this path", where=(("path", entry),), hint=hint)
        if os.path.isdir(entry):
            hint = f"a directory is read for {kinds}, names that begin with _ or . apart; name other files by a glob"
            return DataError("the directory holds nothing to read", where=(("path", entry),), hint=hint)
        return DataError("no such file or directory", where=(("path", entry),), hint="check the path")


class _Kept:
    """The first objects of a listing, as far as anyone asked for them. In another process nothing is kept."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.objects: list[Stored] = []
        self.rest: Iterator[Stored] | None = None

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


@dataclass(frozen=True)
class _KeptListing(Listing):
    """A listing that remembers its first MOST_KEPT objects. Who goes beyond them ends the memory and lists on; thread-safe."""

    _kept: _Kept = field(default_factory=_Kept, compare=False, repr=False)

    def objects(self) -> Iterator[Stored]:
        kept = self._kept
        with kept.lock:
            if kept.rest is None:
                kept.objects, kept.rest = [], super().objects()
            objects, rest = kept.objects, kept.rest
        at = 0
        while at < MOST_KEPT:
            with kept.lock:
                if at == len(objects):
                    if kept.rest is not rest:
                        break
                    try:
                        found = next(rest, None)
                    except BaseException:
                        kept.rest = None  # it is broken: the next one begins anew
                        raise
                    if found is None:
                        return
                    objects.append(found)
            yield objects[at]
            at += 1
        with kept.lock:
            mine = kept.rest is rest
            if mine:
                kept.rest = None
        yield from rest if mine else self._anew(objects)

    def _anew(self, before: Sequence[Stored]) -> Iterator[Stored]:
        """What comes behind these, for one who was among them when another took the rest."""
        objects = super().objects()
        if list(islice(objects, len(before))) != before:
            raise storage.changed(self.entries[0])
        yield from objects


def _normalise(path: str | os.PathLike[str]) -> str:
    text = str(os.fspath(path))
    if text.startswith(storage.S3_PREFIX):
        storage.split_s3(text)  # refuses credentials in it
        return text
    if text.startswith("file://"):
        text = unquote(urlparse(text).path)
    elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", text):
        raise DataError(f"can't read {redact(text)!r}: unknown scheme", hint="use a local path, file:// or s3://")
    return absolute(text)


def _check_name(uri: str) -> None:
    """Names of local files are bytes, but a run's log and its lineage are UTF-8."""
    if uri.isascii():
        return
    try:
        uri.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(uri).decode(errors="backslashreplace")
        raise DataError("the name of a file is not UTF-8", where=(("path", shown),), hint="rename the file") from None


def _covers(entry: str, uri: str) -> bool:
    if not _is_broad(entry) or storage.is_remote(entry) != storage.is_remote(uri):
        return False
    if _MAGIC.search(entry) and (storage.is_remote(entry) or not os.path.lexists(entry)):
        return _glob_pattern(entry).fullmatch(uri) is not None
    top = entry.rstrip("/") + "/"
    return uri.startswith(top) and not any(part[:1] in ("_", ".") for part in uri[len(top) :].split("/"))


def _is_broad(entry: str) -> bool:
    """May it stand for several objects?"""
    if _MAGIC.search(entry):
        return True
    if storage.is_remote(entry):
        return not PurePosixPath(entry).suffix
    return os.path.isdir(entry)


def _is_level(entry: str) -> bool:
    """Does a request tell of many of its objects? Those that match a pattern of several levels may be far apart."""
    return _is_broad(entry) and not _MAGIC.search(entry.rpartition("/")[0])


def _evenly(items: Sequence[T], most: int) -> list[T]:
    """The first, the last and evenly spaced ones; all where they are few."""
    last = len(items) - 1
    return list(items) if last < most else [items[i * last // (most - 1)] for i in range(most)]


def _fixed_root(entry: str) -> str:
    """The directory that an entry's names are relative to."""
    magic = _MAGIC.search(entry)
    if magic:
        return entry[: magic.start()].rpartition("/")[0]
    return entry.rstrip("/") if _is_broad(entry) else entry.rpartition("/")[0]


def _common_root(roots: Sequence[str]) -> str:
    parts = [r.split("/") for r in roots]
    depth = 0
    while all(len(p) > depth for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    return "/".join(parts[0][:depth])


def _apart(roots: Sequence[str]) -> bool:
    """Does none of these directories lie in another?"""
    folders = sorted(r.removeprefix(storage.S3_PREFIX).strip("/") + "/" for r in roots)
    return not any(below.startswith(above) for above, below in pairwise(folders))


def _relative(uri: str, root: str) -> str:
    if uri == root:
        return uri.rpartition("/")[2]
    inside = uri[len(root) :].lstrip("/") if root and uri.startswith(f"{root}/") else uri
    return inside.removeprefix(storage.S3_PREFIX).lstrip("/")


class _Matcher:
    """Does an entry cover an object? For telling when two entries of a list overlap."""

    def __init__(self, entry: str) -> None:
        self.broad = _is_broad(entry)
        self._prefix = entry.rstrip("/") + "/"
        self._pattern = _glob_pattern(entry) if _MAGIC.search(entry) else None

    def matches(self, uri: str) -> bool:
        return uri.startswith(self._prefix) if self._pattern is None else self._pattern.fullmatch(uri) is not None


class _Names:
    """Hands out names whose output stems differ. in_order: names that begin alike come one after another, as those of one
    sorted entry do, so that a stem is forgotten with the last name that begins with it.
    """

    def __init__(self, *, in_order: bool) -> None:
        self._in_order = in_order
        self._near: list[str] = []  # in order: stems that the last name begins with
        self._kept = GrowingNames()  # all other stems; in order, those with a number

    def unique(self, name: str, repeats: int) -> str:
        if repeats:
            suffix = PurePosixPath(name).suffix
            name = f"{name.removesuffix(suffix)}.again{repeats}{suffix}"
        self._near = [stem for stem in self._near if name.startswith(stem)]
        for n in count(1):
            offered = _offer(name, n)
            stem = output_stem(offered)
            if stem in self._near or stem in self._kept:
                continue
            if self._in_order and n < 3:
                self._near.append(stem)
            else:
                self._kept.add(stem)
            return offered
        raise AssertionError


def _offer(name: str, n: int) -> str:
    """The n-th of the names that an object may get: a.jpg, a.jpg.jpg, a.jpg-3.jpg, ... Their stems are a, a.jpg, a.jpg-3.

    With a number, the stem begins with the whole name: no name that comes before this one in order has it.
    """
    if n == 1:
        return name
    suffix = _suffix(name) or ".x"
    if n == 2:
        return f"{name}{suffix}"
    return f"{name}-{n}{'.x' if suffix.lower() in COMPRESSED else suffix}"


def _walk(top: str, keep: Any, wanted: Callable[[str], bool]) -> Iterator[Stored]:
    """Files under a directory, sorted as S3 sorts keys. `keep(name)` chooses files and directories, `wanted(path)` files.

    Raises DataError for a link that leads nowhere: its rows would be missing without a word.
    """
    try:
        with os.scandir(top) as entries:
            found = [(e.name + "/" if e.is_dir() else e.name, e) for e in entries if keep(e.name)]
    except OSError as e:
        raise DataError(f"can't list the directory: {e.strerror}", where=(("path", top),)) from e
    found.sort(key=lambda pair: pair[0])
    for name, entry in found:
        if name.endswith("/"):
            yield from _walk(entry.path, keep, wanted)
            continue
        if not wanted(entry.path):
            continue
        try:
            st = entry.stat()
        except FileNotFoundError:
            _refuse_lost_link(entry.path)
            continue  # removed since the directory was read
        yield storage.stored_file(entry.path, st)


def _refuse_lost_link(path: str) -> None:
    try:
        to = os.readlink(path)
    except OSError:  # no link, or none any more
        return
    hint = "mount or fetch what it leads to, or remove the link"
    raise DataError("a link in the input leads nowhere", where=(("link", path), ("it leads to", to)), hint=hint)


def _local_glob(pattern: str, passed_over: Callable[[str], bool]) -> Iterator[Stored]:
    """Files that match, level by level: only directories that can match are entered. passed_over: some of those files."""
    parts = Path(pattern).parts
    return _match_level(parts[0], parts[1:], passed_over)


def _match_level(folder: str, parts: tuple[str, ...], passed_over: Callable[[str], bool]) -> Iterator[Stored]:
    head, rest = parts[0], parts[1:]
    if "**" in head:
        pattern = _glob_pattern("/".join(parts))

        def wanted(path: str) -> bool:
            inside = os.path.relpath(path, folder).replace(os.sep, "/")
            return pattern.fullmatch(inside) is not None and not passed_over(path)

        yield from _walk(folder, re.compile(r"[^.]").match, wanted)
        return
    if not _MAGIC.search(head):
        yield from _match_entry(os.path.join(folder, head), rest, passed_over)
        return
    level = _glob_pattern(head)
    try:
        names = sorted(n for n in os.listdir(folder) if level.fullmatch(n))
    except OSError:
        return
    for name in names:
        yield from _match_entry(os.path.join(folder, name), rest, passed_over)


def _match_entry(path: str, rest: tuple[str, ...], passed_over: Callable[[str], bool]) -> Iterator[Stored]:
    """What an entry that matched one level leads to: a file at the last level, the levels below otherwise."""
    if rest:
        if os.path.isdir(path):
            yield from _match_level(path, rest, passed_over)
    elif not os.path.isdir(path) and not passed_over(path):
        found = storage.stat(path)
        if found is not None:
            yield found
        else:
            _refuse_lost_link(path)


def _glob_pattern(glob: str) -> re.Pattern[str]:
    """`*` and `?` stay within a level, `**/` is any number of levels, [abc] a set. A leading dot must be written out."""
    out = ""
    i = 0
    while i < len(glob):
        at_start = i == 0 or glob[i - 1] == "/"
        no_dot = r"(?!\.)" if at_start else ""
        if glob.startswith("**/", i):
            out += r"(?:(?!\.)[^/]+/)*"
            i += 3
        elif glob.startswith("**", i):
            out += no_dot + ".*"
            i += 2
        elif glob[i] == "*":
            out += no_dot + "[^/]*"
            i += 1
        elif glob[i] == "?":
            out += no_dot + "[^/]"
            i += 1
        elif glob[i] == "[" and (end := glob.find("]", i + 2)) > 0:
            inner = glob[i + 1 : end].replace("\\", "\\\\")
            out += f"[{'^' + inner[1:] if inner[0] == '!' else inner}]"
            i = end + 1
        else:
            out += re.escape(glob[i])
            i += 1
    return re.compile(out, re.DOTALL)


def _object_or_listed(entry: str, listed: Iterator[Stored]) -> tuple[Stored | None, Iterator[Stored]]:
    """(the object of just this name, None if there is none; what is listed under it). A name without a suffix is a prefix more
    often than not, and both are asked for at once.
    """
    if not _is_broad(entry):
        return storage.stat(entry), listed
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1, thread_name_prefix="headrace-list") as thread:
        first = thread.submit(next, listed, None)
        found = storage.stat(entry)
        if found is not None:
            first.exception()  # who may read an object need not be allowed to list
            return found, listed
        head = first.result()
    return None, iter(()) if head is None else chain((head,), listed)


def _list_s3(bucket: str, prefix: str) -> Iterator[Stored]:
    """Keys that begin with `prefix` (a plain string prefix), sorted, a page at a time."""
    folder, _, rest = prefix.rpartition("/")
    uri = f"{storage.S3_PREFIX}{bucket}/"
    # The client lists whole path segments, so the part after the last slash is matched here; keys before it are skipped.
    for meta in storage.list_keys(bucket, folder):
        path = meta["path"]
        if not rest or path.startswith(prefix):
            yield Stored(uri + path, meta["size"], storage.meta_version(meta))
