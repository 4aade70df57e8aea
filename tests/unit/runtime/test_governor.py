from __future__ import annotations

from pathlib import Path

import pytest

from headrace.runtime.governor import CALM_S, RARELY_S, TENSE_S, Governor, MachineRooms, Room, next_level
from headrace.runtime.machine import available_bytes, memory_cgroups, usable_memory_bytes

GB = 10**9


@pytest.mark.parametrize(
    ("level", "share", "after"),
    [
        (0, 0.84, 0),
        (0, 0.85, 1),
        (0, 0.93, 2),
        (1, 0.84, 1),  # falls only well below where it rose
        (1, 0.79, 0),
        (1, 0.93, 2),
        (2, 0.90, 2),
        (2, 0.88, 1),
        (2, 0.50, 0),
    ],
)
def test_levels(level: int, share: float, after: int) -> None:
    assert next_level(level, share) == after


def test_it_tells_a_change_once_and_looks_more_often_meanwhile() -> None:
    governor = Governor(16 * GB)
    assert governor.sample(lambda: 10 * GB, 100.0) == (10 * GB, False, "")
    assert 100.0 + CALM_S <= governor.due_s <= 100.0 + RARELY_S
    own, changed, note = governor.sample(lambda: 14_200_000_000, 101.0)
    assert (own, changed, governor.level) == (14_200_000_000, True, 1)
    assert note == "memory 14.2 of 16 GB: no new work until it falls"
    assert 101.0 + TENSE_S <= governor.due_s < 101.0 + CALM_S
    assert governor.sample(lambda: 14_300_000_000, 101.1) == (14_300_000_000, False, "")
    assert governor.sample(lambda: 15 * GB, 101.2)[2].startswith("memory 15.0 of 16 GB: one step at a time")
    assert governor.sample(lambda: 2 * GB, 101.3) == (2 * GB, True, "")
    assert governor.level == 0


def test_a_level_that_comes_and_goes_is_not_told_each_time() -> None:
    governor = Governor(100)
    used = [90, 10] * 40
    told = [governor.sample(lambda at=at: used[at], at)[2] for at in range(len(used))]
    assert [at for at, note in enumerate(told) if note] == [0, 60]


def test_the_tightest_room_counts() -> None:
    governor = Governor(rooms=lambda own: (Room(own, 100), Room(95, 100)))
    governor.sample(lambda: 1, 0.0)
    assert governor.level == 2


def test_small_rooms_are_told_in_megabytes() -> None:
    assert str(Room(90_000_000, 100_000_000)) == "90.0 of 100 MB"


def test_cgroups_of_version_2(tmp_path: Path) -> None:
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("1000000\n")
    (inner.parent / "memory.current").write_text("900000\n")
    (inner.parent / "memory.stat").write_text("anon 500000\nactive_file 100000\ninactive_file 250000\nshmem 50000\n")
    (group,) = memory_cgroups(str(tmp_path), "0::/job/step\n")
    assert (group.folder, group.limit(), group.used()) == (str(inner.parent), 1_000_000, 550_000)


def test_cgroups_of_version_1(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("2000\n")
    (folder / "memory.usage_in_bytes").write_text("1500\n")
    (folder / "memory.stat").write_text("total_active_file 100\ntotal_inactive_file 400\n")
    (group,) = memory_cgroups(str(tmp_path), "5:cpu,memory:/not/mounted/here\n0::/\n")
    assert (group.limit(), group.used()) == (2000, 1000)


def test_no_limit_is_no_group(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_cgroups(str(tmp_path), "4:memory:/\n0::/\n") == ()


def test_this_machine_can_be_measured() -> None:
    own = 1 << 20
    first, *_ = MachineRooms()(own)
    assert first.used_bytes == own
    assert 0 < first.share < 1
    assert available_bytes() > 0
    assert usable_memory_bytes() >= 256 << 20
