"""Every substrate passes the conformance kit, each check on its own."""

from __future__ import annotations

import sys

import pytest

from headrace.contracts.substrate import Substrate
from headrace.substrates.inline import InlineSubstrate
from headrace.substrates.processes.pool import ProcessesSubstrate
from headrace.substrates.threads import ThreadsSubstrate
from headrace.testing.check_substrate import CHECKS, ISOLATION_CHECKS, ScriptedBody

linux = pytest.mark.skipif(sys.platform != "linux", reason="processes need Linux")
KINDS = [InlineSubstrate, ThreadsSubstrate, pytest.param(ProcessesSubstrate, marks=linux)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", KINDS, ids=["inline", "threads", "processes"])
def test_conformance(kind, check):
    check(lambda: kind(body_factory=ScriptedBody))


@linux
@pytest.mark.parametrize("check", ISOLATION_CHECKS, ids=lambda c: c.__name__)
def test_isolation(check):
    check(lambda: ProcessesSubstrate(body_factory=ScriptedBody))


@pytest.mark.parametrize("kind", KINDS, ids=["inline", "threads", "processes"])
def test_satisfies_the_protocol(kind):
    substrate = kind()
    try:
        assert isinstance(substrate, Substrate)
    finally:
        substrate.stop()
