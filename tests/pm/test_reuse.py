"""When records move: at which stage of a rank's run of uses, from how earlier runs went on."""

from types import SimpleNamespace

import numpy as np
import pytest

from pm.exact.reuse import Reuse

DIM = 16


def store_of(states: int) -> SimpleNamespace:
    """Return a store of float32 records of `DIM` values, as many of each of `states`, and the step's word."""
    made = SimpleNamespace(dim=DIM, dtype=np.float32, record_bytes=4 * DIM * (1 + states) + 8)
    return SimpleNamespace(record_class=made)


def followed(same: int, owner: int, other: int, stage: int = 1) -> Reuse:
    reuse = Reuse(3, 0)
    reuse.uses[1, stage] = same, owner, other
    return reuse


def test_before_anything_was_seen_a_record_moves_when_uses_have_cost_as_much():
    needed, stages = Reuse(3, 0).worth_a_move(1, store_of(1))  # a record of Adagrad: 136 bytes, two uses of a copy
    assert needed == 2
    assert stages.tolist() == [False, False, False, True]
    needed, stages = Reuse(3, 0).worth_a_move(1, store_of(0))  # of SGD: 72 bytes, less than one use
    assert needed == 1
    assert stages.tolist() == [False, False, True, True]


@pytest.mark.parametrize("stage", range(4))
def test_rows_that_their_rank_comes_back_to_move_at_once(stage):
    stages = followed(90, 3, 7, stage).worth_a_move(1, store_of(1))[1]
    assert stages[stage]


@pytest.mark.parametrize("stage", range(4))
def test_rows_that_their_owner_uses_as_often_stay(stage):
    needed, stages = followed(50, 50, 0, stage).worth_a_move(1, store_of(1))
    assert not stages[stage]
    assert needed == 4


def test_a_record_that_costs_less_than_a_copy_moves_unless_its_owner_comes_back():
    assert followed(50, 50, 0).worth_a_move(1, store_of(0))[1][1]
    assert not followed(10, 90, 0).worth_a_move(1, store_of(0))[1][1]


def test_a_record_with_much_state_needs_more_use():
    assert followed(60, 20, 20).worth_a_move(1, store_of(1))[1][1]
    assert not followed(60, 20, 20).worth_a_move(1, store_of(3))[1][1]


def test_of_a_rank_that_little_was_seen_of_the_other_tells():
    reuse = followed(90, 3, 7)
    assert reuse.worth_a_move(2, store_of(1))[1].tolist() == [False, True, False, True]
    reuse.uses[2, 1] = 10, 20, 0
    assert reuse.worth_a_move(2, store_of(1))[1][1], "thirty are too few"
    reuse.uses[2, 1] = 20, 20, 0
    assert not reuse.worth_a_move(2, store_of(1))[1][1]


def test_how_the_owner_comes_back_to_its_rows_says_nothing_of_others():
    reuse = Reuse(3, 0)
    reuse.uses[0] = 90, 0, 10
    assert reuse.worth_a_move(1, store_of(1))[1].tolist() == [False, False, False, True]


def test_what_was_seen_fades():
    reuse = followed(12_000, 0, 5_000)
    reuse.worth_a_move(1, store_of(1))
    assert reuse.uses[1, 1].tolist() == [6_000, 0, 2_500]
    for _ in range(4):
        reuse.uses[1, 1, 1] += 10_000  # its owner uses them now
        stages = reuse.worth_a_move(1, store_of(1))[1]
    assert not stages[1]
