"""What an owner notes of the slots of one store, beside the records: who needs them, when, and how often they moved."""

from __future__ import annotations

import numpy as np

import cuda_ops
from pm.store import reserve_zeros

_MOVES = 3
_MARK = -1
_CLEARLY = 0.2
_ENOUGH_USES, _REMEMBERED_USES = 1 << 7, 1 << 16


class SlotNotes:
    """Holds, known touches, last users and relocation counters by slot, in memory that is backed as slots are used.

    A hold says that a rank needs the row here: one for each of its live plans. A pin is a hold of no rank: while there
    is one the row stays. Invariant: a slot that is free has none of either, no touches, and no moves. Whoever changes
    holds or looks at them to take a row away has the lock of the manager's structure.

    Args:
        capacity: slots of the store.
        ranks: number of ranks; pins count as holds of a rank of this number.
    """

    BYTES_PER_SLOT = 3 * 4 + 4 * 4

    def __init__(self, capacity: int, ranks: int):
        self._pin = ranks
        self.latest = reserve_zeros(capacity, np.int32)
        self.before = reserve_zeros(capacity, np.int32)
        self._last_use = reserve_zeros(capacity, np.int32)  # by which rank, and whether by it again; 0: none yet
        self._next_uses = [0.0, 0.0]  # by the last user, and by another; older ones count less
        self._book = reserve_zeros(4 * capacity, np.int32).reshape(-1, 4)

    def hold(self, slots: np.ndarray, rank: int, count: int = 1) -> None:
        """Add `count` holds of `rank` to each of `slots` (int64 `[n]`, distinct); take them back if it is negative."""
        cuda_ops.add_holds(self._book, slots, rank, count)

    def pin(self, slots: np.ndarray, count: int = 1) -> None:
        cuda_ops.add_holds(self._book, slots, self._pin, count)

    def only_held_by(self, slots: np.ndarray, rank: int) -> np.ndarray:
        """Return for each slot whether no other rank holds it and nothing pins it (bool `[n]`)."""
        return cuda_ops.held_by_one(self._book, slots, rank)

    def is_worth_moving(self, slots: np.ndarray, rank: int) -> np.ndarray:
        """Return for each slot, which `rank` alone holds, whether it is likely to use it more than once (bool `[n]`).

        So it is of all rows of this store, unless their uses have shown that they seldom stay with a rank; then of
        those for which it has more than one plan, or which it was the one to use the last two times.
        """
        if not self._wander():
            return np.ones(len(slots), bool)
        return (self._book[slots, 0] > 1) | (self._last_use[slots] == _use(rank, again=True))

    def _wander(self) -> bool:
        """Whether the rank that used a row last is hardly more likely than each other to be the next."""
        again, by_others = self._next_uses
        uses = again + by_others
        return uses > _ENOUGH_USES and again - by_others / max(1, self._pin - 1) < _CLEARLY * uses

    def used(self, slots: np.ndarray, rank: int) -> None:
        """A plan of `rank` for the rows at `slots` (int64 `[n]`) is over, or they leave for it."""
        last = self._last_use[slots]
        again = (last == _use(rank)) | (last == _use(rank, again=True))
        repeated, known = int(np.count_nonzero(again)), int(np.count_nonzero(last))
        if sum(self._next_uses) > _REMEMBERED_USES:
            self._next_uses = [count / 2 for count in self._next_uses]
        self._next_uses[0] += repeated
        self._next_uses[1] += known - repeated
        self._last_use[slots] = _use(rank) + again

    def holds(self, slots: np.ndarray) -> np.ndarray:
        """Return the number of holds of each slot, pins included (int32 `[n]`)."""
        return self._book[slots, 0]

    def moves(self, slots: np.ndarray) -> np.ndarray:
        """Return how often the record of each slot has moved between ranks (int32 `[n]`)."""
        return self._book[slots, _MOVES]

    def set_moves(self, slots: np.ndarray, moves: np.ndarray) -> None:
        self._book[slots, _MOVES] = moves

    def mark(self, slots: np.ndarray) -> None:
        """Mark `slots`, which have no holds, for `is_marked`; `clear` takes the marks away."""
        self._book[slots, 0] = _MARK

    def is_marked(self, slots: np.ndarray) -> np.ndarray:
        return self._book[slots, 0] == _MARK

    def clear(self, slots: np.ndarray) -> None:
        """The records at `slots` are gone."""
        self._book[slots] = 0
        self.latest[slots] = 0
        self.before[slots] = 0
        self._last_use[slots] = 0

    def touch(self, slots: np.ndarray, version: int) -> np.ndarray:
        """Note that `slots` will be used at `version`; return from when each is left alone (see `note_touches`)."""
        return cuda_ops.note_touches(self.latest, self.before, slots, version)


def _use(rank: int, again: bool = False) -> int:
    """Return what stands for a use by `rank`, which was the one before too (`again`) or not."""
    return 2 * (rank + 1) + again
