"""More than a thousand seeded random runs, each checked after every event. A failure names its seed and how to run it alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from msgspec.structs import replace
from tests.simulation.cases import Case, expected, random_case
from tests.simulation.harness import Simulation, run_checked

from headrace.core.errors import BlockLost, TransientError, UserCodeError, WorkerDied
from headrace.scheduler.machine import FRACTION_ROWS, MOST_UNSTARTED
from headrace.substrates.simulated import HANG_S, SimulatedProgram, source_rows

CHUNKS = 9
SEEDS = 66  # per chunk
FAULTS = 15  # seeds per chunk that are run again with a fault
BULK = 12  # seeds per chunk, of fewer chunks
TROUBLES = 30  # seeds per chunk of runs with troubles, and of runs in several sessions


def run_seed(seed: int) -> None:
    case = random_case(seed)
    run_checked(case, expected(case))


def run_bulk(seed: int) -> None:
    """Stage after stage, with and without troubles: the output of a quiet run is that of any other."""
    case = random_case(seed)
    case = replace(case, limits=replace(case.limits, bulk=True))
    run_checked(case, expected(case))
    troubled = with_troubles(seed)
    Simulation(replace(troubled, limits=replace(troubled.limits, bulk=True))).run()


def run_fault(seed: int) -> None:
    """One step raises: Fail is said once, and nothing after it."""
    case = random_case(seed)
    steps = len(Simulation(case, checked=False).run().started)
    if not steps:
        return
    nth = Random(seed).randint(1, steps)
    failed = Simulation(replace(case, program=replace(case.program, fails=nth))).run()
    if failed.error is None:  # a limit was reached while the step ran: it counts for nothing
        assert failed.finished
        assert any(stage.limit is not None for stage in case.plan.stages)
        return
    assert isinstance(failed.error, UserCodeError)


def with_troubles(seed: int) -> Case:
    """A random case in which workers die, storage stumbles, rows fail, rows kill, and memory comes and goes."""
    case = random_case(seed)
    rnd = Random(seed + 7)
    works = dict(case.program.works)
    same = [(1, 2)] if len(case.plan.routes) > 1 else [(stage,) for stage in works]  # a row's way must not matter
    for stages in same:
        if rnd.random() < 0.3:
            bad = rnd.choice((2, 5, 17))
            works |= {stage: replace(works[stage], bad=bad) for stage in stages}
    if rnd.random() < 0.3 and case.splits:
        rows = list(source_rows(rnd.choice(case.splits)))
        poison = frozenset(rnd.sample(rows, min(len(rows), rnd.choice((1, 1, 2)))))
        works |= {stage: replace(works[stage], poison=poison) for stage in rnd.choice(same)}
    case = replace(case, program=replace(case.program, works=works), limits=replace(case.limits, fail_on_bad_rows=False))
    quiet = replace(case.program, works={stage: replace(work, poison=frozenset()) for stage, work in works.items()})
    steps = len(Simulation(replace(case, program=quiet), checked=False).run().started) + 1
    spread = max(1, steps // rnd.choice((1, 2, 5)))  # few enough that no split runs out of attempts by chance
    deaths = frozenset(rnd.randint(1, 2 * steps) for _ in range(min(rnd.choice((0, 1, 2, 5)), spread)))
    stumbles = frozenset(rnd.randint(1, 2 * steps) for _ in range(min(rnd.choice((0, 0, 1, 2)), spread))) - deaths
    program = replace(case.program, loses=deaths, tells=rnd.random() < 0.5, stumbles=stumbles)
    case = replace(case, program=program, pressure_s=rnd.choice((0.0, 0.0, 0.01, 0.1)))
    if rnd.random() < 0.3:
        case = replace(case, program=with_more(case, rnd, steps))
    if any(worker.node for worker in case.workers):
        case = replace(case, program=with_nodes(case.program, Random(seed + 17)))
    return case


def with_nodes(program: SimulatedProgram, rnd: Random) -> SimulatedProgram:
    """Nodes that come and go, workers that rest, and blocks that are lost."""

    def times(most: int) -> list[float]:
        return [rnd.random() * rnd.choice((0.01, 0.1, 1.0, 5.0)) for _ in range(rnd.randint(0, most))]

    return replace(
        program,
        leaves=tuple((at_s, rnd.choice((0.0, 0.1, 2.0))) for at_s in times(3)),
        joins=tuple(times(3)),
        rests=tuple((at_s, rnd.choice((0.001, 0.1, 3.0))) for at_s in times(4)),
        forgets=tuple(times(3)),
        news_s=rnd.choice((0.0, 0.01, 0.5)),
    )


def with_more(case: Case, rnd: Random, steps: int) -> SimulatedProgram:
    """Workers that hang, die while they have nothing to do, or never come up."""
    hangs = {rnd.randint(1, 2 * steps) for _ in range(rnd.choice((0, 1, 1)))} - case.program.stumbles
    kills = tuple(rnd.random() * rnd.choice((0.01, 0.1, 1.0, HANG_S)) for _ in range(rnd.choice((0, 1, 2))))
    unborn = {rnd.randint(1, len(case.workers) + 3) for _ in range(rnd.choice((0, 1, 2, MOST_UNSTARTED - 1)))}
    return replace(case.program, hangs=frozenset(hangs), kills=kills, unborn=frozenset(unborn))


def run_troubled(seed: int) -> None:
    """Whatever befalls the workers, the output is that of a run in which nothing happened."""
    case = with_troubles(seed)
    wanted = expected(case)
    if seed % 3 == 0:  # blocks may be lost on their way to the consumer
        case = replace(case, limits=replace(case.limits, frail_blocks=True))
    done = Simulation(case).run()
    if done.error is not None and gave_up(done):
        return
    run_checked(case, wanted)


def run_with_too_many_bad(seed: int) -> None:
    """As many bad rows as may be are no trouble, however often they are met again; one more is."""
    case = with_troubles(seed)
    if any(stage.limit is not None for stage in case.plan.stages):
        return  # bad rows behind the limit may be met before it is reached
    done = Simulation(case).run()
    if done.error is not None:
        assert gave_up(done)
        return
    tallies = [settle.tally for settle in done.settled.values()]
    bad, read = sum(t.bad for t in tallies), sum(t.rows_in for t in tallies)
    if not bad:
        return
    limits = [({"max_bad_rows": bad}, {"max_bad_rows": bad - 1})]
    if read < FRACTION_ROWS:  # looked at once, at the end
        limits.append(({"max_bad_fraction": (bad + 0.5) / read}, {"max_bad_fraction": (bad - 0.5) / read}))
    for enough, too_few in limits:
        run_checked(replace(case, limits=replace(case.limits, **enough)), expected(case))
        failed = Simulation(replace(case, limits=replace(case.limits, **too_few))).run()
        assert isinstance(failed.error, UserCodeError)
        assert "too many bad rows" in failed.error.message


def gave_up(done: Simulation) -> bool:
    """Chance may hit one split so often that the scheduler must take it for the split's fault."""
    counts = Counter(retry.index for retry in done.retries)
    return isinstance(done.error, WorkerDied | TransientError | BlockLost) and max(counts.values(), default=0) >= 2


def run_resumed(seed: int) -> None:
    """Sessions that drain, or whose driver dies at any event; the next goes on from what was settled."""
    case = with_troubles(seed)
    if case.delivers:
        return
    rnd = Random(seed + 13)
    wanted = expected(case)
    settled: dict[int, tuple[tuple[int, int], ...]] = {}
    published: dict[int, list[int]] = {}
    for session in range(40):
        last = session == 39
        crash = None if last else rnd.choice((None, rnd.randint(1, 60), rnd.randint(1, 400)))
        drain_s = None if last or crash is not None else rnd.choice((None, rnd.random() * 0.5, 0.0))
        if session > 5:  # chance has had its way
            none: frozenset[int] = frozenset()
            case = replace(case, program=replace(case.program, loses=none, hangs=none, kills=(), stumbles=none))
        part = Simulation(replace(case, settled=dict(settled), crash=crash, drain_s=drain_s, seed=seed + session)).run()
        if part.error is not None and not gave_up(part):
            raise part.error
        limited = any(stage.limit is not None for stage in case.plan.stages)
        for index, settle in part.settled.items():
            assert index not in settled
            if not settle.cancelled:
                assert not limited or settled.keys() == set(range(index)), "not the first splits are settled"
                settled[index] = settle.taken
                published[index] = part.published[index]
        if part.finished and not part.drained:
            break
    assert published == wanted


def _run_all(run: Callable[[int], None], seeds: range) -> None:
    for seed in seeds:
        try:
            run(seed)
        except Exception as error:
            module = "from tests.simulation.test_random import *"
            alone = f"PYTHONPATH=src:. python -c '{module}; {run.__name__}({seed})'"
            raise AssertionError(f"seed {seed}; alone: {alone}") from error


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_runs(chunk: int) -> None:
    _run_all(run_seed, range(chunk * SEEDS, (chunk + 1) * SEEDS))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_troubles(chunk: int) -> None:
    _run_all(run_troubled, range(chunk * TROUBLES, (chunk + 1) * TROUBLES))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_bad_rows(chunk: int) -> None:
    _run_all(run_with_too_many_bad, range(chunk * FAULTS, (chunk + 1) * FAULTS))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_sessions(chunk: int) -> None:
    _run_all(run_resumed, range(chunk * TROUBLES, (chunk + 1) * TROUBLES))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_faults(chunk: int) -> None:
    _run_all(run_fault, range(chunk * SEEDS, chunk * SEEDS + FAULTS))


@pytest.mark.parametrize("chunk", range(3))
def test_random_bulk(chunk: int) -> None:
    _run_all(run_bulk, range(chunk * BULK, (chunk + 1) * BULK))
