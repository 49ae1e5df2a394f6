"""Records that all ranks of a machine have mapped, in one store: no row of it moves.

An index that all see says where the record of each key is (`cuda_ops.SharedIndex`: 4 bytes a key where most have one);
records take memory as they are made, one after the other. Whoever needs a row first makes its record: what a row starts
from does not depend on who does. With staleness any rank updates it from then on, under a lock of its own
(`cuda_ops.sgd_update_shared`), as threads of one process would; lock-free readers are Hogwild's (Niu, Recht, Re, Wright
2011). At staleness 0 owners alone update records, when no rank reads them (`shared_steps.py`). For that, and for what
must be done once by somebody, as writing a checkpoint, each rank owns a part of the keys.
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
from pm.storage.shared_memory import SharedBlock
from pm.storage.store import RecordClass, RecordStore

if TYPE_CHECKING:
    from pm.storage.snapshot import Snapshot

MOST_ROWS = (1 << 31) - 2
"""How many keys one such store may have."""
_LEAST_MEMORY_PER_KEY = 64  # bytes: such keys take 1/256 of the memory
_PAGE_BYTES = 4096
_IS_ALONE, _SLOTS, _BLOCKS = 0, 1, 2
_COMMON_WORDS = 3
_ENTRY_BYTES = 4
_PAUSE_SECONDS = 2e-5
_LEAST_LARGE_BYTES, _ENLARGED_BYTES = 1 << 24, 1 << 23
_OWNED_TOGETHER_BITS = 4  # records of some lines of the cache, so that ranks do not write to one line in turns
_UPDATES = {
    cuda_ops.sgd_update: cuda_ops.sgd_update_shared,
    cuda_ops.adagrad_update: cuda_ops.adagrad_update_shared,
    cuda_ops.rowwise_adagrad_update: cuda_ops.rowwise_adagrad_update_shared,
}


class OwnKeys:
    """The keys of a shared store that have records, of those that one rank owns.

    Args:
        index: where those of all ranks are.
        rank, ranks: whose, and how many there are.
    """

    def __init__(self, index: cuda_ops.SharedIndex, rank: int, ranks: int):
        self._index, self._rank, self._ranks = index, rank, ranks

    def __len__(self) -> int:
        return len(self.items()[0])

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (keys, their slots), int64 `[n]` both, keys ascending."""
        keys, slots = self._index.items()
        own = owners_of(keys, self._ranks) == self._rank
        return keys[own], slots[own]

    def copy(self) -> OwnKeys:
        """Return what it is now."""
        return OwnKeys(self._index.copy(), self._rank, self._ranks)


def owners_of(keys: np.ndarray, ranks: int) -> np.ndarray:
    """Return the owners of `keys` (int64 `[n]` both): by turns, for what is used most is often together."""
    together = keys >> _OWNED_TOGETHER_BITS
    if ranks & (ranks - 1) == 0:
        return together & (ranks - 1)  # in a fifth of the time that a division takes
    return together % ranks


class SharedStore(RecordStore):
    """A store of which every rank of the machine has one over the same memory.

    Invariant: the record of a key is at the slot that the index says, from when it says one; it is changed under its
    lock, by its owner in a step, or while nothing else is done (`still`). While a rank's `snapshot` is being written,
    whoever changes records that it owns has it keep them first.

    Args:
        record_class: the layout; rows must not move at steps that do not touch them.
        rows: number of keys.
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
        layout = _Layout(rows, ranks)
        words = np.frombuffer(block.memory, np.int64, ranks + _COMMON_WORDS)
        self._writers = words[:ranks]  # not 0: that rank has a snapshot
        self._common = words[ranks:]  # whether a rank is in `alone`, how many slots are given out, what the index has
        blocks = np.frombuffer(block.memory, np.int32, cuda_ops.SharedIndex.block_count(rows), layout.blocks)
        entries = np.frombuffer(block.memory, np.int32, cuda_ops.SharedIndex.entry_count(rows), layout.entries)
        self._places = cuda_ops.SharedIndex(rows, blocks, entries, self._common[_BLOCKS:])
        self._keys = np.frombuffer(block.memory, np.int64, rows, layout.keys)  # by slot
        self._rank, self._ranks, self._locks = rank, ranks, locks
        self._patience, self._ask_to_keep = patience, ask_to_keep
        self._snapshot: Snapshot | None = None
        self._is_enlarging = False
        super().__init__(record_class, rows, block, OwnKeys(self._places, rank, ranks), layout.records)

    @staticmethod
    def block_bytes(record_class: RecordClass, rows: int, ranks: int) -> int:
        """Return how many bytes of address space the records of so many rows take, with what is beside them."""
        return _Layout(rows, ranks).records + RecordStore.bytes_of(record_class, rows)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def memory_bytes(self) -> int:
        """Bytes of a rank's share of the records, and of what says where they are."""
        records = self.slots_in_use * (self.record_class.record_bytes + self._keys.itemsize)
        return (records + self._places.memory_bytes) // self._ranks

    @property
    def slots_in_use(self) -> int:
        return int(self._common[_SLOTS])

    def owners(self, keys: np.ndarray) -> np.ndarray:
        """Return the ranks that own `keys` (int64 `[n]` both)."""
        return owners_of(keys, self._ranks)

    def owns(self, keys: np.ndarray) -> np.ndarray:
        """Return whether this rank owns `keys` (int64 `[n]`): bool `[n]`."""
        return self.owners(keys) == self._rank

    def made(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (keys, slots) of all records, whoever owns them: int64 `[n]` both."""
        return self._places.items()

    def keys_at(self, slots: np.ndarray) -> np.ndarray:
        """Return the keys of the records at `slots`, int64 `[n]` both."""
        return self._keys[slots]

    # Making

    def make(self, keys: np.ndarray, fill: Callable[[np.ndarray, np.ndarray], None]) -> np.ndarray:
        """Return the slots of distinct `keys`, int64 `[n]` both; `fill(keys, slots)` writes records that nobody has.

        Any thread. It waits for those that another is making.
        """
        slots = self._places.find(keys)
        if not slots.size or slots.min() >= 0:
            return slots
        absent = np.flatnonzero(slots < 0)
        started = time.perf_counter()
        while len(absent):
            before = self._places.claim(keys[absent])
            mine = keys[absent[before == cuda_ops.ABSENT]]
            if len(mine):
                self._make(mine, fill)
            absent = absent[before == cuda_ops.BEING_MADE]
            if len(absent):
                self._wait("another rank to make records", started)
        return self._places.find(keys)

    def _make(self, keys: np.ndarray, fill: Callable[[np.ndarray, np.ndarray], None]) -> None:
        first = cuda_ops.add_to_word(self._common, _SLOTS, len(keys))
        slots = np.arange(first, first + len(keys), dtype=np.int64)
        try:
            if first + len(keys) > self.capacity:
                raise MemoryError(
                    f"{len(keys)} records are to be made, and {self.capacity - first} of {self.capacity} places are "
                    "left: some were lost to rows that could not be made (an error said so)"
                )
            self._keys[slots] = keys
            fill(keys, slots)
        except BaseException:  # the slots are lost
            self._places.publish(keys, None)
            raise
        self._places.publish(keys, slots)

    def use_large_pages(self) -> None:
        """Have records in large pages, if all were made, and there are enough of them to matter: in the background.

        One rank does so for all. Rows that are to be made yet would take memory before they are needed.
        """
        size = RecordStore.bytes_of(self.record_class, self.capacity)
        if self._rank == 0 and size >= _LEAST_LARGE_BYTES and not self._is_enlarging:
            if self.slots_in_use >= self.capacity:
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
        while not cuda_ops.exchange_word(self._common, _IS_ALONE, 0, 1):
            self._wait("another rank to change rows outside of a step", started)
        try:
            yield
        finally:
            cuda_ops.store_word(self._common, _IS_ALONE, 0)

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
        owners = self.owners(self._keys[slots])
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
        _, slots = index.items()
        is_free = np.ones(max(self.slots_in_use, int(slots.max(initial=-1)) + 1), bool)
        is_free[slots] = False
        return is_free


def most_keys() -> int:
    """Return how many keys all such stores may have together: what the index has of keys without a record, a quarter of
    a byte of each, is a small share of the machine's memory.
    """
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _LEAST_MEMORY_PER_KEY


class _Layout:
    """Where in a block what is beside the records begins, and where they do."""

    def __init__(self, rows: int, ranks: int):
        index = cuda_ops.SharedIndex
        self.blocks = _paged(8 * (ranks + _COMMON_WORDS))
        self.entries = self.blocks + _paged(_ENTRY_BYTES * index.block_count(rows))
        self.keys = self.entries + _paged(_ENTRY_BYTES * index.entry_count(rows))
        self.records = self.keys + _paged(8 * rows)


def _paged(size: int) -> int:
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES
