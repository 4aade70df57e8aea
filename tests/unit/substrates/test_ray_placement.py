"""Which workers go on which nodes of a cluster. Pure: no cluster is there."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("ray")

from headrace.core.errors import PlanError
from headrace.core.resources import CPU_POOL, WAITING_POOL, WorkerSpec
from headrace.substrates.ray.placement import (
    LEAST_BUDGET,
    STORE_SHARE,
    Node,
    Shape,
    budget_bytes,
    leaving_a_reader,
    node_name,
    place,
    shape_of,
)

CPU = Shape("cpu", cpus=1.0)
GPU = Shape("cuda:0", gpus=1.0)


def node(name: str, **resources: float) -> Node:
    return Node(name, f"id-{name}", resources)


def counted(specs: tuple[WorkerSpec, ...]) -> dict[tuple[str, str], int]:
    """(pool, node) -> workers. Ids must be 0, 1, 2, ..."""
    assert [s.id for s in specs] == list(range(len(specs)))
    return dict(Counter((s.pool, s.node) for s in specs))


def shaped(pool: str, asked: dict[str, float], nodes: list[Node], **more: Any) -> Shape:
    return shape_of(pool, asked, nodes, **{"cpus": None, "replicas": 0, **more})


def test_a_cpu_worker_for_each_cpu_of_every_node() -> None:
    nodes = [node("a", CPU=2), node("b", CPU=3), node("g", GPU=1)]
    assert counted(place({CPU_POOL: CPU}, nodes)) == {(CPU_POOL, "a"): 2, (CPU_POOL, "b"): 3}


def test_devices_where_devices_are_fed_by_nodes_without() -> None:
    nodes = [node("a", CPU=2), node("g", GPU=2), node("h", CPU=1, GPU=1)]
    found = place({CPU_POOL: CPU, "cuda": GPU}, nodes)
    assert counted(found) == {(CPU_POOL, "a"): 2, (CPU_POOL, "h"): 1, ("cuda", "g"): 2, ("cuda", "h"): 1}
    assert {s.device for s in found} == {"cpu", "cuda:0"}


def test_cpus_bounds_cpu_workers_and_spreads_them() -> None:
    nodes = [node("a", CPU=8), node("b", CPU=8)]
    shape = shaped(CPU_POOL, {}, nodes, cpus=4)
    assert counted(place({CPU_POOL: shape}, nodes)) == {(CPU_POOL, "a"): 2, (CPU_POOL, "b"): 2}


def test_a_model_that_holds_cpus_leaves_at_least_one_for_reading() -> None:
    nodes = [node("g", CPU=4, GPU=4)]
    shape = shaped("cuda(CPU=1)", {"CPU": 1.0}, nodes)
    assert counted(place({CPU_POOL: CPU, "cuda(CPU=1)": shape}, nodes)) == {(CPU_POOL, "g"): 1, ("cuda(CPU=1)", "g"): 3}


def test_a_model_that_holds_all_cpus_leaves_a_reader_that_asks_for_none() -> None:
    nodes = [node("a", CPU=2)]
    asked = {CPU_POOL: CPU, "m": shaped("cpu(CPU=2)", {"CPU": 2.0}, nodes)}
    shapes = leaving_a_reader(asked, nodes, to_come=())
    assert shapes[CPU_POOL].wanted == {}
    assert counted(place(shapes, nodes)) == {(CPU_POOL, "a"): 1, ("m", "a"): 1}
    more = [node("a", CPU=3)]
    assert leaving_a_reader(asked, more, to_come=()) == asked
    assert counted(place(asked, more)) == {(CPU_POOL, "a"): 1, ("m", "a"): 1}
    assert leaving_a_reader(asked, nodes, to_come={"CPU"}) == asked, "it waits for one"
    assert leaving_a_reader(asked, [node("g", GPU=1)], to_come=()) == asked, "no model holds any"


def test_a_model_that_needs_a_whole_node_gets_it() -> None:
    nodes = [node("a", CPU=4), node("b", CPU=1)]
    shapes = {CPU_POOL: CPU, "m": shaped("cpu(CPU=4)", {"CPU": 4.0}, nodes)}
    assert leaving_a_reader(shapes, nodes, to_come=()) == shapes
    assert counted(place(shapes, nodes)) == {("m", "a"): 1, (CPU_POOL, "b"): 1}


@pytest.mark.parametrize("order", [("one", "four"), ("four", "one")])
def test_models_that_few_nodes_can_hold_find_their_place_first(order: tuple[str, ...]) -> None:
    nodes = [node("a", CPU=4), node("b", CPU=1)]
    each = {"one": Shape("cpu", cpus=1.0, most=1), "four": Shape("cpu", cpus=4.0)}
    found = place({pool: each[pool] for pool in order}, nodes)
    assert counted(found) == {("one", "b"): 1, ("four", "a"): 1}
    assert [s.pool for s in found] == list(order), "they are listed as in the plan"


@pytest.mark.parametrize("order", [("plain", "gpu"), ("gpu", "plain")])
def test_models_of_one_size_leave_devices_to_those_that_need_them(order: tuple[str, ...]) -> None:
    nodes = [node("g", CPU=1, GPU=1), node("c", CPU=1)]
    each = {"plain": Shape("cpu", cpus=1.0), "gpu": Shape("cuda:0", cpus=1.0, gpus=1.0)}
    assert counted(place({pool: each[pool] for pool in order}, nodes)) == {("plain", "c"): 1, ("gpu", "g"): 1}


def test_the_larger_of_two_that_fit_anywhere_comes_first() -> None:
    nodes = [node("a", CPU=4, memory=64e9), node("b", CPU=4, memory=64e9)]
    shapes = {
        "one": Shape("cpu", cpus=1.0, resources={"memory": 1e9}, most=1),
        "two": Shape("cpu", cpus=2.0, most=1),
        "three": Shape("cpu", cpus=3.0, most=1),
        "half": Shape("cpu", cpus=2.0, most=1),
    }
    assert counted(place(shapes, nodes)) == {("three", "a"): 1, ("two", "b"): 1, ("half", "b"): 1, ("one", "a"): 1}


def test_memory_is_set_aside_for_as_many_workers_as_there_are_cpus() -> None:
    nodes = [node("a", CPU=2, memory=16e9)]
    shape = shaped("cpu(memory=2e9)", {"memory": 2e9}, nodes)
    assert counted(place({CPU_POOL: CPU, "m": shape}, nodes)) == {(CPU_POOL, "a"): 2, ("m", "a"): 2}
    large = shaped("cpu(memory=1e10)", {"memory": 1e10}, nodes)
    assert counted(place({CPU_POOL: CPU, "m": large}, nodes))["m", "a"] == 1
    with pytest.raises(PlanError, match="20 GB of memory") as caught:
        place({"m": shaped("cpu(memory=2e10)", {"memory": 2e10}, nodes)}, nodes)
    assert "16 GB of memory" in caught.value.where[0][1]


def test_pools_take_turns_at_the_devices_that_both_need() -> None:
    nodes = [node("a", CPU=1), node("g", GPU=4)]
    found = counted(place({CPU_POOL: CPU, "cuda": GPU, "cuda:0": GPU}, nodes))
    assert found == {(CPU_POOL, "a"): 1, ("cuda", "g"): 2, ("cuda:0", "g"): 2}


def test_pools_share_one_device_by_fractions() -> None:
    nodes = [node("a", CPU=1), node("g", GPU=1)]
    half, quarter = shaped("cuda(GPU=0.5)", {"GPU": 0.5}, nodes), shaped("cuda(GPU=0.25)", {"GPU": 0.25}, nodes)
    assert counted(place({CPU_POOL: CPU, "h": half}, nodes)) == {(CPU_POOL, "a"): 1, ("h", "g"): 2}
    both = counted(place({CPU_POOL: CPU, "h": half, "q": quarter}, nodes))
    assert both == {(CPU_POOL, "a"): 1, ("h", "g"): 1, ("q", "g"): 2}


def test_a_fraction_does_not_straddle_devices() -> None:
    """Ray sets no 0.6 of a device aside from what is left of two: only one such worker goes on each."""
    nodes = [node("a", CPU=1), node("g", GPU=3)]
    shape = shaped("cuda(GPU=0.6)", {"GPU": 0.6}, nodes)
    assert counted(place({CPU_POOL: CPU, "big": shape}, nodes))["big", "g"] == 3


def test_two_pools_whose_fractions_do_not_fit_beside_each_other() -> None:
    nodes = [node("a", CPU=1), node("g", GPU=1)]
    large, small = Shape("cuda:0", gpus=0.75), Shape("cuda:0", gpus=0.5)
    with pytest.raises(PlanError, match="small"):
        place({CPU_POOL: CPU, "large": large, "small": small}, nodes)


def test_more_replicas_than_devices_share_them() -> None:
    nodes = [node("a", CPU=1), node("g", GPU=2)]
    shape = shaped("cuda", {}, nodes, replicas=4)
    assert shape.gpus == 0.5
    assert counted(place({CPU_POOL: CPU, "cuda": shape}, nodes))["cuda", "g"] == 4


def test_fewer_replicas_than_devices() -> None:
    nodes = [node("a", CPU=1), node("g", GPU=2), node("h", GPU=2)]
    shape = shaped("cuda", {}, nodes, replicas=3, capped=True)
    found = counted(place({CPU_POOL: CPU, "cuda": shape}, nodes))
    assert (found["cuda", "g"], found["cuda", "h"]) == (2, 1)


def test_a_model_with_few_replicas_beside_one_that_takes_all_devices() -> None:
    nodes = [node("a", CPU=1), node("g", GPU=3)]
    shape = shaped("cuda", {}, nodes, replicas=2, capped=False)
    assert counted(place({CPU_POOL: CPU, "cuda": shape}, nodes))["cuda", "g"] == 3


def test_whole_devices_and_shares_of_them() -> None:
    nodes = [node("a", CPU=1), node("g", GPU=3)]
    two, half = Shape("cuda:0", gpus=2.0, most=1), Shape("cuda:0", gpus=0.5)
    found = counted(place({CPU_POOL: CPU, "half": half, "two": two}, nodes))
    assert (found["two", "g"], found["half", "g"]) == (1, 2)


def test_custom_resources_bind_a_pool_to_its_node() -> None:
    nodes = [node("a", CPU=2), node("l", license=3)]
    shape = shaped("cpu(license=1)", {"license": 1.0}, nodes)
    assert shape == Shape("cpu", resources={"license": 1.0})
    assert counted(place({CPU_POOL: CPU, "l": shape}, nodes)) == {(CPU_POOL, "a"): 2, ("l", "l"): 3}
    few = shaped("cpu(license=1)", {"license": 1.0}, nodes, replicas=2, capped=True)
    assert counted(place({CPU_POOL: CPU, "l": few}, nodes))["l", "l"] == 2


def test_simulated_devices_are_counted_where_a_node_has_them() -> None:
    with_sim = [node("a", CPU=1), node("s", sim=2)]
    assert counted(place({CPU_POOL: CPU, "sim": shaped("sim", {}, with_sim)}, with_sim))["sim", "s"] == 2
    without = [node("a", CPU=1)]
    assert counted(place({CPU_POOL: CPU, "sim": shaped("sim", {}, without, replicas=3)}, without))["sim", "a"] == 3


def test_models_that_wait_have_as_many_workers_as_there_are_cpus() -> None:
    nodes = [node("a", CPU=1), node("b", CPU=2)]
    shape = shaped(WAITING_POOL, {}, nodes)
    assert sum(n for (pool, _), n in counted(place({CPU_POOL: CPU, WAITING_POOL: shape}, nodes)).items() if pool != "cpu") == 3


# ---------------------------------------------------------------- nodes that join, nodes that are to come


def test_a_new_node_gets_what_fits_there() -> None:
    new = [node("n", CPU=2, GPU=1)]
    have = {CPU_POOL: 4, "cuda": 1}
    found = place({CPU_POOL: CPU, "cuda": GPU}, new, have=have)
    assert counted(found) == {(CPU_POOL, "n"): 2, ("cuda", "n"): 1}
    assert counted(place({CPU_POOL: CPU, "cuda": GPU}, [node("n", CPU=2)], have=have)) == {(CPU_POOL, "n"): 2}


def test_a_new_node_gets_nothing_when_there_are_enough() -> None:
    shapes = {CPU_POOL: Shape("cpu", cpus=1.0, most=4), "cuda": Shape("cuda:0", gpus=1.0, most=2)}
    new = [node("n", CPU=8, GPU=8)]
    assert place(shapes, new, have={CPU_POOL: 4, "cuda": 2}) == ()
    assert counted(place(shapes, new, have={CPU_POOL: 3, "cuda": 1})) == {(CPU_POOL, "n"): 1, ("cuda", "n"): 1}


@pytest.mark.parametrize("most", [1, None])
def test_where_nobody_reads_a_reader_comes_before_models(most: int | None) -> None:
    shapes = {CPU_POOL: CPU, "m": Shape("cpu", cpus=1.0, most=most)}
    nodes = [node("b", CPU=1), node("c", CPU=1)]
    found = place(shapes, nodes, have={CPU_POOL: 0, "m": 1}, held={"b": ["m"]})
    assert counted(found) == {(CPU_POOL, "c"): 1}


def test_a_model_at_its_bound_takes_no_room_from_readers() -> None:
    shapes = {CPU_POOL: CPU, "m": Shape("cpu", cpus=1.0, most=1)}
    assert counted(place(shapes, [node("c", CPU=1)], have={CPU_POOL: 1, "m": 1})) == {(CPU_POOL, "c"): 1}


def test_a_bound_that_cpus_set_counts_a_new_nodes_own() -> None:
    shapes = {"m": Shape("cpu", resources={"memory": 1e9})}
    new = node("c", CPU=2, memory=16e9)
    assert counted(place(shapes, [new], have={"m": 4})) == {("m", "c"): 2}
    assert place(shapes, [new], have={"m": 6}, held={"c": ["m", "m"]}) == ()


def test_a_pool_whose_node_is_to_come_waits_for_it() -> None:
    nodes = [node("a", CPU=1)]
    found = place({CPU_POOL: CPU, "cuda": GPU}, nodes, to_come={"GPU", "CPU"})
    assert counted(found) == {(CPU_POOL, "a"): 1, ("cuda", ""): 1}


def test_an_empty_cluster_that_will_grow() -> None:
    assert counted(place({CPU_POOL: CPU}, [], to_come={"CPU"})) == {(CPU_POOL, ""): 1}


def test_a_pool_that_no_node_can_ever_hold() -> None:
    nodes = [node("a", CPU=4), node("g", GPU=1)]
    with pytest.raises(PlanError, match="it needs 2 GPU") as caught:
        place({CPU_POOL: CPU, "cuda": Shape("cuda:0", gpus=2.0)}, nodes)
    assert ("node", "g: 1 GPU") in caught.value.where
    with pytest.raises(PlanError, match="1 CPU, 1 license"):
        place({CPU_POOL: CPU, "l": Shape("cpu", cpus=1.0, resources={"license": 1.0})}, nodes, to_come={"CPU"})


def test_no_resource_is_handed_out_twice() -> None:
    nodes = [node("a", CPU=3, GPU=2, license=1), node("b", CPU=1, GPU=1)]
    shapes = {
        CPU_POOL: CPU,
        "x": Shape("cuda:0", cpus=1.0, gpus=0.5),
        "y": Shape("cuda:0", gpus=0.25),
        "z": Shape("cpu", resources={"license": 0.5}),
    }
    found = place(shapes, nodes)
    for where in nodes:
        for name, there in where.resources.items():
            used = sum(shapes[s.pool].wanted.get(name, 0.0) for s in found if s.node == where.name)
            assert used <= there + 1e-9, (where.name, name)
    assert {s.pool for s in found} == set(shapes)


# ---------------------------------------------------------------- memory, names


def test_the_smallest_store_sets_the_share_of_all() -> None:
    nodes = [Node("a", "1", {}, 1 << 30), Node("b", "2", {}, 4 << 30)]
    assert budget_bytes(nodes) == int(STORE_SHARE * 2 * (1 << 30))
    assert budget_bytes([Node("a", "1", {}, 1 << 20)]) == LEAST_BUDGET


def test_nodes_of_one_host_have_names_of_their_own() -> None:
    assert node_name("10.0.0.3", "1a2b3c4d5e6f") == "10.0.0.3/1a2b3c4d"
