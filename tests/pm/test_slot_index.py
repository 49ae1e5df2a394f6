"""`SlotIndex` against a dictionary, over random sequences of what a store does to it."""

import numpy as np
import pytest

from pm.keys import make_keys
from pm.storage.slot_index import MOST_SLOTS, SlotIndex

ROWS = [1, 7, 40, 300, 5000]


def random_keys(rng, count):
    tables = rng.integers(0, len(ROWS), count)
    keys = make_keys(0, rng.integers(0, np.array(ROWS)[tables])) + make_keys(1, np.zeros(count, np.int64)) * tables
    return np.unique(keys)


def check(index, expected):
    keys, slots = index.items()
    assert len(index) == len(keys) == len(expected)
    assert dict(zip(keys.tolist(), slots.tolist(), strict=True)) == expected


def test_it_is_a_dictionary_whatever_is_added_and_removed(rng):
    index, expected = SlotIndex(ROWS), {}
    had_arrays = set()
    for _ in range(60):
        keys = random_keys(rng, int(rng.choice([0, 1, 5, 100, 3000])))
        if rng.random() < 0.6:
            new = np.array([key for key in keys.tolist() if key not in expected], np.int64)
            rng.shuffle(new)
            slots = rng.integers(0, MOST_SLOTS, len(new))
            index.add(new, slots)
            expected.update(zip(new.tolist(), slots.tolist(), strict=True))
        else:
            asked = np.concatenate([keys, keys[: len(keys) // 2], [-1]])
            rng.shuffle(asked)
            assert index.remove(asked).tolist() == [expected.pop(key, -1) for key in asked.tolist()]
        asked = np.concatenate([random_keys(rng, 200), rng.integers(-5, 5, 5), make_keys(9, np.arange(3))])
        assert index.find(asked).tolist() == [expected.get(key, -1) for key in asked.tolist()]
        check(index, expected)
        had_arrays.update(index._arrays)
    assert had_arrays  # or nothing was tested


def test_a_row_beyond_its_table_is_absent(rng):
    index = SlotIndex(ROWS)
    index.add(make_keys(1, np.arange(7)), np.arange(7))
    assert index._arrays
    assert index.find(make_keys(1, np.array([6, 7, 8, 1 << 30]))).tolist() == [6, -1, -1, -1]


def test_what_cannot_be_added_changes_nothing(rng):
    index = SlotIndex(ROWS)
    first = np.concatenate([make_keys(1, np.arange(6)), make_keys(4, np.arange(3))])
    index.add(first, np.arange(9))
    expected = dict(zip(first.tolist(), range(9), strict=True))
    fresh_in_array, fresh_elsewhere = make_keys(1, np.array([6])), make_keys(4, np.array([100]))
    for again in (fresh_in_array, fresh_elsewhere, first[:1], first[-1:]):
        for known in (first[:1], first[-1:], again):
            keys = np.concatenate([fresh_elsewhere, fresh_in_array, again, known])
            with pytest.raises(KeyError, match="already"):
                index.add(keys, np.arange(len(keys)))
            check(index, expected)
    for keys, slots in (([-1], [3]), ([9], [-3]), ([9], [MOST_SLOTS]), ([9, 10], [1])):
        with pytest.raises(ValueError, match="negative|slots"):
            index.add(np.array(keys), np.array(slots))
        check(index, expected)
    with pytest.raises(ValueError, match="rows of table 1"):
        index.add(make_keys(1, np.array([7])), np.array([3]))
    check(index, expected)


def test_a_copy_is_one(rng):
    index = SlotIndex(ROWS)
    keys = random_keys(rng, 900)
    index.add(keys, np.arange(len(keys)))
    expected = dict(zip(keys.tolist(), range(len(keys)), strict=True))
    copy = index.copy()
    index.remove(keys[::2])
    check(copy, expected)
    copy.remove(keys)
    check(index, {key: expected[key] for key in keys[1::2].tolist()})


def test_a_table_held_whole_takes_fewer_bytes_than_an_index_would():
    rows = 100_000
    index = SlotIndex([0, 0, 0, rows])
    for start in range(0, rows, 1 << 14):
        part = np.arange(start, min(start + (1 << 14), rows))
        index.add(make_keys(3, part), part)
        held = part[-1] + 1
        assert index.memory_bytes <= max(24 * held, 1 << 14)
    assert index.memory_bytes < 5 * rows
    index.remove(make_keys(3, np.arange(rows)))
    assert index.memory_bytes < 1 << 14


def test_tables_of_few_rows_have_arrays_from_their_first_key_on_while_there_is_room(rng):
    index = SlotIndex([1000, 500, 600], array_rows=1600)
    expected = {}
    for number in (0, 1, 2):
        keys = make_keys(number, np.array([499, 3]))
        index.add(keys, np.array([2 * number, 2 * number + 1]))
        expected |= dict(zip(keys.tolist(), (2 * number, 2 * number + 1), strict=True))
        check(index, expected)
    assert list(index._arrays) == [0, 1]
    assert index.memory_bytes >= 4 * 1500
    index.remove(make_keys(0, np.array([499, 3])))
    index.add(make_keys(2, np.array([7])), np.array([9]))
    assert list(index._arrays) == [1, 2]
    copy = index.copy()
    copy.remove(make_keys(1, np.array([499, 3])))
    copy.add(make_keys(0, np.array([1])), np.array([0]))
    assert list(copy._arrays) == [2, 0]
