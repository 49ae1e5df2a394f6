"""Records that all ranks of a machine read and update where they are: with staleness, no row of them moves.

The record of key k is at slot k, in memory that every rank has mapped, and takes memory page by page as rows are first
touched. Whoever needs a row first makes its record: what a row starts from does not depend on who does. From then on
any rank updates it, under a lock of its own (`cuda_ops.sgd_update_shared`), as threads of one process would; lock-free
readers are Hogwild's (Niu, Recht, Re, Wright 2011). For what must be done once by somebody, as writing a checkpoint,
each rank owns a part of the keys.

At staleness 0 owners alone update records, when no rank reads them (`shared_steps.py`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.shared_memory import SharedBlock
from pm.store import RecordClass, RecordStore

if TYPE_CHECKING:
    from pm.snapshot import Snapshot

_PAGE_BYTES = 4096
_PAUSE_SECONDS = 2e-5
_LEAST_LARGE_BYTES, _ENLARGED_BYTES = 1 << 24, 1 << 23
_OWNED_TOGETHER_BITS = 4  # records of some lines of the cache, so that ranks do not write to one line in turns
_UPDATES = {
    cuda_ops.sgd_update: cuda_ops.sgd_update_shared,
    cuda_ops.adagrad_update: cuda_ops.adagrad_update_shared,
    cuda_ops.rowwise_adagrad_update: cuda_ops.rowwise_adagrad_update_shared,
}


class OwnKeys:
    """The keys of a shared store whose records were made, of those that one rank owns. Keys are slots.

    Args:
        states: uint8 `[rows]` by key, as `cuda_ops.claim_rows` has them.
        rank, ranks: whose, and how many there are.
    """

    def __init__(self, states: np.ndarray, rank: int, ranks: int):
        self._states, self._rank, self._ranks = states, rank, ranks

    def __len__(self) -> int:
        return len(self.items()[0])

    @property
    def memory_bytes(self) -> int:
        return self._states.nbytes // self._ranks

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (keys, their slots): the same, int64 `[n]`, ascending."""
        keys = np.flatnonzero(self._states == cuda_ops.MADE)
        keys = keys[owners_of(keys, self._ranks) == self._rank]
        return keys, keys

    def copy(self) -> OwnKeys:
        """Return what it is now."""
        return OwnKeys(self._states.copy(), self._rank, self._ranks)


def owners_of(slots: np.ndarray, ranks: int) -> np.ndarray:
    """Return the owners of records at `slots` (int64 `[n]` both): by turns, as what is used most is often together."""
    together = slots >> _OWNED_TOGETHER_BITS
    if ranks & (ranks - 1) == 0:
        return together & (ranks - 1)  # in a fifth of the time that a division takes
    return together % ranks


class SharedStore(RecordStore):
    """A store of which every rank of the machine has one over the same memory.

    Invariant: a record whose state is `MADE` is changed under its lock alone, or while nothing else is done (`still`).
    While another rank's `snapshot` is being written, whoever changes records that this one owns has it keep them first.

    Args:
        record_class: the layout; rows must not move at steps that do not touch them.
        rows: number of records.
        block: memory of `block_bytes(record_class, rows)`, all zeros when the first rank gets it.
        rank, ranks: this one, and how many there are.
        locks: whether ranks update the same records at the same time.
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
        locks: bool,
        patience: Callable[[str, float], None],
        ask_to_keep: Callable[[SharedStore, int, np.ndarray], None],
    ):
        words = np.frombuffer(block.memory, np.int64, ranks + 1)
        self._writers = words[:ranks]  # not 0: that rank has a snapshot
        self._lock = words[ranks:]  # not 0: a rank is in `alone`
        self._states = np.frombuffer(block.memory, np.uint8, rows, _paged(8 * (ranks + 1)))
        self._rank, self._ranks, self._locks = rank, ranks, locks
        self._patience, self._ask_to_keep = patience, ask_to_keep
        self._snapshot: Snapshot | None = None
        self._is_enlarging = False
        super().__init__(record_class, rows, block, OwnKeys(self._states, rank, ranks), _records_at(rows, ranks))
        self._next_slot = rows

    @staticmethod
    def block_bytes(record_class: RecordClass, rows: int, ranks: int) -> int:
        """Return how many bytes of address space the records of so many rows take, with what is beside them."""
        return _records_at(rows, ranks) + RecordStore.bytes_of(record_class, rows)

    def __len__(self) -> int:
        return len(self.index)

    def owners(self, slots: np.ndarray) -> np.ndarray:
        """Return the ranks that own the records at `slots` (int64 `[n]` both)."""
        return owners_of(slots, self._ranks)

    def owns(self, slots: np.ndarray) -> np.ndarray:
        """Return whether this rank owns the records at `slots` (int64 `[n]`): bool `[n]`."""
        return self.owners(slots) == self._rank

    def made(self) -> np.ndarray:
        """Return the slots of all records that were made, whoever owns them: int64 `[n]`."""
        return np.flatnonzero(self._states == cuda_ops.MADE)

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

    def use_large_pages(self) -> None:
        """Have records in large pages, if all were made, and there are enough of them to matter: in the background.

        One rank does so for all. Rows that are to be made yet would take memory before they are needed.
        """
        size = RecordStore.bytes_of(self.record_class, self.capacity)
        if self._rank == 0 and size >= _LEAST_LARGE_BYTES and not self._is_enlarging:
            if (self._states == cuda_ops.MADE).all():
                self._is_enlarging = True
                threading.Thread(target=self._enlarge_pages, name="adaloader-pages", daemon=True).start()

    def _enlarge_pages(self) -> None:
        for begin in range(0, self.block.size, _ENLARGED_BYTES):
            if not self.block.use_large_pages(begin, min(begin + _ENLARGED_BYTES, self.block.size)):
                return

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
        if not self._locks:
            super().update(kernel, slots, grads, *numbers)
            return
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

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other rank is inside at the same time."""
        started = time.perf_counter()
        while not cuda_ops.exchange_word(self._lock, 0, 0, 1):
            self._wait("another rank to change rows outside of a step", started)
        try:
            yield
        finally:
            cuda_ops.store_word(self._lock, 0, 0)

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
        owners = self.owners(slots)
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
        is_free = np.ones(self.slots_in_use, bool)
        is_free[index.items()[1]] = False
        return is_free


def most_shared_bytes() -> int:
    """Return how large all records that are laid out by key may be together: half of the machine's memory.

    A row that is touched takes a page with its neighbours. What has room as a whole may do so.
    """
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _records_at(rows: int, ranks: int) -> int:
    """Return where in a block the records begin."""
    return _paged(8 * (ranks + 1)) + _paged(rows)


def _paged(size: int) -> int:
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES
