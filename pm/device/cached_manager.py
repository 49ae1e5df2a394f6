"""The manager of one rank whose model is on a device, and that keeps the rows of the lookahead window there.

Tables are given a share of a budget of device memory (`cache`). What their lookups and steps need is done on the device
(`device_rows`, and gradients that are tensors there); whoever asks for the host's records gets them up to date, for
they are written back first.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from pm.device.cached_rows import CachedRows, Copies, DeviceRecords
from pm.manager import Manager
from pm.tables import RowPlan, Table, TableGradient, TableSpec


class CachedManager(Manager):
    """A `Manager` some of whose tables have rows on a device.

    Invariant: a row of a table in `_cached` is what its `CachedRows` says; every method that reads the host's records,
    or changes them, has them brought up to date before (`_to_host`).
    """

    def __init__(self):
        super().__init__()
        self._cached: dict[int, CachedRows] = {}
        self._lock = threading.RLock()  # plans are announced on one thread, and used on another

    def cache(self, tables: Mapping[int, Copies], budget_bytes: int) -> None:
        """Give `tables`, by number, room for some of their rows on a device: `budget_bytes` together.

        Small tables get room for all their rows, and larger ones equal shares of the rest. Tables whose steps move rows
        that have no gradient are left out.

        Raises:
            ValueError: there is room for less than one row of a table.
        """
        wanted = {n: self.tables[n] for n in tables if self.tables[n].history is None}
        shares = share_out({n: t.spec.rows * DeviceRecords.record_bytes_of(t) for n, t in wanted.items()}, budget_bytes)
        for number, table in wanted.items():
            record_bytes = DeviceRecords.record_bytes_of(table)
            if shares[number] < record_bytes:
                raise ValueError(
                    f"device_cache_bytes={budget_bytes:,} leaves {shares[number]:,} bytes for table "
                    f"{table.spec.name!r}, one row of which takes {record_bytes:,}; give it more, or 0 for no cache"
                )
            self._cached[number] = CachedRows(table, shares[number] // record_bytes, tables[number])

    def is_cached(self, table: Table) -> bool:
        """Whether lookups and steps of `table` are made on its device."""
        return table.number in self._cached

    def device_rows(self, table: Table, rows: np.ndarray, plan: RowPlan | None) -> torch.Tensor:
        """Return distinct `rows` (int64 `[n]`) of a cached table, those of `plan` if given, on its device `[n, dim]`.

        Raises:
            MemoryError: the cache has not enough room; states the bytes.
        """
        self.touch(table, rows)
        with self._lock:
            cached = self._cached[table.number]
            if plan is None or plan.released:
                self.traffic.on_demand_pulls += plan is None
                return cached.look_up_once(table.keys(rows))
            return cached.look_up(plan.number, table.keys(rows))

    def intend(self, table: Table, rows: np.ndarray, expected: int) -> RowPlan:
        with self._lock:  # plans are announced in the order of their numbers
            plan = super().intend(table, rows, expected)
            if table.number in self._cached:
                self._cached[table.number].cache.intend(plan.number, table.keys(rows))
            return plan

    def release(self, plan: RowPlan) -> None:
        with self._lock:
            super().release(plan)
            cached = self._cached.get(plan.table.number)
            if cached is not None and cached.cache.slots_in_use(plan.number) is not None:
                cached.cache.finish(plan.number, changed=False)

    def submit(self, gradients: Sequence[TableGradient], groups, **keywords) -> None:
        with self._lock:
            super().submit(gradients, groups, **keywords)
            for cached in self._cached.values():
                cached.prefetch()

    def _apply_gradients(self, table: Table, parts: list[TableGradient], group: Mapping[str, object]) -> None:
        cached = self._cached.get(table.number)
        if cached is None:
            super()._apply_gradients(table, parts, group)
            return
        (part,) = parts  # one rank has made one of all
        table.gradient_steps += 1
        table.begun = True
        if not len(part.rows):
            return
        self.touch(table, part.rows)
        number, version = None if part.plan is None else part.plan.number, self._version_after_step()
        if not cached.update(number, table.keys(part.rows), part.values, part.scale, group, version):
            self._to_host(table, written=True)  # gradients of many batches together, which have no room there at once
            slots, values = self.touch(table, part.rows), part.values.detach().cpu().numpy()
            table.store.keep(slots)
            table.spec.rule.apply(table.store, slots, values, part.scale, group, table.gradient_steps, version)

    # Who reads or changes the host's records

    def _to_host(self, table: Table, *, written: bool = False) -> None:
        with self._lock:
            if table.number in self._cached:
                self._cached[table.number].to_host(written=written)

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        for table in self.tables:
            self._to_host(table, written=True)
        with super().still():
            yield

    def read(self, plan: RowPlan, out: np.ndarray) -> np.ndarray:
        self._to_host(plan.table)
        return super().read(plan, out)

    def pull(self, table: Table, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        self._to_host(table)
        return super().pull(table, rows, out)

    def renorm_own(self, table: Table, rows: np.ndarray, max_norm: float, norm_type: float) -> None:
        self._to_host(table, written=True)
        super().renorm_own(table, rows, max_norm, norm_type)

    def load_rows(self, table: Table, rows: np.ndarray, values: np.ndarray, states: np.ndarray | None) -> None:
        self._to_host(table, written=True)
        super().load_rows(table, rows, values, states)

    def load_states(self, table: Table, rows: np.ndarray, states: np.ndarray) -> None:
        self._to_host(table, written=True)
        super().load_states(table, rows, states)

    def owned_slots(self, table: Table) -> tuple[np.ndarray, np.ndarray]:
        self._to_host(table)
        return super().owned_slots(table)

    def held_rows(self, table: Table) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        self._to_host(table)
        return super().held_rows(table)

    def replace_rule(self, table: Table, spec: TableSpec, *, all_made: bool = False) -> None:
        with self._lock:
            self._to_host(table)
            cached = self._cached.pop(table.number, None)
            super().replace_rule(table, spec, all_made=all_made)
            if cached is not None and table.history is None:
                self._cached[table.number] = cached.renewed()

    def cache_stats(self) -> dict[str, dict[str, float]]:
        """Return, by name of the table, what `DeviceCache.stats` says, and the rows and bytes there is room for."""
        return {self.tables[number].spec.name: cached.stats() for number, cached in self._cached.items()}


def share_out(wanted_bytes: Mapping[int, int], budget_bytes: int) -> dict[int, int]:
    """Return a part of the budget for each: all that it wants, or an equal share of what the smaller ones leave."""
    shares, left = {}, budget_bytes
    for at, (number, wanted) in enumerate(sorted(wanted_bytes.items(), key=lambda item: item[1])):
        shares[number] = min(wanted, left // (len(wanted_bytes) - at))
        left -= shares[number]
    return shares
