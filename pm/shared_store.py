"""Records that all ranks of a machine read and update where they are: with staleness, no row of them moves.

The record of key k is at slot k, in memory that every rank has mapped, and takes memory page by page as rows are first
touched. Whoever needs a row first makes its record: what a row starts from does not depend on who does. From then on
any rank updates it, under a lock of its own (`cuda_ops.sgd_update_shared`), as threads of one process would; lock-free
readers are Hogwild's (Niu, Recht, Re, Wright 2011). For what must be done once by somebody, as writing a checkpoint,
each rank owns a range of the keys.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.shared_memory import SharedBlock
from pm.store import RecordClass, RecordStore

if TYPE_CHECKING:
    from pm.snapshot import Snapshot

_PAGE_BYTES = 4096
_PAUSE_SECONDS = 2e-5
_UPDATES = {
    cuda_ops.sgd_update: cuda_ops.sgd_update_shared,
    cuda_ops.adagrad_update: cuda_ops.adagrad_update_shared,
    cuda_ops.rowwise_adagrad_update: cuda_ops.rowwise_adagrad_update_shared,
}


class OwnKeys:
    """The keys of a shared store whose records were made, of the range that one rank owns. Keys are slots.

    Args:
        states: uint8 `[any]` by key, as `cuda_ops.claim_rows` has them.
        first: the first key of `states`.
    """

    def __init__(self, states: np.ndarray, first: int):
        self._states, self.first = states, first

    def __len__(self) -> int:
        return int(np.count_nonzero(self._states == cuda_ops.MADE))

    @property
    def memory_bytes(self) -> int:
        return self._states.nbytes

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (keys, their slots): the same, int64 `[n]`, ascending."""
        keys = np.flatnonzero(self._states == cuda_ops.MADE) + self.first
        return keys, keys

    def free(self) -> np.ndarray:
        """Return the slots (int64 `[n]`) up to the last of the range that these are not."""
        unmade = np.flatnonzero(self._states != cuda_ops.MADE) + self.first
        return np.concatenate([np.arange(self.first, dtype=np.int64), unmade])

    def copy(self) -> OwnKeys:
        """Return what it is now."""
        return OwnKeys(self._states.copy(), self.first)


class SharedStore(RecordStore):
    """A store of which every rank of the machine has one over the same memory.

    Invariant: a record whose state is `MADE` is changed under its lock alone, or while nothing else is done (`still`).
    While another rank's `snapshot` is being written, whoever changes records that this one owns has it keep them first.

    Args:
        record_class: the layout; rows must not move at steps that do not touch them.
        rows: number of records.
        block: memory of `block_bytes(record_class, rows)`, all zeros when the first rank gets it.
        rank, ranks: this one, and how many there are.
        patience: called while another process has what is waited for, with what that is and since when (a time of
            `time.perf_counter`); raises when that is too long, or in vain.
        ask_to_keep: called with (rank, slots int64 `[n]`): has that rank's snapshot keep records; returns when it has.
    """

    is_shared = True

    def __init__(
        self,
        record_class: RecordClass,
        rows: int,
        block: SharedBlock,
        rank: int,
        ranks: int,
        patience: Callable[[str, float], None],
        ask_to_keep: Callable[[SharedStore, int, np.ndarray], None],
    ):
        self._writers = np.frombuffer(block.memory, np.int64, ranks)  # not 0: that rank has a snapshot
        self._states = np.frombuffer(block.memory, np.uint8, rows, _paged(8 * ranks))
        self._bounds = np.arange(ranks + 1, dtype=np.int64) * rows // ranks
        self._rank, self._patience, self._ask_to_keep = rank, patience, ask_to_keep
        first, end = self._bounds[rank : rank + 2].tolist()
        self._snapshot: Snapshot | None = None
        super().__init__(record_class, rows, block, OwnKeys(self._states[first:end], first), _records_at(rows, ranks))
        self._next_slot = end

    @staticmethod
    def block_bytes(record_class: RecordClass, rows: int, ranks: int) -> int:
        """Return how many bytes of address space the records of so many rows take, with what is beside them."""
        return _records_at(rows, ranks) + RecordStore.bytes_of(record_class, rows)

    def __len__(self) -> int:
        return len(self.index)

    def owns(self, slots: np.ndarray) -> np.ndarray:
        """Return whether this rank owns the records at `slots` (int64 `[n]`): bool `[n]`."""
        return (slots >= self._bounds[self._rank]) & (slots < self._bounds[self._rank + 1])

    # Making

    def make(self, slots: np.ndarray, fill: Callable[[np.ndarray], None]) -> None:
        """Have the records at `slots` (int64 `[n]`, distinct) made; `fill(some)` writes those that nobody has made.

        Any thread. It waits for those that another is making.
        """
        absent = slots[self._states[slots] != cuda_ops.MADE]
        started = time.perf_counter()
        while len(absent):
            before = cuda_ops.claim_rows(self._states, absent)
            mine = absent[before == cuda_ops.ABSENT]
            if len(mine):
                try:
                    fill(mine)
                except BaseException:
                    cuda_ops.publish_rows(self._states, mine, cuda_ops.ABSENT)
                    raise
                cuda_ops.publish_rows(self._states, mine, cuda_ops.MADE)
            absent = absent[before == cuda_ops.BEING_MADE]
            if len(absent):
                self._wait("another rank to make records", started)

    def set_new(self, slots: np.ndarray, values: np.ndarray, states: np.ndarray) -> None:
        """Write values `[n, dim]` and states `[n, state_words]` of records that nobody else sees yet."""
        cuda_ops.scatter(self.words, self.stride, slots, values)
        if states.shape[1]:
            cuda_ops.scatter(self.words, self.stride, slots, states, offset=self.record_class.dim)

    def _wait(self, what: str, started: float) -> None:
        self._patience(what, started)
        time.sleep(_PAUSE_SECONDS)

    # Changing

    def update(self, kernel: Callable[..., None], slots: np.ndarray, grads: np.ndarray, *numbers) -> None:
        done, started = 0, 0.0
        locked, dim = _UPDATES[kernel], self.record_class.dim
        while True:
            done = locked(self.words, self.stride, dim, self.steps, slots, grads, *numbers, done)
            if done == len(slots):
                return
            started = started or time.perf_counter()
            self._wait(f"the record at slot {slots[done]}, which another rank is updating", started)

    def add(self, slots: np.ndarray, values: np.ndarray, version: int) -> None:
        """Add `values` `[n, dim]` to those of the records at `slots` (int64 `[n]`, distinct)."""
        self.keep(slots)
        self.update(cuda_ops.sgd_update, slots, values, -1.0, 1.0, version)

    # Snapshots

    @property
    def snapshot(self) -> Snapshot | None:
        return self._snapshot

    @snapshot.setter
    def snapshot(self, snapshot: Snapshot | None) -> None:
        self._snapshot = snapshot
        self._writers[self._rank] = snapshot is not None

    def keep(self, slots: np.ndarray) -> None:
        if not self._writers.any():
            return
        owners = np.searchsorted(self._bounds, slots, side="right") - 1
        for rank in np.flatnonzero(self._writers).tolist():
            theirs = slots[owners == rank]
            if rank == self._rank:
                self.keep_own(theirs)
            elif len(theirs):
                self._ask_to_keep(self, rank, theirs)

    def keep_own(self, slots: np.ndarray) -> None:
        """As `keep`, of records that this rank owns. Any thread."""
        super().keep(slots)

    def slots_free_in(self, index: OwnKeys) -> np.ndarray:
        return index.free()


def most_shared_bytes() -> int:
    """Return how large all records that are laid out by key may be together: half of the machine's memory.

    A row that is touched takes a page with its neighbours. What has room as a whole may do so.
    """
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _records_at(rows: int, ranks: int) -> int:
    return _paged(8 * ranks) + _paged(rows)


def _paged(size: int) -> int:
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES
