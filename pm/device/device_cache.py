"""Which rows are in a fast memory of fixed size: those that the lookahead needs soonest.

The decisions alone: rows are copied between two memories that are given, whatever they are. With the batches ahead
known, the row that goes is the one whose next use is farthest, which fetches the fewest rows (Belady, "A study of
replacement algorithms for a virtual-storage computer", IBM Systems Journal 5, 1966); of rows without a known use, the
one that was used longest ago. Everything is done on arrays of keys, in time that follows the batch and not the cache.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

import cuda_ops
from pm.device.turns_to_go import TurnsToGo
from pm.storage.planned_uses import PlannedUses


class RowMemory(Protocol):
    """Where rows are: the host's memory, addressed by key, or the device's, addressed by slot."""

    def read(self, places: np.ndarray) -> object:
        """Return the rows at `places` (int64 `[n]`, distinct)."""

    def write(self, places: np.ndarray, rows: object) -> None:
        """Set the rows at `places` (int64 `[n]`, distinct) to what `read` of the other memory returned."""


class DeviceCache:
    """Rows of a host's memory in a device's memory of a fixed number of rows.

    A row is pinned from when it was brought for a batch until that batch is finished; changed rows are written back
    when they go, or by `flush`. Batches are begun in the order of their numbers and finished in any. For one thread.

    Invariant: a slot is free (its key is -1) or holds the row of one key, and `_index` maps that key to it; a slot is
    among `_turns` if it is not free and nothing pins it, by the next planned use of its key.

    Args:
        slots: rows that the device has room for.
        host: memory addressed by key.
        device: memory addressed by slot, 0 .. slots-1.
        row_bytes: bytes of a row there, for messages.
    """

    def __init__(self, slots: int, host: RowMemory, device: RowMemory, row_bytes: int):
        self.slots, self.row_bytes = slots, row_bytes
        self._host, self._device = host, device
        self._index = cuda_ops.KeyIndex(slots)
        self._planned = PlannedUses()
        self._turns = TurnsToGo(slots)
        self._key_of = np.full(slots, -1, np.int64)
        self._pins = np.zeros(slots, np.int64)
        self._changed = np.zeros(slots, bool)
        self._free = np.arange(slots - 1, -1, -1)
        self._free_count = slots
        self._ready: dict[int, np.ndarray] = {}  # slots pinned by batches that `prefetch` has brought
        self._in_use: dict[int, np.ndarray] = {}  # slots pinned by batches that have begun
        self._holds = -1
        self._counts = dict.fromkeys(("looked_up", "late", "fetched", "written_back", "evicted"), 0)

    def intend(self, batch: int, keys: np.ndarray) -> None:
        """Say that `batch` will look up distinct `keys` (int64 `[n]`). Batches are announced in ascending order.

        Raises:
            ValueError: a batch does not come after those announced and begun.
        """
        self._renew_turns(self._planned.add(batch, keys))

    def prefetch(self) -> int:
        """Bring and pin the rows of announced batches, the nearest first, while there is room; return how many are in.

        No row goes that is needed sooner than what comes in its place. Rows that come early take room for longer: in a
        small cache somewhat more of them are fetched in all than without, in exchange for fewer that are late.
        """
        for batch in self._planned.batches:
            if batch in self._ready:
                continue
            keys = self._planned.keys_of(batch)
            slots = self._index.find(keys)
            held = slots[slots >= 0]
            self._pin(held)
            missing = keys[slots < 0]
            if len(missing) > self._free_count + len(self._turns):
                self._unpin(held)
                break
            fetched = self._fetch(missing)
            self._ready[batch] = np.concatenate([held, fetched])
        return len(self._ready)

    def begin(self, batch: int, keys: np.ndarray) -> np.ndarray:
        """Return the slots (int64 `[n]`) of distinct `keys`, which hold their rows until `finish(batch)`.

        Announced batches before this one are over; the batch may look up other rows than were announced, or not have
        been announced at all.

        Raises:
            MemoryError: the rows of this batch, with those of batches that are not finished, are more than there is
                room for; states the bytes. Nothing has changed.
            ValueError: the batch has begun before.
        """
        if batch in self._in_use:
            raise ValueError(f"batch {batch} has begun already; finish it before it begins again")
        slots = self._index.find(keys)
        self._check_room(batch, len(keys), slots[slots >= 0])
        over = self._planned.begin(batch)
        for earlier in [number for number in self._ready if number < batch]:
            self._unpin(self._ready.pop(earlier))
        self._pin(slots[slots >= 0])
        self._unpin(self._ready.pop(batch, slots[:0]))
        self._renew_turns(over)
        return self._bring(batch, keys, slots)

    def hold(self, keys: np.ndarray) -> tuple[int, np.ndarray]:
        """Return (number, slots int64 `[n]`) of distinct `keys` that are used for no batch, and so were not announced;
        they hold their rows until `finish(number)`.

        Raises:
            MemoryError: as `begin`.
        """
        self._holds -= 1
        slots = self._index.find(keys)
        self._check_room(self._holds, len(keys), slots[slots >= 0])
        self._pin(slots[slots >= 0])
        return self._holds, self._bring(self._holds, keys, slots)

    def _bring(self, number: int, keys: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Bring those of `keys` that have no slot yet; the others are pinned. Return all slots."""
        missing = slots < 0
        late = int(missing.sum())
        while late > self._free_count + len(self._turns):
            self._unpin(self._ready.pop(max(self._ready)))
        slots[missing] = self._fetch(keys[missing])
        self._in_use[number] = slots
        self._counts["looked_up"] += len(keys)
        self._counts["late"] += late
        return slots.copy()

    def slots_in_use(self, batch: int) -> np.ndarray | None:
        """Return the slots of a batch that has begun, in the order of its keys; None for others."""
        slots = self._in_use.get(batch)
        return None if slots is None else slots.copy()

    def changed(self, slots: np.ndarray) -> None:
        """The rows at `slots` (int64 `[n]`), which are in use, have changed on the device."""
        self._changed[slots] = True

    def finish(self, batch: int, *, changed: bool = True) -> None:
        """The batch is over, and its rows on the device were `changed` or not.

        Raises:
            ValueError: the batch is not in use.
        """
        if batch not in self._in_use:
            raise ValueError(f"batch {batch} is not in use; begin it first")
        slots = self._in_use.pop(batch)
        self._changed[slots] |= changed
        self._unpin(slots)

    def let_go(self) -> None:
        """All batches that are in use may lose their rows again: what they looked up was copied. Their changes stay."""
        for batch in list(self._in_use):
            self.finish(batch, changed=False)

    def flush(self) -> None:
        """Write all changed rows back to the host; they stay on the device."""
        self._write_back(np.flatnonzero(self._changed))

    def reload(self) -> None:
        """The host's rows were changed, and none of those on the device since `flush`: bring all of them again."""
        slots = np.flatnonzero(self._key_of >= 0)
        if len(slots):
            self._device.write(slots, self._host.read(self._key_of[slots]))

    def stats(self) -> dict[str, float]:
        """Rows looked up, fetched, fetched late (when their batch began), written back, evicted; late / looked up."""
        looked_up = self._counts["looked_up"]
        return {**self._counts, "miss_rate": self._counts["late"] / looked_up if looked_up else 0.0}

    def _check_room(self, batch: int, wanted: int, held: np.ndarray) -> None:
        in_use = np.concatenate([held[:0], *self._in_use.values()])
        others = len(np.setdiff1d(in_use, held))
        if wanted + others > self.slots:
            raise MemoryError(
                f"{f'batch {batch}' if batch >= 0 else 'a step'} needs {wanted} rows, and batches that are not "
                f"finished hold {others} others: "
                f"{(wanted + others) * self.row_bytes:,} bytes, where the cache on the device has "
                f"{self.slots * self.row_bytes:,}; give it more (device_cache_bytes), or make batches smaller"
            )

    def _renew_turns(self, keys: np.ndarray) -> None:
        """The next planned use of `keys` has changed: those that are here and not pinned have another turn."""
        slots = self._index.find(keys)
        slots = slots[slots >= 0]
        slots = slots[self._pins[slots] == 0]
        self._turns.enter(slots, self._planned.next_use(self._key_of[slots]))

    def _pin(self, slots: np.ndarray) -> None:
        self._turns.leave(slots[self._pins[slots] == 0])
        self._pins[slots] += 1

    def _unpin(self, slots: np.ndarray) -> None:
        self._pins[slots] -= 1
        loose = slots[self._pins[slots] == 0]
        self._turns.enter(loose, self._planned.next_use(self._key_of[loose]))

    def _fetch(self, keys: np.ndarray) -> np.ndarray:
        """Bring rows that are not here to slots that are free or whose turn it is to go; return these, pinned."""
        if not len(keys):
            return np.empty(0, np.int64)
        rows = self._host.read(keys)
        from_free = min(len(keys), self._free_count)
        self._free_count -= from_free
        going = self._turns.take(len(keys) - from_free)
        self._counts["evicted"] += len(going)
        self._write_back(going[self._changed[going]])
        self._index.remove(self._key_of[going])
        slots = np.concatenate([self._free[self._free_count : self._free_count + from_free], going])
        self._device.write(slots, rows)
        self._index.add(keys, slots)
        self._key_of[slots] = keys
        self._pins[slots] = 1
        self._counts["fetched"] += len(keys)
        return slots

    def _write_back(self, slots: np.ndarray) -> None:
        if len(slots):
            self._host.write(self._key_of[slots], self._device.read(slots))
            self._changed[slots] = False
            self._counts["written_back"] += len(slots)
