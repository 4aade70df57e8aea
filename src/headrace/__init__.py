"""Headrace: offline batch inference. Every row's prediction, beside its columns, streamed over CPUs and GPUs.

    import headrace as hr

    run = (
        hr.read_parquet("photos/")
        .apply(hr.images.decode("image", resize=256, crop=224))
        .predict(Classifier, input="image", output="label")
        .write_parquet("out/")
    )

General layout, imports go down only:
    jobs        many runs in one program
    api         the public verbs and the session that wires the rest
    runtime     driver loop, committer, engine choice;  substrates: where workers live;  observe: what people see
    worker      what runs in a worker
    connectors  sources and sinks;  transforms, metrics, models
    plan        nodes, rules, stages, fingerprints;  scheduler, commit: pure state machines
    contracts   the Protocols that parts meet at
    core        words that all share
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headrace import metrics, models
    from headrace.api.dataset import Dataset
    from headrace.api.read import (
        from_arrow,
        from_items,
        from_pandas,
        from_ray_dataset,
        range,
        read_csv,
        read_images,
        read_json,
        read_parquet,
        read_text,
    )
    from headrace.api.streaming_split import SplitIterator
    from headrace.api.verify import Verification, verify
    from headrace.api.why import Trace, why
    from headrace.core.errors import (
        DataError,
        DestinationError,
        HeadraceError,
        InputChanged,
        InternalError,
        PlanError,
        StopConditionMet,
        StorageRefused,
        TransientError,
        UserCodeError,
        WorkerDied,
    )
    from headrace.jobs.job import Job, JobResult, JobsFailed
    from headrace.jobs.runner import run_jobs
    from headrace.observe.run import Run
    from headrace.transforms import images

__version__ = "0.1.0"

_READ = (
    "read_parquet",
    "read_csv",
    "read_json",
    "read_text",
    "read_images",
    "from_arrow",
    "from_pandas",
    "from_ray_dataset",
    "from_items",
    "range",
)
_ERRORS = (
    "HeadraceError",
    "PlanError",
    "UserCodeError",
    "DataError",
    "InputChanged",
    "DestinationError",
    "StopConditionMet",
    "StorageRefused",
    "TransientError",
    "WorkerDied",
    "InternalError",
)
# Loaded at first use: start-up time is a feature.
_PLACES = (
    {name: ("headrace.api.read", name) for name in _READ}
    | {name: ("headrace.core.errors", name) for name in _ERRORS}
    | {
        "Dataset": ("headrace.api.dataset", "Dataset"),
        "Job": ("headrace.jobs.job", "Job"),
        "JobResult": ("headrace.jobs.job", "JobResult"),
        "JobsFailed": ("headrace.jobs.job", "JobsFailed"),
        "Run": ("headrace.observe.run", "Run"),
        "SplitIterator": ("headrace.api.streaming_split", "SplitIterator"),
        "Trace": ("headrace.api.why", "Trace"),
        "Verification": ("headrace.api.verify", "Verification"),
        "run_jobs": ("headrace.jobs.runner", "run_jobs"),
        "verify": ("headrace.api.verify", "verify"),
        "why": ("headrace.api.why", "why"),
        "images": ("headrace.transforms.images", ""),
        "metrics": ("headrace.metrics", ""),
        "models": ("headrace.models", ""),
    }
)

__all__ = [
    "DataError",
    "Dataset",
    "DestinationError",
    "HeadraceError",
    "InputChanged",
    "InternalError",
    "Job",
    "JobResult",
    "JobsFailed",
    "PlanError",
    "Run",
    "SplitIterator",
    "StopConditionMet",
    "StorageRefused",
    "Trace",
    "TransientError",
    "UserCodeError",
    "Verification",
    "WorkerDied",
    "from_arrow",
    "from_items",
    "from_pandas",
    "from_ray_dataset",
    "images",
    "metrics",
    "models",
    "range",
    "read_csv",
    "read_images",
    "read_json",
    "read_parquet",
    "read_text",
    "run_jobs",
    "verify",
    "why",
]


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    module = importlib.import_module(place[0])
    value = getattr(module, place[1]) if place[1] else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
