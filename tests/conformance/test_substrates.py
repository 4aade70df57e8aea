"""Every substrate passes the conformance kit, each check on its own."""

from __future__ import annotations

import sys

import pytest

import headrace as hr
from headrace.contracts.substrate import Substrate
from headrace.substrates.inline import InlineSubstrate
from headrace.substrates.processes.pool import ProcessesSubstrate
from headrace.substrates.threads import ThreadsSubstrate
from headrace.testing.check_substrate import (
    CHECKS,
    DEATH_CHECKS,
    FRAIL_CHECKS,
    ISOLATION_CHECKS,
    SPILL_CHECKS,
    ScriptedBody,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes need Linux")
KINDS = [InlineSubstrate, ThreadsSubstrate, pytest.param(ProcessesSubstrate, marks=linux)]


@pytest.mark.parametrize("check", [*CHECKS, *SPILL_CHECKS], ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", KINDS, ids=["inline", "threads", "processes"])
def test_conformance(kind, check):
    check(lambda: kind(body_factory=ScriptedBody))


@linux
@pytest.mark.parametrize("check", [*DEATH_CHECKS, *ISOLATION_CHECKS], ids=lambda c: c.__name__)
def test_isolation(check):
    check(lambda: ProcessesSubstrate(body_factory=ScriptedBody))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("check", [*CHECKS, *DEATH_CHECKS, *FRAIL_CHECKS], ids=lambda c: c.__name__)
def test_ray(check):
    from headrace.substrates.ray.pool import RaySubstrate

    check(lambda: RaySubstrate(body_factory=ScriptedBody))


@pytest.mark.parametrize("kind", KINDS, ids=["inline", "threads", "processes"])
def test_satisfies_the_protocol(kind):
    substrate = kind()
    try:
        assert isinstance(substrate, Substrate)
    finally:
        substrate.stop()


class Doubler:
    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, batch):
        return {"y": batch["x"] * 2, "device": [self.device] * len(batch["x"])}


@pytest.mark.parametrize("engine", ["inline", "threads", pytest.param("processes", marks=linux)])
def test_the_real_body_gives_the_same_rows(engine) -> None:
    """A CPU stage and a model stage of another pool: blocks cross workers."""
    rows = hr.range(5000).map_batches(lambda b: {"x": b["id"] + 1.5}).predict(Doubler, input=["x"], device="sim:0")
    table = rows.to_arrow(engine=engine, devices=["sim:0"], cpus=2, progress="quiet")
    assert table.column("x").to_pylist() == [i + 1.5 for i in range(5000)]
    assert table.column("y").to_pylist() == [2 * i + 3.0 for i in range(5000)]
    assert set(table.column("device").to_pylist()) == {"sim:0"}
