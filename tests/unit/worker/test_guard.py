from __future__ import annotations

import json

import numpy as np
import pyarrow as pa

from headrace.contracts.accumulator import Accumulator
from headrace.core.guards import guard_name, split_guards
from headrace.core.tensors import numpy_to_array, ragged_to_array
from headrace.worker.guard import OutputGuard


def test_what_is_no_number_is_counted_by_column() -> None:
    guard = OutputGuard()
    batch = pa.RecordBatch.from_pydict(
        {
            "p": pa.array([1.0, None, float("nan"), float("inf")]),
            "v": numpy_to_array(np.array([[0, np.nan], [np.nan, 1], [2, 3], [-np.inf, 4]], dtype=np.float32)),
            "r": ragged_to_array([np.array([np.nan]), np.array([1.0, 2.0]), np.array([]), np.array([3.0])]),
            "list": pa.array([[1.0, float("nan")], None, [], [2.0]]),
            "label": pa.array(["nan", "b", None, "inf"]),
            "n": pa.array([1, 2, 3, None]),
        }
    )
    state = guard.update(guard.zero(), batch)
    assert isinstance(guard, Accumulator)
    assert state == {"nan": {"p": 1, "v": 2, "r": 1, "list": 1}, "infinite": {"p": 1, "v": 1}}
    both = guard.merge(guard.fail(guard.zero(), 3, "b"), json.loads(json.dumps(guard.fail(state, 2, "a"))))
    assert both == {"nan": {"p": 1, "v": 2, "r": 1, "list": 1}, "infinite": {"p": 1, "v": 1}, "failed": 5, "why": "a"}


def test_nothing_wrong_is_nothing() -> None:
    guard = OutputGuard()
    assert guard.update(guard.zero(), pa.RecordBatch.from_pydict({"p": pa.array([1.0, None])})) == {}
    assert guard.merge({}, {}) == {}


def test_guards_have_the_names_of_their_operators() -> None:
    results = {"auc": 0.5, guard_name(1): {"failed": 1}, guard_name(2): {}, guard_name(3): {"failed": 2}}
    metrics, guards = split_guards(results, {1: "predict(a)", 2: "predict(b)", 3: "predict(a)"})
    assert metrics == {"auc": 0.5}
    assert guards == {"predict(a)": {"failed": 1}, "predict(a) (3)": {"failed": 2}}
