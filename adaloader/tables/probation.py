"""The time until its first step is over, in which a table that already exists may still turn out to be used as a whole.

Until then the parameter's own memory is kept, and rows are made from it as they are first touched: as long as no step
has been taken they are the same. After the first step with the table every rank makes the records that it would make
later, and the memory goes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

import pm
from adaloader.optimizers.held_state import HeldState, free_state, state_names, state_shape, take_states
from adaloader.ranks.table_values import broadcast_tensor

if TYPE_CHECKING:
    from adaloader.tables.managed_table import ManagedTable

_CHUNK_ROWS = 1 << 16


class Probation:
    """What a table was before it was managed.

    Args:
        parameter: whose memory `values` `[rows, dim]` stays; a copy of it on the host, if it is on a device.
        held: what its optimizer holds; `states`, one tensor `[rows, ...]` per part, where that differs by row.
    """

    def __init__(self, parameter: torch.nn.Parameter, held: HeldState):
        with torch._C.DisableTorchFunctionSubclass():
            self.values = parameter.detach().cpu().contiguous()
        self.states = None if held.parts is None else tuple(part.detach().cpu() for part in held.parts)

    def fill(self, rows: np.ndarray, out: np.ndarray) -> None:
        np.take(self.values.numpy(), rows, axis=0, out=out)

    def fill_states(self, rows: np.ndarray, out: np.ndarray) -> None:
        if self.states is not None:
            take_states(self.states, rows, out)

    def take_from_rank_0(self, manager: pm.Manager, rule: pm.Rule, differs_by_row: bool) -> None:
        """Make values, and state where it differs by row, rank 0's on every rank (collective)."""
        if not differs_by_row:
            self.states = None
        elif self.states is None:
            shape = state_shape(rule, self.values.shape)
            self.states = tuple(self.values.new_empty(shape) for _ in state_names(rule))
        if manager.ranks > 1:
            broadcast_tensor(manager, self.values)
            if differs_by_row:
                self.states = tuple(part.detach().contiguous() for part in self.states)
                for part in self.states:
                    broadcast_tensor(manager, part)

    def overwrite(self, manager: pm.Manager, table: pm.Table, values: torch.Tensor | None, root: int = 0) -> None:
        """Set all rows to rank `root`'s `values` `[rows, dim]` (collective)."""
        if manager.rank == root:
            self.values.copy_(values)
        if manager.ranks > 1:
            broadcast_tensor(manager, self.values, root)
        with manager.still():
            for rows, held, _ in manager.held_rows(table):
                self.fill(rows, held)
                manager.load_rows(table, rows, held, None)
            manager.rewrite_ended()


def confirm(table: ManagedTable) -> None:
    """The table stays managed: make all records that belong on this rank, and free the parameter's own memory."""
    model, spec = table.owner, table.table.spec
    for start in range(0, spec.rows, _CHUNK_ROWS):
        rows = np.arange(start, min(start + _CHUNK_ROWS, spec.rows), dtype=np.int64)
        model.manager.make_rows(table.table, rows)
    model.manager.all_rows_made(table.table)
    table.probation.values = table.probation.states = None  # the spec's fill functions still hold the object
    table.probation = None
    table.all_rows_held = True
    free_state(model.optimizers, table.parameter)
