"""Listing: paths, globs, names, refusals, and that it is lazy."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from headrace.connectors import listing as listing_module
from headrace.connectors import name_set
from headrace.connectors.listing import Listing, output_stem
from headrace.connectors.storage import Stored
from headrace.core.errors import DataError, InputChanged


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


def touch(folder: Path, *files: str) -> Path:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_stems_of_several_globs_never_clash(tmp_path: Path) -> None:
    folder = touch(tmp_path / "in", "a.jpg", "a.png", "b.jpg", "b.png", "c.png")
    found = names([f"{folder}/*.jpg", f"{folder}/*.png"])
    assert [output_stem(n) for n in found] == ["a", "b", "a.png", "b.png", "c"]
    inside = names([f"{tmp_path}/*/*.jpg", f"{folder}/*.png"])
    assert [output_stem(n) for n in inside] == ["in/a", "in/b", "in/a.png", "in/b.png", "in/c"]


@pytest.mark.parametrize(
    ("files", "stems"),
    [
        (("a", "a-b", "a.csv"), ["a", "a-b", "a.csv"]),
        (("a-4.csv", "a.csv", "a.csv.bz2", "a.csv.gz"), ["a-4", "a", "a.csv", "a.csv.gz-3"]),
        (("a.gz", "a.gz-3.csv", "a"), ["a", "a.gz-3", "a.gz-3.csv"]),
    ],
)
def test_stems_of_names_that_are_no_neighbours_never_clash(tmp_path: Path, files: tuple[str, ...], stems: list[str]) -> None:
    assert [output_stem(n) for n in names(f"{touch(tmp_path, *files)}/*")] == stems


def test_stems_of_any_files_never_clash(tmp_path: Path) -> None:
    random = Random(1)
    letters = ["a", "b", "-", ".", "-3", ".csv", ".gz", ".jpg"]
    for case in range(60):
        folder = tmp_path / str(case)
        drawn = {"".join(random.choices(letters, k=random.randint(1, 5))) for _ in range(60)}
        touch(folder / "sub", *(name for name in drawn if not name.startswith(".")))
        touch(folder, "a.gz", *(name for name in drawn if not name.startswith(".")))
        for paths in (f"{folder}/*", f"{folder}/**", [f"{folder}/sub/*", f"{folder}/*"], [f"{folder}/*.gz", f"{folder}/*/*"]):
            stems = [output_stem(n) for n in names(paths)]
            assert len(set(stems)) == len(stems), paths


def test_folders_apart_are_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{folder}/{i}.csv" for folder in "ab" for i in range(9)))
    monkeypatch.setattr(listing_module.GrowingNames, "add", None)
    assert len(names([tmp_path / "a", tmp_path / "b"])) == 18


def test_names_that_grow_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_set, "_LOOSE", 4)
    growing = name_set.GrowingNames()
    for i in range(100):
        assert str(i) not in growing
        growing.add(str(i))
        assert all(str(n) in growing for n in range(i + 1))


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


class Listed:
    """Stands for a remote listing: what it holds, how often it was begun, and what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.there = [Stored(f"s3://b/in/{i:03d}", 1, f'"{i}"', f"{i:03d}") for i in range(count)]
        self.begun = 0
        self.asked: list[int] = []
        self.broken_at: int | None = None
        monkeypatch.setattr(Listing, "objects", lambda _: self._objects())
        self.kept = Listing(("s3://b/in",), ()).kept()

    def _objects(self) -> Iterator[Stored]:
        self.begun += 1
        for i, o in enumerate(list(self.there)):
            if i == self.broken_at:
                raise DataError("the connection is gone")
            self.asked.append(i)
            yield o


def test_a_kept_listing_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Listed(monkeypatch, 5)
    assert listed.kept.first() == listed.there[0]
    assert listed.asked == [0], "no more is listed than is asked for"
    one, other = listed.kept.objects(), listed.kept.objects()
    assert [next(one), next(other), next(other)] == [listed.there[i] for i in (0, 0, 1)]
    assert [*one] == listed.there[1:]
    assert [*other] == listed.there[2:]
    before, listed.there = listed.there, listed.there[:1]
    assert [*listed.kept.objects()] == before
    assert listed.begun == 1
    assert listed.asked == [0, 1, 2, 3, 4]


def test_a_kept_listing_that_breaks_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Listed(monkeypatch, 5)
    listed.broken_at = 3
    early = listed.kept.objects()
    assert [*islice(early, 3)] == listed.there[:3]
    with pytest.raises(DataError, match="the connection is gone"):
        list(listed.kept.objects())
    listed.broken_at = None
    assert [*early] == listed.there[3:], "who was in the middle goes on"
    assert [*listed.kept.objects()] == listed.there


def test_a_long_listing_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_module, "MOST_KEPT", 3)
    listed = Listed(monkeypatch, 8)
    slow = listed.kept.objects()
    assert [*islice(slow, 2)] == listed.there[:2]
    assert [*listed.kept.objects()] == listed.there
    assert listed.begun == 1, "the first to go beyond what is kept goes on with the same listing"
    assert [*listed.kept.objects()] == listed.there
    assert listed.begun == 2
    listed.there = listed.there[1:]
    with pytest.raises(InputChanged):
        list(slow)


def test_a_kept_listing_travels_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Listed(monkeypatch, 2)
    assert list(listed.kept.objects()) == listed.there
    there = pickle.loads(pickle.dumps(listed.kept))
    assert there == listed.kept
    assert list(there.objects()) == listed.there
    assert listed.begun == 2


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")
    (tmp_path / "notes.txt").symlink_to(tmp_path / "gone.txt")  # no input
    assert [Path(o.uri).name for o in Listing.of(tmp_path, (".parquet",)).objects()] == ["a.parquet"]
    (tmp_path / "b.parquet").symlink_to(tmp_path / "gone.parquet")
    for path in (tmp_path, f"{tmp_path}/*.parquet", f"{tmp_path}/**/*.parquet"):
        with pytest.raises(DataError, match="leads nowhere") as caught:
            list(Listing.of(path, (".parquet",)).objects())
        assert "b.parquet" in str(caught.value)


def test_special_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n")
    os.mkfifo(tmp_path / "notes")  # no input
    assert [Path(o.uri).name for o in Listing.of(tmp_path, (".csv",)).objects()] == ["a.csv"]
    os.mkfifo(tmp_path / "b.csv")
    for path in (tmp_path / "b.csv", tmp_path, f"{tmp_path}/*.csv", f"{tmp_path}/**/*.csv"):
        with pytest.raises(DataError, match="a named pipe can't be read") as caught:
            list(Listing.of(path, (".csv",)).objects())
        assert "b.csv" in str(caught.value)
    with pytest.raises(DataError, match="a device can't be read"):
        list(Listing.of("/dev/null", (".csv",)).objects())


def test_special_files_that_a_pattern_merely_matches_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n")
    os.mkfifo(tmp_path / "notes")
    for pattern in ("*", "**", "**/*"):
        assert [Path(o.uri).name for o in Listing.of(tmp_path / pattern, (".csv",)).objects()] == ["a.csv"]
    for pattern in (f"{tmp_path.parent}/{tmp_path.name[:-1]}?/notes", f"{tmp_path}/**/notes"):
        with pytest.raises(DataError, match="a named pipe can't be read"):
            list(Listing.of(pattern, (".csv",)).objects())


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "\u00e4.csv").write_text("x")
    assert names(tmp_path) == ["\u00e4.csv"]
    with open(os.fsencode(tmp_path) + b"/\xe4.csv", "w") as f:
        f.write("x")
    with pytest.raises(DataError, match="not UTF-8") as caught:
        names(tmp_path)
    assert r"\xe4.csv" in str(caught.value)
    assert "rename" in str(caught.value)
