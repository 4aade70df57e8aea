"""Copies of live objects: what they write to is their own."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from headrace.core.own_copy import own_copy

KEPT: dict[str, Any] = {}


def remember(value: Any) -> None:
    KEPT["value"] = value


class Holder:
    def __init__(self) -> None:
        kept: list[int] = []
        count = 0

        def add(x: int) -> int:
            nonlocal count
            count += x
            kept.append(x)
            return count

        self.add, self.seen = add, lambda: (count, kept, self)
        self.remember, self.again = remember, self.add


def test_closures_are_copied_with_the_cells_they_share() -> None:
    one = Holder()
    one.add(1)
    two = own_copy(one)
    assert type(two) is Holder
    assert two.add is two.again
    assert two.add is not one.add
    two.add(2)
    assert two.seen() == (3, [1, 2], two)
    assert one.seen() == (1, [1], one)
    assert two.remember is remember


def test_a_function_that_calls_itself_and_one_with_defaults() -> None:
    kept: list[int] = []

    def count(n: int, into: list[int] = kept) -> None:
        into.append(n)
        if n:
            count(n - 1)

    other = own_copy({"f": count, "kept": kept})
    other["f"](2)
    assert other["kept"] == [2, 1, 0]
    assert kept == []


def test_arrays_are_copied_and_locks_can_not_be() -> None:
    array = np.zeros(3)
    other = own_copy([array, array])
    other[0][0] = 1
    assert other[1][0] == 1
    assert array[0] == 0
    with pytest.raises(TypeError, match="lock"):
        own_copy(threading.Lock())


@pytest.mark.parametrize("weights", [False, True])
def test_modules_share_parameters_and_nothing_else(weights: bool) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.BatchNorm1d(3)
    net.tied, net.scratch = net.weight, torch.zeros(4)
    net.half = net.scratch[:2]
    net.register_forward_hook(lambda module, args, out: setattr(net, "kept", out))
    other = own_copy(net, weights=weights)
    assert (other.weight is net.weight) is not weights
    assert other.tied is other.weight
    other.half.add_(1)
    assert other.scratch.tolist() == [1, 1, 0, 0]
    assert net.scratch.tolist() == [0, 0, 0, 0]
    other(torch.ones(2, 3))
    assert not hasattr(net, "kept")
    assert other.kept.shape == (2, 3)
    assert net.num_batches_tracked == 0
    assert other.weight.requires_grad
