"""Row gradients over ranks: how the ranks make, of the parts that each has, rows that are whole on one rank each.

Until something needs it (a norm, a clamp, a test for infinities, the values themselves) a rank keeps what its own
batches gave. Then all ranks say that they are here, send every row to one of them, and sum in rank order as owners do.
From then on the gradient of a table is its rows over all ranks, each on one rank, so that what applies to single
values is local, and what applies to all is one small exchange. Everything here is collective, but for ranks that
follow (see `following.py`): these are told by the messages, give what they have, and get nothing.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

import cuda_ops
from adaloader.errors import ManagedTableError
from adaloader.gradients.parts import Part
from adaloader.gradients.row_sum import RowSum
from adaloader.memory.device_memory import on_host
from pm.messages import Kind, Message
from pm.pieces import Piece, Summing

if TYPE_CHECKING:
    from adaloader.model.managed_model import ManagedModel
    from adaloader.tables.managed_table import ManagedTable

_UNKNOWN, _WITHOUT, _WITH = range(3)  # what a rank says of a table: not one here yet, no gradient, a gradient
_NO_ROWS = np.empty(0, np.int64)


class Combiner:
    """Combines the row gradients of one model's tables over several ranks.

    Invariant: `_combined_at` is the number of reductions after which the tables' gradients were last combined; nothing
    has been added to them since if it is still the reducer's. Messages arrive on the manager's background thread, and
    are kept by number of the exchange; everything else happens on the trainer's.
    """

    def __init__(self, model: ManagedModel):
        self._model = weakref.ref(model)
        self._manager = model.manager
        self._summing = Summing()
        self._number = 0
        self._gathers = 0
        self._combined_at = -1
        self._active: list[int] = list(range(self._manager.ranks))
        self._present: dict[int, dict[int, Message]] = defaultdict(dict)
        self._pieces: dict[int, dict[int, dict[int, list[Piece]]]] = {}
        self._sent: dict[int, set[int]] = defaultdict(set)
        self._given: dict[tuple[int, ...], dict[int, np.ndarray]] = defaultdict(dict)
        self._passed_on = self._manager.on_control
        self._manager.on_control = self._receive

    # What row gradients ask for

    def combine(self) -> None:
        """Combine the gradients of all tables, unless nothing was added since this was last done (collective)."""
        model = self._model()
        reducer = model.reducer
        if reducer.is_under_way:
            raise ManagedTableError(
                "the gradients of tables are summed over ranks when backward() ends, and it has not ended: read them "
                "after it, or in a hook of the table itself"
            )
        if reducer.is_deferred:
            raise ManagedTableError(
                "the gradients of tables were gathered inside no_sync(), and have not been summed over ranks since: "
                "call backward() once outside of it before you read, clip or unscale them"
            )
        if self._combined_at != reducer.reductions:
            self._exchange([table.gradient for table in model.tables_in_order()])
            self._combined_at = reducer.reductions

    def combine_backward(self, sums: Sequence[RowSum], *, following: bool) -> list[RowSum]:
        """Combine gradients of the backward that has just ended, of tables in order; return those that any rank has."""
        return self._exchange(sums, following=following, of_backward=True)

    def others_hold_parts(self) -> bool:
        """Whether ranks that follow may have parts, so that not even a factor is a matter of each rank's own."""
        model = self._model()
        if model.joining or self._combined_at == model.reducer.reductions:
            return False
        joined = model.reducer.some_joined
        return model.follower.ranks_may_differ if joined is None else joined

    def gather(self, values: np.ndarray) -> list[np.ndarray]:
        """Return the `values` (float64 `[n]`) of every rank that has rows, in rank order (collective)."""
        rank = self._manager.rank
        self._gathers += 1
        number = self._number, self._gathers  # ranks that followed the last exchange do not count with it
        for peer in self._active:
            if peer != rank:
                self._manager.transport.send(peer, Message(Kind.GIVEN, number, (values,)))
        self._manager.transport.wake()
        given = self._given[number]
        self._wait_for(lambda: [p for p in self._active if p != rank and p not in given])
        del self._given[number]
        return [values if p == rank else given[p] for p in self._active]

    # What a rank that follows does

    def begun_by_others(self) -> bool:
        """Whether others combine, at the step and sum at which this rank is."""
        begun = list(self._present.get(self._number + 1, {}).values())
        here = self._model().reducer.reductions, self._manager.steps
        return any(message.numbers[1:3] == here and message.numbers[3] for message in begun)

    def join(self) -> None:
        """Give the others what this rank has (collective)."""
        model = self._model()
        tables = model.tables_in_order()
        if any(message.numbers[4] for message in list(self._present[self._number + 1].values())):
            sums = [RowSum(table, [], belongs_to_table=False) for table in tables if table.has_hooks]
            self._exchange(sums, following=True, of_backward=True)
            return
        self._exchange([table.gradient for table in tables], following=True)
        self._combined_at = model.reducer.reductions

    # One exchange

    def _exchange(self, sums: Sequence[RowSum], *, following: bool = False, of_backward: bool = False) -> list[RowSum]:
        """Collective: make of `sums`, one per table in order, whole rows; return those that any rank has a part of."""
        self._number += 1
        self._gathers = 0
        number, manager = self._number, self._manager
        said = self._say_present(number, sums, following, of_backward)
        self._active = [rank for rank in range(manager.ranks) if said[rank][0]]
        states = np.array([said[rank][1] for rank in range(manager.ranks)])
        self._check_known(states)
        own = {given.table.table.number: self._send_rows(number, given) for given in sums}
        for peer in manager.peers:
            manager.transport.send(peer, Message(Kind.SHARED, (number,)))
        manager.transport.wake()
        sent = self._sent[number]
        self._wait_for(lambda: [p for p in manager.peers if p not in sent])
        pieces = self._pieces.pop(number, {})
        for table, kept in own.items():
            pieces.setdefault(table, {})[manager.rank] = kept
        del self._sent[number], self._present[number]
        reached = []
        for given in sums:
            given.changed()
            given.parts = [] if following else self._summed(given.table, pieces.get(given.table.table.number, {}))
            any_rank = bool((states[:, given.table.table.number] == _WITH).any())
            if given.belongs_to_table:
                given.table.settle_gradient(any_rank and not following)
            if any_rank:
                reached.append(given)
        return reached

    def _say_present(
        self, number: int, sums: Sequence[RowSum], following: bool, of_backward: bool
    ) -> list[tuple[bool, np.ndarray]]:
        """Collective: return, by rank, whether it is to have rows, and what it says of each table."""
        manager, model = self._manager, self._model()
        states = np.full(len(manager.tables), _UNKNOWN, np.int64)
        for given in sums:
            states[given.table.table.number] = _WITH if given.parts or self._is_zero(given) else _WITHOUT
        numbers = (number, model.reducer.reductions, manager.steps, int(not following), int(of_backward))
        for peer in manager.peers:
            manager.transport.send(peer, Message(Kind.PRESENT, numbers, (states,)))
        manager.transport.wake()
        present = self._present[number]
        self._wait_for(lambda: [p for p in manager.peers if p not in present])
        for peer in manager.peers:
            theirs = present[peer]
            same = theirs.numbers[1:3] == numbers[1:3] and theirs.numbers[4] == numbers[4]
            if not same or len(theirs.arrays[0]) != len(states):
                raise ManagedTableError(
                    f"rank {manager.rank} combines the gradients of tables after {numbers[1]} sums of gradients and "
                    f"{numbers[2]} steps, rank {peer} after {theirs.numbers[1]} and {theirs.numbers[2]}: every rank "
                    "must call backward(), step(), and what reads or clips gradients, equally often"
                )
        return [
            (not following, states)
            if rank == manager.rank
            else (bool(present[rank].numbers[3]), present[rank].arrays[0])
            for rank in range(manager.ranks)
        ]

    @staticmethod
    def _is_zero(given: RowSum) -> bool:
        return given.belongs_to_table and given.table.has_gradient

    def _check_known(self, states: np.ndarray) -> None:
        """Raise, on every rank, if a table with a gradient is not known to be one on a rank that takes part."""
        for number, table in enumerate(self._manager.tables):
            without = [rank for rank in self._active if states[rank, number] == _UNKNOWN]
            if without and (states[:, number] == _WITH).any():
                raise ManagedTableError(
                    f"parameter {table.spec.name!r} has a gradient as a table, but rank {without[0]} has not looked "
                    f"it up yet, so that its gradient cannot be read over all ranks: name it in keys= of the loader"
                )

    def _send_rows(self, number: int, given: RowSum) -> list[Piece]:
        """Send rows to their takers; return those that this rank takes."""
        manager, table = self._manager, given.table.table
        kept = []
        if torch.is_grad_enabled() and any(part.values.requires_grad for part in given.parts):
            raise ManagedTableError(
                f"the gradient of table {given.table.name!r} over ranks cannot be differentiated again: take the "
                "gradient with respect to the rows that were looked up (torch.autograd.grad(loss, rows, "
                "create_graph=True))"
            )
        for part in given.parts:
            counted = part.counts is not None
            scale = 1.0 if part.scale is None else part.scale
            values = on_host(part.values)
            order, counts = cuda_ops.partition(self._taker_of(table.keys(part.rows)), manager.ranks)
            for peer, taken in enumerate(np.split(order, np.cumsum(counts)[:-1])):
                if not len(taken):
                    continue
                lookups = part.counts[taken] if counted else None
                piece = Piece(part.rows[taken], values[taken], scale, part.ordinal, lookups)
                if peer == manager.rank:
                    kept.append(piece)
                else:
                    manager.transport.send(peer, _share(number, table.number, piece))
        return kept

    def _taker_of(self, keys: np.ndarray) -> np.ndarray:
        """Return the rank that gets each row: its home, on which all ranks agree, or if that follows, another."""
        home = self._manager.directory.home_of(keys)
        active = self._active
        takers = np.array([r if r in active else active[r % len(active)] for r in range(self._manager.ranks)], np.int64)
        return takers[home]

    def _summed(self, table: ManagedTable, by_rank: dict[int, list[Piece]]) -> list[Part]:
        pieces = [piece for rank in sorted(by_rank) for piece in by_rank[rank]]
        if not pieces:
            return []
        rows, values, scale = self._summing.combine(pieces, table.table.spec.dim)
        return [Part(rows.copy(), table.here(values.copy()), None, scale)]

    def _wait_for(self, missing) -> None:
        self._manager.wait_for_others(
            missing, "combine the gradients of tables with this rank (to read, clip or unscale them)"
        )

    # On the background thread

    def _receive(self, source: int, message: Message) -> None:
        if message.kind == Kind.PRESENT:
            self._present[message.numbers[0]][source] = message
        elif message.kind == Kind.SHARE:
            number, table, ordinal, counted = message.numbers
            rows, values, scale, counts = message.arrays
            piece = Piece(rows, values, float(scale[0]), ordinal, counts if counted else None)
            self._pieces.setdefault(number, {}).setdefault(table, {}).setdefault(source, []).append(piece)
        elif message.kind == Kind.SHARED:
            self._sent[message.numbers[0]].add(source)
        elif message.kind == Kind.GIVEN:
            self._given[message.numbers][source] = message.arrays[0]
        elif self._passed_on is not None:
            self._passed_on(source, message)


def _share(number: int, table: int, piece: Piece) -> Message:
    """SHARE(exchange, table, ordinal, has counts; rows, values, scale, counts): rows of a gradient, for their taker."""
    counted = piece.counts is not None
    arrays = (piece.slots, piece.values, np.array([piece.scale]), piece.counts if counted else _NO_ROWS)
    return Message(Kind.SHARE, (number, table, piece.ordinal, int(counted)), arrays)
