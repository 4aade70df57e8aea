"""Models' files: local ones, and copies of those on S3."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
import pytest

from headrace.connectors import artifacts, retries, storage
from headrace.connectors.artifacts import check_exists, identity, local_path
from headrace.core.errors import DataError, InputChanged, PlanError
from headrace.testing.s3 import Faults, S3Server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very/secret+key")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr(retries, "POLICY", retries.Policy(attempts=10, first_s=0.001, most_s=0.01))
    monkeypatch.setattr(retries, "budget", retries.Budget())
    with S3Server() as server:
        server.make_bucket("b")
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


def put(key: str, data: bytes) -> None:
    obstore.put(storage.s3_store("b"), key, data)


def test_local_paths_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a model.bin"
    path.write_bytes(b"1")
    assert local_path(str(path)) == str(path)
    assert local_path(path.as_uri()) == str(path)
    assert local_path(str(tmp_path)) == str(tmp_path)


def test_an_identity_is_of_the_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.write_bytes(b"same")
    assert identity(str(one)) == identity(two.as_uri())
    two.write_bytes(b"other")
    assert identity(str(one)) != identity(str(two))
    before = identity(str(tmp_path))
    one.write_bytes(b"new")
    assert identity(str(tmp_path)) != before


def test_what_is_not_there(tmp_path: Path, s3: S3Server) -> None:
    for uri in (str(tmp_path / "none"), "s3://b/none", "s3://no-bucket/none"):
        with pytest.raises(PlanError, match=r"M: .*no (file|object|such|bucket)") as refused:
            check_exists(uri, "M")
        assert refused.value.hint
        for ask in (local_path, identity):
            with pytest.raises(DataError):
                ask(uri)
    with pytest.raises(PlanError, match="not read from https://"):
        check_exists("https://example.com/model", "M")


def test_an_object_is_downloaded_once_and_again_when_it_changes(s3: S3Server, cache: Path) -> None:
    put("models/m.bin", b"one")
    first = local_path("s3://b/models/m.bin")
    assert (os.path.basename(first), Path(first).read_bytes()) == ("m.bin", b"one")
    before = s3.requests["GET"]
    assert local_path("s3://b/models/m.bin") == first
    assert s3.requests["GET"] == before
    told = identity("s3://b/models/m.bin")
    put("models/m.bin", b"two")
    second = local_path("s3://b/models/m.bin")
    assert (Path(first).read_bytes(), Path(second).read_bytes()) == (b"one", b"two")
    assert identity("s3://b/models/m.bin") != told
    check_exists("s3://b/models/m.bin", "M")


def test_a_prefix_is_a_folder(s3: S3Server) -> None:
    put("models/tree/config.json", b"{}")
    put("models/tree/weights/1.bin", b"w" * 1000)
    put("models/tree/empty", b"")
    put("models/treetop/other", b"not of it")
    folder = local_path("s3://b/models/tree")
    found = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    assert found == {"config.json": b"{}", "weights/1.bin": b"w" * 1000, "empty": b""}
    assert local_path("s3://b/models/tree/") == folder
    assert identity("s3://b/models/tree/").startswith("3 objects")
    check_exists("s3://b/models/tree", "M")
    told = identity("s3://b/models/tree")
    put("models/tree/empty", b"no more")
    assert identity("s3://b/models/tree") != told
    assert local_path("s3://b/models/tree") != folder


def test_large_objects_come_in_pieces(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WHOLE_S3_BYTES", 1000)
    monkeypatch.setattr(storage, "REQUEST_BYTES", 1000)
    monkeypatch.setattr(storage, "FOOTER_BYTES", 700)
    monkeypatch.setattr(artifacts, "DOWNLOAD_BYTES", 2500)
    data = bytes(i * i % 251 for i in range(10_123))
    put("large", data)
    assert Path(local_path("s3://b/large")).read_bytes() == data


def test_trouble_on_the_way_is_outlived(s3: S3Server) -> None:
    put("m", b"m" * 100)
    s3.faults = Faults(1, {"503": 0.3, "reset": 0.1})
    assert Path(local_path("s3://b/m")).read_bytes() == b"m" * 100


def test_one_of_several_at_once_downloads(s3: S3Server, cache: Path) -> None:
    put("m", b"m" * 100)
    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(local_path, ["s3://b/m"] * 16))
    assert len(paths) == 1
    assert s3.requests["GET"] == 1
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1


def test_what_a_dead_process_left_is_removed(s3: S3Server, cache: Path) -> None:
    put("m", b"whole")
    key = os.path.basename(os.path.dirname(local_path("s3://b/m")))
    (cache / key).rename(cache / f"{key}.dead.part")
    (cache / f"{key}.dead.part" / "m").write_bytes(b"ha")
    other = cache / "another.alive.part"
    other.mkdir()
    assert Path(local_path("s3://b/m")).read_bytes() == b"whole"
    assert sorted(p.name for p in cache.iterdir() if p.is_dir()) == sorted([key, other.name])


def test_a_failed_download_leaves_nothing(s3: S3Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put("m", b"planned")
    listed = storage.stat("s3://b/m")
    monkeypatch.setattr(storage, "stat", lambda uri: listed)
    put("m", b"changed since")
    with pytest.raises(InputChanged):
        local_path("s3://b/m")
    assert [p.name for p in cache.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("name", ["../up", "a/../../up", "a//b", ".", "a\\b"])
def test_names_that_lead_out_of_the_folder_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="no path within a folder"):
        artifacts._inside("/top", name)
