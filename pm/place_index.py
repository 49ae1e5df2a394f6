"""Where the keys of a group are on one rank: one entry a key, whether the rank has its record or a copy of it."""

from __future__ import annotations

import numpy as np

import cuda_ops

_COPY = 1 << 62
ABSENT = -1


class PlaceIndex:
    """Map from key to place: the slot of a record, -2 - slot of a copy, or -1 for a key that is not here.

    `records` and `copies` are what the two stores see of it: each an index from key to slot for its own keys.
    """

    def __init__(self):
        self._index = cuda_ops.KeyIndex()
        self.records = _Records(self._index)
        self.copies = _Copies(self._index)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the place of each key: int64 `[n]` -> int64 `[n]`."""
        found = self._index.find(keys)
        return np.where(found >= _COPY, _COPY - 2 - found, found)


class _Records:
    """The keys of which this rank has the records."""

    def __init__(self, index: cuda_ops.KeyIndex):
        self._index = index

    @property
    def memory_bytes(self) -> int:
        return self._index.memory_bytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the slot of each key, -1 where it is none of these."""
        found = self._index.find(keys)
        return np.where(found < _COPY, found, ABSENT)

    def add(self, keys: np.ndarray, slots: np.ndarray) -> None:
        """Add keys that are not here."""
        self._index.add(keys, slots)

    def put(self, keys: np.ndarray, slots: np.ndarray) -> None:
        """Add keys that are not among these; those of copies are no copies any more."""
        self._index.put(keys, slots)

    def remove(self, keys: np.ndarray) -> np.ndarray:
        """Remove keys, all of them among these, and return their slots."""
        return self._index.remove(keys)

    def copy(self) -> _Records:
        """Return what this is now, whatever becomes of it."""
        return _Records(self._index.copy())

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (keys, slots)."""
        keys, found = self._index.items()
        mine = found < _COPY
        return keys[mine], found[mine]


class _Copies:
    """The keys of which this rank has, or wants, copies."""

    memory_bytes = 0  # counted with the records

    def __init__(self, index: cuda_ops.KeyIndex):
        self._index = index

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the slot of each key, -1 where it is none of these."""
        found = self._index.find(keys)
        return np.where(found >= _COPY, found - _COPY, ABSENT)

    def add(self, keys: np.ndarray, slots: np.ndarray) -> None:
        """Add keys that are not here."""
        self._index.add(keys, slots + _COPY)

    def remove(self, keys: np.ndarray) -> np.ndarray:
        """Remove keys, all of them among these, and return their slots."""
        return self._index.remove(keys) - _COPY
