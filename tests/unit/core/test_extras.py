"""Optional packages: what is said of a missing one, and values of one that is only half imported."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

import headrace as hr
from headrace.core import extras


def test_a_missing_package_is_refused_by_the_verb_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    rows = hr.range(3)
    with pytest.raises(hr.PlanError, match=r"headrace\[images\]"):
        hr.images.decode("image")
    for wrong in (
        lambda: rows.map_batches(len, batch_format="pandas"),
        lambda: rows.predict(len, batch_format="pandas"),
        lambda: rows.iter_batches(batch_format="pandas"),
        lambda: rows.to_pandas(),
    ):
        with pytest.raises(hr.PlanError, match=r"needs pandas.*\n.*headrace\[pandas\]"):
            wrong()
    with pytest.raises(hr.PlanError, match=r"headrace\[torch\]"):
        rows.iter_torch_batches()


def test_a_module_that_another_thread_is_importing_has_no_types_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    half = ModuleType("half_imported")
    monkeypatch.setitem(sys.modules, "half_imported", half)
    assert not extras.is_instance(3, "half_imported", "Frame")
    half.Frame = int  # type: ignore[attr-defined]
    assert extras.is_instance(3, "half_imported", "Frame")
    assert not extras.is_instance(3, "never_imported", "Frame")
