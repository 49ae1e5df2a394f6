"""KeyIndex: from key to slot, by open addressing.

Linear probing in one array of [key, slot] entries, so that most probes cost one cache line. A key's home is
its hash scaled to the capacity (Lemire 2019, "Fast random integer generation in an interval"), which allows
any capacity; and as homes ascend with the hash, growing copies entries almost in order. Probing does not wrap
around: a tail of places behind the capacity takes what the last clusters need. Removal moves later entries
back (Knuth, TAOCP 3, 6.4, algorithm R): there are no tombstones.
"""

import numpy as np

from cuda_ops.cpu.checks import int_vector, writable
from cuda_ops.cpu.kernels import helper, kernel, mix, prefetch
from cuda_ops.dispatch import as_array

_EMPTY = -1
_MIN_CAPACITY = 16
_MAX_CAPACITY = 1 << 31  # the product of a 32-bit hash and the capacity must stay within int64
_MAX_LOAD = 0.85
_MAX_TAIL = 256
# From this capacity the index grows by less at a time: memory then counts for more than the time to copy.
_LARGE_CAPACITY = 1 << 20
_KEYS_AHEAD = 16
_FOUND_AHEAD = 24


class KeyIndex:
    """Map from distinct non-negative int64 keys to non-negative int64 slots. Not for several threads at once.

    Invariant: `_entries` is [capacity + tail, 2]; a place is empty (key -1, slot -1) or holds a key and its
    slot; no place from a key's home to its own is empty; the last place is empty; at most 85 % of the
    capacity is taken.

    Args:
        expected: number of keys to make room for at once.
    """

    def __init__(self, expected=0):
        self._size = 0
        self._allocate(_capacity_for(expected))

    def __len__(self):
        return self._size

    @property
    def memory_bytes(self):
        """Bytes of the index, empty places included."""
        return self._entries.nbytes

    def find(self, keys, out=None):
        """Return the slot of each key, -1 where it is absent: int64 [n]. Keys may repeat.

        Args:
            keys: [n] int64; a negative one is absent.
            out: [n] int64, not overlapping `keys`; allocated if not given.
        """
        keys = _keys(keys, "find")
        out = np.empty(keys.size, np.int64) if out is None else as_array(out, "KeyIndex.find")
        _find(self._entries, self._capacity, keys, writable(out, "out", np.int64, keys.shape))
        return out

    def add(self, keys, slots):
        """Add keys that the index does not have.

        Args:
            keys: [n] int64, distinct, not negative.
            slots: [n] int64, not negative.

        Raises:
            KeyError: a key is there already or is given twice; the index holds what it held before the call.
            ValueError: a key or slot is negative, or the numbers differ; nothing is added.
        """
        keys = _keys(keys, "add")
        slots = int_vector(as_array(slots, "KeyIndex.add"), "slots")
        _check_pairs(keys, slots)
        if self._size + keys.size > self._capacity * _MAX_LOAD:
            self._grow(self._size + keys.size)
        added, duplicate = _add(self._entries, self._capacity, keys, slots, 0)
        while added < keys.size and not duplicate:
            self._grow(self._size + keys.size)
            added, duplicate = _add(self._entries, self._capacity, keys, slots, added)
        if duplicate:
            _remove(self._entries, self._capacity, keys[:added], np.empty(added, np.int64))
            raise KeyError(f"key {keys[added]} (position {added}) is in the index already; find it before adding it")
        self._size += keys.size

    def put(self, keys, slots):
        """Set what keys map to, whether the index has them or not.

        Args:
            keys: [n] int64, not negative; where one is repeated the last wins.
            slots: [n] int64, not negative.

        Raises:
            ValueError: a key or slot is negative, or the numbers differ; nothing is set.
        """
        self._put(keys, slots, "put", False)

    def put_larger(self, keys, slots):
        """As `put`, but keys that map to what is as large or larger stay as they are.

        Args:
            keys: [n] int64, not negative.
            slots: [n] int64, not negative.

        Raises:
            ValueError: a key or slot is negative, or the numbers differ; nothing is set.
        """
        self._put(keys, slots, "put_larger", True)

    def _put(self, keys, slots, verb, larger):
        keys = _keys(keys, verb)
        slots = int_vector(as_array(slots, f"KeyIndex.{verb}"), "slots")
        _check_pairs(keys, slots)
        if self._size + keys.size > self._capacity * _MAX_LOAD:
            self._grow(self._size + keys.size)
        done, added = _put(self._entries, self._capacity, keys, slots, 0, larger)
        self._size += added
        while done < keys.size:
            self._grow(self._size + keys.size - done)
            done, added = _put(self._entries, self._capacity, keys, slots, done, larger)
            self._size += added

    def remove(self, keys):
        """Remove keys and return their slots, -1 where a key is absent (or repeats in this call): int64 [n].

        Args:
            keys: [n] int64.
        """
        keys = _keys(keys, "remove")
        slots = np.empty(keys.size, np.int64)
        self._size -= _remove(self._entries, self._capacity, keys, slots)
        return slots

    def items(self):
        """Return (keys, slots), int64 [len] each, in the order of the index."""
        taken = np.flatnonzero(self._entries[:, 0] != _EMPTY)
        return self._entries[taken, 0], self._entries[taken, 1]

    def copy(self):
        """Return an index of the same keys and slots; this costs less than `items`."""
        made = KeyIndex.__new__(KeyIndex)
        made._size, made._capacity, made._entries = self._size, self._capacity, self._entries.copy()
        return made

    def _allocate(self, capacity):
        self._capacity = capacity
        self._entries = np.full((capacity + min(capacity, _MAX_TAIL), 2), _EMPTY, np.int64)

    def _grow(self, size):
        larger = self._capacity * 3 // 2 if self._capacity < _LARGE_CAPACITY else self._capacity * 5 // 4
        old = self._entries
        self._allocate(max(larger, _capacity_for(size)))
        _copy(old, self._entries, self._capacity)


def _keys(keys, verb):
    return int_vector(as_array(keys, f"KeyIndex.{verb}"), "keys")


def _check_pairs(keys, slots):
    if keys.size != slots.size:
        raise ValueError(f"{keys.size} keys given with {slots.size} slots")
    if keys.size and (keys.min() < 0 or slots.min() < 0):
        raise ValueError(f"keys and slots must not be negative, got key {keys.min()} and slot {slots.min()}")


def _capacity_for(size):
    capacity = max(_MIN_CAPACITY, int(size / _MAX_LOAD) + 1)
    if capacity > _MAX_CAPACITY:
        raise ValueError(f"{size} keys are too many for one index (at most {int(_MAX_CAPACITY * _MAX_LOAD)})")
    return capacity


@helper
def _home(key, capacity):
    return (np.int64(mix(key) >> np.uint64(32)) * capacity) >> 32


@helper
def _homes(keys, capacity, homes):
    for i in range(keys.size):
        homes[i] = _home(keys[i], capacity)


@helper
def _touch_ahead(entries, homes, i):
    """Prefetch the cache lines in which the key `_KEYS_AHEAD` after the i-th will mostly be found."""
    if i + _KEYS_AHEAD < homes.size:
        prefetch(entries, 2 * homes[i + _KEYS_AHEAD])
        prefetch(entries, 2 * homes[i + _KEYS_AHEAD] + 7)


@helper
def _probe(entries, home, key):
    """First place from `home` on that holds `key` or is empty."""
    place = home
    while entries[place, 0] != key and entries[place, 0] != _EMPTY:
        place += 1
    return place


@kernel
def _find(entries, capacity, keys, out):
    _homes(keys, capacity, out)
    flat = entries.reshape(-1)
    count = keys.size
    for i in range(count):
        if i + _FOUND_AHEAD < count:
            prefetch(flat, 2 * out[i + _FOUND_AHEAD])
            prefetch(flat, 2 * out[i + _FOUND_AHEAD] + 7)
        # Four places are compared without a branch, for in which of them a key is nobody can predict; the places behind
        # the capacity are at least as many. Keys that are absent, or farther from home, are looked for one by one.
        key, home = keys[i], np.uint64(out[i])
        passed, going = np.uint64(0), np.uint64(1)
        for j in range(4):
            going &= np.uint64(flat[np.uint64(2) * (home + np.uint64(j))] != key)
            passed += going
        place = home if going else home + passed
        while flat[np.uint64(2) * place] != key and flat[np.uint64(2) * place] != _EMPTY:
            place += np.uint64(1)
        out[i] = flat[np.uint64(2) * place + np.uint64(1)]


@kernel
def _add(entries, capacity, keys, slots, first):
    """Add keys from the position `first` on, until one is there already or the tail is full.

    Return (number of keys that are in, whether it ended at a key that was there).
    """
    last = len(entries) - 1
    homes = np.empty(keys.size, np.int64)
    _homes(keys, capacity, homes)
    for i in range(first, keys.size):
        _touch_ahead(entries, homes, i)
        place = _probe(entries, homes[i], keys[i])
        if entries[place, 0] != _EMPTY:
            return i, True
        if place == last:
            return i, False
        entries[place, 0] = keys[i]
        entries[place, 1] = slots[i]
    return keys.size, False


@kernel
def _put(entries, capacity, keys, slots, first, larger):
    """Set keys from the position `first` on, until the tail is full; with `larger`, none to a smaller slot.

    Return (position after the last that is set, number of keys that were not there).
    """
    last = len(entries) - 1
    homes = np.empty(keys.size, np.int64)
    _homes(keys, capacity, homes)
    added = 0
    for i in range(first, keys.size):
        _touch_ahead(entries, homes, i)
        place = _probe(entries, homes[i], keys[i])
        if entries[place, 0] == _EMPTY:
            if place == last:
                return i, added
            entries[place, 0] = keys[i]
            added += 1
        elif larger and entries[place, 1] >= slots[i]:
            continue
        entries[place, 1] = slots[i]
    return keys.size, added


@kernel
def _remove(entries, capacity, keys, slots):
    """Remove keys; slots[i] = slot of keys[i] or -1. Return how many were removed."""
    removed = 0
    _homes(keys, capacity, slots)
    for i in range(keys.size):
        _touch_ahead(entries, slots, i)
        place = _probe(entries, slots[i], keys[i])
        slots[i] = entries[place, 1]
        if entries[place, 0] != _EMPTY:
            _close_gap(entries, capacity, place)
            removed += 1
    return removed


@helper
def _close_gap(entries, capacity, gap):
    """Empty the place `gap`, moving later entries of its cluster back where their homes allow it."""
    place = gap + 1
    while entries[place, 0] != _EMPTY:
        if _home(entries[place, 0], capacity) <= gap:
            entries[gap, 0] = entries[place, 0]
            entries[gap, 1] = entries[place, 1]
            gap = place
        place += 1
    entries[gap, 0] = _EMPTY
    entries[gap, 1] = _EMPTY


@kernel
def _copy(source, target, capacity):
    """Add all entries of `source` to the empty `target` of a larger capacity.

    They fit: which places are taken does not depend on the order of adding, and the places between any key's
    home and the end of the capacity are no fewer in the larger one, so that no more of its tail is needed.
    """
    for i in range(len(source)):
        if source[i, 0] == _EMPTY:
            continue
        place = _probe(target, _home(source[i, 0], capacity), source[i, 0])
        target[place, 0] = source[i, 0]
        target[place, 1] = source[i, 1]
