"""A local S3 server (moto) for the integration tests."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import pytest

from headrace.connectors import retries
from headrace.testing.s3 import S3Server

_counter = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The server's address; up for the whole session."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket's name; the environment points at the server, as it would for AWS tools."""
    import urllib.request

    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    name = f"bucket-{next(_counter)}"
    with urllib.request.urlopen(urllib.request.Request(f"{s3_endpoint}/{name}", method="PUT")):
        return name


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A strict server with a bucket "b"; delays between retries are short."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very/secret+key")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr(retries, "POLICY", retries.Policy(attempts=10, first_s=0.001, most_s=0.01))
    monkeypatch.setattr(retries, "budget", retries.Budget())
    with S3Server() as server:
        server.make_bucket("b")
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server
