"""S3 settings as AWS tools take them."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.connectors import environment


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in environment._KEYS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_nothing_set() -> None:
    assert environment.s3_config() == {"region": "us-east-1"}


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://general:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3only:9000/")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    before = environment.fingerprint()
    assert environment.s3_config() == {
        "region": "eu-west-1",
        "endpoint": "http://s3only:9000",
        "virtual_hosted_style_request": False,
        "client_options": {"allow_http": True},
    }
    monkeypatch.setenv("AWS_REGION", "eu-west-2")
    assert environment.s3_config()["region"] == "eu-west-2"
    assert environment.fingerprint() != before


def test_profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = D\naws_secret_access_key = d\n"
        "[work]\naws_access_key_id = W\naws_secret_access_key = w%w\naws_session_token = t\n"
    )
    (tmp_path / ".aws" / "config").write_text(
        "[default]\nregion = r1\n[profile work]\nregion = r2\nservices = mine\n"
        "[services mine]\ns3 =\n  endpoint_url = https://store\n"
    )
    assert environment.s3_config() == {"region": "r1", "access_key_id": "D", "secret_access_key": "d"}
    monkeypatch.setenv("AWS_PROFILE", "work")
    config = environment.s3_config()
    assert config["access_key_id"] == "W"
    assert config["secret_access_key"] == "w%w"
    assert config["session_token"] == "t"
    assert config["region"] == "r2"
    assert config["endpoint"] == "https://store"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "E")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "e")
    assert "access_key_id" not in environment.s3_config()
