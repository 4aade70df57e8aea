"""Redaction: secrets go, ordinary texts stay."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.core.errors import DataError, HeadraceError
from headrace.core.redact import is_secret_name, looks_secret, redact

KEY = "AKIA" + "IOSFODNN7EXAMPLE"
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCY" + "EXAMPLEKEY"


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"s3://{KEY}:{SECRET}@bucket/key", SECRET),
        ("s3://name:hunter2@bucket/key", "hunter2"),
        ("https://u:p@ss@host/x", "p@ss"),
        ("GET https://token9@host/x failed", "token9"),
        ("https://h/x?X-Amz-Signature=abc123&a=1", "abc123"),
        ("https://h/x?a=1&X-Amz-Credential=AK%2F2020%2Fs3", "AK%2F"),
        ("https://h/x?a=1&X-Amz-Security-Token=FQoGZ", "FQoGZ"),
        ("https://a.blob.core.windows.net/c?sv=1&sig=Zm9v%3D", "Zm9v"),
        ("https://h/?token=abc", "abc"),
        ("https://h/?password=abc", "=abc"),
        (f"aws_secret_access_key={SECRET}", SECRET),
        (f"aws_secret_access_key = {SECRET}", SECRET),
        (f'{{"aws_access_key_id": "AK", "aws_secret_access_key": "{SECRET}"}}', SECRET),
        ("connect(password='two words', user='x')", "two words"),
        ("password: hunter22", "hunter22"),
        ("db_password=hunter", "hunter"),
        ("Authorization: Bearer abcdefghijkl", "abcdefghijkl"),
        ("Authorization: Basic dXNlcjpwYXNz", "dXNl"),
        ("header 'Bearer abc123def456ghi'", "abc123"),
        ("invalid key sk-proj-a1B2c3D4e5F6g7H8i9J0", "a1B2c3"),
        ("hf_" + "aB3" * 10, "aB3aB3"),
        ("ghp_" + "aB3" * 12, "aB3aB3"),
        (f"The key {KEY} is not there", KEY),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----", "MIIE"),
        ("<StringToSign>AWS4 2020\nx</StringToSign>", "2020"),
        ("eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSM", "SflKx"),
    ],
)
def test_secrets_go(text: str, secret: str) -> None:
    shown = redact(text)
    assert secret not in shown
    assert "***" in shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a/part-00-000001.parquet",
        "https://host:8080/a/b?page=2&sort=name",
        "https://host/list?to=someone@example.org",
        "rows 0-127 of /data/a@b.parquet",
        "the password: must not be empty",
        "tokens=128, max_tokens: 4096, tokenizer='bert', pad_token='[PAD]'",
        "KeyError: 'key'",
        "column 'api_key' is not there; the columns are ['id', 'token']",
        "Basic understanding of bearer instruments",
        "sk-learn-is-not-a-key and sklearn neither",
        "mail someone@example.org, or git@github.com:a/b.git",
        "x = {'key': 3, 'design': 4}",
        "C:\\Users\\x\\key.txt",
        "partition key=2024/month=01/part-0.parquet",
    ],
)
def test_ordinary_texts_stay(text: str) -> None:
    assert redact(text) == text


WORDS = st.sampled_from(
    [
        "the",
        "key",
        "token",
        "of",
        "rows",
        "password",
        "in",
        "/data/part-00.parquet",
        "s3://bucket/x=1/y.csv",
        "(3",
        "columns)",
        "is",
        "not",
        "there:",
        "'id'",
        "12",
        "a=b",
        ",",
        ".",
    ]
)


@given(st.lists(WORDS, max_size=30).map(" ".join))
@example("the token is not there: 12")
@example("password 12")
def test_words_and_paths_are_left_alone(text: str) -> None:
    assert redact(text) == text


@given(st.text(max_size=200))
def test_a_second_time_changes_nothing(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


@given(
    st.text(st.characters(categories=("L", "N")), min_size=1, max_size=40),
    st.sampled_from(["password", "sig", "X-Amz-Signature"]),
)
def test_no_query_value_survives(secret: str, name: str) -> None:
    assert redact(f"read https://host/a.csv?x=1&{name}={secret}&y=2").endswith(f"&{name}=***&y=2")


@pytest.mark.parametrize("unit", ["a.", "eyJ", "sk-", "://", "password", "token=", "<StringToSign>", "x-amz-", "Bearer ", "?a"])
def test_no_text_takes_quadratic_work(unit: str) -> None:
    text = unit * (200_000 // len(unit))  # quadratic work would run into the test's time limit
    assert redact(text) is not None


def test_names() -> None:
    for name in (
        "password",
        "API_KEY",
        "apiKey",
        "awsSecretAccessKey",
        "hf_token",
        "credentials",
        "db_password",
        "client_secret",
    ):
        assert is_secret_name(name), name
    for name in ("key", "sort_key", "tokenizer", "max_tokens", "pad_token", "eos_token", "token_column", "monkey", "name"):
        assert not is_secret_name(name), name


def test_opaque_values() -> None:
    assert looks_secret("aB3dE5fG7hJ9kL1mN3pQ")
    for text in ("a/b/c/part-00-000001.Parquet", "a short one", "customer_id", "0" * 40, "TheQuickBrownFoxJumpsOverTheDog"):
        assert not looks_secret(text), text


def test_errors_are_redacted_wherever_they_are_shown() -> None:
    error: HeadraceError = DataError(
        "can't read s3://u:hunter2@b/x",
        where=(("file", "https://h/x?sig=hunter2"),),
        hint="password=hunter2",
        frames="pwd=hunter2",
    ).at(("object", "s3://u:hunter2@b/y"))
    again = pickle.loads(pickle.dumps(error))
    for shown in (str(error), repr(error), str(again), repr(again.where)):
        assert "hunter2" not in shown
