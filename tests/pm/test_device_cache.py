"""The cache of rows: the right rows, pinned while they are used, and as few copies as the future allows."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pm.device.device_cache import DeviceCache
from pm.device.turns_to_go import TurnsToGo
from pm.storage.planned_uses import NEVER, PlannedUses

seeds = st.integers(0, 2**32 - 1)
DIM = 3


class Rows:
    """A memory of rows; says how many were read."""

    def __init__(self, count, rng):
        self.rows = rng.standard_normal((count, DIM))

    def read(self, places):
        assert len(np.unique(places)) == len(places)
        return self.rows[places].copy()

    def write(self, places, rows):
        assert len(np.unique(places)) == len(places)
        self.rows[places] = rows


def make(rng, keys, slots):
    host, device = Rows(keys, rng), Rows(slots, rng)
    return DeviceCache(slots, host, device, row_bytes=DIM * 8), host, device


def draw_batches(rng, keys, most, count):
    """Batches of distinct keys, popular ones among them."""
    chances = (np.arange(keys) + 1.0) ** -rng.uniform(0, 1.5)
    chances = rng.permutation(chances / chances.sum())
    return [rng.choice(keys, rng.integers(0, min(most, keys) + 1), replace=False, p=chances) for _ in range(count)]


@settings(max_examples=40)
@given(seeds)
def test_training_through_it_is_training_without_it(seed):
    """Batches announced or not, truthfully or not, begun two at a time, some skipped, some that change nothing."""
    rng = np.random.default_rng(seed)
    keys, slots = int(rng.integers(4, 60)), int(rng.integers(4, 30))
    cache, host, device = make(rng, keys, slots)
    expected = host.rows.copy()
    batches = draw_batches(rng, keys, slots // 2, 30)
    lookahead, announced, open_batches = int(rng.integers(0, 6)), 0, []
    for number, used in enumerate(batches):
        while announced < min(len(batches), number + 1 + lookahead):
            if announced >= number and rng.random() < 0.9:
                told = batches[announced] if rng.random() < 0.8 else draw_batches(rng, keys, slots // 2, 1)[0]
                cache.intend(announced, told)
            announced += 1
        if rng.random() < 0.7:
            cache.prefetch()
        if rng.random() < 0.1:
            continue
        places = cache.begin(number, used)
        np.testing.assert_array_equal(device.rows[places], expected[used])
        step = rng.standard_normal((len(used), DIM)) * (rng.random() < 0.8)
        open_batches.append((number, used, places, step))
        if len(open_batches) == 2 or rng.random() < 0.5:
            rng.shuffle(open_batches)
            for begun, its_keys, its_places, change in open_batches:
                np.testing.assert_array_equal(device.rows[its_places], expected[its_keys])
                device.rows[its_places] += change
                expected[its_keys] += change
                cache.finish(begun, changed=bool(change.any()))
            open_batches.clear()
    for begun, its_keys, its_places, _ in open_batches:
        np.testing.assert_array_equal(device.rows[its_places], expected[its_keys])
        cache.finish(begun)
    cache.flush()
    np.testing.assert_array_equal(host.rows, expected)
    stats = cache.stats()
    assert stats["late"] <= stats["looked_up"] and stats["late"] <= stats["fetched"]


def fewest_fetches(batches, slots):
    """By trying every choice of rows to keep."""
    costs = {frozenset(): 0}
    for used in map(frozenset, batches):
        after = {}
        for held, cost in costs.items():
            missing = used - held
            others = sorted(held - used)
            kept_count = min(len(others), slots - len(used))
            for kept in itertools.combinations(others, kept_count):
                state = used | frozenset(kept)
                after[state] = min(after.get(state, 10**9), cost + len(missing))
        costs = after
    return min(costs.values())


@settings(max_examples=60)
@given(seeds)
def test_with_the_whole_future_known_it_fetches_as_few_rows_as_can_be(seed):
    rng = np.random.default_rng(seed)
    keys, slots = int(rng.integers(3, 8)), int(rng.integers(2, 5))
    batches = [list(map(int, b)) for b in draw_batches(rng, keys, min(slots, 3), 8)]
    cache, _, _ = make(rng, keys, slots)
    for number, used in enumerate(batches):
        cache.intend(number, np.array(used, np.int64))
    for number, used in enumerate(batches):
        cache.begin(number, np.array(used, np.int64))
        cache.finish(number)
    assert cache.stats()["fetched"] == fewest_fetches(batches, slots)


@settings(max_examples=20)
@given(seeds)
def test_no_row_is_late_where_two_batches_fit(seed):
    rng = np.random.default_rng(seed)
    keys, slots = 200, 40
    batches = draw_batches(rng, keys, 20, 30)
    cache, _, _ = make(rng, keys, slots)
    cache.intend(0, batches[0])
    for number, used in enumerate(batches):
        cache.prefetch()
        if number + 1 < len(batches):
            cache.intend(number + 1, batches[number + 1])
        cache.begin(number, used)
        cache.prefetch()  # while the batch is worked on
        cache.finish(number)
    assert cache.stats()["late"] == 0 and cache.stats()["miss_rate"] == 0


def test_without_announcements_the_row_unused_for_longest_goes_and_misses_are_counted():
    cache, _, _ = make(np.random.default_rng(), 10, 3)
    for number, key in enumerate([0, 1, 2, 0, 3, 0, 1]):
        cache.begin(number, np.array([key]))
        cache.finish(number, changed=False)
    assert cache.stats() == {
        "looked_up": 7,
        "late": 5,
        "fetched": 5,
        "written_back": 0,
        "evicted": 2,
        "miss_rate": 5 / 7,
    }


def test_a_batch_that_does_not_fit_states_the_bytes_and_changes_nothing():
    cache, _, device = make(np.random.default_rng(), 100, 10)
    cache.intend(0, np.arange(4))
    cache.intend(2, np.arange(20, 26))
    assert cache.prefetch() == 2
    cache.begin(0, np.arange(4))
    with pytest.raises(MemoryError, match=r"batch 1 needs 8 rows.*hold 3 others: 264 bytes.*has 240; give it more"):
        cache.begin(1, np.arange(3, 11))
    held = cache.begin(1, np.arange(3, 9))  # rows brought ahead give way
    assert len(np.unique(held)) == 6
    with pytest.raises(ValueError, match="batch 1 has begun already"):
        cache.begin(1, np.arange(1))
    cache.finish(0)
    cache.finish(1)
    with pytest.raises(ValueError, match="batch 1 is not in use"):
        cache.finish(1)
    with pytest.raises(ValueError, match="batch 2 is announced after batch 2"):
        cache.intend(2, np.arange(1))
    assert len(cache.begin(2, np.arange(20, 30))) == 10


@settings(max_examples=40)
@given(seeds)
def test_planned_uses_are_those_of_a_scan(seed):
    rng = np.random.default_rng(seed)
    planned, plain = PlannedUses(), {}
    number = 0
    for _ in range(40):
        if rng.random() < 0.6:
            number += int(rng.integers(1, 3))
            keys = rng.permutation(12)[: rng.integers(0, 8)]
            before = {key for used in plain.values() for key in used.tolist()}
            assert set(planned.add(number, keys).tolist()) == set(keys.tolist()) - before
            plain[number] = keys
        elif plain:
            begun = int(rng.choice(list(plain)))
            over = {key for at, used in plain.items() if at <= begun for key in used.tolist()}
            assert planned.begin(begun).tolist() == sorted(over)
            plain = {at: used for at, used in plain.items() if at > begun}
        expected = [min((at for at, used in plain.items() if key in used), default=NEVER) for key in range(12)]
        assert planned.next_use(np.arange(12)).tolist() == expected
        assert list(planned.batches) == list(plain)


@settings(max_examples=40)
@given(seeds)
def test_turns_are_those_of_a_sorted_list(seed):
    rng = np.random.default_rng(seed)
    turns, plain, clock = TurnsToGo(20), {}, itertools.count()
    for _ in range(60):
        slots = rng.permutation(20)[: rng.integers(0, 6)]
        choice = rng.integers(0, 3)
        if choice == 0:
            uses = rng.choice([3, 5, 8, NEVER], len(slots))
            turns.enter(slots, uses)
            plain |= {slot: (-use, next(clock)) for slot, use in zip(slots.tolist(), uses.tolist(), strict=True)}
        elif choice == 1:
            turns.leave(slots)
            plain = {slot: turn for slot, turn in plain.items() if slot not in slots}
        else:
            count = int(rng.integers(0, len(plain) + 1))
            first = sorted(plain, key=plain.get)[:count]
            assert sorted(turns.take(count).tolist()) == sorted(first)
            for slot in first:
                del plain[slot]
        assert len(turns) == len(plain)
    with pytest.raises(ValueError, match="slots are asked for"):
        turns.take(len(plain) + 1)


def test_entries_that_are_void_do_not_pile_up():
    turns = TurnsToGo(8)
    for _ in range(2000):
        turns.enter(np.arange(8), np.full(8, NEVER))
    assert sum(len(slots) for waiting in turns._entries.values() for slots, _ in waiting) <= 4 * 8 + 1024 + 8
    assert turns.take(8).tolist() == list(range(8))


def test_what_is_held_for_no_batch_stays_until_it_is_let_go_and_forgets_no_plan():
    rng = np.random.default_rng()
    cache, host, device = make(rng, keys=20, slots=6)
    cache.intend(3, np.array([0, 1, 2]))
    number, slots = cache.hold(np.array([7, 8, 9]))
    assert number < 0
    np.testing.assert_array_equal(device.rows[slots], host.rows[[7, 8, 9]])
    device.rows[slots] += 1
    cache.changed(slots)
    assert cache.prefetch() == 1  # batch 3 is still announced, and has room beside what is held
    cache.begin(3, np.array([0, 1, 2]))
    with pytest.raises(MemoryError, match=r"a step needs 2 rows, .* hold 6 others"):
        cache.hold(np.array([10, 11]))
    expected = device.rows[slots].copy()
    cache.let_go()
    assert cache.slots_in_use(3) is None
    cache.hold(np.arange(10, 16))
    np.testing.assert_array_equal(host.rows[[7, 8, 9]], expected)


def test_rows_that_were_changed_on_the_host_are_brought_again():
    rng = np.random.default_rng()
    cache, host, device = make(rng, keys=20, slots=6)
    slots = cache.begin(0, np.array([4, 2, 9]))
    cache.flush()
    host.rows[:] = rng.standard_normal(host.rows.shape)
    cache.reload()
    np.testing.assert_array_equal(device.rows[slots], host.rows[[4, 2, 9]])
