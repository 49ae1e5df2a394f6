"""Where the records of keys are, in memory that several processes share, and which of them makes the record of a key.

It is an array by key of two levels, so that keys without a record take next to no memory: of 16 keys that follow each
other, the first says where the entries are, a cache line of them, which the second has one after the other. What is
looked up most is in the caches then: of a million keys the first level has 250 kB.
"""

from __future__ import annotations

import numpy as np

from cuda_ops.cpu.atomic import add_at_once, compare_and_swap, load_first, store_last
from cuda_ops.cpu.checks import in_range, int_vector
from cuda_ops.cpu.kernels import helper, kernel

ABSENT, BEING_MADE = 0, -1
"""What is found of keys without a record; of others it is the slot of the record + 1."""
_BLOCK_BITS = 4
_BLOCK_KEYS = 1 << _BLOCK_BITS


class SharedIndex:
    """Map from the keys `0..rows - 1` to slots. Any number of threads and processes, all over the same three arrays.

    Args:
        rows: how many keys there are.
        blocks: int32 `[block_count(rows)]`.
        entries: int32 `[entry_count(rows)]`.
        used: int64 `[1]`. All three are zeros before the first of them is used.
    """

    def __init__(self, rows: int, blocks: np.ndarray, entries: np.ndarray, used: np.ndarray):
        self.rows = rows
        self._blocks, self._entries, self._used = blocks, entries, used

    @staticmethod
    def block_count(rows: int) -> int:
        """Return the number of blocks of keys."""
        return -(-rows // _BLOCK_KEYS)

    @staticmethod
    def entry_count(rows: int) -> int:
        """Return how many entries there are if all blocks have some."""
        return SharedIndex.block_count(rows) * _BLOCK_KEYS

    @property
    def memory_bytes(self) -> int:
        """Bytes of the first level, and of what was written of the second."""
        return self._blocks.nbytes + int(self._used[0]) * _BLOCK_KEYS * self._entries.itemsize

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the slots of `keys`, int64 `[n]` both, negative where there is no record yet.

        What was written before a slot was published is seen by who finds it.

        Raises:
            IndexError: there is no such key.
        """
        keys = self._checked(keys)
        slots = np.empty(keys.size, np.int64)
        _find(self._blocks, self._entries, keys, slots)
        return slots

    def claim(self, keys: np.ndarray) -> np.ndarray:
        """Say that this caller makes the records of those `keys` (int64 `[n]`) that nobody has made or claimed.

        Returns:
            int32 `[n]`: what each was before. `ABSENT` ones are this caller's now, and `BEING_MADE` until `publish`;
            those that were `BEING_MADE` are so by another, or its neighbours are: ask again.

        Raises:
            IndexError: there is no such key.
        """
        keys = self._checked(keys)
        before = np.empty(keys.size, np.int32)
        _claim(self._blocks, self._entries, self._used, keys, before)
        return before

    def publish(self, keys: np.ndarray, slots: np.ndarray | None) -> None:
        """Say that the records of `keys`, which this caller has claimed, are at `slots` (int64 `[n]` both), or that
        they were not made (None).

        Raises:
            IndexError: there is no such key.
            ValueError: there is not a slot for each, or one was not claimed.
        """
        keys = self._checked(keys)
        entries = np.full(keys.size, ABSENT, np.int32) if slots is None else (slots + 1).astype(np.int32)
        if entries.shape != keys.shape:
            raise ValueError(f"{entries.size} slots given for {keys.size} keys")
        at = _publish(self._blocks, self._entries, keys, entries)
        if at < keys.size:
            raise ValueError(f"key {keys[at]} was not claimed: claim it before its slot is published")

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (keys, their slots) of all records, int64 `[n]` both, keys ascending."""
        blocks = np.flatnonzero(self._blocks > 0)
        entries = self._entries.reshape(-1, _BLOCK_KEYS)[self._blocks[blocks] - 1].reshape(-1)
        at = np.flatnonzero(entries > 0)
        keys = (blocks[at >> _BLOCK_BITS] << _BLOCK_BITS) | (at & (_BLOCK_KEYS - 1))
        return keys, entries[at].astype(np.int64) - 1

    def copy(self) -> SharedIndex:
        """Return what it is now, in memory of this process."""
        blocks = self._blocks.copy()  # first: what these name is there
        used = self._used.copy()
        return SharedIndex(self.rows, blocks, self._entries[: int(used[0]) * _BLOCK_KEYS].copy(), used)

    def _checked(self, keys: np.ndarray) -> np.ndarray:
        keys = int_vector(keys, "keys")
        in_range(keys, self.rows, "keys")
        return keys


@helper
def _entry_of(block, key):
    return np.uint64(((block - 1) << _BLOCK_BITS) | (key & (_BLOCK_KEYS - 1)))


@kernel
def _find(blocks, entries, keys, slots):
    for i in range(keys.size):
        block = load_first(blocks, np.uint64(keys[i] >> _BLOCK_BITS))
        entry = np.int32(ABSENT)
        if block > 0:
            entry = load_first(entries, _entry_of(block, keys[i]))
        slots[i] = np.int64(entry) - 1


@kernel
def _claim(blocks, entries, used, keys, before):
    for i in range(keys.size):
        at = np.uint64(keys[i] >> _BLOCK_BITS)
        block = load_first(blocks, at)
        if block == ABSENT:
            block = compare_and_swap(blocks, at, np.int32(ABSENT), np.int32(BEING_MADE))
            if block == ABSENT:
                block = np.int32(add_at_once(used, np.uint64(0), 1) + 1)
                store_last(blocks, at, block)
        before[i] = BEING_MADE
        if block > 0:
            before[i] = compare_and_swap(entries, _entry_of(block, keys[i]), np.int32(ABSENT), np.int32(BEING_MADE))


@kernel
def _publish(blocks, entries, keys, values):
    for i in range(keys.size):
        block = load_first(blocks, np.uint64(keys[i] >> _BLOCK_BITS))
        if block <= 0 or load_first(entries, _entry_of(block, keys[i])) != BEING_MADE:
            return i
        store_last(entries, _entry_of(block, keys[i]), values[i])
    return keys.size
