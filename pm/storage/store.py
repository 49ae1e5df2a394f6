"""The record store: fixed-size records of one class in one reserved range of memory, and the index from key to slot."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import cuda_ops
from pm.storage.shared_memory import MAP_NORESERVE, SharedBlock, advise_huge_pages
from pm.storage.snapshot import Snapshot

_STEP_BYTES = 8
_LARGE_BYTES = 1 << 24  # from this size on a large page more or less does not matter


@dataclass(frozen=True)
class RecordClass:
    """What records of one store have in common.

    Args:
        dim: values per row.
        dtype: numpy dtype name of value and state, "float32" or "float64".
        rule: name of the update rule whose state the records hold.
        state_words: words (of `dtype`) of optimizer state per row.
        catches_up: whether records say up to which step of their table they are caught up (see `pm.history`).
    """

    dim: int
    dtype: str
    rule: str
    state_words: int
    catches_up: bool = False

    @property
    def stride(self) -> int:
        """Words per record: value, state, and 8-byte words, aligned to 8 bytes.

        These are, with `catches_up`, the steps that the record is caught up to; and the step of the last update.
        """
        itemsize = np.dtype(self.dtype).itemsize
        payload = (self.dim + self.state_words) * itemsize
        padded = -(-payload // _STEP_BYTES) * _STEP_BYTES
        return (padded + (1 + self.catches_up) * _STEP_BYTES) // itemsize

    @property
    def record_bytes(self) -> int:
        return self.stride * np.dtype(self.dtype).itemsize


class RecordStore:
    """Records of one class, grown without copying.

    The whole capacity is reserved as address space and backed by memory page by page as slots are first written, so
    records never move while the store grows and kernels see one flat array. Invariant: a slot is either free or holds
    the record of exactly one key, and `index` maps that key to it. While there is a `snapshot`, whoever writes to
    records calls `keep` before, as the methods here that write do.

    Args:
        record_class: the layout.
        capacity: most records that can ever be held (address space, not memory).
        block: memory of `bytes_of(record_class, capacity)` that other processes see too; None for memory of its own.
        index: from key to slot, where it is part of another; None for one of its own.
        offset: bytes of `block` before the first record, a multiple of 8.

    Raises:
        MemoryError: if the address space cannot be reserved.
    """

    is_shared = False
    """Whether other processes change records too (`SharedStore`)."""

    def __init__(
        self, record_class: RecordClass, capacity: int, block: SharedBlock | None = None, index=None, offset: int = 0
    ):
        self.record_class = record_class
        self.capacity = max(1, int(capacity))
        self.stride = record_class.stride
        dtype = np.dtype(record_class.dtype)
        reserved_bytes = self.bytes_of(record_class, capacity)
        self.block = block
        what = f"{self.capacity} records of {record_class.record_bytes} bytes"
        self._memory = _reserve(reserved_bytes, what) if block is None else block.memory
        if block is None and hasattr(mmap, "MADV_HUGEPAGE"):
            advise_huge_pages(self._memory)
        self.words = np.frombuffer(self._memory, dtype=dtype, count=self.capacity * self.stride, offset=offset)
        self.steps = np.frombuffer(self._memory, np.int64, reserved_bytes // _STEP_BYTES, offset)
        self.index = cuda_ops.KeyIndex() if index is None else index
        self._next_slot = 0
        self._free = np.empty(0, np.int64)  # the first `_free_count` of them
        self._free_count = 0
        self._pins: dict[int, int] = {}
        self._released_while_pinned: set[int] = set()
        self.snapshot: Snapshot | None = None

    @staticmethod
    def bytes_of(record_class: RecordClass, capacity: int) -> int:
        """Return how many bytes of address space a store of this capacity takes."""
        return max(1, int(capacity)) * record_class.record_bytes

    def __len__(self) -> int:
        return self._next_slot - self._free_count

    @property
    def memory_bytes(self) -> int:
        """Bytes of the records held and of their index."""
        return len(self) * self.record_class.record_bytes + self.index.memory_bytes

    def allocate(self, count: int) -> np.ndarray:
        """Return `count` free slots (int64), reusing released ones first.

        Raises:
            MemoryError: if more records are asked for than were reserved.
        """
        reused = self._free[max(0, self._free_count - count) : self._free_count]
        fresh = count - len(reused)
        if self._next_slot + fresh > self.capacity:
            raise MemoryError(
                f"the record store is full: {len(self)} of {self.capacity} records are held and {count} more "
                "are asked for; declare all tables before the first loader is built"
            )
        self._free_count -= len(reused)
        slots = np.concatenate([reused, np.arange(self._next_slot, self._next_slot + fresh, dtype=np.int64)])
        self._next_slot += fresh
        return slots

    def release(self, keys: np.ndarray) -> None:
        """Forget the records of `keys` (int64 `[n]`, all held); a pinned slot is reused only after its last unpin."""
        self.release_slots(self.index.remove(keys))

    def release_slots(self, slots: np.ndarray) -> None:
        """As `release`, for slots (int64 `[n]`) whose keys the index does not map to them any more."""
        pinned = np.fromiter((int(s) in self._pins for s in slots), bool, len(slots)) if self._pins else None
        if pinned is not None and pinned.any():
            self._released_while_pinned.update(slots[pinned].tolist())
            slots = slots[~pinned]
        self._give_back(slots)

    def _give_back(self, slots: np.ndarray) -> None:
        count = self._free_count + len(slots)
        if count > len(self._free):
            grown = np.empty(count + count // 2, np.int64)
            grown[: self._free_count] = self._free[: self._free_count]
            self._free = grown
        self._free[self._free_count : count] = slots
        self._free_count = count

    def pin(self, slots: np.ndarray) -> None:
        """Keep `slots` from being reused until `unpin` has been called as often."""
        for slot in slots.tolist():
            self._pins[slot] = self._pins.get(slot, 0) + 1

    def unpin(self, slots: np.ndarray) -> None:
        """Undo one `pin` of each of `slots`; a slot that was released meanwhile becomes free with its last one.

        Raises:
            ValueError: if a slot is not pinned.
        """
        for slot in slots.tolist():
            if slot not in self._pins:
                raise ValueError(f"slot {slot} is not pinned")
            self._pins[slot] -= 1
            if self._pins[slot] == 0:
                del self._pins[slot]
                if slot in self._released_while_pinned:
                    self._released_while_pinned.discard(slot)
                    self._give_back(np.array([slot], np.int64))

    def move(self, keys: np.ndarray) -> np.ndarray:
        """Move the records of `keys` (int64 `[n]`, all held) to other slots; return those (int64 `[n]`)."""
        old = self.index.find(keys)
        new = self.allocate(len(keys))
        records = np.empty((len(keys), self.stride), self.words.dtype)
        cuda_ops.gather(self.words, self.stride, old, records)
        self.put(new, records)
        self.release(keys)
        self.index.add(keys, new)
        return new

    def update(self, kernel: Callable[..., None], slots: np.ndarray, grads: np.ndarray, *numbers) -> None:
        """Update the records at `slots` (int64 `[n]`, distinct, said to `keep`) by an optimizer's function of
        `cuda_ops`, with gradients `[n, dim]` and what else it takes.
        """
        kernel(self.words, self.stride, self.record_class.dim, self.steps, slots, grads, *numbers)

    def keep(self, slots: np.ndarray) -> None:
        """The records at `slots` (int64 `[n]`, distinct) are about to be written: have a snapshot keep them."""
        snapshot = self.snapshot
        if snapshot is not None:
            snapshot.keep(slots)

    def await_snapshot(self) -> None:
        """Wait until nobody reads a snapshot of this store any more."""
        snapshot = self.snapshot
        if snapshot is not None:
            snapshot.wait()

    def put(self, slots: np.ndarray, words: np.ndarray, offset: int = 0) -> None:
        """Write `words` `[n, width]` to the records at `slots` (int64 `[n]`, distinct), from word `offset` on."""
        self.keep(slots)
        cuda_ops.scatter(self.words, self.stride, slots, words, offset=offset)

    def values(self, slots: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy the values of `slots` (int64 `[n]`) to `out` `[n, dim]` and return it."""
        return cuda_ops.gather(self.words, self.stride, slots, out)

    def set_values(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """Write `rows` `[n, dim]` as the values of `slots` (int64 `[n]`, distinct)."""
        self.put(slots, rows)

    def states(self, slots: np.ndarray) -> np.ndarray:
        """Return the optimizer state of `slots` (int64 `[n]`) as a new array `[n, state_words]`."""
        out = np.empty((len(slots), self.record_class.state_words), self.words.dtype)
        return cuda_ops.gather(self.words, self.stride, slots, out, offset=self.record_class.dim)

    def set_states(self, slots: np.ndarray, states: np.ndarray) -> None:
        """Write `states` `[n, state_words]` as the optimizer state of `slots` (int64 `[n]`, distinct)."""
        self.put(slots, states, self.record_class.dim)

    def caught_up_words(self, slots: np.ndarray) -> np.ndarray:
        """Return the words that say up to which steps the records at `slots` are caught up (int64 `[n]`)."""
        record_longs = self.record_class.record_bytes // _STEP_BYTES
        return self.steps[(slots + 1) * record_longs - 2]

    def set_caught_up_words(self, slots: np.ndarray, words: np.ndarray | int) -> None:
        """Set what `caught_up_words` gives of the records at `slots` (int64 `[n]`, distinct)."""
        self.keep(slots)
        record_longs = self.record_class.record_bytes // _STEP_BYTES
        self.steps[(slots + 1) * record_longs - 2] = words

    def set_caught_up(self, slots: np.ndarray, count: int) -> None:
        """Say that the records at `slots` (int64 `[n]`) are caught up to step `count` of their table's history."""
        self.set_caught_up_words(slots, cuda_ops.caught_up_word(count))

    @property
    def free_slots(self) -> np.ndarray:
        """The slots, of those that were ever given out, that are free (int64 `[n]`, a view)."""
        return self._free[: self._free_count]

    def slots_free_in(self, index) -> np.ndarray:
        """Return the slots below `slots_in_use` that are not of keys of `index`, a copy of its own: int64 `[n]`, or
        bool for each.
        """
        return self.free_slots

    @property
    def slots_in_use(self) -> int:
        """Number of slots that were ever given out: they are the first ones."""
        return self._next_slot


def reserve_zeros(count: int, dtype: type) -> np.ndarray:
    """Return zeros `[count]` that take address space only, and memory page by page as they are first written.

    Raises:
        MemoryError: if the address space cannot be reserved.
    """
    size = max(1, count) * np.dtype(dtype).itemsize
    memory = _reserve(size, f"an array of {count} numbers")
    if size >= _LARGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        advise_huge_pages(memory)
    return np.frombuffer(memory, dtype, count)


def _reserve(size: int, what: str) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except (OSError, OverflowError) as error:
        raise MemoryError(
            f"cannot reserve {size} bytes of address space for {what} ({error}); raise the limit on virtual memory "
            "(ulimit -v)"
        ) from error
