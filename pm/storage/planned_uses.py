"""Which keys the batches ahead will use, and when each key is next used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

import cuda_ops

NEVER = np.int64(2**62)
"""The next use of a key that no announced batch uses; after every batch."""


@dataclass
class _Plan:
    keys: np.ndarray
    after: np.ndarray  # per key, the next batch that uses it


class PlannedUses:
    """The announced batches that have not begun, in ascending order, and per key the first and the last that uses it.

    Invariant: `_first` and `_last` hold exactly the keys of the batches here; `after` of a plan links a key's uses.
    """

    def __init__(self):
        self._plans: dict[int, _Plan] = {}
        self._first = cuda_ops.KeyIndex()
        self._last = cuda_ops.KeyIndex()
        self._begun = -1

    @property
    def batches(self) -> Iterable[int]:
        return tuple(self._plans)

    def keys_of(self, batch: int) -> np.ndarray:
        return self._plans[batch].keys

    def next_use(self, keys: np.ndarray) -> np.ndarray:
        """Return the first batch that will use each of `keys`, `NEVER` if none."""
        found = self._first.find(keys)
        return np.where(found < 0, NEVER, found)

    def add(self, batch: int, keys: np.ndarray) -> np.ndarray:
        """Announce that `batch` uses distinct `keys` (int64 `[n]`); return those of which it is the first use.

        Raises:
            ValueError: the batch does not come after those announced and begun.
        """
        newest = next(reversed(self._plans), self._begun)
        if batch <= newest:
            raise ValueError(f"batch {batch} is announced after batch {newest}; announce batches in ascending order")
        last = self._last.find(keys)
        for earlier in np.unique(last[last >= 0]).tolist():
            plan = self._plans[earlier]
            plan.after[np.isin(plan.keys, keys[last == earlier])] = batch
        self._plans[batch] = _Plan(keys.copy(), np.full(len(keys), NEVER))
        self._last.remove(keys)
        self._last.add(keys, np.full(len(keys), batch))
        nearer = keys[last < 0]
        self._first.add(nearer, np.full(len(nearer), batch))
        return nearer

    def begin(self, batch: int) -> np.ndarray:
        """Forget `batch` and all before it; return their keys (int64, distinct), whose next use is another now."""
        self._begun = max(self._begun, batch)
        forgotten = [np.empty(0, np.int64)]
        for number in [number for number in self._plans if number <= batch]:
            plan = self._plans.pop(number)
            self._first.remove(plan.keys)
            again = plan.after < NEVER
            self._first.add(plan.keys[again], plan.after[again])
            self._last.remove(plan.keys[~again])
            forgotten.append(plan.keys)
        return np.unique(np.concatenate(forgotten))
