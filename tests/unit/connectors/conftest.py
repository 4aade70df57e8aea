"""Shared by the connectors' tests."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.csv
import pytest


@pytest.fixture(scope="session", autouse=True)
def arrow_signal_pipe() -> None:
    """Arrow's CSV reader opens a pipe for Ctrl-C at its first use and keeps it for the life of the process."""
    pyarrow.csv.read_csv(pa.BufferReader(b"a\n1\n"))
