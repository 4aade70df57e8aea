"""Footers that a process remembers."""

from __future__ import annotations

from headrace.connectors.footers import Footers


def test_found_under_their_version_only() -> None:
    held = Footers()
    held.keep("s3://b/a", '"one"', b"1")
    assert held.find("s3://b/a", '"one"') == b"1"
    assert held.find("s3://b/a", '"two"') is None
    held.keep("s3://b/a", "10-1700000000.0", b"size and time")
    held.keep("s3://b/a", "", b"whichever is there")
    assert held.find("s3://b/a", "10-1700000000.0") is None
    assert held.find("s3://b/a", "") is None


def test_the_ones_used_last_stay() -> None:
    held = Footers(most_bytes=30)
    for name in "abc":
        held.keep(name, '"e"', bytes(10))
    assert held.find("a", '"e"') is not None
    held.keep("a", '"e"', bytes(10))  # again: counts once
    held.keep("d", '"e"', bytes(10))
    assert [name for name in "abcd" if held.find(name, '"e"')] == ["a", "c", "d"]
