"""Each peer's own pinned environment, made on demand: `environments/<name>.txt` -> `.bench/<name>/`."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".bench"
LISTS = Path(__file__).parent / "environments"
OF_PROJECT = (
    "headrace",
    "pyarrow",
    "numpy",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
    "scikit-learn",
    "xgboost-cpu",
    "torch",
)
VERSIONS = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def python(name: str | None) -> str:
    """The interpreter of an environment, which is made when it is not there or its list has changed. None: the project's.

    Raises RuntimeError with pip's words when it can't be made.
    """
    if name is None:
        return sys.executable
    wanted = LISTS / f"{name}.txt"
    folder = KEPT / name
    found = folder / "bin" / "python"
    stamp = folder / ".made-of"
    digest = hashlib.sha256(wanted.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return str(found)
    print(f"suite: making the environment of {name}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    argv = [str(found), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(wanted)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the environment of {name} can't be made: {done.stderr.strip()[-600:]}")
    stamp.write_text(digest)
    return str(found)


def made(name: str | None) -> bool:
    return name is None or (KEPT / name / ".made-of").exists()


def versions(name: str | None) -> dict[str, str]:
    """Of the packages that the list names."""
    names: tuple[str, ...] = OF_PROJECT
    if name is not None:
        lines = (LISTS / f"{name}.txt").read_text().splitlines()
        names = tuple(m.group() for line in lines if (m := re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line.strip())))
    done = subprocess.run([python(name), "-c", VERSIONS, *names], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
