"""Who is sent what others have changed, against sets in Python."""

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


@given(seed=st.integers(0, 2**32), ranks=st.sampled_from([1, 2, 3, 5, 64, 65, 130]), everyone=st.booleans())
def test_holders_are_sent_what_they_lack_where_they_use_it(seed, ranks, everyone):
    rng = np.random.default_rng(seed)
    words = -(-ranks // 64)
    draw = lambda share: set(np.flatnonzero(rng.random(ranks) < share).tolist())  # noqa: E731
    holders = [draw(rng.random()) for _ in range(CAPACITY)]
    behind = [held & draw(0.3) for held in holders]
    changed = [set(range(64 * words)) if rng.random() < 0.1 else draw(rng.choice([0, 0.2, 0.6])) for _ in holders]
    arrays = [words_of(one, words) for one in (holders, changed, behind)]
    slots = rng.integers(0, CAPACITY, int(rng.integers(0, 20)))

    sent: list[list[int]] = [[] for _ in range(ranks)]
    late = []
    for slot in slots.tolist():
        if not (everyone or changed[slot]):
            continue
        for rank in sorted(holders[slot]):
            if changed[slot] - {rank}:
                behind[slot].add(rank)
            if rank in behind[slot] and (everyone or rank in changed[slot]):
                sent[rank].append(slot)
                behind[slot].discard(rank)
        if behind[slot]:
            late.append(slot)
        changed[slot] = set()

    selected, starts, found_late = cuda_ops.select_refreshes(slots, *arrays, ranks, everyone)
    assert [part.tolist() for part in np.split(selected, starts[1:-1])] == sent
    assert starts[0] == 0 and starts[-1] == len(selected)
    assert found_late.tolist() == late
    assert [sets_of(array) for array in arrays] == [holders, changed, behind]


@pytest.mark.parametrize("bad", [-1, CAPACITY])
def test_slots_out_of_range_are_refused(bad):
    arrays = [np.ones((CAPACITY, 1), np.uint64) for _ in range(3)]
    with pytest.raises(IndexError, match=f"slots.1. is {bad}"):
        cuda_ops.select_refreshes(np.array([0, bad]), *arrays, 2, True)
    assert all((array == 1).all() for array in arrays)
