"""A conformance kit for models: what contracts/model.py promises, as assertions that a plug-in's author can run.

    from headrace.testing.check_model import check_model
    check_model(MyModel, batch, input=["image"], output="label")

Raises AssertionError that says which promise was broken, or what `predict` itself would raise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa

from headrace.core.refs import Origin, Segment
from headrace.plan.nodes import BatchFormat, Predict, UserFunction
from headrace.worker.formats import to_rows
from headrace.worker.model_answers import ModelRunner
from headrace.worker.models import model_runner
from headrace.worker.operators import Host, select
from headrace.worker.user_code import Functions


def check_model(
    model: Any,
    batch: pa.RecordBatch,
    *,
    input: str | Sequence[str] | None = None,
    output: str | Sequence[str] | None = None,
    batch_format: BatchFormat = "numpy",
    constructor_args: Sequence[Any] = (),
    constructor_kwargs: Mapping[str, Any] | None = None,
    device: str = "cpu",
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> pa.RecordBatch:
    """Check a model on a sample of at least two rows; returns its output columns. Arguments as for `Dataset.predict`.

    Promises: as many rows as given; only the input columns are needed; a row's answer depends neither on the rows beside it
    nor on the batch's size (floats within rtol and atol), nor on earlier calls; the model travels to workers by cloudpickle.
    """
    assert batch.num_rows >= 2, "a sample of one row can't show whether rows are independent"
    op = Predict(
        UserFunction(
            model,
            is_class=isinstance(model, type),
            ctor_args=tuple(constructor_args),
            ctor_kwargs=dict(constructor_kwargs or {}),
        ),
        (input,) if isinstance(input, str) else tuple(input or ()),
        isinstance(input, str),
        (output,) if isinstance(output, str) else tuple(output or ()),
        batch_rows=batch.num_rows,
        batch_format=batch_format,
    )
    given = select(batch, op.inputs or batch.schema.names, op.name)
    with _Worker(op, device) as runner:
        whole = _answer(runner, given)
        _equal(whole, _answer(runner, given), "a second call with the same rows", rtol, atol)
        half = batch.num_rows // 2
        parts = [_answer(runner, given.slice(0, half)), _answer(runner, given.slice(half))]
        _equal_rows(whole, parts, "the batch cut in two", rtol, atol)
        _equal_rows(whole, [_answer(runner, given.slice(i, 1)) for i in range(batch.num_rows)], "row by row", rtol, atol)
        backwards = _answer(runner, given.take(pa.array(range(batch.num_rows - 1, -1, -1))))
        _equal_rows(whole, [backwards.slice(i, 1) for i in range(batch.num_rows - 1, -1, -1)], "in reverse", rtol, atol)
    with _Worker(cloudpickle.loads(cloudpickle.dumps(op)), device) as shipped:
        _equal(whole, _answer(shipped, given), "after a trip through cloudpickle", rtol, atol)
    return whole


class _Worker:
    """The model as a worker holds it."""

    def __init__(self, op: Predict, device: str) -> None:
        self._op = op
        self._host = Host(Functions(device))
        self._runner: ModelRunner | None = None

    def __enter__(self) -> ModelRunner:
        self._runner = model_runner(self._op, 0, self._host)
        return self._runner

    def __exit__(self, *_: object) -> None:
        if self._runner is not None:
            self._runner.close()
        self._host.functions.close()


def _answer(runner: ModelRunner, batch: pa.RecordBatch) -> pa.RecordBatch:
    """The model's answer; that it has a row for each row is checked on the way."""
    (answer,) = runner.run([batch], [Origin((Segment("sample", 0, batch.num_rows),))])
    made = answer.made
    assert made is not None, "the model lost rows"
    assert made.num_columns, "the model made no output column"
    return made


def _equal_rows(whole: pa.RecordBatch, parts: Sequence[pa.RecordBatch], how: str, rtol: float, atol: float) -> None:
    names = {tuple(p.schema.names) for p in parts}
    assert names == {tuple(whole.schema.names)}, f"{how}: the output columns are {names}, not {whole.schema.names}"
    rows = [row for part in parts for row in to_rows(part)]
    _same_values(to_rows(whole), rows, how, rtol, atol)


def _equal(whole: pa.RecordBatch, other: pa.RecordBatch, how: str, rtol: float, atol: float) -> None:
    assert other.schema.equals(whole.schema), f"{how}: the output is {other.schema}, before it was {whole.schema}"
    _equal_rows(whole, [other], how, rtol, atol)


def _same_values(expected: list[dict[str, Any]], found: list[dict[str, Any]], how: str, rtol: float, atol: float) -> None:
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        for name in a:
            assert _close(a[name], b[name], rtol, atol), (
                f"{how}: row {i} of {name!r} is {b[name]!r}, in one batch it was {a[name]!r}; "
                "a model must treat every row by itself"
            )


def _close(a: Any, b: Any, rtol: float, atol: float) -> bool:
    if isinstance(a, (float, np.ndarray)) and b is not None:
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape:
            return False
        return bool(np.allclose(a, b, rtol, atol, equal_nan=True) if a.dtype.kind == "f" else np.array_equal(a, b))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_close(x, y, rtol, atol) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k], rtol, atol) for k in a)
    return a == b
