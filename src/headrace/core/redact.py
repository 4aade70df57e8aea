"""Redaction: texts that people keep or send on (errors, logs, quarantined rows, fingerprints) without the secrets in them.

Pure: what is secret is told by its shape or by the name before it. What must not live here: the credentials in force (the
connectors know those).

Invariants: a text without secrets is unchanged; a redacted text stays as it is when redacted again; work is linear in the text.
"""

from __future__ import annotations

import re

HIDDEN = "***"

# What stands before a secret, or begins one: most texts have none of it.
_WORDS_BEFORE = tuple(
    "secret passw passphrase pwd token key credential sig bearer basic auth policy x-amz- x-goog- accessid".split()  # noqa: SIM905
)
_SHAPE_BEGINS = ("akia", "asia", "aroa", "aida", "sk-", "gh", "hf_", "xox", "aiza", "eyj")
_BEGINS = ("://", "stringtosign", "signatureprovided", "canonicalrequest", *_WORDS_BEFORE, *_SHAPE_BEGINS)

_PEM = re.compile(r"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY)-----(?s:.)*?(?:-----END \1-----|\Z)")
_ELEMENT = re.compile(
    r"<(AWSAccessKeyId|StringToSign|SignatureProvided|StringToSignBytes|CanonicalRequest)>(?s:.)*?(?:</\1>|\Z)", re.IGNORECASE
)
# A secret access key may hold slashes, a password an @.
_KEY_PAIR = re.compile(r"(?<=://)(?:AKIA|ASIA)[A-Z0-9]{12,}:[^\s@'\"<>]+@")
_USER = re.compile(r"(?<=://)(?:[^\s/?#'\"<>]+|[^\s/:?#'\"<>]+:(?!\d+[/?#])[^\s/'\"<>]+)@")

_NAMES = (
    r"(?:password|passwd|passphrase|pwd|secret[_-]?access[_-]?key|access[_-]?key(?:[_-]?id)?|api[_-]?key|account[_-]?key"
    r"|private[_-]?key|secret[_-]?key|client[_-]?secret|session[_-]?token|security[_-]?token|(?:auth|access|refresh|bearer|id)[_-]?token"
    r"|secret|credential)"
)
_QUERY = re.compile(
    rf"(?P<name>[?&;](?:[\w.%-]{{0,64}}(?:signature|credential|token|auth|{_NAMES})|sig|key|x-amz-[a-z0-9-]{{1,40}}|x-goog-[a-z0-9-]{{1,40}}"
    r"|awsaccesskeyid|googleaccessid|key-pair-id|policy)=)[^&;\s'\"<>]+",
    re.IGNORECASE,
)
_QUOTED = re.compile(
    rf"(?P<name>{_NAMES}(?:\\?[\"'])?\s{{0,3}}(?:=>|[:=])\s{{0,3}}[bfru]?(?P<quote>\\?[\"']))(?:(?!(?P=quote)).)+",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(rf"(?P<name>{_NAMES}[\"']?\s?=>?\s?)(?![\"'\\(\[{{])[^\s'\"<>,;&)\]}}]+", re.IGNORECASE)
# After a colon stands prose as often as a value: a value has a digit.
_TOLD = re.compile(
    rf"(?P<name>{_NAMES}[\"']?\s?:\s{{1,3}})(?=[^\s'\"<>,;&)]{{0,200}}\d)[^\s'\"<>,;&)\]}}]{{6,}}", re.IGNORECASE
)
# "token" alone is a word of language models, too.
_TOKEN = re.compile(r"(?P<name>(?<![\w?&;-])token[\"']?\s?[:=]\s?[\"']?)(?=[\w.~+/-]{0,200}\d)[\w.~+/=-]{12,}", re.IGNORECASE)

_HEADER = re.compile(
    r"(?P<name>(?:authorization[\"']?\s{0,3}[:=]\s{0,3}[\"']?(?:bearer|basic|digest|token|negotiate|aws4-hmac-sha256|aws)"
    r"|x-amz-(?:security-token|content-sha256)[\"']?\s{0,3}[:=])\s{1,3})[^\r\n'\"]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(?P<name>(?:bearer|basic)\s{1,3})(?=[\w.~+/-]{0,400}\d)[\w.~+/=-]{12,}", re.IGNORECASE)
_SHAPES = re.compile(
    r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,}\b"
    r"|(?<![\w-])sk-(?=[\w-]{0,60}\d)(?=[\w-]{0,40}?[A-Za-z0-9_]{16})[\w-]{16,}"
    r"|(?<!\w)(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|hf_[A-Za-z0-9]{20,}|xox[abeoprs]-[\w-]{10,}|AIza[\w-]{30,})"
    r"|(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
)

_NAMED = (_QUERY, _QUOTED, _ASSIGNED, _TOLD, _TOKEN, _HEADER, _BEARER)


def redact(text: str) -> str:
    """The text with passwords, keys, tokens and signatures replaced by ***."""
    low = text.lower()
    if not any(word in low for word in _BEGINS):
        return text
    if "-----begin" in low:
        text = _PEM.sub(lambda m: f"-----BEGIN {m[1]}-----{HIDDEN}-----END {m[1]}-----", text)
    if "<" in text:
        text = _ELEMENT.sub(lambda m: f"<{m[1]}>{HIDDEN}</{m[1]}>", text)
    if "://" in text:
        text = _KEY_PAIR.sub(f"{HIDDEN}@", text)
        text = _USER.sub(f"{HIDDEN}@", text)
    text = "".join(map(_redact_line, text.splitlines(keepends=True)))
    return _SHAPES.sub(HIDDEN, text) if any(begin in low for begin in _SHAPE_BEGINS) else text


def _redact_line(line: str) -> str:
    """The line without the values that follow names of secrets."""
    low = line.lower()
    gives = "=" in line or ":" in line or "bearer" in low or "basic" in low
    if gives and any(word in low for word in _WORDS_BEFORE):
        for pattern in _NAMED:
            line = pattern.sub(_keep_name, line)
    return line


def _keep_name(match: re.Match[str]) -> str:
    return match["name"] + HIDDEN


# ---------------------------------------------------------------- names and values

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = frozenset(
    (
        "password",
        "passwords",
        "passwd",
        "passphrase",
        "pwd",
        "pw",
        "secret",
        "secrets",
        "credential",
        "credentials",
        "apikey",
        "token",
    )
)
_KEY_KINDS = frozenset(
    ("api", "access", "secret", "private", "auth", "signing", "encryption", "account", "master", "ssh", "license")
)
# Tokens of a vocabulary, and what is said about tokens or secrets rather than their value.
_PLAIN_WORDS = frozenset(
    ("pad", "eos", "bos", "unk", "sep", "cls", "mask", "special", "stop", "start", "end", "next", "max", "min")
)
_ABOUT = frozenset(("column", "columns", "name", "field", "count", "index", "ids", "type", "length", "size", "file", "path"))


def is_secret_name(name: str) -> bool:
    """Does a variable, parameter or key of this name hold a secret? "key" alone does not: it names columns as often."""
    words = [w.lower() for w in _WORDS.findall(name)]
    if not words or words[-1] in _ABOUT:
        return False
    for before, word in zip(["", *words], words, strict=False):
        if word in _SECRET_WORDS and not (word == "token" and before in _PLAIN_WORDS):
            return True
        if word in ("key", "keys") and before in _KEY_KINDS:
            return True
    return False


_OPAQUE = re.compile(r"[\w+/=.~-]{20,512}")


def looks_secret(text: str) -> bool:
    """Might this be a key though nothing says so? Long, one word, and made of letters of both cases and digits."""
    if _OPAQUE.fullmatch(text) is None or text.count("/") > 3 or "." in text:
        return False
    kinds = (str.islower, str.isupper, str.isdigit)
    return all(any(is_kind(c) for c in text) for is_kind in kinds) and len(set(text)) >= 12
