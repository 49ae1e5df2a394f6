"""Holds of slots, from whose sums one can tell whether they are all one rank's."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import cuda_ops


def test_held_by_one_is_what_counting_says(rng):
    ranks, slots = int(rng.choice([1, 2, 5, 64])), 40
    book = np.zeros((slots, 8), np.int32)
    held = [Counter() for _ in range(slots)]
    for _ in range(200):
        some = rng.permutation(slots)[: rng.integers(0, slots)].astype(np.int64)
        rank = int(rng.integers(ranks))
        if rng.random() < 0.5:
            some = np.array([slot for slot in some if held[slot][rank]], np.int64)
            cuda_ops.add_holds(book, some, rank, -1)
            for slot in some:
                held[slot][rank] -= 1
        else:
            cuda_ops.add_holds(book, some, rank, 1)
            for slot in some:
                held[slot][rank] += 1
        asked, of = rng.integers(0, slots, 30), int(rng.integers(ranks))
        expected = [all(r == of for r, count in held[slot].items() if count) for slot in asked]
        np.testing.assert_array_equal(cuda_ops.held_by_one(book, asked, of), expected)
        np.testing.assert_array_equal(book[:, 0], [sum(counts.values()) for counts in held])


def test_has_count_is_what_counting_says(rng):
    book = rng.integers(-2, 3, (50, 8)).astype(np.int32)
    slots = rng.integers(0, 50, 200)
    for count in (-1, 0, 2):
        np.testing.assert_array_equal(cuda_ops.has_count(book, slots, count), book[slots, 0] == count)
    assert not len(cuda_ops.has_count(book, slots[:0], 1))


def stage_of(uses: list[int]) -> int:
    """Return the stage of the run that ends with the last of the ranks that announced a use of a row."""
    length = next((n for n, rank in enumerate(reversed(uses)) if rank != uses[-1]), len(uses))
    return min(length, 3) if len(uses) > 1 else 0


def test_rows_move_to_who_alone_holds_them_at_a_stage_or_with_uses_ahead(rng):
    ranks, slots, needed = 3, 30, 3
    stages = rng.random(4) < 0.5
    stages[rng.integers(4)] = True
    book, counted = np.zeros((slots, 8), np.int32), np.zeros((ranks, 4, 3), np.int64)
    uses, held = [[] for _ in range(slots)], [Counter() for _ in range(slots)]
    favourite = rng.integers(0, ranks, slots)
    seen, moved, stayed = Counter(), 0, 0
    for version in range(60):
        for rank in range(ranks):
            mine = np.flatnonzero(rng.random(slots) < np.where(favourite == rank, 0.6, 0.1))
            cuda_ops.begin_holds(book, mine, rank, 0, counted)
            cuda_ops.note_touches(book, mine, version)
            for slot in mine:
                held[slot][rank] += 1
                if uses[slot]:
                    of = uses[slot][-1]
                    seen[of, stage_of(uses[slot]), 0 if of == rank else 1 if rank == 0 else 2] += 1
                uses[slot].append(rank)
        for rank in range(1, ranks):
            mine = np.array([slot for slot in range(slots) if held[slot][rank]], np.int64)
            expected = [
                held[slot].total() == held[slot][rank]
                and (held[slot][rank] >= needed or bool(stages[stage_of(uses[slot]) if uses[slot][-1] == rank else 1]))
                for slot in mine
            ]
            np.testing.assert_array_equal(cuda_ops.select_moves(book, mine, rank, needed, stages), expected)
            moved, stayed = moved + sum(expected), stayed + len(mine) - sum(expected)
        for rank in range(ranks):
            gone = np.array([slot for slot in range(slots) if held[slot][rank] and rng.random() < 0.7], np.int64)
            cuda_ops.add_holds(book, gone, rank, -1)
            for slot in gone:
                held[slot][rank] -= 1
    assert moved and stayed
    assert {at: counted[at] for at in np.ndindex(counted.shape) if counted[at]} == seen
    np.testing.assert_array_equal(book[:, 0], [counts.total() for counts in held])


def test_many_uses_ahead_are_enough():
    book = np.zeros((2, 8), np.int32)
    both = np.arange(2)
    cuda_ops.add_holds(book, both, 1, 1)
    cuda_ops.add_holds(book, both[:1], 1, 1)
    assert cuda_ops.select_moves(book, both, 1, 2, np.zeros(4, bool)).tolist() == [True, False]


def test_many_holds_of_high_ranks():
    book, slots = np.zeros((3, 8), np.int32), np.array([2], np.int64)
    for _ in range(20):
        cuda_ops.add_holds(book, slots, 4000, 100)
    assert cuda_ops.held_by_one(book, slots, 4000).all()
    cuda_ops.add_holds(book, slots, 3999, 1)
    assert not cuda_ops.held_by_one(book, slots, 4000).any()
    cuda_ops.add_holds(book, slots, 3999, -1)
    cuda_ops.add_holds(book, slots, 4000, -2000)
    assert not book.any()


def test_other_words_are_left_alone():
    book = np.full((4, 8), 7, np.int32)
    cuda_ops.add_holds(book, np.array([1], np.int64), 3, 2)
    assert book[1].tolist() == [9, 13, 25, 7, 7, 7, 7, 7]
    assert (book[[0, 2, 3]] == 7).all()


@pytest.mark.parametrize("call", [cuda_ops.add_holds, cuda_ops.held_by_one])
def test_a_slot_outside_is_an_error(call):
    book = np.zeros((4, 8), np.int32)
    with pytest.raises(IndexError, match=r"slots\[1\] is 4"):
        call(book, np.array([0, 4], np.int64), 0, *([1] if call is cuda_ops.add_holds else []))
    with pytest.raises(ValueError, match="book must have shape"):
        call(np.zeros((4, 7), np.int32), np.array([0], np.int64), 0, *([1] if call is cuda_ops.add_holds else []))
