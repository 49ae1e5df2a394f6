"""When rows that one rank alone uses move at once: where that saves bytes, by what was seen of them."""

from __future__ import annotations

import numpy as np
import pytest

from pm.reuse import Reuse
from pm.store import RecordClass, RecordStore


def store_of(dim: int, state_words: int) -> RecordStore:
    return RecordStore(RecordClass(dim, "float32", "some", state_words), 4)


def seen(looked: int, known: int, repeated: int, times: int = 50) -> Reuse:
    reuse = Reuse()
    for _ in range(times):
        reuse.note(np.array([looked, known, repeated]))
    return reuse


@pytest.mark.parametrize("state_words, uses", [(0, 1), (16, 2), (32, 2), (48, 3)])
def test_without_knowledge_as_many_uses_as_cost_the_same(state_words, uses):
    assert Reuse().uses_worth_a_move(store_of(16, state_words)) == uses


@pytest.mark.parametrize(
    "looked, known, repeated, at_once",
    [
        (1000, 1000, 900, True),  # whoever uses a row comes back to it
        (1000, 1000, 500, False),  # as likely as not somebody else does
        (1000, 10, 10, False),  # rows are hardly ever used again
        (1000, 200, 190, True),
        (1000, 0, 0, False),
        (0, 0, 0, False),
    ],
)
def test_rows_move_at_once_where_that_is_cheaper(looked, known, repeated, at_once):
    assert (seen(looked, known, repeated).uses_worth_a_move(store_of(16, 16)) == 1) == at_once


def test_little_knowledge_is_none():
    assert seen(3, 3, 3, times=2).uses_worth_a_move(store_of(16, 16)) == 2


def test_a_workload_that_changes_is_seen_to():
    reuse = seen(1000, 1000, 950)
    for _ in range(150):
        reuse.note(np.array([1000, 1000, 400]))
    assert reuse.uses_worth_a_move(store_of(16, 16)) == 2
