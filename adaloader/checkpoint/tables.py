"""A managed table's part in a checkpoint: what the index says of it, and the rows that a rank writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import pm
from adaloader.checkpoint.layout import TableEntry, held_name
from adaloader.checkpoint.tree import Encoder
from adaloader.held_state import state_names
from adaloader.managed_model import ManagedModel
from adaloader.managed_table import ManagedTable
from adaloader.program_fill import ProgramFill
from pm.records import Records, caught_up_to, owned_in_order, read_records

_CHUNK_BYTES = 4 << 20
_FORMS = {"float32": "F32", "float64": "F64"}


@dataclass(frozen=True)
class OwnRows:
    """The rows of one table that this rank writes: those that it owns and somebody touched (int64 `[n]`, ascending).

    `slots` (int64 `[n]`) are theirs; None while the table's first step is not over, when rank 0 writes all rows from
    the parameter's own memory.
    """

    table: ManagedTable
    rows: np.ndarray
    slots: np.ndarray | None

    def forms(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of each tensor that they become, by name."""
        name, spec, n = self.table.name, self.table.table.spec, len(self.rows)
        form = _FORMS[spec.dtype]
        forms = {held_name("rows", name): ("I64", (n,)), held_name("values", name): (form, (n, spec.dim))}
        for state, width in zip(*states_of(self.table.table), strict=True):
            forms[held_name("state", name, state)] = (form, (n, width))
        if self.table.table.history is not None:
            forms[held_name("caught_up", name)] = ("I64", (n,))
        return forms

    def parts(self, manager: pm.Manager) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name of a tensor, its next part), in chunks; inside `still()`."""
        name, (states, widths) = self.table.name, states_of(self.table.table)
        for records in self._records(manager):
            yield held_name("rows", name), records.rows
            yield held_name("values", name), records.values
            at = 0
            for state, width in zip(states, widths, strict=True):
                yield held_name("state", name, state), np.ascontiguousarray(records.states[:, at : at + width])
                at += width
            if records.caught_up is not None:
                yield held_name("caught_up", name), records.caught_up

    def _records(self, manager: pm.Manager) -> Iterator[Records]:
        table = self.table.table
        chunk_rows = max(1, _CHUNK_BYTES // table.store.record_class.record_bytes)
        if self.slots is not None:
            yield from read_records(table, self.rows, self.slots, chunk_rows)
            return
        for start in range(0, len(self.rows), chunk_rows):
            rows = self.rows[start : start + chunk_rows]
            values, states = manager.initial_rows(table, rows)
            count = 0 if table.history is None else len(table.history)
            yield Records(rows, values, states, caught_up_to(table, count, len(rows)))


def own_rows(model: ManagedModel) -> list[OwnRows]:
    """Return, for each table in order, the rows that this rank writes; inside `still()`."""
    found = []
    for table in model.tables_in_order():
        if table.probation is None:
            found.append(OwnRows(table, *owned_in_order(model.manager, table.table)))
        else:
            rows = table.table.spec.rows if model.manager.rank == 0 else 0
            found.append(OwnRows(table, np.arange(rows, dtype=np.int64), None))
    return found


def states_of(table: pm.Table) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the names of the parts of a record's optimizer state, and how many numbers each has."""
    names, words = state_names(table.spec.rule), table.store.record_class.state_words
    return names, tuple([words // len(names)] * len(names)) if names else ()


def table_entry(table: ManagedTable, held: int, encoder: Encoder, aliases: list[str]) -> TableEntry:
    """Return what the index says of a table of which all ranks together write `held` rows."""
    spec, of = table.table.spec, table.table
    names, widths = states_of(of)
    is_whole = table.all_rows_held or table.probation is not None
    program = spec.fill.description() if isinstance(spec.fill, ProgramFill) and not is_whole else None
    return TableEntry(
        rows=spec.rows,
        dim=spec.dim,
        dtype=spec.dtype,
        rule=spec.rule.name,
        states=list(names),
        state_widths=list(widths),
        aliases=aliases,
        held=held,
        gradient_steps=of.gradient_steps,
        begun=of.begun,
        initial_state=float(spec.rule.initial_state(spec.group)),
        program=None if program is None else encoder.encode(program, f"program/{table.name}"),
        history_steps=0 if of.history is None else len(of.history),
        history=None if of.history is None else encoder.encode(_history(of), f"history/{table.name}"),
    )


def _history(table: pm.Table) -> dict[str, Any]:
    history = table.history
    return {
        "kind": history.kind,
        "steps": history.steps,
        "bounds": history.bounds,
        "slow": bool(history.slow),
        "mu_product": history.mu_product,
    }
