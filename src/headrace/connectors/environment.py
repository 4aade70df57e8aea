"""Settings from the process environment: S3's and those of ~/.aws, read the way AWS tools read them, and Headrace's own two.

The only file of the connectors that looks at `os.environ`. Nothing here connects to anything. Order of precedence for S3:
environment variables, then the profile (AWS_PROFILE, else "default") in ~/.aws/credentials and ~/.aws/config. What neither
names (web identity tokens, container and instance roles) the object store client finds by itself.
"""

from __future__ import annotations

import configparser
import os
from pathlib import Path
from typing import Any

from msgspec import Struct

from headrace.core.paths import absolute

_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_SKIP_SIGNATURE",
    "AWS_ALLOW_HTTP",
    "HOME",
)

LEAST_SECRET = 8  # characters

DEFAULT_REGION = "us-east-1"  # what S3-compatible servers expect when nobody names a region


def fingerprint() -> tuple[str | None, ...]:
    """The values that `s3_config` depends on; a cached client is good as long as they stay the same."""
    return tuple(os.environ.get(key) for key in _KEYS)


def s3_config() -> dict[str, Any]:
    """Keyword arguments for an S3 client, without the bucket."""
    env = os.environ
    profile = _profile(env.get("AWS_PROFILE") or "default")
    config: dict[str, Any] = {
        "region": env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or profile.get("region") or DEFAULT_REGION
    }
    endpoint = (
        env.get("AWS_ENDPOINT_URL_S3")
        or env.get("AWS_ENDPOINT_URL")
        or profile.get("endpoint_url_s3")
        or profile.get("endpoint_url")
    )
    if endpoint:
        config["endpoint"] = endpoint.rstrip("/")
        config["virtual_hosted_style_request"] = False  # custom servers rarely have a host name per bucket
        config["client_options"] = {"allow_http": endpoint.startswith("http://")}
    if not (env.get("AWS_ACCESS_KEY_ID") and env.get("AWS_SECRET_ACCESS_KEY")) and "aws_access_key_id" in profile:
        config["access_key_id"] = profile["aws_access_key_id"]
        config["secret_access_key"] = profile.get("aws_secret_access_key", "")
        if "aws_session_token" in profile:
            config["session_token"] = profile["aws_session_token"]
    return config


def secrets() -> tuple[str, ...]:
    """Values that must never appear in a message: the credentials in force."""
    found = {os.environ.get(key) for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")}
    profile = _profile(os.environ.get("AWS_PROFILE") or "default")
    found |= {profile.get(key) for key in ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")}
    # Shorter ones are test credentials such as "test", and words of messages.
    return tuple(sorted((s for s in found if s and len(s) >= LEAST_SECRET), key=len, reverse=True))


def _profile(name: str) -> dict[str, str]:
    """Settings of a profile, credentials file over config file; {} when neither has it."""
    out: dict[str, str] = {}
    config = Path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser()
    credentials = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    for file, section in ((config, name if name == "default" else f"profile {name}"), (credentials, name)):
        parser = configparser.RawConfigParser()
        try:
            parser.read(file)
        except (OSError, configparser.Error):
            continue
        if not parser.has_section(section):
            continue
        out.update(parser.items(section))
        services = out.get("services")
        if services and parser.has_section(f"services {services}"):
            out.update(_service_endpoint(parser.get(f"services {services}", "s3", fallback="")))
    return out


def _service_endpoint(block: str) -> dict[str, str]:
    """`endpoint_url` out of the indented lines under `s3 =` in a [services x] section."""
    for line in block.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "endpoint_url":
            return {"endpoint_url_s3": value.strip()}
    return {}


def ray_address() -> str | None:
    """The Ray cluster that this process's surroundings name."""
    return os.environ.get("RAY_ADDRESS") or None


def poison_row() -> str | None:
    """HEADRACE_REPRODUCE: the file of a row that killed a worker, to be run alone in this process instead of the run."""
    return os.environ.get("HEADRACE_REPRODUCE") or None


def model_cache() -> str:
    """The folder of downloaded models in that of `cache_folder`."""
    return os.path.join(cache_folder(), "models")


def cache_folder() -> str:
    """HEADRACE_CACHE, a folder for what is downloaded or found out, ~/.cache/headrace unless it is set."""
    root = os.environ.get("HEADRACE_CACHE") or os.path.join("~", ".cache", "headrace")
    return absolute(root)


class Torchrun(Struct, frozen=True):
    """What torchrun tells its workers. job: the same in all workers of one start of one job, and in no others that live."""

    rank: int
    world_size: int
    local_world_size: int
    job: str


def torchrun() -> Torchrun | None:
    """The torchrun job that this process is a rank of; None when it is none."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" not in env:
        return None
    try:
        rank, world, local = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    except (KeyError, ValueError):
        return None
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")  # an id may be just "none"
    return Torchrun(rank, world, local, "|".join(env.get(name, "") for name in names))
