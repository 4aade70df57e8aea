"""A worker's environment and the words for its end."""

from __future__ import annotations

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


def test_how_a_worker_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "oom_kills", lambda: 3)
    assert spawn.death_reason(1, 3) == "exit code 1"
    assert spawn.death_reason(-9, 3) == "killed by signal 9 (SIGKILL)"
    assert spawn.death_reason(-11, 3) == "killed by signal 11 (SIGSEGV)"
    assert "memory ran out" in spawn.death_reason(-9, 2)
    assert "memory" not in spawn.death_reason(-11, 2)
