"""Who lacks what others have changed, against sets in Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cuda_ops

CAPACITY = 12


def sets_of(words: np.ndarray) -> list[set[int]]:
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def words_of(sets: list[set[int]], words: int) -> np.ndarray:
    made = np.zeros((len(sets), words), np.uint64)
    for row, members in enumerate(sets):
        for rank in members:
            made[row, rank // 64] |= np.uint64(1) << np.uint64(rank % 64)
    return made


@given(seed=st.integers(0, 2**32), ranks=st.sampled_from([1, 2, 3, 5, 64, 65, 130]))
def test_holders_are_behind_until_they_are_told(seed, ranks):
    rng = np.random.default_rng(seed)
    words = -(-ranks // 64)
    holders = [set(np.flatnonzero(rng.random(ranks) < rng.random()).tolist()) for _ in range(CAPACITY)]
    behind: list[set[int]] = [set() for _ in holders]
    arrays = words_of(holders, words), words_of(behind, words)
    for _ in range(8):
        slots = rng.integers(0, CAPACITY, int(rng.integers(0, 20)))
        rank = int(rng.integers(-2, ranks))
        if rank < 0 or rng.random() < 0.5:
            late = []
            for slot in slots.tolist():
                was_empty = not behind[slot]
                behind[slot] |= holders[slot] - {rank}
                late += [slot] if was_empty and behind[slot] else []
            assert cuda_ops.mark_behind(slots, *arrays, rank).tolist() == late
        else:
            taken = [slot for slot in dict.fromkeys(slots.tolist()) if rank in behind[slot]]
            assert cuda_ops.take_behind(slots, arrays[1], rank).tolist() == taken
            for slot in taken:
                behind[slot].discard(rank)
        assert [sets_of(array) for array in arrays] == [holders, behind]


@pytest.mark.parametrize("bad", [-1, CAPACITY])
def test_slots_out_of_range_are_refused(bad):
    holders, behind = (np.ones((CAPACITY, 1), np.uint64) for _ in range(2))
    with pytest.raises(IndexError, match=f"slots.1. is {bad}"):
        cuda_ops.mark_behind(np.array([0, bad]), holders, behind, -1)
    with pytest.raises(IndexError, match=f"slots.1. is {bad}"):
        cuda_ops.take_behind(np.array([0, bad]), behind, 0)
    assert (behind == 1).all()
