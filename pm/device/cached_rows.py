"""The rows of one table on a device: records that the cache brings there and back, and that are used there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch

import cuda_ops
from pm.device.device_cache import DeviceCache
from pm.tables import Table


class Copies(Protocol):
    """What copies between the host and a device; see `adaloader.memory.device_memory`."""

    device: torch.device

    def room(self, shape: tuple[int, ...], dtype: str) -> np.ndarray: ...

    def send(self, array: np.ndarray) -> torch.Tensor: ...

    def fetch(self, tensor: torch.Tensor) -> Callable[[], np.ndarray]: ...


_ACCESS_BYTES = 16
_STEP_BYTES = 8


class DeviceRecords:
    """Records in a device's memory, as a `RecordStore` has them: what an update rule needs of a store.

    Each begins at a multiple of 16 bytes, so that a row is read and written in few accesses. Value and state (`payload`
    words) are what comes from the host and goes back; the word of the last step is of this memory alone.

    Args:
        table: whose records they are.
        slots: how many there is room for.
        device: where.
    """

    def __init__(self, table: Table, slots: int, device: torch.device):
        self.record_class = table.store.record_class
        self.payload = self.record_class.dim + self.record_class.state_words
        self.stride = self.record_bytes_of(table) // np.dtype(self.record_class.dtype).itemsize
        dtype = getattr(torch, self.record_class.dtype)
        self.words = torch.zeros(slots * self.stride, dtype=dtype, device=device)
        self.steps = self.words.view(torch.int64)

    def update(self, kernel: Callable[..., None], slots: torch.Tensor, grads: torch.Tensor, *numbers) -> None:
        """See `RecordStore.update`."""
        kernel(self.words, self.stride, self.record_class.dim, self.steps, slots, grads, *numbers)

    @staticmethod
    def record_bytes_of(table: Table) -> int:
        """Return the bytes that a record of `table` takes on a device."""
        kind = table.store.record_class
        used = (kind.dim + kind.state_words) * np.dtype(kind.dtype).itemsize + _STEP_BYTES
        return -(-used // _ACCESS_BYTES) * _ACCESS_BYTES


class CachedRows:
    """Some rows of one table in a device's memory of fixed size, with their optimizer state.

    A row that is here is looked up and updated here alone: the host's record is behind until the row is written back,
    which happens when it has to go, or when somebody asks for the host's records (`to_host`). Everything runs on the
    stream of whoever calls, in order, but for copies. For one thread at a time.

    Args:
        table: its steps must not move rows without gradient.
        slots: rows that there is room for.
        copies: between the host and the device.
    """

    def __init__(self, table: Table, slots: int, copies: Copies):
        self.table, self._copies = table, copies
        self.records = DeviceRecords(table, slots, copies.device)
        self._host = _HostRecords(table, copies, self.records.payload)
        record_bytes = DeviceRecords.record_bytes_of(table)
        self.cache = DeviceCache(slots, self._host, _OnDevice(self.records, copies), record_bytes)
        self._host_may_have_changed = False

    def look_up(self, number: int, keys: np.ndarray) -> torch.Tensor:
        """Return the values `[n, dim]` of the keys of batch `number` as they are now. Their rows stay until the batch
        is finished, for its step, unless others need the room.

        Raises:
            MemoryError: there is not enough room for this batch alone; states the bytes.
        """
        self._catch_up()
        slots = self.cache.slots_in_use(number)
        return self._values(self._with_room(lambda: self.cache.begin(number, keys)) if slots is None else slots)

    def look_up_once(self, keys: np.ndarray) -> torch.Tensor:
        """Return the values `[n, dim]` of distinct keys that are looked up for no batch.

        Raises:
            MemoryError: as `look_up`.
        """
        self._catch_up()
        number, slots = self._with_room(lambda: self.cache.hold(keys))
        values = self._values(slots)
        self.cache.finish(number, changed=False)
        return values

    def _with_room(self, take: Callable[[], Any]) -> Any:
        try:
            return take()
        except MemoryError:
            self.cache.let_go()
            return take()

    def _values(self, slots: np.ndarray) -> torch.Tensor:
        there = self._copies.send(slots)
        out = torch.empty(
            len(slots), self.records.record_class.dim, dtype=self.records.words.dtype, device=there.device
        )
        with cuda_ops.trusted():
            cuda_ops.gather(self.records.words, self.records.stride, there, out)
        return out

    def update(
        self, number: int | None, keys: np.ndarray, grads, scale: float, group: Mapping[str, object], version: int
    ) -> bool:
        """Apply a step's gradient `[n, dim]`, on the device, of distinct `keys`: those of batch `number`, or others.

        Return whether that was done: False, with nothing changed, where the rows have not enough room.
        """
        self._catch_up()
        slots, held = None if number is None else self.cache.slots_in_use(number), None
        if slots is None:
            try:
                held, slots = self.cache.hold(keys)
            except MemoryError:
                return False
        with cuda_ops.trusted():
            there = self._copies.send(slots)
            count = self.table.gradient_steps
            self.table.spec.rule.apply(self.records, there, grads, scale, group, count, version)
        self.cache.changed(slots)
        if held is not None:
            self.cache.finish(held, changed=False)
        return True

    def to_host(self, *, written: bool) -> None:
        """Make the host's records what the rows are now. With `written` somebody may change them there afterwards,
        before rows are looked up or updated here again.
        """
        if not self._host_may_have_changed:
            self.cache.flush()
            self._host.settle()
        self._host_may_have_changed |= written

    def prefetch(self) -> None:
        """Bring rows of batches that were announced, while there is room."""
        self._catch_up()
        self.cache.prefetch()

    def stats(self) -> dict[str, float]:
        """As `DeviceCache.stats`, with the rows and bytes that there is room for."""
        return {**self.cache.stats(), "rows": self.cache.slots, "bytes": self.records.words.nbytes}

    def renewed(self) -> CachedRows:
        """Return an empty cache of as many bytes for the same table, whose records have become others."""
        slots = self.records.words.nbytes // DeviceRecords.record_bytes_of(self.table)
        return CachedRows(self.table, slots, self._copies)

    def _catch_up(self) -> None:
        if self._host_may_have_changed:
            self._host_may_have_changed = False
            self.cache.reload()


class _HostRecords:
    """The host's memory of a table's rows, by key. Rows that are written arrive when they are first needed."""

    def __init__(self, table: Table, copies: Copies, payload: int):
        self._table, self._copies, self._payload = table, copies, payload
        self._coming: list[tuple[np.ndarray, Callable[[], np.ndarray]]] = []

    def read(self, keys: np.ndarray) -> torch.Tensor:
        self.settle()
        store = self._table.store
        rows = self._copies.room((len(keys), self._payload), store.record_class.dtype)
        cuda_ops.gather(store.words, store.stride, store.index.find(keys), rows)
        return self._copies.send(rows)

    def write(self, keys: np.ndarray, rows: Callable[[], np.ndarray]) -> None:
        self._coming.append((keys, rows))

    def settle(self) -> None:
        """Wait for what is under way, and store it."""
        store = self._table.store
        for keys, rows in self._coming:
            store.put(store.index.find(keys), rows())
        self._coming.clear()


class _OnDevice:
    """The device's memory of a table's rows, by slot."""

    def __init__(self, records: DeviceRecords, copies: Copies):
        self._records, self._copies = records, copies

    def read(self, slots: np.ndarray) -> Callable[[], np.ndarray]:
        words = self._records.words
        out = torch.empty(len(slots), self._records.payload, dtype=words.dtype, device=words.device)
        with cuda_ops.trusted():
            cuda_ops.gather(words, self._records.stride, self._copies.send(slots), out)
        return self._copies.fetch(out)

    def write(self, slots: np.ndarray, rows: torch.Tensor) -> None:
        with cuda_ops.trusted():
            cuda_ops.scatter(self._records.words, self._records.stride, self._copies.send(slots), rows, distinct=True)
