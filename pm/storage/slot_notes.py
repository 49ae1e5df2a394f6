"""What an owner notes of the slots of one store, beside the records: who needs them, when, and how often they moved."""

from __future__ import annotations

import numpy as np

import cuda_ops
from pm.storage.store import reserve_zeros

_MOVES = 3
_MARK = -1


class SlotNotes:
    """Holds, known touches, runs of uses and relocation counters by slot, in memory that is backed as slots are used.

    A hold says that a rank needs the row here: one for each of its live plans. A pin is a hold of no rank: while there
    is one the row stays. Invariant: a slot that is free has none of either, no touches, and no moves. Whoever changes
    holds or looks at them to take a row away has the lock of the manager's structure.

    Args:
        capacity: slots of the store.
        ranks: number of ranks; pins count as holds of a rank of this number.
        here: this rank.
    """

    BYTES_PER_SLOT = 8 * 4

    def __init__(self, capacity: int, ranks: int, here: int):
        self._pin, self._here = ranks, here
        self._book = reserve_zeros(8 * capacity, np.int32).reshape(-1, 8)

    def hold(self, slots: np.ndarray, rank: int) -> None:
        """Add a hold of `rank` to each of `slots` (int64 `[n]`, distinct)."""
        cuda_ops.add_holds(self._book, slots, rank, 1)

    def hold_for_use(self, slots: np.ndarray, rank: int, uses: np.ndarray) -> None:
        """As `hold`, for a use that is announced; count in `uses` how runs go on (see `Reuse`)."""
        cuda_ops.begin_holds(self._book, slots, rank, self._here, uses)

    def let_go(self, slots: np.ndarray, rank: int) -> None:
        """Take back a hold of `rank`."""
        cuda_ops.add_holds(self._book, slots, rank, -1)

    def pin(self, slots: np.ndarray, count: int = 1) -> None:
        cuda_ops.add_holds(self._book, slots, self._pin, count)

    def only_held_by(self, slots: np.ndarray, rank: int) -> np.ndarray:
        """Return for each slot whether no other rank holds it and nothing pins it (bool `[n]`)."""
        return cuda_ops.held_by_one(self._book, slots, rank)

    def worth_moving(self, slots: np.ndarray, rank: int, needed: int, stages: np.ndarray) -> np.ndarray:
        """Return which of `slots` should move to `rank`: those that no other holds, for `needed` uses ahead or a run
        that comes to one of `stages` (bool `[n]`; see `cuda_ops.select_moves`)."""
        return cuda_ops.select_moves(self._book, slots, rank, needed, stages)

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
        return cuda_ops.has_count(self._book, slots, _MARK)

    def clear(self, slots: np.ndarray) -> None:
        """The records at `slots` are gone."""
        self._book[slots] = 0

    def touch(self, slots: np.ndarray, version: int) -> np.ndarray:
        """Note that `slots` will be used at `version`; return from when each is left alone (see `note_touches`)."""
        return cuda_ops.note_touches(self._book, slots, version)
