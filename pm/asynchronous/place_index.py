"""Where the keys of a group are on one rank: one entry a key, whether the rank has its record or a copy of it."""

from __future__ import annotations

import numpy as np

import cuda_ops
from pm.storage.store import reserve_zeros

_COPY = 1 << 62
ABSENT = -1


class PlaceIndex:
    """Map from key to place: the slot of a record, -2 - slot of a copy, or -1 for a key that is not here.

    `records` and `copies` are what the two stores see of it: each an index from key to slot for its own keys.

    Args:
        keys: how many keys there may be, for an array of 4 bytes for each, of which a key that is looked for costs a
            part of a cache line; None for a hash table in memory proportional to the keys that are here.
    """

    def __init__(self, keys: int | None = None):
        self._places = _Hashed() if keys is None else _ByKey(reserve_zeros(keys, np.int32))
        self.records = _Records(self._places)
        self.copies = _Copies(self._places)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the place of each key: int64 `[n]` -> int64 `[n]`."""
        return self._places.find(keys)


class _Hashed:
    """Places in a `KeyIndex`, in which those of copies are from `_COPY` on."""

    def __init__(self, index: cuda_ops.KeyIndex | None = None):
        self._index = cuda_ops.KeyIndex() if index is None else index

    @property
    def memory_bytes(self) -> int:
        return self._index.memory_bytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        found = self._index.find(keys)
        return np.where(found >= _COPY, _COPY - 2 - found, found)

    def add(self, keys: np.ndarray, places: np.ndarray) -> None:
        self._index.add(keys, _coded(places))

    def put(self, keys: np.ndarray, places: np.ndarray) -> None:
        self._index.put(keys, _coded(places))

    def remove(self, keys: np.ndarray) -> np.ndarray:
        found = self._index.remove(keys)
        return np.where(found >= _COPY, _COPY - 2 - found, found)

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        keys, found = self._index.items()
        return keys, np.where(found >= _COPY, _COPY - 2 - found, found)

    def copy(self) -> _Hashed:
        return _Hashed(self._index.copy())


def _coded(places: np.ndarray) -> np.ndarray:
    return np.where(places >= 0, places, _COPY - 2 - places)


class _ByKey:
    """Places in an array."""

    def __init__(self, by_key: np.ndarray):
        self._by_key = by_key

    @property
    def memory_bytes(self) -> int:
        return self._by_key.nbytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        return cuda_ops.find_places(self._by_key, keys)

    def add(self, keys: np.ndarray, places: np.ndarray) -> None:
        cuda_ops.put_places(self._by_key, keys, places, fresh=True)

    def put(self, keys: np.ndarray, places: np.ndarray) -> None:
        cuda_ops.put_places(self._by_key, keys, places, fresh=False)

    def remove(self, keys: np.ndarray) -> np.ndarray:
        return cuda_ops.take_places(self._by_key, keys)

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        keys = np.flatnonzero(self._by_key)
        return keys, self._by_key[keys].astype(np.int64) - 1

    def copy(self) -> _ByKey:
        return _ByKey(self._by_key.copy())


class _Records:
    """The keys of which this rank has the records."""

    def __init__(self, places: _Hashed | _ByKey):
        self._places = places

    @property
    def memory_bytes(self) -> int:
        return self._places.memory_bytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the slot of each key, -1 where it is none of these."""
        return np.maximum(self._places.find(keys), ABSENT)

    def add(self, keys: np.ndarray, slots: np.ndarray) -> None:
        """Add keys that are not here."""
        self._places.add(keys, slots)

    def put(self, keys: np.ndarray, slots: np.ndarray) -> None:
        """Add keys that are not among these; those of copies are no copies any more."""
        self._places.put(keys, slots)

    def remove(self, keys: np.ndarray) -> np.ndarray:
        """Remove keys, all of them among these, and return their slots."""
        return self._places.remove(keys)

    def copy(self) -> _Records:
        """Return what this is now, whatever becomes of it."""
        return _Records(self._places.copy())

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (keys, slots)."""
        keys, places = self._places.items()
        mine = places >= 0
        return keys[mine], places[mine]


class _Copies:
    """The keys of which this rank has, or wants, copies."""

    memory_bytes = 0  # counted with the records

    def __init__(self, places: _Hashed | _ByKey):
        self._places = places

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the slot of each key, -1 where it is none of these."""
        return np.maximum(-2 - self._places.find(keys), ABSENT)

    def add(self, keys: np.ndarray, slots: np.ndarray) -> None:
        """Add keys that are not here."""
        self._places.add(keys, -2 - slots)

    def remove(self, keys: np.ndarray) -> np.ndarray:
        """Remove keys, all of them among these, and return their slots."""
        return -2 - self._places.remove(keys)
