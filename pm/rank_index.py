"""A map from keys to ranks: who owns a key, or where it went, with a number that says how new that is."""

from __future__ import annotations

import numpy as np

import cuda_ops
from pm.storage.store import reserve_zeros

_RANK_BITS = 16
_RANK_MASK = (1 << _RANK_BITS) - 1
MOST_RANKS = _RANK_MASK
NOBODY = -1


class RankIndex:
    """Map from key to (rank, number), in memory proportional to the keys that it has."""

    def __init__(self):
        self._index = cuda_ops.KeyIndex()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def memory_bytes(self) -> int:
        return self._index.memory_bytes

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (ranks int64 `[n]`, -1 for none; numbers int64 `[n]`, -1 for none)."""
        if not len(self._index):
            nothing = np.full(len(keys), NOBODY, np.int64)
            return nothing, nothing.copy()
        found = self._index.find(keys)
        return np.where(found < 0, NOBODY, found & _RANK_MASK), found >> _RANK_BITS

    def put(self, keys: np.ndarray, ranks: np.ndarray | int, numbers: np.ndarray | int) -> None:
        """Set what distinct `keys` (int64 `[n]`) map to."""
        self._index.put(keys, _entries(len(keys), ranks, numbers))

    def put_newer(self, keys: np.ndarray, ranks: np.ndarray | int, numbers: np.ndarray) -> None:
        """As `put`, but for keys that are there with a larger number, or with this one and a rank as large."""
        self._index.put_larger(keys, _entries(len(keys), ranks, numbers))

    def remove(self, keys: np.ndarray) -> None:
        if len(self._index):
            self._index.remove(keys)

    def items(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (keys, ranks, numbers), int64 each, in no order."""
        keys, entries = self._index.items()
        return keys, entries & _RANK_MASK, entries >> _RANK_BITS

    def clear(self) -> None:
        self._index = cuda_ops.KeyIndex()


class RankArray:
    """As `RankIndex`, but an array of 8 bytes for each of so many keys; numbers are above 0, and no key is removed."""

    def __init__(self, keys: int):
        self._entries = reserve_zeros(keys, np.int64)
        self._is_empty = True

    def __bool__(self) -> bool:
        return not self._is_empty

    @property
    def memory_bytes(self) -> int:
        return self._entries.nbytes

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (ranks int64 `[n]`, -1 for none; numbers int64 `[n]`, -1 for none)."""
        found = self._entries[keys]
        found[found == 0] = -1
        return np.where(found < 0, NOBODY, found & _RANK_MASK), found >> _RANK_BITS

    def put_newer(self, keys: np.ndarray, ranks: np.ndarray | int, numbers: np.ndarray) -> None:
        """Set what distinct `keys` (int64 `[n]`) map to, but not where that is a larger number, or as large a rank with
        this one."""
        self._entries[keys] = np.maximum(self._entries[keys], _entries(len(keys), ranks, numbers))
        self._is_empty = self._is_empty and not len(keys)

    def items(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (keys, ranks, numbers), int64 each, by key."""
        keys = np.flatnonzero(self._entries)
        entries = self._entries[keys]
        return keys, entries & _RANK_MASK, entries >> _RANK_BITS


def _entries(count: int, ranks: np.ndarray | int, numbers: np.ndarray | int) -> np.ndarray:
    entries = np.empty(count, np.int64)
    entries[...] = numbers
    return (entries << _RANK_BITS) | ranks
