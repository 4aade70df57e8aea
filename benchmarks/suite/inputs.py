"""Inputs, kept by their parameters; references of outputs beside them; and a machine that has been touched before it is
timed.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suite.check import Reference
from suite.contract import Workload

VERSION = "1"  # of what makers make: change it when one of them changes
LAYOUT = ("row_group", "compression")  # parameters of every workload: its Parquet files written again with such row groups


def params_of(
    workload: Workload, *, size: str, variant: str = "", scale: int = 1, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All parameters of a run. Small size goes over the variant's where both name one."""
    params = {**workload.params, **workload.variants.get(variant, {}), **(more or {})}
    if size == "small":
        params |= {**workload.small, **(more or {})}
    params[workload.scaled] *= scale
    return params


def made(workload: Workload, params: Mapping[str, Any], kept: Path) -> Path:
    """The input's folder, made when it is not there."""
    of = {name: params[name] for name in (*workload.input_params, *LAYOUT) if name in params}
    name = workload.make.__module__.rpartition(".")[2].replace("_", "-")
    folder = kept / f"{name}-{_digest(of)}"
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        workload.make(folder, params)
        if any(name in params for name in LAYOUT):
            _lay_out(folder, params.get("row_group"), params.get("compression"))
        (folder / "made").write_text(json.dumps(of))
    return folder


def _lay_out(folder: Path, row_group: int | None, compression: str | None) -> None:
    """None: as it is."""
    import pyarrow.parquet as pq

    for path in sorted(folder.rglob("in/*.parquet")):
        before = pq.read_metadata(path).row_group(0)
        codec = compression or before.column(0).compression.replace("UNCOMPRESSED", "none")
        pq.write_table(pq.read_table(path), path, row_group_size=row_group or before.num_rows, compression=codec)


def reference(workload: Workload, params: Mapping[str, Any], folder: Path) -> Reference:
    """Of the output of this workload with these parameters. How quick a device is, or how many there are, changes no output."""
    of = {name: value for name, value in params.items() if name not in ("rate", "devices", "latency_s", "outputs")}
    return Reference(folder / "reference" / f"{workload.name}-{_digest(of)}")


def _digest(of: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([VERSION, dict(of)], sort_keys=True).encode()).hexdigest()[:10]


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("in/*.parquet"))


def warm(folder: Path, touch_bytes: int) -> None:
    """Input into the page cache, and free memory touched: a virtual machine returns what nobody uses, and takes seconds to get
    it back.
    """
    buffer = bytearray(1 << 20)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    if touch_bytes:
        with mmap.mmap(-1, touch_bytes) as memory:
            for at in range(0, touch_bytes, 4096):
                memory[at] = 1
