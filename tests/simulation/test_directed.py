"""What a whole run must achieve, in virtual time: all workers busy, flat memory, bounded debt. The same every time."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from tests.simulation.cases import DEVICE, Case, Table, expected, make_splits, make_workers, on_nodes
from tests.simulation.harness import Simulation, run_checked, steps_of

from headrace.core.resources import CPU_POOL
from headrace.core.stages import End, Order
from headrace.core.steps import Apply
from headrace.scheduler.dispatch import FRONT_BLOCKS
from headrace.scheduler.messages import Limits
from headrace.substrates.simulated import SimulatedProgram, Work

MB = 1_000_000


def make_case(
    table: Table,
    rows: list[int],
    *,
    cpus: int,
    devices: int = 0,
    routes: tuple[tuple[int, ...], ...] = (),
    limits: Limits | None = None,
    consumer_s: float = 0.0,
) -> Case:
    pools = {CPU_POOL: cpus} | ({DEVICE: devices} if devices else {})
    plan = table.plan(pools, *routes)
    program = SimulatedProgram(plan.stages, table.works, free_s=1e-4)
    workers = make_workers(cpus, devices)
    return Case(plan, program, make_splits(rows), workers, limits or Limits(), consumer_s=consumer_s)


def images(cpu_s: float, device_s: float) -> Table:
    """Read and decode 107 images a block (16 MB) -> a model -> write. Seconds per image."""
    table = Table()
    table.add(Order.SOURCE, Work(1e-4, cpu_s, block_rows=107, row_bytes=150_000), transient=("pixels",))
    table.add(Order.FREE, Work(0.0, device_s, row_bytes=8), pool=DEVICE, model=True, keep=("id",))
    table.add(Order.SPLIT, Work(1e-3, 1e-5), end=End.SINK)
    return table


def took_s(case: Case) -> float:
    return Simulation(case, checked=False).run().substrate.now_s


@pytest.mark.parametrize(("cpu_s", "device_s"), [(1e-3, 1 / 300), (1e-3, 1 / 2000), (3e-3, 1 / 2000)])
def test_cpus_and_device_overlap(cpu_s: float, device_s: float) -> None:
    ideal = max(4000 * cpu_s / 2, 4000 * device_s)
    assert took_s(make_case(images(cpu_s, device_s), [1000] * 4, cpus=2, devices=1)) < 1.10 * ideal


def test_a_slow_device_is_never_idle_between_its_first_and_last_batch() -> None:
    done = Simulation(make_case(images(1e-3, 1 / 300), [1000] * 4, cpus=2, devices=1), checked=False).run()
    first_block_s = 1e-4 + 0.107
    assert done.substrate.now_s < first_block_s + 4000 / 300 + 0.1


def test_many_devices_are_fed_alike() -> None:
    done = Simulation(make_case(images(1e-3, 1e-3), [1000] * 64, cpus=16, devices=8), checked=False).run()
    assert done.substrate.now_s < 1.08 * 8.0
    each = [sum(b.rows for s in steps_of(done, 1) if s.worker == w for b in s.inputs) for w in range(16, 24)]
    assert sum(each) == 64_000
    assert max(each) < 1.15 * min(each)


@pytest.mark.parametrize("device_s", [2e-4, 1e-3, 3e-3])
def test_blocks_stay_on_their_node_where_that_costs_no_time(device_s: float) -> None:
    """However busy the devices are: of four nodes, a quarter of all blocks would be in place by chance."""
    case = make_case(images(1e-3, device_s), [1000] * 61, cpus=8, devices=4)
    anywhere = took_s(case)
    case = replace(case, workers=on_nodes(case.workers, 4))
    done = Simulation(case, checked=False).run()
    assert done.substrate.now_s < 1.03 * anywhere
    home = {worker.id: worker.node for worker in case.workers}
    read = [(p.bytes, p.node == home[s.worker]) for s in steps_of(done, 1) for b in s.inputs for p in b.parts]
    assert sum(size for size, near in read if near) > 0.6 * sum(size for size, _ in read)


def test_small_blocks_reach_the_device_as_batches() -> None:
    table = images(1e-4, 1 / 300)
    done = Simulation(make_case(table, [10] * 400, cpus=2, devices=1), checked=False).run()
    steps = [s for s in steps_of(done, 1) if isinstance(s, Apply)]
    assert sum(len(s.inputs) for s in steps) / len(steps) > 5, "blocks of 10 rows are gathered to batches of up to 256"


def shared(work_s: float, end: End) -> Table:
    """Reading apart from computing: a split is shared by all workers."""
    table = Table()
    table.add(Order.SOURCE, Work(1e-4, 1e-5, block_rows=100, row_bytes=100_000))
    table.add(Order.FREE, Work(1e-4, work_s, block_rows=100, row_bytes=100_000), end=end)
    if end is End.NEXT:
        table.add(Order.SPLIT, Work(1e-3, 1e-5), end=End.SINK)
    return table


@pytest.mark.parametrize("end", [End.NEXT, End.DELIVER])
@pytest.mark.parametrize("cpus", [2, 3, 4])
def test_all_workers_share_one_split(cpus: int, end: End) -> None:
    """The reader must not take up its own blocks while the others run dry."""
    ideal = 20_000 * 1e-3 / cpus
    assert took_s(make_case(shared(1e-3, end), [20_000], cpus=cpus)) < 1.10 * ideal


def test_delivery_in_order_keeps_all_workers_busy() -> None:
    table = Table()
    table.add(Order.SOURCE, Work(1e-4, 1e-3, block_rows=100, row_bytes=100_000))
    table.add(Order.FREE, Work(1e-4, 1e-3, block_rows=100, row_bytes=100_000), end=End.DELIVER)
    assert took_s(make_case(table, [2_000] * 16, cpus=4)) < 1.10 * 16 * 2_000 * 2e-3 / 4


def test_a_limit_far_away_does_not_hold_up_the_readers() -> None:
    table = Table()
    table.add(Order.SOURCE, Work(1e-4, 1e-3, block_rows=100, row_bytes=40_000))
    table.add(Order.GLOBAL, Work(1e-4, 1e-6), limit=1 << 30)
    table.add(Order.SPLIT, Work(1e-3, 1e-6), end=End.SINK)
    assert took_s(make_case(table, [2_000] * 16, cpus=4)) < 1.10 * 16 * 2_000 * 1e-3 / 4


def test_a_near_limit_reads_little() -> None:
    table = Table()
    table.add(Order.SOURCE, Work(1e-4, 1e-3, block_rows=100, row_bytes=10_000))
    table.add(Order.GLOBAL, Work(), limit=50, end=End.DELIVER)
    case = make_case(table, [2_000] * 1_000, cpus=4, limits=Limits(credit_bytes=1))
    done = run_checked(case, expected(case))
    assert len(steps_of(done, 0)) < 20


def test_memory_does_not_grow_with_the_input() -> None:
    def peak(splits: int) -> int:
        return Simulation(make_case(images(1e-3, 2e-3), [1000] * splits, cpus=4, devices=1), checked=False).run().peak

    assert peak(60) <= 1.10 * peak(6)


def test_memory_does_not_grow_while_the_consumer_sleeps() -> None:
    def peak(splits: int) -> int:
        case = make_case(shared(1e-4, End.DELIVER), [1_000] * splits, cpus=4, consumer_s=100.0)
        return Simulation(case, checked=False).run().peak

    assert peak(60) <= 1.10 * peak(20)
    assert peak(20) < 400 * MB


@pytest.mark.parametrize("end", [End.NEXT, End.DELIVER])
def test_debt_past_the_budget_is_a_few_blocks(end: End) -> None:
    """With no budget at all the oldest split's front goes on alone: a few blocks before each stage, and one step's output."""
    table = shared(1e-3, end)
    limits = Limits(budget_bytes=1, block_bytes=10 * MB, credit_bytes=8 * MB)
    case = make_case(table, [3_000] * 8, cpus=8, limits=limits)
    done = run_checked(case, expected(case))
    stages = len(table.stages)
    assert done.peak <= stages * (FRONT_BLOCKS + 2) * 10 * MB


def test_a_budget_is_kept_when_sizes_are_as_measured() -> None:
    limits = Limits(budget_bytes=100 * MB, block_bytes=16_050_000)
    done = Simulation(make_case(images(1e-3, 2e-3), [1070] * 20, cpus=8, devices=1, limits=limits), checked=False).run()
    assert done.peak <= 100 * MB + (FRONT_BLOCKS + 2) * 16_050_000


def test_expansion_into_two_models_stays_within_memory() -> None:
    """Videos: a row becomes 300 frames of 150 kB, 45 MB a row."""
    table = Table()
    table.add(Order.SOURCE, Work(1e-3, 1e-3, block_rows=4, row_bytes=1_000))
    table.add(Order.FREE, Work(1e-3, 3e-1, block_rows=100, row_bytes=150_000, expand=300), transient=("frame",))
    table.add(Order.FREE, Work(0.0, 1e-3, row_bytes=8), pool=DEVICE, model=True)
    table.add(Order.FREE, Work(0.0, 1e-3, row_bytes=8), pool=DEVICE, model=True, keep=("id",))
    table.add(Order.SPLIT, Work(1e-3, 1e-5), end=End.SINK)
    case = make_case(table, [8] * 3, cpus=4, devices=2, limits=Limits(budget_bytes=400 * MB))
    done = run_checked(case, expected(case))
    assert done.peak <= 400 * MB + 4 * 45 * MB


@pytest.mark.parametrize("rows", [0, 1, 99, 100, 101, 1_000, 5_000])
def test_limits_at_the_edges_of_blocks_and_splits(rows: int) -> None:
    table = Table()
    table.add(Order.SOURCE, Work(block_rows=50))
    table.add(Order.GLOBAL, Work(block_rows=30), limit=rows)
    table.add(Order.FREE, Work(), pool=DEVICE, model=True)
    table.add(Order.SPLIT, Work(), end=End.SINK)
    case = make_case(table, [100] * 10, cpus=3, devices=1)
    found = expected(case)
    assert sum(map(len, found.values())) == min(rows, 1_000)
    run_checked(case, found)
