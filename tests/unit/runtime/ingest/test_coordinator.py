"""The coordinator alone: who is in which epoch, and which rows are whose."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.errors import DataError, PlanError
from headrace.runtime.ingest.coordinator import AHEAD, Answer, Begin, Coordinator, Piece, Place, Stop, Took


def reading(ranks: int, *, equal: bool) -> Coordinator:
    """All ranks in epoch 1; the ticket of each is its rank + 1."""
    made = Coordinator(ranks, equal=equal)
    for rank in range(ranks):
        assert made.commands() == []
        made.join(rank + 1, rank)
    assert made.commands() == [Begin(1)]
    return made


def rows_of(piece: Any) -> list[tuple[Any, int]]:
    assert isinstance(piece, Piece)
    return [(piece.block, piece.start + i) for i in range(piece.rows)]


def drain(made: Coordinator, tickets: list[int]) -> dict[int, list[tuple[Any, int]]]:
    """What each gets until it has to wait, or the end; in turns."""
    got: dict[int, list[tuple[Any, int]]] = {t: [] for t in tickets}
    asking = list(tickets)
    while asking:
        for ticket in list(asking):
            answer = made.take(ticket)
            if isinstance(answer, Piece):
                got[ticket] += rows_of(answer)
            elif answer is Answer.END or all(made.take(t) is Answer.WAIT for t in asking):
                asking.remove(ticket)
    return got


def test_an_epoch_begins_when_all_have_joined_and_the_run_before_has_ended() -> None:
    made = reading(2, equal=False)
    assert made.place(1) is Place.READING
    made.leave(1)
    made.join(3, 0)
    assert made.place(3) is Place.WAITING
    assert made.take(3) is Answer.WAIT
    assert made.missing() == [1]
    made.leave(2)
    made.join(4, 1)
    assert made.commands() == [Stop()]
    made.ended()
    assert made.commands() == [Begin(2)]
    assert made.place(3) is made.place(4) is Place.READING
    assert made.missing() == []


def test_a_second_consumer_of_a_rank_is_refused() -> None:
    made = Coordinator(2, equal=False)
    made.join(1, 0)
    with pytest.raises(PlanError, match=r"rank 0 .* waits for its epoch to begin in another consumer"):
        made.join(2, 0)
    made.join(3, 1)
    with pytest.raises(PlanError, match=r"rank 1 .* is being read in another consumer"):
        made.join(4, 1)
    with pytest.raises(PlanError, match="no rank 2 in a split of 2"):
        made.join(5, 2)


def test_one_that_leaves_at_the_barrier_is_waited_for_again() -> None:
    made = Coordinator(2, equal=False)
    made.join(1, 0)
    made.leave(1)
    made.join(2, 1)
    assert made.commands() == []
    assert made.place(1) is Place.AWAY
    made.join(3, 0)
    assert made.commands() == [Begin(1)]


def test_blocks_go_to_whoever_asks_first() -> None:
    made = reading(2, equal=False)
    for block in "abc":
        made.arrived(block, 10)
    assert made.commands() == []
    assert made.take(2) == Piece("a", 0, 10)
    assert made.take(2) == Piece("b", 0, 10)
    assert made.commands() == [Took(1), Took(1)]
    assert made.take(1) == Piece("c", 0, 10)
    assert made.take(1) is Answer.WAIT
    made.ended()
    assert made.take(1) is made.take(2) is Answer.END
    assert made.place(1) is made.place(2) is Place.AWAY


def test_what_did_not_reach_its_consumer_goes_to_another() -> None:
    made = reading(2, equal=False)
    made.arrived("a", 10)
    piece = made.take(1)
    assert isinstance(piece, Piece)
    made.commands()
    made.leave(1)
    made.give_back(1, piece)
    assert made.commands() == [Took(-1)]
    made.ended()
    assert made.take(2) == piece
    made.join(3, 0)
    assert made.take(2) is Answer.END
    made.join(4, 1)
    made.give_back(1, piece)  # of an epoch that is over
    made.ended()
    assert made.take(4) is Answer.END


def test_equal_portions_are_ranges_of_blocks_and_the_rest_goes_on() -> None:
    made = reading(3, equal=True)
    made.arrived("a", 5)  # one each, two left
    made.arrived("b", 2)  # with those: one each, one left
    made.ended()
    assert drain(made, [1, 2, 3]) == {1: [("a", 0), ("a", 3)], 2: [("a", 1), ("a", 4)], 3: [("a", 2), ("b", 0)]}


def test_with_equal_one_that_is_behind_holds_the_run_back() -> None:
    made = reading(2, equal=True)
    for block in range(10):
        made.arrived(block, 4)
    assert made.commands() == [Took(1)] * AHEAD
    while isinstance(made.take(1), Piece):
        pass
    assert made.commands() == []
    assert made.take(1) is Answer.WAIT, "it has had all that there is before the other one takes something"
    made.ended()
    assert made.take(1) is Answer.WAIT
    assert isinstance(made.take(2), Piece)
    assert made.commands() == [Took(1)]
    assert isinstance(made.take(1), Piece)


def test_one_that_was_behind_and_leaves_lets_the_others_go_on() -> None:
    made = reading(2, equal=True)
    for block in range(5):
        made.arrived(block, 2)
    made.ended()
    made.leave(2)
    assert drain(made, [1])[1] == [(block, 0) for block in range(5)]
    assert made.held == []


def test_the_run_is_stopped_when_all_have_left_and_what_comes_then_is_let_go() -> None:
    made = reading(2, equal=True)
    made.arrived("a", 10)
    made.leave(1)
    made.leave(1)
    assert Stop() not in made.commands()
    made.leave(2)
    assert made.commands() == [Stop()]
    assert made.held == []
    made.arrived("b", 10)
    assert made.commands() == [Took(1)]
    assert made.held == []


@pytest.mark.parametrize("equal", [True, False])
def test_an_error_reaches_all_that_read_and_the_next_epoch_is_a_new_one(equal: bool) -> None:
    made = reading(2, equal=equal)
    made.arrived("a", 10)
    made.ended(DataError("broken"))
    for ticket in (1, 2):
        with pytest.raises(DataError, match="broken"):
            made.take(ticket)
        assert made.take(ticket) is Answer.END
    made.commands()
    made.join(3, 0)
    made.join(4, 1)
    assert made.commands() == [Begin(2)]
    made.ended()
    assert made.take(3) is Answer.END


def test_an_error_after_all_have_left_is_nobodys() -> None:
    made = reading(1, equal=False)
    made.leave(1)
    made.ended(DataError("broken"))
    made.join(2, 0)
    assert made.take(2) is Answer.WAIT


@settings(max_examples=150, deadline=None)
@given(
    ranks=st.integers(1, 5),
    equal=st.booleans(),
    blocks=st.lists(st.integers(0, 13), max_size=12),
    moves=st.lists(st.integers(0, 6), max_size=60),
    leaves=st.none() | st.integers(0, 4),
)
def test_rows_are_dealt_once_and_equally(
    ranks: int, equal: bool, blocks: list[int], moves: list[int], leaves: int | None
) -> None:
    """Whatever the order of deliveries and takes; one rank may leave in the middle."""
    made = reading(ranks, equal=equal)
    got: dict[int, list[tuple[Any, int]]] = {t: [] for t in range(1, ranks + 1)}
    todo = list(enumerate(blocks))
    gone = None

    def take(ticket: int) -> None:
        answer = made.take(ticket)
        if isinstance(answer, Piece):
            assert answer.rows > 0
            got[ticket] += rows_of(answer)
        assert len(made.held) <= len(blocks)

    for at, move in enumerate(moves):
        if leaves is not None and at == len(moves) // 2 and leaves < ranks:
            gone = leaves + 1
            made.leave(gone)
        if move == 0 and todo:
            made.arrived(*todo.pop(0))
        elif 1 <= move <= ranks:
            take(move)
    for block in todo:
        made.arrived(*block)
    made.ended()
    for _ in range(200):
        for ticket in got:
            take(ticket)
    assert made.held == []
    total = sum(blocks)
    dealt = [row for rows in got.values() for row in rows]
    assert len(set(dealt)) == len(dealt)
    stayed = {len(rows) for ticket, rows in got.items() if ticket != gone}
    if equal:
        assert stayed <= {total // ranks}
    elif gone is None or ranks > 1:
        assert len(dealt) == total
    told = sum(c.blocks for c in made.commands() if isinstance(c, Took))
    assert told == len(blocks) or gone is not None


def test_a_piece_that_was_sent_is_anothers_until_it_has_arrived() -> None:
    made = reading(2, equal=False)
    made.arrived("a", 3)
    made.arrived("b", 4)
    assert rows_of(made.take(1, sent=True)) == [("a", i) for i in range(3)]
    assert rows_of(made.take(2, sent=True)) == [("b", i) for i in range(4)]
    made.reached(2)
    made.ended()
    assert made.take(2) is Answer.WAIT, "the other one may not have got its piece"
    made.leave(1)
    assert rows_of(made.take(2, sent=True)) == [("a", i) for i in range(3)]
    assert made.take(2) is Answer.END, "to ask for more is to have got it"
    assert [c for c in made.commands() if isinstance(c, Took)] == [Took(1), Took(1), Took(-1), Took(1)]


def test_a_piece_that_has_arrived_is_nobody_elses() -> None:
    made = reading(2, equal=False)
    made.arrived("a", 3)
    made.take(1, sent=True)
    made.reached(1)
    made.leave(1)
    made.ended()
    assert made.take(2) is Answer.END


def test_equal_shares_wait_for_nobody_at_the_end() -> None:
    made = reading(2, equal=True)
    made.arrived("a", 4)
    made.ended()
    made.take(1, sent=True)
    assert isinstance(made.take(2, sent=True), Piece)
    assert made.take(2) is Answer.END
    made.leave(1)
    assert made.place(1) is Place.AWAY
