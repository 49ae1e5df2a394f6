"""Records that change their owner, against NumPy one record at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import cuda_ops

SLOTS = 40
FREE, WANTED, ACTIVE, LEAVING = 0, 1, 3, 5
HERE = ACTIVE, LEAVING
NOTE_NAMES = ("keys", "live", "counters", "holders", "behind", "shared_until")
COPY_NAMES = ("keys", "live", "states", "dirty", "parcels")


@dataclass
class Side:
    """A store of records and one of copies, with what is noted by slot, all of it at random."""

    width: int
    stride: int
    copy_stride: int
    words: np.ndarray
    copy_words: np.ndarray
    notes: dict[str, np.ndarray]
    copies: dict[str, np.ndarray]

    @classmethod
    def at_random(cls, rng: np.random.Generator, dtype: type, sets: int) -> Side:
        width = int(rng.integers(1, 20))
        stride, copy_stride = width + int(rng.integers(0, 3)), 3 * width + int(rng.integers(0, 3))
        notes = {
            "keys": rng.permutation(1000)[:SLOTS],
            "live": rng.integers(0, 3, SLOTS).astype(np.int32),
            "counters": rng.integers(0, 9, SLOTS).astype(np.int32),
            "holders": rng.integers(0, 4, (SLOTS, sets)).astype(np.uint64),
            "behind": rng.integers(0, 4, (SLOTS, sets)).astype(np.uint64),
            "shared_until": rng.integers(0, 9, SLOTS).astype(np.int32),
        }
        copies = {
            "keys": rng.permutation(np.arange(1000, 2000))[:SLOTS],
            "live": rng.integers(0, 3, SLOTS).astype(np.int32),
            "states": rng.choice([WANTED, ACTIVE, LEAVING], SLOTS).astype(np.int8),
            "dirty": rng.random(SLOTS) < 0.5,
            "parcels": rng.integers(-1, 6, SLOTS),
        }
        words = rng.standard_normal(SLOTS * stride).astype(dtype)
        copy_words = rng.standard_normal(SLOTS * copy_stride).astype(dtype)
        return cls(width, stride, copy_stride, words, copy_words, notes, copies)

    def records(self) -> np.ndarray:
        return self.words.reshape(SLOTS, -1)[:, : self.width].copy()

    def take_over(self, keys, places, values, counters, holders, slots, acknowledged) -> np.ndarray:
        return cuda_ops.take_over(
            keys,
            places,
            values,
            counters,
            holders,
            slots,
            (self.words, self.stride, self.width),
            tuple(self.notes[name] for name in NOTE_NAMES),
            (self.copy_words, self.copy_stride),
            tuple(self.copies[name] for name in COPY_NAMES),
            HERE,
            acknowledged,
        )

    def give_up(self, slots, receiver, promotes):
        notes = tuple(self.notes[name] for name in NOTE_NAMES)
        return cuda_ops.give_up(slots, receiver, (self.words, self.stride, self.width), notes, promotes)


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_taken_over_has_the_changes_that_its_owner_lacked(dtype, sets, rng):
    for _ in range(20):
        side = Side.at_random(rng, dtype, sets)
        n, acknowledged = int(rng.integers(0, SLOTS)), int(rng.integers(0, 6))
        copied = rng.random(n) < 0.5
        places = np.where(copied, -2 - rng.permutation(SLOTS)[:n], -1)
        keys = np.where(copied, side.copies["keys"][-2 - places], rng.permutation(np.arange(2000, 3000))[:n])
        slots = rng.permutation(SLOTS)[:n]
        values = rng.standard_normal((n, side.width)).astype(dtype)
        counters = rng.integers(1, 200, n).astype(np.uint8)
        holders = rng.integers(0, 9, (n if rng.random() < 0.5 else 0, sets)).astype(np.uint64)
        before = {name: array.copy() for name, array in side.copies.items()}
        untouched = np.setdiff1d(np.arange(SLOTS), slots)
        stayed = side.records()[untouched]
        freed = side.take_over(keys, places, values, counters, holders, slots, acknowledged)
        assert freed.tolist() == (-2 - places[copied]).tolist()
        got = side.records()
        np.testing.assert_array_equal(got[untouched], stayed)
        parts = side.copy_words.reshape(SLOTS, -1)[:, : 3 * side.width].reshape(SLOTS, 3, side.width)
        for i, slot in enumerate(slots.tolist()):
            expected, copy = values[i].copy(), -2 - places[i]
            if copied[i] and before["states"][copy] in HERE:
                change = parts[copy, 0] - parts[copy, 1]
                expected += change + parts[copy, 2] if before["parcels"][copy] > acknowledged else change
            np.testing.assert_array_equal(got[slot], expected)
            notes = [side.notes[name][slot] for name in NOTE_NAMES]
            live = before["live"][copy] if copied[i] else 0
            assert [notes[0], notes[1], notes[2], notes[5]] == [keys[i], live, counters[i], 0]
            assert notes[3].tolist() == (holders[i].tolist() if len(holders) else [0] * sets)
            assert notes[4].tolist() == [0] * sets
        assert (side.copies["keys"][freed] == -1).all() and not side.copies["live"][freed].any()
        assert not side.copies["states"][freed].any() and not side.copies["dirty"][freed].any()


def test_without_values_copies_are_what_the_records_are(rng):
    side = Side.at_random(rng, np.float32, 1)
    copies, slots = rng.permutation(SLOTS)[:9], rng.permutation(SLOTS)[:9]
    held = side.copy_words.reshape(SLOTS, -1)[copies, : side.width].copy()
    none = np.empty((0, 1), np.uint64)
    side.take_over(side.copies["keys"][copies], -2 - copies, None, np.ones(9, np.int64), none, slots, 0)
    np.testing.assert_array_equal(side.records()[slots], held)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"slots": np.array([0, SLOTS])}, IndexError, rf"slots\[1\] is {SLOTS}"),
        ({"places": np.array([-1, -2 - SLOTS])}, IndexError, "outside the copies"),
        ({"places": np.array([-1, 3])}, IndexError, "is that of a record"),
        ({"values": None}, IndexError, "has no copy"),
        ({"places": np.array([-1])}, ValueError, "2 keys given with 1 places"),
    ],
)
def test_what_cannot_be_taken_over_changes_nothing(change, error, match, rng):
    side = Side.at_random(rng, np.float64, 1)
    before, words = {name: array.copy() for name, array in side.notes.items()}, side.words.copy()
    given = {
        "keys": np.array([5, 6]),
        "places": np.array([-1, -1]),
        "values": np.zeros((2, side.width)),
        "counters": np.ones(2, np.int64),
        "holders": np.empty((0, 1), np.uint64),
        "slots": np.array([1, 2]),
    } | change
    with pytest.raises(error, match=match):
        side.take_over(**given, acknowledged=0)
    np.testing.assert_array_equal(side.words, words)
    for name, array in before.items():
        np.testing.assert_array_equal(side.notes[name], array)


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("promotes", [True, False])
def test_what_is_given_up_is_sent_but_for_copies_that_are_up_to_date(promotes, sets, rng):
    for _ in range(20):
        side = Side.at_random(rng, np.float32, sets)
        slots = rng.permutation(SLOTS)[: rng.integers(0, SLOTS)]
        receiver = np.zeros(sets, np.uint64)
        receiver[rng.integers(sets)] = 1 << int(rng.integers(2))
        before, records = {name: array.copy() for name, array in side.notes.items()}, side.records()
        promoted, keys, counters, values, holders, any_holders = side.give_up(slots, receiver, promotes)
        others = ~receiver
        is_promoted = [
            promotes
            and bool((before["holders"][slot] & receiver).any())
            and not (before["behind"][slot] & receiver).any()
            for slot in slots.tolist()
        ]
        order = [s for s, p in zip(slots.tolist(), is_promoted, strict=True) if p]
        sent = [s for s, p in zip(slots.tolist(), is_promoted, strict=True) if not p]
        assert promoted == len(order)
        assert keys.tolist() == before["keys"][order + sent].tolist()
        assert counters.tolist() == (before["counters"][order + sent] + 1).tolist()
        np.testing.assert_array_equal(values, records[sent])
        np.testing.assert_array_equal(holders, before["holders"][sent] & others)
        assert any_holders == bool(holders.any())
        assert (side.notes["keys"][slots] == -1).all()
        for name in ("live", "holders", "behind"):
            assert not side.notes[name][slots].any()
        left = np.setdiff1d(np.arange(SLOTS), slots)
        for name in NOTE_NAMES:
            np.testing.assert_array_equal(side.notes[name][left], before[name][left])


def test_a_slot_that_there_is_not_cannot_be_given_up(rng):
    side = Side.at_random(rng, np.float32, 1)
    before = {name: array.copy() for name, array in side.notes.items()}
    with pytest.raises(IndexError, match=r"slots\[0\] is -1"):
        side.give_up(np.array([-1, 2]), np.array([1], np.uint64), True)
    for name, array in before.items():
        np.testing.assert_array_equal(side.notes[name], array)
