"""Whether to move rows that one rank alone uses at once, or to copy them: from how the use of such rows goes on.

Uses count as they are announced, not when they are over: a decision is made as many steps ahead as batches are read.
"""

from __future__ import annotations

import numpy as np

from pm.storage.store import RecordStore

_LENGTHS = (1, 1, 2, 3)
"""How many uses a run has had at each of its stages, at least."""

_FEWEST_KNOWN = 32
_MOST_KEPT = 1 << 14
"""What was seen is halved then, so that a workload that changes is seen to."""

_BYTES_OF_A_COPY = 2
"""What a copy sends of a row beside value and gradient: its ticket. What a move sends beside the record (row, ticket,
number of moves, a note to its home now and then) is as much as the word of the record that stays behind."""

_USES_AHEAD = 2
"""How many uses a row is taken to have yet as its last ones were, where it is."""

_CLEARLY = 0.25
"""What a move has to save to be made, in copies: it takes more of a processor than a copy does."""


class Reuse:
    """How ranks come back to the rows of one table, as far as their owner sees.

    Args:
        ranks: how many there are.
        here: the owner.
    """

    def __init__(self, ranks: int, here: int):
        self._others = np.arange(ranks) != here
        self.uses = np.zeros((ranks, len(_LENGTHS), 3), np.int64)
        """Of runs of uses by a rank that had come to a stage: by whom the next was (see `cuda_ops.begin_holds`)."""

    def worth_a_move(self, rank: int, store: RecordStore) -> tuple[int, np.ndarray]:
        """Return for how many uses ahead by `rank` alone a record moves there, and at which stages of a run (bool
        `[4]`).

        A use of a copy costs the value and its gradient; a move costs the record, which has optimizer state besides.
        A row that moves saves a copy each time that its new owner comes back to it, and costs one each time that the
        old one does; others ask either way. So two ranks that draw the same rows at random, and come back to half of
        them, save nothing, while rows that are mostly one rank's move there. Before enough was seen, a record moves
        when as many uses as cost what a move does were paid for, which is competitive with whoever knows the future
        (Black and Sleator 1989 on the migration of pages). Of a rank of which too little was seen the others tell.
        """
        uses = self.uses[rank]
        if uses.sum() > _MOST_KEPT:
            uses //= 2
        made = store.record_class
        copy = 2 * made.dim * np.dtype(made.dtype).itemsize + _BYTES_OF_A_COPY
        move = made.record_bytes
        as_much = -(-move // copy)
        stages, enough = [], False
        for stage, next_uses in enumerate(uses.tolist()):
            if sum(next_uses) < _FEWEST_KNOWN:
                next_uses = self.uses[self._others, stage].sum(axis=0).tolist()
            same, owner, _ = next_uses
            seen = sum(next_uses)
            if seen < _FEWEST_KNOWN:
                stages.append(_LENGTHS[stage] > as_much)
            else:
                enough = True
                stages.append((same - owner) / seen * copy * _USES_AHEAD > move - copy + _CLEARLY * copy)
        return (2 * as_much if enough else as_much), np.array(stages)
