"""The manifest: written piece by piece, read piece by piece, and never trusted."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from headrace.connectors import run_store
from headrace.connectors.run_store import LocalRunStore
from headrace.connectors.sinks import manifest
from headrace.connectors.sinks.manifest import Outline, encode_manifest, names_in, outline, value_in
from headrace.connectors.sinks.parquet import ParquetSink
from headrace.core.receipts import FileKind, OutputFile

HEAD = {"run": "run-00001", "generation": 1, "rows": 7, "schema": "x: int64\ny: string"}
REPLACED = ["a.csv", 'ö/"b".csv']
FILES = (
    OutputFile("part-01-000000.parquet", 3, 100, "ab" * 32),
    OutputFile("_headrace/run-00001/quarantine/000000-0000.parquet", 1, 10, "cd" * 32, kind="quarantine"),
    OutputFile('odd "näme"\\.parquet', 4, 0),
)
SUMMARY = {"run": "other", "files": "no", "replaced": [], "tally": {"rows_in": 7}, "loss": float("inf"), "kinds": ("a", None)}


def written(files: Sequence[OutputFile] = FILES, kinds: Sequence[FileKind] = ("output", "quarantine")) -> bytes:
    return b"".join(encode_manifest(HEAD, REPLACED, files, kinds, SUMMARY))


def by_json(text: bytes) -> bytes:
    """How a manifest looks: a line for each key, and for each file."""
    lines: list[str] = []
    for key, value in json.loads(text).items():
        if key in ("files", "quarantine", "lineage") and value:
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f" {json.dumps(key)}: [\n  {items}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


@pytest.mark.parametrize("piece", [1, 1 << 18])
def test_what_is_written(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(manifest, "_PIECE_CHARS", piece)
    text = written()
    body = json.loads(text)
    assert text == by_json(text)
    assert list(body)[:3] == ["version", "headrace", "run"]
    assert list(body)[-3:] == ["files", "quarantine", "lineage"]
    assert {key: body[key] for key in HEAD} == HEAD
    assert list(body)[6:8] == ["replaced", "tally"]
    assert body["replaced"] == REPLACED
    assert (body["tally"], body["loss"], body["kinds"], body["lineage"]) == ({"rows_in": 7}, None, ["a", None], [])
    found = [(f["name"], f["rows"], f["bytes"], f["digest"]) for f in body["files"] + body["quarantine"]]
    assert found == [(f.name, f.rows, f.bytes, f.digest) for f in (FILES[0], FILES[2], FILES[1])]
    none = b"".join(encode_manifest(HEAD, (), (), (), {}))
    assert none == by_json(none)


def cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_what_is_read_piece_by_piece(size: int) -> None:
    text = written()
    assert outline(cut(text, size)) == Outline("run-00001", 1)
    assert list(names_in(cut(text, size), "files")) == [FILES[0].name, FILES[2].name]
    assert list(names_in(cut(text, size), "replaced")) == REPLACED
    assert list(names_in(cut(text, size), "schema")) == []
    assert value_in(cut(text, size), "tally") == {"rows_in": 7}
    assert value_in(cut(text, size), "files") is None
    assert value_in(cut(text, size), "nothing") is None


@pytest.mark.parametrize("value", [0, -1, 12345, 1.5, -1.5e-7, 2e300, "", "ä\n\U0001f600", None, True, {}, {"a": [1, {}]}])
@pytest.mark.parametrize("indent", [None, 2])
def test_any_value_is_read_wherever_it_is_cut(value: Any, indent: int | None) -> None:
    for body in ({"x": value}, {"a": [value, value], "b": [], "x": value, "z": 1}):
        for text in (json.dumps(body, indent=indent), json.dumps(body, ensure_ascii=False, indent=indent)):
            for size in (1, 2, 3, 5, 1000):
                assert value_in(cut(text.encode(), size), "x") == value


def test_names_that_leave_the_destination_are_left_out() -> None:
    names = ["a.csv", "../b", "/c", "_headrace/run-00000/plan.json", "d/./e", 7, None, {"rows": 1}, {"name": "f.csv"}, ["g"]]
    text = json.dumps({"files": names, "replaced": "a.csv", "run": ["x"], "generation": 0}).encode()
    assert list(names_in((text,), "files")) == ["a.csv", "f.csv"]
    assert list(names_in((text,), "replaced")) == []
    assert outline((text,)) == Outline(None, 0)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b"{",
        b'{"run": "x"',
        b'{"run": "x"} more',
        b'{"run": "x",}',
        b'{"run" "x"}',
        b'{"files": ["a", ]}',
        b'{"files": ["a" "b"]}',
        b'{"files": [',
        b"{7: 1}",
        b'{"run": 1.}',
        b'{"run": "\xff"}',
        b'{"run": ' + b"[" * 100_000,
    ],
)
@pytest.mark.parametrize("size", [2, 1 << 20])
def test_what_is_no_manifest_is_none(text: bytes, size: int) -> None:
    if size > 2 or len(text) < 100:
        assert outline(cut(text, size)) is None


def test_what_follows_a_value_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"run": "run-00007", "files": ['
        raise AssertionError("read too far")

    assert value_in(chunks(), "run") == "run-00007"
    monkeypatch.setattr(manifest, "_VALUE_CHARS", 1000)
    assert value_in(cut(b'{"x": "' + b"y" * 5000 + b'", "run": 1}', 100), "run") is None, "no value is so large"


class Made(Sequence[OutputFile]):
    """Files that exist while they are looked at."""

    def __init__(self, count: int, generation: int) -> None:
        self._count = count
        self._generation = generation

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        raise AssertionError("files are iterated")

    def __iter__(self) -> Iterator[OutputFile]:
        for i in range(self._count):
            yield OutputFile(
                f"part-{self._generation:02d}-{i:06d}.parquet",
                10,
                1000,
                f"{i:064x}",
                f"_headrace/r/staging/1/{i:06d}-0.parquet",
            )


@pytest.mark.parametrize("fresh", [False, True])
def test_the_end_of_a_run_holds_no_list_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    """Lists of them would take a kilobyte a file."""
    monkeypatch.setattr(run_store, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(manifest, "_PIECE_CHARS", 1 << 14)
    count = 5_000
    schema = pa.schema([("x", pa.int64())])
    run = f"run-{fresh:05d}"
    sink = ParquetSink(tmp_path, fresh=fresh).bind(run, 1, None)
    sink.finish((), {}, schema)  # what is imported and made once
    (tmp_path / "_manifest.json").unlink()
    if fresh:
        ParquetSink(tmp_path).bind("run-00000", 1, None).finish(Made(count, 0), {}, schema)
    published: list[int] = []
    monkeypatch.setattr(LocalRunStore, "publish", lambda self, files, replace: published.append(len(files)))
    tracemalloc.start()
    try:
        sink.finish(Made(count, int(fresh)), {}, schema)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    body = json.loads((tmp_path / "_manifest.json").read_bytes())
    assert (len(body["files"]), len(body["replaced"]), body["rows"]) == (count, count * fresh, 10 * count)
    assert sum(published) == count * fresh
    assert peak < 1_500_000, "a group of files, pieces of two manifests, and 50 bytes for each name that is replaced"
