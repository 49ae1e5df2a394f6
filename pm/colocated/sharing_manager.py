"""A manager of several ranks whose tables may be in memory that all of them share: see `shared_tables.py`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from pm.colocated.neighbours import Neighbours
from pm.colocated.shared_steps import SharedSteps
from pm.colocated.shared_tables import SharedTables
from pm.exact.connected_manager import ConnectedManager
from pm.exact.directory import Directory
from pm.exact.serving import Serving
from pm.storage.store import RecordStore
from pm.tables import Stretch, Table, TableSpec


class SharingManager(ConnectedManager):
    """What a manager does with such tables; of others, what one does whose rows are all at hand."""

    neighbours: Neighbours
    shared: SharedTables
    shared_steps: SharedSteps
    directory: Directory
    serving: Serving
    _on_background: Callable[[Callable[[], None]], None]

    needs_no_messages = False
    """Whether steps wait for none: all tables are in memory that all ranks share."""

    # Tables

    def _need_messages(self) -> None:
        """From now on steps wait for messages (collective): what is missing of those before is said."""
        if self.needs_no_messages:
            self.needs_no_messages = False
            self._on_background(self.serving.send_ready)

    def _add_shared(self, tables: Sequence[Table]) -> list[Table]:
        """Share memory for records of those of `tables` for which that can be; return the others (collective)."""
        block = None
        if self.in_lockstep and not self.shared_steps.is_used and self.shared.may_take(tables):
            block = self.neighbours.block_for_all(SharedSteps.block_bytes(self.ranks))
            if block is None:
                return list(tables)
        self.shared.add(tables)
        others = [table for table in tables if table.store is None]
        if block is not None and len(others) < len(tables):
            self.shared_steps.begin(block)
        return others

    def _leave_shared(self, table: Table, spec: TableSpec) -> None:
        """Move the records of a shared table to the stores of their homes, under another rule (collective)."""
        rows, slots = self.shared.rows_made(table)
        mine = self.directory.home_of(table.keys(rows)) == self.rank
        values = table.store.values(slots[mine], np.empty((int(mine.sum()), spec.dim), spec.dtype))
        self.barrier()  # all ranks have read theirs
        with self.structure:
            old, table.spec = table.store, spec
            table.begin_history()
            table.store = self._store_for(spec.record_class, spec.rows, spec.rows)
            made = super().make_slots(table, rows[mine])
            table.store.set_values(made, values)
            self._initialise_state(table, rows[mine], made)
            self.shared.left(old)

    # Rows

    def make_rows(self, table: Table, rows: np.ndarray) -> None:
        if table.store.is_shared:  # any rank may need any of them
            self.shared.touch(table, rows)
        else:
            super().make_rows(table, rows)

    def all_rows_made(self, table: Table) -> None:
        if table.store.is_shared:
            table.store.use_large_pages()

    def find_together(self, tables, keys, rows, starts) -> Stretch | None:
        self._check_open()
        return self.shared.find_together(tables, rows, starts)

    def read_here(self, store: RecordStore, slots: np.ndarray, out: np.ndarray) -> np.ndarray:
        self._check_open()
        self.shared_steps.settle()
        read = super().read_here
        return self.neighbours.undisturbed(lambda: read(store, slots, out))

    def of_table(self, table: Table, keys: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if table.store.is_shared:
            return self.shared.of_table(table, keys, slots)
        return super().of_table(table, keys, slots)

    def make_slots(self, table: Table, rows: np.ndarray) -> np.ndarray:
        return self.touch(table, rows) if table.store.is_shared else super().make_slots(table, rows)

    # Steps

    def go_on(self) -> None:
        self.shared_steps.go_on()

    def wait_for_words(self, behind: Callable[[], Sequence[int]], step: int, cannot: Collection[int]) -> None:
        """Wait until no rank is `behind()` with what it says of `step`; those in `cannot` will not say it any more."""

        def why_in_vain() -> str | None:
            missing = set(behind()).intersection(cannot)
            return self.others.closed(missing, f"step {step}") if missing else None

        self._waiting.until(
            lambda: not behind(), lambda: self.others.missing(behind(), f"take step {step}"), why_in_vain
        )
