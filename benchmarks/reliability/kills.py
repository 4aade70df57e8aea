"""SIGKILL, SIGTERM and two drivers at once against real runs, from outside the process.

    python benchmarks/reliability/kills.py driver --kills 200            # local destination
    python benchmarks/reliability/kills.py driver --kills 200 --s3       # a strict S3 server in a process of its own
    python benchmarks/reliability/kills.py worker --kills 200
    python benchmarks/reliability/kills.py two --rounds 100              # SIGSTOP, a second driver takes over, SIGCONT
    python benchmarks/reliability/kills.py sigterm --rounds 50

Every run is one of job.py, whose answer is known. A chain is cut short several times, then left to finish; its output must
equal the known answer: no row lost, none twice, the metrics of one clean run. While it goes on, a reader opens every file that
it can see: a torn one, or one whose bytes change later, counts. The driver is stopped before it is killed, and the phase that
it was in is read off the destination. `--record` writes benchmarks/results/reliability-<name>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import job  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from common import record  # noqa: E402

JOB = str(Path(job.__file__))
PUBLISHING = ("logged", "finishing")


# ---------------------------------------------------------------- destinations


class Local:
    """A destination on a local disk. uri: what the job is given."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = str(root)
        self.env: dict[str, str] = {}

    def names(self) -> list[str]:
        found: list[str] = []
        for folder, _, files in os.walk(self.root):  # what vanishes meanwhile is left out
            found += [os.path.relpath(os.path.join(folder, f), self.root) for f in files]
        return sorted(found)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


class S3:
    """A destination on a strict server of our own, in a process of its own."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.prefix = "out"
        self.uri = f"s3://bucket/{self.prefix}"
        endpoint = f"http://127.0.0.1:{port}"
        self.env = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
        from obstore.store import S3Store

        config: dict[str, Any] = {
            "endpoint": endpoint,
            "access_key_id": "test",
            "secret_access_key": "test",
            "region": "us-east-1",
        }
        self.store = S3Store("bucket", client_options={"allow_http": True}, **config)

    def names(self) -> list[str]:
        import obstore

        found = [meta["path"] for page in obstore.list(self.store, self.prefix) for meta in page]
        return sorted(path.removeprefix(f"{self.prefix}/") for path in found)

    def read(self, name: str) -> bytes | None:
        import obstore

        try:
            return bytes(obstore.get(self.store, f"{self.prefix}/{name}").bytes())
        except FileNotFoundError:
            return None

    def clear(self) -> None:
        import obstore

        for name in self.names():
            obstore.delete(self.store, f"{self.prefix}/{name}")


Destination = Local | S3


def outputs_of(names: list[str]) -> list[str]:
    return [n for n in names if n.endswith(".parquet") and not n.startswith("_")]


def phase(there: Destination) -> str:
    """Where the run stands, read off the destination of a driver that is stopped."""
    names = there.names()
    if "_SUCCESS" in names:
        return "done"
    logs = [n for n in names if "/log/" in n and n.endswith(".json")]
    if not logs:
        return "starting"
    shown = set(outputs_of(names))
    logged: set[str] = set()
    finished = False
    for name in logs:
        data = there.read(name)
        segment = json.loads(data) if data else {}
        for r in segment.get("records", []):
            kind = r.get("kind")
            finished = finished or kind == "finished"
            if kind == "settled":
                logged.update(o["name"] for o in r.get("files", []) if not o["name"].startswith("_"))
    if finished:
        return "finishing"
    if logged - shown or any(".tmp" in n and "/log/" in n for n in names):
        return "logged"  # in the log, not all visible: in the middle of publishing
    if any("/staging/" in n and n.endswith(".parquet") for n in names):
        return "staged"  # files are being made, or wait for the next segment
    return "working"


# ---------------------------------------------------------------- watching and checking


@dataclass
class Findings:
    """What went wrong, counted; all must stay 0."""

    lost: int = 0
    duplicates: int = 0
    torn: int = 0
    changed: int = 0
    wrong_metrics: int = 0
    failed_runs: int = 0
    left_processes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not (
            self.lost + self.duplicates + self.torn + self.changed + self.wrong_metrics + self.failed_runs + self.left_processes
        )


class Reader:
    """Opens every visible output file again and again, as another program would, in a process of its own."""

    def __init__(self, there: Destination, findings: Findings) -> None:
        self._findings = findings
        self._answer = multiprocessing.get_context("spawn").SimpleQueue()
        self._stop = multiprocessing.get_context("spawn").Event()
        make = (type(there), there.root if isinstance(there, Local) else there.port)
        arguments = (make, self._answer, self._stop)
        self._process = multiprocessing.get_context("spawn").Process(target=watch_outputs, args=arguments, daemon=True)
        self._process.start()
        self.reads = 0

    def close(self) -> None:
        self._stop.set()
        self.reads, notes = self._answer.get()
        self._process.join()
        for what, text in notes:
            setattr(self._findings, what, getattr(self._findings, what) + 1)
            self._findings.notes.append(text)


def watch_outputs(make: tuple[Any, Any], answer: Any, stop: Any) -> None:
    """The reader's process."""
    there: Destination = make[0](make[1])
    seen: dict[str, str] = {}
    notes: list[tuple[str, str]] = []
    reads = 0
    last = False
    while not last:
        last = stop.wait(0.05)
        for name in outputs_of(there.names()):
            data = there.read(name)
            if data is None:
                notes.append(("changed", f"{name} vanished"))
                continue
            reads += 1
            digest = hashlib.sha256(data).hexdigest()
            if name not in seen:
                seen[name] = digest
                try:
                    pq.read_table(pa.BufferReader(data))
                except pa.ArrowException as error:
                    notes.append(("torn", f"{name}: {error}"))
            elif seen[name] != digest:
                notes.append(("changed", f"{name} changed"))
    answer.put((reads, notes))


def check_output(there: Destination, findings: Findings, clean: dict[str, Any]) -> None:
    """Compare a finished destination with the known answer."""
    rows: list[tuple[int, int]] = []
    for name in outputs_of(there.names()):
        data = there.read(name)
        assert data is not None
        table = pq.read_table(pa.BufferReader(data), columns=["id", "twin"])
        rows += zip(table["id"].to_pylist(), table["twin"].to_pylist(), strict=True)
    wanted = Counter(job.expected())
    found = Counter(rows)
    lost, double = wanted - found, found - wanted
    findings.lost += sum(lost.values())
    findings.duplicates += sum(double.values())
    if lost or double:
        findings.notes.append(f"lost {sorted(lost)[:5]}, too many {sorted(double)[:5]}")
    elif job.digest(rows) != job.digest(job.expected()):
        findings.wrong_metrics += 1
        findings.notes.append("the order of rows differs")
    manifest = json.loads(there.read("_manifest.json") or b"{}")
    if manifest.get("metrics") != clean:
        findings.wrong_metrics += 1
        findings.notes.append(f"metrics {manifest.get('metrics')} instead of {clean}")
    aside = [n for n in there.names() if "/quarantine/" in n]
    bad = sorted(i for n in aside for i in pq.read_table(pa.BufferReader(there.read(n) or b""))["id"].to_pylist())
    if bad != [i for i in range(job.FILES * job.ROWS) if i % 101 == 0]:
        findings.lost += 1
        findings.notes.append(f"quarantined rows differ: {len(bad)} of {len(range(0, job.FILES * job.ROWS, 101))}")
    if any("/staging/" in n for n in there.names()):
        findings.notes.append("staged files are left")
        findings.left_processes += 1


# ---------------------------------------------------------------- processes


class Job:
    def __init__(self, source: Path, there: Destination, *extra: str) -> None:
        self.there = there
        command = [sys.executable, JOB, str(source), there.uri, *extra]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **there.env},
        )
        self.pid = self.process.pid

    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self, timeout: float = 120) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def workers(self) -> list[int]:
        found: list[int] = []
        for pid in os.listdir("/proc"):
            if pid.isdigit():
                try:
                    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                if int(fields[1]) == self.pid and fields[0] != "Z":
                    found.append(int(pid))
        return found

    def gone(self, findings: Findings) -> None:
        """Nothing of the run's process group may be left a few seconds after its driver."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if not _group(self.pid):
                return
            time.sleep(0.02)
        findings.left_processes += 1
        findings.notes.append(f"processes {_group(self.pid)} outlive their driver")


def _group(pgid: int) -> list[int]:
    found: list[int] = []
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
                if os.getpgid(int(pid)) == pgid and state != "Z":
                    found.append(int(pid))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def wait_for(job_: Job, random_: random.Random, aim: str) -> None:
    """Until the moment of the kill. aim: "any": a random time; "publishing": within milliseconds after a segment of the log."""
    if aim == "any":
        time.sleep(random_.uniform(0.05, 2.5))
        return
    wanted = _segments(job_.there) + 1 + random_.choice((1, 1, 2))  # its claim, then the segment that is waited for
    deadline = time.monotonic() + 6.0
    while _segments(job_.there) < wanted and time.monotonic() < deadline and job_.alive():
        time.sleep(0.00005)
    time.sleep(random_.uniform(0.0, 0.006))


def _segments(there: Destination) -> int:
    if isinstance(there, S3):
        return sum("/log/" in name for name in there.names())
    try:
        return len(os.listdir(there.root / "_headrace" / "run-00000" / "log"))
    except FileNotFoundError:
        return 0


# ---------------------------------------------------------------- the loops


def clean_metrics(source: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        there = Local(Path(folder) / "out")
        code, _, err = Job(source, there).end()
        assert code == 0, err
        findings = Findings()
        metrics = json.loads(there.read("_manifest.json") or b"{}")["metrics"]
        check_output(there, findings, metrics)
        assert findings.clean, findings
        return metrics


def driver(args: argparse.Namespace, source: Path, there: Destination) -> dict[str, Any]:
    random_ = random.Random(args.seed)
    findings, phases = Findings(), Counter[str]()
    metrics = clean_metrics(source)
    kills = chains = reads = 0
    while kills < args.kills:
        there.clear()
        chains += 1
        engine = random_.choice(("threads", "processes"))
        reader = Reader(there, findings)
        for _ in range(random_.randint(2, 6)):
            run = Job(source, there, "--engine", engine)
            wait_for(run, random_, random_.choice(("any", "publishing")))
            if not run.alive():
                break
            os.kill(run.pid, signal.SIGSTOP)
            where = phase(there)
            run.kill()
            run.gone(findings)
            phases[where] += 1
            kills += 1
        code, _, err = Job(source, there, "--engine", engine).end()
        reader.close()
        reads += reader.reads
        if code:
            findings.failed_runs += 1
            findings.notes.append(err[-2000:])
        else:
            check_output(there, findings, metrics)
        say(f"{kills} kills, {chains} chains, {dict(phases)}", findings)
    within = sum(phases[p] for p in PUBLISHING) / max(1, kills)
    return {
        "kills": kills,
        "chains": chains,
        "phases": dict(phases),
        "within_publishing": round(within, 3),
        "reads": reads,
    } | told(findings)


def worker(args: argparse.Namespace, source: Path, there: Destination) -> dict[str, Any]:
    random_ = random.Random(args.seed)
    findings = Findings()
    metrics = clean_metrics(source)
    kills = runs = 0
    while kills < args.kills:
        there.clear()
        runs += 1
        run = Job(source, there, "--engine", "processes")
        reader = Reader(there, findings)
        for _ in range(random_.randint(1, 4)):
            time.sleep(random_.uniform(0.1, 0.8))
            workers = run.workers()
            if workers and run.alive():
                try:
                    os.kill(random_.choice(workers), random_.choice((signal.SIGKILL, signal.SIGSEGV)))
                    kills += 1
                except ProcessLookupError:
                    continue
        code, _, err = run.end()
        reader.close()
        run.gone(findings)
        if code:
            findings.failed_runs += 1
            findings.notes.append(err[-2000:])
        else:
            check_output(there, findings, metrics)
        say(f"{kills} kills in {runs} runs", findings)
    return {"kills": kills, "runs": runs} | told(findings)


def two(args: argparse.Namespace, source: Path, there: Destination) -> dict[str, Any]:
    random_ = random.Random(args.seed)
    findings, ends = Findings(), Counter[str]()
    metrics = clean_metrics(source)
    for round_ in range(args.rounds):
        there.clear()
        engine = random_.choice(("threads", "processes"))
        first = Job(source, there, "--engine", engine)
        reader = Reader(there, findings)
        wait_for(first, random_, random_.choice(("any", "publishing")))
        for pid in _group(first.pid) if random_.random() < 0.5 else [first.pid]:
            try:
                os.kill(pid, signal.SIGSTOP)
            except ProcessLookupError:
                continue
        second = Job(source, there, "--engine", engine, "--take-over")
        if random_.random() < 0.7:
            time.sleep(random_.uniform(0.2, 2.5))
        else:
            second.process.wait(timeout=120)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGCONT)
        code, _, err = second.end()
        first_code, _, first_err = first.end()
        reader.close()
        first.gone(findings)
        if code:
            findings.failed_runs += 1
            findings.notes.append(f"second: {err[-1500:]}")
            continue
        stopped = "taken over" in first_err or "another driver is at work" in first_err  # the latter: before it had begun
        if first_code and not stopped:
            findings.failed_runs += 1
            findings.notes.append(f"first: {first_err[-1500:]}")
        ends["first had finished" if first_code == 0 else "first stopped: taken over"] += 1
        check_output(there, findings, metrics)
        say(f"{round_ + 1} rounds, {dict(ends)}", findings)
    return {"rounds": args.rounds, "ends": dict(ends)} | told(findings)


def sigterm(args: argparse.Namespace, source: Path, there: Destination) -> dict[str, Any]:
    random_ = random.Random(args.seed)
    findings, codes = Findings(), Counter[str]()
    metrics = clean_metrics(source)
    for round_ in range(args.rounds):
        there.clear()
        engine = random_.choice(("threads", "processes"))
        for _ in range(2):
            before = _segments(there)
            run = Job(source, there, "--engine", engine)
            wait_for(run, random_, "publishing" if random_.random() < 0.5 else "any")
            in_work = _segments(there) >= before + 2 and run.alive()  # before that it may not be listening to signals yet
            run.process.terminate()
            code, _, err = run.end()
            run.gone(findings)
            codes[str(code)] += 1
            if code == 0:
                break
            if in_work and (code != 143 or "resumable" not in err) and "_SUCCESS" not in there.names():
                findings.failed_runs += 1
                findings.notes.append(f"code {code}: {err[-1500:]}")
        code, _, err = Job(source, there, "--engine", engine).end()
        if code:
            findings.failed_runs += 1
            findings.notes.append(err[-2000:])
        else:
            check_output(there, findings, metrics)
        say(f"{round_ + 1} rounds, exit codes {dict(codes)}", findings)
    return {"rounds": args.rounds, "exit_codes": dict(codes)} | told(findings)


def told(findings: Findings) -> dict[str, Any]:
    return {
        "lost": findings.lost,
        "duplicates": findings.duplicates,
        "torn": findings.torn,
        "changed": findings.changed,
        "wrong_metrics": findings.wrong_metrics,
        "failed_runs": findings.failed_runs,
        "left_behind": findings.left_processes,
        "notes": findings.notes[:20],
    }


def say(text: str, findings: Findings) -> None:
    print(text, "" if findings.clean else f"FOUND {told(findings)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["driver", "worker", "two", "sigterm"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in"
        job.prepare(source)
        server = None
        if args.s3:
            port = random.Random().randint(20000, 50000)
            server = subprocess.Popen([sys.executable, "-m", "headrace.testing.s3", "--port", str(port), "--bucket", "bucket"])
            time.sleep(1.0)
            there: Destination = S3(port)
        else:
            there = Local(Path(folder) / "out")
        try:
            figures = globals()[args.what](args, source, there)
        finally:
            if server is not None:
                server.kill()
    figures["seed"] = args.seed
    print(json.dumps(figures, indent=1))
    if args.record:
        record(f"reliability-{args.what}{'-s3' if args.s3 else ''}", figures)
    bad = [k for k in ("lost", "duplicates", "torn", "changed", "wrong_metrics", "failed_runs", "left_behind") if figures[k]]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
