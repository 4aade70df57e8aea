"""reproduce(): one operator on one row, in this process, so that a crash happens before the eyes of whoever looks for it.

Rows that killed a worker are kept as `<operator's index>-<digest>.arrow`; the index is that of the optimised plan.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.core.errors import DataError, HeadraceError, PlanError
from headrace.core.redact import redact
from headrace.core.refs import Origin, Segment
from headrace.plan.nodes import FilterRows, FlatMap, MapBatches, MapRows, Op, Plan, Predict

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_CHARS = 200  # of a value

_NAME = re.compile(r"(\d{1,6})-\w+\.arrow")
_USER_CODE = (MapRows, FlatMap, FilterRows, MapBatches, Predict)


def reproduce(
    plan: Plan,
    sample_path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    deterministic: bool = False,
    tell: Callable[[str], None] | None = None,
) -> str:
    """Run the operator that a kept row killed on that row alone, and say what came of it: its rows, or the error.

    plan: the optimised plan (Prepared.physical.plan), whose operators have the indexes that rows are kept under. device: of a
    model. tell: what lines are said by, as they come; standard error by default. A fatal signal writes all threads' stacks to
    standard error before it ends the process.

    Raises PlanError for a name that is no kept row's, or an operator that the plan has not; DataError for a file that can't be
    read. What the user's code raises is told, not raised.
    """
    say = tell or _to_stderr
    path = Path(sample_path)
    op, index = _operator(plan.ops, path)
    batch = _row(path)
    said: list[str] = []

    def line(text: str) -> None:
        said.append(text)
        say(text)

    line(f"running {op.name} on the row of {path}:")
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        line(f"  {name}: {_shown(column[0])}")
    for text in _outcome(op, index, batch, str(path), device, deterministic):
        line(text)
    return "\n".join(said)


def _operator(ops: Sequence[Op], path: Path) -> tuple[Op, int]:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise PlanError(
            f"{path.name!r} is not the name of a kept row",
            where=(("file", str(path)),),
            hint="give a file <operator>-<digest>.arrow as the run named it",
        )
    index = int(match[1])
    if index >= len(ops) or not isinstance(ops[index], _USER_CODE):
        there = ", ".join(f"{i} {op.name}" for i, op in enumerate(ops) if isinstance(op, _USER_CODE)) or "none"
        raise PlanError(
            f"the row was kept for operator {index}, and the plan has no code of yours there",
            where=(("file", str(path)), ("operators with code of yours", there)),
            hint="run it with the program that the row is from",
        )
    return ops[index], index


def _row(path: Path) -> pa.RecordBatch:
    import pyarrow as pa

    try:
        with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as reader:
            batches = [b for b in reader if b.num_rows]
    except FileNotFoundError:
        raise DataError("the row's file is not there", where=(("file", str(path)),)) from None
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise DataError(f"the row can't be read: {problem}", where=(("file", str(path)),)) from None
    if len(batches) != 1 or batches[0].num_rows != 1:
        raise DataError(f"the file holds {sum(b.num_rows for b in batches)} rows, not one", where=(("file", str(path)),))
    return batches[0]


def _outcome(op: Op, index: int, batch: pa.RecordBatch, path: str, device: str, deterministic: bool) -> list[str]:
    """What the operator makes of the row: lines for its rows, or for the error."""
    from headrace.worker.batching import Piece
    from headrace.worker.operators import Counts, Host, make
    from headrace.worker.user_code import Functions

    host = Host(Functions(device), deterministic)
    began = not faulthandler.is_enabled()
    if began:
        _enable_faulthandler()
    try:
        operator = make(op, index, host, Counts())
        made = [*operator.push(Piece(batch, Origin((Segment(path, 0, 1),)))), *operator.finish()]
    except HeadraceError as error:
        return ["it raised:", *str(error).splitlines()]
    finally:
        for model in host.models.values():
            model.close()
        host.functions.close()
        if began:
            faulthandler.disable()
    rows = sum(piece.batch.num_rows for piece in made)
    lines = [f"it made {rows} {'row' if rows == 1 else 'rows'}, and the process is alive:"]
    for piece in made:
        if piece.batch.num_rows:
            lines += [f"  {n}: {_shown(c[0])}" for n, c in zip(piece.batch.schema.names, piece.batch.columns, strict=True)]
    return lines


def _enable_faulthandler() -> None:
    try:
        faulthandler.enable(all_threads=True)
    except (RuntimeError, ValueError, OSError):  # standard error is no file, as in a notebook or under capture
        faulthandler.enable(sys.__stderr__ or 2, all_threads=True)


def _shown(value: Any) -> str:
    """A value on a line, not too long."""
    import pyarrow as pa

    kind = value.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        data = value.as_py()
        return "null" if data is None else f"<{len(data)} bytes>"
    text = redact(repr(value.as_py()))
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + " ..."


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
