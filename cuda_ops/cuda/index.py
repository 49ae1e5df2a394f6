"""DeviceKeyIndex: from key to slot, by open addressing in device memory.

Linear probing in one array of [key, slot] entries, two of which share a 32-byte sector; one thread a key. A place is
taken by compare-and-swap of its key, so that keys may be added in parallel; which of two keys with one home comes first
differs from run to run, what they map to does not. Probing is bounded: a key that finds no place within `_MOST_PROBES`
makes the table grow. A removed key leaves a tombstone, which ends no search and is never taken again (or one key could
be added twice); tombstones count as load and go when the table is rebuilt.
"""

from __future__ import annotations

import torch
from numba import cuda

from cuda_ops.cpu.kernels import mix as host_mix
from cuda_ops.cuda.checks import int_vector, writable
from cuda_ops.cuda.launch import helper_from, kernel, launch

_EMPTY, _TOMBSTONE = -1, -2
_MIN_CAPACITY = 16
_MOST_PROBES = 512
_MOST_LOAD = 0.5
_mix = helper_from(host_mix)


class DeviceKeyIndex:
    """Map from distinct non-negative int64 keys to non-negative int64 slots, in the memory of one device.

    The methods are those of cuda_ops.KeyIndex, for tensors of that device. `add` and `remove` wait for the device.

    Invariant: `_entries` is [2 * capacity], capacity a power of two; no place from a key's home to its own is empty,
    and those are at most `_MOST_PROBES`; at most half of the places are taken or tombstones.

    Args:
        expected: number of keys to make room for at once.
        device: where.
    """

    def __init__(self, expected: int = 0, device: torch.device | str = "cuda"):
        self._device = torch.device(device)
        self._size = self._tombstones = 0
        self._allocate(_capacity_for(expected))

    def __len__(self) -> int:
        return self._size

    @property
    def memory_bytes(self) -> int:
        """Bytes of the index, empty places included."""
        return self._entries.nbytes

    def find(self, keys: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the slot of each key, -1 where it is absent: int64 [n]. Keys may repeat; a negative one is absent."""
        keys = int_vector(keys, "keys")
        out = torch.empty_like(keys) if out is None else writable(out, "out", torch.int64, tuple(keys.shape))
        launch(_find, len(keys), 1, *self._table, keys, out)
        return out

    def add(self, keys: torch.Tensor, slots: torch.Tensor) -> None:
        """Add keys (int64 [n], distinct, not negative) that the index does not have, with their slots (int64 [n]).

        Raises:
            KeyError: a key is there already or is given twice; the index holds what it held before the call.
            ValueError: a key or slot is negative, or the numbers differ; nothing is added.
        """
        keys, slots = int_vector(keys, "keys"), int_vector(slots, "slots")
        if len(keys) != len(slots):
            raise ValueError(f"{len(keys)} keys given with {len(slots)} slots")
        if not len(keys):
            return
        least, least_slot = torch.stack([keys.min(), slots.min()]).tolist()
        if least < 0 or least_slot < 0:
            raise ValueError(f"keys and slots must not be negative, got key {least} and slot {least_slot}")
        if self._size + self._tombstones + len(keys) > self._capacity * _MOST_LOAD:
            self._rebuild(_capacity_for(self._size + len(keys)))
        while not self._insert(keys, slots):
            self._rebuild(2 * self._capacity)
        self._size += len(keys)

    def remove(self, keys: torch.Tensor) -> torch.Tensor:
        """Remove keys (int64 [n]) and return their slots, -1 where a key is absent: int64 [n].

        Of a key that repeats in one call, one place gets the slot, and no rule says which.
        """
        keys = int_vector(keys, "keys")
        slots = torch.empty_like(keys)
        launch(_remove, len(keys), 1, *self._table, keys, slots)
        removed = int((slots >= 0).sum())
        self._size -= removed
        self._tombstones += removed
        return slots

    def items(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (keys, slots), int64 [len] each, in the order of the index."""
        entries = self._entries.view(-1, 2)
        taken = entries[entries[:, 0] >= 0]
        return taken[:, 0].contiguous(), taken[:, 1].contiguous()

    @property
    def _table(self) -> tuple[torch.Tensor, int, int]:
        return self._entries, self._capacity - 1, min(_MOST_PROBES, self._capacity)

    def _allocate(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries = torch.full((2 * capacity,), _EMPTY, dtype=torch.int64, device=self._device)

    def _rebuild(self, capacity: int) -> None:
        keys, slots = self.items()
        self._allocate(capacity)
        while not self._insert(keys, slots):
            self._allocate(2 * self._capacity)
        self._tombstones = 0

    def _insert(self, keys: torch.Tensor, slots: torch.Tensor) -> bool:
        """Put keys in; return whether all found a place, and where not, leave the table as it was."""
        places = torch.empty_like(keys)
        launch(_add, len(keys), 1, *self._table, keys, slots, places)
        failed = places < 0
        if not failed.any():
            return True
        launch(_undo, len(keys), 1, self._entries, places)
        known = places == _KNOWN
        if known.any():
            position = int(known.to(torch.uint8).argmax())
            raise KeyError(
                f"key {int(keys[position])} (position {position}) is in the index already; find it before adding it"
            )
        return False


def _capacity_for(size: int) -> int:
    return max(_MIN_CAPACITY, 1 << (int(size / _MOST_LOAD) - 1).bit_length())


_NO_ROOM, _KNOWN = -1, -2


@kernel
def _find(entries, mask, probes, keys, out):
    for i in range(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, keys.size, cuda.gridDim.x * cuda.blockDim.y):
        key = keys[i]
        place = int(_mix(key)) & mask
        found = -1
        for _ in range(probes if key >= 0 else 0):
            there = entries[2 * place]
            if there == key:
                found = entries[2 * place + 1]
            if there == key or there == _EMPTY:
                break
            place = (place + 1) & mask
        out[i] = found


@kernel
def _add(entries, mask, probes, keys, slots, places):
    """places[i] = where keys[i] was put, `_KNOWN` if it was there, `_NO_ROOM` if it found none."""
    for i in range(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, keys.size, cuda.gridDim.x * cuda.blockDim.y):
        key = keys[i]
        place = int(_mix(key)) & mask
        result = _NO_ROOM
        for _ in range(probes):
            there = entries[2 * place]
            if there == _EMPTY:
                there = cuda.atomic.cas(entries, 2 * place, _EMPTY, key)
                if there == _EMPTY:
                    entries[2 * place + 1] = slots[i]
                    result = place
                    break
            if there == key:
                result = _KNOWN
                break
            place = (place + 1) & mask
        places[i] = result


@kernel
def _undo(entries, places):
    """Empty the places that one call of `_add` took: no other key was put behind them meanwhile."""
    for i in range(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, places.size, cuda.gridDim.x * cuda.blockDim.y):
        if places[i] >= 0:
            entries[2 * places[i]] = _EMPTY
            entries[2 * places[i] + 1] = _EMPTY


@kernel
def _remove(entries, mask, probes, keys, slots):
    for i in range(cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, keys.size, cuda.gridDim.x * cuda.blockDim.y):
        key = keys[i]
        place = int(_mix(key)) & mask
        slot = -1
        for _ in range(probes if key >= 0 else 0):
            there = entries[2 * place]
            if there == key:
                if cuda.atomic.cas(entries, 2 * place, key, _TOMBSTONE) == key:
                    slot = entries[2 * place + 1]
                break
            if there == _EMPTY:
                break
            place = (place + 1) & mask
        slots[i] = slot
