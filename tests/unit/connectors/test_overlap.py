"""Runs and their destinations: input is never overwritten or read back, and what a killed run left is removed."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import headrace as hr
from headrace.connectors.listing import Listing
from headrace.connectors.sinks import claims


def _fill(folder: Path) -> None:
    folder.mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.table({"id": range(10)}), folder / f"{name}.parquet")


def test_per_input_output_never_replaces_its_input(tmp_path: Path) -> None:
    _fill(tmp_path / "in")
    (tmp_path / "link").symlink_to("in")
    for destination in ("in", "link"):
        with pytest.raises(hr.DestinationError, match="replace its own input"):
            hr.read_parquet(tmp_path / "in/a.parquet").limit(3).write_parquet(
                str(tmp_path / destination), outputs="per_input", progress="quiet"
            )
        assert pq.read_table(tmp_path / "in/a.parquet").num_rows == 10


def test_per_input_outputs_of_several_patterns_never_replace_each_other(tmp_path: Path) -> None:
    for i, name in enumerate(("a.parquet", "a.pq", "b.parquet", "b.pq")):
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(pa.table({"id": [i]}), tmp_path / "in" / name)
    for _ in range(2):
        run = hr.read_parquet([tmp_path / "in/*.parquet", tmp_path / "in/*.pq"]).write_parquet(
            str(tmp_path / "out"), outputs="per_input", fresh=True, progress="quiet", engine="inline"
        )
        outputs = {f.name: pq.read_table(f)["id"].to_pylist() for f in (tmp_path / "out").glob("*.parquet")}
        assert outputs == {"a.parquet": [0], "b.parquet": [2], "a.pq.parquet": [1], "b.pq.parquet": [3]}
        assert run.rows == 4


@pytest.mark.parametrize(("read", "write"), [("in", "in/out"), ("in", "in"), ("in/*.parquet", "in")])
def test_destination_inside_the_input_is_refused(tmp_path: Path, read: str, write: str) -> None:
    _fill(tmp_path / "in")
    with pytest.raises(hr.PlanError, match="inside the input"):
        hr.read_parquet(tmp_path / read).write_parquet(str(tmp_path / write), progress="quiet")
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == ["a.parquet", "b.parquet"]


def test_destination_beside_what_is_read_is_fine(tmp_path: Path) -> None:
    _fill(tmp_path / "in")
    for _ in range(2):
        run = hr.read_parquet(tmp_path / "in/*.parquet").write_parquet(str(tmp_path / "in/out"), fresh=True, progress="quiet")
        assert run.rows == 20


def test_covers_s3() -> None:
    parquet = (".parquet",)
    assert Listing.of("s3://b/in/", parquet).covers("s3://b/in/out/part.parquet")
    assert Listing.of("s3://b/in/*", parquet).covers("s3://b/in/part.parquet")
    assert not Listing.of("s3://b/in/*", parquet).covers("s3://b/in/out/part.parquet")
    assert not Listing.of("s3://b/in", parquet).covers("s3://b/input/part.parquet")
    assert not Listing.of("s3://b/in", (".jpg",)).covers("s3://b/in/part.parquet")
    assert not Listing.of("s3://b/in", parquet).covers("s3://b/in/_out/part.parquet")


def test_scratch_of_a_process_that_is_gone_is_removed_and_that_of_a_live_one_kept(tmp_path: Path) -> None:
    """Files on their way to S3 lie in the machine's directory for temporary files."""

    class Owner:
        pass

    dead, strange = tmp_path / "headrace-staging-0123456789ab", tmp_path / "mine"
    for folder in (dead, strange):
        folder.mkdir(parents=True)
        (folder / "000000-1.parquet").write_bytes(b"half")
    live, owner = tmp_path / "headrace-staging-ba9876543210", Owner()
    claims.claim(str(live), owner)
    claims.remove_stale(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [live.name, "mine"]
    claims.release(str(live))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_scratch_that_was_taken_for_stale_before_it_was_held_is_made_again(tmp_path: Path) -> None:
    """As by a run that begins at the same time."""

    class Owner:
        pass

    live, owner = tmp_path / "headrace-staging-ba9876543210", Owner()
    live.mkdir()
    other = os.open(live, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    claiming = threading.Thread(target=claims.claim, args=(str(live), owner))
    claiming.start()
    claiming.join(0.1)
    assert claiming.is_alive()
    live.rmdir()
    os.close(other)
    claiming.join()
    claims.remove_stale(str(tmp_path))
    assert live.is_dir()
    claims.release(str(live))
