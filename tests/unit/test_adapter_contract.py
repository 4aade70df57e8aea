"""What the engine does with a ModelAdapter, shown with a plain one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import headrace as hr
from headrace.contracts.model import ModelAdapter, Place


@dataclass(frozen=True)
class Scale:
    factor: float
    devices = ("cpu",)
    streams = False
    batch_format = "pyarrow"

    @property
    def name(self) -> str:
        return f"Scale({self.factor:g})"

    def check(self, schema: pa.Schema | None, inputs: tuple[str, ...]) -> None:
        if schema is not None and not pa.types.is_floating(schema.field(inputs[0]).type):
            raise hr.PlanError(f"{self.name} needs floats", hint="cast")

    def meaning(self) -> Mapping[str, Any]:
        return {"factor": self.factor}

    def load(self, place: Place) -> Any:
        column = place.inputs[0]

        def call(batch: pa.Table) -> Any:
            return np.asarray(batch[column]) * self.factor

        return call


def test_an_adapter_is_loaded_and_called() -> None:
    assert isinstance(Scale(2.0), ModelAdapter)
    ds = hr.from_arrow(pa.table({"x": [1.0, 2.0]})).predict(Scale(2.0), input=["x"], output="y")
    assert "Scale(2)" in repr(ds)
    assert [row["y"] for row in ds.take(engine="inline", progress="quiet")] == [2.0, 4.0]


def test_what_can_not_work_is_refused_before_the_run() -> None:
    ds = hr.from_arrow(pa.table({"x": ["a"]})).predict(Scale(2.0), input=["x"], output="y")
    with pytest.raises(hr.PlanError, match="needs floats"):
        ds.take(engine="inline", progress="quiet")


def test_what_an_adapter_means_is_part_of_the_run(tmp_path: Path) -> None:
    ds = hr.from_arrow(pa.table({"x": [1.0]}))
    ds.predict(Scale(2.0), input=["x"], output="y").write_parquet(str(tmp_path), engine="inline", progress="quiet")
    again = ds.predict(Scale(2.0), input=["x"], output="y").write_parquet(str(tmp_path), engine="inline", progress="quiet")
    assert again.already_done
    with pytest.raises(hr.DestinationError, match="predict"):
        ds.predict(Scale(3.0), input=["x"], output="y").write_parquet(str(tmp_path), engine="inline", progress="quiet")
