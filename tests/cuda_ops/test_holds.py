"""Holds of slots, from whose sums one can tell whether they are all one rank's."""

from __future__ import annotations

import secrets
from collections import Counter

import numpy as np
import pytest

import cuda_ops


def fresh_rng() -> np.random.Generator:
    seed = secrets.randbits(32)
    print(f"{seed=}")  # shown where a test fails
    return np.random.default_rng(seed)


def test_held_by_one_is_what_counting_says():
    rng = fresh_rng()
    ranks, slots = int(rng.choice([1, 2, 5, 64])), 40
    book = np.zeros((slots, 4), np.int32)
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


def test_many_holds_of_high_ranks():
    book, slots = np.zeros((3, 4), np.int32), np.array([2], np.int64)
    for _ in range(20):
        cuda_ops.add_holds(book, slots, 4000, 100)
    assert cuda_ops.held_by_one(book, slots, 4000).all()
    cuda_ops.add_holds(book, slots, 3999, 1)
    assert not cuda_ops.held_by_one(book, slots, 4000).any()
    cuda_ops.add_holds(book, slots, 3999, -1)
    cuda_ops.add_holds(book, slots, 4000, -2000)
    assert not book.any()


def test_the_fourth_word_is_left_alone():
    book = np.full((4, 4), 7, np.int32)
    cuda_ops.add_holds(book, np.array([1], np.int64), 3, 2)
    assert book[1].tolist() == [9, 13, 25, 7]
    assert (book[[0, 2, 3]] == 7).all()


@pytest.mark.parametrize("call", [cuda_ops.add_holds, cuda_ops.held_by_one])
def test_a_slot_outside_is_an_error(call):
    book = np.zeros((4, 4), np.int32)
    with pytest.raises(IndexError, match=r"slots\[1\] is 4"):
        call(book, np.array([0, 4], np.int64), 0, *([1] if call is cuda_ops.add_holds else []))
    with pytest.raises(ValueError, match="book must have shape"):
        call(np.zeros((4, 3), np.int32), np.array([0], np.int64), 0, *([1] if call is cuda_ops.add_holds else []))
