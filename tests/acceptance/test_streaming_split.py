"""streaming_split as training code uses it: threads, processes that are spawned, forked or started by hand, torchrun."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headrace as hr

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Unix sockets")
SRC = Path(__file__).parents[2] / "src"

CONSUMER = """
import pickle, sys
split = pickle.loads(bytes.fromhex(sys.argv[1]))
for line in sys.stdin:  # an epoch of at most so many batches
    most = int(line)
    try:
        for i, batch in enumerate(split.iter_batches(batch_size=10)):
            print(*batch["id"], flush=True)
            if i + 1 == most:
                break
        print("end", flush=True)
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "), flush=True)
"""


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """What the calls return, or raise, each in a thread."""
    found: list[Any] = [None] * len(calls)

    def work(i: int) -> None:
        try:
            found[i] = calls[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def ids_of(split: hr.SplitIterator, **options: Any) -> list[int]:
    """One epoch's ids."""
    return [int(i) for batch in split.iter_batches(**options) for i in batch["id"]]


def epoch(splits: list[hr.SplitIterator], **options: Any) -> list[list[int]]:
    return together([lambda split=split: ids_of(split, **options) for split in splits])


class Consumer:
    """A process that iterates a split."""

    def __init__(self, split: hr.SplitIterator) -> None:
        given = pickle.dumps(split).hex()
        env = {**os.environ, "PYTHONPATH": str(SRC)}
        args = [sys.executable, "-c", CONSUMER, given]
        self.process = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.ids: list[int] = []

    def begin(self, most: int = 0) -> None:
        """An epoch of at most `most` batches; 0: a whole one."""
        assert self.process.stdin is not None
        self.ids = []
        self.process.stdin.write(f"{most}\n")
        self.process.stdin.flush()

    def line(self) -> str:
        """The next line; ids are noted."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if line[:1].isdigit():
            self.ids += map(int, line.split())
        return line

    def end(self) -> str:
        """The epoch's last line: "end", or an error."""
        while (line := self.line())[:1].isdigit():
            pass
        return line

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def consume() -> Iterator[Callable[[hr.SplitIterator], Consumer]]:
    made: list[Consumer] = []

    def make(split: hr.SplitIterator) -> Consumer:
        made.append(Consumer(split))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture
def split() -> Iterator[Callable[..., list[hr.SplitIterator]]]:
    """Dataset.streaming_split, closed at the end."""
    made: list[hr.SplitIterator] = []

    def make(ds: hr.Dataset, n: int, **options: Any) -> list[hr.SplitIterator]:
        found = ds.streaming_split(n, **options)
        made.append(found[0])
        return found

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize(("engine", "equal"), [("inline", True), ("threads", False), ("processes", True)])
def test_engines(split: Any, data: Path, engine: str, equal: bool) -> None:
    ds = hr.read_parquet(data).map_batches(lambda b: {"id": b["id"]})
    splits = split(ds, 3, equal=equal, engine=engine, cpus=2)
    for _ in range(2):
        got = epoch(splits, batch_size=7)
        ids = sorted(i for ids in got for i in ids)
        assert len(set(ids)) == len(ids)
        if equal:
            assert [len(ids) for ids in got] == [66, 66, 66]
        else:
            assert ids == list(range(200))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 100, 4001])
def test_equal_is_exact(split: Any, rows: int) -> None:
    for got in epoch(split(hr.range(rows), 3, equal=True, engine="threads")):
        assert len(got) == rows // 3


def test_the_pickle_is_a_few_words(split: Any) -> None:
    big = np.zeros(1_000_000)
    splits = split(hr.range(100).map_batches(lambda b: {"id": b["id"], "big": b["id"] + big[0]}), 2, engine="threads")
    assert len(pickle.dumps(splits)) < 1000
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(splits))))
    assert [s.rank for s in again] == [0, 1]
    assert sorted(i for ids in epoch(again) for i in ids) == list(range(100))
    again[0].close()  # no business of its
    assert sorted(i for ids in epoch(splits) for i in ids) == list(range(100))


def test_batches_are_those_of_iter_batches(split: Any) -> None:
    ds = hr.range(100).map_batches(lambda b: {"id": b["id"], "x": b["id"] * 0.5})
    (one,) = split(ds, 1, engine="threads")
    for options in [{"batch_size": 30}, {"batch_size": 30, "drop_last": True}, {"batch_size": None}]:
        mine, its = list(one.iter_batches(**options)), list(ds.iter_batches(engine="threads", **options))
        assert [b["x"].tolist() for b in mine] == [b["x"].tolist() for b in its]
    (table, *_) = one.iter_batches(batch_size=40, batch_format="pyarrow")
    assert table.column("id").to_pylist() == list(range(40))
    first = next(iter(one.iter_batches()))
    first["x"][0] = 7  # memory of its own
    with pytest.raises(hr.PlanError, match="batch_format"):
        one.iter_batches(batch_format="arrow")
    with pytest.raises(hr.PlanError, match="batch_size is 0"):
        one.iter_batches(batch_size=0)


def test_torch_batches(split: Any) -> None:
    torch = pytest.importorskip("torch")
    splits = split(hr.range(100), 2, equal=True, engine="threads")

    def sums(rank: int) -> list[Any]:
        return [batch["id"].sum() for batch in splits[rank].iter_torch_batches(batch_size=20, dtypes=torch.float32)]

    got = together([lambda: sums(0), lambda: sums(1)])
    assert [len(g) for g in got] == [3, 3]
    assert all(value.dtype == torch.float32 for g in got for value in g)
    assert sum(float(value) for g in got for value in g) == sum(range(100))


def test_local_shuffle(split: Any) -> None:
    (one,) = split(hr.range(2000).map_batches(lambda b: {"id": b["id"], "v": np.stack([b["id"]] * 2, 1)}), 1, engine="threads")
    options = {"batch_size": 50, "local_shuffle_buffer_size": 300}
    first, again, other = (ids_of(one, **options, local_shuffle_seed=seed) for seed in (1, 1, 2))
    assert sorted(first) == list(range(2000))
    assert first == again
    assert first != other
    batch = next(iter(one.iter_batches(**options)))
    assert batch["id"].shape == (50,)
    assert (batch["v"][:, 1] == batch["id"]).all(), "rows stay whole"
    assert max(batch["id"]) - min(batch["id"]) > 100


def test_an_error_of_the_pipeline_reaches_all(split: Any, consume: Any) -> None:
    def fails(batch: dict[str, Any]) -> dict[str, Any]:
        if batch["id"].max() > 50_000:
            raise ValueError("not that one")
        return batch

    splits = split(hr.range(100_000).map_batches(fails), 2, engine="threads")
    other = consume(splits[1])
    other.begin()
    with pytest.raises(hr.UserCodeError, match="not that one"):
        ids_of(splits[0])
    assert other.end().startswith("UserCodeError")


def test_a_plan_that_can_not_run_is_told_to_all(split: Any) -> None:
    for caught in epoch(split(hr.range(10).select("nobody"), 2)):
        assert isinstance(caught, hr.PlanError)
    with pytest.raises(hr.PlanError, match="at least one"):
        hr.range(10).streaming_split(0)
    with pytest.raises(hr.PlanError, match="quarantine"):
        hr.range(10).streaming_split(1, on_error="quarantine")


def test_a_consumer_that_dies_has_left_and_another_may_take_its_place(split: Any, consume: Any) -> None:
    splits = split(hr.range(20_000).map_batches(lambda b: b, batch_size=100), 2, engine="threads")
    dies, lives = consume(splits[0]), consume(splits[1])
    dies.begin()
    lives.begin()
    dies.line()
    dies.process.send_signal(signal.SIGKILL)
    assert lives.end() == "end"
    taken = set(lives.ids)
    assert len(taken) == len(lives.ids) > 0
    fresh = consume(splits[0])
    fresh.begin()
    lives.begin()
    assert fresh.end() == lives.end() == "end"
    assert sorted(fresh.ids + lives.ids) == list(range(20_000))


def test_early_stop_of_one_and_epochs(split: Any) -> None:
    splits = split(hr.range(5000), 2, equal=True, engine="threads")
    other = pickle.loads(pickle.dumps(splits[1]))  # by the socket

    def few(most: int) -> int:
        return sum(len(b["id"]) for b, _ in zip(other.iter_batches(batch_size=10), range(most), strict=False))

    for most in (3, 1, 1000):
        rows, mine = together([lambda most=most: few(most), lambda: ids_of(splits[0])])
        assert len(mine) == 2500
        assert rows == min(10 * most, 2500)


SERVER = """
import pickle, sys
import headrace as hr
ds = hr.range(3000).map_batches(lambda b: b, batch_size=100)
print(pickle.dumps(ds.streaming_split(1, engine="threads")[0]).hex(), flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_the_process_that_serves(how: str, tmp_path: Path) -> None:
    """At its end it waits for who is in an epoch; when it is killed, that is told."""
    env = {**os.environ, "PYTHONPATH": str(SRC), "TMPDIR": str(tmp_path)}
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    assert server.stdout is not None
    one = pickle.loads(bytes.fromhex(server.stdout.readline().decode()))
    batches = one.iter_batches(batch_size=100)
    got = len(next(batches)["id"])
    if how == "ends":
        assert server.stdin is not None
        server.stdin.write(b"\n")
        server.stdin.flush()
        assert got + sum(len(b["id"]) for b in batches) == 3000
        assert server.wait() == 0
    else:
        server.kill()
        with pytest.raises(hr.WorkerDied, match="the process that runs the pipeline"):
            list(batches)
    server.kill()
    server.communicate()
    with pytest.raises(hr.WorkerDied, match="the process that runs the pipeline"):
        next(one.iter_batches())


MULTIPROCESSING = """
import multiprocessing, sys
import headrace as hr

def train(split, results):
    results.put([sum(len(b["id"]) for b in split.iter_batches(batch_size=64)) for epoch in range(2)])

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    results = context.Queue()
    for split in hr.range(1001).streaming_split(2, equal=True, engine="threads"):
        context.Process(target=train, args=(split, results)).start()
    print(results.get(), results.get())
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(tmp_path: Path, method: str) -> None:
    """The parent keeps no iterator, and joins nobody."""
    script = tmp_path / "train.py"
    script.write_text(MULTIPROCESSING)
    env = {**os.environ, "PYTHONPATH": str(SRC), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script, method], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[500, 500] [500, 500]\n"
    assert done.stderr == ""
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("headrace")] == []


RANK = """
import os
import headrace as hr

def train(rank):
    mine = hr.range(3003).map_batches(lambda b: b, batch_size=100).streaming_split(2, equal=True, engine="threads")[rank]
    for epoch in range(2):
        print(rank, epoch, sum(len(batch["id"]) for batch in mine.iter_batches(batch_size=64)))
    for batch in mine.iter_batches(batch_size=64):
        if rank == 0:
            return  # the other one goes on
    print("the other one goes on")

train(int(os.environ["RANK"]))
"""


def test_ranks_meet_and_rank_0_ends_last(tmp_path: Path) -> None:
    """As torchrun starts them. The one that serves comes last, and ends last without being told to."""
    told = {"TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    env = {**os.environ, **told, "PYTHONPATH": str(SRC), "TMPDIR": str(tmp_path)}
    ranks: list[subprocess.Popen[str]] = []
    for rank in (1, 0):
        ranks.append(
            subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True, env={**env, "RANK": str(rank)})
        )
    printed = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert printed == ["1 0 1501\n1 1 1501\nthe other one goes on\n", "0 0 1501\n0 1 1501\n"]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [p for p in tmp_path.rglob("*") if not p.is_dir()] == []


def test_torchrun(tmp_path: Path) -> None:
    """The example, with a collective call in each step. How the processes end is not judged: torch 2.13 with gloo sometimes
    aborts after all is done ("terminate called without an active exception"), also in scripts that do not use us.
    """
    pytest.importorskip("torch")
    env = {**os.environ, "PYTHONPATH": str(SRC), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = [sys.executable, *torchrun, str(SRC.parent / "examples" / "train.py"), "--rows", "10001", "--epochs", "2"]
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=100)
    assert "epoch 1: 5,000 rows on each of 2 ranks, accuracy 0." in done.stdout, done.stderr


def test_torchrun_on_several_machines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(hr.PlanError, match="several machines"):
        hr.range(10).streaming_split(4)
    (one,) = hr.range(10).streaming_split(1, engine="threads")  # not for all ranks: this process's own
    assert ids_of(one) == list(range(10))
