"""Drivers of one run, several at once, dying, pausing and losing answers, over a disk that forgets: all by seed.

The production `commit` package, ledger and committer do the work; workers are a model of their own, each attempt of which makes
bytes and metrics that no other makes, so that any mix-up shows. What readers may rely on is checked by `Checker`, which
reads the log with nothing but `json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.simulation.commit.disk import Disk, Handle

from headrace.commit.protocol import Flush, Tick
from headrace.commit.records import Finished
from headrace.core.errors import HeadraceError
from headrace.core.receipts import OutputFile, Receipt, Tally
from headrace.core.splits import Fragment, Split
from headrace.runtime import ledger
from headrace.runtime.committer import Committer
from headrace.runtime.ledger import Identity, OpenedRun, open_run
from headrace.scheduler.messages import Settle

STEPS = 160  # of troubled time in a world; then faults end, and it has to come to its end
CALM_STEPS = 4000  # what the undisturbed end may take
NESTED = 3  # drivers interrupted within each other's calls
FAULTS = (("lost", 0.02), ("failed", 0.04), ("full", 0.044), ("bad", 0.05))  # cumulative
PLAN = {"read": "simulated"}


class Killed(BaseException):
    """The driver's process is gone, wherever it was."""


class Sum:
    """A metric: the sum of whole numbers."""

    columns = ()

    def zero(self) -> Any:
        return {"sum": 0}

    def update(self, state: Any, batch: Any) -> Any:
        return state

    def merge(self, a: Any, b: Any) -> Any:
        a["sum"] += b["sum"]
        return a

    def result(self, state: Any) -> int:
        return state["sum"]


@dataclass(frozen=True)
class Made:
    """What an attempt made."""

    split: int
    data: bytes
    rows: int
    metric: int


def differences(old: Any, new: Any) -> list[str]:
    return [] if old == new else [f"{old} -> {new}"]


class World:
    """All drivers, and the disk. run(): faults for a while, then an undisturbed driver, then the zombies."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.seed = seed
        self.disk = Disk(self.rng)
        self.count = self.rng.choice((1, 2, 3, 4, 6))
        self.splits = tuple(Split(i, (Fragment(f"in/{i}", 10, "v1"),), 10) for i in range(self.count))
        self.made: dict[str, Made] = {}
        self.sessions: list[Session] = []
        self.now = 0.0
        self.calm = False
        self.depth = 0
        self.done = self.fresh = False
        self.checker = self._make_checker()
        self.story: list[str] = []

    def _make_checker(self) -> Checker:
        return Checker(self)

    def _make_session(self, number: int, fresh: bool, take_over: bool) -> Session:
        return Session(self, number, fresh, take_over)

    def run(self) -> None:
        """Raises AssertionError for whatever must not be."""
        self.fresh = self.rng.random() < 0.3
        if self.fresh:  # over a finished run
            self.calm = True
            self._end(fresh=False)
            self.calm = self.done = False
        for _ in range(STEPS):
            if self.done:
                break
            self._turn()
        self.calm = True
        self._end(fresh=self.fresh and not self.done)
        self._wake_zombies()

    # ---------------------------------------------------------------- what happens

    def _turn(self) -> None:
        self.now += self.rng.choice((0.0, 0.1, 0.6, 2.0))
        able = [s for s in self.sessions if s.able]
        if not able or (len(able) < 3 and self.rng.random() < 0.04):
            self._begin(fresh=self.fresh, take_over=self.rng.random() < 0.5)
            return
        roll = self.rng.random()
        if roll < 0.02:
            self._power_cut()
        elif roll < 0.05:
            self.rng.choice(able).asleep = self.rng.randint(5, 60)
        elif roll < 0.06:
            self._late_worker()
        else:
            self.rng.choice(able).step()
        for session in self.sessions:
            session.asleep = max(0, session.asleep - 1)
        self.checker.check()

    def _begin(self, *, fresh: bool, take_over: bool) -> Session:
        session = self._make_session(len(self.sessions), fresh, take_over)
        self.sessions.append(session)
        return session

    def _end(self, *, fresh: bool) -> None:
        """One undisturbed driver. `fresh` as the user would say it again."""
        if fresh and not self._has_begun_fresh():
            session = self._begin(fresh=True, take_over=True)
        else:
            session = self._begin(fresh=False, take_over=True)
        for _ in range(CALM_STEPS):
            if not session.able:
                break
            self.now += 0.3
            session.step()
            self.checker.check()
        assert session.succeeded, f"the undisturbed driver did not come to its end: {session.error}"
        self.checker.check_end(session)

    def _has_begun_fresh(self) -> bool:
        return any(name.endswith("/plan.json") and "run-00000" not in name for name in self.disk.live)

    def _wake_zombies(self) -> None:
        """Those that slept through it all go on, and change nothing."""
        for session in self.sessions:
            session.asleep = 0
            for _ in range(60):
                if session.able:
                    self.now += 0.5
                    session.step()
        self.checker.check()
        self.checker.check_end(self.sessions[-1])

    def _power_cut(self) -> None:
        for session in self.sessions:
            session.kill("power cut")
        self.disk.power_cut()

    def _late_worker(self) -> None:
        """A worker whose driver is dead, or thinks that the worker is, still writes a file."""
        session = self.rng.choice(self.sessions)
        if session.opened is not None and not session.opened.finished:
            session.stage(self.rng.randrange(self.count), 9)

    # ---------------------------------------------------------------- within a driver's call to the store

    def interrupt(self, session: Session) -> None:
        if not session.alive:
            raise Killed
        if self.calm:
            return
        roll = self.rng.random()
        if roll < 0.004:
            session.kill("killed")
        elif roll < 0.006:
            self._power_cut()
        elif roll < 0.05 and self.depth < NESTED and not session.finishing:
            others = [s for s in self.sessions if s.able and not s.inside]
            if others:
                self.depth += 1
                other = self.rng.choice(others)
                for _ in range(self.rng.choice((1, 3, 20))):
                    if other.able:
                        other.step()
                self.depth -= 1
        if not session.alive:
            raise Killed

    def fault(self, operation: str) -> str:
        if self.calm:
            return ""
        roll = self.rng.random()
        fault = next((name for name, below in FAULTS if roll < below), "")
        return "" if fault == "bad" and operation != "sync" else fault


class Session:
    """One driver's process."""

    def __init__(self, world: World, number: int, fresh: bool, take_over: bool) -> None:
        self.world = world
        self.rng = world.rng
        self.number = number
        self.fresh = fresh
        self.take_over = take_over
        self.alive = True
        self.inside = False
        self.asleep = 0
        self.finishing = False
        self.succeeded = False
        self.error: HeadraceError | None = None
        self.opened: OpenedRun | None = None
        self.committer: Committer | None = None
        self.attempts: dict[int, int] = {}
        self.staged = 0
        self.listed = 0
        self.todo: list[Split] = []
        self.done_last: Settle | None = None
        self.store = Handle(world.disk, lambda _op: world.interrupt(self), world.fault)
        host = world.rng.choice(("here", "there"))
        self.identity = Identity(host, number, float(number), f"nonce-{number}")

    @property
    def able(self) -> bool:
        return self.alive and not self.asleep and not self.succeeded and not self.inside

    def kill(self, why: str) -> None:
        if self.alive:
            self.alive = False
            self.world.story.append(f"{self.number} {why}")

    def step(self) -> None:
        self.inside = True
        try:
            self._step()
        except Killed:
            pass
        except HeadraceError as error:
            self.error = error
            self.kill(f"stopped: {error.message}")
        finally:
            self.inside = False

    def _step(self) -> None:
        if self.opened is None:
            self._open()
        elif self.opened.finished:
            self._finish_destination()
        else:
            self._work(self.committer, self.opened)

    def _open(self) -> None:
        self.opened = open_run(
            self.store,
            PLAN,
            fresh=self.fresh,
            take_over=self.take_over,
            identity=self.identity,
            differences=differences,
            sleep=self._sleep,
            now=lambda: self.world.now,
            alive=lambda pid, _started: self.world.sessions[pid].alive,
        )
        self.world.story.append(f"{self.number} opened {self.opened.run} epoch {self.opened.epoch}")
        self.committer = self._make_committer(self.opened)

    def _make_committer(self, opened: OpenedRun) -> Committer:
        return Committer({"sum": Sum()}, opened)

    def _sleep(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.interrupt(self)

    # ---------------------------------------------------------------- at work

    def _work(self, committer: Any, opened: OpenedRun) -> None:
        loop = committer._loop
        while committer._inbox:
            loop.tell(committer._inbox.popleft(), self.world.now)
        if loop.error is not None:
            raise loop.error
        if loop.condemned:
            committer._raise_trouble(loop)
        roll = self.rng.random()
        if loop.busy and roll < 0.5:
            loop.tell(loop.step(), self.world.now)
        elif self.listed <= self.world.count and roll < 0.6:
            self._list(committer)
        elif self.todo and roll < 0.9:
            self._settle(committer, self.todo.pop(self.rng.randrange(len(self.todo))))
        elif roll < 0.92 and self.done_last is not None:
            committer.settle(self.done_last)  # a second answer for the same split
        elif roll < 0.94:
            ledger.write_heartbeat(self.store, opened.run, opened.epoch, self.identity, self.world.now)
        elif not self.todo and self.listed > self.world.count:
            self._finish(committer, opened)
        else:
            loop.tell(Tick(), self.world.now)

    def _list(self, committer: Any) -> None:
        count = self.rng.randint(1, 3)
        found = self.world.splits[self.listed : self.listed + count]
        done = len(found) < count
        listed = committer.admit(found, done, iter(()))
        self.listed += len(found) + done
        self.todo.extend(listed.splits)

    def stage(self, index: int, attempt: int) -> tuple[OutputFile, Made]:
        opened = self.opened
        assert opened is not None
        self.staged += 1
        text = f"{self.number}:{index}:{attempt}:{self.staged}:{opened.run}".encode()
        made = Made(index, text, self.rng.randint(1, 9), self.rng.randint(1, 10**9))
        digest = hashlib.sha256(text).hexdigest()
        self.world.made[digest] = made
        name = f"_headrace/{opened.run}/staging/{opened.epoch}/{index:06d}-{attempt}-{self.staged}.bin"
        self.world.disk.put(name, text, durable=False)
        generation = int(opened.run[4:])
        return OutputFile(f"part-{generation:02d}-{index:06d}.bin", made.rows, len(text), digest, name), made

    def _settle(self, committer: Any, split: Split) -> None:
        attempt = 0
        while self.rng.random() < 0.3 and attempt < 3:  # attempts that tell of metrics and come to nothing
            _, lost = self.stage(split.index, attempt)
            committer.add(split.index, attempt, {"sum": {"sum": lost.metric}})
            attempt += 1
            committer.retry(split.index, attempt)
        file, made = self.stage(split.index, attempt)
        committer.add(split.index, attempt, {"sum": {"sum": made.metric}})
        receipt = Receipt(split.index, split.id, attempt, (file,), made.rows)
        self.done_last = Settle(split, attempt, receipt, Tally(rows_in=made.rows, written=made.rows))
        committer.settle(self.done_last)

    # ---------------------------------------------------------------- the end

    def _finish(self, committer: Any, opened: OpenedRun) -> None:
        """As Committer.flush, finish and the sink do, step by step."""
        self._flush(committer)
        self._note_finished(committer)
        self._flush(committer)
        opened.finished = True

    def _flush(self, committer: Any) -> None:
        loop = committer._loop
        committer._inbox.append(Flush())
        for _ in range(10_000):
            while committer._inbox:
                loop.tell(committer._inbox.popleft(), self.world.now)
            if loop.error is not None or loop.condemned:
                committer._raise_trouble(loop)
            if loop.protocol.clean:
                committer.tally, committer.splits = loop.protocol.state.tally, len(loop.protocol.state.settled)
                return
            if loop.busy:
                loop.tell(loop.step(), self.world.now)
            else:
                self.world.now += 1.0
                loop.tell(Tick(), self.world.now)
        raise AssertionError("flush does not come to its end")

    def _note_finished(self, committer: Any) -> None:
        committer._note(Finished({"tally": committer.tally.written, "metrics": committer.results()}))

    def _finish_destination(self) -> None:
        """What a sink's `finish` does."""
        self.finishing = True  # drivers die here, but are not paused: see ledger.check_latest
        store, opened, committer = self.store, self.opened, self.committer
        assert opened is not None
        assert committer is not None
        files = list(committer.files)
        if not opened.complete:
            for _ in range(4):
                try:
                    self._show(store, opened, committer, files)
                    break
                except HeadraceError:
                    self.world.now += 1.0
            else:
                self._show(store, opened, committer, files)
        self.world.done = self.succeeded = True
        self.world.story.append(f"{self.number} done")

    def _show(self, store: Handle, opened: OpenedRun, committer: Committer, files: list[OutputFile]) -> None:
        ledger.check_latest(opened)
        if opened.holds:
            store.remove("_SUCCESS")
            store.publish(files)
        manifest = {
            "run": opened.run,
            "files": [[f.name, f.digest, f.rows] for f in files],
            "rows": committer.tally.written,
            "splits": committer.splits,
            "metrics": committer.results(),
        }
        store.write("_manifest.json", json.dumps(manifest).encode())
        store.write("_SUCCESS", b"")
        for name in list(store.names("")):
            if name.startswith("part-") and int(name[5:7]) < int(opened.run[4:]):
                store.remove(name)
        self.world.disk.sync_folder()
        store.remove(f"_headrace/{opened.run}/staging")
        ledger.mark_complete(opened)


class Checker:
    """What must be true of a destination at any time, and at the end."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._version = -1
        self._parsed: dict[str, tuple[Any, dict[str, Any]]] = {}

    def check(self) -> None:
        disk = self.world.disk
        if disk.version == self._version:
            return
        self._version = disk.version
        runs: dict[str, list[str]] = {}
        visible: dict[str, bytes] = {}
        for name, inode in disk.live.items():
            if name.startswith("part-") or "/quarantine/" in name:
                visible[name] = inode.data
            elif "/log/" in name:
                runs.setdefault(name.split("/")[1], []).append(name)
        shown: dict[str, str] = {}
        for run in sorted(runs):
            settled, finished = self._log(run, sorted(runs[run]))
            self._check_run(run, settled, finished, visible)
            shown.update({f["name"]: f["digest"] for record in settled.values() for f in record["files"]})
        for name, data in visible.items():
            assert name in shown, f"{name} is visible, and no log names it"
            assert hashlib.sha256(data).hexdigest() == shown[name], f"{name} is not what the log says: {data!r}"

    def _log(self, run: str, names: list[str]) -> tuple[dict[int, Any], bool]:
        settled: dict[int, Any] = {}
        epoch, writer, finished = 0, "", False
        for index, name in enumerate(names):
            assert name.endswith(f"{index:020d}.json"), f"the log of {run} has a hole before {name}"
            segment = self._segment(name)
            first = segment["records"][0]
            if first["kind"] == "claim":
                assert first["epoch"] == epoch + 1, f"{name}: epoch {first['epoch']} after {epoch}"
                epoch, writer = first["epoch"], first["nonce"]
            assert (segment["epoch"], segment["nonce"]) == (epoch, writer), f"{name} was written under another's claim"
            assert not finished, f"{name} comes after the end"
            metric = 0
            for record in segment["records"]:
                finished |= record["kind"] == "finished"
                if record["kind"] == "settled":
                    assert record["split"] not in settled, f"split {record['split']} is settled twice in {run}"
                    settled[record["split"]] = record
                    self.check_record(record, len(settled))
                    metric += self.world.made[record["files"][0]["digest"]].metric
            told = segment.get("metrics", {"sum": {"sum": 0}})["sum"]["sum"]
            assert told == metric, f"{name}: its metrics are not those of its splits"
        return settled, finished

    def check_record(self, record: dict[str, Any], nth: int) -> None:
        """What else must be true of a settled split, the nth in its log."""

    @property
    def wanted(self) -> list[int]:
        """The splits that must be settled in the end."""
        return list(range(self.world.count))

    def _segment(self, name: str) -> dict[str, Any]:
        inode = self.world.disk.live[name]
        known = self._parsed.get(name)
        if known is None or known[0] is not inode:
            if known is not None:
                raise AssertionError(f"{name} was written over")
            known = self._parsed[name] = (inode, json.loads(inode.data))
        return known[1]

    def _check_run(self, run: str, settled: dict[int, Any], finished: bool, visible: dict[str, bytes]) -> None:
        live = self.world.disk.live
        plan = json.loads(live[f"_headrace/{run}/plan.json"].data)
        replaced = f"_headrace/run-{int(run[4:]) + 1:05d}/plan.json" in live
        for record in settled.values():
            for f in record["files"]:
                held = live.get(f["staged"])
                data = visible.get(f["name"], held.data if held is not None else None)
                if not replaced:
                    assert data is not None, f"{f['name']} is settled, and its bytes are gone"
                    assert hashlib.sha256(data).hexdigest() == f["digest"], f"{f['name']} is settled, and its bytes are torn"
                    assert not finished or plan["holds"] or f["name"] in visible, f"finished, and {f['name']} is not visible"
                if plan["holds"] and not finished:
                    assert f["name"] not in visible, f"{f['name']} is to be held until the run is finished"
        if plan["holds"] and not finished and run == "run-00001":
            assert "_SUCCESS" in live, "the earlier output was taken away before the new one is complete"

    def check_end(self, session: Session) -> None:
        world, live = self.world, self.world.disk.live
        assert "_SUCCESS" in live
        manifest = json.loads(live["_manifest.json"].data)
        aside = f"_headrace/{manifest['run']}/quarantine/"
        visible = {name: inode.data for name, inode in live.items() if name.startswith(("part-", aside))}
        names = [name for name, _, _ in manifest["files"]]
        assert sorted(names) == sorted(visible), f"the manifest says {names}, and there is {sorted(visible)}"
        digests = [digest for _, digest, _ in manifest["files"]]
        assert digests == [hashlib.sha256(visible[name]).hexdigest() for name in names]
        made = [world.made[digest] for name, digest, _ in manifest["files"] if name.startswith("part-")]
        assert [m.split for m in made] == self.wanted, "not each split once"
        assert manifest["rows"] == sum(m.rows for m in made), "the tally is not that of the published files"
        assert manifest["splits"] == len(self.wanted)
        assert manifest["metrics"] == {"sum": sum(m.metric for m in made)}, "the metrics are not those of the published files"


def run_seed(seed: int, prepare: Callable[[World], None] | None = None) -> World:
    """A world from its seed, to its end; the error, if any, says the seed and what led to it."""
    return run_world(World(seed), prepare)


def run_world(world: World, prepare: Callable[[World], None] | None = None) -> World:
    if prepare is not None:
        prepare(world)
    try:
        world.run()
    except AssertionError as problem:
        raise AssertionError(f"seed {world.seed}: {problem}\n" + "\n".join(world.story[-30:])) from problem
    return world
