"""The images, read from an S3 server on this machine whose every answer is late by 30 ms. Output is local."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from suite.contract import Pipeline
from suite.workloads import images

BUCKET = "photos"
SERVER = """
import sys, pathlib
from headrace.testing.s3 import Faults, S3Server, Stored
server = S3Server(faults=Faults(rates={"slow": 1.0}, slow_s=float(sys.argv[2])))
server.make_bucket(sys.argv[3])
import hashlib, time
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.parquet")):
    data = path.read_bytes()
    etag = '"' + hashlib.md5(data).hexdigest() + '"'
    server.buckets[sys.argv[3]]["in/" + path.name] = Stored(data, etag, {}, time.time())
server.start()
print(server.url, flush=True)
sys.stdin.read()
server.stop()
"""


def pipelines(data: str, params: Mapping[str, Any]) -> tuple[Pipeline, ...]:
    (local,) = images.pipelines(data, params)
    return (replace(local, source=f"s3://{BUCKET}/in"),)


@contextlib.contextmanager
def serve(data: str, params: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The server is a process of its own, outside the contestants' trees; its CPU time is theirs all the same."""
    argv = [sys.executable, "-c", SERVER, f"{data}/in", str(params["latency_s"]), BUCKET]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            url = server.stdout.readline().strip()
            yield {
                "AWS_ENDPOINT_URL": url,
                "AWS_ENDPOINT_URL_S3": url,
                "AWS_ACCESS_KEY_ID": "any",
                "AWS_SECRET_ACCESS_KEY": "any",
                "AWS_REGION": "us-east-1",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ALLOW_HTTP": "true",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
        finally:
            server.stdin.close()


WORKLOAD = replace(
    images.WORKLOAD,
    name="images-s3",
    title="the images from S3, every request 30 ms late",
    pipelines=pipelines,
    params={**images.WORKLOAD.params, "latency_s": 0.03},
    serve=serve,
)
