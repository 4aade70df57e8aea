"""A worker's environment and the words for its end."""

from __future__ import annotations

import io

import pytest

from headrace.core.resources import WorkerSpec
from headrace.substrates.processes import spawn

CPU = WorkerSpec(0, "cpu", "cpu")


def test_threads_unless_the_user_said() -> None:
    env = spawn.worker_environment({"OMP_NUM_THREADS": "7", "HOME": "/h"}, CPU, 2)
    assert env["OMP_NUM_THREADS"] == "7"
    assert env["MKL_NUM_THREADS"] == env["OPENBLAS_NUM_THREADS"] == "2"
    assert env["HOME"] == "/h"


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cpu", None, ""),
        ("cpu", "0,1", ""),
        ("sim:1", None, ""),
        ("cuda:1", None, "1"),
        ("cuda:1", "4,6", "6"),
        ("cuda:0", "GPU-8f, GPU-9a", "GPU-8f"),
    ],
)
def test_a_worker_sees_its_own_device(device: str, visible: str | None, expected: str) -> None:
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    spec = WorkerSpec(0, device.partition(":")[0], device)
    assert spawn.worker_environment(env, spec, 1)["CUDA_VISIBLE_DEVICES"] == expected


def test_how_a_worker_ended() -> None:
    assert spawn.death_reason(1) == "exit code 1"
    assert spawn.death_reason(-9) == "killed by signal 9 (SIGKILL)"
    assert spawn.death_reason(-11) == "killed by signal 11 (SIGSEGV)"
    assert spawn.death_reason(-9, out_of_memory=True).startswith("out of memory: killed by the kernel")


def test_kills_for_memory_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the own control group where it tells, of the machine elsewhere."""
    files = {
        "/proc/self/cgroup": "4:memory:/old\n0::/jobs/7\n",
        "/sys/fs/cgroup/jobs/7/memory.events": "low 0\noom 2\noom_kill 5\noom_group_kill 0\n",
        "/proc/vmstat": "nr_free_pages 1\noom_kill 11\n",
    }

    def open_fake(path: str) -> io.StringIO:
        if path not in files:
            raise FileNotFoundError(path)
        return io.StringIO(files[path])

    monkeypatch.setattr("builtins.open", open_fake)
    assert spawn.oom_kills() == 5
    del files["/sys/fs/cgroup/jobs/7/memory.events"]
    assert spawn.oom_kills() == 11
    files.clear()
    assert spawn.oom_kills() == 0
