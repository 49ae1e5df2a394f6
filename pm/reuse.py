"""Whether to move rows that one rank alone uses at once, or to copy them first: what was seen of such rows so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pm.store import RecordStore

_KEPT = 0.99
"""What was seen counts this much less with every later look, so that a workload that changes is seen to."""

_FEWEST_KNOWN = 32
_CLEARLY = 1.5
"""How much more than it loses a move has to save: it takes more of a processor than a copy does."""

_LONG_RUN = 4
"""How many times the uses that cost as much as a move are a long run."""

_BYTES_OF_A_COPY = 2
"""What a copy sends of a row beside value and gradient: its ticket. What a move sends beside the record (row, ticket,
number of moves, a note to its home now and then) is as much as the word of the record that stays behind."""


@dataclass
class Reuse:
    """How one rank comes back to rows that it alone uses, of one store, while copies are made for it.

    Of the rows looked at, `known` had been used by one rank alone before, and `repeated` of these by that very rank,
    by nobody since.
    """

    looked: float = 0.0
    known: float = 0.0
    repeated: float = 0.0

    def note(self, counts: np.ndarray) -> None:
        """Take in the counts of a look (see `cuda_ops.select_moves`)."""
        looked, known, repeated = counts.tolist()
        self.looked = _KEPT * self.looked + looked
        self.known = _KEPT * self.known + known
        self.repeated = _KEPT * self.repeated + repeated

    def uses_worth_a_move(self, store: RecordStore) -> int:
        """Return how many uses by a rank alone, ahead or before, have a record move there.

        A use of a copy costs the value and its gradient; a move costs the record, which has optimizer state besides.
        Without knowledge a record moves when as many uses have cost as much as a move does. It moves at once where
        that can be expected to save bytes: one copy less if the rank comes back, for what a move costs more than a copy
        if nobody does, and for another move if somebody else does. Where it cannot, only a row with a long run moves:
        two ranks that draw the same rows at random come back to half of them, which saves nothing.
        """
        made = store.record_class
        copy = 2 * made.dim * np.dtype(made.dtype).itemsize + _BYTES_OF_A_COPY
        move = made.record_bytes
        as_much = -(-move // copy)
        if self.known < _FEWEST_KNOWN:
            return as_much
        saved = self.repeated * copy
        lost = (self.looked - self.known) * (move - copy) + (self.known - self.repeated) * (2 * move - copy)
        return 1 if saved > _CLEARLY * lost else _LONG_RUN * as_much
