"""What a step with staleness does with its gradients, on the rank that has them: see `eventual.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.asynchronous.holdings import Copy
from pm.asynchronous.operations import Action, Operation
from pm.pieces import Piece, Summing
from pm.storage.store import RecordStore
from pm.tables import Table, TableGradient

if TYPE_CHECKING:
    from pm.asynchronous.eventual import EventualManager


class Updates:
    """Applies this rank's gradients, and, to the rows that it owns, those that others have sent.

    Its caller holds the lock of the manager's structure. Invariant: `_gathered` are the sums that others have sent for
    tables whose rows do not move, and that no step of this rank has applied.
    """

    def __init__(self, manager: EventualManager):
        self._manager = manager
        self._summing = Summing()
        self._gathered: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._groups: dict[int, Mapping[str, object]] = {}

    def take_in(self, table: Table, slots: np.ndarray, gradients: np.ndarray) -> None:
        """Keep gradients `[n, dim]` that another rank has sent for records at `slots`."""
        self._gathered.setdefault(table.number, []).append((slots, np.array(gradients)))

    def step(self, gradients: Sequence[TableGradient], groups: Mapping[int, dict[str, object]]) -> None:
        """Apply a step of this rank: its gradients, under the hyperparameters of their tables."""
        self._groups.update(groups)
        by_table: dict[int, list[TableGradient]] = {}
        for gradient in gradients:
            by_table.setdefault(gradient.table.number, []).append(gradient)
        for number in sorted(set(by_table) | (set(groups) & set(self._gathered))):
            self._apply(self._manager.tables[number], by_table.get(number, []), groups[number])

    def take_what_has_gathered(self) -> None:
        """Nobody steps for a while: take a step of our own with gradients that others have sent."""
        for number in list(self._gathered):
            table = self._manager.tables[number]
            self._take_step(table, [], self._groups.get(number, table.spec.group))

    def _apply(self, table: Table, gradients: Sequence[TableGradient], group: dict[str, object]) -> None:
        rows, values, scale = self._summing.combine(
            [Piece(g.rows, g.values, g.scale, g.ordinal, g.counts) for g in gradients]
            or [Piece(np.empty(0, np.int64), np.empty((0, table.spec.dim), table.spec.dtype), 1.0, 0, None)],
            table.spec.dim,
        )
        if self._manager.holdings_of(table).group.moves:
            plan = gradients[0].plan if len(gradients) == 1 else None
            keys = self._manager.keys_of(table, rows) if plan is None else plan.keys
            self._apply_here(table, keys, values, scale, group, None if plan is None else plan.places)
        else:
            self._apply_at_home(table, self._manager.keys_of(table, rows), values, scale, group)

    def _apply_here(self, table: Table, keys, values, scale: float, group, places: np.ndarray | None) -> None:
        """Apply gradients to records and copies on this rank; rows that are not here are fetched, updated and sent."""
        table.begun = True
        table.gradient_steps += 1
        if not len(keys):
            return
        holdings, rule, version = self._manager.holdings_of(table), table.spec.rule, self._manager.steps + 1

        def apply(store: RecordStore, slots: np.ndarray, some: np.ndarray | None) -> None:
            grads = values if some is None else values[some]
            store.keep(slots)
            rule.apply(store, slots, grads, scale, group, table.gradient_steps, version)

        places = holdings.places(keys, places)
        mine = np.flatnonzero(places >= 0)
        if len(mine) == len(keys):
            apply(holdings.owned.store, places, None)
            self._manager.node.grants.changed_here(holdings, places)
            return
        if len(mine):
            apply(holdings.owned.store, places[mine], mine)
            self._manager.node.grants.changed_here(holdings, places[mine])
        others = np.flatnonzero(places < 0)
        at = -2 - places[others]
        active = (at >= 0) & (holdings.copies.states[at] == Copy.ACTIVE)
        if active.any():
            apply(holdings.copies.store, at[active], others[active])
            holdings.copies.mark_changed(at[active])
        away = others[~active]
        if len(away):
            self._apply_away(table, keys[away], lambda store, slots: apply(store, slots, away))

    def _apply_away(self, table: Table, keys: np.ndarray, apply: Callable[[RecordStore, np.ndarray], None]) -> None:
        """Update rows that are not here: by what a record, pulled for this, changes, their owners' records change."""
        group = self._manager.holdings_of(table).group
        before = np.empty((len(keys), group.width), table.spec.dtype)
        pulling = Operation(Action.PULL, group.number, keys, before)
        self._manager.structure.release()  # what is waited for comes with messages, which need the lock
        try:
            self._manager.run(pulling)
            self._manager.wait_for(pulling)
        finally:
            self._manager.structure.acquire()
        scratch = RecordStore(table.spec.record_class, len(keys))
        slots = scratch.allocate(len(keys))
        scratch.set_values(slots, before)
        apply(scratch, slots)
        after = cuda_ops.gather(scratch.words, scratch.stride, slots, width=group.width)
        self._manager.run(Operation(Action.PUSH, group.number, keys, after - before))

    def _apply_at_home(self, table: Table, keys, values, scale: float, group: dict[str, object]) -> None:
        """Sum gradients for rows of others, and take a step with what has come together for our own."""
        holdings = self._manager.holdings_of(table)
        slots = self._manager.node.grants.find_or_make(holdings, keys)
        mine = slots >= 0
        if not mine.all():
            away = np.ascontiguousarray(values[~mine] * values.dtype.type(scale))
            self._manager.run(Operation(Action.PUSH, holdings.group.number, keys[~mine], away))
        pieces = [Piece(slots[mine], np.ascontiguousarray(values[mine]), scale, 0, None)]
        self._take_step(table, pieces, group)

    def _take_step(self, table: Table, pieces: list[Piece], group: dict[str, object]) -> None:
        """Apply what others have sent, and `pieces`, as one step."""
        pieces = pieces + [Piece(at, sums, 1.0, 0, None) for at, sums in self._gathered.pop(table.number, ())]
        self._manager.apply(table, pieces, group)
        touched = [piece.slots for piece in pieces if len(piece.slots)]
        if touched:
            self._manager.node.grants.changed_from_afar(
                self._manager.holdings_of(table), np.unique(np.concatenate(touched))
            )
