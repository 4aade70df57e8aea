"""Listing: paths, globs, names, refusals, and that it is lazy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.connectors.listing import Listing, output_stem
from headrace.core.errors import DataError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.csv", "a.csv", "sub/c.csv", "sub/deep/d.csv.gz", "_hid/e.csv", ".f.csv", "notes.txt", "a.d/x.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path


def names(paths, compressed: bool = True) -> list[str]:
    return [o.name for o in Listing.of(paths, (".csv",), compressed=compressed).objects()]


def test_directory_is_sorted_recursive_and_filtered(tree: Path) -> None:
    assert names(tree) == ["a.csv", "a.d/x.csv", "b.csv", "sub/c.csv", "sub/deep/d.csv.gz"]
    assert names(tree, compressed=False) == ["a.csv", "a.d/x.csv", "b.csv", "sub/c.csv"]


def test_file_url_and_single_file(tree: Path) -> None:
    assert names(f"file://{tree}/a.csv") == ["a.csv"]
    assert names(str(tree / "notes.txt")) == ["notes.txt"]


def test_globs(tree: Path) -> None:
    assert names(f"{tree}/*.csv") == ["a.csv", "b.csv"]
    assert names(f"{tree}/?.csv") == ["a.csv", "b.csv"]
    assert names(f"{tree}/[!a].csv") == ["b.csv"]
    assert names(f"{tree}/*/*.csv") == ["_hid/e.csv", "a.d/x.csv", "sub/c.csv"]
    assert names(f"{tree}/**/*.csv") == ["_hid/e.csv", "a.csv", "a.d/x.csv", "b.csv", "sub/c.csv"]
    assert names(f"{tree}/sub/**") == ["c.csv", "deep/d.csv.gz"]


def test_lists_keep_their_order_and_unique_names(tree: Path) -> None:
    assert names([tree / "b.csv", tree / "a.csv"]) == ["b.csv", "a.csv"]
    assert names([tree / "b.csv", tree / "sub" / "c.csv"]) == ["b.csv", "sub/c.csv"]
    twice = names([tree / "a.csv", tree / "a.csv", tree / "a.csv"])
    assert len({output_stem(n) for n in twice}) == 3
    overlap = names([tree / "sub", f"{tree}/sub/*.csv"])
    assert len({output_stem(n) for n in overlap}) == 3


def test_stems_never_clash(tmp_path: Path) -> None:
    for name in ("a.csv", "a.csv.gz", "a.d/b.csv", "a.e.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    stems = [output_stem(n) for n in names(tmp_path)]
    assert len(set(stems)) == 4
    assert "a" in stems


def test_lazy(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []
    scandir = os.scandir

    def spy(path):
        entered.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", spy)
    listing = Listing.of(tree, (".csv",)).objects()
    assert next(listing).name == "a.csv"
    assert entered == [str(tree)]
    listing.close()


@pytest.mark.parametrize(
    ("path", "text"),
    [("missing", "no such file"), ("empty", "nothing to read"), ("*.zip", "no object matches"), ("gone/*.csv", "no object")],
)
def test_refusals(tmp_path: Path, path: str, text: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=text) as caught:
        names(tmp_path / path)
    assert caught.value.hint


def test_unknown_scheme_and_empty_list() -> None:
    with pytest.raises(DataError, match="unknown scheme"):
        names("gopher://x/y")
    with pytest.raises(DataError, match="empty"):
        names([])
