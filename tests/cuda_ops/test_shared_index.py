"""The index of shared records: keys are claimed once, what was published is found, and memory follows use."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuda_ops import ABSENT, BEING_MADE, SharedIndex


def an_index(rows: int) -> SharedIndex:
    blocks = np.zeros(SharedIndex.block_count(rows), np.int32)
    return SharedIndex(rows, blocks, np.zeros(SharedIndex.entry_count(rows), np.int32), np.zeros(1, np.int64))


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 100))
def test_it_maps_keys_as_a_dictionary_does(seed, rows):
    rng = np.random.default_rng(seed)
    index, slots, claimed = an_index(rows), {}, set()
    for _ in range(6):
        keys = rng.permutation(rows)[: rng.integers(rows + 1)]
        before = index.claim(keys)
        assert before.tolist() == [slots.get(k, -2 if k in claimed else -1) + 1 for k in keys.tolist()]
        assert not (index.claim(keys) == ABSENT).any()
        mine = keys[before == ABSENT]
        claimed.update(mine.tolist())
        some = rng.permutation(np.array(sorted(claimed), np.int64))[: rng.integers(len(claimed) + 1)]
        if rng.random() < 0.3:  # they could not be made
            index.publish(some, None)
        else:
            places = rng.integers(0, 1 << 31, len(some)) - 1
            places = np.maximum(places, 0)
            index.publish(some, places)
            slots.update(zip(some.tolist(), places.tolist(), strict=True))
        claimed.difference_update(some.tolist())
        for one in (index, index.copy()):
            assert one.find(np.arange(rows))[list(slots)].tolist() == list(slots.values())
            assert (np.delete(one.find(np.arange(rows)), list(slots)) < 0).all()
            found_keys, found_slots = one.items()
            assert dict(zip(found_keys.tolist(), found_slots.tolist(), strict=True)) == slots
            assert (np.diff(found_keys) > 0).all()


def test_a_copy_stays_as_it_is():
    index = an_index(100)
    index.claim(np.array([3, 70]))
    index.publish(np.array([3]), np.array([0]))
    kept = index.copy()
    index.publish(np.array([70]), np.array([1]))
    index.claim(np.array([50]))
    index.publish(np.array([50]), np.array([2]))
    assert [array.tolist() for array in kept.items()] == [[3], [0]]
    assert [array.tolist() for array in index.items()] == [[3, 50, 70], [0, 2, 1]]


def test_keys_that_threads_claim_at_once_are_claimed_once():
    rows, ranks, won = 20_000, 4, []
    index = an_index(rows)
    index.claim(np.zeros(0, np.int64))  # compiled
    start = threading.Barrier(ranks)

    def work(rank: int) -> None:
        keys = np.random.default_rng(rank).permutation(rows)
        start.wait()
        for part in np.array_split(keys, 40):
            asked = part
            while len(asked):
                before = index.claim(asked)
                mine = asked[before == ABSENT]
                index.publish(mine, mine * 3)
                won.append(mine)
                asked = asked[before == BEING_MADE]
            assert (index.find(part) == part * 3).all()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(np.sort(np.concatenate(won)), np.arange(rows))


def test_keys_without_a_record_take_next_to_no_memory():
    rows = 1 << 24
    index = an_index(rows)
    first = index.memory_bytes
    assert first == rows // 16 * 4
    keys = np.arange(0, rows, 1 << 14)
    index.claim(keys)
    assert index.memory_bytes == first + 64 * len(keys)
    index.claim(keys + 1)
    assert index.memory_bytes == first + 64 * len(keys)


@pytest.mark.parametrize("bad", [-1, 60])
def test_keys_out_of_range_are_refused(bad):
    index = an_index(60)
    for call in (index.claim, index.find, lambda keys: index.publish(keys, np.ones(2, np.int64))):
        with pytest.raises(IndexError, match=f"keys.1. is {bad}"):
            call(np.array([3, bad]))
    assert (index.find(np.arange(60)) < 0).all() and index.claim(np.array([3])) == ABSENT


def test_only_what_was_claimed_is_published():
    index = an_index(60)
    index.claim(np.array([3, 4]))
    index.publish(np.array([4]), np.array([0]))
    for unclaimed in (4, 5, 40):
        with pytest.raises(ValueError, match=f"key {unclaimed} was not claimed"):
            index.publish(np.array([unclaimed]), np.array([1]))
    with pytest.raises(ValueError, match="1 slots given for 2 keys"):
        index.publish(np.array([3, 4]), np.array([1]))
    assert index.find(np.array([3, 4, 5, 40])).tolist() == [-2, 0, -1, -1]
