"""Local paths where the working directory may have been removed."""

from __future__ import annotations

import os

from headrace.core.errors import PlanError


def working_directory() -> str:
    """That of this process; "" where it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def absolute(path: str) -> str:
    """From the root, "~" spelled out. Raises PlanError for a relative path where there is no working directory."""
    try:
        return os.path.abspath(os.path.expanduser(path))
    except FileNotFoundError:
        hint = "give an absolute path, or change to a directory that is there"
        raise PlanError(f"{path!r} leads nowhere: the working directory was removed", hint=hint) from None
