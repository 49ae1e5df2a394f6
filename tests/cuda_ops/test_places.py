"""Keys by their places, against NumPy one place at a time."""

from __future__ import annotations

import numpy as np
import pytest

import cuda_ops

SLOTS = 50


def some_places(rng: np.random.Generator) -> np.ndarray:
    """Distinct places of records and copies."""
    everywhere = np.concatenate([np.arange(SLOTS), -2 - np.arange(SLOTS)])
    return rng.permutation(everywhere)[: rng.integers(0, len(everywhere) + 1)]


def column(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """The same values, as a column of a wider array or on their own."""
    if rng.random() < 0.5:
        return values
    wider = np.full((len(values), 3), -7, values.dtype)
    wider[:, 1] = values
    return wider[:, 1]


def test_uses_are_counted_and_what_has_none_is_returned(rng):
    for _ in range(50):
        places, count = some_places(rng), int(rng.choice([1, -1]))
        records, copies = (column(rng, rng.integers(-2, 3, SLOTS).astype(np.int32)) for _ in range(2))
        of_records, of_copies = records.tolist(), copies.tolist()
        idle = []
        for place in places.tolist():
            uses, slot = (of_records, place) if place >= 0 else (of_copies, -2 - place)
            uses[slot] += count
            idle += [place] if uses[slot] == 0 else []
        assert cuda_ops.add_uses(places, records, copies, count).tolist() == idle
        assert (records.tolist(), copies.tolist()) == (of_records, of_copies)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_come_from_records_and_copies(dtype, rng):
    for _ in range(30):
        places, (stride, copy_stride) = some_places(rng), rng.integers(3, 9, 2).tolist()
        words = rng.random(SLOTS * stride).astype(dtype)
        copy_words = rng.random(SLOTS * copy_stride).astype(dtype)
        out = np.empty((len(places), 3), dtype)
        cuda_ops.gather_places(places, words, stride, copy_words, copy_stride, out)
        records, copies = words.reshape(SLOTS, -1), copy_words.reshape(SLOTS, -1)
        for place, row in zip(places.tolist(), out, strict=True):
            expected = records[place] if place >= 0 else copies[-2 - place]
            np.testing.assert_array_equal(row, expected[:3])


def test_keys_that_have_moved_are_found_out(rng):
    for _ in range(50):
        places = some_places(rng)
        owned, copied = (column(rng, rng.permutation(10 * SLOTS)[:SLOTS]) for _ in range(2))
        keys = np.array([owned[p] if p >= 0 else copied[-2 - p] for p in places.tolist()], np.int64)
        gone = rng.random(len(places)) < 0.3
        places[gone & (rng.random(len(places)) < 0.5)] = -1
        keys[gone & (places != -1)] += 10 * SLOTS
        assert cuda_ops.moved_places(keys, places, owned, copied).tolist() == np.flatnonzero(gone).tolist()


@pytest.mark.parametrize("place", [SLOTS, -2 - SLOTS, -1])
def test_places_that_are_none_are_refused_and_nothing_is_counted(place):
    places = np.array([0, place, -2], np.int64)
    uses, words = np.zeros(SLOTS, np.int32), np.zeros(SLOTS * 4, np.float32)
    with pytest.raises(IndexError, match="place"):
        cuda_ops.add_uses(places, uses, uses.copy(), 1)
    assert not uses.any()
    with pytest.raises(IndexError, match="place"):
        cuda_ops.gather_places(places, words, 4, words, 4, np.empty((3, 2), np.float32))


def test_arrays_of_other_types_are_refused():
    places, words = np.array([0], np.int64), np.zeros(8, np.float32)
    uses = np.zeros(2, np.int32)
    with pytest.raises(TypeError, match="of_copies"):
        cuda_ops.add_uses(places, uses, uses.astype(np.int64), 1)
    with pytest.raises(TypeError, match="float64"):
        cuda_ops.gather_places(places, words, 4, words.astype(np.float64), 4, np.empty((1, 2), np.float32))
    with pytest.raises(ValueError, match="do not lie"):
        cuda_ops.gather_places(places, words, 4, words, 4, np.empty((1, 5), np.float32))


# Places in an array by key


def test_places_by_key_are_a_dictionary(rng):
    by_key, known = np.zeros(SLOTS, np.int32), {}
    for _ in range(200):
        keys = rng.permutation(SLOTS)[: rng.integers(0, 20)]
        places = rng.choice(np.setdiff1d(np.arange(-(2**31) + 1, -(2**31) + 200), [-1]), len(keys))
        places = np.where(rng.random(len(keys)) < 0.5, places, rng.integers(0, 2**31 - 1, len(keys)))
        match rng.integers(3):
            case 0:
                fresh = np.array([key not in known for key in keys.tolist()], bool)
                cuda_ops.put_places(by_key, keys[fresh], places[fresh], fresh=True)
                known.update(zip(keys[fresh].tolist(), places[fresh].tolist(), strict=True))
            case 1:
                cuda_ops.put_places(by_key, keys, places, fresh=False)
                known.update(zip(keys.tolist(), places.tolist(), strict=True))
            case 2:
                twice = np.concatenate([keys, keys[:2]])
                assert cuda_ops.take_places(by_key, twice).tolist() == [known.pop(k, -1) for k in twice.tolist()]
        asked = rng.integers(-3, SLOTS + 3, 100)
        assert cuda_ops.find_places(by_key, asked).tolist() == [known.get(key, -1) for key in asked.tolist()]


@pytest.mark.parametrize(
    "keys, places, fresh, error, match",
    [
        ([1, 50], [0, 1], False, IndexError, "keys from 1 to 50 are not all among the 50"),
        ([-1], [0], False, IndexError, "keys from -1"),
        ([1, 7], [0, 1], True, KeyError, "key 7 .position 1. has a place already"),
        ([1, 2, 1], [0, 1, 2], True, KeyError, "key 1 .position 2. has a place already"),
        ([1], [2**31 - 1], False, ValueError, "do not fit"),
        ([1], [-(2**31)], False, ValueError, "do not fit"),
        ([1, 2], [0], False, ValueError, "2 keys given with 1 places"),
    ],
)
def test_places_that_cannot_be_put_change_nothing(keys, places, fresh, error, match):
    by_key = np.zeros(SLOTS, np.int32)
    by_key[7] = 5
    before = by_key.copy()
    with pytest.raises(error, match=match):
        cuda_ops.put_places(by_key, np.array(keys), np.array(places), fresh=fresh)
    np.testing.assert_array_equal(by_key, before)


def test_places_are_not_taken_of_keys_that_there_are_not():
    by_key = np.arange(SLOTS, dtype=np.int32)
    with pytest.raises(IndexError, match="are not all among"):
        cuda_ops.take_places(by_key, np.array([3, SLOTS]))
    assert by_key[3] == 3
    with pytest.raises(TypeError, match="int32"):
        cuda_ops.find_places(by_key.astype(np.int64), np.array([3]))
