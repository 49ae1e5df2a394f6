"""Holds of slots, from whose sums one can tell whether they are all one rank's."""

from __future__ import annotations

from collections import Counter, defaultdict

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


def in_a_row(uses: dict[int, set[int]], rank: int) -> int:
    """Return how often `rank` alone used a row since another rank did; `uses` are the ranks of each version."""
    count = 0
    for version in sorted(uses, reverse=True):
        if uses[version] != {rank}:
            break
        count += 1
    return count


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_rows_move_after_uses_by_one_rank_alone(needed, rng):
    """Plans come one after another, each for a later version; some slots are of several ranks at once."""
    ranks, slots = 3, 30
    book = np.zeros((slots, 8), np.int32)
    uses = [defaultdict(set) for _ in range(slots)]
    noted = np.zeros(slots, bool)
    favourite = rng.integers(0, ranks, slots)
    moved = 0
    for version in range(60):
        of = [np.flatnonzero(rng.random(slots) < np.where(favourite == rank, 0.6, 0.1)) for rank in range(ranks)]
        for rank, mine in enumerate(of):
            cuda_ops.add_holds(book, mine, rank, 1)
            cuda_ops.note_touches(book, mine, version)
        for rank in range(1, ranks):
            mine = of[rank]
            others = np.concatenate([of[other] for other in range(ranks) if other != rank])
            alone = ~np.isin(mine, others)
            expected = [
                each and (needed == 1 or in_a_row(uses[slot], rank) >= needed)
                for slot, each in zip(mine, alone, strict=True)
            ]
            sole = mine[alone]
            known = [slot for slot in sole if noted[slot]]
            repeated = [slot for slot in known if in_a_row(uses[slot], rank)]
            for counts in ([len(sole), len(known), len(repeated)], [0, 0, 0]):  # to ask again changes nothing
                found = cuda_ops.select_moves(book, mine, rank, version, needed)
                np.testing.assert_array_equal(found[0], expected)
                assert found[1].tolist() == counts
            noted[sole] = True
            moved += sum(expected)
        for rank, mine in enumerate(of):
            cuda_ops.add_holds(book, mine, rank, -1)
            for slot in mine:
                uses[slot][version].add(rank)
    assert moved


def test_as_many_uses_ahead_are_enough():
    book = np.zeros((2, 8), np.int32)
    both = np.arange(2)
    cuda_ops.add_holds(book, both, 1, 1)
    cuda_ops.add_holds(book, both[:1], 1, 1)
    assert cuda_ops.select_moves(book, both, 1, 5, 2)[0].tolist() == [True, False]


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
