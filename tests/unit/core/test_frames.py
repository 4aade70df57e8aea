"""Calls that cross the end of a chunk of frames."""

from __future__ import annotations

import subprocess
import sys

import pytest

from headrace.core.frames import with_room

# How often memory is mapped and unmapped while calls are made at each of many depths, by the pages that come and go.
PROGRAM = """
import resource, sys
from headrace.core.frames import with_room

def leaf(a, b=1, c=2):
    return a

def inner(a):
    return leaf(a)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(2000):
        inner(i)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def deep(depth):
    return faults() if depth == 0 else deep(depth - 1)

def most():
    return max(deep(depth) for depth in range(300))

print(with_room(most) if sys.argv[1] == "room" else most())
"""


def test_answers_and_errors_pass() -> None:
    assert with_room(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        with_room(divmod, 7, 0)


def test_it_can_be_called_in_each_other_and_deep() -> None:
    def deep(depth: int) -> int:
        return 0 if depth == 0 else 1 + deep(depth - 1)

    def twice(depth: int) -> int:
        return with_room(deep, depth)

    assert with_room(twice, 500) == 500
    with pytest.raises(RecursionError):
        with_room(deep, 100_000)


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_no_depth_maps_memory_for_each_call() -> None:
    def most(where: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, where], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert most("room") < 500
    if sys.version_info < (3, 14):
        assert most("anywhere") >= 2000, "this Python needs no room: it may go"
