"""Names in a destination, relative to its root: where a run keeps its log and what else belongs to it.

Invariant: a name that comes out of a log or a receipt is used only after `check_file` has looked at it.
"""

from __future__ import annotations

import re

from headrace.core.errors import DestinationError
from headrace.core.receipts import OutputFile

PRIVATE = "_headrace"
SUCCESS = "_SUCCESS"
MANIFEST = "_manifest.json"

_RUN = re.compile(r"run-(\d{5,9})")
_STAGED = re.compile(r"([0-9]+)[-/]")  # the epoch, at the beginning of a file's name or as a folder
_PART = re.compile(r"part-(\d{2,9})-\d{6,}\.[a-z0-9.]+")
NO_SEGMENT = r"(^|/)\.{0,2}(/|\Z)"  # in a name: a segment that is empty, or of dots
_ODD = re.compile(rf"[\x00-\x1f\x7f]|{NO_SEGMENT}")


def run_name(generation: int) -> str:
    return f"run-{generation:05d}"


def generation_of(run: str) -> int:
    """The number of a run, -1 when it is not the name of one."""
    match = _RUN.fullmatch(run)
    return int(match[1]) if match is not None and run == run_name(int(match[1])) else -1


def output_generation(name: str) -> int:
    """The generation that a packed output belongs to by its name, -1 for any other file."""
    match = _PART.fullmatch(name)
    return int(match[1]) if match is not None else -1


def plan_name(run: str) -> str:
    return f"{PRIVATE}/{run}/plan.json"


def heartbeat_name(run: str) -> str:
    return f"{PRIVATE}/{run}/heartbeat.json"


def complete_name(run: str) -> str:
    """Written when a finished run's destination is all that it should be: manifest, marker, and nothing of an older run."""
    return f"{PRIVATE}/{run}/complete"


def log_folder(run: str) -> str:
    return f"{PRIVATE}/{run}/log"


def log_name(run: str, index: int) -> str:
    return f"{log_folder(run)}/{index:020d}.json"


def staging_folder(run: str) -> str:
    return f"{PRIVATE}/{run}/staging"


def staged_epoch(run: str, name: str) -> int:
    """The epoch that a staged file belongs to, -1 when its name says none."""
    match = _STAGED.match(name.removeprefix(staging_folder(run) + "/"))
    return int(match[1]) if match is not None else -1


def listing_name(run: str, first: int, digest: str) -> str:
    """The digest is part of it: what a session listed but never logged is in nobody's way."""
    return f"{PRIVATE}/{run}/listing/{first:010d}-{digest[:16]}.json.gz"


def quarantine_name(run: str, split: int, k: int) -> str:
    return f"{PRIVATE}/{run}/quarantine/{split:06d}-{k:04d}.parquet"


def lineage_name(run: str, split: int) -> str:
    return f"{PRIVATE}/{run}/lineage/{split:06d}.parquet"


def check_file(run: str, file: OutputFile) -> None:
    """Raise DestinationError unless the file stays in the places of its kind: below the root, and not in the way of the run."""
    if file.kind == "output":
        good = _plain(file.name) and file.name.split("/")[0] != PRIVATE and file.name not in (SUCCESS, MANIFEST)
    else:
        good = _plain(file.name) and file.name.startswith(f"{PRIVATE}/{run}/{file.kind}/")
    if not good:
        raise DestinationError(f"{file.name!r} can't be the name of a file of kind {file.kind}", where=(("run", run),))
    if file.staged and not (_plain(file.staged) and file.staged.startswith(staging_folder(run) + "/")):
        raise DestinationError(f"{file.staged!r} is no place for a staged file", where=(("run", run),))


def _plain(name: str) -> bool:
    """Relative, without empty or dot segments or control characters: it can't leave the root."""
    return not _ODD.search(name)
