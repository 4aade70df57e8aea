"""Headrace by its public verbs, default options."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from suite.contract import Expand, Job, Loaded, Map, Model, Peer, Pipeline
from suite.peers.steps import out_of

PEER = Peer(
    "headrace",
    "Headrace",
    forms={
        "same": "the same functions, default options",
        "own": "its own decoders and adapters of models, default options",
        "bulk": "the same functions, each stage materialised before the next",
    },
    why_not=lambda pipelines, form, params: _why_not(pipelines[0], form),
)
METRICS = {"auc": "AUCROC", "logloss": "LogLoss"}


def _why_not(pipeline: Pipeline, form: str) -> str | None:
    if form == "own" and not any(step.own for step in pipeline.steps):
        return "has nothing of its own for it"
    if form == "bulk":
        from headrace.core.options import ActionOptions

        if "execution" not in ActionOptions.__annotations__:
            return "has no bulk execution in this version"
    return None


class Mapped:
    """A step as a function of a batch: what it makes beside what is carried."""

    def __init__(self, step: Map) -> None:
        self._step = step

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: values for name, values in batch.items() if name not in self._step.drops}
        return {**kept, **self._step(batch)}


class Expanded:
    """A generator, as one writes it who does not want all frames of a batch in memory at once."""

    def __init__(self, step: Expand) -> None:
        self._step = step

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        rows = len(next(iter(batch.values())))
        for at in range(0, rows, self._step.rows):
            part = {name: values[at : at + self._step.rows] for name, values in batch.items()}
            made, parents = self._step(part)
            yield {**{name: part[name][parents] for name in part if name not in self._step.drops}, **made}


class Predictor:
    """A model, constructed once per worker."""

    def __init__(self, model: Model) -> None:
        self._loaded = Loaded(model)

    def __call__(self, given: Any) -> Any:
        return self._loaded.predict(given)


def run(job: Job) -> dict[str, Any]:
    pipelines = job.pipelines
    more: dict[str, Any] = {"execution": "bulk"} if job.form == "bulk" else {}
    told: dict[str, Any] = {"metrics": {}, "spilled_bytes": 0}
    for pipeline, done in zip(pipelines, _runs(job, more), strict=True):
        told["metrics"] |= {name: float(done.metrics[name]) for name in pipeline.metrics}
        told["report"] = str(done)
        told["spilled_bytes"] += done.spilled_bytes
        if len(pipelines) == 1 and done.first_output_s is not None:
            told["first_at"] = time.time() - done.wall_s + done.first_output_s
    return told


def _runs(job: Job, more: Mapping[str, Any]) -> list[Any]:
    import headrace as hr

    pipelines = job.pipelines
    if len(pipelines) == 1:
        (only,) = pipelines
        outputs = "per_input" if only.per_input else "packed"
        return [dataset(only, job.form).write_parquet(job.out, outputs=outputs, progress="quiet", **more)]
    jobs = [hr.Job(dataset(p, job.form).write_parquet, out_of(job.out, pipelines, p), **more) for p in pipelines]
    return [result.run for result in hr.run_jobs(jobs, progress="quiet")]


def dataset(pipeline: Pipeline, form: str) -> Any:
    import headrace as hr

    ds = hr.read_parquet(pipeline.source)
    devices = 0
    for step in pipeline.steps:
        if isinstance(step, Model):
            ds = ds.predict(**_model(hr, step, form), **_device(step, pipeline, devices))
            ds = ds.drop(*step.drops) if step.drops else ds
            devices += step.device
        elif form == "own" and step.own.get("kind") == "decode":
            (column,), (output,) = step.reads, step.writes
            ds = ds.apply(hr.images.decode(column, resize=step.own["resize"], crop=step.own["crop"], output=output))
            ds = ds.drop(*step.drops)
        else:
            ds = ds.map_batches(Expanded(step) if isinstance(step, Expand) else Mapped(step))
    for name, (score, label) in pipeline.metrics.items():
        ds = ds.evaluate(**{name: getattr(hr.metrics, METRICS[name])(score, label)})
    return ds


def _model(hr: Any, model: Model, form: str) -> dict[str, Any]:
    """Arguments of predict."""
    given = model.input if isinstance(model.input, str) else list(model.input)
    kind = model.own.get("kind") if form == "own" else None
    if kind == "sklearn":
        made: dict[str, Any] = {
            "model": hr.models.Sklearn(model.own["path"], trust=True, method="predict_proba", positive=True)
        }
    elif kind == "xgboost":
        made = {"model": hr.models.XGBoost(model.own["path"])}
    elif kind == "sentence-transformer":
        made = {"model": hr.models.SentenceTransformers(model.own["path"], normalize=model.own["normalize"])}
    else:
        made = {"model": Predictor, "constructor_args": (model,)}
    return {**made, "input": given, "output": model.output}


def _device(model: Model, pipeline: Pipeline, before: int) -> dict[str, Any]:
    """A model on a simulated device says so; several models have a device each."""
    if not model.device:
        return {}
    if model.rate is None:
        return {"device": "cuda"}
    several = sum(m.device for m in pipeline.models) > 1
    return {"device": f"sim:{before}" if several else "sim", "replicas": model.devices if model.devices > 1 else "auto"}
