"""What tests of the ledger and the committer share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.core.receipts import Receipt, Tally
from headrace.core.splits import Fragment, Split
from headrace.metrics.counts import Count
from headrace.runtime.committer import Committer
from headrace.runtime.ledger import Identity, OpenedRun, open_run
from headrace.scheduler.messages import Settle
from headrace.testing.memory_store import MemoryRunStore

PLAN = {"model": "a"}
ME = Identity("here", 1, 1.0, "me")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]


def opened(store: MemoryRunStore, plan: Mapping[str, Any] = PLAN, **more: Any) -> OpenedRun:
    given: dict[str, Any] = {
        "fresh": False,
        "take_over": False,
        "identity": ME,
        "differences": differences,
        "sleep": lambda s: None,
        "now": lambda: 0.0,
        "alive": lambda pid, started: False,
    }
    return open_run(store, plan, **{**given, **more})


def splits(count: int, version: str = "v") -> tuple[Split, ...]:
    return tuple(Split(i, (Fragment(f"s3://key:secret@bucket/in/{i}.csv?sig=secret", 10, version),), 10) for i in range(count))


def settle(store: MemoryRunStore, run: OpenedRun, committer: Committer, split: Split, *, attempt: int = 0) -> None:
    """As the driver does when a split of 5 rows is done."""
    name = f"_headrace/{run.run}/staging/{run.epoch}/{split.index:06d}-{attempt}.bin"
    generation = int(run.run[4:])
    final = f"part-{generation:02d}-{split.index:06d}.bin"
    file = store.stage(name, f"{run.run} {run.epoch} {split.index}".encode(), final, rows=5)
    committer.add(split.index, attempt, {"rows": {"rows": 5}})
    committer.settle(Settle(split, attempt, Receipt(split.index, split.id, attempt, (file,), 5), Tally(rows_in=5, written=5)))


def committer(run: OpenedRun | None) -> Committer:
    return Committer({"rows": Count()}, run)


def work(
    store: MemoryRunStore, run: OpenedRun, count: int, *, of: int = 4, finish: bool = False, released: bool = True
) -> None:
    """A session that settles up to `count` more of `of` splits."""
    c = committer(run)
    errors: list[Exception] = []
    c.start(errors.append)
    try:
        listed = c.admit(splits(of), True)
        for split in listed.splits[:count]:
            settle(store, run, c, split)
        c.flush()
        if finish:
            c.finish({"rows": c.tally.written})
    finally:
        c.close(released=released)
    assert not errors
