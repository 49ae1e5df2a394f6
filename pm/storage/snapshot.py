"""The records of a store as they were at one instant, read while the store goes on changing: copy on write by slot."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops

if TYPE_CHECKING:
    from pm.storage.store import RecordStore

_PENDING, _TAKEN = 0, -1


class Snapshot:
    """What a store held when this was made, for one thread that takes each record once.

    Whoever is about to write to slots says so first (`RecordStore.keep`): records that have not been taken yet are
    copied aside, into memory of a bounded size; while that is full, writers wait for the thread that takes.

    Invariant: of a slot that was in use then, `_place` is 0 while its record is in the store as it was; n + 1 while it
    is at position n aside; -1 when it has been taken. Slots that were free then are as if taken.

    Args:
        store: of which there is no other snapshot.
        spare_bytes: most memory for records copied aside; room for one record there always is.
        free: the slots (int64 `[n]`, or bool for each) that are free, or another's.
    """

    def __init__(self, store: RecordStore, spare_bytes: int, free: np.ndarray):
        from pm.storage.store import reserve_zeros  # which knows of this class

        self._store = store
        self._count = len(free) if free.dtype == bool else store.slots_in_use
        self._place = reserve_zeros(self._count, np.int32)
        self._place[free] = _TAKEN
        rows = max(1, min(spare_bytes // store.record_class.record_bytes, self._count))
        self._aside = reserve_zeros(rows * store.stride, store.words.dtype).reshape(rows, store.stride)
        self._free = np.arange(rows, dtype=np.int32)[::-1].copy()
        self._free_count = rows
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self.stall_seconds = 0.0
        """How long threads that write to the store were kept from it, by copying records aside and by waiting."""
        store.snapshot = self

    def keep(self, slots: np.ndarray) -> None:
        """Have the records at `slots` (int64 `[n]`, distinct) as they are: they are about to be written. Any thread."""
        if len(slots) and slots.max() >= self._count:
            slots = slots[slots < self._count]
        pending = slots[self._place[slots] == _PENDING]
        if len(pending):
            started = time.perf_counter()
            with self._changed:
                self._copy(pending)
            self.stall_seconds += time.perf_counter() - started

    def _copy(self, pending: np.ndarray) -> None:
        while not self._ended.is_set():
            pending = pending[self._place[pending] == _PENDING]
            if not len(pending):
                return
            some = pending[: self._free_count]
            if not len(some):
                self._changed.wait()
                continue
            self._free_count -= len(some)
            at = self._free[self._free_count : self._free_count + len(some)].copy()
            store = self._store
            cuda_ops.gather(store.words, store.stride, some, self._aside, positions=at.astype(np.int64))
            self._place[some] = at + 1

    def take(self, slots: np.ndarray) -> np.ndarray:
        """Return the records at `slots` (int64 `[n]`, distinct, in use then, not taken yet) as `[n, stride]`."""
        store = self._store
        records = np.empty((len(slots), store.stride), store.words.dtype)
        with self._changed:
            place = self._place[slots]
            cuda_ops.gather(store.words, store.stride, slots, records)
            aside = np.flatnonzero(place != _PENDING)
            if len(aside):
                at = place[aside] - 1
                records[aside] = self._aside[at]
                self._free[self._free_count : self._free_count + len(at)] = at
                self._free_count += len(at)
            self._place[slots] = _TAKEN
            self._changed.notify_all()
        return records

    def end(self) -> None:
        """Nothing more is taken: writers need not wait any more."""
        with self._changed:
            self._ended.set()
            if self._store.snapshot is self:
                self._store.snapshot = None
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until `end` was called."""
        self._ended.wait()
