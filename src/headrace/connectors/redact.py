"""What messages and descriptions may say of storage: no keys, no tokens, no signatures, whoever put them into the text.

Beyond `core.redact`, which knows addresses: the credentials in force, headers, and what S3 sends back about signatures.
"""

from __future__ import annotations

import re

from headrace.connectors import environment
from headrace.core.redact import HIDDEN
from headrace.core.redact import redact as redact_addresses

_SIGNED = re.compile(r"(?i)([?&;](?:x-amz-[a-z0-9-]+|awsaccesskeyid|signature)=)[^&;\s'\"<>]*")
_KEY_ID = re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{12,}\b")
_HEADER = re.compile(r"(?i)(\b(?:authorization|x-amz-security-token)['\"]?\s*[:=]\s*)[^\r\n]*")
_ASSIGNED = re.compile(
    r"(?i)((?:aws_)?(?:secret_access_key|session_token|access_key_id|secretaccesskey|sessiontoken|accesskeyid)"
    r"['\"]?\s*[:=]\s*['\"]?)[^\s'\"<,;&]+"
)
_ELEMENT = re.compile(
    r"(?is)<(AWSAccessKeyId|StringToSign|SignatureProvided|StringToSignBytes|CanonicalRequest|CanonicalRequestBytes)>"
    r".*?(?:</\1>|\Z)"
)


def redact(text: str) -> str:
    """The text with user names, keys, tokens and signatures replaced by ***."""
    for secret in environment.secrets():
        text = text.replace(secret, HIDDEN)
    text = _ELEMENT.sub(lambda m: f"<{m[1]}>{HIDDEN}</{m[1]}>", text)
    for pattern in (_HEADER, _ASSIGNED, _SIGNED):
        text = pattern.sub(lambda m: f"{m[1]}{HIDDEN}", text)
    return _KEY_ID.sub(HIDDEN, redact_addresses(text))
