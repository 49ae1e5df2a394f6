"""What a step hands to the owners of rows: their gradients, in a message or in memory that both share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

import cuda_ops
from pm.colocated.machine_sums import IN_SUM
from pm.exact.serving import AT_ROWS, AT_SLOTS, NO_ROWS
from pm.messages import Kind, Message, narrow
from pm.pieces import Piece
from pm.tables import TableGradient

if TYPE_CHECKING:
    from pm.exact.synchronous import SynchronousManager

IN_MESSAGE = -1
"""In place of where in shared memory values are: they are in the message."""


class Handover:
    """Cuts gradients up by owner and sends each its part. On the trainer's thread.

    Args:
        manager: whose gradients these are.
    """

    def __init__(self, manager: SynchronousManager):
        self._manager = manager

    def send(self, gradients: Sequence[TableGradient]) -> None:
        """Send all owners their parts of this step's gradients."""
        manager = self._manager
        planned = [g.plan is not None and g.plan.complete and not g.plan.released for g in gradients]
        others = [g for g, has_plan in zip(gradients, planned, strict=True) if not has_plan]
        owners = iter(manager.locate([(g.table, g.rows) for g in others]) if others else ())
        for gradient, has_plan in zip(gradients, planned, strict=True):
            if has_plan:
                number = AT_SLOTS if gradient.plan.in_place else gradient.plan.number
                self._send_parts(gradient, number, manager.asking.parts(gradient.plan))
            else:
                self._send_parts(gradient, AT_ROWS, by_rank(next(owners), manager.ranks))

    def _send_parts(self, gradient: TableGradient, number: int, parts: list[np.ndarray]) -> None:
        """Send each rank the rows at its part of the positions; `number` as in GRADIENT."""
        manager = self._manager
        dim = gradient.table.spec.dim
        counted = gradient.counts is not None
        scale = np.array([gradient.scale], np.float64)
        flat = np.ascontiguousarray(gradient.values).reshape(-1)
        for peer in (*manager.peers, manager.rank):
            part = parts[peer]  # its values are copied here: the user may change the gradient once the step is over
            adding = manager.machines.adds_for(peer)
            values, place = self._room_for(peer if adding is None else adding, len(part), dim, flat.dtype)
            cuda_ops.gather(flat, dim, part, values)
            counts = gradient.counts[part] if counted else NO_ROWS
            if peer == manager.rank:
                self._take_own(gradient, number, part, values, counts if counted else None)
                continue
            rows = narrow(gradient.rows[part]) if number == AT_ROWS else NO_ROWS
            if number == AT_SLOTS:
                rows = narrow(gradient.plan.slots_there[gradient.plan.where == peer])
            if place != IN_MESSAGE:
                values = np.empty((0, dim), flat.dtype)
            if adding is not None:
                numbers = (manager.steps, peer, gradient.table.number, gradient.ordinal, int(counted), place)
                portion = gradient.rows[part], values, scale, counts
                manager.deliver(adding, Message(Kind.PORTION, numbers, portion))  # see `MachineSums`
                values, counts, place = np.empty((0, dim), flat.dtype), NO_ROWS, IN_SUM
            numbers = (manager.steps, gradient.table.number, number, gradient.ordinal, int(counted), place)
            manager.transport.send(peer, Message(Kind.GRADIENT, numbers, (rows, values, scale, counts)))

    def _room_for(self, peer: int, rows: int, dim: int, dtype: np.dtype) -> tuple[np.ndarray, int]:
        """Return memory `[rows, dim]` for values that go to `peer`, and where it is in that which they share."""
        neighbours = self._manager.neighbours
        if rows and peer in neighbours.peers:
            place = neighbours.gradients.reserve(self._manager.steps, rows * dim * dtype.itemsize)
            if place is not None:
                return neighbours.gradients.values(self._manager.rank, place, rows, dim, dtype), place
        return np.empty((rows, dim), dtype), IN_MESSAGE

    def _take_own(
        self, gradient: TableGradient, number: int, part: np.ndarray, values: np.ndarray, counts: np.ndarray | None
    ) -> None:
        """Hand the part of a gradient that is for rows of this rank to the background thread; they cannot leave now."""
        manager, table, step = self._manager, gradient.table, self._manager.steps
        slots = manager.touch(table, gradient.rows[part]) if number == AT_ROWS else gradient.plan.slots
        piece = Piece(slots, values, gradient.scale, gradient.ordinal, counts)
        take = partial(manager.serving.take_piece, manager.rank, step, table.number, number, piece)
        manager.transport.post(take, wake=False)  # the STEP that follows wakes the thread


def by_rank(ranks: np.ndarray, count: int) -> list[np.ndarray]:
    """Return, per rank of `count`, the positions in `ranks` (int64 `[n]`) at which it is."""
    order, counts = cuda_ops.partition(ranks, count)
    return np.split(order, np.cumsum(counts)[:-1])
