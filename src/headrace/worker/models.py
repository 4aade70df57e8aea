"""The runner of each model in a worker."""

from __future__ import annotations

from typing import Any

from headrace.contracts.model import StreamModel
from headrace.plan.nodes import Predict
from headrace.worker.batch_model import BatchRunner
from headrace.worker.isolated import IsolatedRunner
from headrace.worker.model_answers import ModelRunner
from headrace.worker.operators import Host


def model_runner(op: Predict, index: int, host: Host) -> ModelRunner:
    """The worker's runner of a model; constructs the model at first use."""
    runner = host.models.get(index)
    if runner is None:
        runner = _make(op, index, host) if op.group is None else IsolatedRunner(op, lambda: _make(op, index, host))
        host.models[index] = runner
    return runner


def _make(op: Predict, index: int, host: Host) -> ModelRunner:
    model = host.functions.get(index, op.model, op.name, op.inputs)
    if not _is_stream(model):
        return BatchRunner(model, op, index, host)
    from headrace.worker.stream_model import StreamRunner  # and asyncio, which takes 15 ms

    return StreamRunner(model, op, index)


def _is_stream(model: Any) -> bool:
    return isinstance(model, StreamModel) and not isinstance(model, type)
