"""Run options: one frozen object passed down. Every default means "find out by yourself"."""

from __future__ import annotations

from typing import Literal, TypedDict

from msgspec import Struct

Engine = Literal["auto", "inline", "threads", "processes", "ray"]
Progress = Literal["auto", "line", "log", "quiet"]
Outputs = Literal["packed", "per_input"]
OnError = Literal["fail", "skip", "quarantine"]
Execution = Literal["streaming", "bulk"]


class RunOptions(Struct, frozen=True):
    """engine: where workers live. cpus: CPU workers (None: one per usable core). devices: accelerator names
    ("cuda:0", "sim:0"; None: what the machine has). memory_bytes: budget for blocks in flight (None: from the
    machine or its cgroup). progress: "line" in a terminal, "log" otherwise, "quiet" for nothing.
    on_error: what becomes of a row that fails: it ends the run, is left out, or is set aside with its reason. max_bad_rows,
    max_bad_fraction: more bad rows than that (of all rows read) end the run. timeout: seconds that a step may go without an
    answer before its worker is killed and the step tried again; None: as long as it is alive. take_over: stop another driver
    that is at work on the destination. execution: "streaming", or "bulk": a stage begins when the one before it has ended, for
    all rows, and what waits in between goes to disk beyond memory_bytes; for comparisons. address: of the Ray cluster for
    engine="ray" ("auto", "host:6379", "ray://host:10001", "local"); None: the connection that there is, else the cluster that
    RAY_ADDRESS or this machine names, else a new one here. cpus and devices are those of all nodes then.
    """

    engine: Engine = "auto"
    cpus: int | None = None
    devices: tuple[str, ...] | None = None
    memory_bytes: int | None = None
    progress: Progress = "auto"
    deterministic: bool = False
    on_error: OnError = "fail"
    max_bad_rows: int | None = None
    max_bad_fraction: float | None = None
    timeout: float | None = None
    take_over: bool = False
    execution: Execution = "streaming"
    address: str | None = None


class ActionOptions(TypedDict, total=False):
    """What every action accepts as keywords; see RunOptions."""

    engine: Engine
    cpus: int | None
    devices: tuple[str, ...] | list[str] | None
    memory_bytes: int | None
    progress: Progress
    deterministic: bool
    on_error: OnError
    max_bad_rows: int | None
    max_bad_fraction: float | None
    timeout: float | None
    take_over: bool
    execution: Execution
    address: str | None


class BlockLimits(Struct, frozen=True):
    """How a reader cuts blocks: at most target_bytes and max_rows, smaller where a split would make only a few.

    rows_multiple: cut at multiples of this many rows from the split's start, so that batches never straddle a block
    (1: anywhere). least_rows: no block is made smaller than this for the sake of sharing a split. per_input: a split is an
    input. inputs, index: how many inputs the split packs, and its number (set per split). Cuts depend on the input and these
    numbers alone.
    """

    target_bytes: int = 16 << 20
    max_rows: int = 65_536
    rows_multiple: int = 1
    least_rows: int = 1
    per_input: bool = False
    inputs: int = 1
    index: int = 0
