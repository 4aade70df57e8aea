"""Program: all that a worker needs to know of a run. Shipped once to each worker, by cloudpickle."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from headrace.contracts.sink import Sink
from headrace.contracts.source import Source
from headrace.core.carried import Carried
from headrace.core.options import BlockLimits, OnError
from headrace.core.stages import Stage
from headrace.plan.nodes import Op
from headrace.worker.readahead import Ahead
from headrace.worker.tried import Tried


class Program(Struct, frozen=True):
    """ops: the plan's operators; a stage runs ops[stage.first:stage.stop]. sink: None when blocks are delivered.

    out_schema: what blocks are cast to before the sink, field by field where it is safe; None when not known before the run.
    on_error: what becomes of rows that fail. carried: columns that the sink takes from the source, None for none. ahead: what
    the workers of a process have begun to read for each other. tried: what choosing the engine has constructed already.
    """

    source: Source
    ops: tuple[Op, ...]
    stages: tuple[Stage, ...]
    sink: Sink | None = None
    limits: BlockLimits = field(default_factory=BlockLimits)
    deterministic: bool = False
    out_schema: Any = None
    sys_path: tuple[str, ...] = field(default=())
    on_error: OnError = "fail"
    carried: Carried | None = None
    ahead: Ahead = field(default_factory=Ahead)
    tried: Tried = field(default_factory=Tried)

    @property
    def divisible(self) -> bool:
        """May its splits be of any size? Not where each is an output, or has to be the same in every run."""
        return self.sink is not None and not self.sink.per_input and not self.deterministic
