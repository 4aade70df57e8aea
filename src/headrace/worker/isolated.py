"""A model of a group: where bad rows are set aside, rows that it fails on get nulls, and keep what the others say of them.

So does every row when the model can't be loaded. Where a failure ends the run, nothing is different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from headrace.core.errors import HeadraceError
from headrace.core.refs import Origin
from headrace.plan.nodes import Predict
from headrace.worker.model_answers import Answer, ModelRunner
from headrace.worker.results import make_batch
from headrace.worker.tuning import FIRST_ROWS
from headrace.worker.watch import NOBODY, Watch


class IsolatedRunner(ModelRunner):
    """make: the runner of the model itself; raises HeadraceError when that can't be loaded."""

    def __init__(self, op: Predict, make: Callable[[], ModelRunner]) -> None:
        self._op = op
        self._make = make
        self._runner: ModelRunner | None = None
        self._unloadable = ""  # why
        self._schema: pa.Schema | None = None  # of its answers, as soon as there was one

    @property
    def wanted_rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return FIRST_ROWS if self._runner is None else self._runner.wanted_rows

    @property
    def step_rows(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 0 if self._runner is None else self._runner.step_rows

    def run(
        self,
        inputs: Sequence[pa.RecordBatch],
        origins: Sequence[Origin],
        part_bytes: int | None = None,
        watch: Watch = NOBODY,
        whole: pa.RecordBatch | None = None,
    ) -> Iterator[Answer]:
        runner = self._load(watch.tolerant)
        if runner is None:
            for i, batch in enumerate(inputs):
                yield Answer(i, batch.num_rows, self._nulls(batch.num_rows), failed=batch.num_rows, why=self._unloadable)
            return
        for answer in runner.run(inputs, origins, part_bytes, watch, whole):
            if answer.made is not None:
                self._schema = answer.made.schema
            yield self._filled(answer) if answer.lost else answer

    def begin(
        self, inputs: Sequence[pa.RecordBatch], origins: Sequence[Origin], watch: Watch, ready: Callable[[], None]
    ) -> bool:
        runner = self._load(watch.tolerant)
        return runner is not None and runner.begin(inputs, origins, watch, ready)

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()

    def _load(self, tolerant: bool) -> ModelRunner | None:
        if self._runner is None and not self._unloadable:
            try:
                self._runner = self._make()
            except HeadraceError as error:
                if not tolerant:
                    raise
                self._unloadable = error.message
        return self._runner

    def _filled(self, answer: Answer) -> Answer:
        """The answer with nulls for the rows that failed."""
        made = (
            self._nulls(answer.rows)
            if answer.made is None
            else _spread(answer.made, answer.rows, [at for at, _ in answer.lost])
        )
        why = min(failure.exception for _, failure in answer.lost)
        return Answer(answer.input, answer.rows, made, failed=len(answer.lost), why=why)

    def _nulls(self, rows: int) -> pa.RecordBatch:
        fields = self._schema if self._schema is not None else [pa.field(name, pa.null()) for name in self._op.output]
        return make_batch({field.name: pa.nulls(rows, field.type) for field in fields}, rows)


def _spread(made: pa.RecordBatch, rows: int, lost: Sequence[int]) -> pa.RecordBatch:
    """The rows of `made` in their places among `rows`, with nulls at `lost`."""
    there = np.ones(rows, dtype=bool)
    there[list(lost)] = False
    places = np.zeros(rows, dtype=np.int64)
    places[there] = np.arange(made.num_rows)
    return made.take(pa.array(places, mask=~there))
