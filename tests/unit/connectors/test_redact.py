"""No keys, tokens or signatures in what people read."""

from __future__ import annotations

import pytest

from headrace.connectors.redact import redact
from headrace.connectors.sinks.parquet import ParquetSink
from headrace.connectors.sources.parquet import ParquetSource
from headrace.core.errors import DataError

SECRETS = ("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG", "FQoGZXIvYXdzEXAMPLETOKEN", "hunter2hunter2", "a1b2c3d4sig")


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIAIOSFODNN7EXAMPLE:hunter2hunter2@bucket/key",
        "GET https://h/b/k?X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F2026&X-Amz-Signature=a1b2c3d4sig&X-Amz-Security-Token=FQoGZXIvYXdzEXAMPLETOKEN",
        "https://h/b/k?AWSAccessKeyId=AKIAIOSFODNN7EXAMPLE&Signature=a1b2c3d4sig&Expires=1",
        "authorization: AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/x, Signature=a1b2c3d4sig",
        "x-amz-security-token: FQoGZXIvYXdzEXAMPLETOKEN",
        "<Error><AWSAccessKeyId>AKIAIOSFODNN7EXAMPLE</AWSAccessKeyId><StringToSign>a1b2c3d4sig",
        "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG, session_token='FQoGZXIvYXdzEXAMPLETOKEN'",
        "the value wJalrXUtnFEMI/K7MDENG of the environment",
    ],
)
def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    out = redact(text)
    assert "***" in out
    assert not any(secret in out for secret in SECRETS)


@pytest.mark.parametrize("text", ["s3://bucket/a/part-?.parquet", "/data/x=1/a b@c.csv", "no such bucket", "s3://b/k?x"])
def test_plain_paths_stay(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("connector", [ParquetSink, ParquetSource])
def test_credentials_in_a_path_are_refused(connector: type) -> None:
    with pytest.raises(DataError) as caught:
        connector("s3://AKIAIOSFODNN7EXAMPLE:hunter2hunter2@bucket/key")
    assert not any(secret in str(caught.value) for secret in SECRETS)
